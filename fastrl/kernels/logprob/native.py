"""Each row read once per pass, in C++; csrc/cpu/logprob.h."""

from __future__ import annotations

import torch

from fastrl.kernels.native import DTYPES, address, dense, extension
from fastrl.kernels.softmax_row import accumulate_dtype, check_targets


def _unit_stride(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def forward(
    logits: torch.Tensor, targets: torch.Tensor, temperature: torch.Tensor, *, ignore_index: int, entropy: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `reference.forward`."""
    check_targets(targets, logits.shape[-1], ignore_index)
    dtype, rows = accumulate_dtype(logits.dtype), len(targets)
    logits, targets, temperature = _unit_stride(logits), dense(targets), dense(temperature.to(dtype))
    logps, h = (torch.empty(n, dtype=dtype) for n in (rows, rows if entropy else 0))
    extension().logprob_forward(
        _call(logits, targets, temperature, ignore_index), address(logps), address(h if entropy else None)
    )
    return logps, h, torch.zeros(2, rows, dtype=dtype)


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
    """As `reference.backward`."""
    check_targets(targets, logits.shape[-1], ignore_index)
    dtype = accumulate_dtype(logits.dtype)
    logits, targets, temperature = _unit_stride(logits), dense(targets), dense(temperature.to(dtype))
    grads = (dense(grad_logps), dense(grad_entropy))
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    extension().logprob_backward(_call(logits, targets, temperature, ignore_index), *map(address, grads), address(grad))
    return grad


def _call(logits: torch.Tensor, targets: torch.Tensor, temperature: torch.Tensor, ignore_index: int) -> object:
    """The arguments that both passes share."""
    return extension().Logprob(
        DTYPES[logits.dtype],
        address(logits),
        logits.stride(0),
        *logits.shape,
        address(targets),
        address(temperature),
        temperature.numel() > 1,
        ignore_index,
        torch.get_num_threads(),
    )
