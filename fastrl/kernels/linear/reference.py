"""The definition of `linear`: y = x W^T + b, dx = dy W, dW = dy^T x."""

from __future__ import annotations

import torch
from torch.nn import functional


def forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """y = x W^T + b, (N, V)."""
    return _put(functional.linear(x, weight, bias), out)


def grad_input(dy: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """dx = dy W, (N, K)."""
    return _put(dy @ weight, out)


def grad_weight(dy: torch.Tensor, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """dW = dy^T x, (V, K)."""
    return _put(dy.T @ x, out)


def _put(value: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    return value if out is None else out.add_(value)
