"""`linear_logprob` in plain torch with bounded memory: rows in chunks, ignored and zero-gradient rows left out."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastrl.kernels.softmax_row import (
    accumulate_dtype,
    check_targets,
    entropy_of,
    finish_logits_,
    grad_logits_,
    scale_rows,
    slope_from_probs,
    softmax_,
    unfinish_grad_,
)

CHUNK_BYTES = 64 << 20  # of logits in the accumulation dtype; the workspace is a small multiple of it
VOCABULARY_TILE = 8192  # rows of a 16-bit weight that are widened at a time where no mixed-precision matmul exists

_MIXED_MATMUL = hasattr(torch.ops.aten.mm, "dtype")  # mm(16-bit, 16-bit) -> float32, CUDA, torch 2.8 and newer


def row_chunks(rows: torch.Tensor, vocabulary: int, itemsize: int) -> Iterator[torch.Tensor]:
    """Splits row indices into equal chunks whose logits fit `CHUNK_BYTES`."""
    most = max(1, CHUNK_BYTES // (vocabulary * itemsize))
    pieces = -(-len(rows) // most)
    return iter(torch.tensor_split(rows, pieces)) if pieces else iter(())


class Head:
    """The three products with the head's weight, each accumulated in float32 (float64 for float64 inputs).

    Products of 16-bit values are exact in float32, so logits are never rounded before the log-sum-exp. A 16-bit weight
    is widened tile by tile where the device has no mixed-precision matmul, so no float32 copy of it ever exists.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, main_grad: torch.Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias
        self.dtype = accumulate_dtype(weight.dtype)
        self.mixed = _MIXED_MATMUL and weight.is_cuda and weight.dtype != self.dtype
        self.grad_weight = main_grad
        self.grad_bias: torch.Tensor | None = None

    def _tiles(self) -> Iterator[tuple[slice, torch.Tensor]]:
        size = self.weight.shape[0]
        step = size if self.weight.dtype == self.dtype else VOCABULARY_TILE
        for start in range(0, size, step):
            tile = slice(start, min(start + step, size))
            yield tile, self.weight[tile].to(self.dtype)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (n, H) -> raw logits (n, V)."""
        if self.mixed:
            z = torch.mm(hidden, self.weight.T, out_dtype=self.dtype)
        else:
            h = hidden.to(self.dtype)
            z = h.new_empty(len(h), self.weight.shape[0])
            for tile, weight in self._tiles():
                torch.mm(h, weight.T, out=z[:, tile])
        return z if self.bias is None else z.add_(self.bias)

    def grad_hidden(self, dz: torch.Tensor) -> torch.Tensor:
        """d raw logits (n, V) -> d hidden (n, H)."""
        if self.mixed:
            return torch.mm(dz.to(self.weight.dtype), self.weight, out_dtype=self.dtype)
        # A 16-bit product over the whole vocabulary accumulates inside in float32 and is rounded once, as d hidden is.
        return torch.mm(dz.to(self.weight.dtype), self.weight).to(self.dtype)

    def accumulate_weight(self, dz: torch.Tensor, hidden: torch.Tensor) -> None:
        """grad_weight += dz^T hidden; the first chunk writes, so the buffer is never filled with zeros first."""
        if self.mixed:
            product = torch.mm(dz.to(hidden.dtype).T, hidden, out_dtype=self.dtype)
            self.grad_weight = product if self.grad_weight is None else self.grad_weight.add_(product)
        elif self.grad_weight is None:
            self.grad_weight = dz.T @ hidden.to(self.dtype)
        else:
            self.grad_weight.addmm_(dz.T, hidden.to(self.dtype))

    def accumulate_bias(self, dz: torch.Tensor) -> None:
        """grad_bias += sum of dz over rows."""
        total = dz.sum(0)
        self.grad_bias = total if self.grad_bias is None else self.grad_bias.add_(total)

    def gradients(self, needs_weight: bool, needs_bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(grad_weight, grad_bias): zeros when no row contributed, (0,) when not needed."""

        def made(grad: torch.Tensor | None, shape: torch.Size, needed: bool) -> torch.Tensor:
            if needed and grad is not None:
                return grad
            return self.weight.new_zeros(shape if needed else (0,), dtype=self.dtype)

        return (
            made(self.grad_weight, self.weight.shape, needs_weight),
            made(self.grad_bias, self.weight.shape[:1], needs_bias),
        )


