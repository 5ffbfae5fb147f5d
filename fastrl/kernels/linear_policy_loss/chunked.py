"""`linear_policy_loss` in one pass over chunks of rows: the gradient is formed while the probabilities are at hand.

Three matmuls with a trainable head (logits, d hidden, d weight), two with a frozen one, and the last two only over the
rows whose gradient is not zero.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType

import torch

from fastrl.kernels.linear_logprob.chunked import Chunk, Head, at_rows, row_chunks
from fastrl.kernels.linear_policy_loss.reference import silent_rows
from fastrl.kernels.policy_loss import METRICS, merge_metrics
from fastrl.kernels.policy_loss import reference as policy_loss
from fastrl.kernels.softmax_row import check_targets
from fastrl.spec import PolicyLoss


def forward_in_chunks(
    make: type[Chunk],
    token_loss: ModuleType,
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
    """As `reference.forward`; `token_loss` is a backend of `policy_loss`."""
    head = Head(weight, main_grad)
    count, vocabulary = len(targets), weight.shape[0]
    logps = hidden.new_zeros(count, dtype=head.dtype)
    entropies = hidden.new_zeros(count if entropy else 0, dtype=head.dtype)
    grad_hidden = hidden.new_zeros(hidden.shape if needs_hidden else (0,), dtype=head.dtype)
    loss = hidden.new_zeros((), dtype=head.dtype)
    metrics = hidden.new_zeros((len(METRICS), 2), dtype=head.dtype)

    live = mask & (targets != ignore_index)
    if skip_silent:
        live &= ~silent_rows(advantages, weights, spec)
    safe, poisoned = check_targets(targets.masked_fill(~live, ignore_index), vocabulary, ignore_index)
    for rows in row_chunks(live.nonzero().squeeze(-1), vocabulary, logps.element_size()):
        chunk = make(safe[rows], at_rows(temperature, rows, head.dtype), bias, softcap, logit_scale)
        known = chunk.read(head.logits(hidden[rows]), entropy)
        if poisoned is not None:
            known.logps.masked_fill_(poisoned[rows], float("nan"))
        logps[rows] = known.logps
        if entropy:
            entropies[rows] = known.entropy
        context = (None if x is None else x[rows] for x in (old_logps, ref_logps, sampling_logps))
        chunk_loss, dlogps, dentropy, chunk_metrics = token_loss.forward(
            known.logps, advantages[rows], weights[rows], live[rows], *context, known.entropy, None, 0, spec
        )
        loss += chunk_loss
        metrics = merge_metrics(metrics, chunk_metrics)
        if not (needs_hidden or needs_weight or needs_bias):
            continue

        active = (dlogps != 0) | (dentropy != 0) if spec.needs_entropy else dlogps != 0
        within = active.nonzero().squeeze(-1)
        if len(within) == 0:
            continue
        some = within if len(within) < len(rows) else None
        if some is not None:
            rows, known, dlogps, dentropy = rows[some], known.at(some), dlogps[some], dentropy[some]
        dz = chunk.gradient(known, dlogps, dentropy if spec.needs_entropy else None, head.dz_dtype, rows=some)
        if needs_hidden:
            grad_hidden[rows] = head.grad_hidden(dz)
        if needs_weight:
            head.accumulate_weight(dz, hidden[rows])
        if needs_bias:
            head.accumulate_bias(dz)
    gradients = head.gradients(needs_weight and main_grad is None, needs_bias)
    return loss, logps, entropies, grad_hidden, *gradients, metrics


forward = partial(forward_in_chunks, Chunk, policy_loss)
