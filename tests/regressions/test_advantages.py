"""Advantage bugs that hit others, each with the numbers that show it."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from fastrl.advantages import GRPO, discounted_returns, kl_in_reward, whiten
from fastrl.ops.gae import gae
from fastrl.ops.group_advantages import group_advantages

NAN = float("nan")


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_partial_groups_do_not_mix_prompts(backend):
    """Groups of 4, 3 and 4 cut by a fixed stride: https://github.com/areal-project/AReaL/issues/1419"""
    rewards = f64(0, 0, 1, 1, 5, 5, 8, 100, 100, 100, 104)
    ids = torch.tensor([0] * 4 + [1] * 3 + [2] * 4)
    got = group_advantages(rewards, group_ids=ids, scale="none", backend=backend)
    assert torch.equal(got, f64(-0.5, -0.5, 0.5, 0.5, -1, -1, 2, -1, -1, -1, 3))
    with pytest.raises(ValueError, match="Pass group_ids for groups of unequal size"):
        group_advantages(rewards, group_size=4, backend=backend)


def test_interleaved_prompts_get_the_advantages_of_sorted_ones(backend):
    """P1 P2 P1 P2 read as consecutive groups: https://github.com/StarsfieldAI/R1-V/issues/67"""
    rewards, ids = f64(0, 10, 1, 14), torch.tensor([1, 2, 1, 2])
    want = f64(-0.5, -2, 0.5, 2) / f64(math.sqrt(0.5), math.sqrt(8), math.sqrt(0.5), math.sqrt(8))
    for order in ([0, 1, 2, 3], [0, 2, 1, 3], [3, 1, 2, 0]):
        got = group_advantages(rewards[order], group_ids=ids[order], eps=0.0, backend=backend)
        assert_close(got, want[order], rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_rewards_give_no_advantage_that_a_filter_could_miss(backend, dtype):
    """0.1 eight times has a float spread above zero: https://github.com/NVIDIA-NeMo/RL/pull/4158"""
    constant, mixed = [0.1] * 8, [0.1] * 7 + [0.2]
    got = group_advantages(torch.tensor(constant + mixed, dtype=dtype), group_size=8, eps=0.0, backend=backend)
    assert (got.view(2, 8) != 0).any(1).tolist() == [False, True]
    assert got[:8].abs().max() == 0


def test_advantages_are_normalised_once_with_n_minus_one(backend):
    """Normalised by the estimator and by the trainer again: https://github.com/axon-rl/gem/pull/113"""
    eps, std = 1e-6, math.sqrt(1 / 3)
    got = group_advantages(f64(0, 0, 1, 1), group_size=4, eps=eps, backend=backend)
    assert_close(got, f64(-0.5, -0.5, 0.5, 0.5) / (std + eps), rtol=1e-14, atol=0)
    assert got.std() < 1  # eps is in there once; a second normalisation would lift it to 1 again
    assert_close(got.std(), torch.tensor(std / (std + eps), dtype=torch.float64), rtol=1e-14, atol=0)


def test_a_group_of_one_is_zero_and_not_nan(backend):
    """A sample deviation of one number is NaN: https://github.com/axon-rl/gem/pull/113"""
    for baseline in ("mean", "leave_one_out"):
        for scale in ("group", "batch", "none"):
            got = group_advantages(f64(3, 4), group_size=1, baseline=baseline, scale=scale, backend=backend)
            assert torch.equal(got, f64(0, 0))


@pytest.mark.parametrize("masked_value", [100.0, NAN])
def test_a_masked_value_does_not_leak_into_the_token_before_it(backend, masked_value):
    """5.70 instead of 0.95: https://github.com/alibaba/ROLL/pull/447; the same in https://github.com/verl-project/verl/pull/50"""
    got, returns = gae(f64([0, 1, 0]), f64([0, 0, masked_value]), torch.tensor([[1, 1, 0]]), backend=backend)
    assert torch.equal(got, f64([0.95, 1.0, 0.0]))
    assert torch.equal(returns, f64([0.95, 1.0, 0.0]))


def test_observations_between_turns_cost_no_discount(backend):
    """Decay and value deltas of tool tokens entered the recursion: https://github.com/verl-project/verl/pull/2337"""
    turns = gae(f64([0, 0, 0, 1]), f64([0.5, 9, 9, 0.25]), torch.tensor([[1, 0, 0, 1]]), gamma=0.9, backend=backend)
    joined = gae(f64([0, 1]), f64([0.5, 0.25]), torch.ones(1, 2), gamma=0.9, backend=backend)
    for gap, whole in zip(turns, joined, strict=True):
        assert torch.equal(gap[:, [0, 3]], whole)
        assert torch.equal(gap[:, 1:3], torch.zeros(1, 2, dtype=torch.float64))


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_a_terminal_reward_on_a_masked_tool_token_is_kept_whole(backend, gamma):
    """Attenuated by the gap, and lost with gamma 0: https://github.com/radixark/miles/pull/1827"""
    got, _ = gae(f64([0, 0, 0, 1]), torch.zeros(1, 4), torch.tensor([[1, 1, 0, 0]]), gamma=gamma, backend=backend)
    assert torch.equal(got, f64([gamma * 0.95, 1.0, 0.0, 0.0]))


def test_padding_does_not_change_returns(backend):
    """Rewards-to-go accumulated over pads: https://github.com/huggingface/trl/pull/7024"""
    rewards, values = torch.randn(2, 1, 6)
    bare = gae(rewards, values, torch.ones(1, 6), backend=backend)
    right, left = (
        gae(*(torch.cat(parts[::step], 1) for parts in sides), backend=backend)
        for step in (1, -1)
        for sides in [
            ((rewards, torch.zeros(1, 3)), (values, torch.full((1, 3), 9.0)), (torch.ones(1, 6), torch.zeros(1, 3)))
        ]
    )
    for got, side in ((right, slice(0, 6)), (left, slice(3, 9))):
        for padded, plain in zip(got, bare, strict=True):
            assert torch.equal(padded[:, side], plain)
            assert padded.count_nonzero() == plain.count_nonzero()


def test_an_advantage_is_of_the_return_and_not_of_the_reward():
    """The advantage used rewards in place of returns: https://github.com/natolambert/rlhf-book/pull/216"""
    rewards = f64([0, 0, 1])
    assert torch.equal(discounted_returns(rewards, torch.ones(1, 3), gamma=0.5), f64([0.25, 0.5, 1]))
    assert torch.equal(gae(rewards, torch.zeros(1, 3), torch.ones(1, 3), gamma=0.5, lam=1.0)[1], f64([0.25, 0.5, 1]))


def test_pads_enter_neither_the_kl_nor_the_statistics():
    """A KL averaged over pads: https://github.com/natolambert/rlhf-book/pull/216"""
    mask = torch.tensor([[1, 1, 0, 0]])
    kl = kl_in_reward(f64(0), f64([-1, -2, -50, NAN]), f64([-2, -4, -1, -1]), mask, 1.0)
    assert torch.equal(kl, f64([-1, -2, 0, 0]))
    assert_close(whiten(kl, mask, eps=0.0), f64([1, -1, 0, 0]) / math.sqrt(2), rtol=1e-14, atol=0)


def test_grpo_preset_leaves_out_what_could_not_be_scored():
    """An unscorable completion is no failed one: its NaN moves no other advantage."""
    got = GRPO(f64(0, 1, NAN, 1), group_size=4)
    assert torch.equal(got[[0, 1, 3]], GRPO(f64(0, 1, 1), group_size=3))
    assert got[2] == 0
