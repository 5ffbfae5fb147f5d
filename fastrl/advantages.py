"""From rewards to advantages, in addition to `group_advantages` and `gae`. Nothing here has a gradient."""

from __future__ import annotations

import torch

from fastrl import check
from fastrl.kernels.precision import answer, widest
from fastrl.ops.gae import gae
from fastrl.ops.group_advantages import GroupAdvantage, check_groups, finite, group_advantages

GRPO = GroupAdvantage("mean", "group")  # arXiv:2402.03300, section 4.1.2
DR_GRPO = GroupAdvantage("mean", "none")  # arXiv:2503.20783, section 3.2
RLOO = GroupAdvantage("leave_one_out", "none")  # arXiv:2402.14740
SCALE_RL = GroupAdvantage("mean", "batch")  # arXiv:2510.13786


def whiten(values: torch.Tensor, mask: torch.Tensor, *, eps: float = 1e-8) -> torch.Tensor:
    """Shifts and scales values to mean 0 and standard deviation 1 over the valid tokens.

    (x_t - mean) / (std + eps), with n - 1 in the standard deviation; exactly 0 where masked, and everywhere if the
    valid values are all equal or fewer than two. Masked values, even NaN, are never read.

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
    # After the shift equal values are exactly zero, and so are their mean and deviations, despite rounding.
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
    """Rewards per token: minus the k1 estimate of the KL to the reference at each token, plus the score at the last.

    r_t = -coef (logps_t - ref_logps_t) + [t is the last valid token of its sequence] score: arXiv:2203.02155 eq. 2, in
    the per-token form of its reference code. Exactly 0 where masked: a token the policy did not write pays no KL. The
    score of a sequence without a valid token is dropped. A NaN score becomes a NaN reward: mask out the whole sequence
    of a completion that could not be scored.

    Args:
        rewards: (B,) scores, or (S,) with `cu_seqlens`.
        logps: (B, T), or (N,) with `cu_seqlens`; under the policy that sampled.
        ref_logps: as logps.
        mask: as logps; bool, or numbers that are zero where masked.
        coef: weight of the KL.
        cu_seqlens: (S + 1,) bounds of packed sequences; tokens after the last bound are padding.

    Returns:
        As logps; float32, or float64 if an input is.
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
    shapes and the same treatment of masked tokens and their rewards.
    """
    advantages, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0, cu_seqlens=cu_seqlens)
    return advantages


# Other estimators that compare a completion with the others of its prompt. As in `group_advantages`, group ids are any
# integers in any order, groups may differ in size, a NaN reward gets exactly 0 and counts nowhere, and a group without
# differences, or with one scorable member, gets exactly 0, unless a function says otherwise.


def gdpo(
    rewards: torch.Tensor,
    *,
    weights: torch.Tensor | None = None,
    group_ids: torch.Tensor | None = None,
    group_size: int | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Several rewards, each normalised within its group before they are added: GDPO, arXiv:2601.05242.

    S_i = sum_k w_k (r_ik - mean_G r_k) / (std_G r_k + eps),  A_i = S_i / (std_batch S + eps). The batch mean that the
    paper subtracts is 0: every group's terms add up to 0. TRL's multi_objective_aggregation="normalize_then_sum", whose
    eps is 1e-4.

    Args:
        rewards: (B, K) floating point; NaN if reward k does not apply to a completion, which then lacks that term. A
            completion to which no reward applies gets exactly 0.
        weights: (K,), 1 each by default.
        group_ids, group_size: as `group_advantages`.
        eps: added to both standard deviations.

    Returns:
        (B,) float32, or float64 for float64 rewards. A constant.

    Raises:
        ValueError: rewards or weights of another shape; groups as `group_advantages`.
    """
    check.require(rewards.dim() == 2, "gdpo", "rewards", "shape (B, K)", tuple(rewards.shape))
    weights = torch.ones(rewards.shape[1], device=rewards.device) if weights is None else weights
    check.shape("gdpo", "weights", weights, rewards.shape[1:], "one per reward")
    rewards, dtype = finite("gdpo", "rewards", rewards), answer(rewards)
    groups = check_groups("gdpo", rewards.new_zeros(rewards.shape[0]), group_ids, group_size)
    wide = rewards.to(widest(rewards.device))
    total = torch.where(wide.isnan().all(1), torch.nan, 0.0).to(wide.dtype)
    for reward, weight in zip(wide.unbind(1), weights.to(wide.dtype), strict=True):
        total = total + weight * group_advantages(reward, group_ids=groups, eps=eps)
    return group_advantages(total, group_ids=groups, baseline="none", scale="batch", eps=eps).to(dtype)


