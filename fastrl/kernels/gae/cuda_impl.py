"""A scan over tiles of each sequence, in two launches; csrc/cuda/gae.cu.

A block to a tile of 2,048 tokens, so a single sequence is worked on side by side: N / 2,048 + S + 1 blocks a launch,
1,041 for 16 sequences of 131,072.
"""

from __future__ import annotations

import torch

from fastrl.kernels.cuda import DTYPES, address, extension, launch, scratch
from fastrl.kernels.native import dense
from fastrl.kernels.precision import answer


def forward(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    gamma: float,
    lam: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype, device = answer(rewards, values), rewards.device
    inputs = (dense(rewards.to(dtype)), dense(values.to(dtype)), dense(mask), dense(cu_seqlens))
    advantages, returns = (torch.empty(rewards.shape, dtype=dtype, device=device) for _ in range(2))
    module = extension(device)
    call = module.Gae(
        DTYPES[dtype],
        *map(address, inputs),
        len(cu_seqlens) - 1,
        len(rewards),
        gamma,
        lam,
        *map(address, (advantages, returns)),
    )
    memory = scratch(module.gae_scratch(call), device)
    launch("gae", device, call, address(memory))
    return advantages, returns
