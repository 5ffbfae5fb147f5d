"""`linear_policy_loss` in C++.

With a trainable head logits are computed twice, tile by tile in the cache: a fourth matmul costs less than storing
them, which takes a buffer, and a pass over d weight for each piece of it. With a frozen head they are stored where
enough rows fit a bounded buffer.
"""

from __future__ import annotations

import torch

from fastrl.kernels.linear_logprob.native import NativeHead
from fastrl.kernels.linear_policy_loss.reference import silent_rows
from fastrl.kernels.policy_loss import native as policy_loss
from fastrl.kernels.softmax_row import check_targets
from fastrl.spec import PolicyLoss

RECOMPUTES = True  # so d weight may as well wait for its factor, and be rounded without a float32 copy


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
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[torch.Tensor, ...]:
    """As `reference.forward`."""
    live = mask & (targets != ignore_index)
    safe, _ = check_targets(targets.masked_fill(~live, ignore_index), weight.shape[0], ignore_index)
    head = NativeHead(hidden, weight, safe, bias, temperature, softcap, logit_scale)
    logps, dlogps, dentropy = (hidden.new_zeros(len(targets), dtype=head.dtype) for _ in range(3))
    lse = hidden.new_zeros(2, len(targets), dtype=head.dtype)
    entropies = hidden.new_zeros(len(targets) if entropy else 0, dtype=head.dtype)
    grad_hidden = hidden.new_zeros(hidden.shape if needs_hidden else (0,), dtype=head.dtype)
    direct = main_grad is not None and main_grad.is_contiguous()
    grad_weight = hidden.new_empty(weight.shape if needs_weight and not direct else (0,), dtype=head.dtype)
    grad_bias = hidden.new_empty(weight.shape[0] if needs_bias else 0, dtype=head.dtype)

    def losses(rows: torch.Tensor | slice) -> tuple[torch.Tensor, ...]:
        context = (advantages, weights, live, old_logps, ref_logps, sampling_logps, entropies if entropy else None)
        return policy_loss.forward(logps[rows], *(None if x is None else x[rows] for x in context), None, 0, spec)

    def backward(rows: torch.Tensor, logits: torch.Tensor | None) -> None:
        head.backward(
            rows,
            logps,
            lse,
            entropies,
            dlogps,
            dentropy if spec.needs_entropy else None,
            grad_hidden if needs_hidden else None,
            (main_grad if direct else grad_weight) if needs_weight else None,
            grad_bias if needs_bias else None,
            logits=logits,
            add_weight=direct,
        )

    rows, chunks = live.nonzero().squeeze(-1), []
    if needs_hidden and not needs_weight and not needs_bias:
        silent = silent_rows(advantages, weights, spec)
        trains = (live & ~silent).nonzero().squeeze(-1)
        if head.stores(trains):
            rows, chunks = (live & silent).nonzero().squeeze(-1), list(head.chunks(trains))
    wanted = entropies if entropy else None
    logits = head.logits_buffer(chunks[0]) if chunks else None  # the first chunk is the longest
    for chunk in chunks:
        head.forward(chunk, logps, lse, wanted, logits)
        _, dlogps[chunk], dentropy[chunk], _ = losses(chunk)
        backward(chunk, logits)
    head.forward(rows, logps, lse, wanted)
    # All rows in one call, so that the sums have one order whatever needs a gradient.
    loss, dlogps, dentropy, metrics = losses(slice(None))
    if not chunks and (needs_hidden or needs_weight or needs_bias):
        rows = ((dlogps != 0) | (dentropy != 0)).nonzero().squeeze(-1)
        if len(rows):
            backward(rows, None)
        else:
            grad_weight.zero_()
            grad_bias.zero_()
    if needs_weight and main_grad is not None and not direct:
        main_grad.add_(grad_weight)
        grad_weight = grad_weight.new_empty(0)
    return loss, logps, entropies, grad_hidden, grad_weight, grad_bias, metrics
