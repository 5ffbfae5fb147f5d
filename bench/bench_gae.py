"""Generalised advantage estimation on right-padded sequences."""

from __future__ import annotations

import torch

import fastrl
from bench.peers import gae_loop
from bench.shapes import BATCHES, token_tensors
from bench.timing import Outputs, Provider

OP, SHAPES, DEFAULT = "gae", BATCHES, ("demo", "long", "wide")
GAMMA, LAM = 1.0, 0.95


def tensors(batch: tuple[int, int], dtype: torch.dtype, device: torch.device) -> dict[str, tuple]:
    """Rewards, values and mask (B, T), float32 whatever `dtype`; gamma and lambda."""
    made = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(batch, generator=made).to(device) for _ in range(2))
    mask = token_tensors(batch, device).mask
    return {"": (rewards * mask, values, mask, GAMMA, LAM)}


def truth(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float) -> Outputs:
    """The loop in float64."""
    advantages, returns = gae_loop(rewards.double(), values.double(), mask.double(), gamma, lam)
    return {"advantages": advantages, "returns": returns}


def fastrl_provider(
    backend: str, rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> Provider:
    """The op on a backend."""

    def run() -> Outputs:
        advantages, returns = fastrl.gae(rewards, values, mask, gamma=gamma, lam=lam, backend=backend)
        return {"advantages": advantages, "returns": returns}

    return run
