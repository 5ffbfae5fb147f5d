"""The advantages floor against closed forms."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.testing import assert_close

from fastrl import advantages as adv
from fastrl.advantages import GroupAdvantage, discounted_returns, kl_in_reward, whiten
from fastrl.ops.gae import gae

NAN = float("nan")


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("preset", "want"),
    [
        (adv.GRPO, [-0.5 / math.sqrt(1 / 3)] * 2 + [0.5 / math.sqrt(1 / 3)] * 2 + [0] * 4),
        (adv.DR_GRPO, [-0.5, -0.5, 0.5, 0.5, 0, 0, 0, 0]),
        (adv.RLOO, [-2 / 3, -2 / 3, 2 / 3, 2 / 3, 0, 0, 0, 0]),
        (adv.SCALE_RL, [-0.5 / math.sqrt(1 / 7)] * 2 + [0.5 / math.sqrt(1 / 7)] * 2 + [0] * 4),
    ],
)
def test_presets_are_their_papers_estimators(preset, want):
    exact = dataclasses.replace(preset, eps=0.0)
    got = exact(f64(0, 0, 1, 1, 0.1, 0.1, 0.1, 0.1), group_size=4)
    assert_close(got, f64(*want), rtol=1e-14, atol=0)


def test_group_advantage_refuses_what_the_op_refuses():
    with pytest.raises(ValueError, match="GroupAdvantage: scale: expected 'batch' or 'none'"):
        GroupAdvantage("none", "group")
    with pytest.raises(ValueError, match=r"GroupAdvantage: baseline: .* Did you mean 'leave_one_out'"):
        GroupAdvantage("leave_one")


def test_whiten_has_mean_zero_and_unit_sample_deviation_over_valid_tokens():
    values, mask = f64([1, 2, NAN], [NAN, 6, 7]), torch.tensor([[1, 1, 0], [0, 1, 1]])
    got = whiten(values, mask, eps=0.0)
    std = math.sqrt((9 + 4 + 4 + 9) / 3)
    assert_close(got, f64([-3, -2, 0], [0, 2, 3]) / std, rtol=1e-14, atol=0)
    assert torch.equal(whiten(values.float(), mask, eps=0.0), got.float())
    assert_close(whiten(values, mask, eps=std), got / 2, rtol=1e-14, atol=0)


@pytest.mark.parametrize("valid", [7, 6, 3, 1, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whiten_of_equal_few_or_no_values_is_exactly_zero(valid, dtype):
    for value in (0.1, 1 / 3, 1e6 + 0.1):
        got = whiten(torch.full((7,), value, dtype=dtype), torch.arange(7) < valid, eps=0.0)
        assert torch.equal(got, torch.zeros(7, dtype=dtype))
    assert torch.equal(whiten(torch.zeros(0, 3), torch.zeros(0, 3)), torch.zeros(0, 3))


def test_whiten_shows_a_nan_on_a_valid_token():
    assert whiten(torch.tensor([NAN, 1.0, 2.0]), torch.ones(3))[1:].isnan().all()


def test_kl_in_reward_charges_each_token_and_scores_the_last_valid_one():
    logps, ref_logps = f64([-1, -2, -3, NAN], [-1, -1, NAN, -1]), f64([-1.5, -2, -2, NAN], [-2, -1, NAN, -3])
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 1]])
    got = kl_in_reward(f64(10, 20), logps, ref_logps, mask, 0.1)
    assert_close(got, f64([-0.05, 0, 10.1, 0], [-0.1, 0, 0, 19.8]), rtol=1e-14, atol=1e-16)
    packed = kl_in_reward(
        f64(10, 20),
        logps.flatten(),
        ref_logps.flatten(),
        mask.flatten(),
        0.1,
        torch.tensor([0, 4, 8], dtype=torch.int32),
    )
    assert torch.equal(packed, got.flatten())


def test_kl_in_reward_keeps_scores_inside_their_sequence():
    # Sequences: empty, [0, 2), [2, 4) without a valid token, and token 4 is padding.
    zeros, mask = torch.zeros(5), torch.tensor([1, 1, 0, 0, 1])
    got = kl_in_reward(torch.tensor([3.0, 5.0, 7.0]), zeros, zeros, mask, 1.0, torch.tensor([0, 0, 2, 4]))
    assert torch.equal(got, torch.tensor([0.0, 5.0, 0.0, 0.0, 0.0]))
    nothing = torch.zeros(0)
    assert torch.equal(
        kl_in_reward(torch.ones(2), nothing, nothing, nothing, 1.0, torch.zeros(3, dtype=torch.int64)), nothing
    )


def test_kl_in_reward_has_no_gradient():
    logps = torch.zeros(1, 2, requires_grad=True)
    assert not kl_in_reward(torch.ones(1), logps, torch.ones(1, 2), torch.ones(1, 2), 0.1).requires_grad


def test_kl_in_reward_refuses_scores_and_tokens_that_do_not_fit():
    tokens = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"rewards: expected shape \(2,\) one score per sequence, got \(3,\)"):
        kl_in_reward(torch.zeros(3), tokens, tokens, tokens, 0.1)
    with pytest.raises(ValueError, match=r"ref_logps: expected shape \(2, 3\) as logps"):
        kl_in_reward(torch.zeros(2), tokens, tokens[:, 1:], tokens, 0.1)
    with pytest.raises(ValueError, match=r"logps: expected shape \(B, T\), or \(N,\) with cu_seqlens"):
        kl_in_reward(torch.zeros(6), tokens.flatten(), tokens.flatten(), tokens.flatten(), 0.1)


def test_discounted_returns_are_the_reward_to_go_of_valid_tokens():
    rewards, mask = f64([1, 2, 0, 4], [0, 0, 8, 0]), torch.tensor([[1, 1, 0, 1], [1, 0, 1, 0]])
    got = discounted_returns(rewards, mask, gamma=0.5)
    assert torch.equal(got, f64([3, 4, 0, 4], [4, 0, 8, 0]))
    packed = discounted_returns(rewards.flatten(), mask.flatten(), gamma=0.5, cu_seqlens=torch.tensor([0, 4, 8]))
    assert torch.equal(packed, got.flatten())


def test_lam_one_makes_the_value_target_the_discounted_return():
    rewards, values = torch.randn(2, 3, 20, dtype=torch.float64)
    mask = torch.rand(3, 20) < 0.7
    _, returns = gae(rewards, values, mask, gamma=0.9, lam=1.0)
    assert_close(returns, discounted_returns(rewards, mask, gamma=0.9), rtol=1e-12, atol=1e-12)


# The other outcome estimators, on groups of unequal size whose ids come in no order: one group of one, one whose
# rewards are all equal, one that is unscorable, and unscorable members.
IDS = torch.tensor([7, -3, 7, 5, -3, 7, 9, -3, 11, 11, 7, 13, 13])
REWARDS = f64(1, 0.1, 0, 2, 0.1, 0.5, NAN, 0.1, 0.3, NAN, NAN, 4, -1)
LENGTHS = torch.tensor([3, 5, 1, 2, 0, 4, 6, 1, 2, 3, 9, 1, 3])
GROUPS = {7: [0, 2, 5], -3: [1, 4, 7], 5: [3], 9: [], 11: [8], 13: [11, 12]}  # scorable members
ZERO_ADVANTAGE = [1, 3, 4, 6, 7, 8, 9, 10]  # no difference to learn from

ESTIMATORS = {
    "opo": lambda r, ids, lengths: adv.opo(r, lengths, group_ids=ids),
    "max_rl": lambda r, ids, lengths: adv.max_rl(r, group_ids=ids),
    "pass_at_k": lambda r, ids, lengths: adv.pass_at_k(r, group_ids=ids),
    "gdpo": lambda r, ids, lengths: adv.gdpo(r[:, None], group_ids=ids),
    "reinforce_pp_baseline": lambda r, ids, lengths: adv.reinforce_pp_baseline(r, lengths, group_ids=ids),
}
each_estimator = pytest.mark.parametrize("name", ESTIMATORS)


@pytest.mark.parametrize("reward", [math.inf, -math.inf])
@pytest.mark.parametrize("name", [*ESTIMATORS, "group_advantages", "remax"])
def test_an_infinite_reward_is_refused_by_every_estimator(name, reward):
    others = {
        "group_advantages": lambda r, ids, lengths: adv.GRPO(r, group_ids=ids),
        "remax": lambda r, ids, lengths: adv.remax(torch.zeros_like(r), r),
    }
    rewards = REWARDS.clone()
    rewards[2] = reward
    with pytest.raises(
        ValueError, match=rf"{name}: (greedy_)?rewards: expected finite numbers, or NaN .*, got {reward}"
    ):
        (ESTIMATORS | others)[name](rewards, IDS, LENGTHS)


@each_estimator
def test_estimators_take_groups_in_any_order_and_leave_the_unscorable_at_zero(name):
    estimate = ESTIMATORS[name]
    got = estimate(REWARDS, IDS, LENGTHS)
    assert (got.dtype, got.isfinite().all().item()) == (torch.float64, True)
    assert (got[REWARDS.isnan()] == 0).all()
    if name != "reinforce_pp_baseline":  # which compares with the mean over all tokens
        assert (got[ZERO_ADVANTAGE] == 0).all()
    assert got[[0, 11]].gt(0).all()
    order = torch.randperm(len(IDS))
    shuffled = estimate(REWARDS[order], IDS[order], LENGTHS[order])
    assert_close(shuffled, got[order], rtol=1e-12, atol=1e-14)
    nothing_scored = estimate(torch.full_like(REWARDS, NAN), IDS, LENGTHS)
    assert torch.equal(nothing_scored, torch.zeros_like(got))
    empty = estimate(REWARDS[:0], IDS[:0], LENGTHS[:0])
    assert empty.shape == (0,)
    narrow = estimate(REWARDS.float(), IDS, LENGTHS)
    assert narrow.dtype == torch.float32
    assert_close(narrow.double(), got, rtol=1e-5, atol=1e-6)


@each_estimator
def test_estimators_have_no_gradient_and_refuse_groups_given_twice(name):
    rewards = REWARDS.clone().requires_grad_()
    assert not ESTIMATORS[name](rewards, IDS, LENGTHS).requires_grad
    with pytest.raises(ValueError, match=rf"{name}: group_ids: expected shape \(13,\) as rewards"):
        ESTIMATORS[name](REWARDS, IDS[1:], LENGTHS)


def test_opo_subtracts_the_length_weighted_mean_of_the_group():
    want = torch.zeros_like(REWARDS)
    for members in GROUPS.values():
        weight = LENGTHS[members].double()
        if weight.sum() > 0:
            want[members] = REWARDS[members] - (weight * REWARDS[members]).sum() / weight.sum()
    assert_close(adv.opo(REWARDS, LENGTHS, group_ids=IDS), want, rtol=1e-14, atol=1e-16)
    equal = torch.full_like(LENGTHS, 4)
    assert_close(adv.opo(REWARDS, equal, group_ids=IDS), adv.DR_GRPO(REWARDS, group_ids=IDS), rtol=1e-14, atol=1e-16)


def test_max_rl_divides_by_the_mean_and_gives_zero_where_that_is_not_positive():
    want = torch.zeros_like(REWARDS)
    for members in GROUPS.values():
        mean = REWARDS[members].mean()
        if mean > 0:
            want[members] = (REWARDS[members] - mean) / mean
    assert_close(adv.max_rl(REWARDS, group_ids=IDS), want, rtol=1e-14, atol=1e-15)
    assert torch.equal(adv.max_rl(f64(-1, -2, 0, 0, 1, -1), group_size=2), torch.zeros(6, dtype=torch.float64))


def test_max_rl_of_binary_rewards_credits_each_success_by_one_over_their_share():
    got = adv.max_rl(f64(1, 0, 0, 0), group_size=4)
    assert torch.equal(got, f64(3, -1, -1, -1))


def test_pass_at_k_credits_the_best_of_a_group_with_its_lead():
    got = adv.pass_at_k(f64(1, 5, 2, 3, 3, 0, NAN, 4), group_ids=torch.tensor([0, 0, 0, 1, 1, 1, 2, 2]), eps=0.0)
    assert_close(got, f64(0, 3 / math.sqrt(13 / 3), 0, 0, 0, 0, 0, 0), rtol=1e-14, atol=0)
    assert torch.equal(adv.pass_at_k(f64(1, 5, 2), group_size=3, scale="none"), f64(0, 3, 0))


def test_reinforce_pp_baseline_is_whitened_over_tokens_not_over_completions():
    centred = adv.DR_GRPO(REWARDS, group_ids=IDS)
    scored = ~REWARDS.isnan()
    tokens = centred[scored].repeat_interleave(LENGTHS[scored])
    want = torch.where(scored & (LENGTHS > 0), (centred - tokens.mean()) / tokens.std(), 0.0)
    got = adv.reinforce_pp_baseline(REWARDS, LENGTHS, group_ids=IDS, eps=0.0)
    assert_close(got, want, rtol=1e-12, atol=1e-14)
    equal = adv.reinforce_pp_baseline(f64(0, 1, 0, 3), torch.ones(4, dtype=torch.int64), group_size=2, eps=0.0)
    assert_close(equal, GroupAdvantage("mean", "batch", eps=0.0)(f64(0, 1, 0, 3), group_size=2), rtol=1e-14, atol=0)


def test_gdpo_is_trls_normalize_then_sum():
    """The lines of TRL 1.16's GRPOTrainer under multi_objective_aggregation="normalize_then_sum"."""
    from trl.trainer.utils import nanstd

    rewards, weights = torch.randn(12, 3, dtype=torch.float64), f64(1, 0.5, 2)
    rewards[1, 2] = rewards[6, 0] = NAN  # one reward does not apply
    rewards[3] = NAN  # none does
    rewards[8:, 1] = 0.25  # and one tells nothing apart
    grouped = rewards.view(-1, 4, 3)
    normal = (grouped - grouped.nanmean(1, keepdim=True)) / (nanstd(grouped, dim=1, keepdim=True) + 1e-4)
    total = (normal.view(-1, 3) * weights).nansum(1)
    total[3] = NAN
    want = ((total - total.nanmean()) / (nanstd(total) + 1e-4)).nan_to_num(nan=0.0)
    got = adv.gdpo(rewards, weights=weights, group_size=4, eps=1e-4)
    assert_close(got, want, rtol=1e-7, atol=1e-12)  # nanstd takes n / (n - 1) in float32


