"""All groups at once, by indexed sums: any device, O(B) memory whatever the group sizes."""

from __future__ import annotations

import torch

from fastrl.kernels.precision import answer, widest


def _sum_by(segment: torch.Tensor, segments: int, x: torch.Tensor) -> torch.Tensor:
    """To each member, the sum over its segment."""
    return x.new_zeros(segments).index_add(0, segment, x)[segment]  # (B,)


def _deviations(
    x: torch.Tensor, valid: torch.Tensor, segment: torch.Tensor, segments: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distance of each valid member to the mean of its segment, zero elsewhere; and how many valid members it has."""
    low = x.new_full((segments,), torch.inf)
    low = low.scatter_reduce(0, segment, x.masked_fill(~valid, torch.inf), "amin")
    shifted = torch.where(valid, x - low[segment], 0.0)
    count = _sum_by(segment, segments, valid.to(x.dtype))
    mean = _sum_by(segment, segments, shifted) / count.clamp(min=1)
    return torch.where(valid, shifted - mean, 0.0), count


def _divisor(
    deviations: torch.Tensor, count: torch.Tensor, segment: torch.Tensor, segments: int, eps: float
) -> torch.Tensor:
    """The sample standard deviation plus eps, or 1 where there is no spread to divide by."""
    std = (_sum_by(segment, segments, deviations.square()) / (count - 1).clamp(min=1)).sqrt()
    return torch.where(std > 0, std + eps, 1.0)


def forward(rewards: torch.Tensor, group_ids: torch.Tensor, baseline: str, scale: str, eps: float) -> torch.Tensor:
    x = rewards.to(widest(rewards.device))
    valid = ~x.isnan()
    ids, group = group_ids.unique(return_inverse=True)
    groups = len(ids)
    deviations, count = _deviations(x, valid, group, groups)
    if baseline == "none":
        advantages = torch.where(valid, x, 0.0)
    elif baseline == "mean":
        advantages = deviations
    else:  # r - mean of the others = (r - mean) n / (n - 1)
        advantages = deviations * (count / (count - 1).clamp(min=1))
    if scale == "group":
        advantages = advantages / _divisor(deviations, count, group, groups, eps)
    elif scale == "batch":
        batch = torch.zeros_like(group)
        advantages = advantages / _divisor(*_deviations(advantages, valid, batch, 1), batch, 1, eps)
    return advantages.to(answer(rewards))
