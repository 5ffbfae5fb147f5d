"""A policy loss straight from hidden states, with the gradient formed in the same forward pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fastrl.kernels.inputs import HeadInputs, LossTokens, Needs
from fastrl.kernels.linear_policy_loss import support as over_support
from fastrl.kernels.policy_loss import METRICS
from fastrl.kernels.registry import as_written, resolve
from fastrl.kernels.softmax_row import accumulate_dtype
from fastrl.ops.attach import attach_gradients
from fastrl.ops.linear_logprob import needs_grad, stores_logits
from fastrl.ops.support import Support
from fastrl.ops.tags import WAITS
from fastrl.spec import PolicyLoss, decode


class LinearPolicyLoss(NamedTuple):
    """The op's outputs: the loss carries the gradient, the rest are constants."""

    loss: torch.Tensor  # ()
    logps: torch.Tensor  # (N,)
    entropy: torch.Tensor  # (N,) or (0,)
    metrics: torch.Tensor  # (K, 2), rows named by METRICS


def linear_policy_loss(
    head: HeadInputs,
    tokens: LossTokens,
    spec: PolicyLoss,
    *,
    main_grad: torch.Tensor | None,
    entropy: bool,
    logit_bytes: int,
    backend: str,
    support: Support | None = None,
) -> LinearPolicyLoss:
    """loss = sum_n weights_n l_n(logps_n) for checked, flat (N,) inputs and a spec that separates per token.

    hidden, weight and bias of `head` get gradients. If `main_grad`, (V, H) in the accumulation dtype, is given, the
    weight's gradient is added to it in this call, before any backward. `logit_bytes` bounds the logits that the native
    backend stores. `support` comes from `check_support`. The public form is `fastrl.losses.linear_policy_loss`.
    """
    needs = needs_grad(head)
    loss, logps, entropies, *gradients, metrics = _op(
        *(x.detach() if isinstance(x, torch.Tensor) else x for x in head),
        *tokens,
        main_grad if needs.weight else None,
        spec.code,
        entropy,
        logit_bytes,
        *needs,
        backend,
        *(support or (None, None)),
    )
    if main_grad is not None and needs == (False, True, False):
        loss = loss.detach().requires_grad_()  # all its gradient is in `main_grad`, but callers call backward
    elif any(needs):
        weight = head.weight if main_grad is None else head.weight.detach()
        loss = attach_gradients(loss, head.hidden, weight, head.bias, *gradients)
    return LinearPolicyLoss(loss, logps, entropies, metrics)


def in_one_pass(head: HeadInputs, main_grad: torch.Tensor | None, logit_bytes: int, backend: str) -> bool:
    """Whether forming gradients in the forward pass saves something over `linear_logprob` and then `policy_loss`.

    It saves a matmul, or with `main_grad` a buffer for d weight. It saves nothing without `main_grad` if the native
    backend is faster computing the logits of a trainable head twice: then d weight is better formed in backward, where
    its factor is known, so it is rounded as it is formed and needs no float32 copy.
    """
    if main_grad is not None or not head.weight.requires_grad:
        return True
    return stores_logits("linear_policy_loss", head, logit_bytes, backend)


@torch.library.custom_op("fastrl::linear_policy_loss", mutates_args=("main_grad",), **WAITS)
def _op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: torch.Tensor,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    mask: torch.Tensor,
    old_logps: torch.Tensor | None,
    ref_logps: torch.Tensor | None,
    sampling_logps: torch.Tensor | None,
    main_grad: torch.Tensor | None,
    spec: str,
    entropy: bool,
    logit_bytes: int,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    backend: str,
    token_ids: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    head = HeadInputs(hidden, weight, targets, bias, temperature, softcap, logit_scale, ignore_index)
    tokens = LossTokens(advantages, weights, mask, old_logps, ref_logps, sampling_logps)
    options = {"spec": decode(spec), "entropy": entropy, "needs": Needs(needs_hidden, needs_weight, needs_bias)}
    with as_written(hidden.device):
        if token_ids is not None:
            token_loss = resolve("policy_loss", backend, hidden.device)
            return over_support.forward(head, tokens, main_grad, token_ids, offsets, token_loss=token_loss, **options)
        kernel = resolve("linear_policy_loss", backend, hidden.device)
        return kernel.forward(head, tokens, main_grad, logit_bytes=logit_bytes, **options)


@_op.register_fake
def _(
    hidden: torch.Tensor, weight: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    main_grad, _spec, entropy, _logit_bytes, needs_hidden, needs_weight, needs_bias = rest[12:19]
    rows, dtype = hidden.shape[0], accumulate_dtype(hidden.dtype)
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(rows if entropy else 0, dtype=dtype),
        hidden.new_empty(hidden.shape if needs_hidden else (0,), dtype=dtype),
        weight.new_empty(weight.shape if needs_weight and main_grad is None else (0,), dtype=dtype),
        weight.new_empty(weight.shape[0] if needs_bias else 0, dtype=dtype),
        hidden.new_empty((len(METRICS), 2), dtype=dtype),
    )