def test_gdpo_tells_apart_what_grpo_of_the_sum_does_not():
    """The example of arXiv:2601.05242: one reward met, or both, against a completion that meets none."""
    rewards = f64([0, 0], [0, 1], [0, 0], [1, 1])
    grpo = adv.GRPO(rewards.sum(1), group_size=2)
    assert_close(grpo[:2], grpo[2:], rtol=1e-5, atol=0)
    ours = adv.gdpo(rewards, group_size=2)
    assert_close(2 * ours[:2], ours[2:], rtol=1e-12, atol=0)
    assert ours[3] > ours[1] > 0
    one = adv.gdpo(rewards, weights=f64(0, 1), group_size=2)
    assert_close(one, adv.gdpo(rewards[:, 1:], group_size=2), rtol=1e-12, atol=0)


def test_gdpo_refuses_rewards_and_weights_that_do_not_fit():
    with pytest.raises(ValueError, match=r"gdpo: rewards: expected shape \(B, K\), got \(4,\)"):
        adv.gdpo(torch.zeros(4), group_size=2)
    with pytest.raises(ValueError, match=r"gdpo: weights: expected shape \(3,\) one per reward"):
        adv.gdpo(torch.zeros(4, 3), weights=torch.ones(2), group_size=2)


def test_remax_compares_with_the_greedy_completion():
    got = adv.remax(f64(1, 0, NAN, 2), f64(0.5, 0.5, 1, NAN))
    assert torch.equal(got, f64(0.5, -0.5, 0, 0))
    with pytest.raises(ValueError, match="remax: greedy_rewards: expected shape"):
        adv.remax(torch.zeros(4), torch.zeros(2))