def reinforce_pp_baseline(
    rewards: torch.Tensor,
    lengths: torch.Tensor,
    *,
    group_ids: torch.Tensor | None = None,
    group_size: int | None = None,
    eps: float = 1e-8,
) -> torch.Tensor:
    """Rewards minus their group's mean, then whitened over all tokens of the batch: REINFORCE++-baseline,
    arXiv:2501.03262.

    a_i = r_i - mean_G r,  A_i = (a_i - mean_tokens a) / (std_tokens a + eps). Each completion counts once per token, so
    a group without differences may get non-zero advantages. verl's form, except that its eps is inside the root.
    Whitened over completions instead, it is `GroupAdvantage("mean", "batch")`.

    Args:
        rewards: (B,) floating point, finite or NaN.
        lengths: (B,) int, the trained tokens of each completion. A completion without any gets 0.
        group_ids, group_size: as `group_advantages`.

    Returns:
        (B,) float32, or float64 for float64 rewards. A constant.
    """
    op = "reinforce_pp_baseline"
    groups = check_groups(op, rewards, group_ids, group_size)
    rewards = finite(op, "rewards", rewards)
    _check_lengths(op, lengths, rewards)
    centred = group_advantages(rewards, group_ids=groups, scale="none")
    lengths = lengths.long().masked_fill(rewards.isnan(), 0)
    tokens = centred.repeat_interleave(lengths)
    whitened = whiten(tokens, torch.ones_like(tokens), eps=eps)
    first, present = lengths.cumsum(0) - lengths, lengths > 0
    return torch.zeros_like(centred).masked_scatter(present, whitened[first[present]])


def opo(
    rewards: torch.Tensor,
    lengths: torch.Tensor,
    *,
    group_ids: torch.Tensor | None = None,
    group_size: int | None = None,
) -> torch.Tensor:
    """Rewards minus the group's mean weighted by length: OPO, arXiv:2505.23585.

    A_i = r_i - sum_j l_j r_j / sum_j l_j over i's group: the baseline of least variance if the squared gradient of a
    completion's log-probability grows with its length. For exact on-policy training. verl keeps the reward of a group's
    only member; here it gets 0.

    Args:
        rewards: (B,) floating point, finite or NaN.
        lengths: (B,) int, the tokens of each completion.
        group_ids, group_size: as `group_advantages`.

    Returns:
        (B,) float32, or float64 for float64 rewards. A constant.
    """
    groups = check_groups("opo", rewards, group_ids, group_size)
    rewards = finite("opo", "rewards", rewards)
    _check_lengths("opo", lengths, rewards)
    valid, group, count = _indexed(rewards, groups)
    wide = rewards.to(widest(rewards.device))
    low = _largest(-wide.masked_fill(~valid, torch.inf), group, count)  # minus the smallest reward of each group
    shifted = torch.where(valid, wide + low[group], 0.0)  # equal rewards are exactly 0
    weights = torch.where(valid, lengths, 0).to(wide.dtype)
    total = wide.new_zeros(2, count).index_add(1, group, torch.stack((weights * shifted, weights)))
    baseline = (total[0] / total[1].clamp(min=1))[group]
    return torch.where(valid, shifted - baseline, 0.0).to(answer(rewards))


def max_rl(
    rewards: torch.Tensor, *, group_ids: torch.Tensor | None = None, group_size: int | None = None
) -> torch.Tensor:
    """Rewards relative to their group's mean: MaxRL, arXiv:2602.02710.

    A_i = (r_i - mean_G r) / mean_G r, and 0 where the mean is not positive. For rewards of 0 and 1 the sum over a group
    is the gradient of the log-probability that a sample succeeds, truncated at the group's size.

    Args:
        rewards: (B,) floating point, non-negative or NaN.
        group_ids, group_size: as `group_advantages`.

    Returns:
        (B,) float32, or float64 for float64 rewards. A constant.
    """
    groups = check_groups("max_rl", rewards, group_ids, group_size)
    rewards = finite("max_rl", "rewards", rewards)
    valid, group, count = _indexed(rewards, groups)
    wide = rewards.to(widest(rewards.device))
    seen = torch.stack((torch.where(valid, wide, 0.0), valid.to(wide.dtype)))
    total = wide.new_zeros(2, count).index_add(1, group, seen)
    mean = (total[0] / total[1].clamp(min=1))[group]
    centred = group_advantages(wide, group_ids=groups, scale="none")
    return torch.where(mean > 0, centred / mean, 0.0).to(answer(rewards))


