"""Credit by turn: each turn of a conversation gets the rewards that came from then on."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from statistics import fmean

import pytest
import torch
from rollout.test_turns import config_for
from trainer.test_resume import everything, run_until_crash

from fastrl.algorithms.group_policy_gradient import GroupPolicyGradient
from fastrl.data.pack import pack
from fastrl.ops.group_advantages import GroupAdvantage
from fastrl.progress import Unwatched
from fastrl.rewards.environment import environment, split_by_turn
from fastrl.spec import PolicyLoss
from fastrl.trainer.config import EnvironmentConfig, PPOConfig, RewardConfig
from fastrl.trainer.setup import prepare, train
from fastrl.types import Group, Prompt, Sample

BY_TURN = EnvironmentConfig("rollout.test_turn_credit:Uneven", turn_tokens=12, max_turns=3, credit="turn", discount=0.5)


class Uneven:
    """Ends with the turn that begins with an even word, or after three; a turn is worth its first word's number."""

    def reset(self, row):
        self.turn = 0

    def step(self, completion):
        self.turn += 1
        word = (completion.split() or ["w0"])[0]
        number = int(word[1:]) if word[1:].isdigit() else 0
        done = number % 2 == 0
        return [] if done else [{"role": "user", "content": "w1"}], number / 10, done


def conversation(*rewards, lengths=None):
    """A conversation whose turns have these rewards, with two tokens of the environment between them."""
    own, ends = [], []
    for turn in range(len(rewards)):
        own += ([False] * 2 if turn else []) + [True] * (lengths[turn] if lengths else 1)
        ends.append(len(own))
    logps = [-1.0 if one else 0.0 for one in own]
    return Sample([1] * len(own), logps, True, reward=sum(rewards), own=own, turn_ends=ends, turn_rewards=list(rewards))


def credited(*samples, discount=1.0, estimator=None):
    algorithm = GroupPolicyGradient(PolicyLoss(), estimator or GroupAdvantage("mean", "none"), turn_discount=discount)
    groups = [Group(Prompt(0, "", (1,)), list(samples))]
    algorithm.advantages(groups)
    return algorithm, groups


def test_a_turn_is_compared_with_the_same_turn_of_the_others_by_what_came_from_then_on():
    samples = conversation(1.0, 0.0), conversation(0.0, 1.0), conversation(0.0)
    credited(*samples, discount=0.5)
    # Returns: (1, 0), (0.5, 1), (0); means 0.5 in both turns.
    assert [one.turn_advantages for one in samples] == [[0.5, -0.5], [0.0, 0.5], [-0.5]]
    assert [one.advantage for one in samples] == [0.5, 0.0, -0.5]


def test_without_rewards_before_the_end_the_first_turn_has_the_advantage_of_the_completion():
    samples = conversation(0.0, 1.0), conversation(0.0, 0.0, 0.5), conversation(0.0)
    credited(*samples, estimator=GroupAdvantage())
    plain = GroupAdvantage()(torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64), group_size=3)
    assert [one.advantage for one in samples] == pytest.approx(plain.tolist())


def test_a_turn_that_only_one_conversation_has_and_one_that_was_not_scored_get_none():
    lost = conversation(0.0, 5.0)
    lost.reward = lost.turn_rewards = None
    samples = conversation(1.0, 1.0), conversation(0.0), lost
    credited(*samples)
    assert [one.turn_advantages for one in samples] == [[1.0, 0.0], [-1.0], [0.0]]


def test_a_group_of_equal_sums_whose_turns_differ_is_trained_on():
    algorithm, groups = credited(conversation(1.0, 0.0), conversation(0.0, 1.0))
    assert algorithm.contributing(groups) == groups
    assert [one.advantage for one in groups[0].samples] == [0.0, 0.0]


