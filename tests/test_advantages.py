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
