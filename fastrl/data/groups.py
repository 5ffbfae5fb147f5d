"""Converts batches to and from JSON, for checkpoints, files and other processes."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

import torch

from fastrl.types import Batch, Group, Prompt, Sample


def batch_to_json(batch: Batch) -> dict[str, Any]:
    """The batch as plain JSON values; floats are restored bit for bit."""
    contributing = {id(group) for group in batch.contributing}
    return {
        "groups": [group_to_json(group) for group in batch.groups],
        "contributing": [id(group) in contributing for group in batch.groups],
        "seed": batch.seed,
        "kind": batch.kind,
        "numbers": batch.numbers,
        "scored": batch.scored,
        "updates": [
            {"numbers": numbers, "metrics": {name: [*map(_number, row)] for name, row in metrics.items()}}
            for metrics, numbers in batch.updates
        ],
    }


def batch_from_json(values: dict[str, Any], device: torch.device | str = "cpu") -> Batch:
    """The inverse of `batch_to_json`; metrics go to `device`."""
    groups = [group_from_json(group) for group in values["groups"]]
    updates = []
    for update in values["updates"]:
        metrics = {name: (_tensor(a, device), _tensor(b, device)) for name, (a, b) in update["metrics"].items()}
        updates.append((metrics, update["numbers"]))
    contributing = [group for group, counts in zip(groups, values["contributing"], strict=True) if counts]
    return Batch(
        groups,
        values["seed"],
        values["kind"],
        contributing,
        values["numbers"],
        scored=values["scored"],
        updates=updates,
    )


def group_to_json(group: Group) -> dict[str, Any]:
    """The group with its prompt; values of a sample that are None are left out."""
    prompt = asdict(group.prompt) | {"token_ids": list(group.prompt.token_ids)}
    rest = {f.name: getattr(group, f.name) for f in fields(Group) if f.name not in ("prompt", "samples", "mismatched")}
    values = {"prompt": prompt, "samples": [sample_to_json(sample) for sample in group.samples], **rest}
    return values | ({"mismatched": sample_to_json(group.mismatched)} if group.mismatched else {})


def group_from_json(values: dict[str, Any]) -> Group:
    """The inverse of `group_to_json`."""
    prompt = Prompt(**values["prompt"] | {"token_ids": tuple(values["prompt"]["token_ids"])})
    samples = [Sample(**sample) for sample in values["samples"]]
    other = Sample(**values["mismatched"]) if values.get("mismatched") else None
    read: dict[str, Any] = values | {"prompt": prompt, "samples": samples, "mismatched": other}
    return Group(**read)


def sample_to_json(sample: Sample) -> dict[str, Any]:
    """The sample; values that are None are left out. `Sample(**values)` is the inverse."""
    return {name: value for name, value in asdict(sample).items() if value is not None}


def _number(value: torch.Tensor) -> list[Any]:
    return [value.item(), str(value.dtype).removeprefix("torch.")]


def _tensor(value: list[Any], device: torch.device | str) -> torch.Tensor:
    return torch.tensor(value[0], dtype=getattr(torch, value[1]), device=device)
