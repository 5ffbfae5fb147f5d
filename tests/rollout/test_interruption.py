"""Forced length interruption: who wrote which token, what the answer is conditioned on, and runs with it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from trainer.test_resume import config_for, everything, run_until_crash
from trainer.tiny import tiny_config, write_model
from transformers import AutoTokenizer

from fastrl.model.load import load_model
from fastrl.progress import Unwatched
from fastrl.rollout.base import SamplingParams
from fastrl.rollout.interruption import Interrupting, Interruption
from fastrl.rollout.transformers_sampler import TransformersSampler
from fastrl.trainer.config import AheadConfig, InterruptionConfig, RolloutConfig, TaskConfig
from fastrl.trainer.setup import prepare, train
from fastrl.types import Sample

WORDS = (9, 8)  # the interruption, "w7 w6"
PROMPTS = [(3, 4), (5, 6, 7)]
PARAMS = SamplingParams(max_new_tokens=20, seed=5, stop_token_ids=(0,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


class Scripted:
    """Completions of 4 + their place tokens, of which the first ends by itself; answers of one token."""

    def __init__(self):
        self.calls = []

    def sample(self, prompts, num_samples, params, progress=None):
        self.calls.append(([list(prompt) for prompt in prompts], num_samples, params))
        lengths = [min(4 + at, params.max_new_tokens) for at in range(num_samples)]
        if len(self.calls) == 2:
            return [[Sample([31, 0], [-0.25, -0.5], True, versions=[3, 3])] for _ in prompts]
        return [
            [
                Sample(list(range(10, 10 + length)), [-1.0] * length, at == 0, versions=[2] * length)
                for at, length in enumerate(lengths)
            ]
            for _ in prompts
        ]


def test_a_completion_without_an_end_by_its_budget_gets_the_words_and_then_answers(tokenizer):
    sampler = Scripted()
    asked = Interruption(WORDS, (5, 5))
    [first, second] = Interrupting(sampler, tokenizer, asked).sample(PROMPTS, 3, PARAMS)
    (_, _, thinking), (prompts, number, answering) = sampler.calls
    assert thinking.max_new_tokens == 5
    assert (number, answering.max_new_tokens) == (1, 20 - 5 - 2)
    assert answering.seed != thinking.seed == PARAMS.seed
    cut = [10, 11, 12, 13, 14]
    assert prompts == [[*prompt, *cut, *WORDS] for prompt in PROMPTS for _ in range(2)]
    for group in (first, second):
        assert [sample.extra["interrupted"] for sample in group] == [False, True, True]
        assert group[0].token_ids == cut[:4]
        assert group[0].own is None
        for sample in group[1:]:
            assert sample.token_ids == [*cut, *WORDS, 31, 0]
            assert sample.own == [True] * 5 + [False] * 2 + [True] * 2
            assert sample.sampling_logps == [-1.0] * 5 + [0.0] * 2 + [-0.25, -0.5]
            assert sample.versions == [2] * 7 + [3] * 2
            assert sample.finished


def test_an_end_after_the_budget_does_not_count_and_budgets_are_drawn_from_the_whole_range(tokenizer):
    class Long:
        def sample(self, prompts, num_samples, params, progress=None):
            length = params.max_new_tokens
            one = Sample([10] * length, [-1.0] * length, length == 6)
            return [[replace(one, extra={}) for _ in range(num_samples)] for _ in prompts]

    asked = Interruption(WORDS, (3, 6))
    runs = [Interrupting(Long(), tokenizer, asked).sample([(3,)], 400, replace(PARAMS, seed=s))[0] for s in (5, 5, 6)]
    budgets = [[sample.own.index(False) if sample.own else 6 for sample in run] for run in runs]
    assert budgets[0] == budgets[1] != budgets[2]
    for budget in (3, 4, 5, 6):
        assert 60 < budgets[0].count(budget) < 140  # 100 expected, and a standard deviation of 9
    ended = [sample for sample in runs[0] if sample.own is None]
    assert all(len(sample.token_ids) == 6 and not sample.extra["interrupted"] for sample in ended)
    assert all(not sample.finished for sample in runs[0] if sample.own)


def test_a_completion_that_already_answers_goes_on_without_the_words(tokenizer):
    sampler = Scripted()
    asked = Interruption(WORDS, (5, 6), unless="w13")  # token 15, the sixth
    [group] = Interrupting(sampler, tokenizer, asked).sample([(3, 4)], 6, PARAMS)
    for sample in group[1:]:
        at = 15 in sample.token_ids
        assert sample.extra["interrupted"] is not at
        assert (9 in sample.token_ids) is not at
        assert all(sample.own) is at
        assert sample.token_ids[-2:] == [31, 0]
    assert {sample.extra["interrupted"] for sample in group[1:]} == {True, False}


def test_the_log_probabilities_of_the_answer_are_those_given_the_words(folder, tokenizer):
    model = load_model(folder, torch.float32)[0]
    sampler = Interrupting(TransformersSampler(model), tokenizer, Interruption(WORDS, (3, 5)))
    samples = [(prompt, s) for prompt, g in zip(PROMPTS, sampler.sample(PROMPTS, 8, PARAMS), strict=True) for s in g]
    told = [(prompt, sample) for prompt, sample in samples if sample.extra["interrupted"]]
    assert len(told) > 8
    for prompt, sample in told:
        assert sample.token_ids[sample.own.index(False) :][:2] == list(WORDS)
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *sample.token_ids]])).logits[0, len(prompt) - 1 : -1]
        logps = logits.log_softmax(-1).gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]
        own = torch.tensor(sample.own)
        # Both in float32: a cached step adds up its products in another order than the whole row does.
        torch.testing.assert_close(torch.tensor(sample.sampling_logps)[own], logps[own], rtol=0, atol=2e-5)
        assert sum(sample.own[sample.own.index(False) + 2 :]) <= 20 - 5 - 2


def interrupted(**changes):
    asked = InterruptionConfig(after=(2, 3), text="w7 w6", unless="")
    return {"interruption": asked, "rollout": RolloutConfig(4, 4, max_new_tokens=9)} | changes


@pytest.mark.parametrize("source", ["rollouts", "ahead"])
def test_a_run_reports_how_many_were_interrupted_and_its_files_show_the_words(tmp_path, source):
    ahead = {"ahead": AheadConfig(max_staleness=1, threads=1)} if source == "ahead" else {}
    changes = interrupted(source=source, algorithm="scale_rl", threads=1, show_every=1)
    assert train(tiny_config(tmp_path, **changes | ahead)).status == "finished"
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert 0.5 < first["interrupted"] <= 1.0
    shown = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    assert sum("w7 w6" in one["completion"] for one in shown) > len(shown) / 2
    evaluations = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert any(0 < value <= 1 for one in evaluations for name, value in one.items() if "interrupted" in name)


def test_the_share_of_the_interrupted_is_that_of_the_step_and_not_of_its_greedy_baseline(tmp_path):
    run = prepare(tiny_config(tmp_path, **interrupted(algorithm="remax")))
    run.source.sampling = replace(run.source.sampling, params=replace(run.source.sampling.params, temperature=3.0))
    batch = run.source.next(run.learner, Unwatched())
    told = [sample.extra["interrupted"] for group in batch.groups for sample in group.samples]
    assert 0 < sum(told) < len(told)
    assert batch.numbers["interrupted"] == sum(told) / len(told)


def test_a_resumed_run_with_interruptions_is_bit_for_bit_the_run_that_never_stopped(tmp_path):
    changes = interrupted()
    train(config_for(tmp_path, "whole", **changes))
    stopped = config_for(tmp_path, "stopped", **changes)
    run_until_crash(stopped, 7)
    train(replace(stopped, resume=stopped.run_dir))
    assert everything(tmp_path / "stopped") == everything(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"interruption": InterruptionConfig(unless="x")}, "interruption.after: expected two numbers of tokens"),
        ({"interruption": InterruptionConfig(after=(3, 2))}, "the larger one last"),
        ({"interruption": InterruptionConfig(after=(0, 2))}, "two numbers from 1"),
        ({"interruption": InterruptionConfig(after=(2, 3), text="")}, "words that are at least one token"),
        ({"interruption": InterruptionConfig(after=(2, 3), text="w7 <eos>")}, "words without a token that ends"),
        ({"interruption": InterruptionConfig(after=(2, 4), text="w7 w6")}, "more than 6, the longest budget"),
        (
            {"interruption": InterruptionConfig(after=(2, 3)), "algorithm": "dpo", "task": TaskConfig()},
            "none for written rows",
        ),
    ],
)
def test_interruptions_that_leave_no_answer_or_never_happen_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        prepare(tiny_config(tmp_path, **changes))
