"""Packs bfloat16 weights once for many small CPU matmuls, instead of once per matmul."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from torch import nn

from fastrl.model.accelerate import NativeLinear, is_linear, served


def can_prepack(weight: torch.Tensor) -> bool:
    """Whether oneDNN has a packed layout for this weight on this processor."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


@contextmanager
def prepacked(model: nn.Module) -> Generator[None]:
    """Inside the block, plain `nn.Linear` layers compute with packed copies of their weights, if that is possible and
    fastrl's own product is not better.

    A matmul of few rows spends a third of its time rearranging the weight for the vector unit, and a rollout would
    repeat that at every step. The copies take as many bytes as the weights and are freed afterwards.
    """
    linears = [m for m in model.modules() if is_linear(m) and "forward" not in vars(m)]
    replaced = [m for m in linears if can_prepack(m.weight) and not _native(m)]
    try:
        for module in replaced:
            module.forward = _packed_forward(module)
        yield
    finally:
        for module in replaced:
            vars(module).pop("forward", None)


def _native(module: nn.Linear) -> bool:
    """Whether fastrl's native product computes a rollout's rows."""
    return isinstance(module, NativeLinear) and served(module, module.weight.dtype, 64)


def _packed_forward(module: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    packed, version = None, -1

    def forward(x: torch.Tensor) -> torch.Tensor:
        nonlocal packed, version
        if module.weight._version != version:  # also after an update in the middle of a rollout
            version = module.weight._version
            packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach())
        return torch.ops.mkldnn._linear_pointwise(x, packed, module.bias, "none", [], "")

    return forward
