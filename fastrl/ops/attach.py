"""Adds gradients that were computed in the forward pass to the autograd graph."""

from __future__ import annotations

from typing import Any

import torch

from fastrl.ops.derivatives import once_differentiable

PIECE = 1 << 19  # elements scaled at a time, so that their product stays in the cache


@torch.library.custom_op("fastrl::attach_gradients", mutates_args=())
def attach_gradients(
    loss: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    grad_hidden: torch.Tensor,
    grad_weight: torch.Tensor,
    grad_bias: torch.Tensor,
) -> torch.Tensor:
    """The scalar `loss` with the given tensors as its derivatives with respect to hidden, weight and bias.

    Gradients are in the accumulation dtype, are scaled by the upstream scalar on the device, and round once to the
    dtype of their tensor; (0,) if not needed.
    """
    return loss.clone()


@attach_gradients.register_fake
def _(loss: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(loss)


def _setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    _, hidden, weight, _, *gradients = inputs
    ctx.save_for_backward(*gradients)
    ctx.dtypes = (hidden.dtype, weight.dtype)


@once_differentiable("a loss of fastrl whose gradient is formed in its forward pass")
def _backward(ctx: Any, grad: torch.Tensor) -> tuple:
    needs = ctx.needs_input_grad[1:4]
    dtypes = (ctx.dtypes[0], ctx.dtypes[1], ctx.dtypes[1])
    gradients = zip(ctx.saved_tensors, dtypes, needs, strict=True)
    wanted = (scaled(saved, grad, dtype) if needed else None for saved, dtype, needed in gradients)
    return None, *wanted, None, None, None


@torch.library.custom_op("fastrl::scaled", mutates_args=())
def scaled(gradient: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """gradient * scale, rounded once to `dtype`.

    A CPU would hold the whole product in the accumulation dtype before rounding, so there it is done in pieces.
    """
    out = torch.empty_like(gradient, dtype=dtype)
    if gradient.is_cuda or dtype == gradient.dtype:
        return torch.mul(gradient, scale, out=out)
    for to, piece in zip(out.view(-1).split(PIECE), gradient.view(-1).split(PIECE), strict=True):
        to.copy_(piece * scale)
    return out


@scaled.register_fake
def _(gradient: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_like(gradient, dtype=dtype)


attach_gradients.register_autograd(_backward, setup_context=_setup_context)
