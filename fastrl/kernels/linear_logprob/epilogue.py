"""A `Chunk` whose raw logits stay in memory: what the compiled kernels between the matmuls have in common.

Logits are read once for their statistics and once for their gradient, which is written once, in its own dtype.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from fastrl.kernels.linear_logprob import chunked
from fastrl.kernels.linear_logprob.chunked import Statistics, at_rows


class Chunk(chunked.Chunk, ABC):
    """As `chunked.Chunk`; a backend adds the three kernels, which apply bias, scale, softcap and temperature as they
    read."""

    @abstractmethod
    def write_statistics(self, known: Statistics, summaries: torch.Tensor | None = None) -> None:
        """Statistics of `source`, and its summaries (3, n) where there is room for them."""

    @abstractmethod
    def write_gradient(
        self,
        known: Statistics,
        grad_logps: torch.Tensor,
        grad_entropy: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: torch.Tensor,
        rows: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        """d `source` to `out`, which may be `source` itself. `rows`: where in `source` each row is, None: in its place;
        everything else is by row of `out`."""

    def read(self, logits: torch.Tensor, entropy: bool, summaries: torch.Tensor | None = None) -> Statistics:
        """Statistics of hidden W^T (n, V); writes `Read.summaries` (3, n) too where there is room for them."""
        known = self.unknown(logits, entropy)
        self.write_statistics(known, summaries)
        return known

    def unknown(self, logits: torch.Tensor, entropy: bool) -> Statistics:
        """Where a kernel writes the statistics of these logits, which are `source` from now on."""
        self.reread(logits)
        rows = len(logits)
        return Statistics(
            logits.new_empty(rows), logits.new_empty(2, rows), logits.new_empty(rows) if entropy else None
        )

    def reread(self, logits: torch.Tensor) -> None:
        """hidden W^T once more, where the statistics are already known."""
        self.source, self.kept_rows, self.vocabulary = logits, None, logits.shape[1]

    @abstractmethod
    def keep(self, known: Statistics, saved: torch.Tensor, rows: torch.Tensor) -> None:
        """Writes the probabilities to those rows of `saved` (N, V)."""

    def recall(self, saved: torch.Tensor, rows: torch.Tensor) -> None:
        """Takes the probabilities that `keep` wrote."""
        self.source, self.kept_rows, self.vocabulary = saved, rows, saved.shape[1]

    @property
    def kept(self) -> bool:
        """Whether `source` holds probabilities."""
        return self.kept_rows is not None

    def gradient(
        self,
        known: Statistics,
        grad_logps: torch.Tensor,
        grad_entropy: torch.Tensor | None,
        dtype: torch.dtype,
        *,
        rows: torch.Tensor | None = None,
        last: bool = True,
    ) -> torch.Tensor:
        """d hidden W^T (n, V), in `dtype`."""
        targets, temperature = self.targets, self.temperature
        if rows is not None:
            targets, temperature = targets[rows], at_rows(temperature, rows, temperature.dtype)
        in_place = last and not self.kept and rows is None and dtype == self.source.dtype
        out = self.source if in_place else self.source.new_empty(len(grad_logps), self.vocabulary, dtype=dtype)
        source_rows = self.kept_rows if self.kept else rows
        self.write_gradient(known, grad_logps, grad_entropy, targets, temperature, source_rows, out)
        return out