def pass_at_k(
    rewards: torch.Tensor,
    *,
    group_ids: torch.Tensor | None = None,
    group_size: int | None = None,
    scale: str = "group",
    eps: float = 1e-6,
) -> torch.Tensor:
    """Credits only the best of each group, with its lead over the second: arXiv:2503.19595.

    A_best = (r_best - r_second) / (std_G r + eps), or just the lead with scale="none"; 0 for all others, and for all if
    several share the best reward. The k of pass@k is the group's size. verl's grpo_passk, which refuses a group of one;
    here it gets 0.

    Args:
        rewards: (B,) floating point, finite or NaN.
        group_ids, group_size: as `group_advantages`.
        scale, eps: as `group_advantages`.

    Returns:
        (B,) float32, or float64 for float64 rewards. A constant.
    """
    groups = check_groups("pass_at_k", rewards, group_ids, group_size)
    rewards = finite("pass_at_k", "rewards", rewards)
    valid, group, count = _indexed(rewards, groups)
    # The difference of two advantages is the scaled difference of their rewards.
    wide = rewards.to(widest(rewards.device))
    relative = group_advantages(wide, group_ids=groups, scale=scale, eps=eps).masked_fill(~valid, -torch.inf)
    best = _largest(relative, group, count)[group]
    is_best = valid & (relative == best)
    second = _largest(relative.masked_fill(is_best, -torch.inf), group, count)[group]
    winners = torch.zeros(count, dtype=torch.int64, device=group.device).index_add(0, group, is_best.long())
    alone = (winners == 1)[group]
    return torch.where(is_best & alone & second.isfinite(), best - second, 0.0).to(answer(rewards))


def remax(rewards: torch.Tensor, greedy_rewards: torch.Tensor) -> torch.Tensor:
    """Rewards minus the reward of the same prompt's greedy completion: ReMax, arXiv:2310.10505.

    A_i = r_i - r(greedy). It needs no group: one sample per prompt is enough.

    Args:
        rewards: (B,) floating point, finite or NaN.
        greedy_rewards: (B,), for each completion the reward of its prompt's greedy one. If either is NaN, A is exactly
            0.

    Returns:
        (B,) float32, or float64 when an input is. A constant.
    """
    check.floating("remax", "rewards", rewards)
    check.floating("remax", "greedy_rewards", greedy_rewards)
    check.shape("remax", "greedy_rewards", greedy_rewards, rewards.shape, "as rewards")
    wide = widest(rewards.device)
    rewards, greedy_rewards = finite("remax", "rewards", rewards), finite("remax", "greedy_rewards", greedy_rewards)
    difference = rewards.to(wide) - greedy_rewards.to(wide)
    return torch.where(difference.isnan(), 0.0, difference).to(answer(rewards, greedy_rewards))


def vapo_gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    *,
    alpha: float = 0.05,
    gamma: float = 1.0,
    lam_value: float = 1.0,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """GAE with one lambda for the critic and a length-dependent one for the policy: VAPO, arXiv:2504.05118.

    The returns are from `gae` with lam = lam_value. The advantages of a sequence of l valid tokens are from `gae` with
    lam = 1 - 1 / (alpha l), or 0 if alpha l < 1. The weights of the errors then add up to about alpha l for sequences
    of every length.

    Args:
        rewards, values, mask, gamma, cu_seqlens, backend: as `gae`.
        alpha: the paper uses 0.05.
        lam_value: the critic's lambda.

    Returns:
        advantages and returns, as `gae`.

    Raises:
        ValueError: alpha is not positive; else as `gae`.
    """
    check.require(alpha > 0, "vapo_gae", "alpha", "more than 0", alpha)
    shared = {"gamma": gamma, "backend": backend}
    _, returns = gae(rewards, values, mask, lam=lam_value, cu_seqlens=cu_seqlens, **shared)
    bounds = torch.arange(len(rewards) + 1, device=rewards.device) if cu_seqlens is None else cu_seqlens.long()
    valid = (mask != 0).long()
    valid = valid.sum(1) if valid.dim() == 2 else valid
    before = torch.cat((valid.new_zeros(1), valid.cumsum(0)))[bounds]
    lengths = before.diff()  # (S,)
    advantages = torch.zeros_like(returns)
    # `gae` takes one lambda, so the sequences of each length go through it separately; each token goes through once.
    position = torch.arange(len(rewards), device=rewards.device)
    sequence = torch.searchsorted(bounds, position, right=True) - 1
    inside = position < bounds[-1]
    for length in lengths[lengths > 0].unique().tolist():
        chosen = lengths == length
        rows = position[inside][chosen[sequence[inside]]]
        sizes = bounds.diff()[chosen]
        part = None if cu_seqlens is None else torch.cat((sizes.new_zeros(1), sizes.cumsum(0)))
        lam = max(0.0, 1.0 - 1.0 / (alpha * length))
        advantages[rows], _ = gae(rewards[rows], values[rows], mask[rows], lam=lam, cu_seqlens=part, **shared)
    return advantages, returns


def _check_lengths(op: str, lengths: torch.Tensor, rewards: torch.Tensor) -> None:
    check.integer(op, "lengths", lengths)
    check.shape(op, "lengths", lengths, rewards.shape, "as rewards")
    check.device(op, "lengths", lengths, rewards.device, "rewards")


def _indexed(rewards: torch.Tensor, group_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(which rewards are scorable, the groups numbered from 0, the number of groups)."""
    ids, group = group_ids.unique(return_inverse=True)
    return ~rewards.isnan(), group, len(ids)


def _largest(values: torch.Tensor, group: torch.Tensor, groups: int) -> torch.Tensor:
    """(groups,) the largest value in each group."""
    return values.new_full((groups,), -torch.inf).scatter_reduce(0, group, values, "amax")
