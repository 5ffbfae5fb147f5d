"""How a gradient that was computed in the forward pass joins the autograd graph."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable


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
    """The scalar `loss`, whose derivatives with respect to hidden, weight and bias are the tensors given.

    Gradients arrive in the accumulation dtype, are scaled by the upstream scalar on the device, and round once to the
    dtype of the tensor they belong to; (0,) where not needed.
    """
    return loss.clone()


@attach_gradients.register_fake
def _(loss: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(loss)


def _setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    _, hidden, weight, _, *gradients = inputs
    ctx.save_for_backward(*gradients)
    ctx.dtypes = (hidden.dtype, weight.dtype)


@once_differentiable  # the gradients are constants here: a second derivative would be silently wrong
def _backward(ctx: Any, grad: torch.Tensor) -> tuple:
    needs = ctx.needs_input_grad[1:4]
    dtypes = (ctx.dtypes[0], ctx.dtypes[1], ctx.dtypes[1])
    scaled = (
        # out= rounds on the way, without a whole product in the accumulation dtype
        torch.mul(saved, grad, out=torch.empty_like(saved, dtype=dtype)) if needed else None
        for saved, dtype, needed in zip(ctx.saved_tensors, dtypes, needs, strict=True)
    )
    return None, *scaled, None, None, None


attach_gradients.register_autograd(_backward, setup_context=_setup_context)
