"""One walk backwards through each sequence, in C++; csrc/cpu/gae.h."""

from __future__ import annotations

import torch

from fastrl.kernels.native import DTYPES, address, dense, extension
from fastrl.kernels.precision import answer


def forward(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    gamma: float,
    lam: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = answer(rewards, values)
    rewards, values = dense(rewards.to(dtype)), dense(values.to(dtype))
    mask, cu_seqlens = dense(mask), dense(cu_seqlens)
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    extension().gae(
        DTYPES[dtype],
        *map(address, (rewards, values, mask, cu_seqlens)),
        len(cu_seqlens) - 1,
        len(rewards),
        gamma,
        lam,
        torch.get_num_threads(),
        *map(address, (advantages, returns)),
    )
    return advantages, returns
