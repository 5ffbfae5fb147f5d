"""A program per row, which is read once per pass; forward leaves backward the statistics."""

from __future__ import annotations

import torch

from fastrl.kernels.softmax_row import NO_SOFTCAP, accumulate_dtype, check_targets
from fastrl.kernels.softmax_row_triton import build, flags, gradient_kernel, statistics_kernel
from fastrl.kernels.triton_jit import Build, launch


def forward(
    logits: torch.Tensor, targets: torch.Tensor, temperature: torch.Tensor, *, ignore_index: int, entropy: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `reference.forward`."""
    dtype, rows = accumulate_dtype(logits.dtype), len(targets)
    logps, h, lse = (
        torch.empty(shape, dtype=dtype, device=logits.device) for shape in (rows, rows if entropy else 0, (2, rows))
    )
    call = _call(logits, targets, temperature, ignore_index)
    outputs = {"logps_ptr": logps, "lse_ptr": lse, "entropy_ptr": h if entropy else None, "summaries_ptr": None}
    launch(statistics_kernel, rows, logits, **call, **outputs)
    return logps, h, lse


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
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    launch(
        gradient_kernel,
        len(targets),
        logits,
        **_call(logits, targets, temperature, ignore_index),
        rows_ptr=None,
        logps_ptr=None,
        lse_ptr=lse.contiguous(),
        entropy_ptr=None if grad_entropy is None else entropy.contiguous(),
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


def _builds(dtype: str) -> list[Build]:
    forward = _pointers(dtype, "logps", "lse", "entropy")
    backward = _pointers(dtype, "lse", "entropy", "grad_logps", "grad_entropy") | {"out": dtype}
    return [
        build(f"logprob forward {dtype}", statistics_kernel, forward),
        build(f"logprob backward {dtype}", gradient_kernel, backward),
    ]


BUILDS = [build for dtype in ("bf16", "fp16", "fp32", "fp64") for build in _builds(dtype)]
BUILDS += [
    build(f"logprob {name} bf16, no entropy", kernel, _pointers("bf16", *pointers) | more, multiples=("V", "stride"))
    for name, kernel, pointers, more in (
        ("forward", statistics_kernel, ("logps", "lse"), {}),
        ("backward", gradient_kernel, ("lse", "grad_logps"), {"out": "bf16"}),
    )
]
