"""The operator `fastrl::policy_loss`: loss = sum_t w_t l_t over flat token vectors, gradient in the forward pass."""

from __future__ import annotations

from typing import Any

import torch

from fastrl.kernels import registry
from fastrl.kernels.inputs import LossTokens
from fastrl.kernels.policy_loss import METRICS
from fastrl.ops.derivatives import once_differentiable
from fastrl.spec import decode

SCHEMA = (
    "(Tensor logps, Tensor advantages, Tensor weights, Tensor mask, Tensor? old_logps, Tensor? ref_logps, "
    "Tensor? sampling_logps, Tensor? entropy, Tensor? seq_ids, SymInt num_seqs, str spec, str backend)"
    " -> (Tensor loss, Tensor dlogps, Tensor dentropy, Tensor metrics)"
)

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@torch.library.custom_op("fastrl::policy_loss", mutates_args=(), schema=SCHEMA)
def policy_loss(
    logps: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    mask: torch.Tensor,
    old_logps: torch.Tensor | None,
    ref_logps: torch.Tensor | None,
    sampling_logps: torch.Tensor | None,
    entropy: torch.Tensor | None,
    seq_ids: torch.Tensor | None,
    num_seqs: int,
    spec: str,
    backend: str,
) -> Outputs:
    """The loss of an encoded `PolicyLoss` and its derivatives: sum_t w_t (c_t surrogate_t + coef KL_t - c_H H_t).

    Every tensor is (N,) and contiguous, all float32 or all float64, except `mask` (bool) and `seq_ids` (int64). Only
    `logps` and `entropy` get a gradient, and only through `loss`; everything else is a constant.
    `fastrl.losses.policy_loss` checks and flattens the arguments.

    Returns:
        loss (), its derivatives dlogps (N,) and dentropy (N,), metrics (K, 2) as in `fastrl.kernels.policy_loss`.
    """
    decoded = decode(spec)
    kernel = registry.resolve("policy_loss", backend, logps.device)
    tokens = LossTokens(advantages, weights, mask, old_logps, ref_logps, sampling_logps)
    return kernel.forward(logps, tokens, entropy, seq_ids, num_seqs, decoded)


@policy_loss.register_fake
def fake(logps: torch.Tensor, *inputs: Any) -> Outputs:
    """Outputs of the right shapes and dtypes."""
    return logps.new_empty(()), torch.empty_like(logps), torch.empty_like(logps), logps.new_empty(len(METRICS), 2)


def register_gradient(op: Any, *, logps: int, entropy: int, inputs: int) -> None:
    """Registers a backward that gives the inputs at two positions the derivatives found in the operator's forward."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        _, dlogps, dentropy, metrics = output
        ctx.mark_non_differentiable(dlogps, dentropy, metrics)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dlogps, dentropy)

    @once_differentiable(op._name.rpartition("::")[2])
    def backward(ctx: Any, grad: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
        grads: list[torch.Tensor | None] = [None] * inputs
        if grad is not None:
            for index, derivative in zip((logps, entropy), ctx.saved_tensors, strict=True):
                grads[index] = grad * derivative if ctx.needs_input_grad[index] else None
        return tuple(grads)

    op.register_autograd(backward, setup_context=setup_context)


register_gradient(policy_loss, logps=0, entropy=7, inputs=12)
