"""`linear_logprob` with torch's matmuls and CUDA kernels between them; csrc/cuda/linear_logprob.cu."""

from __future__ import annotations

from functools import partial

import torch

from fastrl.kernels.cuda import DTYPES, address, extension, launch
from fastrl.kernels.linear_logprob import epilogue
from fastrl.kernels.linear_logprob.chunked import Statistics, backward_in_chunks, forward_in_chunks
from fastrl.kernels.native import dense


class Chunk(epilogue.Chunk):
    """As `epilogue.Chunk`, in CUDA."""

    def __init__(
        self,
        targets: torch.Tensor,
        temperature: torch.Tensor,
        bias: torch.Tensor | None,
        softcap: float,
        logit_scale: float,
    ) -> None:
        """As `chunked.Chunk`; the kernels read the bias in the accumulation dtype."""
        bias = None if bias is None else dense(bias.to(temperature.dtype))
        super().__init__(dense(targets), dense(temperature), bias, softcap, logit_scale)

    def write_statistics(self, known: Statistics, summaries: torch.Tensor | None = None) -> None:
        """Statistics of `source`, and its summaries (3, n) where there is room for them."""
        rows, outputs = self._rows(self.targets, self.temperature), map(address, (*known, summaries))
        launch("head_statistics", self.source.device, rows, *outputs)

    def keep(self, known: Statistics, saved: torch.Tensor, rows: torch.Tensor) -> None:
        """Writes the probabilities to those rows of `saved` (N, V)."""
        self._write(self.targets, self.temperature, None, rows, known, None, None, saved)

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
        """d `source` to `out`."""
        self._write(targets, temperature, rows, None, known, grad_logps, grad_entropy, out)

    def _write(
        self,
        targets: torch.Tensor,
        temperature: torch.Tensor,
        from_rows: torch.Tensor | None,
        to_rows: torch.Tensor | None,
        known: Statistics,
        grad_logps: torch.Tensor | None,
        grad_entropy: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        """The gradient, or where none comes from above the probabilities; ChunkGradient in csrc/cuda/kernels.h."""
        # Advanced indexing leaves no promise of how its result lies in memory.
        inputs = tuple(map(dense, (*known, grad_logps, grad_entropy)))
        launch(
            "head_gradient",
            out.device,
            self._rows(targets, temperature),
            self.kept,
            address(from_rows),
            address(to_rows),
            *map(address, inputs),
            DTYPES[out.dtype],
            address(out),
        )

    def _rows(self, targets: torch.Tensor, temperature: torch.Tensor) -> object:
        """The rows of a launch, whose targets these are, as the extension takes them."""
        return extension(self.source.device).HeadChunk(
            DTYPES[self.source.dtype],
            address(self.source),
            len(targets),
            self.vocabulary,
            address(targets),
            address(self.bias),
            address(temperature),
            temperature.numel() > 1,
            self.softcap,
            self.logit_scale,
        )


forward = partial(forward_in_chunks, Chunk)
backward = partial(backward_in_chunks, Chunk)
