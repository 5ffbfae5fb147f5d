"""Curricula against their equations, worked out by hand, and against the distributions they draw from."""

from __future__ import annotations

import json
import math
from collections import Counter
from functools import partial
from itertools import pairwise

import pytest

from fastrl.data.curriculum import (
    ERRORS,
    Curriculum,
    DifficultyPools,
    EasyToHard,
    Learnability,
    Rule,
    Waker,
    advantage,
    bucket_of,
    cvar,
    disagreement,
    pass_variance,
)
from fastrl.data.sampler import PromptSampler
from fastrl.types import Group, Prompt, Sample

VARIANCE = partial(pass_variance, threshold=0.5)


def prompts(number, tasks=("a", "b", "c")):
    """Equally many of each task."""
    return [Prompt(i, f"question {i}", (i,), {"task": tasks[i % len(tasks)], "level": i % 2}) for i in range(number)]


def group(prompt, *rewards):
    return Group(prompt, [Sample([1], [0.0], True, reward=reward) for reward in rewards])


def passing(prompt, rate, of=10):
    """A group of which this share passes."""
    return group(prompt, *(float(i < round(rate * of)) for i in range(of)))


def drawn_shares(curriculum, number=6000):
    counts = Counter(prompt.columns["task"] for prompt in curriculum.next(number))
    return {name: counts[name] / number for name in sorted(counts)}


# Measures of a group


def test_cvar_is_the_mean_of_the_worst_share_and_counts_parts_of_a_value():
    values = [0.9, 0.1, 0.5, 0.3]
    assert cvar(values, 0.25) == pytest.approx(0.1)
    assert cvar(values, 0.1) == pytest.approx(0.1)  # less than one value: the minimum
    assert cvar(values, 0.5) == pytest.approx((0.1 + 0.3) / 2)
    assert cvar(values, 0.375) == pytest.approx((0.1 + 0.5 * 0.3) / 1.5)
    assert cvar(values, 1.0) == pytest.approx(sum(values) / 4)
    assert cvar([i / 11 for i in range(12)], 0.1) == pytest.approx(0.2 * (1 / 11) / 1.2)
    assert math.isnan(cvar([0.5, math.nan], 0.1))


@pytest.mark.parametrize(("values", "alpha", "message"), [([], 0.1, "values: .* got none"), ([1.0], 0.0, "alpha")])
def test_cvar_of_nothing_or_of_no_share_is_refused(values, alpha, message):
    with pytest.raises(ValueError, match=message):
        cvar(values, alpha)


def test_errors_of_a_group_are_their_closed_forms():
    one = group(prompts(1)[0], 1.0, 1.0, 0.0, 1.0, None)  # what was not scored counts as nothing, not as 0
    assert pass_variance(one, 0.5) == pytest.approx(0.75 * 0.25)
    assert advantage(one, 0.5) == pytest.approx(2 * 0.75 * 0.25)  # of rewards 0 and 1, 2 p (1 - p)
    for sample, ensemble in zip(one.samples, [(0.0, 1.0), (1.0, 1.0), (None, 1.0), (0.0, 2.0), ()], strict=True):
        sample.rewards = {f"judge{i}": value for i, value in enumerate(ensemble)}
    assert disagreement(one, 0.5) == pytest.approx((0.5 + 0.0 + 1.0) / 3)
    one.samples = one.samples[2:3]
    assert disagreement(one, 0.5) is None  # one judge alone
    assert set(ERRORS) == {"pass_variance", "disagreement", "advantage"}


# WAKER


def test_waker_m_draws_by_the_boltzmann_distribution_of_its_standardised_errors():
    waker = Waker(VARIANCE, reduction=False, temperature=1.0, random_share=0.2, interval=10)
    waker.errors = {"a": 0.25, "b": 0.16, "c": 0.09}
    mean = 0.5 / 3
    std = math.sqrt(((0.25 - mean) ** 2 + (0.16 - mean) ** 2 + (0.09 - mean) ** 2) / 3)
    powers = [math.exp((x - mean) / (std + 1e-6)) for x in (0.25, 0.16, 0.09)]
    expected = [0.05 + 0.8 * power / sum(powers) for power in powers] + [0.05]  # d has no error yet
    assert waker.weights("abcd") == pytest.approx(expected, abs=1e-12)
    assert sum(waker.weights("abcd")) == pytest.approx(1.0)
    waker.temperature = 0.5
    powers = [power**2 for power in powers]
    assert waker.weights("abc") == pytest.approx([0.2 / 3 + 0.8 * power / sum(powers) for power in powers], abs=1e-12)
    assert waker.weights("d") == [1.0]


