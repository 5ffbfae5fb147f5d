"""The linear layers of a decoder, forward and backward, as one block of training or decoding meets them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from bench.peers import layer_steps
from bench.shapes import LAYERS, LayerShape
from bench.timing import Outputs, Provider
from fastrl.ops.linear import linear

OP, SHAPES, DEFAULT = "linear", LAYERS, ("smollm2-64", "smollm2-512", "smollm2-1k", "smollm2-4k")
DTYPES = ("float32", "bfloat16")


class Layers(NamedTuple):
    """The distinct linear layers of a decoder block: what each reads, and the gradient that comes from above."""

    xs: tuple[torch.Tensor, ...]  # (N, K)
    weights: tuple[torch.Tensor, ...]  # (V, K)
    dys: tuple[torch.Tensor, ...]  # (N, V)
    trains: bool


def tensors(shape: LayerShape, dtype: torch.dtype, device: torch.device) -> dict[str, tuple[Layers]]:
    """With gradients to x and W, and without any."""
    on = {"generator": torch.Generator(device).manual_seed(0), "device": device}

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, **on).to(dtype)

    def layers(trains: bool) -> Layers:
        xs = tuple(draw(shape.tokens, width).requires_grad_(trains) for _, width in shape.sizes)
        weights = tuple((draw(*size) * size[1] ** -0.5).requires_grad_(trains) for size in shape.sizes)
        return Layers(xs, weights, tuple(draw(shape.tokens, outputs) for outputs, _ in shape.sizes), trains)

    return {"forward and backward": (layers(True),), "no gradient": (layers(False),)}


def matmul_flops(layers: Layers) -> float:
    """Of the products that the mode needs."""
    return sum(
        2 * x.shape[0] * w.numel() * (3 if layers.trains else 1) for x, w in zip(layers.xs, layers.weights, strict=True)
    )


def truth(layers: Layers) -> Outputs:
    """In float64."""
    double = Layers(
        *(tuple(t.detach().double().requires_grad_(t.requires_grad) for t in of) for of in layers[:3]), layers.trains
    )
    return layer_steps(torch.nn.functional.linear, double)()


def fastrl_provider(backend: str, layers: Layers) -> Provider:
    """The op on a backend."""
    return layer_steps(lambda x, w: linear(x, w, backend=backend), layers)
