"""`linear` in C++: csrc/cpu/linear.h."""

from __future__ import annotations

import torch

from fastrl.kernels.native import DTYPES, extension

TAKES = (torch.float32, torch.bfloat16)


def forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """As `reference.forward`."""
    x, weight = _rows(x), _rows(weight)
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty(x.shape[0], weight.shape[0]) if out is None else out
    extension().linear_forward(
        *(DTYPES[x.dtype], x.shape[0], x.shape[1], weight.shape[0], torch.get_num_threads()),
        *(x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr()),
        *(x.stride(0), weight.stride(0), y.stride(0), out is not None),
    )
    return y


def grad_input(dy: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """As `reference.grad_input`."""
    dy, weight = _rows(dy), _rows(weight)
    dx = dy.new_empty(dy.shape[0], weight.shape[1]) if out is None else out
    extension().linear_grad_input(
        *(DTYPES[dy.dtype], dy.shape[0], weight.shape[1], weight.shape[0], torch.get_num_threads()),
        *(dy.data_ptr(), weight.data_ptr(), dx.data_ptr()),
        *(dy.stride(0), weight.stride(0), dx.stride(0), out is not None),
    )
    return dx


def grad_weight(dy: torch.Tensor, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """As `reference.grad_weight`; `out` is contiguous."""
    dy, x = _rows(dy), _rows(x)
    dw = x.new_empty(dy.shape[1], x.shape[1]) if out is None else out
    extension().linear_grad_weight(
        *(DTYPES[x.dtype], x.shape[0], x.shape[1], dy.shape[1], torch.get_num_threads()),
        *(dy.data_ptr(), x.data_ptr(), dw.data_ptr()),
        *(dy.stride(0), x.stride(0), out is not None, dw.dtype != torch.float32),
    )
    return dw


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with the values of a row side by side."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()
