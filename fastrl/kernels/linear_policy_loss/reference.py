"""The definition of `linear_policy_loss`: `linear_logprob`, then `policy_loss`, then the way back."""

from __future__ import annotations

import torch

from fastrl.kernels.inputs import HeadInputs, LossTokens, Needs
from fastrl.kernels.linear_logprob import reference as linear_logprob
from fastrl.kernels.policy_loss import reference as policy_loss
from fastrl.spec import PolicyLoss


def forward(
    inputs: HeadInputs,
    tokens: LossTokens,
    main_grad: torch.Tensor | None,
    *,
    spec: PolicyLoss,
    entropy: bool,
    logit_bytes: int,
    needs: Needs,
) -> tuple[torch.Tensor, ...]:
    """loss = sum_n weights_n l_n, and its gradients, for a spec with `separable` True.

    Args:
        main_grad: (V, H) in the accumulation dtype or None; d weight is added to it instead of being returned.
        entropy: compute it, for the loss or the metrics.
        logit_bytes: of logits that the native backend may store; the others store chunks of their own size.

    Returns:
        loss (), logps (N,), entropy (N,) or (0,), d hidden, d weight, d bias in the accumulation dtype ((0,) where not
        needed), metrics (K, 2). Rows outside the mask have logps and entropy exactly 0.
    """
    head = inputs._replace(targets=inputs.targets.masked_fill(~tokens.mask, inputs.ignore_index))
    read = linear_logprob.forward(head, entropy=entropy, save="recompute")
    tokens = tokens._replace(mask=tokens.mask & (head.targets != inputs.ignore_index))
    entropies = read.entropy if entropy else None
    loss, dlogps, dentropy, metrics = policy_loss.forward(read.logps, tokens, entropies, None, 0, spec)
    upstream = (dlogps, dentropy if spec.needs_entropy else None)
    d_hidden, d_weight, d_bias = linear_logprob.backward(
        *upstream, head, read, save="recompute", needs=needs, rounded=False
    )
    if main_grad is not None:
        main_grad += d_weight
        d_weight = d_weight.new_empty(0)
    return loss, read.logps, read.entropy, d_hidden, d_weight, d_bias, metrics


def zero_advantage_rows(tokens: LossTokens, spec: PolicyLoss) -> torch.Tensor:
    """True where the loss and its gradient are zero whatever the log-probability is."""
    without = tokens.weights == 0
    if spec.kl is None and not spec.needs_entropy:
        without = without | (tokens.advantages == 0)
    return without
