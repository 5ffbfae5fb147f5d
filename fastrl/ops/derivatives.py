"""Clear errors for what the ops do not support in autograd: forward mode and second derivatives."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.autograd import forward_ad


def refuse_forward_mode(op: str, *tensors: torch.Tensor | None) -> None:
    """Refuses tensors with a tangent, which a custom operator would silently turn into zero.

    Raises:
        NotImplementedError: a tensor has a tangent.
    """
    if forward_ad._current_level < 0:
        return
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            f"{op}: expected tensors without a tangent, got one. There is no forward-mode derivative: use backward() "
            "or torch.func.vjp, or the plain torch expression in the docstring."
        )


def once_differentiable(op: str) -> Callable[[Callable[..., tuple]], Callable[..., tuple]]:
    """Decorates a backward function so that differentiating its gradients raises instead of being wrong."""

    def decorate(backward: Callable[..., tuple]) -> Callable[..., tuple]:
        @wraps(backward)
        def run(ctx: Any, *grads: torch.Tensor | None) -> tuple:
            if not torch.is_grad_enabled():  # no create_graph
                return backward(ctx, *grads)
            with torch.no_grad():
                found = backward(ctx, *grads)
            inputs = [t for t in (*grads, *ctx.saved_tensors) if t is not None and t.requires_grad]
            return tuple(g if g is None or not inputs else _Constant.apply(op, g, *inputs) for g in found)

        return run

    return decorate


class _Constant(torch.autograd.Function):
    """A gradient whose own derivative is not implemented."""

    @staticmethod
    def forward(ctx: Any, op: str, gradient: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.op = op
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple:
        raise RuntimeError(
            f"{ctx.op}: expected a first derivative, got the derivative of one. It has no second derivative: leave "
            "create_graph off, or use the plain torch expression in its docstring."
        )
