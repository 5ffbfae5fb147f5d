"""The definition of `linear_logprob`: all logits at once, in float32 (float64 for float64 inputs)."""

from __future__ import annotations

import torch

from fastrl.kernels.softmax_row import (
    accumulate_dtype,
    check_targets,
    entropy_of,
    finish_logits_,
    grad_logits_,
    scale_rows,
    softmax_,
    unfinish_grad_,
)


def _probabilities(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: torch.Tensor,
    softcap: float,
    logit_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    dtype = accumulate_dtype(hidden.dtype)
    z = hidden.to(dtype) @ weight.to(dtype).T  # (N, V)
    if bias is not None:
        z += bias.to(dtype)
    slope = finish_logits_(z, temperature.to(dtype), softcap, logit_scale)
    logps, lse = softmax_(z, targets)
    return z, logps, lse, slope


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
    """logps_n = log softmax(cap(logit_scale (h_n W^T + b)) / temperature_n)[y_n], and the entropy of that softmax.

    Args:
        hidden (N, H), weight (V, H), targets (N,) int64, bias (V,) or None, temperature (1,) or (N,), in the
        accumulation dtype.
    Returns:
        logps (N,), entropy (N,) or (0,), lse (N,), and two tensors for `backward`, (0,) when unused. Ignored rows are
        exactly 0, whatever their hidden state holds.
    """
    ignored = targets == ignore_index
    safe, poisoned = check_targets(targets, weight.shape[0], ignore_index)
    safe = safe.masked_fill(ignored, 0)
    clean = hidden.masked_fill(ignored.unsqueeze(-1), 0)
    p, logps, lse, slope = _probabilities(clean, weight, safe, bias, temperature, softcap, logit_scale)
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
    zeroed = [t.masked_fill(ignored, 0) if t.numel() else t for t in (logps, h, lse)]
    return (*zeroed, saved, saved_entropy)


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
    """(d hidden (N, H), d weight (V, H), d bias (V,)) in the accumulation dtype; (0,) where not needed.

    `rounded` allows, and does not ask for, the dtype of hidden instead: the operator rounds what comes wide.
    """
    dtype = accumulate_dtype(hidden.dtype)

    def unused() -> torch.Tensor:
        return hidden.new_empty(0, dtype=dtype)

    if save == "frozen":
        return scale_rows(saved, grad_logps, saved_entropy, grad_entropy), unused(), unused()
    silent = grad_logps == 0 if grad_entropy is None else (grad_logps == 0) & (grad_entropy == 0)
    silent |= targets == ignore_index
    safe, _ = check_targets(targets, weight.shape[0], ignore_index)
    safe = safe.masked_fill(silent, 0)
    clean = hidden.to(dtype).masked_fill(silent.unsqueeze(-1), 0)
    p, exact_logps, _, slope = _probabilities(clean, weight, safe, bias, temperature, softcap, logit_scale)
    exact_entropy = entropy_of(p) if grad_entropy is not None else None
    dz = grad_logits_(p, safe, exact_logps, grad_logps, exact_entropy, grad_entropy)
    unfinish_grad_(dz, slope, temperature.to(dtype), logit_scale).masked_fill_(silent.unsqueeze(-1), 0)
    return (
        dz @ weight.to(dtype) if needs_hidden else unused(),
        dz.T @ clean if needs_weight else unused(),
        dz.sum(0) if needs_bias else unused(),
    )
