"""A block to a row, which it reads once per pass; csrc/cuda/logprob.cu."""

from __future__ import annotations

import torch

from fastrl.kernels.cuda import DTYPES, address, extension, launch
from fastrl.kernels.native import dense
from fastrl.kernels.softmax_row import accumulate_dtype, check_targets


def _call(logits: torch.Tensor, targets: torch.Tensor, temperature: torch.Tensor, ignore_index: int) -> object:
    """The arguments that both passes share. On a GPU the kernel checks the targets itself."""
    if targets.device.type == "cpu":
        check_targets(targets, logits.shape[-1], ignore_index)
    return extension(logits.device).Logprob(
        DTYPES[logits.dtype],
        address(logits),
        logits.stride(0),
        *logits.shape,
        address(targets),
        address(temperature),
        temperature.numel() > 1,
        ignore_index,
    )


def _readable(
    logits: torch.Tensor, targets: torch.Tensor, temperature: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    unit_stride = logits if logits.stride(-1) == 1 else logits.contiguous()
    return unit_stride, targets.contiguous(), temperature.to(accumulate_dtype(logits.dtype)).contiguous()


def forward(
    logits: torch.Tensor, targets: torch.Tensor, temperature: torch.Tensor, *, ignore_index: int, entropy: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `reference.forward`."""
    inputs = _readable(logits, targets, temperature)
    rows = len(targets)
    logps, h = (
        torch.empty(n, dtype=accumulate_dtype(logits.dtype), device=logits.device)
        for n in (rows, rows if entropy else 0)
    )
    call = _call(*inputs, ignore_index)
    launch("logprob_forward", logits.device, call, address(logps), address(h if entropy else None))
    return logps, h, logps.new_zeros(2, rows)


def backward(
    grad_logps: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    entropy: torch.Tensor,
    lse: torch.Tensor,
    *,
    ignore_index: int,
) -> torch.Tensor:
    """As `reference.backward`; a row whose target is outside the vocabulary gets a gradient of NaN."""
    inputs = _readable(logits, targets, temperature)
    grads = (dense(grad_logps), dense(grad_entropy))
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    launch("logprob_backward", logits.device, _call(*inputs, ignore_index), *map(address, grads), address(grad))
    return grad
