"""A program per row: forward in one read, backward in two reads, the second mostly from the cache, and one write."""

from __future__ import annotations

import torch

from fastrl.kernels.softmax_row import NO_SOFTCAP, accumulate_dtype, check_targets
from fastrl.kernels.softmax_row_triton import build, flags, gradient_kernel, statistics_kernel
from fastrl.kernels.triton_jit import launch


def forward(
    logits: torch.Tensor, targets: torch.Tensor, temperature: torch.Tensor, *, ignore_index: int, entropy: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.forward`."""
    dtype, rows = accumulate_dtype(logits.dtype), len(targets)
    logps, h = (torch.empty(n, dtype=dtype, device=logits.device) for n in (rows, rows if entropy else 0))
    call = _call(logits, targets, temperature, ignore_index)
    launch(statistics_kernel, rows, logits, **call, logps_ptr=logps, lse_ptr=None, entropy_ptr=h if entropy else None)
    return logps, h


def backward(
    grad_logps: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    *,
    ignore_index: int,
) -> torch.Tensor:
    """As `reference.backward`."""
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    launch(
        gradient_kernel,
        len(targets),
        logits,
        **_call(logits, targets, temperature, ignore_index),
        rows_ptr=None,
        logps_ptr=None,
        lse_ptr=None,
        entropy_ptr=None,
        grad_logps_ptr=grad_logps.contiguous(),
        grad_entropy_ptr=None if grad_entropy is None else grad_entropy.contiguous(),
        out_ptr=grad,
        KEPT=False,
    )
    return grad


def _call(
    logits: torch.Tensor, targets: torch.Tensor, temperature: torch.Tensor, ignore_index: int
) -> dict[str, object]:
    """The arguments that both passes share."""
    if not logits.is_cuda:  # there the kernel makes such a row NaN, without waiting for the stream
        check_targets(targets, logits.shape[-1], ignore_index)
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    temperature = temperature.to(accumulate_dtype(logits.dtype)).contiguous()
    return {
        "logits_ptr": logits,
        "stride": logits.stride(0),
        "bias_ptr": None,
        "targets_ptr": targets.contiguous(),
        "temperature_ptr": temperature,
        "V": logits.shape[-1],
        "softcap": NO_SOFTCAP,
        "logit_scale": 1.0,
        "ignore_index": ignore_index,
        **flags(temperature, NO_SOFTCAP, logits.shape[-1]),
    }


def _pointers(dtype: str, *more: str) -> dict[str, str]:
    real = "fp64" if dtype == "fp64" else "fp32"
    return {"logits": dtype, "targets": "i64", "temperature": real} | dict.fromkeys(more, real)


BUILDS = [
    build(f"logprob forward {dtype}", statistics_kernel, _pointers(dtype, "logps", "entropy"))
    for dtype in ("bf16", "fp16", "fp32", "fp64")
] + [
    build(f"logprob backward {dtype}", gradient_kernel, _pointers(dtype, "grad_logps", "grad_entropy") | {"out": dtype})
    for dtype in ("bf16", "fp16", "fp32", "fp64")
]
BUILDS += [
    build("logprob forward bf16, no entropy", statistics_kernel, _pointers("bf16", "logps"), PER_ROW_TEMPERATURE=True),
    build("logprob backward bf16, no entropy", gradient_kernel, _pointers("bf16", "grad_logps") | {"out": "bf16"}),
]