def test_the_expected_gradient_of_taking_another_turn_has_no_bias():
    """Over all pairs of conversations: one may stop after the first turn, or go on to a second with its own choice.

    Baselines of each turn's own reward, added up over the turns taken, would have a bias here.
    """
    logit = torch.tensor([0.3, -0.4], dtype=torch.float64, requires_grad=True)  # of going on, of the good second turn
    go, good = torch.sigmoid(logit)
    paths = [  # (probability, rewards, went on)
        (1 - go, (0.7,), 0.0),
        (go * good, (0.2, 1.0), 1.0),
        (go * (1 - good), (0.2, 0.1), 1.0),
    ]
    value = sum(p * sum(rewards) for p, rewards, _ in paths)
    (wanted,) = torch.autograd.grad(value, logit, retain_graph=True)

    def expected(advantage):
        total = 0.0
        for pair in product(paths, repeat=2):
            chance = float((pair[0][0] * pair[1][0]).detach())
            for (_, _, went), one in zip(pair, advantage(pair), strict=True):
                total += chance * one * (went - float(go.detach())) / 2
        return total

    def ours(pair):
        samples = [conversation(*rewards) for _, rewards, _ in pair]
        credited(*samples, estimator=GroupAdvantage("leave_one_out", "none"))
        return [one.turn_advantages[0] for one in samples]

    def added_up(pair):
        rewards = [rewards for _, rewards, _ in pair]
        turns = [[one[k] for one in rewards if k < len(one)] for k in range(2)]
        means = [sum(of) / max(len(of), 1) for of in turns]
        return [2 * sum(reward - means[k] for k, reward in enumerate(one)) for one in rewards]

    assert expected(ours) == pytest.approx(float(wanted[0]), rel=1e-9)
    assert abs(expected(added_up) - float(wanted[0])) > 0.05


@pytest.mark.parametrize("layout", ["padded", "shared", "varlen"])
def test_every_token_of_a_turn_has_the_advantage_of_its_turn_in_every_layout(layout):
    samples = conversation(1.0, 0.0, lengths=(3, 2)), conversation(0.0, 1.0, lengths=(1, 4)), conversation(0.5)
    _, groups = credited(*samples, discount=0.5)
    for micro in pack(groups, layout=layout, max_tokens=64):
        parts = zip(micro.samples, micro.advantages.split(micro.cu_seqlens.diff().tolist()), strict=True)
        for sample, found in parts:
            wanted = [
                sample.turn_advantages[sum(place >= end for end in sample.turn_ends)]
                for place in range(len(sample.token_ids))
            ]
            assert found.tolist() == pytest.approx(wanted)


def test_a_conversation_cut_in_its_first_turn_has_earned_nothing_and_one_without_rewards_is_not_scored():
    assert environment([""] * 4, turn_rewards=[[], [None], [None, 1.0], [0.5, 1.0]]) == [0.0, None, 1.0, 1.5]


def test_the_shares_of_the_turns_add_up_to_the_reward():
    sample = Sample([1] * 9, [0.0] * 9, False, reward=3.25, turn_ends=[2, 5, 9])
    sample.extra["turn_rewards"] = [0.5, None]  # the third turn was cut, and not shown to the environment
    assert split_by_turn(sample, 2.0) == [1.0, 0.0, 2.25]
    sample.extra["turn_rewards"] = [0.5, None, 1.0]
    assert split_by_turn(sample, 2.0) == [1.0, 0.0, 2.25]
    assert split_by_turn(sample, 0.0) == [0.0, 0.0, 3.25]


def test_conversations_of_a_run_come_with_the_shares_of_their_turns(tmp_path):
    rewards = (RewardConfig("environment", 2.0), RewardConfig("rollout.test_turn_credit:half"))
    run = prepare(config_for(tmp_path, environment=BY_TURN, rewards=rewards))
    samples = [s for group in run.source.next(run.learner, Unwatched()).groups for s in group.samples]
    assert {len(sample.turn_ends) for sample in samples} >= {1, 2, 3}
    for sample in samples:
        given = [2.0 * (reward or 0.0) for reward in sample.extra["turn_rewards"]]
        assert sample.turn_ends[-1] == len(sample.token_ids)
        assert all(sample.own[end - 1] for end in sample.turn_ends)
        assert sum(sample.turn_rewards) == pytest.approx(sample.reward)
        assert sample.turn_rewards[:-1] == pytest.approx(given[: len(sample.turn_ends) - 1])


