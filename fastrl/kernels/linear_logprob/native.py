"""`linear_logprob` in C++: logits live in tiles of the cache, and are stored only where that saves a matmul."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fastrl.kernels import native
from fastrl.kernels.inputs import HeadInputs, Needs, Read
from fastrl.kernels.linear_logprob import storage
from fastrl.kernels.linear_logprob.chunked import Statistics
from fastrl.kernels.native import address
from fastrl.kernels.softmax_row import NO_SOFTCAP, accumulate_dtype, check_targets, scale_rows


class Gradients(NamedTuple):
    """Where d hidden (N, H), d weight (V, H) and d bias (V,) go; None where nobody needs them."""

    hidden: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None


class NativeHead:
    """An LM head as the extension takes it. Rows are lists of indices; per-row arrays hold all N rows."""

    def __init__(self, inputs: HeadInputs) -> None:
        """The targets are safe to read with."""
        hidden, weight, targets, bias, temperature, softcap, logit_scale, _ = inputs
        self.extension = native.extension()
        self.hidden, self.weight = (x if x.stride(-1) == 1 else x.contiguous() for x in (hidden, weight))
        self.targets, self.bias, self.temperature = targets.contiguous(), native.dense(bias), native.dense(temperature)
        self.options = (softcap, logit_scale)
        self.dtype = accumulate_dtype(hidden.dtype)

    @property
    def width(self) -> int:
        """H."""
        return self.weight.shape[1]

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.weight.shape[0]

    def at(self, rows: torch.Tensor) -> Any:
        """The extension's head over these rows; every tensor in it must outlive it."""
        return self.extension.Head(
            native.DTYPES[self.hidden.dtype],
            address(self.hidden),
            address(self.weight),
            address(self.bias),
            self.hidden.stride(0),
            self.weight.stride(0),
            self.width,
            self.vocabulary,
            address(rows),
            len(rows),
            len(self.targets),
            address(self.targets),
            address(self.temperature),
            self.temperature.numel() > 1,
            *self.options,
            native.reduced_float32(),
            torch.get_num_threads(),
        )

    def stored_rows(self, rows: torch.Tensor, budget: int) -> int:
        """How many of these rows have their logits stored at a time; 0: computing them twice is quicker."""
        return storage.stored_rows(self.hidden.dtype, native.isa(), len(rows), self.width, self.vocabulary, budget)

    def chunks(self, rows: torch.Tensor, most: int) -> list[torch.Tensor]:
        """Row indices in pieces of about one length, at most `most`; whole panels but for the last."""
        if len(rows) == 0:
            return []
        panel = self.extension.lane_tile(self.dtype == torch.float64)
        pieces = -(-len(rows) // max(panel, most // panel * panel))
        size = -(-len(rows) // pieces)
        return list(rows.split(-(-size // panel) * panel))

    def logits_buffer(self, rows: torch.Tensor) -> torch.Tensor:
        """Room for the finished logits of these rows, in the extension's own order."""
        return torch.empty(len(rows) * self.vocabulary, dtype=self.dtype)

    def forward(
        self,
        rows: torch.Tensor,
        logps: torch.Tensor,
        lse: torch.Tensor,
        entropy: torch.Tensor | None,
        logits: torch.Tensor | None = None,
        summaries: torch.Tensor | None = None,
    ) -> None:
        """Writes what was asked for at these rows."""
        self.extension.head_forward(self.at(rows), *map(address, (logps, lse, entropy, logits, summaries)))

    def keep(self, rows: torch.Tensor, lse: torch.Tensor, logits: torch.Tensor, kept: torch.Tensor) -> None:
        """Writes the probabilities of these rows to `kept`, in the order of `logits`."""
        self.extension.head_keep(self.at(rows), *map(address, (lse, logits, kept)))

    def backward(
        self,
        rows: torch.Tensor,
        known: Statistics,
        grad_logps: torch.Tensor,
        grad_entropy: torch.Tensor | None,
        into: Gradients,
        *,
        logits: torch.Tensor | None = None,
        kept: torch.Tensor | None = None,
        places: torch.Tensor | None = None,
        stored: int = 0,
        add_weight: bool = False,
    ) -> None:
        """Writes d hidden at these rows and d bias of them all, and writes or adds d weight of them all.

        A 16-bit d weight is written only, rounded once from the sum over all rows. `logits` or `kept` are those of
        `stored` rows, among which these have `places`; of these rows where that is None.
        """
        round_weight = into.weight is not None and into.weight.dtype != self.dtype
        upstream = (*known, grad_logps, grad_entropy, logits, kept)
        self.extension.head_backward(
            self.at(rows), *map(address, (*upstream, places)), stored, *map(address, into), add_weight, round_weight
        )


def forward(
    inputs: HeadInputs,
    *,
    entropy: bool,
    save: str,
    summaries: bool = False,
) -> Read:
    """As `reference.forward`."""
    hidden, weight, targets, ignore_index = inputs.hidden, inputs.weight, inputs.targets, inputs.ignore_index
    count, vocabulary = len(targets), weight.shape[0]
    safe, _ = check_targets(targets, vocabulary, ignore_index)
    head = NativeHead(inputs._replace(targets=safe))
    logps, lse = hidden.new_zeros(count, dtype=head.dtype), hidden.new_zeros(2, count, dtype=head.dtype)
    entropies = hidden.new_zeros(count if entropy else 0, dtype=head.dtype)
    summary = hidden.new_zeros(3, count if summaries else 0, dtype=head.dtype)
    asked = summary if summaries else None
    saved, saved_entropy = hidden.new_empty(0), hidden.new_empty(0)
    rows = (targets != ignore_index).nonzero().squeeze(-1)
    wanted = entropies if entropy else None
    if save == "store":
        saved = hidden.new_empty(count, vocabulary)
        kept, used = saved.view(-1), len(rows) * vocabulary
        if hidden.dtype == head.dtype:
            head.forward(rows, logps, lse, wanted, kept, asked)
        else:
            chunks = head.chunks(rows, storage.KEEP_BYTES // (vocabulary * head.dtype.itemsize))
            logits = head.logits_buffer(chunks[0]) if chunks else None  # the first chunk is the longest
            for chunk, to in zip(chunks, kept[:used].split(logits.numel()) if chunks else (), strict=True):
                head.forward(chunk, logps, lse, wanted, logits, asked)
                head.keep(chunk, lse, logits, to)
        kept[used:].zero_()
    elif save == "frozen":
        most = head.stored_rows(rows, storage.LOGIT_BYTES)
        chunks = head.chunks(rows, most) if most else [rows]
        logits = head.logits_buffer(chunks[0]) if most and chunks else None
        saved = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
        saved_entropy = torch.zeros_like(saved) if entropy else saved_entropy
        zeros, ones = torch.zeros_like(logps), torch.ones_like(logps)
        grad, known = hidden.new_zeros(hidden.shape, dtype=head.dtype), Statistics(logps, lse, wanted)
        for chunk in chunks:
            head.forward(chunk, logps, lse, wanted, logits, asked)
            head.backward(chunk, known, ones, None, Gradients(grad), logits=logits)
            saved[chunk] = grad[chunk].to(hidden.dtype)
            if entropy:
                head.backward(chunk, known, zeros, ones, Gradients(grad), logits=logits)
                saved_entropy[chunk] = grad[chunk].to(hidden.dtype)
    else:
        head.forward(rows, logps, lse, wanted, None, asked)
    return Read(logps, entropies, lse, saved, saved_entropy, summary)


def backward(
    grad_logps: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    inputs: HeadInputs,
    read: Read,
    *,
    save: str,
    needs: Needs,
    rounded: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `reference.backward`; rows whose upstream gradient is exactly zero cost nothing."""
    hidden, weight, targets, ignore_index = inputs.hidden, inputs.weight, inputs.targets, inputs.ignore_index
    logps, entropy, lse, saved, saved_entropy, _ = read
    vocabulary = weight.shape[0]
    if save == "frozen":
        nothing = (hidden.new_empty(0, dtype=logps.dtype) for _ in range(2))
        return scale_rows(saved, grad_logps, saved_entropy, grad_entropy), *nothing
    active = grad_logps != 0 if grad_entropy is None else (grad_logps != 0) | (grad_entropy != 0)
    rows = (active & (targets != ignore_index)).nonzero().squeeze(-1)
    safe, _ = check_targets(targets, vocabulary, ignore_index)
    head = NativeHead(inputs._replace(targets=safe))
    make = hidden.new_zeros if len(rows) == 0 else hidden.new_empty  # the kernel writes every entry
    grad_hidden = hidden.new_zeros(hidden.shape if needs.hidden else (0,), dtype=head.dtype)
    grad_weight = make(weight.shape if needs.weight else (0,), dtype=weight.dtype if rounded else head.dtype)
    grad_bias = make(vocabulary if needs.bias else 0, dtype=head.dtype)
    # What `forward` kept: logits, or in 16 bits probabilities, which alone tell neither the slope of a softcap nor
    # log p where p has no digits left.
    logits, kept, places = None, None, None
    if save == "store" and hidden.dtype == head.dtype:
        logits = saved
    elif save == "store" and inputs.softcap == NO_SOFTCAP and grad_entropy is None:
        kept = saved
    stored = targets != ignore_index
    if save == "store" and len(rows) < stored.sum():
        places = (stored.cumsum(0) - 1)[rows]
    outputs = (grad_hidden, grad_weight, grad_bias)
    head.backward(
        rows,
        Statistics(logps, lse, entropy),
        native.dense(grad_logps),
        native.dense(grad_entropy),
        Gradients(*(out if needed else None for out, needed in zip(outputs, needs, strict=True))),
        logits=logits,
        kept=kept,
        places=places,
        stored=int(stored.sum()),
    )
    return grad_hidden, grad_weight, grad_bias