def at_rows(temperature: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The temperatures of some rows: (1,) stays (1,), (N,) becomes (n,)."""
    return (temperature if temperature.numel() == 1 else temperature[rows]).to(dtype)


def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: torch.Tensor,
    *,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    entropy: bool,
    save: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `reference.forward`, in chunks of rows."""
    head = Head(weight, bias)
    count, vocabulary = len(targets), weight.shape[0]
    logps, lse = hidden.new_zeros(count, dtype=head.dtype), hidden.new_zeros(2, count, dtype=head.dtype)
    entropies = hidden.new_zeros(count if entropy else 0, dtype=head.dtype)
    saved, saved_entropy = hidden.new_empty(0), hidden.new_empty(0)
    if save == "keep":
        saved = hidden.new_empty(count, vocabulary)
        saved[targets == ignore_index] = 0
    elif save == "frozen":
        saved = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
        saved_entropy = torch.zeros_like(saved) if entropy else saved_entropy
    safe, poisoned = check_targets(targets, vocabulary, ignore_index)
    for rows in row_chunks((targets != ignore_index).nonzero().squeeze(-1), vocabulary, logps.element_size()):
        y, t = safe[rows], at_rows(temperature, rows, head.dtype)
        p = head.logits(hidden[rows])
        slope = finish_logits_(p, t, softcap, logit_scale)
        chunk_logps, lse[:, rows] = softmax_(p, y)
        if poisoned is not None:
            chunk_logps.masked_fill_(poisoned[rows], float("nan"))
        logps[rows] = chunk_logps
        if entropy:
            entropies[rows] = chunk_entropy = entropy_of(p)
        if save == "keep":
            saved[rows] = p.to(saved.dtype)
        elif save == "frozen":
            one = torch.ones_like(chunk_logps)
            if entropy:
                dz = grad_logits_(p.clone(), y, chunk_logps, torch.zeros_like(one), chunk_entropy, one)
                saved_entropy[rows] = head.grad_hidden(unfinish_grad_(dz, slope, t, logit_scale)).to(hidden.dtype)
            dz = unfinish_grad_(grad_logits_(p, y, chunk_logps, one), slope, t, logit_scale)
            saved[rows] = head.grad_hidden(dz).to(hidden.dtype)
    return logps, entropies, lse, saved, saved_entropy


def backward(
    grad_logps: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: torch.Tensor,
    logps: torch.Tensor,
    entropy: torch.Tensor,
    lse: torch.Tensor,
    saved: torch.Tensor,
    saved_entropy: torch.Tensor,
    *,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    save: str,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    rounded: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `reference.backward`; rows whose upstream gradient is exactly zero cost nothing."""
    head = Head(weight, bias)
    if save == "frozen":
        return scale_rows(saved, grad_logps, saved_entropy, grad_entropy), *head.gradients(False, False)
    active = grad_logps != 0 if grad_entropy is None else (grad_logps != 0) | (grad_entropy != 0)
    active &= targets != ignore_index
    grad_hidden = hidden.new_zeros(hidden.shape if needs_hidden else (0,), dtype=head.dtype)
    safe, _ = check_targets(targets, weight.shape[0], ignore_index)
    for rows in row_chunks(active.nonzero().squeeze(-1), weight.shape[0], logps.element_size()):
        y, t, h = safe[rows], at_rows(temperature, rows, head.dtype), hidden[rows]
        if save == "keep":
            p = saved[rows].to(head.dtype)
            slope = slope_from_probs(p, y, logps[rows], lse[:, rows], t, softcap)
        else:
            p = head.logits(h)
            slope = finish_logits_(p, t, softcap, logit_scale)
            softmax_(p, y)
        upstream_entropy = None if grad_entropy is None else grad_entropy[rows]
        row_entropy = None if grad_entropy is None else entropy[rows]
        dz = grad_logits_(p, y, logps[rows], grad_logps[rows], row_entropy, upstream_entropy)
        unfinish_grad_(dz, slope, t, logit_scale)
        if needs_hidden:
            grad_hidden[rows] = head.grad_hidden(dz)
        if needs_weight:
            head.accumulate_weight(dz, h)
        if needs_bias:
            head.accumulate_bias(dz)
    return grad_hidden, *head.gradients(needs_weight, needs_bias)
