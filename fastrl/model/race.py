"""Benchmarks this machine: bfloat16 against float32, and fastrl's products against torch's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from statistics import median
from typing import Any

import torch

from fastrl.model.accelerate import Choices, Probe, Shape, probe

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CLEARLY = 0.9  # bfloat16 must take at most this share of float32's time, to be safe from noise
DECODED, TRAINED = 64, 256  # rows in the benchmark: forward only, and forward with gradients
MOST_SHAPES = 3  # only the shapes with the most work


def bfloat16_ratio(shapes: Mapping[Shape, int], *, native: bool = True) -> float:
    """bfloat16's time over float32's for a model's linear layers; `shapes` is (outputs, width) -> number of layers.

    The mean of the ratios for decoding and for training. `native`: whether fastrl's products may be used.
    """
    heaviest = tuple(sorted(shapes.items(), key=lambda item: -item[0][0] * item[0][1] * item[1])[:MOST_SHAPES])
    return _ratio(heaviest, native)


@cache
def _ratio(shapes: tuple[tuple[Shape, int], ...], native: bool) -> float:
    ratios = []
    for rows in (DECODED, TRAINED):
        total: defaultdict[torch.dtype, float] = defaultdict(float)
        for shape, count in shapes:
            for dtype, race in probe(shape, tuple(DTYPES.values()), rows).items():
                total[dtype] += count * _seconds(race, native)
        ratios.append(total[torch.bfloat16] / total[torch.float32])
    return sum(ratios) / len(ratios)


def _seconds(race: Probe, native: bool) -> float:
    return median(race.native if native and race.prefers_native() else race.torch)


def to_json(choices: Choices) -> dict[str, dict[str, list[bool]]]:
    """Choices in the form that checkpoints hold."""
    return {
        str(dtype).removeprefix("torch."): {
            f"{outputs}x{width}": list(native) for (outputs, width), native in of.items()
        }
        for dtype, of in choices.items()
    }


def from_json(saved: Mapping[str, Any]) -> Choices:
    """The inverse of `to_json`."""
    return {
        getattr(torch, dtype): {_shape(name): tuple(native) for name, native in of.items()}
        for dtype, of in saved.items()
    }


def _shape(name: str) -> Shape:
    outputs, width = name.split("x")
    return int(outputs), int(width)
