"""`linear_logprob` with bounded memory: rows in chunks, ignored and zero-gradient rows left out.

The matmuls are torch's. What lies between them is a `Chunk`: here in plain torch, in `triton_impl` and `cuda_impl`
as kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import NamedTuple

import torch

from fastrl.kernels.inputs import HeadInputs, Needs, Read
from fastrl.kernels.softmax_row import (
    accumulate_dtype,
    check_targets,
    entropy_of,
    finish_logits_,
    grad_logits_,
    scale_rows,
    slope_from_probs,
    softmax_,
    summaries_of,
    unfinish_grad_,
)

CHUNK_BYTES = 64 << 20  # of logits in the accumulation dtype; the workspace is a small multiple of it
GPU_CHUNKS = 24  # such chunks at a time on a GPU, where each passes over the weight's whole gradient in slow memory
VOCABULARY_TILE = 8192  # rows of a 16-bit weight that are widened at a time where no mixed-precision matmul exists


def compact(*groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(order, counts): the rows of disjoint masks (N,), ascending, group after group and then the rest; and how many
    each group has. Nothing here waits for the device."""
    key = torch.full_like(groups[0], len(groups), dtype=torch.uint8)
    for i, group in enumerate(groups):
        key.masked_fill_(group, i)
    return key.sort(stable=True).indices, torch.stack([group.sum() for group in groups])


class Selection:
    """The rows of disjoint masks, for matmuls: these take their sizes from the host, so it has to learn the counts.

    A matmul that reads a count on the device, or computes all rows, costs more than the one wait per selection that
    stays: on a GPU the counts are copied behind the compaction, `rows` waits for them alone, and what was launched in
    between keeps the device at work meanwhile.
    """

    def __init__(self, *groups: torch.Tensor) -> None:
        self.order, counts = compact(*groups)
        self.counts = counts.to("cpu", non_blocking=counts.is_cuda)  # into pinned memory
        self.copied = torch.cuda.current_stream(counts.device).record_event() if counts.is_cuda else None

    def rows(self) -> tuple[torch.Tensor, ...]:
        """Ascending row indices, one tensor per mask."""
        if self.copied is not None:
            self.copied.synchronize()
        counts = self.counts.tolist()
        return self.order[: sum(counts)].split(counts)


def multiplies_mixed(weight: torch.Tensor) -> bool:
    """Whether mm makes a float32 product of 16-bit matrices: CUDA, torch 2.8 and newer."""
    return hasattr(torch.ops.aten.mm, "dtype") and weight.is_cuda and weight.element_size() == 2


