"""Log-probabilities from logits that are already in memory."""

from __future__ import annotations

from typing import Any

import torch

from fastrl import check
from fastrl.kernels.registry import resolve
from fastrl.kernels.softmax_row import accumulate_dtype
from fastrl.ops.derivatives import once_differentiable, refuse_forward_mode
from fastrl.ops.linear_logprob import check_temperature
from fastrl.types import LogprobOutput


def logprob(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
    backend: str = "auto",
) -> LogprobOutput:
    """Log-probability of each target token, and the entropy of its distribution, from logits.

        z = logits / temperature,   logps = z[target] - logsumexp(z),   entropy = -sum_v softmax(z)_v log softmax(z)_v

    Equals `log_softmax(logits.float() / temperature, -1).gather(-1, targets[..., None])[..., 0]`. If you have the
    hidden states, `linear_logprob` needs far less memory.

    Args:
        logits: (..., V), any strides; never overwritten. targets: (...) integer ids.
        temperature: a positive number, or one per token, shape (...); it gets no gradient.
        ignore_index: targets with this id give exactly 0 and no gradient, whatever their logits hold.
        entropy: also return the entropy, with its gradient.
        backend: "auto", or a name from `fastrl doctor`; a named backend is used or refused, never replaced.

    Returns:
        LogprobOutput(logps, entropy or None), float32 (float64 for float64 logits), shape (...). logits get a gradient
        in their own dtype.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device. IndexError: on a CPU, a target is
        outside [0, V); on a GPU that row is NaN instead.
    """
    check.floating("logprob", "logits", logits)
    refuse_forward_mode("logprob", logits)
    check.require(
        logits.dim() >= 1 and logits.shape[-1] > 0, "logprob", "logits", "shape (..., V), V > 0", tuple(logits.shape)
    )
    check.integer("logprob", "targets", targets)
    check.shape("logprob", "targets", targets, logits.shape[:-1], "as logits without its last dimension")
    check.device("logprob", "targets", targets, logits.device, "logits")
    flat_temperature = check_temperature("logprob", temperature, targets, accumulate_dtype(logits.dtype), ignore_index)
    rows, vocabulary = targets.numel(), logits.shape[-1]
    flat_logits, flat_targets = logits.reshape(rows, vocabulary), targets.reshape(rows).long()
    logps, h, _ = _op(flat_logits, flat_targets, flat_temperature, int(ignore_index), entropy, backend)
    return LogprobOutput(logps.view(targets.shape), h.view(targets.shape) if entropy else None)


@torch.library.custom_op("fastrl::logprob", mutates_args=())
def _op(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    ignore_index: int,
    entropy: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    kernel = resolve("logprob", backend, logits.device)
    return kernel.forward(logits, targets, temperature, ignore_index=ignore_index, entropy=entropy)


@_op.register_fake
def _(logits: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    entropy = rest[-2]
    rows, dtype = logits.shape[0], accumulate_dtype(logits.dtype)
    return (
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(rows if entropy else 0, dtype=dtype),
        logits.new_empty(2, rows, dtype=dtype),
    )


@torch.library.custom_op("fastrl::logprob_backward", mutates_args=())
def _backward_op(
    grad_logps: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    entropy: torch.Tensor,
    lse: torch.Tensor,
    ignore_index: int,
    backend: str,
) -> torch.Tensor:
    kernel = resolve("logprob", backend, logits.device)
    known = (entropy, lse)
    return kernel.backward(grad_logps, grad_entropy, logits, targets, temperature, *known, ignore_index=ignore_index)


@_backward_op.register_fake
def _(grad_logps: torch.Tensor, grad_entropy: torch.Tensor | None, logits: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, targets, temperature, ctx.ignore_index, ctx.entropy, ctx.backend = inputs
    ctx.save_for_backward(logits, targets, temperature, *output[1:])
    ctx.set_materialize_grads(False)


@once_differentiable("logprob")
def _backward(ctx: Any, grad_logps: torch.Tensor | None, grad_entropy: torch.Tensor | None, _: Any) -> tuple:
    logits, targets, temperature, entropy, lse = ctx.saved_tensors
    if grad_logps is None and grad_entropy is None:
        return (None,) * 6
    dtype = accumulate_dtype(logits.dtype)
    grad = _backward_op(
        logits.new_zeros(len(targets), dtype=dtype) if grad_logps is None else grad_logps.contiguous(),
        grad_entropy.contiguous() if ctx.entropy and grad_entropy is not None else None,
        logits,
        targets,
        temperature,
        entropy,
        lse,
        ctx.ignore_index,
        ctx.backend,
    )
    return grad, None, None, None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)
