"""`linear_policy_loss` in C++.

Where the logits of enough rows fit a bounded buffer they are stored between the loss and its gradient, which makes
three matmuls; else they are computed twice, tile by tile, which makes four.
"""

from __future__ import annotations

import torch

from fastrl.kernels.linear_logprob.native import NativeHead
from fastrl.kernels.linear_policy_loss.reference import silent_rows
from fastrl.kernels.policy_loss import METRICS, merge_metrics
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
    skip_silent: bool,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[torch.Tensor, ...]:
    """As `reference.forward`."""
    live = mask & (targets != ignore_index)
    silent = silent_rows(advantages, weights, spec)
    if skip_silent:
        live &= ~silent
    safe, _ = check_targets(targets.masked_fill(~live, ignore_index), weight.shape[0], ignore_index)
    head = NativeHead(hidden, weight, safe, bias, temperature, softcap, logit_scale)
    count, needs_grad = len(targets), needs_hidden or needs_weight or needs_bias
    logps, dlogps, dentropy = (hidden.new_zeros(count, dtype=head.dtype) for _ in range(3))
    lse = hidden.new_zeros(2, count, dtype=head.dtype)
    entropies = hidden.new_zeros(count if entropy else 0, dtype=head.dtype)
    grad_hidden = hidden.new_zeros(hidden.shape if needs_hidden else (0,), dtype=head.dtype)
    direct = main_grad is not None and main_grad.is_contiguous()
    grad_weight = hidden.new_empty(weight.shape if needs_weight and not direct else (0,), dtype=head.dtype)
    grad_bias = hidden.new_empty(weight.shape[0] if needs_bias else 0, dtype=head.dtype)
    written = False  # the first chunk writes the gradients, so that they are never filled with zeros first
    loss = hidden.new_zeros((), dtype=head.dtype)
    metrics = hidden.new_zeros((len(METRICS), 2), dtype=head.dtype)

    # Rows whose gradient is known to be zero need the first matmul only. The plan, and with it the order of summation,
    # is the same when nothing needs a gradient.
    rows = (live & ~silent).nonzero().squeeze(-1)
    stores = head.stores(rows)
    plan = [((live & silent).nonzero().squeeze(-1), False)]
    plan += [(chunk, needs_grad) for chunk in (head.chunks(rows) if stores else [rows])]
    logits = None
    for rows, with_grad in plan:
        if len(rows) == 0:
            continue
        if with_grad and stores and logits is None:
            logits = head.logits_buffer(rows)  # the first chunk is the longest: the others reuse its pages
        head.forward(rows, logps, lse, entropies if entropy else None, logits if with_grad else None)
        context = (None if x is None else x[rows] for x in (old_logps, ref_logps, sampling_logps))
        chunk_loss, dlogps[rows], dentropy[rows], chunk_metrics = policy_loss.forward(
            logps[rows],
            advantages[rows],
            weights[rows],
            live[rows],
            *context,
            entropies[rows] if entropy else None,
            None,
            0,
            spec,
        )
        loss += chunk_loss
        metrics = merge_metrics(metrics, chunk_metrics)
        if not with_grad:
            continue
        if logits is None:  # nothing ties the second pass to these rows: it takes those that have a gradient
            rows = rows[(dlogps[rows] != 0) | (dentropy[rows] != 0)]
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
            add_weight=written or direct,
            add_bias=written,
        )
        written = True
    if not written:
        grad_weight.zero_()
        grad_bias.zero_()
    if needs_weight and main_grad is not None and not direct:
        main_grad.add_(grad_weight)
        grad_weight = grad_weight.new_empty(0)
    return loss, logps, entropies, grad_hidden, grad_weight, grad_bias, metrics