def test_wakers_error_is_a_running_mean_that_starts_at_the_first():
    waker = Waker(VARIANCE, reduction=False, temperature=1.0, random_share=0.2, interval=4)
    (one,) = prompts(1)
    for rate in (0.5, 0.1, 0.0):
        waker.observe("a", passing(one, rate))
    assert waker.errors == {"a": pytest.approx(0.75 * (0.75 * 0.25 + 0.25 * 0.09))}
    waker.error = lambda group: None
    waker.observe("a", passing(one, 0.5))
    assert waker.observed == 3


def test_waker_rs_changes_follow_the_recursion_by_hand_and_begin_after_five_intervals():
    errors = iter([0.2] * 10 + [0.1] * 2 + [0.4] * 2 + [0.0] * 2)
    waker = Waker(lambda group: next(errors), reduction=True, temperature=0.5, random_share=0.2, interval=2)
    means, at = [], {}
    for count in range(1, 17):
        waker.observe("a", None)
        means.append(waker.errors["a"])
        at[count] = dict(waker.changes)
    assert means[9] == pytest.approx(0.2)
    assert means[11] == pytest.approx(0.5 * (0.5 * 0.2 + 0.5 * 0.1) + 0.5 * 0.1)
    assert at[10] == {}  # the first errors to compare with
    assert at[11] == {}
    assert at[12] == {"a": pytest.approx(0.05 * (means[9] - means[11]))}
    assert at[13] == at[12]
    second = 0.95 * at[12]["a"] + 0.05 * (means[11] - means[13])
    assert at[14] == {"a": pytest.approx(second)}
    assert at[16] == {"a": pytest.approx(0.95 * second + 0.05 * (means[13] - means[15]))}


def test_waker_r_draws_by_the_boltzmann_distribution_of_changes_over_their_mean_size():
    waker = Waker(VARIANCE, reduction=True, temperature=0.5, random_share=0.2, interval=10)
    waker.errors = {"a": 0.25, "b": 0.0}
    assert waker.weights("ab") == [1.0, 1.0]  # no change is known yet
    waker.changes = {"a": 0.03, "b": -0.01}
    powers = [math.exp(0.03 / 0.02 / 0.5), math.exp(-0.01 / 0.02 / 0.5)]
    assert waker.weights("ab") == pytest.approx([0.1 + 0.8 * power / sum(powers) for power in powers])
    waker.changes = {"a": 0.0, "b": 0.0}
    assert waker.weights("ab") == pytest.approx([0.5, 0.5])


# The other rules


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_learnability_draws_by_a_power_of_the_variance_and_never_forgets_what_is_solved(power):
    rule = Learnability(0.5, power, random_share=0.2, interval=2)
    one, two, _ = prompts(3)
    for rate in (0.5, 0.1):
        rule.observe("a", passing(one, rate))
    rule.observe("b", passing(two, 1.0))
    assert rule.rates == {"a": pytest.approx(0.3), "b": 1.0}
    raw = [(0.3 * 0.7) ** power, 0.0, 0.25**power]  # c: not seen, as if half passed
    assert rule.weights("abc") == pytest.approx([0.2 / 3 + 0.8 * x / sum(raw) for x in raw])
    rule.rates = {"a": 1.0, "b": 0.0}
    assert rule.weights("ab") == [0.5, 0.5]


def test_difficulty_pools_weigh_a_bucket_by_its_last_mean_reward_up_to_and_with_a_threshold():
    rule = DifficultyPools((0.25, 0.75, 1.0), (0.2, 1.0, 0.3))
    one = prompts(1)[0]
    for reward, weight in ((0.0, 0.2), (0.25, 0.2), (0.26, 1.0), (0.75, 1.0), (0.8, 0.3), (1.0, 0.3), (7.0, 0.3)):
        rule.observe("a", group(one, 0.0, 1.0))
        rule.observe("a", group(one, reward, None))
        assert rule.weights("ab") == [weight, 1.0]
    shut = DifficultyPools((0.5, 1.0), (1.0, 0.0), {"a": 1.0})
    with pytest.raises(ValueError, match="pool_weights: expected a bucket in a pool with a weight above 0"):
        shut.weights("a")


