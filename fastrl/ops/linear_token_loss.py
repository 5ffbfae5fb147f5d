"""Any per-token loss straight from hidden states, in three matmuls."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from fastrl import check
from fastrl.kernels.softmax_row import accumulate_dtype
from fastrl.ops.attach import attach_gradients
from fastrl.ops.linear_logprob import _op as linear_logprob_op
from fastrl.ops.linear_logprob import (
    backward_op,
    check_head,
    check_split_backend,
    keep_budget,
    linear_logprob,
    needs_grad,
)
from fastrl.ops.support import Support, check_support
from fastrl.ops.support import _op as support_op
from fastrl.ops.support import backward_op as support_backward_op
from fastrl.ops.vocabulary_parallel import ranks_of, shared_refusals
from fastrl.types import LossOutput

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OP = "linear_token_loss"


def linear_token_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    token_loss: Callable[..., torch.Tensor],
    *,
    weights: torch.Tensor,
    context: tuple[torch.Tensor, ...] = (),
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    support: Support | None = None,
    process_group: ProcessGroup | None = None,
    entropy: bool = False,
    memory: int | None = None,
    backend: str = "auto",
) -> LossOutput:
    """loss = sum_t weights_t token_loss(logps)_t, with the gradient formed in the forward pass, chunk by chunk.

    Equals `(weights * token_loss(linear_logprob(hidden, weight, targets).logps, *context)).sum()`.

    Args:
        hidden, weight, targets, bias, temperature, softcap, logit_scale, ignore_index, vocab_size, support, backend: as
            `linear_logprob`. The set of a token with weight 0 is not read.
        token_loss: a differentiable function of torch operations, called as `token_loss(logps, *context)`, or
            `token_loss(logps, entropy, *context)` with `entropy=True`, on flat (n,) chunks of tokens; returns (n,). A
            token's loss must not depend on other tokens: how they are chunked is an implementation detail.
        weights: (...) as targets: mask, aggregation and normaliser in one. Tokens with weight 0 cost nothing.
        process_group: the vocabulary is split over these ranks, as in `linear_logprob`; everything else is the same on
            all of them. All tokens are one chunk, and the gradient is formed in the backward pass.
        context: token-shaped constants (old log-probabilities, advantages, ...), cut into the same chunks.
        memory: bytes of probabilities that may be stored at a time; None takes the budget of `linear_logprob`. With
            `support`, one number per kept id is stored, whatever it says.

    Returns:
        LossOutput(loss, metrics) with the metrics `logps` and, with entropy, `entropy` as (sum, count) over the tokens
        of non-zero weight. hidden, weight and bias get gradients; context and weights do not.

    Raises:
        ValueError, TypeError, IndexError: as `linear_logprob`, or token_loss returned another shape.
    """
    split = process_group is not None and ranks_of(OP, process_group) > 1
    with shared_refusals(OP, process_group, hidden, weight) if split else nullcontext():
        options = (bias, temperature, softcap, logit_scale, ignore_index, vocab_size)
        head = check_head(OP, hidden, weight, targets, *options, shard=split)
        for name, tensor in (("weights", weights), *((f"context[{i}]", c) for i, c in enumerate(context))):
            check.shape(OP, name, tensor, targets.shape, "as targets")
            check.device(OP, name, tensor, targets.device, "targets")
        budget = memory is None or (isinstance(memory, int) and memory >= 0)
        check.require(budget, OP, "memory", "a byte budget of at least 0, or None", memory)
        if split:
            check_split_backend(OP, backend)
    dtype = accumulate_dtype(head.hidden.dtype)
    flat = [weights.detach().reshape(-1).to(dtype), *(c.detach().reshape(-1) for c in context)]
    live = head.targets.masked_fill(flat[0] == 0, head.ignore_index)
    if split:
        read = linear_logprob(
            head.hidden, head.weight, live, bias=head.bias, softcap=softcap, logit_scale=logit_scale,
            temperature=head.temperature if head.temperature.numel() > 1 else head.temperature[0],
            ignore_index=ignore_index, vocab_size=vocab_size, entropy=entropy, support=support,
            process_group=process_group, memory="auto" if memory is None else memory,
        )  # fmt: skip
        scores = {"logps": read.logps} | ({"entropy": read.entropy} if entropy else {})
        loss = _weighted(token_loss, flat[0], flat[1:])(*scores.values())
        count = (live != head.ignore_index).sum()
        return LossOutput(loss, {name: (one.detach().sum(), count) for name, one in scores.items()})
    needs = needs_grad(head)
    h_all, w_head, b_head = (x if x is None else x.detach() for x in (head.hidden, head.weight, head.bias))

    sets = None if support is None else check_support(OP, head, support, backend)
    kept_per_token = head.weight.shape[0] * head.hidden.element_size()
    chunk = max(1, (keep_budget(head.hidden.device) if memory is None else memory) // kept_per_token)
    chunk = chunk if sets is None else max(1, len(head.targets))
    totals: list[torch.Tensor] | None = None
    grads_hidden, logp_sum, entropy_sum = [], 0.0, 0.0
    loss = head.hidden.new_zeros((), dtype=dtype)
    for start in range(0, max(1, len(head.targets)), chunk):
        piece = slice(start, start + chunk)
        t = head.temperature if head.temperature.numel() == 1 else head.temperature[piece]
        part = (h_all[piece], w_head, live[piece], b_head, t, head.softcap, head.logit_scale, head.ignore_index)
        save = "store" if any(needs) else "none"
        if sets is None:
            logps, h, *saved, _ = linear_logprob_op(*part, entropy, save, False, backend)
        else:
            logps, h, *saved = support_op(*part, *sets, entropy)
        w, *rest = (f[piece] for f in flat)
        value, dlogps, dentropy = _weighted_value_and_grad(token_loss, logps, h if entropy else None, w, rest)
        loss = loss + value.to(dtype)
        logp_sum, entropy_sum = logp_sum + logps.sum(), entropy_sum + h.sum()
        if not any(needs):
            continue
        if sets is None:
            scores, options = (logps, h, *saved), (save, *needs, False, backend)
            grads = backward_op(dlogps, dentropy, *part[:5], *scores, *part[5:], *options)
        else:
            grads = support_backward_op(dlogps, dentropy, *part[:5], *sets, logps, h, *saved, *part[5:], *needs)
        grads_hidden.append(grads[0])
        totals = list(grads[1:]) if totals is None else [a.add_(b) for a, b in zip(totals, grads[1:], strict=True)]
    if any(needs):
        loss = attach_gradients(loss, head.hidden, head.weight, head.bias, torch.cat(grads_hidden), *totals)
    count = (live != head.ignore_index).sum()
    metrics = {"logps": (logp_sum, count)}
    if entropy:
        metrics["entropy"] = (entropy_sum, count)
    return LossOutput(loss, metrics)


def _weighted_value_and_grad(
    token_loss: Callable[..., torch.Tensor],
    logps: torch.Tensor,
    entropy: torch.Tensor | None,
    weights: torch.Tensor,
    context: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(sum of weighted losses, d/d logps, d/d entropy) of one chunk."""
    variables = (logps,) if entropy is None else (logps, entropy)
    total = _weighted(token_loss, weights, context)
    value, pullback = torch.func.vjp(total, *variables)
    grads = [torch.where(weights != 0, g, 0.0) for g in pullback(torch.ones_like(value))]
    return value.detach(), grads[0], grads[1] if entropy is not None else None


def _weighted(
    token_loss: Callable[..., torch.Tensor], weights: torch.Tensor, context: list[torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """The sum of weighted losses of one chunk, as a function of its log-probabilities and entropies."""

    def total(*args: torch.Tensor) -> torch.Tensor:
        losses = token_loss(*args, *context)
        check.shape(OP, "token_loss", losses, weights.shape, "one loss per token")
        # where, not a product: a token of weight 0 may have an infinite loss
        return torch.where(weights != 0, weights * losses, 0.0).sum()

    return total
