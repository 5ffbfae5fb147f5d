"""The definition of `logprob`: all rows at once, in float32 (float64 for float64 logits)."""

from __future__ import annotations

import torch

from fastrl.kernels.softmax_row import accumulate_dtype, check_targets, entropy_of, grad_logits_, softmax_


def _probabilities(
    logits: torch.Tensor, safe: torch.Tensor, silent: torch.Tensor, temperature: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    z = logits.to(accumulate_dtype(logits.dtype), copy=True, memory_format=torch.contiguous_format)
    z.masked_fill_(silent.unsqueeze(-1), 0)
    z.div_(temperature.to(z.dtype).unsqueeze(-1))
    return z, *softmax_(z, safe)


def forward(
    logits: torch.Tensor, targets: torch.Tensor, temperature: torch.Tensor, *, ignore_index: int, entropy: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logps_n = log softmax(logits_n / temperature_n)[y_n], and the entropy of that softmax.

    Args: logits (N, V), targets (N,) int64, temperature (1,) or (N,) in the accumulation dtype.
    Returns: logps (N,), entropy (N,) or (0,), lse (2, N): the largest logit and the logarithm of what is left, or zeros
        from a backend whose `backward` does without. Ignored rows are exactly 0, whatever their logits hold.
    """
    ignored = targets == ignore_index
    safe, poisoned = check_targets(targets, logits.shape[-1], ignore_index)
    p, logps, lse = _probabilities(logits, safe.masked_fill(ignored, 0), ignored, temperature)
    if poisoned is not None:
        logps = logps.masked_fill(poisoned, float("nan"))
    h = entropy_of(p).masked_fill_(ignored, 0) if entropy else p.new_empty(0)
    return logps.masked_fill(ignored, 0), h, lse.masked_fill_(ignored, 0)


def backward(
    grad_logps: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    entropy: torch.Tensor,
    lse: torch.Tensor,
    *,
    ignore_index: int,
) -> torch.Tensor:
    """d logits (N, V) in the dtype of logits, from what `forward` returned; rows with no upstream gradient are exactly
    0."""
    silent = grad_logps == 0 if grad_entropy is None else (grad_logps == 0) & (grad_entropy == 0)
    silent |= targets == ignore_index
    safe = check_targets(targets, logits.shape[-1], ignore_index)[0].masked_fill(silent, 0)
    p, logps, _ = _probabilities(logits, safe, silent, temperature)
    h = None if grad_entropy is None else entropy_of(p)
    dz = grad_logits_(p, safe, logps, grad_logps, h, grad_entropy)
    return dz.div_(temperature.to(dz.dtype).unsqueeze(-1)).masked_fill_(silent.unsqueeze(-1), 0).to(logits.dtype)
