"""Decides which completions share a row, and which rows a micro-batch, to minimise the cost of the forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from fastrl.types import Sample

if TYPE_CHECKING:
    from torch import nn

Item = TypeVar("Item")

# Fixed cost of a micro-batch, as a share of `max_tokens`: launching kernels, reading weights, writing gradients.
LAUNCH_SHARE = 1 / 16


@dataclass(frozen=True)
class ModelShape:
    """The model sizes that set the cost of a row; the default is like a decoder with half a billion weights."""

    hidden: int = 1024  # heads * head size
    layers: int = 24
    linear_params: int = 24 * 12 * 1024**2  # weights that each token is multiplied by, without the head

    @classmethod
    def of(cls, model: nn.Module) -> ModelShape:
        """The shape of a transformers model."""
        config: Any = model.config.get_text_config()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        vocabulary = [model.get_input_embeddings(), model.get_output_embeddings()]
        tables = {id(module.weight): module.weight.numel() for module in vocabulary if module is not None}
        return cls(
            hidden=config.num_attention_heads * head_dim,
            layers=config.num_hidden_layers,
            linear_params=sum(weight.numel() for weight in model.parameters()) - sum(tables.values()),
        )

    @property
    def crossover(self) -> float:
        """Row length at which dense attention costs as much as the linear layers.

        A token costs 2 FLOPs per weight in the linear layers. A row of L tokens costs 4 L^2 hidden per layer in
        attention: 2 for the scores, 2 for the weighted sum. Equal where 2 L linear_params = 4 L^2 hidden layers.
        """
        return self.linear_params / (2 * self.hidden * self.layers)

    def row_cost(self, length: int, *, dense: bool) -> float:
        """Forward cost of a row of `length` tokens, in tokens of linear-layer work: L (1 + L / crossover).

        A causal kernel skips the half of attention above the diagonal; with a dense mask it cannot.
        """
        return length * (1 + length / self.crossover / (1 if dense else 2))


class Row(NamedTuple):
    """A prompt and the completions that follow it in one row."""

    group_id: int
    prompt_ids: tuple[int, ...]
    samples: list[Sample]

    @property
    def length(self) -> int:
        """Input tokens, without the last token of each completion."""
        return len(self.prompt_ids) + sum(len(sample.token_ids) - 1 for sample in self.samples)


def balance(items: Sequence[Item], size: Callable[[Item], int], n: int) -> list[list[Item]]:
    """`n` parts of about equal size: largest items first, each to the lightest part. Parts keep the items' order."""
    loads = [(0, part) for part in range(n)]
    heapify(loads)
    members: list[list[int]] = [[] for _ in range(n)]
    for index in sorted(range(len(items)), key=lambda index: -size(items[index])):
        load, part = loads[0]
        members[part].append(index)
        heapreplace(loads, (load + size(items[index]), part))
    return [[items[index] for index in sorted(part)] for part in members]


def fit(items: Sequence[Item], size: Callable[[Item], int], capacity: int, at_least: int = 1) -> list[list[Item]]:
    """A small number of balanced parts of at most `capacity` each; every item must fit alone."""
    n = max(at_least, math.ceil(sum(map(size, items)) / max(capacity, 1)))
    while True:
        parts = [part for part in balance(items, size, n) if part]
        if all(sum(map(size, part)) <= capacity for part in parts):
            return parts
        n += 1


def split(row: Row, max_tokens: int, crossover: float) -> list[Row]:
    """The rows that a group's completions share, each with its own copy of the prompt.

    With P prompt tokens, S completion tokens, k equal rows and C = `crossover`, the dense cost is
    k L (1 + L / C) at L = P + S / k. Its derivative in k is zero at S / k = sqrt(P^2 + P C): fewer rows waste attention
    between completions that the mask discards; more rows waste copies of the prompt.
    """
    prompt, total = len(row.prompt_ids), row.length - len(row.prompt_ids)
    rows = round(total / math.sqrt(prompt * (prompt + crossover))) if prompt else 0
    parts = fit(row.samples, lambda sample: len(sample.token_ids) - 1, max_tokens - prompt, max(rows, 1))
    return [row._replace(samples=part) for part in parts]


def plan(rows: list[Row], max_tokens: int, cost: Callable[[int], float]) -> tuple[float, list[list[Row]]]:
    """The cheapest micro-batches, each padded to its longest row, and their cost.

    Cutting the rows sorted by length is optimal: taking any other micro-batches in the order of their longest rows and
    refilling them in sorted order lengthens none. The best cuts are a shortest path over cut positions. Among equal
    costs, the smallest largest micro-batch wins, because it sets the memory peak. The cost is infinite if a row is
    longer than `max_tokens`.
    """
    rows = sorted(rows, key=lambda row: -row.length)
    best = [0.0] + [math.inf] * len(rows)
    largest = [0] * (len(rows) + 1)  # tokens of the largest micro-batch before each cut
    cut = [0] * (len(rows) + 1)
    for start, row in enumerate(rows):
        base, per_row = best[start] + LAUNCH_SHARE * max_tokens, cost(row.length)
        for end in range(start + 1, min(len(rows), start + max_tokens // row.length) + 1):
            total, peak = base + (end - start) * per_row, max(largest[start], (end - start) * row.length)
            same = math.isclose(total, best[end], rel_tol=1e-9)  # equal but for the order of the sum
            if peak < largest[end] if same else total < best[end]:
                best[end], largest[end], cut[end] = total, peak, start
    parts, end = [], len(rows)
    while end:
        parts.append(rows[cut[end] : end])
        end = cut[end]
    return best[-1], parts[::-1]
