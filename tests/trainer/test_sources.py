"""Any algorithm on any source; and that a new source needs no change of the loop."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from trainer.tiny import offline_config, tiny_config, write_model

from fastrl.algorithms import ALGORITHMS
from fastrl.algorithms.offline import comparisons, objective_of
from fastrl.data.groups import batch_from_json, batch_to_json
from fastrl.data.pack import count, pack
from fastrl.model.load import load_model
from fastrl.model.policy import Policy
from fastrl.progress import Unwatched
from fastrl.rewards import RewardSuite
from fastrl.sources import Rollouts
from fastrl.sources.collect import Judge, pass_at_k
from fastrl.trainer import checkpoint
from fastrl.trainer.build import build_algorithm
from fastrl.trainer.config import (
    DataConfig,
    EvalConfig,
    OptimizerConfig,
    RewardConfig,
    RolloutConfig,
    TrainConfig,
)
from fastrl.trainer.setup import prepare, train
from fastrl.types import Batch, Group, Prompt, Sample


@pytest.fixture(autouse=True)
def _report_without_pictures(monkeypatch):
    """They would take half of the time."""
    monkeypatch.setattr("fastrl.monitor.report.charts", lambda run: [])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# Any algorithm on any source


@pytest.mark.parametrize(
    ("algorithm", "steps", "lr"), [("dpo", 25, 1e-2), ("simpo", 25, 1e-2), ("sft", 25, 1e-2), ("kto", 25, 1e-2)]
)
def test_losses_on_answers_learn_from_fresh_completions(tmp_path, algorithm, steps, lr):
    rollout = RolloutConfig(prompts_per_step=6, group_size=6, max_new_tokens=6, threshold=0.2)
    optimizer = OptimizerConfig(lr=lr)
    config = tiny_config(
        tmp_path, algorithm=algorithm, source="rollouts", steps=steps, rollout=rollout, optimizer=optimizer
    )
    outcome = train(config)
    assert outcome.status == "finished"
    assert outcome.after["sampled"] > outcome.before["sampled"] + 0.2
    line = lines(tmp_path / "run" / "metrics.jsonl")[0]
    assert {"reward", "loss", "groups/contributing"} <= line.keys()


def test_a_pair_is_the_best_and_the_worst_of_a_group_and_equal_rewards_are_none(tmp_path):
    def group(index, *rewards):
        return Group(Prompt(index, "", (1,)), [Sample([2 + i], [0.0], True, reward=r) for i, r in enumerate(rewards)])

    groups = [group(0, 0.5, 1.0, None, 0.0), group(1, 1.0, 1.0), group(2, None, 3.0)]
    batch = Batch(groups, seed=1)
    (pair,) = objective_of(ALGORITHMS["dpo"].spec).chosen(batch)
    assert [sample.token_ids for sample in pair.samples] == [[3], [5]]
    assert [sample.advantage for sample in pair.samples] == [1.0, -1.0]
    assert batch.contributing == groups[:1]
    shown = objective_of(ALGORITHMS["sft"].spec, threshold=1.0).chosen(Batch(groups, seed=1))
    assert [[sample.reward for sample in one.samples] for one in shown] == [[1.0], [1.0], [1.0], [3.0]]
    labelled = objective_of(ALGORITHMS["kto"].spec, threshold=1.0).chosen(Batch(groups, seed=1))
    assert [one.samples[0].advantage for one in labelled] == [-1.0, 1.0, -1.0, 1.0, 1.0, 1.0]


def test_a_step_whose_groups_make_no_pair_changes_nothing_and_is_logged(tmp_path):
    rollout, rewards = RolloutConfig(2, 2, max_new_tokens=3), (RewardConfig("trainer.test_sources:indifferent"),)
    config = tiny_config(tmp_path, algorithm="dpo", source="rollouts", steps=2, rollout=rollout, rewards=rewards)
    assert train(config).status == "finished"
    for line in lines(tmp_path / "run" / "metrics.jsonl"):
        assert line["groups/contributing"] == 0.0
        assert "loss" not in line


def indifferent(completions, **_):
    """Nobody is better."""
    return [0.5] * len(completions)


def scored_file(path, rows=24):
    """Completions with their share of w7 as reward."""
    out = []
    for i in range(rows):
        responses = ["w7 w7 w7", f"w7 w{(i + 9) % 30}", f"w{(i + 8) % 30} w9", "w7 w7 w7"]
        rewards = [text.split().count("w7") / len(text.split()) for text in responses]
        out.append({"prompt": f"w{i}", "responses": responses, "rewards": rewards, "wanted": "w7"})
    path.write_text("".join(json.dumps(row) + "\n" for row in out))
    return str(path)


def test_grpo_learns_from_a_file_of_scored_completions_and_is_evaluated_on_prompts(tmp_path):
    base = tiny_config(tmp_path)
    config = replace(
        base,
        source="offline",
        steps=15,
        rows_per_step=6,
        data=DataConfig(source=scored_file(tmp_path / "scored.jsonl"), held_out=4, chat=False),
    )
    outcome = train(config)
    assert outcome.after["sampled"] > outcome.before["sampled"] + 0.3
    line = lines(tmp_path / "run" / "metrics.jsonl")[0]
    assert line["reward"] > 0
    assert line["frac_reward_zero_std"] == 0.0
    assert "sampling/sampling_logp_difference/mean" not in line  # nobody knows what sampled them


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "ppo", "source": "offline"}, "source: expected rollouts for ppo"),
        ({"algorithm": "scale_rl", "source": "offline"}, "sampler's log-probabilities"),
        ({"algorithm": "reward_model", "source": "rollouts"}, "source: expected offline for reward_model"),
        ({"algorithm": "grpo", "data": DataConfig(size=3)}, "data: expected nothing, as grpo learns from completions"),
        (
            {"algorithm": "dpo", "source": "rollouts", "optimizer": OptimizerConfig(epochs_per_rollout=2)},
            "epochs_per_rollout: expected 1",
        ),
    ],
)
def test_an_algorithm_that_asks_for_what_the_source_has_not_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build_algorithm(TrainConfig(**changes))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "w1", "responses": ["w2", "w3"], "rewards": [1.0]}, "'rewards' are not a list of one number"),
        ({"prompt": "w1", "responses": ["w2", "w3"], "rewards": [1.0, None]}, "'rewards' are not a list of one"),
        ({"prompt": "w1", "responses": ["w2", "w3"]}, "expected 'prompt', 'rewards', 'responses'"),
    ],
)
def test_rows_of_scored_completions_without_their_rewards_are_refused(tmp_path, row, message):
    path = tmp_path / "scored.jsonl"
    path.write_text(json.dumps(row) + "\n")
    config = offline_config(tmp_path, steps=1)
    data = DataConfig(source=str(path), held_out=0, chat=False)
    with pytest.raises(ValueError, match=message):
        prepare(replace(config, algorithm="grpo", source="offline", data=data))


# Sources to come: each runs through the loop as it is


@dataclass
class Toy:
    """A source around another one."""

    inner: Rollouts
    seen: list[int] = field(default_factory=list)
    kind = "rewarded"
    replays = False

    def next(self, learner, watch):
        return self.inner.next(learner, watch)

    def publish(self, learner):
        self.seen.append(learner.updates)

    def state_dict(self):
        return {"inner": self.inner.state_dict(), "seen": list(self.seen)}

    def load_state_dict(self, state):
        self.inner.load_state_dict(state["inner"])
        self.seen = list(state["seen"])


class Ahead(Toy):
    """Samples one step ahead of the weights that train on it."""

    waiting = None

    def next(self, learner, watch):
        ready = self.waiting or super().next(learner, watch)
        self.waiting = super().next(learner, watch)
        return ready


class Rounds(Toy):
    """Keeps what it sampled at every third step, and trains on it until the next round."""

    kept = None

    def next(self, learner, watch):
        if learner.steps % 3 == 0:
            self.kept = super().next(learner, watch)
        return replace(self.kept, seed=learner.steps, updates=[], scored=False, numbers={})


class Curriculum(Toy):
    """Leaves out prompts that are solved."""

    def next(self, learner, watch):
        batch = super().next(learner, watch)
        batch.groups = [group for group in batch.groups if min(one.reward for one in group.samples) < 1.0]
        return batch


@pytest.mark.parametrize("kind", [Toy, Ahead, Rounds, Curriculum])
def test_a_new_source_needs_no_change_of_the_loop(tmp_path, kind):
    config = tiny_config(tmp_path, steps=8)
    run = prepare(config)
    run.source = kind(run.source)
    outcome = run.train()
    assert outcome.status == "finished"
    assert outcome.after["sampled"] > outcome.before["sampled"]
    assert run.source.seen == list(range(1, 9))
    behind = [line.get("sampling/staleness", 0.0) for line in lines(tmp_path / "run" / "metrics.jsonl")]
    assert behind == {Ahead: [0, *[1] * 7], Rounds: [0, 1, 2, 0, 1, 2, 0, 1]}.get(kind, [0] * 8)
    if kind is Toy:
        train(replace(config, run_dir=str(tmp_path / "plain")))
        plain, toy = (lines(tmp_path / name / "completions.jsonl") for name in ("plain", "run"))
        assert [line["reward"] for line in plain] == [line["reward"] for line in toy]


# How completions are sampled

SAMPLED = {
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.02,
    "repetition_penalty": 1.1,
    "min_new_tokens": 2,
    "stop_strings": ("w3 w4", "w5"),
}


class Odd(Toy):
    """From the third step on it gives what `change` makes of its batch."""

    change = None

    def next(self, learner, watch):
        batch = super().next(learner, watch)
        return self.change(batch) if learner.steps >= 2 else batch


def ends(batch):
    raise StopIteration("no prompts are left")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (ends, "Step 3: StopIteration: no prompts are left (test_sources.py"),
        (lambda batch: replace(batch, groups=[]), "Step 3: ValueError: Odd: next: expected a batch with groups"),
    ],
    ids=["ends early", "empty batch"],
)
def test_a_source_that_gives_nothing_ends_the_run_by_name_with_all_before_it_saved(tmp_path, change, message):
    config = tiny_config(tmp_path, steps=4)
    run = prepare(config)
    run.source = Odd(run.source)
    run.source.change = change
    outcome = run.train()
    assert (outcome.status, outcome.steps) == ("failed", 2)
    assert message in lines(tmp_path / "run" / "warnings.jsonl")[-1]["message"].replace(f"{Path(__file__).parent}/", "")
    train(replace(config, steps=2, run_dir=str(tmp_path / "plain")))
    saved = checkpoint.find(tmp_path / "run").folder
    assert saved.name == "step_000002"
    files = saved / "model" / "model.safetensors", tmp_path / "plain" / "model" / "model.safetensors"
    assert files[0].read_bytes() == files[1].read_bytes()
    with pytest.raises(ValueError, match="resume: source: expected a checkpoint of a run with Rollouts, got one whose"):
        train(replace(config, resume=config.run_dir))


def repeated(batch):
    return replace(batch, groups=[*batch.groups, replace(batch.groups[0])])


def of_other_sizes(batch):
    first, *others = batch.groups
    return replace(batch, groups=[replace(first, samples=first.samples[:2]), *others])


@pytest.mark.parametrize("algorithm", ["grpo", "scale_rl"])
@pytest.mark.parametrize("change", [repeated, of_other_sizes])
def test_a_prompt_twice_and_groups_of_different_sizes_train(tmp_path, algorithm, change):
    run = prepare(tiny_config(tmp_path, algorithm=algorithm, steps=4))
    run.source = Odd(run.source)
    run.source.change = change
    assert run.train().status == "finished"
    assert all(math.isfinite(line.get("loss", 0.0)) for line in lines(tmp_path / "run" / "metrics.jsonl"))


def test_how_a_recipe_samples_reaches_the_sampler_and_greedy_completions_are_cut_by_nothing(tmp_path):
    run = prepare(tiny_config(tmp_path, rollout=RolloutConfig(max_new_tokens=6, temperature=0.8, **SAMPLED)))
    sampling = run.source.sampling
    assert {name: getattr(sampling.params, name) for name in SAMPLED} == SAMPLED
    greedy = sampling.greedy().params
    off = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    assert greedy == replace(sampling.params, **off)


def test_training_and_evaluation_end_completions_with_a_stop_string(tmp_path):
    rollout = RolloutConfig(prompts_per_step=4, group_size=8, max_new_tokens=12, stop_strings=("w3", "4"))
    train(tiny_config(tmp_path, steps=2, rollout=rollout))
    for name in ("completions", "evaluation_completions"):
        written = lines(tmp_path / "run" / f"{name}.jsonl")
        # Words are tokens here; the last one completes a string.
        found = [["w3" in word or "4" in word for word in line["completion"].split()] for line in written]
        assert not any(any(words[:-1]) for words in found)
        assert all(line["finished"] for line, words in zip(written, found, strict=True) if words and words[-1])
        assert any(words and words[-1] for words in found)


def test_a_rollout_names_the_settings_with_which_its_log_probabilities_are_not_those_that_are_trained():
    assert RolloutConfig(temperature=0.5, stop_strings=("a",), stop=("<eos>",)).reshaped == {}
    changed = {name: value for name, value in SAMPLED.items() if name != "stop_strings"}
    assert RolloutConfig(**SAMPLED).reshaped == changed
    for name, value in changed.items():
        assert RolloutConfig(**{name: value}).reshaped == {name: value}


# What rewards say besides their values


class Warnings(Unwatched):
    """Keeps what is warned of."""

    def __init__(self):
        self.said = []

    def warn(self, message):
        self.said.append(message)


def judge(reward, *texts):
    """(samples, warnings) of one group that a reward has judged."""
    group, watch = Group(Prompt(0, "q", (1,)), [Sample([1], [0.0], True, text) for text in texts]), Warnings()
    Judge(RewardSuite([reward]), 1, 1, {}).score([group], watch, "reward", "rewards", "Step 1")
    return group.samples, watch.said


def test_log_extra_gives_each_sample_its_value_as_json_holds_it():
    class Odd:
        def __repr__(self):
            return "<odd>"

    def logs(completions, log_extra, **_):
        texts = [text.upper() for text in completions]
        log_extra("upper", texts)
        texts.clear()  # is not what was logged
        log_extra("numbers", np.array([1.5, 2.5]))
        log_extra("tensors", (torch.tensor([1, 2]), torch.tensor(3)))
        log_extra("odd", [Odd(), {(1, 2): 3}])
        log_extra("none", [None, float("inf")])
        return [0.0, 1.0]

    (first, second), said = judge(logs, "a", "b")
    assert said == []
    assert first.extra == {"upper": "A", "numbers": 1.5, "tensors": [1, 2], "odd": "<odd>", "none": None}
    assert second.extra == {"upper": "B", "numbers": 2.5, "tensors": 3, "odd": "{(1, 2): 3}", "none": float("inf")}


@pytest.mark.parametrize(
    ("values", "got"), [(["a"], "1"), ([], "0"), (["a", "b", "c"], "3"), ("ab", "'ab'"), (3.0, "3.0"), (None, "None")]
)
def test_what_is_not_one_value_per_completion_is_warned_of_and_left_out(values, got):
    def logs(completions, log_extra, **_):
        log_extra("column", values)
        return [0.0, 1.0]

    samples, said = judge(logs, "a", "b")
    assert said == [f"Step 1: log_extra: column: expected 2 values, one per completion, got {got}."]
    assert [sample.extra for sample in samples] == [{}, {}]
    assert [sample.reward for sample in samples] == [0.0, 1.0]


def logs_lengths(completions, log_extra, **_):
    """Half a reward, and a column."""
    log_extra("words", [len(text.split()) for text in completions])
    return [len(text) / 10 for text in completions]


def test_what_a_reward_logs_of_each_completion_is_in_the_runs_files(tmp_path):
    config = tiny_config(tmp_path, steps=2, rewards=(RewardConfig("trainer.test_sources:logs_lengths"),))
    train(config)
    for name in ("completions", "evaluation_completions"):
        written = lines(tmp_path / "run" / f"{name}.jsonl")
        assert written
        assert all(line["extra"] == {"words": len(line["completion"].split())} for line in written)


def none_in_third_step(completions, trainer_state, **_):
    """Applies at first."""
    late = trainer_state.global_step == 2
    return [None if late else float(len(text)) for text in completions]


def never(completions, **_):
    """Applies to nothing."""
    return [None] * len(completions)


def test_a_run_stops_at_the_first_step_to_which_no_reward_applies(tmp_path):
    rewards = (RewardConfig("trainer.test_sources:none_in_third_step"), RewardConfig("trainer.test_sources:never"))
    config = tiny_config(tmp_path, steps=5, rewards=rewards)
    outcome = train(replace(config, task=replace(config.task, held_out=0)))
    assert (outcome.status, outcome.steps) == ("rewards failed", 2)
    assert [line["message"] for line in lines(tmp_path / "run" / "warnings.jsonl")] == [
        "Step 3: none_in_third_step and never returned None for all 16 completions. None means that a reward does not "
        "apply, so there is nothing to learn from. Return a number where it applies."
    ]


def none_but_one(completions, **_):
    """Applies to the first completion of each call."""
    return [1.0, *[None] * (len(completions) - 1)]


def outage(completions, **_):
    """Fails."""
    raise ConnectionError("judge is down")


@pytest.mark.parametrize("reward", ["none_but_one", "outage"])
def test_a_run_goes_on_where_a_reward_applies_to_something_or_may_fail(tmp_path, reward):
    rewards = (RewardConfig(f"trainer.test_sources:{reward}"),)
    outcome = train(tiny_config(tmp_path, steps=2, rewards=rewards, max_failure_fraction=1.0))
    assert (outcome.status, outcome.steps) == ("finished", 2)


def test_a_reward_that_hangs_ends_the_run_as_one_that_fails_does(tmp_path):
    rewards = (RewardConfig("trainer.test_sources:hangs_in_second_step"),)
    config = tiny_config(tmp_path, steps=5, rewards=rewards, reward_timeout=0.5)
    outcome = train(replace(config, task=replace(config.task, held_out=0)))
    assert (outcome.status, outcome.steps) == ("rewards failed", 1)
    (line,) = lines(tmp_path / "run" / "warnings.jsonl")
    assert "Step 2: reward 'hangs_in_second_step' failed on 16 of 16 completions" in line["message"]
    assert "most often with no answer within 0.5 s" in line["message"]


async def hangs_in_second_step(completions, trainer_state, **_):
    """Answers once."""
    await asyncio.sleep(60 if trainer_state.global_step == 1 else 0)
    return [float(len(text)) for text in completions]


# pass@k


def prompts_with(*rewards):
    return [Group(Prompt(0, "q", (1,)), [Sample([1], [0.0], True, reward=r) for r in group]) for group in rewards]


@pytest.mark.parametrize("number", [4, 7])
def test_pass_at_k_is_the_share_of_choices_of_k_completions_with_one_that_passed(number):
    for passed in range(number + 1):
        rewards = [1.0] * passed + [0.2] * (number - passed)
        for k in range(1, number + 1):
            choices = list(itertools.combinations(rewards, k))
            expected = sum(max(choice) >= 0.5 for choice in choices) / len(choices)
            assert pass_at_k(prompts_with(rewards), k, 0.5) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_takes_the_threshold_itself_as_passed_and_the_mean_over_prompts():
    groups = prompts_with([0.5, 0.0], [0.4, 0.4])
    assert pass_at_k(groups, 1, 0.5) == 0.25
    assert pass_at_k(groups, 2, 0.5) == 0.5
    assert pass_at_k(groups, 1, 0.4) == 0.75


def test_completions_that_have_no_reward_do_not_count_in_pass_at_k():
    assert pass_at_k(prompts_with([1.0, 0.0, None, None]), 1, 0.5) == 0.5
    groups = prompts_with([1.0, 0.0, None, None], [1.0, 1.0, 0.0, 0.0])
    assert pass_at_k(groups, 3, 0.5) == 1.0  # of the second alone
    assert math.isnan(pass_at_k(groups[:1], 3, 0.5))
    assert math.isnan(pass_at_k(prompts_with([None, None]), 1, 0.5))


def test_pass_at_k_of_many_completions_is_exact():
    rewards = [1.0] + [0.0] * 1023
    assert pass_at_k(prompts_with(rewards), 512, 0.5) == 0.5


def test_pass_at_k_is_logged_and_printed_beside_the_reward_of_sampled_completions(tmp_path, capsys):
    rollout = RolloutConfig(prompts_per_step=4, group_size=4, max_new_tokens=6, threshold=0.1)
    config = tiny_config(tmp_path, steps=1, rollout=rollout, eval=EvalConfig(samples=6, pass_at_k=(1, 4)))
    run = prepare(config)
    run.train()
    written = lines(tmp_path / "run" / "evaluation_completions.jsonl")
    for line in lines(tmp_path / "run" / "evaluations.jsonl"):
        if line["name"] == "greedy":
            assert not any(key.startswith("pass@") for key in line)
            continue
        groups = {}
        for one in written:
            if (one["step"], one["name"]) == (line["step"], "sampled"):
                groups.setdefault(one["prompt_index"], []).append(one["reward"])
        for k in (1, 4):
            assert line[f"pass@{k}"] == pytest.approx(pass_at_k(prompts_with(*groups.values()), k, 0.1))
        assert 0 < line["pass@1"] < line["pass@4"] <= 1
    assert "pass@4 " in capsys.readouterr().out
    results = run.evaluate()
    assert results.keys() == {"greedy", "sampled", "pass@1", "pass@4"}
    assert f"over 4 prompts x 6, pass@1 {results['pass@1']:.3f}, pass@4 " in capsys.readouterr().out


@pytest.mark.parametrize("counts", [(8,), (1, 9), (0,)])
def test_pass_at_k_of_more_than_the_samples_is_refused(counts):
    with pytest.raises(
        ValueError, match=r"^TrainConfig: eval.pass_at_k: expected numbers from 1 to eval.samples = 7, "
    ):
        TrainConfig(eval=EvalConfig(samples=7, pass_at_k=counts))


# What crosses a boundary


def test_a_batch_comes_back_from_json_as_it_was():
    sample = Sample([3, 4], [-0.1, float("nan")], True, "w3", {"a": 0.25, "b": None}, 1 / 3, advantage=-0.5)
    sample.own, sample.versions, sample.old_logps, sample.values = [True, False], [1, 2], [-0.1, -1e-9], [0.5, 2.0]
    other = Sample([5], [0.0], False, reward=None)
    prompt = Prompt(7, [{"role": "user", "content": "é"}], (1, 2), {"answer": 4, "more": {"a": [1]}})
    group = Group(prompt, [sample, other], greedy_reward=0.5, mismatched=Sample([9], [0.0], True), margin=0.1)
    metrics = {
        "entropy": (torch.tensor(1 / 3), torch.tensor(3)),
        "x/max": (torch.tensor(0.1).double(), torch.tensor(1)),
    }
    sample.extra = {"found": [7, None]}
    batch = Batch(
        [group, Group(prompt, [other])], 5, "pairs", [group], {"loss": 0.1}, True, [(metrics, {"loss": 1 / 7})]
    )
    back = batch_from_json(json.loads(json.dumps(batch_to_json(batch))))
    assert repr(back) == repr(batch)
    assert [(total.dtype, count.dtype) for total, count in back.updates[0][0].values()] == [
        (total.dtype, count.dtype) for total, count in metrics.values()
    ]


def test_tokens_that_the_policy_did_not_write_have_no_part_in_counts_and_gradient(tmp_path):
    policy = Policy(load_model(write_model(tmp_path / "model"), torch.float32)[0])
    prompt, tokens = Prompt(0, "w1", (3,)), [4, 5, 6, 7]
    own = [True, False, False, True]
    sample = Sample(tokens, [-1.0] * 4, True, reward=1.0, advantage=1.0, own=own)
    groups = [Group(prompt, [sample, replace(sample, token_ids=[8, 9, 3, 2], own=None, advantage=-1.0)])]
    assert count(groups).tokens == 2 + 4
    assert count([Group(prompt, [replace(sample, own=[False] * 4)])]).sequences == 0
    (batch,) = pack(groups, layout="padded", max_tokens=64)
    assert batch.mask.tolist() == [*own, True, True, True, True]
    algorithm = build_algorithm(TrainConfig())
    normalizer = algorithm.normalizer(count(groups))
    (out,) = algorithm.losses(policy, None, batch, normalizer, temperature=1.0, entropy=False)
    out.loss.backward()
    got = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    policy.model.zero_grad()
    logps = policy.outputs(policy.hidden(batch), batch.targets).logps
    mine, other = logps[:4][torch.tensor(own)], logps[4:]
    (-(mine.mean() - other.mean()) / normalizer).backward()
    torch.testing.assert_close(
        got, torch.cat([p.grad.flatten() for p in policy.model.parameters()]), rtol=1e-4, atol=1e-6
    )


def test_every_token_says_how_many_updates_its_weights_had_seen(tmp_path):
    run = prepare(tiny_config(tmp_path, optimizer=OptimizerConfig(lr=1e-2, steps_per_rollout=2)))
    seen, original = [], run.source.next

    def sampled(learner, watch):
        batch = original(learner, watch)
        found = {
            tuple(one.versions) == (learner.updates,) * len(one.token_ids) for g in batch.groups for one in g.samples
        }
        seen.append((learner.updates, found))
        return batch

    run.source.next = sampled
    run.train()
    assert [found for _, found in seen] == [{True}] * 3
    assert 0 == seen[0][0] < seen[1][0] < seen[2][0]


def test_grpo_learns_from_the_completions_that_another_run_wrote(tmp_path):
    first = tiny_config(tmp_path, steps=6, run_dir=str(tmp_path / "first"))
    train(first)
    written = tmp_path / "first" / "completions.jsonl"
    data = DataConfig(source=str(written), held_out=0, chat=False)
    config = replace(first, source="offline", rows_per_step=4, run_dir=str(tmp_path / "second"), data=data)
    run = prepare(config)
    groups = run.source.rows.prompts
    expected = {}
    for line in lines(written):
        if line["completion"]:
            expected.setdefault((line["step"], line["prompt"]), []).append(line["reward"])
    expected = [rewards for rewards in expected.values() if len(rewards) > 1]
    assert sorted([one.reward for one in group.samples] for group in groups) == sorted(expected)
    outcome = run.train()
    assert outcome.after["sampled"] > outcome.before["sampled"]


def test_every_pair_of_a_ranking_is_compared_and_not_the_best_and_the_worst_alone(tmp_path):
    rows = [{"prompt": f"w{i}", "responses": ["w7", "w8 w9", "w3"], "ranking": [1, 2, 3]} for i in range(8)]
    path = tmp_path / "ranked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = offline_config(tmp_path, "reward_model", steps=1)
    run = prepare(replace(config, data=DataConfig(source=str(path), held_out=0, chat=False, ranked=True)))
    batch = run.source.next(run.learner, Unwatched())
    (answers,) = run.algorithm.updates(run.learner, batch, Unwatched())
    assert sum(len(comparisons(batch)[0]) for batch in answers.batches) == 3 * 5


@pytest.mark.parametrize(("algorithm", "kind"), [("grpo", "pairs"), ("dpo", "labelled"), ("sft", "pairs")])
def test_groups_of_a_kind_that_an_algorithm_cannot_learn_from_are_refused(algorithm, kind):
    built = build_algorithm(TrainConfig(algorithm=algorithm))
    with pytest.raises(ValueError, match=f"groups: expected .*, got {kind}"):
        next(built.updates(None, Batch([], seed=1, kind=kind), Unwatched()))


def test_a_file_of_completions_is_compared_with_the_reference_at_the_temperature_of_training(tmp_path):
    """Before the first update policy and reference are the same, so their KL is 0."""
    rollout = RolloutConfig(max_new_tokens=6, temperature=0.5)
    config = replace(
        tiny_config(tmp_path, rollout=rollout, loss={"kl.coef": 0.1}),
        source="offline",
        steps=1,
        data=DataConfig(source=scored_file(tmp_path / "scored.jsonl"), held_out=0, chat=False),
    )
    train(config)
    (line,) = lines(tmp_path / "run" / "metrics.jsonl")
    assert line["kl"] == pytest.approx(0.0, abs=1e-6)
