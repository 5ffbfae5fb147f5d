"""Bugs that curricula elsewhere had, one test each; the docstring links to the report."""

from __future__ import annotations

import json
from functools import partial

import pytest

from fastrl.data.curriculum import Curriculum, DifficultyPools, Learnability, Waker, pass_variance
from fastrl.trainer.evaluate import by_bucket
from fastrl.types import Group, Prompt, Sample

PROMPTS = [Prompt(i, f"question {i}", (i,), {"task": "ab"[i % 2]}) for i in range(12)]


def group(prompt, *rewards):
    return Group(prompt, [Sample([1], [0.0], True, reward=reward) for reward in rewards])


def waker():
    error = partial(pass_variance, threshold=0.5)
    return Waker(error, reduction=False, temperature=1.0, random_share=0.2, interval=4)


def share(curriculum, task, number=1000):
    return sum(prompt.columns["task"] == task for prompt in curriculum.next(number)) / number


def test_a_task_that_was_put_aside_as_easy_or_hard_comes_back():
    """Pools were left in one direction only, so the one that was drawn from ran dry.

    https://github.com/PrimeIntellect-ai/prime-rl/pull/2667
    """
    curriculum = Curriculum(PROMPTS, DifficultyPools((0.25, 0.75, 1.0), (0.2, 1.0, 0.2)), seed=0)
    curriculum.observe([group(prompt, 1.0, 1.0) for prompt in PROMPTS])
    assert {prompt.index for prompt in curriculum.next(200)} == set(range(12))
    curriculum.observe([group(PROMPTS[3], 1.0, 0.0)])
    again = sum(prompt.index == 3 for prompt in curriculum.next(3200)) / 3200
    assert again == pytest.approx(1.0 / (1.0 + 11 * 0.2), abs=0.05)  # its weight over all weights


def test_a_judge_that_was_away_teaches_nothing_and_one_that_scored_all_zero_starves_no_task():
    """An outage scored every answer of an environment 0, which was then never drawn again, without a word.

    https://github.com/invergent-ai/surogate/pull/73
    """
    for rule in (waker(), Learnability(0.5, 1.0, random_share=0.2, interval=4)):
        curriculum = Curriculum(PROMPTS, rule, ["task"], seed=0)
        curriculum.observe([group(PROMPTS[0], 1.0, 0.0), group(PROMPTS[1], 1.0, 0.0, 0.0, 0.0)])
        before = json.dumps(curriculum.state_dict())
        curriculum.observe([group(PROMPTS[i], None, None) for i in range(12)])
        assert json.dumps(curriculum.state_dict()) == before
        curriculum.observe([group(PROMPTS[i], 0.0, 0.0) for i in (0, 2, 4, 6) * 10])
        assert 0.05 < share(curriculum, "a") < 0.25
        curriculum.observe([group(PROMPTS[i], 1.0, 0.0) for i in (0, 2, 4, 6) * 10])
        assert share(curriculum, "a") > 0.5


@pytest.mark.parametrize("rule", [waker(), Learnability(0.5, 1.0, random_share=0.2, interval=4)], ids=type)
def test_a_task_that_is_solved_is_drawn_less(rule):
    """A solved cell of a grid got a larger weight instead of a smaller one.

    https://github.com/Improbable-AI/dribblebot/issues/11
    """
    curriculum = Curriculum(PROMPTS, rule, ["task"], seed=0)
    curriculum.observe([group(prompt, 1.0, 0.0) for prompt in PROMPTS])
    assert share(curriculum, "a") == pytest.approx(0.5, abs=0.06)
    curriculum.observe([group(prompt, 1.0, 1.0) for prompt in PROMPTS if prompt.columns["task"] == "a"] * 5)
    assert share(curriculum, "a") < 0.25


def test_one_group_of_many_does_not_decide():
    """The last reward took the place of the mean.

    https://github.com/ZimmermanGroup/conformer-rl/issues/63, and TRL's ScaleRLTrainer keeps a prompt's last pass rate
    """
    rule = waker()
    curriculum = Curriculum(PROMPTS, rule, ["task"], seed=0, leave_out=0.9)
    curriculum.observe([group(PROMPTS[0], 1.0, 0.0)] * 8 + [group(PROMPTS[0], 1.0, 1.0)])
    assert rule.errors["a"] == pytest.approx(0.75 * 0.25)
    assert curriculum.left_out == set()


def test_each_prompts_own_rewards_reach_the_sampler_and_not_the_batchs_mean():
    """The sampler was told the mean score of the batch.

    https://github.com/verl-project/verl/pull/759
    """
    rule = Learnability(0.5, 1.0, random_share=0.2, interval=4)
    Curriculum(PROMPTS, rule, ["task"], seed=0).observe([group(PROMPTS[0], 1.0, 1.0), group(PROMPTS[1], 0.0, 0.0)])
    assert rule.rates == {"a": 1.0, "b": 0.0}


def test_several_held_out_tasks_are_not_one_number_and_a_large_one_does_not_outweigh_a_small_one():
    """Validation on several data sets reported one mean over all samples.

    https://github.com/NVIDIA-NeMo/RL/issues/2501
    """
    groups = [group(PROMPTS[i], 1.0) for i in (0, 2, 4, 6, 8, 10)] + [group(PROMPTS[1], 0.0)]
    expected = {"reward/a": 1.0, "reward/b": 0.0, "reward/mean_of_buckets": 0.5, "reward/cvar_0.1": 0.0}
    assert by_bucket(groups, ["task"]) == expected


def test_a_state_of_other_data_is_refused_where_it_would_skip_some():
    """A run resumed on another data set skipped its first rows without a word.

    https://github.com/NVIDIA-NeMo/RL/pull/2519
    """
    state = Curriculum(PROMPTS, waker(), ["task"], seed=0).state_dict()
    with pytest.raises(ValueError, match="expected the state of the same prompts in the same order"):
        Curriculum(PROMPTS[::-1], waker(), ["task"], seed=0).load_state_dict(state)
