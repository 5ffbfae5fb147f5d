"""The definition of `linear_policy_loss`: `linear_logprob`, then `policy_loss`, then the way back."""

from __future__ import annotations

import torch

from fastrl.kernels.linear_logprob import reference as linear_logprob
from fastrl.kernels.policy_loss import reference as policy_loss
from fastrl.spec import PolicyLoss


def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    mask: torch.Tensor,
    old_logps: torch.Tensor | None,
    ref_logps: torch.Tensor | None,
    sampling_logps: torch.Tensor | None,
    main_grad: torch.Tensor | None,
    *,
    spec: PolicyLoss,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    entropy: bool,
    logit_bytes: int,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[torch.Tensor, ...]:
    """loss = sum_n weights_n l_n, and its gradients, for a spec with `separable` True.

    Args:
        hidden (N, H), weight (V, H), targets (N,), bias (V,) or None, temperature (1,) or (N,); advantages, weights,
        old_logps, ref_logps, sampling_logps (N,), mask (N,) bool. `entropy`: compute it, for the loss or the metrics.
        `main_grad`: (V, H) in the accumulation dtype or None; d weight is added to it instead of being returned.
        `logit_bytes`: of logits that the native backend may store; the others store chunks of their own size.
    Returns:
        loss (), logps (N,), entropy (N,) or (0,), d hidden, d weight, d bias in the accumulation dtype ((0,) where not
        needed), metrics (K, 2). Rows outside the mask have logps and entropy exactly 0.
    """
    shared = {"softcap": softcap, "logit_scale": logit_scale, "ignore_index": ignore_index}
    masked_targets = targets.masked_fill(~mask, ignore_index)
    head = (hidden, weight, masked_targets, bias, temperature)
    logps, h, lse, *saved = linear_logprob.forward(*head, **shared, entropy=entropy, save="recompute")
    mask = mask & (masked_targets != ignore_index)
    loss, dlogps, dentropy, metrics = policy_loss.forward(
        logps,
        advantages,
        weights,
        mask,
        old_logps,
        ref_logps,
        sampling_logps,
        h if entropy else None,
        None,
        0,
        spec,
    )
    gradients = linear_logprob.backward(
        dlogps,
        dentropy if spec.needs_entropy else None,
        *head,
        logps,
        h,
        lse,
        *saved,
        **shared,
        save="recompute",
        needs_hidden=needs_hidden,
        needs_weight=needs_weight,
        needs_bias=needs_bias,
        rounded=False,
    )
    d_hidden, d_weight, d_bias = gradients
    if main_grad is not None:
        main_grad += d_weight
        d_weight = d_weight.new_empty(0)
    return loss, logps, h, d_hidden, d_weight, d_bias, metrics


def zero_advantage_rows(advantages: torch.Tensor, weights: torch.Tensor, spec: PolicyLoss) -> torch.Tensor:
    """True where the loss and its gradient are zero whatever the log-probability is."""
    silent = weights == 0
    if spec.kl is None and not spec.needs_entropy:
        silent = silent | (advantages == 0)
    return silent
