"""Every warp reads all rewards and takes those of its group, in one launch; csrc/cuda/group_advantages.cu."""

from __future__ import annotations

import torch

from fastrl.kernels.cuda import DTYPES, address, extension, launch, scratch
from fastrl.kernels.group_advantages.native import BASELINES, SCALES
from fastrl.kernels.native import dense
from fastrl.kernels.precision import answer


def rewards_of_groups(rewards: torch.Tensor, group_ids: torch.Tensor, baseline: str, scale: str, eps: float) -> object:
    """The arguments as the extension reads them; both tensors are dense, rewards float32 or float64."""
    options = (len(rewards), BASELINES[baseline], SCALES[scale], eps)
    return extension(rewards.device).GroupRewards(DTYPES[rewards.dtype], *map(address, (rewards, group_ids)), *options)


def forward(rewards: torch.Tensor, group_ids: torch.Tensor, baseline: str, scale: str, eps: float) -> torch.Tensor:
    dtype, device = answer(rewards), rewards.device
    x, group = dense(rewards.to(dtype)), dense(group_ids)
    advantages = torch.empty(len(x), dtype=dtype, device=device)
    call = rewards_of_groups(x, group, baseline, scale, eps)
    memory = scratch(extension(device).group_advantages_scratch(call), device)
    launch("group_advantages", device, call, *map(address, (advantages, memory)))
    return advantages
