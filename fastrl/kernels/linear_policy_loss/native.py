"""`linear_policy_loss` in C++.

Chunk by chunk, logits are stored in one buffer, and the gradient is formed from them: three matmuls with a trainable
head, two with a frozen one. Where `storage.stored_rows` says so, they are computed again instead, tile by tile in the
cache, over all rows at once.
"""

from __future__ import annotations

import torch

from fastrl.kernels.inputs import HeadInputs, LossTokens, Needs
from fastrl.kernels.linear_logprob.chunked import Statistics
from fastrl.kernels.linear_logprob.native import Gradients, NativeHead
from fastrl.kernels.linear_policy_loss.reference import zero_advantage_rows
from fastrl.kernels.policy_loss import native as policy_loss
from fastrl.kernels.softmax_row import check_targets
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
    """As `reference.forward`."""
    hidden, weight, targets, ignore_index = inputs.hidden, inputs.weight, inputs.targets, inputs.ignore_index
    live = tokens.mask & (targets != ignore_index)
    tokens = tokens._replace(mask=live)
    safe, _ = check_targets(targets.masked_fill(~live, ignore_index), weight.shape[0], ignore_index)
    head = NativeHead(inputs._replace(targets=safe))
    logps, dlogps, dentropy = (hidden.new_zeros(len(targets), dtype=head.dtype) for _ in range(3))
    lse = hidden.new_zeros(2, len(targets), dtype=head.dtype)
    entropies = hidden.new_zeros(len(targets) if entropy else 0, dtype=head.dtype)
    grad_hidden = hidden.new_zeros(hidden.shape if needs.hidden else (0,), dtype=head.dtype)
    direct = main_grad is not None and main_grad.is_contiguous()
    grad_weight = hidden.new_empty(weight.shape if needs.weight and not direct else (0,), dtype=head.dtype)
    grad_bias = hidden.new_zeros(weight.shape[0] if needs.bias else 0, dtype=head.dtype)
    bias_part = torch.empty_like(grad_bias)
    outputs = (grad_hidden, main_grad if direct else grad_weight, bias_part)
    into = Gradients(*(out if needed else None for out, needed in zip(outputs, needs, strict=True)))
    written = direct

    def losses(rows: torch.Tensor | slice) -> tuple[torch.Tensor, ...]:
        own = LossTokens(*(None if x is None else x[rows] for x in tokens))
        return policy_loss.forward(logps[rows], own, entropies[rows] if entropy else None, None, 0, spec)

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
            Statistics(logps, lse, entropies),
            dlogps,
            dentropy if spec.needs_entropy else None,
            into,
            logits=logits,
            places=places,
            stored=len(rows),
            add_weight=written,
        )
        written = True
        grad_bias.add_(bias_part)

    rows, chunks = live.nonzero().squeeze(-1), []
    if any(needs):
        silent = zero_advantage_rows(tokens, spec)
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
    if not chunks and any(needs):
        backward(rows, None)
    if not written:
        grad_weight.zero_()
    if needs.weight and main_grad is not None and not direct:
        main_grad.add_(grad_weight)
        grad_weight = grad_weight.new_empty(0)
    return loss, logps, entropies, grad_hidden, grad_weight, grad_bias, metrics
