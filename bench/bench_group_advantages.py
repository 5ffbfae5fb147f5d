"""GRPO's advantages of the completions of a step."""

from __future__ import annotations

from typing import Any

import torch

import fastrl
from bench.peers import group_normalised
from bench.shapes import BATCHES, GROUP
from bench.timing import Outputs, Provider

OP, SHAPES, DEFAULT = "group_advantages", BATCHES, ("demo", "wide")
EPS = 1e-6


def tensors(batch: tuple[int, int], dtype: torch.dtype, device: torch.device) -> dict[str, tuple]:
    """One float32 reward per sequence, whatever `dtype`."""
    return {"": (torch.randn(batch[0], generator=torch.Generator().manual_seed(0)).to(device), EPS)}


def truth(rewards: torch.Tensor, eps: float) -> Outputs:
    """The formula in float64."""
    return {"advantages": group_normalised(rewards.double(), eps)}


def fastrl_provider(backend: str, rewards: torch.Tensor, eps: float, **options: Any) -> Provider:
    """The op on a backend."""
    options |= {"group_size": GROUP, "eps": eps, "backend": backend}
    return lambda: {"advantages": fastrl.group_advantages(rewards, **options)}