def test_vapo_gae_takes_each_sequence_through_gae_with_the_lambda_of_its_length():
    rewards, values = torch.randn(2, 5, 9, dtype=torch.float64)
    mask = torch.arange(9) < torch.tensor([9, 3, 0, 3, 6])[:, None]
    mask[0, 4] = False  # a hole: eight valid tokens
    values[~mask] = NAN
    advantages, returns = adv.vapo_gae(rewards, values, mask, alpha=0.25, gamma=0.9, lam_value=0.97)
    assert torch.equal(returns, gae(rewards, values, mask, gamma=0.9, lam=0.97)[1])
    for row, length in enumerate((8, 3, 0, 3, 6)):
        lam = max(0.0, 1 - 1 / (0.25 * length)) if length else 0.0
        want, _ = gae(rewards[[row]], values[[row]], mask[[row]], gamma=0.9, lam=lam)
        assert torch.equal(advantages[[row]], want)
    bounds = torch.arange(6) * 9
    tail = [torch.cat((x.flatten(), x.new_ones(2))) for x in (rewards, values, mask)]
    packed = adv.vapo_gae(*tail, alpha=0.25, gamma=0.9, lam_value=0.97, cu_seqlens=bounds)
    for got, want in zip(packed, (advantages, returns), strict=True):
        assert torch.equal(got[:-2].view(5, 9), want)
        assert (got[-2:] == 0).all()
    assert [x.shape for x in adv.vapo_gae(*torch.zeros(3, 0, 4))] == [(0, 4), (0, 4)]
    with pytest.raises(ValueError, match="vapo_gae: alpha: expected more than 0, got 0"):
        adv.vapo_gae(rewards, values, mask, alpha=0)