@cache
def adds_into_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether addmm adds a product of 16-bit matrices to a float32 matrix in place. Schemas do not tell: until torch
    2.10 the sum had to be in 16 bits too (pytorch#167931). So the device is asked, once."""
    if not hasattr(torch.ops.aten.addmm, "dtype_out"):
        return False
    total, one = torch.ones(1, 1, device=device), torch.ones(1, 1, device=device, dtype=dtype)
    try:
        torch.addmm(total, one, one, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return total.item() == 2


def row_chunks(rows: torch.Tensor, vocabulary: int, itemsize: int) -> Iterator[torch.Tensor]:
    """Splits row indices into equal chunks whose logits fit `CHUNK_BYTES`."""
    most = max(1, CHUNK_BYTES * (GPU_CHUNKS if rows.is_cuda else 1) // (max(vocabulary, 1) * itemsize))
    pieces = -(-len(rows) // most)
    return iter(torch.tensor_split(rows, pieces)) if pieces else iter(())


class Head:
    """The three products with the head's weight, each accumulated in float32 (float64 for float64 inputs).

    Products of 16-bit values are exact in float32, so logits are never rounded before the log-sum-exp. A 16-bit weight
    is widened tile by tile where the device has no mixed-precision matmul, so no float32 copy of it ever exists.
    """

    def __init__(self, weight: torch.Tensor, main_grad: torch.Tensor | None = None) -> None:
        self.weight = weight
        self.dtype = accumulate_dtype(weight.dtype)
        self.mixed = multiplies_mixed(weight)
        self.dz_dtype = weight.dtype if self.mixed else self.dtype  # in which the last two products read dz
        self.grad_weight = main_grad
        self.grad_bias: torch.Tensor | None = None

    def _tiles(self) -> Iterator[tuple[slice, torch.Tensor]]:
        size = self.weight.shape[0]
        step = max(size, 1) if self.weight.dtype == self.dtype else VOCABULARY_TILE
        for start in range(0, size, step):
            tile = slice(start, min(start + step, size))
            yield tile, self.weight[tile].to(self.dtype)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (n, H) -> hidden W^T (n, V), without the bias."""
        if self.mixed:
            return torch.mm(hidden, self.weight.T, out_dtype=self.dtype)
        h = hidden.to(self.dtype)
        z = h.new_empty(len(h), self.weight.shape[0])
        for tile, weight in self._tiles():
            torch.mm(h, weight.T, out=z[:, tile])
        return z

    def grad_hidden(self, dz: torch.Tensor) -> torch.Tensor:
        """d raw logits (n, V) -> d hidden (n, H)."""
        if self.mixed:
            return torch.mm(dz.to(self.weight.dtype), self.weight, out_dtype=self.dtype)
        if self.weight.is_cpu and self.weight.dtype != self.dtype:  # without such instructions 16 bits are slow
            total = dz.new_zeros(len(dz), self.weight.shape[1])
            for tile, weight in self._tiles():
                total.addmm_(dz[:, tile], weight)
            return total
        # A 16-bit product over the whole vocabulary accumulates inside in float32 and is rounded once, as d hidden is.
        return torch.mm(dz.to(self.weight.dtype), self.weight).to(self.dtype)

    def accumulate_weight(self, dz: torch.Tensor, hidden: torch.Tensor) -> None:
        """grad_weight += dz^T hidden; the first chunk writes, so the buffer is never filled with zeros first."""
        if self.mixed:
            dz = dz.to(hidden.dtype)
            if self.grad_weight is None:
                self.grad_weight = torch.mm(dz.T, hidden, out_dtype=self.dtype)
            elif adds_into_float32(hidden.device, hidden.dtype):
                torch.addmm(self.grad_weight, dz.T, hidden, out_dtype=self.dtype, out=self.grad_weight)
            else:
                self.grad_weight.add_(torch.mm(dz.T, hidden, out_dtype=self.dtype))
        elif self.grad_weight is None:
            self.grad_weight = dz.T @ hidden.to(self.dtype)
        else:
            self.grad_weight.addmm_(dz.T, hidden.to(self.dtype))

    def accumulate_bias(self, dz: torch.Tensor) -> None:
        """grad_bias += sum of dz over rows."""
        total = dz.sum(0, dtype=self.dtype)
        self.grad_bias = total if self.grad_bias is None else self.grad_bias.add_(total)

    def gradients(self, needs_weight: bool, needs_bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(grad_weight, grad_bias): zeros when no row contributed, (0,) when not needed."""

        def made(grad: torch.Tensor | None, shape: tuple[int, ...], needed: bool) -> torch.Tensor:
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


class Statistics(NamedTuple):
    """What is known of each row of logits once it was read."""

    logps: torch.Tensor  # (n,)
    lse: torch.Tensor  # (2, n): the largest logit, and the logarithm of what is left
    entropy: torch.Tensor | None  # (n,)

    def at(self, rows: torch.Tensor) -> Statistics:
        """The statistics of some rows."""
        return Statistics(self.logps[rows], self.lse[:, rows], None if self.entropy is None else self.entropy[rows])


class Chunk:
    """Between the matmuls, for some rows: from logits to their statistics, and from these to the logits' gradient.

    `read`, `reread` or `recall` comes first; the buffer given to it may be overwritten by the last `gradient`.
    """

    columns = 0  # of probabilities beside those of the weight's rows; a target may be one of them

    def __init__(
        self,
        targets: torch.Tensor,
        temperature: torch.Tensor,
        bias: torch.Tensor | None,
        softcap: float,
        logit_scale: float,
    ) -> None:
        """Args: targets (n,) safe to read with, temperature (1,) or (n,) in the accumulation dtype, bias (V,)."""
        self.targets, self.temperature, self.bias = targets, temperature, bias
        self.softcap, self.logit_scale = softcap, logit_scale
        self.slope: torch.Tensor | None = None

    def read(self, logits: torch.Tensor, entropy: bool, summaries: torch.Tensor | None = None) -> Statistics:
        """Statistics of hidden W^T (n, V); writes `Read.summaries` (3, n) too where there is room for them."""
        self.p = self.finished(logits, summaries)
        return Statistics(*softmax_(self.p, self.targets), entropy_of(self.p) if entropy else None)

    def finished(self, logits: torch.Tensor, summaries: torch.Tensor | None) -> torch.Tensor:
        """The finished logits of hidden W^T, with the slope of their cap and their summaries."""
        z = logits if self.bias is None else logits.add_(self.bias)
        self.slope = finish_logits_(z, self.temperature, self.softcap, self.logit_scale)
        if summaries is not None:
            summaries.copy_(summaries_of(z, self.targets))
        return z

    def reread(self, logits: torch.Tensor) -> None:
        """hidden W^T once more, where the statistics are already known."""
        self.read(logits, entropy=False)

    def keep(self, known: Statistics, saved: torch.Tensor, rows: torch.Tensor) -> None:
        """Writes the probabilities to those rows of `saved` (N, V)."""
        saved[rows] = self.p.to(saved.dtype)

    def recall(self, saved: torch.Tensor, rows: torch.Tensor) -> None:
        """Takes the probabilities that `keep` wrote."""
        self.p = saved[rows].to(self.temperature.dtype)

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
        """d hidden W^T (n, V), in `dtype`.

        `rows`: those of the chunk to which the statistics and gradients given here belong, None for all of them.
        `last`: the logits are not needed again.
        """
        p, slope, y, t = self.p, self.slope, self.targets, self.temperature
        if rows is not None:
            p, slope, y, t = p[rows], None if slope is None else slope[rows], y[rows], at_rows(t, rows, t.dtype)
        elif not last:
            p = p.clone()
        if slope is None:
            slope = slope_from_probs(p, y, known.logps, known.lse, t, self.softcap)
        dz = grad_logits_(p, y, known.logps, grad_logps, known.entropy, grad_entropy)
        return unfinish_grad_(dz, slope, t, self.logit_scale).to(dtype)


def forward_in_chunks(
    make: type[Chunk],
    inputs: HeadInputs,
    *,
    entropy: bool,
    save: str,
    summaries: bool = False,
) -> Read:
    """As `reference.forward`, in chunks of rows; on a GPU the host waits once, for the number of rows."""
    hidden, weight, targets, bias, temperature, softcap, logit_scale, ignore_index = inputs
    head = Head(weight)
    ignored = targets == ignore_index
    chosen = Selection(~ignored, ignored)
    count, vocabulary = len(targets), weight.shape[0] + make.columns
    logps, lse = hidden.new_zeros(count, dtype=head.dtype), hidden.new_zeros(2, count, dtype=head.dtype)
    entropies = hidden.new_zeros(count if entropy else 0, dtype=head.dtype)
    summary = hidden.new_zeros(3, count if summaries else 0, dtype=head.dtype)
    saved, saved_entropy = hidden.new_empty(0), hidden.new_empty(0)
    if save == "store":
        saved = hidden.new_empty(count, vocabulary)
    elif save == "frozen":
        saved = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
        saved_entropy = torch.zeros_like(saved) if entropy else saved_entropy
    safe, poisoned = check_targets(targets, vocabulary, ignore_index)
    live, ignored = chosen.rows()
    if save == "store":
        saved.index_fill_(0, ignored, 0)
    for rows in row_chunks(live, vocabulary, logps.element_size()):
        chunk = make(safe[rows], at_rows(temperature, rows, head.dtype), bias, softcap, logit_scale)
        own = summary.new_empty(3, len(rows)) if summaries else None
        known = chunk.read(head.logits(hidden[rows]), entropy, own)
        if own is not None:
            summary[:, rows] = own
        if poisoned is not None:
            known.logps.masked_fill_(poisoned[rows], float("nan"))
        logps[rows], lse[:, rows] = known.logps, known.lse
        if entropy:
            entropies[rows] = known.entropy
        if save == "store":
            chunk.keep(known, saved, rows)
        elif save == "frozen":
            one = torch.ones_like(known.logps)
            if entropy:
                dz = chunk.gradient(known, torch.zeros_like(one), one, head.dz_dtype, last=False)
                saved_entropy[rows] = head.grad_hidden(dz).to(hidden.dtype)
            saved[rows] = head.grad_hidden(chunk.gradient(known, one, None, head.dz_dtype)).to(hidden.dtype)
    return Read(logps, entropies, lse, saved, saved_entropy, summary)


def backward_in_chunks(
    make: type[Chunk],
    grad_logps: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    inputs: HeadInputs,
    read: Read,
    *,
    save: str,
    needs: Needs,
    rounded: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `reference.backward`; rows whose upstream gradient is exactly zero cost nothing. On a GPU the host waits once,
    for the number of the others."""
    hidden, weight, targets, bias, temperature, softcap, logit_scale, ignore_index = inputs
    logps, entropy, lse, saved, saved_entropy, _ = read
    needs_hidden, needs_weight, needs_bias = needs
    head, vocabulary = Head(weight), weight.shape[0] + make.columns
    if save == "frozen":
        return scale_rows(saved, grad_logps, saved_entropy, grad_entropy), *head.gradients(False, False)
    active = grad_logps != 0 if grad_entropy is None else (grad_logps != 0) | (grad_entropy != 0)
    chosen = Selection(active & (targets != ignore_index))
    grad_hidden = hidden.new_zeros(hidden.shape if needs_hidden else (0,), dtype=head.dtype)
    safe, _ = check_targets(targets, vocabulary, ignore_index)
    known = Statistics(logps, lse, None if grad_entropy is None else entropy)
    (live,) = chosen.rows()
    for rows in row_chunks(live, vocabulary, logps.element_size()):
        chunk = make(safe[rows], at_rows(temperature, rows, head.dtype), bias, softcap, logit_scale)
        h = hidden[rows]
        if save == "store":
            chunk.recall(saved, rows)
        else:
            chunk.reread(head.logits(h))
        upstream_entropy = None if grad_entropy is None else grad_entropy[rows]
        dz = chunk.gradient(known.at(rows), grad_logps[rows], upstream_entropy, head.dz_dtype)
        if needs_hidden:
            grad_hidden[rows] = head.grad_hidden(dz)
        if needs_weight:
            head.accumulate_weight(dz, h)
        if needs_bias:
            head.accumulate_bias(dz)
    return grad_hidden, *head.gradients(needs_weight, needs_bias)


forward = partial(forward_in_chunks, Chunk)
backward = partial(backward_in_chunks, Chunk)
