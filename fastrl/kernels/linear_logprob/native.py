"""`linear_logprob` in C++: logits live in tiles of the cache, and are stored only where that saves a matmul."""

from __future__ import annotations

from typing import Any

import torch

from fastrl.kernels import native
from fastrl.kernels.linear_logprob import storage
from fastrl.kernels.native import address
from fastrl.kernels.softmax_row import NO_SOFTCAP, accumulate_dtype, check_targets, scale_rows


class NativeHead:
    """An LM head as the extension takes it. Rows are lists of indices; per-row arrays hold all N rows."""

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        bias: torch.Tensor | None,
        temperature: torch.Tensor,
        softcap: float,
        logit_scale: float,
    ) -> None:
        """`targets` are safe to read with; `temperature` is in the accumulation dtype."""
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
    ) -> None:
        """Writes what was asked for at these rows."""
        self.extension.head_forward(self.at(rows), *map(address, (logps, lse, entropy, logits)))

    def keep(self, rows: torch.Tensor, lse: torch.Tensor, logits: torch.Tensor, kept: torch.Tensor) -> None:
        """Writes the probabilities of these rows to `kept`, in the order of `logits`."""
        self.extension.head_keep(self.at(rows), *map(address, (lse, logits, kept)))

    def backward(
        self,
        rows: torch.Tensor,
        logps: torch.Tensor,
        lse: torch.Tensor,
        entropy: torch.Tensor | None,
        grad_logps: torch.Tensor,
        grad_entropy: torch.Tensor | None,
        grad_hidden: torch.Tensor | None,
        grad_weight: torch.Tensor | None = None,
        grad_bias: torch.Tensor | None = None,
        *,
        logits: torch.Tensor | None = None,
        kept: torch.Tensor | None = None,
        places: torch.Tensor | None = None,
        stored: int = 0,
        add_weight: bool = False,
    ) -> None:
        """Writes d hidden at these rows and d bias of them all, and writes or adds d weight of them all.

        A 16-bit `grad_weight` is written only, rounded once from the sum over all rows. `logits` or `kept` are those of
        `stored` rows, among which these have `places`; of these rows where that is None.
        """
        round_weight = grad_weight is not None and grad_weight.dtype != self.dtype
        upstream = (logps, lse, entropy, grad_logps, grad_entropy, logits, kept)
        outputs = (grad_hidden, grad_weight, grad_bias)
        self.extension.head_backward(
            self.at(rows), *map(address, (*upstream, places)), stored, *map(address, outputs), add_weight, round_weight
        )


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
    """As `reference.forward`."""
    count, vocabulary = len(targets), weight.shape[0]
    safe, _ = check_targets(targets, vocabulary, ignore_index)
    head = NativeHead(hidden, weight, safe, bias, temperature, softcap, logit_scale)
    logps, lse = hidden.new_zeros(count, dtype=head.dtype), hidden.new_zeros(2, count, dtype=head.dtype)
    entropies = hidden.new_zeros(count if entropy else 0, dtype=head.dtype)
    saved, saved_entropy = hidden.new_empty(0), hidden.new_empty(0)
    rows = (targets != ignore_index).nonzero().squeeze(-1)
    wanted = entropies if entropy else None
    if save == "store":
        saved = hidden.new_empty(count, vocabulary)
        kept, used = saved.view(-1), len(rows) * vocabulary
        if hidden.dtype == head.dtype:
            head.forward(rows, logps, lse, wanted, kept)
        else:
            chunks = head.chunks(rows, storage.KEEP_BYTES // (vocabulary * head.dtype.itemsize))
            logits = head.logits_buffer(chunks[0]) if chunks else None  # the first chunk is the longest
            for chunk, to in zip(chunks, kept[:used].split(logits.numel()) if chunks else (), strict=True):
                head.forward(chunk, logps, lse, wanted, logits)
                head.keep(chunk, lse, logits, to)
        kept[used:].zero_()
    elif save == "frozen":
        most = head.stored_rows(rows, storage.LOGIT_BYTES)
        chunks = head.chunks(rows, most) if most else [rows]
        logits = head.logits_buffer(chunks[0]) if most and chunks else None
        saved = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
        saved_entropy = torch.zeros_like(saved) if entropy else saved_entropy
        zeros, ones = torch.zeros_like(logps), torch.ones_like(logps)
        grad = hidden.new_zeros(hidden.shape, dtype=head.dtype)
        for chunk in chunks:
            head.forward(chunk, logps, lse, wanted, logits)
            head.backward(chunk, logps, lse, wanted, ones, None, grad, logits=logits)
            saved[chunk] = grad[chunk].to(hidden.dtype)
            if entropy:
                head.backward(chunk, logps, lse, wanted, zeros, ones, grad, logits=logits)
                saved_entropy[chunk] = grad[chunk].to(hidden.dtype)
    else:
        head.forward(rows, logps, lse, wanted)
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
    vocabulary = weight.shape[0]
    if save == "frozen":
        nothing = (hidden.new_empty(0, dtype=logps.dtype) for _ in range(2))
        return scale_rows(saved, grad_logps, saved_entropy, grad_entropy), *nothing
    active = grad_logps != 0 if grad_entropy is None else (grad_logps != 0) | (grad_entropy != 0)
    rows = (active & (targets != ignore_index)).nonzero().squeeze(-1)
    safe, _ = check_targets(targets, vocabulary, ignore_index)
    head = NativeHead(hidden, weight, safe, bias, temperature, softcap, logit_scale)
    make = hidden.new_zeros if len(rows) == 0 else hidden.new_empty  # the kernel writes every entry
    grad_hidden = hidden.new_zeros(hidden.shape if needs_hidden else (0,), dtype=head.dtype)
    grad_weight = make(weight.shape if needs_weight else (0,), dtype=weight.dtype if rounded else head.dtype)
    grad_bias = make(vocabulary if needs_bias else 0, dtype=head.dtype)
    # What `forward` kept: logits, or in 16 bits probabilities, which alone tell neither the slope of a softcap nor
    # log p where p has no digits left.
    logits, kept, places = None, None, None
    if save == "store" and hidden.dtype == head.dtype:
        logits = saved
    elif save == "store" and softcap == NO_SOFTCAP and grad_entropy is None:
        kept = saved
    stored = targets != ignore_index
    if save == "store" and len(rows) < stored.sum():
        places = (stored.cumsum(0) - 1)[rows]
    head.backward(
        rows,
        logps,
        lse,
        entropy,
        native.dense(grad_logps),
        native.dense(grad_entropy),
        grad_hidden if needs_hidden else None,
        grad_weight if needs_weight else None,
        grad_bias if needs_bias else None,
        logits=logits,
        kept=kept,
        places=places,
        stored=int(stored.sum()),
    )
    return grad_hidden, grad_weight, grad_bias
