"""A scan by doubling over the valid tokens alone: log2(longest sequence) passes, no loop over tokens.

A_t = sum_k decay^k delta_{t+k} over the valid tokens of the sequence. After the pass with stride s each token holds the
first 2s terms of its sum; adding decay^s times what the token s later holds is the next pass. Powers of decay multiply
and never divide, so decay 0 and 1 are exact. Terms only move to earlier tokens of the same sequence, so a NaN reaches
no token that its own recursion would not have given it to.
"""

from __future__ import annotations

import torch

from fastrl.kernels.precision import answer, widest


def _with_stray_rewards(
    rewards: torch.Tensor, mask: torch.Tensor, sequence: torch.Tensor, token: torch.Tensor
) -> torch.Tensor:
    """Rewards of the valid tokens, each with those of the masked tokens up to the next valid one."""
    stray = (~mask & rewards.isfinite() & (rewards != 0)).nonzero().squeeze(1)
    home = mask.cumsum(0)[stray] - 1  # among the valid tokens; -1 before the first
    has_home = (home >= 0) & (sequence[token[home.clamp(min=0)]] == sequence[stray])
    return rewards[token].index_add(0, home[has_home], rewards[stray[has_home]])


def _scan(deltas: torch.Tensor, sequence: torch.Tensor, decay: float) -> torch.Tensor:
    longest = int(sequence.bincount().max())
    sums, stride = deltas.clone(), 1
    while stride < longest:
        later = torch.where(sequence[stride:] == sequence[:-stride], sums[stride:], 0.0)
        sums[:-stride].add_(later, alpha=decay**stride)
        stride *= 2
    return sums


def forward(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    gamma: float,
    lam: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = answer(rewards, values)
    advantages, returns = (rewards.new_zeros(rewards.shape, dtype=dtype) for _ in range(2))
    position = torch.arange(len(rewards), device=rewards.device)
    sequence = torch.searchsorted(cu_seqlens, position, right=True) - 1  # padding gets S, a sequence of its own
    mask = mask & (position < cu_seqlens[-1])
    token = mask.nonzero().squeeze(1)  # (M,)
    if len(token) == 0:
        return advantages, returns
    wide = widest(rewards.device)
    reward = _with_stray_rewards(rewards.to(wide), mask, sequence, token)
    value, sequence = values[token].to(wide), sequence[token]
    next_value = torch.zeros_like(value)
    next_value[:-1] = torch.where(sequence[1:] == sequence[:-1], value[1:], 0.0)
    advantage = _scan(reward + gamma * next_value - value, sequence, gamma * lam)
    advantages[token] = advantage.to(dtype)
    returns[token] = (advantage + value).to(dtype)
    return advantages, returns