def test_easy_to_hard_opens_one_level_after_the_other_over_the_run():
    rule = EasyToHard(["10", "2", "3"], total=9)
    seen = []
    for _ in range(11):
        seen.append(rule.weights(["2", "3", "10"]))
        rule.observe("2", None)
    assert seen == [[1.0, 0.0, 0.0]] * 3 + [[1.0, 1.0, 0.0]] * 3 + [[1.0, 1.0, 1.0]] * 5
    # Whatever is left, something is open.
    assert EasyToHard(["10", "2", "3"], total=9).weights(["10", "3"]) == [0.0, 1.0]
    with pytest.raises(ValueError, match="by: expected a column of numbers for easy_to_hard, got 'hard'"):
        EasyToHard(["1", "hard"], total=9)


# The sampler


def test_buckets_are_drawn_by_their_weights_and_prompts_of_a_bucket_in_epochs():
    waker = Waker(VARIANCE, reduction=False, temperature=1.0, random_share=0.2, interval=10)
    waker.errors = {"a": 0.25, "b": 0.16, "c": 0.09}
    curriculum = Curriculum(prompts(12), waker, ["task"], seed=0)
    for name, share in zip("abc", waker.weights("abc"), strict=True):
        # Five standard errors of a share of 6000 draws.
        assert drawn_shares(curriculum)[name] == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / 6000))
    for name in "abc":
        own = [prompt.index for prompt in curriculum.next(300) if prompt.columns["task"] == name]
        counts = Counter(own).values()
        assert len(counts) == 4
        assert max(counts) - min(counts) <= 2  # of an epoch that began before, and of one that has not ended


def test_domain_randomisation_draws_every_bucket_as_often_whatever_its_size_and_rewards():
    tasks = [Prompt(i, "", (i,), {"task": "a" if i < 27 else "b"}) for i in range(30)]
    curriculum = Curriculum(tasks, Rule(), ["task"], seed=0)
    curriculum.observe([passing(prompt, 1.0) for prompt in tasks])
    assert drawn_shares(curriculum)["a"] == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(6000))


def test_a_bucket_is_named_by_its_columns_and_without_any_by_the_prompt():
    assert [bucket_of(prompt, ["task", "level"]) for prompt in prompts(3)] == ["a/0", "b/1", "c/0"]
    assert [bucket_of(prompt, []) for prompt in prompts(2)] == ["0", "1"]
    with pytest.raises(ValueError, match="by: expected columns of every row; row 0 has 'task', 'level', got 'tasks'"):
        Curriculum(prompts(3), Rule(), ["tasks"], seed=0)


def test_numbers_say_the_next_probabilities():
    rule = Learnability(0.5, 1.0, random_share=0.0, interval=2)
    curriculum = Curriculum(prompts(6), rule, ["task"], seed=0)
    numbers = curriculum.observe([passing(prompts(6)[0], 0.1), passing(prompts(6)[1], 0.5)])
    total = 0.09 + 0.25 + 0.25
    shares = {"a": 0.09 / total, "b": 0.25 / total, "c": 0.25 / total}
    assert numbers == {f"curriculum/probability/{name}": pytest.approx(share) for name, share in shares.items()}


def test_groups_without_a_scored_sample_teach_nothing():
    curriculum = Curriculum(prompts(6), Learnability(0.5, 1.0, 0.0, 2), ["task"], seed=0, leave_out=0.9)
    before = curriculum.state_dict()
    curriculum.observe([group(prompts(6)[0], None, None)])
    assert curriculum.state_dict() == before


# No-positive-resampling


def test_a_prompt_is_left_out_of_later_epochs_once_its_history_passes_at_the_share():
    tasks = prompts(6)
    curriculum = Curriculum(tasks, Rule(), seed=3, leave_out=0.9, one_bucket=True)
    plain = PromptSampler(tasks, seed=3)
    assert curriculum.next(6) == plain.next(6)  # the first epoch is the plain one
    # 0: 8 of 10 and then 10 of 10 is 0.9 of all. 1: 10 of 10. 2: the last group passes, its history does not.
    numbers = curriculum.observe([passing(tasks[0], 0.8), passing(tasks[1], 1.0), passing(tasks[2], 0.2)])
    assert numbers == {"curriculum/left_out": 1.0, "curriculum/restarts": 0.0}
    curriculum.observe([passing(tasks[0], 1.0), passing(tasks[2], 1.0), passing(tasks[3], 0.8)])
    assert curriculum.left_out == {0, 1}
    later = curriculum.next(8)
    assert {prompt.index for prompt in later[:4]} == {prompt.index for prompt in later[4:]} == {2, 3, 4, 5}
    curriculum.observe([passing(tasks[1], 0.0)] * 5)  # for good
    assert curriculum.left_out == {0, 1}


