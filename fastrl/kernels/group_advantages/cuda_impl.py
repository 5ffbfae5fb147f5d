"""Every warp reads all rewards and takes those of its group, in one launch; csrc/cuda/group_advantages.cu."""

from __future__ import annotations

import torch

from fastrl.kernels.cuda import DTYPES, address, extension, launch, scratch
from fastrl.kernels.group_advantages.native import BASELINES, SCALES
from fastrl.kernels.native import dense
from fastrl.kernels.precision import answer


def forward(rewards: torch.Tensor, group_ids: torch.Tensor, baseline: str, scale: str, eps: float) -> torch.Tensor:
    dtype, device = answer(rewards), rewards.device
    x, group = dense(rewards.to(dtype)), dense(group_ids)
    advantages = torch.empty(len(x), dtype=dtype, device=device)
    module = extension(device)
    call = module.GroupRewards(
        DTYPES[dtype], *map(address, (x, group)), len(x), BASELINES[baseline], SCALES[scale], eps
    )
    memory = scratch(module.group_advantages_scratch(call), device)
    launch("group_advantages", device, call, *map(address, (advantages, memory)))
    return advantages
