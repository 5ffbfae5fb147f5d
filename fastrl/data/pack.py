"""Lays out groups of samples as micro-batches with little padding and few repeated prompts.

| layout   | a row is                                  | attention                            |
|----------|-------------------------------------------|--------------------------------------|
| `padded` | a prompt and one completion               | causal                               |
| `shared` | a prompt and several of its completions   | dense mask: prompt + own completion  |
| `varlen` | all sequences of the micro-batch, no gaps | causal inside `attention_cu_seqlens` |

All three give the same log-probabilities and gradients. A sequence's last token predicts nothing and is no input.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, chain, pairwise
from typing import Literal, NamedTuple

import torch

from fastrl.check import choice, require
from fastrl.data.plan import ModelShape, Row, balance, fit, plan, split
from fastrl.ops.support import support_sets
from fastrl.types import Group, MicroBatch, Sample

Layout = Literal["auto", "padded", "shared", "varlen"]
LAYOUTS: tuple[Layout, ...] = ("auto", "padded", "shared", "varlen")


class Counts(NamedTuple):
    """Trained tokens, sequences and groups, which normalise a loss before it is split into micro-batches."""

    tokens: int
    sequences: int
    groups: int


def trained(group: Group, *, mask_truncated: bool = False) -> list[Sample]:
    """The samples to train on: scored, with a token that the policy wrote, and, under `mask_truncated`, finished.

    `count` and `pack` both use this function, so the normaliser and the loss always agree
    (https://github.com/huggingface/trl/issues/6369).
    """
    return [
        sample
        for sample in group.samples
        if sample.reward is not None and own_tokens(sample) and (sample.finished or not mask_truncated)
    ]


def own_tokens(sample: Sample) -> int:
    """The number of tokens that the policy wrote."""
    return len(sample.token_ids) if sample.own is None else sum(sample.own)


def count(groups: Sequence[Group], *, mask_truncated: bool = False) -> Counts:
    """Counts trained completion tokens, sequences and groups. Groups without a trained sample do not count."""
    kept = [samples for group in groups if (samples := trained(group, mask_truncated=mask_truncated))]
    tokens = sum(own_tokens(sample) for samples in kept for sample in samples)
    return Counts(tokens=tokens, sequences=sum(map(len, kept)), groups=len(kept))


def minibatches(groups: Sequence[Group], n: int, generator: torch.Generator) -> list[list[Group]]:
    """Splits a rollout into `n` shuffled mini-batches of whole groups with about equal numbers of tokens.

    With fewer than `n` groups there are fewer mini-batches: none is empty.
    """
    require(n >= 1, "minibatches", "n", "at least 1", n)
    order = torch.randperm(len(groups), generator=generator).tolist()
    parts = balance([groups[index] for index in order], _group_tokens, n)
    return [part for part in parts if part]


def pack(
    groups: Sequence[Group],
    *,
    layout: str,  # of LAYOUTS
    max_tokens: int,
    device: torch.device | str = "cpu",
    shape: ModelShape | None = None,
    mask_truncated: bool = False,
    whole_groups: bool = False,
) -> list[MicroBatch]:
    """The `trained` samples of `groups`, each once, as micro-batches of at most `max_tokens` input tokens.

    `layout="auto"` takes the cheaper of `padded` and `shared` under `ModelShape.row_cost`. `varlen` needs a model whose
    attention takes sequence bounds: `fastrl.model.attention.prepare_attention`. A sample's group id is the index of its
    group in `groups`. `advantages` and `sampling_logps` come from the samples; so do `ref_logps`, `old_logps` and
    `values` if every sample of the micro-batch has them, and `support`, which all have or none. Equal arguments give
    equal order.

    Args:
        max_tokens: bound on R * L of a micro-batch, padding included.
        shape: the model's sizes, which decide how a group is split over `shared` rows and what `auto` takes.
        mask_truncated: leave out samples that hit the length limit; give `count` the same value.
        whole_groups: keep a group's samples in one micro-batch, adjacent and in order, for losses that compare them,
            such as preference losses; under `shared` they are then one row.

    Raises:
        ValueError: a sequence, or with `whole_groups` a group, is longer than `max_tokens`, a prompt is empty,
            `sampling_logps` or `support` do not match the tokens, or only some samples have a `support`.
    """
    choice("pack", "layout", layout, LAYOUTS)
    shape = shape or ModelShape()
    taken = [
        (index, group.prompt.token_ids, trained(group, mask_truncated=mask_truncated))
        for index, group in enumerate(groups)
    ]
    units = [[Row(index, prompt, [sample]) for sample in samples] for index, prompt, samples in taken if samples]
    group_tokens = {index: sum(map(own_tokens, samples)) for index, _, samples in taken}
    rows = list(chain.from_iterable(units))
    _check(rows, max_tokens)
    if not whole_groups:
        units = [[row] for row in rows]  # a micro-batch holds all rows of a unit or none
    do = "Raise max_tokens, or leave out the longest groups."
    if layout == "varlen":
        largest = max((sum(row.length for row in unit) for unit in units), default=0)
        require(largest <= max_tokens, "pack", "max_tokens", f"at least {largest}, a whole group", max_tokens, do)
        parts = fit(units, lambda unit: sum(row.length for row in unit), max_tokens)
        parts = [list(chain.from_iterable(part)) for part in parts]
        return _micro_batches(parts, "varlen", torch.device(device), group_tokens)

    plans = {}
    if layout != "shared":
        plans["padded"] = _plan_padded(units, max_tokens, shape)
    if layout != "padded":
        groups_rows = [Row(*group) for group in taken if group[2]]
        if not whole_groups:
            groups_rows = [part for row in groups_rows for part in split(row, max_tokens, shape.crossover)]
        plans["shared"] = plan(groups_rows, max_tokens, lambda length: shape.row_cost(length, dense=True))
    name, (cost, parts) = min(plans.items(), key=lambda item: item[1][0])
    require(cost < math.inf, "pack", "max_tokens", "room for every whole group", max_tokens, do)
    return _micro_batches(parts, name, torch.device(device), group_tokens)


def _plan_padded(units: list[list[Row]], max_tokens: int, shape: ModelShape) -> tuple[float, list[list[Row]]]:
    """`plan` for units of several rows, each represented by its longest row."""
    width = max(map(len, units), default=1)
    longest = [max(unit, key=lambda row: row.length) for unit in units]
    unit_of = {id(row): unit for row, unit in zip(longest, units, strict=True)}
    cost, parts = plan(longest, max_tokens // width, lambda length: shape.row_cost(length, dense=False))
    return width * cost, [[row for stand_in in part for row in unit_of[id(stand_in)]] for part in parts]


def _group_tokens(group: Group) -> int:
    return sum(len(group.prompt.token_ids) + len(sample.token_ids) for sample in group.samples)


def _check(rows: list[Row], max_tokens: int) -> None:
    require(max_tokens >= 1, "pack", "max_tokens", "at least 1", max_tokens)
    for group_id, prompt_ids, (sample,) in rows:
        require(len(prompt_ids) > 0, "pack", f"groups[{group_id}].prompt.token_ids", "at least one token", "none")
        tokens, logps = len(sample.token_ids), len(sample.sampling_logps)
        require(logps == tokens, "pack", f"groups[{group_id}] sampling_logps", f"{tokens}, one per token", logps)
        sets = tokens if sample.support is None else len(sample.support)
        require(sets == tokens, "pack", f"groups[{group_id}] support", f"{tokens} sets, one per token", sets)
    recorded = sum(row.samples[0].support is not None for row in rows)
    do = "Record it for all, or set it to None."
    require(recorded in (0, len(rows)), "pack", "support", f"{len(rows)} samples with one, or none", recorded, do)
    if rows:
        longest = max(rows, key=lambda row: row.length)
        parts = f"a prompt of {len(longest.prompt_ids)} and a completion of {len(longest.samples[0].token_ids)} tokens"
        require(
            longest.length <= max_tokens,
            "pack",
            "max_tokens",
            f"at least {longest.length} ({parts}, less the last)",
            max_tokens,
            "Raise max_tokens, or lower the limit on prompt or completion tokens.",
        )


def _micro_batches(
    parts: list[list[Row]], layout: str, device: torch.device, group_tokens: dict[int, int]
) -> list[MicroBatch]:
    tokens = [sum(row.length for row in part) for part in parts]
    return [
        replace(_micro_batch(part, layout, device, group_tokens), share=own / sum(tokens))
        for part, own in zip(parts, tokens, strict=True)
    ]


def _micro_batch(rows: list[Row], layout: str, device: torch.device, group_tokens: dict[int, int]) -> MicroBatch:
    samples = [sample for row in rows for sample in row.samples]
    lengths = [row.length for row in rows]
    longest, varlen = max(lengths), layout == "varlen"
    starts = [0, *accumulate(lengths)] if varlen else range(0, len(rows) * longest, longest)
    R, L = (1, sum(lengths)) if varlen else (len(rows), longest)
    # A padded row's positions continue into its padding, so transformers sees no second sequence there and needs no
    # mask. A shared row is longer than any of its sequences, so there they must not.
    positions = [0] * L * R if layout == "shared" else list(range(L)) * R
    input_ids, owner, hidden_index = [0] * (R * L), [-1] * (R * L), []
    for row, start in zip(rows, starts, strict=False):
        prompt = len(row.prompt_ids)
        at = start + prompt
        input_ids[start:at], owner[start:at], positions[start:at] = row.prompt_ids, [0] * prompt, range(prompt)
        for number, sample in enumerate(row.samples, start=1):
            end = at + len(sample.token_ids) - 1
            input_ids[at:end], owner[at:end] = sample.token_ids[:-1], [number] * (end - at)
            positions[at:end] = range(prompt, prompt + end - at)
            hidden_index += [start + prompt - 1, *range(at, end)]  # the prompt's last token predicts the first
            at = end

    def tensor(values: Sequence[float], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    def known(name: str) -> torch.Tensor | None:
        columns = [getattr(sample, name) for sample in samples]
        return None if None in columns else tensor(list(chain.from_iterable(columns)), torch.float32)

    owners = tensor(owner).view(R, L)
    masks = {"padded": lambda: owners >= 0, "shared": lambda: _shared_mask(owners), "varlen": lambda: None}
    return MicroBatch(
        input_ids=tensor(input_ids).view(R, L),
        position_ids=tensor(positions).view(R, L),
        attention_mask=masks[layout](),
        hidden_index=tensor(hidden_index),
        targets=tensor(list(chain.from_iterable(sample.token_ids for sample in samples))),
        cu_seqlens=tensor([0, *accumulate(len(sample.token_ids) for sample in samples)]),
        group_ids=tensor([row.group_id for row in rows for _ in row.samples]),
        group_tokens=tensor([group_tokens[row.group_id] for row in rows for _ in row.samples]),
        scores=tensor([sample.reward for sample in samples], torch.float32),
        advantages=tensor(_advantages(samples), torch.float32),
        mask=tensor(list(chain.from_iterable(s.own or [True] * len(s.token_ids) for s in samples)), torch.bool),
        sampling_logps=known("sampling_logps"),
        old_logps=known("old_logps"),
        ref_logps=known("ref_logps"),
        values=known("values"),
        attention_cu_seqlens=tensor(starts, torch.int32) if varlen else None,
        attention_max_seqlen=longest if varlen else 0,
        token_mask=owners >= 0,
        support=_support(samples, device),
        samples=tuple(samples),
    )


def spread(batch: MicroBatch, vectors: Mapping[str, torch.Tensor]) -> None:
    """Gives each sample, in its fields of those names, its part of (N,) vectors of the micro-batch's tokens."""
    for name, vector in vectors.items():
        parts = vector.cpu().split(batch.cu_seqlens.diff().tolist())
        for sample, part in zip(batch.samples, parts, strict=True):
            setattr(sample, name, part.tolist())


def _advantages(samples: list[Sample]) -> list[float]:
    """One per sample; one per token if those of a sample differ between its turns."""
    if all(sample.turn_advantages is None for sample in samples):
        return [sample.advantage for sample in samples]
    return list(chain.from_iterable(map(_token_advantages, samples)))


def _token_advantages(sample: Sample) -> list[float]:
    """A turn's advantage at its tokens, and at what the environment said before it, which is not trained on."""
    if sample.turn_advantages is None:
        return [sample.advantage] * len(sample.token_ids)
    lengths = [end - start for start, end in pairwise([0, *sample.turn_ends])]
    parts = zip(sample.turn_advantages, lengths, strict=True)
    return list(chain.from_iterable([advantage] * length for advantage, length in parts))


def _support(samples: list[Sample], device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The sets of all tokens end to end, and their bounds."""
    recorded = samples[0].support is not None
    return support_sets((sample.support for sample in samples), device=device) if recorded else None


def _shared_mask(owners: torch.Tensor) -> torch.Tensor:
    """From (R, L) owners (0 = prompt, i = completion i, -1 = padding) to the (R, 1, L, L) attention mask.

    Padding sees the prompt too: a query without any key would make its softmax NaN.
    """
    query, key = owners[:, None, :, None], owners[:, None, None, :]
    return ((key == 0) | (key == query)).tril()  # (R, 1, L, L)
