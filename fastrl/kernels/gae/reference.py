"""The definition: a walk backwards through each sequence, in Python's floats, which are float64 on every device."""

from __future__ import annotations

import math
from itertools import pairwise

import torch

from fastrl.kernels.precision import answer


def forward(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    gamma: float,
    lam: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    reward, value, valid, bounds = rewards.tolist(), values.tolist(), mask.tolist(), cu_seqlens.tolist()
    advantages, returns = [0.0] * len(reward), [0.0] * len(reward)
    for start, end in pairwise(bounds):
        next_value, next_advantage, stray_reward = 0.0, 0.0, 0.0
        for t in reversed(range(start, end)):
            if not valid[t]:
                stray_reward += reward[t] if math.isfinite(reward[t]) else 0.0
                continue
            delta = reward[t] + stray_reward + gamma * next_value - value[t]
            advantages[t] = delta + gamma * lam * next_advantage
            returns[t] = advantages[t] + value[t]
            next_value, next_advantage, stray_reward = value[t], advantages[t], 0.0
    dtype = answer(rewards, values)
    return rewards.new_tensor(advantages, dtype=dtype), rewards.new_tensor(returns, dtype=dtype)
