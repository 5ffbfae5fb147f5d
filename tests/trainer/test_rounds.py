"""Rounds: what is sampled, chosen and trained on, what is kept on disk, and how a run goes on."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace

import pytest
import torch
from trainer.tiny import tiny_config

from fastrl.progress import Unwatched
from fastrl.rewards.judge import JudgeReward
from fastrl.sources.choose import above, best_and_worst, quantile
from fastrl.sources.rounds import _read
from fastrl.trainer.config import EvalConfig, RewardConfig, RoundsConfig, TrainConfig
from fastrl.trainer.setup import prepare, train
from fastrl.types import Group, Prompt, Sample

FEW = RoundsConfig(prompts=6, steps=2)


def rounds_config(tmp_path, algorithm="dpo", rounds=FEW, **changes):
    return tiny_config(
        tmp_path, algorithm=algorithm, source="rounds", rounds=rounds, rows_per_step=3, **{"steps": 4} | changes
    )


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def group(*rewards, ids=None):
    samples = [
        Sample([number if ids is None else ids[number]], [0.0], True, reward=r) for number, r in enumerate(rewards)
    ]
    return Group(Prompt(0, "q", (1,)), samples)


# What is chosen


def test_a_pair_is_the_best_and_the_worst_and_ties_are_left_out():
    groups = [group(0.5, 2.0, None, -1.0), group(1.0, 1.0), group(None, None), group(None, 3.0), group()]
    (pair,) = best_and_worst(groups)
    assert [(one.reward, one.advantage) for one in pair.samples] == [(2.0, 1.0), (-1.0, -1.0)]
    assert groups[0].samples[1].advantage == 0.0  # a copy


def test_completions_of_the_same_tokens_are_no_pair_whatever_a_judge_scored_them():
    assert best_and_worst([group(1.0, 2.0, ids=[7, 7])]) == []


def test_a_threshold_must_be_exceeded_and_a_quantile_reached():
    """ReST, arXiv:2308.08998 section 3: F(x, y; tau) = 1[R(x, y) > tau]."""
    groups = [group(0.0, 0.7, None), group(0.8, 0.95, 1.0, 0.99)]
    kept = [[row.samples[0].reward for row in above(groups, tau)] for tau in (0.0, 0.7, 0.8, 0.9, 0.95, 0.99)]
    assert list(map(len, kept)) == [5, 4, 3, 3, 2, 1]
    assert kept[-1] == [1.0]
    for share, number in ((0.0, 6), (0.5, 4), (0.9, 1), (1.0, 1)):
        assert len(above(groups, quantile(groups, share), reaches=True)) == number


def test_at_most_so_many_completions_of_a_prompt_are_kept_the_best_first():
    """ReST-EM, arXiv:2312.06585, keeps at most 10 per problem."""
    rows = above([group(*[1.0] * 16), group(0.0, 1.0), group(0.6, 0.9, 0.7)], 0.5, most=10)
    assert len(rows) == 10 + 1 + 3
    assert [row.samples[0].token_ids for row in rows[:10]] == [[number] for number in range(10)]
    assert [row.samples[0].reward for row in above([group(0.6, 0.9, 0.7)], 0.5, most=2)] == [0.9, 0.7]


# A run


def test_a_round_samples_once_and_its_reference_is_the_policy_of_its_start(tmp_path):
    outcome = train(rounds_config(tmp_path))
    assert outcome.status == "finished"
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert [(line["round"], line["improve"]) for line in metrics] == [(1, 1), (1, 1), (2, 1), (2, 1)]
    log_2 = torch.log(torch.tensor(2.0)).item()
    for line, begins in zip(metrics, (True, False, True, False), strict=True):  # -log sigma(0) where nothing moved yet
        assert (line["loss"] == pytest.approx(log_2, abs=1e-5)) == begins
    for number in (1, 2):
        folder = tmp_path / "run" / "rounds" / f"round_{number}"
        assert sorted(path.name for path in folder.iterdir()) == [
            "chosen_1.jsonl",
            "part_0001.jsonl",
            "part_0002.jsonl",
        ]
        groups = [one for path in sorted(folder.glob("part_*")) for one in _read(path)]
        assert [len(one.samples) for one in groups] == [4] * 6
        chosen = _read(folder / "chosen_1.jsonl")
        expected = best_and_worst(groups)
        assert [[one.token_ids for one in pair.samples] for pair in chosen] == [
            [one.token_ids for one in pair.samples] for pair in expected
        ]
        assert all(one.versions is None for pair in chosen for one in pair.samples)  # no alarm of a late sampler
        assert all(len(one.ref_logps) == len(one.token_ids) for pair in chosen for one in pair.samples)


def test_improves_go_through_the_thresholds_and_a_threshold_that_nothing_passes_is_said(tmp_path):
    rounds = RoundsConfig(prompts=6, thresholds=(-1.0, 0.0, 5.0), steps=1)
    assert train(rounds_config(tmp_path, "sft", rounds)).status == "finished"
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert [(line["round"], line["improve"]) for line in metrics] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert metrics[0]["round/rows"] == 24 > metrics[1]["round/rows"] > 0
    (told,) = [line["message"] for line in lines(tmp_path / "run" / "warnings.jsonl")]
    assert told.startswith("Round 1: no completion scores more than 5; the best of 24 is ")


def test_rounds_that_give_nothing_to_learn_from_end_the_run_and_say_so(tmp_path):
    rewards = (RewardConfig("trainer.tiny:always_one"),)
    outcome = train(rounds_config(tmp_path, rewards=rewards))
    assert (outcome.status, outcome.steps) == ("rewards failed", 0)
    told = [line["message"] for line in lines(tmp_path / "run" / "warnings.jsonl")]
    assert told[-1].startswith(
        "Step 1: 3 rounds in a row gave nothing to learn from: no group of 6 has two completions"
    )


def test_epochs_make_as_many_steps_as_the_rows_need(tmp_path):
    rounds = RoundsConfig(prompts=6, thresholds=(-1.0,), epochs=2)
    train(replace(rounds_config(tmp_path, "sft", rounds, steps=11), rows_per_step=5))
    steps = [line["round"] for line in lines(tmp_path / "run" / "metrics.jsonl")]
    assert steps == [1] * 10 + [2]  # 2 passes over 24 rows, 5 at a time


def test_a_restart_trains_every_round_from_the_first_weights(tmp_path):
    rounds = RoundsConfig(prompts=6, thresholds=(-1.0,), steps=2, restart=True)
    run = prepare(rounds_config(tmp_path, "sft", rounds))
    first = torch.cat([one.detach().flatten().clone() for one in run.learner.policy.model.parameters()])
    seen, original = [], run.learner.step

    def step(algorithm, update, progress):
        weights = torch.cat([one.detach().flatten() for one in run.learner.policy.model.parameters()])
        seen.append((bool((weights == first).all()), run.learner.updates))
        return original(algorithm, update, progress)

    run.learner.step = step
    run.train()
    assert seen == [(True, 0), (False, 1), (True, 0), (False, 1)]
    rewards = [line["round/reward"] for line in lines(tmp_path / "run" / "metrics.jsonl")]
    assert rewards[0] != rewards[2]  # sampled with the trained weights


# Going on


@pytest.mark.parametrize(
    ("algorithm", "restart", "stopped"), [("dpo", False, 1), ("dpo", False, 2), ("sft", False, 3), ("sft", True, 5)]
)
def test_a_run_that_stopped_inside_a_round_goes_on_bit_for_bit(tmp_path, algorithm, restart, stopped):
    rounds = FEW if algorithm == "dpo" else RoundsConfig(prompts=6, thresholds=(-1.0, 0.0), steps=2, restart=restart)
    config = rounds_config(tmp_path, algorithm, rounds, steps=6, save_every=stopped, keep_last=9)
    config = replace(config, linear="native")
    train(config)
    whole = lines(tmp_path / "run" / "metrics.jsonl")
    where = tmp_path / "run" / "checkpoints" / f"step_{stopped:06d}"
    sampled = {path: path.read_bytes() for path in (tmp_path / "run" / "rounds").rglob("*.jsonl")}
    train(replace(config, resume=str(where)))
    timed = lambda line: {k: v for k, v in line.items() if "time" not in k and k != "tokens_per_second"}  # noqa: E731
    assert list(map(timed, lines(tmp_path / "run" / "metrics.jsonl"))) == list(map(timed, whole))
    assert {path: path.read_bytes() for path in sampled} == sampled


CALLS = []


def fails_once(completions, **_):
    """Fails on the third batch."""
    CALLS.append(len(completions))
    if 3 <= len(CALLS) <= 3 + 16:  # and where it is asked again about each of the 16 completions alone
        raise ConnectionError("the judge is down")
    return [float(len(text.split())) for text in completions]


def test_what_was_sampled_before_a_judge_failed_is_not_sampled_again(tmp_path):
    calls = importlib.import_module("trainer.test_rounds").CALLS  # of the module that the recipe names
    calls.clear()
    rounds, rewards = RoundsConfig(prompts=12, steps=2), (RewardConfig("trainer.test_rounds:fails_once"),)
    config = rounds_config(tmp_path, rounds=rounds, rewards=rewards, steps=2)
    config = replace(config, task=replace(config.task, held_out=0))
    outcome = train(config)
    assert (outcome.status, outcome.steps) == ("rewards failed", 0)
    folder = tmp_path / "run" / "rounds" / "round_1"
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(kept) == ["part_0001.jsonl", "part_0002.jsonl"]
    calls[:] = [0] * 99
    assert train(replace(config, resume=str(tmp_path / "run"))).status == "finished"
    assert calls[99:] == [16]  # the third part alone
    assert {name: (folder / name).read_bytes() for name in kept} == kept


def test_a_round_on_disk_that_was_changed_is_refused_by_name(tmp_path):
    run = prepare(rounds_config(tmp_path))
    folder = tmp_path / "other"
    run.source.folder = lambda: folder
    run.learner.begin()
    run.source.next(run.learner, Unwatched())
    again = prepare(rounds_config(tmp_path, seed=5))
    again.source.folder = lambda: folder
    with pytest.raises(ValueError, match=r"part_0001.jsonl: expected the prompts of this round, got others"):
        again.source.next(again.learner, Unwatched())
    path = folder / "round_1" / "part_0001.jsonl"
    path.write_text(path.read_text()[:-20])
    again = prepare(rounds_config(tmp_path))
    again.source.folder = lambda: folder
    with pytest.raises(ValueError, match=r"part_0001.jsonl: expected a file of groups, got one that cannot be read"):
        again.source.next(again.learner, Unwatched())


# The model as its own judge


def test_the_policy_judges_itself_with_the_weights_it_has_now(tmp_path):
    judge = RewardConfig("judge", options={"model": "policy", "how": "direct", "highest": 2, "canary": "off"})
    watched = RewardConfig("trainer.tiny:wanted_words", weight=0.0)
    config = rounds_config(tmp_path, rewards=(judge, watched), max_tokens_per_microbatch=64, eval=EvalConfig(samples=1))
    run = prepare(config)
    (found,) = [func for func in run.source.rewards.funcs if isinstance(func, JudgeReward)]
    assert found._judge.model.policy is run.learner.policy
    assert found(["w1"], ["w2"]) == [None]  # 1 and 2 are both the unknown word for this tokenizer
    assert found(["w1 " * 60], ["w2"]) == [None]  # longer than its positions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "grpo"}, "source: expected rollouts or offline for grpo, got rounds"),
        ({"algorithm": "kto"}, "source: expected rollouts or offline for kto, got rounds"),
        ({"algorithm": "reward_model"}, "source: expected rollouts or offline for reward_model"),
        ({"source": "rollouts"}, "rounds: expected its defaults with source: rollouts"),
        (
            {"algorithm": "dpo", "rounds": RoundsConfig(thresholds=(1.0,))},
            "rounds.thresholds: expected left out for dpo",
        ),
        ({"rounds": RoundsConfig(thresholds=(0.5, 0.5))}, "rounds.thresholds: expected one finite number or more"),
        ({"rounds": RoundsConfig(thresholds=())}, "rounds.thresholds: expected one finite number or more"),
        ({"rounds": RoundsConfig(thresholds=(5.0,), quantiles=True)}, "rounds.thresholds: expected shares from 0 to 1"),
        ({"rounds": RoundsConfig(prompts=0)}, "rounds.prompts: expected at least 1, got 0"),
    ],
)
def test_rounds_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^TrainConfig: {message}"):
        TrainConfig(**{"algorithm": "sft", "source": "rounds", "rounds": RoundsConfig(epochs=2)} | changes)


def test_pairs_that_would_not_fit_a_micro_batch_are_refused_before_anything_is_sampled(tmp_path):
    with pytest.raises(ValueError, match="max_tokens_per_microbatch: expected at least 15, the longest prompt and two"):
        prepare(rounds_config(tmp_path, max_tokens_per_microbatch=14))
