"""`linear_policy_loss` in C++.

Chunk by chunk, logits are stored in one buffer, and the gradient is formed from them: three matmuls with a trainable
head, two with a frozen one. Where `storage.stored_rows` says so, they are computed again instead, tile by tile in the
cache, over all rows at once.
"""

from __future__ import annotations

import torch

from fastrl.kernels.linear_logprob.native import NativeHead
from fastrl.kernels.linear_policy_loss.reference import zero_advantage_rows
from fastrl.kernels.policy_loss import native as policy_loss
from fastrl.kernels.softmax_row import check_targets
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
    grad_bias = hidden.new_zeros(weight.shape[0] if needs_bias else 0, dtype=head.dtype)
    bias_part = torch.empty_like(grad_bias)
    written = direct

    def losses(rows: torch.Tensor | slice) -> tuple[torch.Tensor, ...]:
        context = (advantages, weights, live, old_logps, ref_logps, sampling_logps, entropies if entropy else None)
        return policy_loss.forward(logps[rows], *(None if x is None else x[rows] for x in context), None, 0, spec)

    def backward(rows: torch.Tensor, logits: torch.Tensor | None) -> None:
        nonlocal written
        active = dlogps[rows] != 0
        if spec.needs_entropy:
            active |= dentropy[rows] != 0
        places = None if active.all() else active.nonzero().squeeze(-1)
        if places is not None and len(places) == 0:
            return
        head.backward(
            rows if places is None else rows[places],
            logps,
            lse,
            entropies,
            dlogps,
            dentropy if spec.needs_entropy else None,
            grad_hidden if needs_hidden else None,
            (main_grad if direct else grad_weight) if needs_weight else None,
            bias_part if needs_bias else None,
            logits=logits,
            places=places,
            stored=len(rows),
            add_weight=written,
        )
        written = True
        grad_bias.add_(bias_part)

    rows, chunks = live.nonzero().squeeze(-1), []
    needs_grad = needs_hidden or needs_weight or needs_bias
    if needs_grad:
        silent = zero_advantage_rows(advantages, weights, spec)
        trains = (live & ~silent).nonzero().squeeze(-1)
        most = head.stored_rows(trains, logit_bytes)
        if most:
            rows, chunks = (live & silent).nonzero().squeeze(-1), head.chunks(trains, most)
    wanted = entropies if entropy else None
    logits = head.logits_buffer(chunks[0]) if chunks else None  # the first chunk is the longest
    for chunk in chunks:
        head.forward(chunk, logps, lse, wanted, logits)
        _, dlogps[chunk], dentropy[chunk], _ = losses(chunk)
        backward(chunk, logits)
    head.forward(rows, logps, lse, wanted)
    # All rows in one call, so that the sums have one order whatever needs a gradient.
    loss, dlogps, dentropy, metrics = losses(slice(None))
    if not chunks and needs_grad:
        backward(rows, None)
    if not written:
        grad_weight.zero_()
    if needs_weight and main_grad is not None and not direct:
        main_grad.add_(grad_weight)
        grad_weight = grad_weight.new_empty(0)
    return loss, logps, entropies, grad_hidden, grad_weight, grad_bias, metrics
