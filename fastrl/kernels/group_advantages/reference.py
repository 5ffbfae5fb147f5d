"""The definition: one group after the other."""

from __future__ import annotations

import torch

from fastrl.kernels.precision import answer, widest


def _centred(rewards: torch.Tensor, baseline: str) -> torch.Tensor:
    if baseline == "none":
        return rewards
    if len(rewards) < 2 or rewards.max() == rewards.min():
        return torch.zeros_like(rewards)
    shifted = rewards - rewards.min()
    if baseline == "mean":
        return shifted - shifted.mean()
    mean_of_others = (shifted.sum() - shifted) / (len(rewards) - 1)
    return shifted - mean_of_others


def _divisor(values: torch.Tensor, eps: float) -> torch.Tensor | float:
    """The sample standard deviation plus eps, or 1 where there is no spread to divide by."""
    if len(values) < 2 or values.max() == values.min():
        return 1.0
    std = (values - values.min()).std()
    return std + eps if std > 0 else 1.0


def forward(rewards: torch.Tensor, group_ids: torch.Tensor, baseline: str, scale: str, eps: float) -> torch.Tensor:
    wide = rewards.to(widest(rewards.device))
    valid = ~wide.isnan()
    advantages = torch.zeros_like(wide)
    for group in group_ids.unique():
        members = (group_ids == group) & valid
        advantages[members] = _centred(wide[members], baseline)
        if scale == "group":
            advantages[members] /= _divisor(wide[members], eps)
    if scale == "batch":
        advantages[valid] /= _divisor(advantages[valid], eps)
    return advantages.to(answer(rewards))
