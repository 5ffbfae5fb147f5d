"""Programs that ask a model, token for token; environments of `verifiers` are such programs."""

from __future__ import annotations

import asyncio
import json
import sys
import textwrap

import pytest
from rollout.test_turns import END, HEARD, PARAMS, PROMPT, Scripted, chat_tokenizer, config_for, ids

from fastrl.environments import AgentEnvironment, resolve_environment
from fastrl.rollout.turns import Turns, play
from fastrl.trainer.config import EnvironmentConfig, RewardConfig
from fastrl.trainer.setup import train


def talk(program, *turns, number=1, params=PARAMS, **settings):
    sampler = Scripted(*turns)
    turns = Turns(lambda: AgentEnvironment(program), **settings)
    return play([PROMPT], sampler, chat_tokenizer(), number, params, turns)[0].samples, sampler


def asking(*more, reward=1.0):
    """A program that asks its prompt, and then something more after each answer."""

    async def program(row, ask):
        messages = list(row["prompt"])
        answers = [await ask(messages)]
        for text in more:
            messages = [*messages, {"role": "assistant", "content": answers[-1]}, {"role": "tool", "content": text}]
            answers.append(await ask(messages))
        return reward(answers) if callable(reward) else reward

    return program


def test_a_program_gets_the_policys_answers_and_its_result_is_the_reward():
    first, second = [*ids("w2 w3"), END], [*ids("w5"), END]
    heard = []
    (sample,), _ = talk(asking("w9", reward=lambda answers: heard.extend(answers) or 0.75), first, second)
    assert heard == ["w2 w3", "w5"]
    assert sample.token_ids == [*first, *HEARD, *second]
    assert sample.own == [True] * 3 + [False] * len(HEARD) + [True] * 2
    assert sample.extra["turn_rewards"] == [0.0, 0.75]
    assert sample.finished


def test_conversations_of_a_batch_are_answered_together():
    said = [[*ids(f"w{n}"), END] for n in (2, 3, 4)]
    samples, sampler = talk(asking("w9", reward=lambda answers: float(answers[0][1:])), said, said, number=3)
    assert [sample.extra["turn_rewards"] for sample in samples] == [[0.0, 2.0], [0.0, 3.0], [0.0, 4.0]]
    assert [len(prompts) * count for prompts, count, _ in sampler.asked] == [3, 3]


def test_a_program_that_a_limit_leaves_without_an_answer_is_cancelled_and_has_earned_nothing():
    ended = []

    async def program(row, ask):
        try:
            return await asking("w9")(row, ask)
        except asyncio.CancelledError:
            ended.append(True)
            raise

    (sample,), _ = talk(program, [*ids("w2"), END], ids("w3 w3 w3"), turn_tokens=3)
    assert ended == [True]
    assert sample.extra["turn_rewards"] == [0.0]
    assert not sample.finished
    assert "environment_error" not in sample.extra


async def silent(row, ask):
    return 1.0


async def another(row, ask):
    return await ask([{"role": "user", "content": "w7"}])


async def rewriting(row, ask):
    await ask(row["prompt"])
    return await ask([*row["prompt"], {"role": "assistant", "content": "w8"}, {"role": "tool", "content": "w9"}])


async def twice(row, ask):
    await asyncio.gather(ask(row["prompt"]), ask(row["prompt"]))


async def raising(row, ask):
    await ask(row["prompt"])
    raise KeyError("lost")


@pytest.mark.parametrize(
    ("program", "error"),
    [
        (silent, "the program ended without a question"),
        (another, "the first question is not the row's prompt"),
        (rewriting, "a question changes what was said before it"),
        (twice, "asks again before it has its answer"),
        (raising, "KeyError: 'lost'"),
    ],
)
def test_a_program_that_is_no_conversation_costs_its_sample_alone(program, error):
    (sample,), _ = talk(program, [*ids("w2"), END])
    assert error in sample.extra["environment_error"]


def test_an_environment_whose_close_raises_costs_its_sample():
    class Leaks(AgentEnvironment):
        def close(self):
            raise OSError("no disk")

    sampler = Scripted([*ids("w2"), END])
    turns = Turns(lambda: Leaks(asking()))
    (sample,) = play([PROMPT], sampler, chat_tokenizer(), 1, PARAMS, turns)[0].samples
    assert sample.extra["environment_error"] == "OSError: no disk"


def test_without_the_package_or_with_its_api_of_programs_the_environment_is_refused(monkeypatch):
    from fastrl.data import verifiers

    monkeypatch.setitem(sys.modules, "verifiers", None)
    monkeypatch.setitem(sys.modules, "verifiers.legacy", None)
    with pytest.raises(ValueError, match="expected the package verifiers, with environments in Python, got none"):
        verifiers.classic()
    monkeypatch.setitem(sys.modules, "verifiers", type(sys)("verifiers"))
    with pytest.raises(ValueError, match="This version has another interface to models"):
        verifiers.classic()


OURS = """
import verifiers as vf
from datasets import Dataset

def load_environment(words=4, grouped=False):
    rows = [{"question": f"w{n}", "answer": f"w{n}"} for n in range(words)]

    class Twice(vf.MultiTurnEnv):
        async def setup_state(self, state):
            state["seen"] = 0

        async def env_response(self, messages, state, **kwargs):
            state["seen"] += 1
            return [{"role": "user", "content": "w9"}]

    def begins(completion, answer, **kwargs):
        return float(completion[0].content.startswith("w"))

    def turns(state, **kwargs):
        return float(state["seen"])

    def compared(completions, **kwargs) -> list[float]:
        return [0.0] * len(completions)

    rubric = vf.Rubric(funcs=[begins, turns], weights=[1.0, 0.5])
    if grouped:
        rubric.add_reward_func(compared)
    return Twice(max_turns=2, dataset=Dataset.from_list(rows), rubric=rubric)
"""


@pytest.fixture
def _our_environment(tmp_path, monkeypatch):
    pytest.importorskip("verifiers")  # in no extra: it needs another version of datasets
    from fastrl.data import verifiers

    try:
        verifiers.classic()
    except ValueError as error:
        pytest.skip(str(error))  # 0.4 has no environments in Python to test
    (tmp_path / "two_turns.py").write_text(textwrap.dedent(OURS))
    monkeypatch.syspath_prepend(tmp_path)
    verifiers.loaded.cache_clear()


@pytest.mark.usefixtures("_our_environment")
def test_a_verifiers_environment_talks_and_scores_by_its_rubric(tmp_path, monkeypatch):
    monkeypatch.setattr("fastrl.monitor.report.charts", lambda run: [])
    environment = EnvironmentConfig("verifiers", {"name": "two-turns", "words": 12}, turn_tokens=8)
    config = config_for(tmp_path, steps=2, environment=environment, rewards=(RewardConfig("environment"),))
    task = type(config.task)(source="verifiers:two-turns", options={"words": 12}, held_out=4)
    outcome = train(type(config)(**{**vars(config), "task": task}))
    assert outcome.status == "finished"
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["environment/failures"] == 0.0
    assert 0.0 < first["environment/begins"] <= 1.0
    assert first["environment/turns"] > 0.0
    assert 0.0 < first["reward"] <= 1.5


@pytest.mark.usefixtures("_our_environment")
def test_a_rubric_that_compares_groups_and_unknown_names_are_refused():
    with pytest.raises(ValueError, match="expected rewards of single rollouts"):
        resolve_environment("verifiers", name="two-turns", grouped=True)()
    with pytest.raises(ValueError, match="'no-such-env' cannot be loaded"):
        resolve_environment("verifiers", name="no-such-env")()
