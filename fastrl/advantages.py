"""From rewards to advantages: what a trainer does besides `group_advantages` and `gae`. Nothing here has a gradient."""

from __future__ import annotations

import torch

from fastrl import check
from fastrl.kernels.precision import answer, widest
from fastrl.ops.gae import gae
from fastrl.ops.group_advantages import GroupAdvantage

GRPO = GroupAdvantage("mean", "group")  # arXiv:2402.03300, section 4.1.2
DR_GRPO = GroupAdvantage("mean", "none")  # arXiv:2503.20783, section 3.2
RLOO = GroupAdvantage("leave_one_out", "none")  # arXiv:2402.14740
SCALE_RL = GroupAdvantage("mean", "batch")  # arXiv:2510.13786


def whiten(values: torch.Tensor, mask: torch.Tensor, *, eps: float = 1e-8) -> torch.Tensor:
    """Shifted and scaled to mean 0 and standard deviation 1 over the valid tokens.

    (x_t - mean) / (std + eps), with n - 1 in the standard deviation; exactly 0 where masked, and everywhere when the
    valid values are all equal or fewer than two. What a masked token holds, even NaN, is never read.

    Args:
        values: any shape, floating point.
        mask: as values; bool, or numbers that are zero where masked.

    Returns:
        As values; float32, or float64 for float64 values.
    """
    check.floating("whiten", "values", values)
    check.shape("whiten", "mask", mask, values.shape, "as values")
    if values.numel() == 0:
        return values.new_empty(values.shape, dtype=answer(values))
    valid, wide = mask != 0, values.detach().to(widest(values.device))
    # Equal values are exactly zero after the shift, and so are their mean and deviations, whatever their rounding.
    low = wide.masked_fill(~valid, torch.inf).amin()
    shifted = torch.where(valid, wide - low, 0.0)
    count = valid.sum()
    deviations = torch.where(valid, shifted - shifted.sum() / count.clamp(min=1), 0.0)
    std = (deviations.square().sum() / (count - 1).clamp(min=1)).sqrt()
    return torch.where(std != 0, deviations / (std + eps), 0.0).to(answer(values))


def kl_in_reward(
    rewards: torch.Tensor,
    logps: torch.Tensor,
    ref_logps: torch.Tensor,
    mask: torch.Tensor,
    coef: float,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rewards per token: the k1 estimate of the KL to the reference at each token, the score at the last.

    r_t = -coef (logps_t - ref_logps_t) + [t is the last valid token of its sequence] score: arXiv:2203.02155 eq. 2, in
    the per-token form of its reference code. Exactly 0 where masked: a token the policy did not write pays no KL. The
    score of a sequence without a valid token is dropped. A NaN score becomes a NaN reward: mask out the whole sequence
    of a completion that could not be scored.

    Args:
        rewards: (B,) scores, or (S,) with `cu_seqlens`.
        logps: (B, T), or (N,) with `cu_seqlens`; of the policy that sampled.
        ref_logps: as logps.
        mask: as logps; bool, or numbers that are zero where masked.
        coef: weight of the KL.
        cu_seqlens: (S + 1,) bounds of packed sequences; tokens behind the last bound are padding.

    Returns:
        As logps; float32, or float64 when an input is.
    """
    op = "kl_in_reward"
    dims = 2 if cu_seqlens is None else 1
    check.require(logps.dim() == dims, op, "logps", "shape (B, T), or (N,) with cu_seqlens", tuple(logps.shape))
    sequences = logps.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    check.shape(op, "rewards", rewards, (sequences,), "one score per sequence")
    check.shape(op, "ref_logps", ref_logps, logps.shape, "as logps")
    check.shape(op, "mask", mask, logps.shape, "as logps")
    padded = torch.arange(sequences + 1, device=logps.device) * logps.shape[-1]
    bounds = padded if cu_seqlens is None else cu_seqlens.long()
    dtype = answer(rewards, logps, ref_logps)
    position = torch.arange(logps.numel(), device=logps.device)
    valid = (mask != 0).reshape(-1) & (position < bounds[-1])
    penalty = coef * (logps.detach().to(dtype) - ref_logps.detach().to(dtype)).reshape(-1)
    token_rewards = torch.where(valid, -penalty, 0.0)
    token, sequence = position[valid], torch.searchsorted(bounds, position[valid], right=True) - 1
    last = torch.full((sequences,), -1, device=logps.device).scatter_reduce(0, sequence, token, "amax")
    token_rewards.index_add_(0, last[last >= 0], rewards.detach().to(dtype)[last >= 0])
    return token_rewards.reshape(logps.shape)


def discounted_returns(
    rewards: torch.Tensor, mask: torch.Tensor, *, gamma: float = 1.0, cu_seqlens: torch.Tensor | None = None
) -> torch.Tensor:
    """Reward-to-go of each valid token: R_t = r_t + gamma R_{t'}, t' the next valid token.

    The return of REINFORCE++, arXiv:2501.03262, before `whiten`. It is `gae` with lam 1 and no critic, with the same
    shapes, the same treatment of masked tokens and of rewards that fall on them.
    """
    advantages, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0, cu_seqlens=cu_seqlens)
    return advantages