def test_it_filters_any_curriculum_and_a_bucket_without_prompts_is_not_drawn():
    tasks = prompts(12)
    waker = Waker(VARIANCE, reduction=False, temperature=1.0, random_share=0.2, interval=10)
    curriculum = Curriculum(tasks, waker, ["task"], seed=0, leave_out=0.9)
    numbers = curriculum.observe([passing(prompt, 1.0) for prompt in tasks if prompt.columns["task"] != "b"][:7])
    assert numbers["curriculum/left_out"] == 7.0
    drawn = {prompt.index for prompt in curriculum.next(200)}
    assert drawn == {prompt.index for prompt in tasks} - curriculum.left_out
    curriculum.observe([passing(prompt, 1.0) for prompt in tasks if prompt.columns["task"] != "b"])
    assert drawn_shares(curriculum, 100) == {"b": 1.0}


def test_when_all_prompts_are_left_out_all_come_again_with_a_new_history_and_it_is_counted():
    tasks = prompts(3)
    curriculum = Curriculum(tasks, Rule(), ["task"], seed=0, leave_out=0.9)
    numbers = curriculum.observe([passing(prompt, 1.0) for prompt in tasks])
    assert (numbers["curriculum/left_out"], numbers["curriculum/restarts"]) == (0.0, 1.0)
    assert {prompt.index for prompt in curriculum.next(60)} == {0, 1, 2}
    assert curriculum.history == {}


# State


def rules():
    ensemble = {"temperature": 1.0, "random_share": 0.2, "interval": 2}
    return {
        "control": Rule,
        "waker_m": lambda: Waker(VARIANCE, reduction=False, **ensemble),
        "waker_r": lambda: Waker(VARIANCE, reduction=True, **ensemble),
        "learnability": lambda: Learnability(0.5, 1.0, 0.2, 2),
        "pools": lambda: DifficultyPools((0.25, 0.75, 1.0), (0.2, 1.0, 0.2)),
        "easy_to_hard": lambda: EasyToHard(["0", "1"], 60),
    }


@pytest.mark.parametrize("name", rules())
def test_a_sampler_that_was_saved_as_json_draws_and_observes_as_the_one_that_went_on(name):
    def fresh():
        by = ["level"] if name == "easy_to_hard" else ["task"]
        return Curriculum(prompts(30), rules()[name](), by, seed=1, leave_out=0.9)

    def step(curriculum, number):
        drawn = curriculum.next(5)
        rates = [(prompt.index * 7 + number) % 11 / 10 for prompt in drawn]
        numbers = curriculum.observe([passing(prompt, rate) for prompt, rate in zip(drawn, rates, strict=True)])
        return [prompt.index for prompt in drawn], numbers

    one, states = fresh(), []
    whole = []
    for number in range(12):
        states.append(json.dumps(one.state_dict()))
        whole.append(step(one, number))
    assert any(a != b for (a, _), (b, _) in pairwise(whole))
    other = fresh()
    for number in (7, 2, 11):  # forwards and back
        other.load_state_dict(json.loads(states[number]))
        assert [step(other, later) for later in range(number, 12)] == whole[number:]
        assert other.state_dict() == one.state_dict()


def test_a_state_is_a_copy_and_that_of_other_prompts_is_refused():
    curriculum = Curriculum(prompts(6), rules()["waker_m"](), ["task"], seed=0, leave_out=0.9)
    curriculum.observe([passing(prompts(6)[0], 0.5)])
    state = curriculum.state_dict()
    text = json.dumps(state)
    curriculum.observe([passing(prompt, 1.0) for prompt in prompts(6)])
    assert json.dumps(state) == text
    with pytest.raises(ValueError, match="state of the same prompts"):
        Curriculum(prompts(9), Rule(), ["task"], seed=0).load_state_dict(state)