def half(completions, **_):
    return [0.5] * len(completions)


def test_ppo_has_the_rewards_at_the_ends_of_their_turns(tmp_path):
    """Without critic, KL and whitening, a token's advantage is the sum of the rewards from its turn on."""
    ppo = PPOConfig(critic="none", kl_coef=0.0, whiten=False)
    run = prepare(config_for(tmp_path, algorithm="ppo", ppo=ppo, environment=replace(BY_TURN, discount=1.0)))
    batch = run.source.next(run.learner, Unwatched())
    (part,) = run.algorithm.updates(run.learner, batch, Unwatched())
    several = 0
    for micro in part.batches:
        for sample, found in zip(micro.samples, micro.advantages.split(micro.cu_seqlens.diff().tolist()), strict=True):
            several += len(sample.turn_ends) > 1
            for place, own in enumerate(sample.own):
                turn = sum(place >= end for end in sample.turn_ends)
                wanted = sum(sample.turn_rewards[turn:]) if own else 0.0
                assert float(found[place]) == pytest.approx(wanted, abs=1e-6)
    assert several > 0


@pytest.mark.parametrize("algorithm", ["grpo", "scale_rl", "gspo_token"])
def test_a_run_with_credit_by_turn_is_resumed_bit_for_bit(tmp_path, algorithm, monkeypatch):
    monkeypatch.setattr("fastrl.monitor.report.charts", lambda run: [])
    changes = {"algorithm": algorithm, "environment": BY_TURN, "save_every": 5, "linear": "torch"}
    config = config_for(tmp_path, run_dir=str(tmp_path / "whole"), **changes)
    assert train(config).status == "finished"
    stopped = replace(config, run_dir=str(tmp_path / "stopped"))
    run_until_crash(stopped, 7)
    train(replace(stopped, resume=stopped.run_dir))
    assert everything(tmp_path / "stopped") == everything(tmp_path / "whole")


def test_credit_by_turn_learns_what_a_turn_is_worth(tmp_path, monkeypatch):
    """The first word of a turn decides its reward and whether there is another turn; the best is w9, three times."""
    monkeypatch.setattr("fastrl.monitor.report.charts", lambda run: [])
    rewards = (RewardConfig("environment"),)
    train(config_for(tmp_path, environment=replace(BY_TURN, discount=1.0), rewards=rewards, steps=30))
    lines = [json.loads(line)["reward"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert fmean(lines[-3:]) > fmean(lines[:3]) + 0.3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "gspo"}, "ratio per sequence"),
        ({"algorithm": "gmpo"}, "ratio per sequence"),
        ({"algorithm": "vespo"}, "ratio per sequence"),
        ({"algorithm": "remax"}, "more than rewards and groups"),
        ({"algorithm": "opo"}, "more than rewards and groups"),
        ({"algorithm": "ppo"}, "environment.discount: expected 1 with ppo"),
        ({"masks": {"off_policy": 0.1}}, "masks.off_policy: expected null where advantages differ"),
        ({"rollout": {"dynamic_sampling": 2}}, "0 with environment.credit: turn"),
        ({"rewards": (RewardConfig("rollout.test_turn_credit:half"),)}, "without the reward `environment`"),
        ({"environment": replace(BY_TURN, credit="completion")}, "environment.discount: expected 1 without"),
        ({"environment": replace(BY_TURN, discount=1.5)}, "a number from 0 to 1"),
    ],
)
def test_credit_by_turn_that_cannot_be_given_is_refused(tmp_path, changes, message):
    config = config_for(tmp_path, environment=BY_TURN)
    for name, value in changes.items():
        changes[name] = replace(getattr(config, name), **value) if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=message):
        prepare(replace(config, **changes))
