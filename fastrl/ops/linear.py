"""A linear layer on the native matmul that computes only the products its gradients need."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn import functional

from fastrl.check import require
from fastrl.kernels import native
from fastrl.kernels.linear import native as products
from fastrl.kernels.registry import backend_of
from fastrl.ops.derivatives import once_differentiable

OP = "linear"
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, backend: str = "auto"
) -> torch.Tensor:
    """y = x W^T + b, as `torch.nn.functional.linear`, with the same result under autocast.

    On a CPU, in float32 and bfloat16, the products are fastrl's own: accumulated in float32, rounded once, with bits
    that depend neither on the number of threads nor on other rows of x. Everything else runs in torch: other devices
    and dtypes, tensor subclasses, empty tensors, `torch.compile`, tracing, `torch.func`, forward-mode derivatives.

    Args:
        x: (..., K). weight: (V, K); float32 or bfloat16, as x. bias: (V,).
        backend: cpu, reference, or auto, which takes cpu if it supports the tensors.

    Returns:
        (..., V). x, weight and bias get gradients, once differentiable. If a weight has an attribute `main_grad`, a
        contiguous float32 tensor of its shape, its gradient is added there, unrounded, and not to `weight.grad`.

    Raises:
        ValueError: there is no such backend, or cpu does not support these tensors.
        RuntimeError: from torch, for shapes that do not fit.
    """
    if torch.compiler.is_compiling():
        return functional.linear(x, weight, bias)
    backend = backend_of(OP, backend)
    reason = "backend='reference'" if backend == "reference" else refusal(x, weight, bias)
    if backend == "cpu":
        require(reason is None, OP, "backend", "tensors that cpu takes", reason)
    return functional.linear(x, weight, bias) if reason else native_linear(x, weight, bias)


def refusal(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    """Why the native products cannot take a layer's tensors in the current context, or None."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "compiled or traced code"
    tensors = (x, weight) if bias is None else (x, weight, bias)
    for tensor in tensors:
        if type(tensor) not in _PLAIN or tensor.layout is not torch.strided or tensor.is_neg():
            return f"a {type(tensor).__name__} that is not a plain tensor"
        if tensor.device.type != "cpu":
            return f"a tensor on {tensor.device}"
    if torch.is_autocast_enabled("cpu"):
        dtypes = {torch.get_autocast_dtype("cpu")} if all(t.dtype != torch.float64 for t in tensors) else {x.dtype}
    else:
        dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1 or not dtypes <= set(products.TAKES):
        return f"dtype {', '.join(map(str, sorted(dtypes, key=str)))}"
    if not (x.dim() > 0 and weight.dim() == 2 and x.shape[-1] == weight.shape[1]):
        return "shapes that do not fit"
    if bias is not None and bias.shape != weight.shape[:1]:
        return "a bias of another shape"
    if x.numel() == 0 or weight.numel() == 0:
        return "an empty tensor"
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "a function transform"
    if torch._C._len_torch_dispatch_stack() > 0:  # one that counts or records what torch computes
        return "a dispatch mode"
    return native.refuses(x.device)


def native_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`linear` for tensors that `refusal` accepts."""
    x, weight, bias = _cast(x, weight, bias)
    if not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or _trains(bias))):
        return products.forward(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)
    return _Linear.apply(x, weight, bias)


def native_lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """y = x W^T + b + scaling (x A^T) B^T, arXiv:2106.09685, for tensors that `refusal` accepts.

    lora_a (r, K) and lora_b (V, r) get gradients, the frozen weight gets none. A step costs x W^T, dy W and the thin
    products, and stores x and x A^T.
    """
    x, weight, bias, lora_a, lora_b = _cast(x, weight, bias, lora_a, lora_b)
    return _LoraLinear.apply(x, weight, bias, lora_a, lora_b, scaling)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        ctx.shape, ctx.main_grad = x.shape, main_grad(weight)
        return products.forward(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable("linear")
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dy = dy.reshape(-1, dy.shape[-1])
        dx = products.grad_input(dy, weight).view(ctx.shape) if needs_x else None
        dw = _grad_weight(dy, x.reshape(-1, x.shape[-1]), ctx.main_grad) if needs_weight else None
        return dx, dw, dy.sum(0) if needs_bias else None


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = products.forward(rows, weight, bias)
        low = products.forward(rows, lora_a, None).mul_(scaling)
        products.forward(low, lora_b, None, out=y)
        ctx.save_for_backward(x, weight, lora_a, lora_b, low)
        ctx.scaling, ctx.main_grads = scaling, (main_grad(lora_a), main_grad(lora_b))
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable("linear")
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, lora_a, lora_b, low = ctx.saved_tensors
        needs_x, _, needs_bias, needs_a, needs_b, _ = ctx.needs_input_grad
        dy, rows = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        main_a, main_b = ctx.main_grads
        db = _grad_weight(dy, low, main_b) if needs_b else None
        dlow = products.grad_input(dy, lora_b).mul_(ctx.scaling) if needs_x or needs_a else None
        da = _grad_weight(dlow, rows, main_a) if needs_a and dlow is not None else None
        dx = None
        if needs_x and dlow is not None:
            dx = products.grad_input(dy, weight)
            dx = products.grad_input(dlow, lora_a, out=dx).view(x.shape)
        return dx, None, dy.sum(0) if needs_bias else None, da, db, None


def main_grad(weight: torch.Tensor) -> torch.Tensor | None:
    """The weight's `main_grad`, if it has a usable one to add gradients to directly."""
    found = getattr(weight, "main_grad", None)
    fits = isinstance(found, torch.Tensor) and found.dtype == torch.float32 and found.shape == weight.shape
    return found if fits and found.is_contiguous() and weight.requires_grad else None


def _grad_weight(dy: torch.Tensor, x: torch.Tensor, main: torch.Tensor | None) -> torch.Tensor | None:
    """dW; None if it was added to `main`."""
    dw = products.grad_weight(dy, x, out=main)
    return dw if main is None else None


def _cast(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's dtype, if autocast is on."""
    if not torch.is_autocast_enabled("cpu"):
        return tensors
    dtype = torch.get_autocast_dtype("cpu")
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


def _trains(bias: torch.Tensor | None) -> bool:
    return bias is not None and bias.requires_grad
