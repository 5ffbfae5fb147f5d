"""The definition of `linear_logprob`: all logits at once, in float32 (float64 for float64 inputs)."""

from __future__ import annotations

import torch

from fastrl.kernels.inputs import HeadInputs, Needs, Read
from fastrl.kernels.softmax_row import (
    accumulate_dtype,
    check_targets,
    entropy_of,
    finish_logits_,
    grad_logits_,
    scale_rows,
    softmax_,
    summaries_of,
    unfinish_grad_,
)


def _probabilities(
    inputs: HeadInputs, hidden: torch.Tensor, targets: torch.Tensor, summaries: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(p, logps, lse, slope of the cap) with hidden states and targets that are safe to compute with."""
    _, weight, _, bias, temperature, softcap, logit_scale, _ = inputs
    dtype = accumulate_dtype(hidden.dtype)
    z = hidden.to(dtype) @ weight.to(dtype).T  # (N, V)
    if bias is not None:
        z += bias.to(dtype)
    slope = finish_logits_(z, temperature.to(dtype), softcap, logit_scale)
    if summaries is not None:
        summaries.copy_(summaries_of(z, targets))
    logps, lse = softmax_(z, targets)
    return z, logps, lse, slope


def forward(
    inputs: HeadInputs,
    *,
    entropy: bool,
    save: str,
    summaries: bool = False,
) -> Read:
    """logps_n = log softmax(cap(logit_scale (h_n W^T + b)) / temperature_n)[y_n], and the entropy of that softmax.

    Ignored rows are exactly 0, whatever their hidden state holds.
    """
    hidden, weight, targets, ignore_index = inputs.hidden, inputs.weight, inputs.targets, inputs.ignore_index
    temperature, logit_scale = inputs.temperature, inputs.logit_scale
    ignored = targets == ignore_index
    safe, poisoned = check_targets(targets, weight.shape[0], ignore_index)
    safe = safe.masked_fill(ignored, 0)
    clean = hidden.masked_fill(ignored.unsqueeze(-1), 0)
    dtype = accumulate_dtype(hidden.dtype)
    summary = hidden.new_empty(3, len(targets) if summaries else 0, dtype=dtype)
    p, logps, lse, slope = _probabilities(inputs, clean, safe, summary if summaries else None)
    if poisoned is not None:
        logps = logps.masked_fill(poisoned, float("nan"))
    h = entropy_of(p) if entropy else p.new_empty(0)
    saved, saved_entropy = hidden.new_empty(0), hidden.new_empty(0)
    if save == "store":
        saved = p.to(hidden.dtype)
    elif save == "frozen":
        one, zero = torch.ones_like(logps), torch.zeros_like(logps)

        def grad_hidden(dz: torch.Tensor) -> torch.Tensor:
            unfinish_grad_(dz, slope, temperature.to(dz.dtype), logit_scale)
            return (dz @ weight.to(dz.dtype)).masked_fill_(ignored.unsqueeze(-1), 0).to(hidden.dtype)

        saved = grad_hidden(grad_logits_(p.clone(), safe, logps, one))
        if entropy:
            saved_entropy = grad_hidden(grad_logits_(p, safe, logps, zero, h, one))
    zeroed = [t.masked_fill(ignored, 0) if t.numel() else t for t in (logps, h, lse, summary)]
    return Read(*zeroed[:3], saved, saved_entropy, zeroed[3])


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
    """(d hidden (N, H), d weight (V, H), d bias (V,)) in the accumulation dtype; (0,) where not needed.

    `rounded` allows, and does not ask for, the dtype of hidden instead: the operator rounds what comes wide.
    """
    hidden, weight, targets, ignore_index = inputs.hidden, inputs.weight, inputs.targets, inputs.ignore_index
    temperature, logit_scale = inputs.temperature, inputs.logit_scale
    dtype = accumulate_dtype(hidden.dtype)

    def unused() -> torch.Tensor:
        return hidden.new_empty(0, dtype=dtype)

    if save == "frozen":
        return scale_rows(read.saved, grad_logps, read.saved_entropy, grad_entropy), unused(), unused()
    silent = grad_logps == 0 if grad_entropy is None else (grad_logps == 0) & (grad_entropy == 0)
    silent |= targets == ignore_index
    safe, _ = check_targets(targets, weight.shape[0], ignore_index)
    safe = safe.masked_fill(silent, 0)
    clean = hidden.to(dtype).masked_fill(silent.unsqueeze(-1), 0)
    p, exact_logps, _, slope = _probabilities(inputs, clean, safe)
    exact_entropy = entropy_of(p) if grad_entropy is not None else None
    dz = grad_logits_(p, safe, exact_logps, grad_logps, exact_entropy, grad_entropy)
    unfinish_grad_(dz, slope, temperature.to(dtype), logit_scale).masked_fill_(silent.unsqueeze(-1), 0)
    return (
        dz @ weight.to(dtype) if needs.hidden else unused(),
        dz.T @ clean if needs.weight else unused(),
        dz.sum(0) if needs.bias else unused(),
    )
