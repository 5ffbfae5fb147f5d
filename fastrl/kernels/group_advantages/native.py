"""Sums by group in C++, one pass each; csrc/cpu/group_advantages.h."""

from __future__ import annotations

import torch

from fastrl.kernels.native import address, dense, extension
from fastrl.kernels.precision import answer

BASELINES = {"mean": 0, "leave_one_out": 1, "none": 2}  # csrc/cpu/kernels.h
SCALES = {"group": 0, "batch": 1, "none": 2}


def _numbered(group_ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A number from 0 for each id, and a bound of the numbers: the ids as they are where that needs no more memory."""
    if len(group_ids) == 0:
        return group_ids, 0
    low, high = (int(x) for x in group_ids.aminmax())
    if low >= 0 and high < len(group_ids):
        return group_ids, high + 1
    ids, numbers = group_ids.unique(return_inverse=True)
    return numbers, len(ids)


def forward(rewards: torch.Tensor, group_ids: torch.Tensor, baseline: str, scale: str, eps: float) -> torch.Tensor:
    group, groups = _numbered(group_ids)
    x, group = dense(rewards.double()), dense(group)
    advantages = torch.empty_like(x)
    extension().group_advantages(
        *map(address, (x, group)), len(x), groups, BASELINES[baseline], SCALES[scale], eps, address(advantages)
    )
    return advantages.to(answer(rewards))
