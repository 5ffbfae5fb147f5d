"""The rollout batch that a step trains on, and its form on disk for a run that stops inside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from fastrl.algorithms.policy_gradient import Part
from fastrl.losses.metrics import Metrics
from fastrl.types import Group, MicroBatch, Prompt, Sample

Update = tuple[Metrics, dict[str, float]]  # what an optimizer step reports


@dataclass
class RolloutBatch:
    """One step's completions and their rewards, and how far training on them has come."""

    groups: list[Group]
    contributing: list[Group]  # those of `groups` whose gradient is not zero
    parts: list[Part]  # not trained on yet
    numbers: dict[str, float] = field(default_factory=dict)  # what the algorithm's estimates report
    updates: list[Update] = field(default_factory=list)  # of the optimizer steps that are done
    scored: bool = False  # whether `parts` hold what is read of the weights that sampled the completions

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that is a tensor, by name, in memory of its own."""
        named = {
            f"part.{p}.{b}.{name}": value
            for p, (batches, _) in enumerate(self.parts)
            for b, batch in enumerate(batches)
            for name, value in vars(batch).items()
            if isinstance(value, torch.Tensor)
        }
        for u, (metrics, _) in enumerate(self.updates):
            for name, (total, count) in metrics.items():
                named |= {f"update.{u}.{name}.sum": total, f"update.{u}.{name}.count": count}
        return {name: value.detach().cpu().clone().contiguous() for name, value in named.items()}

    def values(self) -> dict[str, Any]:
        """Everything else, as JSON can hold it; prompts by their index."""
        contributing = {id(group) for group in self.contributing}
        return {
            "groups": [
                {
                    "prompt": group.prompt.index,
                    "contributes": id(group) in contributing,
                    "samples": [asdict(sample) for sample in group.samples],
                }
                for group in self.groups
            ],
            "parts": [
                {
                    "normalizer": normalizer,
                    "micro_batches": [
                        {name: value for name, value in vars(batch).items() if not isinstance(value, torch.Tensor)}
                        for batch in batches
                    ],
                }
                for batches, normalizer in self.parts
            ],
            "numbers": self.numbers,
            "scored": self.scored,
            "updates": [{"numbers": numbers, "metrics": list(metrics)} for metrics, numbers in self.updates],
        }

    @classmethod
    def load(
        cls, values: dict[str, Any], tensors: dict[str, torch.Tensor], prompts: Sequence[Prompt], device: torch.device
    ) -> RolloutBatch:
        """The batch of which these are `values` and `tensors`."""
        tensors = {name: value.to(device) for name, value in tensors.items()}
        by_index = {prompt.index: prompt for prompt in prompts}
        groups = [
            Group(by_index[group["prompt"]], [Sample(**sample) for sample in group["samples"]])
            for group in values["groups"]
        ]
        parts = [
            (
                [_micro_batch(rest, tensors, f"part.{p}.{b}") for b, rest in enumerate(part["micro_batches"])],
                part["normalizer"],
            )
            for p, part in enumerate(values["parts"])
        ]
        updates = [
            (
                {
                    name: (tensors[f"update.{u}.{name}.sum"], tensors[f"update.{u}.{name}.count"])
                    for name in update["metrics"]
                },
                update["numbers"],
            )
            for u, update in enumerate(values["updates"])
        ]
        contributing = [group for group, saved in zip(groups, values["groups"], strict=True) if saved["contributes"]]
        scored = values.get("scored", True)  # older checkpoints are of scored ones
        return cls(groups, contributing, parts, values["numbers"], updates, scored)


def _micro_batch(rest: dict[str, Any], tensors: dict[str, torch.Tensor], prefix: str) -> MicroBatch:
    found = {f.name: tensors[name] for f in fields(MicroBatch) if (name := f"{prefix}.{f.name}") in tensors}
    return MicroBatch(**rest | found)
