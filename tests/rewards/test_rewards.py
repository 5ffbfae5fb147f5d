import asyncio
import functools
import json
import math
import os
import re
import signal
import sys
import threading
import time
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from fastrl.rewards import RewardFailure, RewardSuite, resolve_reward
from fastrl.types import Group, Prompt, Sample

CHAT = [{"role": "user", "content": "q"}]


def group(*texts, index=0, content="q", **columns):
    samples = [Sample([place, 9], [0.0, 0.0], True, text) for place, text in enumerate(texts)]
    return Group(Prompt(index, content, (1,), columns), samples)


def rewards(groups):
    return [sample.reward for one in groups for sample in one.samples]


def line_of(func):
    return func.__code__.co_firstlineno


def length(completions, **kwargs):
    return [float(len(text)) for text in completions]


def test_a_reward_gets_trls_arguments_and_one_value_of_each_column_per_completion():
    seen = {}

    def spy(**kwargs):
        seen.update(kwargs)
        return [0.0] * len(kwargs["completions"])

    groups = [group("a", "b", answer=3, prompts="clash"), group("c", index=1, content=CHAT, level="hard")]
    RewardSuite([spy]).score(groups, trainer_state="state", log_metric=print)
    assert seen.pop("log_metric") is print
    assert callable(seen.pop("log_extra"))
    assert seen == {
        "prompts": ["q", "q", CHAT],
        "completions": ["a", "b", [{"role": "assistant", "content": "c"}]],
        "completion_ids": [[0, 9], [1, 9], [0, 9]],
        "answer": [3, 3, None],
        "level": [None, None, "hard"],
        "trainer_state": "state",
    }


def test_a_reward_may_change_its_arguments_without_the_next_one_seeing_it():
    def greedy(completions, **kwargs):
        return [0.0 for _ in range(len(completions)) if completions.pop() is not None]

    groups = [group("a", "bb")]
    assert RewardSuite([greedy, length]).score(groups) == []
    assert rewards(groups) == [1.0, 2.0]


def test_the_reward_is_the_weighted_sum_of_those_that_apply():
    def first_only(completions, **kwargs):
        return [5, *[None] * (len(completions) - 1)]

    def never(completions, **kwargs):
        return [None] * len(completions)

    groups = [group("a", "bb", "ccc")]
    assert RewardSuite([length, first_only, never], [2.0, -1.0, 7.0]).score(groups) == []
    assert rewards(groups) == [2.0 - 5.0, 4.0, 6.0]
    assert groups[0].samples[0].rewards == {"length": 1.0, "first_only": 5.0, "never": None}
    assert RewardSuite([never]).score(groups) == []
    assert rewards(groups) == [None] * 3
    assert groups[0].samples[0].rewards == {"never": None}, "rewards of an earlier suite were kept"


def test_a_reward_that_raises_loses_only_the_completions_on_which_it_raises():
    def careful(completions, **kwargs):
        return [1.0 / len(text) for text in completions]

    groups = [group("aa", "", index=4), group("", "aaaa", index=7)]
    (failure,) = RewardSuite([careful, length]).score(groups)
    assert rewards(groups) == [0.5 + 2, None, None, 0.25 + 4]
    assert groups[0].samples[1].rewards == {"careful": None, "length": 0.0}
    assert (failure.reward, failure.prompts, failure.total) == ("careful", (4, 7), 4)
    assert str(failure) == (
        "reward 'careful' failed on 2 of 4 completions (first on prompt 4): ZeroDivisionError: float division by zero "
        f"(test_rewards.py, line {line_of(careful) + 1})"
    )


def test_a_failure_in_a_library_is_told_with_the_line_of_the_reward_that_called_it():
    def parsing(completions, **kwargs):
        return [json.loads(text) for text in completions]

    (failure,) = RewardSuite([functools.partial(parsing)], max_failure_fraction=1.0).score([group("{")])
    assert failure.error.startswith("JSONDecodeError: Expecting property name")
    assert failure.error.endswith(f"(test_rewards.py, line {line_of(parsing) + 1})")


@pytest.mark.parametrize(
    "bad", [math.nan, math.inf, "good", "1", [1.0], 1e39, -1e39, 1 + 1j, torch.ones(2)], ids=lambda bad: f"{bad}"
)
def test_values_that_are_no_finite_float32_numbers_are_failures(bad):
    def sometimes(completions, **kwargs):
        return [bad, *[1.0] * (len(completions) - 1)]

    groups = [group("a", "b")]
    (failure,) = RewardSuite([sometimes]).score(groups)
    assert rewards(groups) == [None, 1.0]
    assert failure.error.startswith(f"expected a finite number that float32 holds, or None, got {bad!r:.80} (")
    assert failure.error.endswith(f"(test_rewards.py, line {line_of(sometimes)})")


@pytest.mark.parametrize("bad", [10**400, 10**5000, Fraction(10) ** 400], ids=["400 digits", "5000 digits", "fraction"])
def test_numbers_beyond_float_are_failures(bad):
    groups = [group("a", "b")]
    (failure,) = RewardSuite([lambda completions, **kwargs: [1.0, bad]]).score(groups)
    assert rewards(groups) == [1.0, None]
    assert f"of type {type(bad).__name__} beyond it" in failure.error


@pytest.mark.parametrize("bad", [1e300, 10**300, np.float64(1e300)], ids=["float", "int", "numpy"])
def test_a_number_of_hundreds_of_digits_is_told_in_short(bad):
    (failure,) = RewardSuite([lambda completions, **kwargs: [1.0, bad]]).score([group("a", "b")])
    assert "or None, got 1e+300 (" in failure.error


@pytest.mark.parametrize("value", [2e38, 3e38])
def test_a_sum_beyond_float32_is_a_failure_of_the_sum(value):
    def one(completions, **kwargs):
        return [value, 1.0, value]

    def two(completions, **kwargs):
        return [value, 1.0, -value]

    groups = [group("a", "b", "c")]
    (failure,) = RewardSuite([one, two]).score(groups)
    assert rewards(groups) == [None, 2.0, 0.0]
    assert (failure.reward, failure.prompts) == ("one + two", (0,))
    assert failure.error == f"expected a weighted sum that float32 holds, got {2 * value:g}"


def test_a_reward_that_calls_exit_fails_and_the_run_goes_on():
    def quits(completions, **kwargs):
        if "bad" in completions:
            sys.exit("no key")
        return [1.0] * len(completions)

    async def quits_late(completions, **kwargs):
        await asyncio.sleep(0)
        return quits(completions)

    for reward in (quits, quits_late, quits_late):  # the last: the loop of async rewards lives
        groups = [group("a", "bad")]
        (failure,) = RewardSuite([reward]).score(groups)
        assert rewards(groups) == [1.0, None]
        assert failure.error == f"SystemExit(no key) (test_rewards.py, line {line_of(quits) + 2})"


def test_an_async_reward_that_is_cancelled_fails():
    async def cancelled(completions, **kwargs):
        raise asyncio.CancelledError("by its client")

    (failure,) = RewardSuite([cancelled], max_failure_fraction=1.0).score([group("a")])
    assert failure.error.startswith("CancelledError(by its client) (")


@pytest.mark.parametrize(
    "values", [torch.tensor([True, False]), np.array([1, 0]), (np.float16(1), torch.tensor(0)), [1, Decimal(0)]]
)
def test_numbers_of_any_kind_are_taken(values):
    groups = [group("a", "b")]
    assert RewardSuite([lambda completions, **kwargs: values]).score(groups) == []
    assert rewards(groups) == [1.0, 0.0]


def test_past_the_allowed_share_of_failures_the_most_common_error_is_raised():
    def outage(completions, **kwargs):
        if completions[0] == "odd":
            raise KeyError("other")
        raise ConnectionError("judge is down")

    groups = [group("a", "b", "odd", "")]
    with pytest.raises(RewardFailure, match=r"'outage' failed on 4 of 4 .* most often with ConnectionError: judge is"):
        RewardSuite([length, outage]).score(groups)
    assert len(RewardSuite([outage], max_failure_fraction=1.0).score(groups)) == 2


def test_exactly_the_allowed_share_may_fail():
    def half(completions, **kwargs):
        return [math.nan, 1.0]

    assert len(RewardSuite([half], max_failure_fraction=0.5).score([group("a", "b")])) == 1
    with pytest.raises(RewardFailure, match=r"failed on 1 of 2 completions, more than max_failure_fraction = 0\.49"):
        RewardSuite([half], max_failure_fraction=0.49).score([group("a", "b")])


@pytest.mark.parametrize(
    ("result", "got"),
    [
        ([1.0], "1 values"),
        (None, "None"),
        ([1.0] * 3, "3 values"),
        ("11", "'11'"),
        (b"11", "b'11'"),
        ({"a": 1.0, "b": 2.0}, "{'a': 1.0, 'b': 2.0}"),
        (torch.tensor(1.0), "tensor(1.)"),
        (torch.ones(2, 1), "tensor([[1.],"),
        (1.0, "1.0"),
    ],
)
def test_what_is_not_one_value_per_completion_fails_on_all_with_the_rewards_name_and_place(result, got):
    def short(**kwargs):
        return result

    error = rf"return value: expected a list of 2, .* got {re.escape(got)}.*\. Return None .*"
    place = rf"\(test_rewards.py, line {line_of(short)}\)"
    with pytest.raises(RewardFailure, match=rf"(?s)reward 'short' failed on 2 of 2 .* with {error} {place}"):
        RewardSuite([short]).score([group("a", "b")])
    (failure,) = RewardSuite([short], max_failure_fraction=1.0).score([group("a", "b")])
    assert failure.prompts == (0, 0)


@pytest.mark.parametrize(
    ("funcs", "options", "message"),
    [
        ([], {}, "at least one reward"),
        ([length], {"weights": [1.0, 2.0]}, "weights: expected 1, one per reward, got 2"),
        ([length], {"weights": [math.nan]}, "finite numbers"),
        ([length, length], {}, "different names, got length twice"),
        ([length], {"max_failure_fraction": 1.5}, "max_failure_fraction: expected 0 to 1"),
        ([length], {"timeout": -1.0}, "timeout: expected seconds, or 0"),
        ([length], {"timeout": math.nan}, "timeout: expected seconds, or 0"),
    ],
)
def test_a_suite_that_cannot_work_is_refused(funcs, options, message):
    with pytest.raises(ValueError, match=message):
        RewardSuite(funcs, **options)


def test_nothing_to_score_is_no_failure():
    assert RewardSuite([length]).score([]) == []


def test_async_rewards_run_concurrently_with_each_other_and_with_sync_ones():
    meeting = threading.Barrier(2, timeout=60)
    met = []

    async def first(completions, **kwargs):
        event.set()
        return [1.0] * len(completions)

    async def second(completions, **kwargs):
        await asyncio.wait_for(event.wait(), 60)
        await asyncio.get_running_loop().run_in_executor(None, meeting.wait)
        return [2.0] * len(completions)

    def sync(completions, **kwargs):
        met.append(meeting.wait())
        assert threading.current_thread() is threading.main_thread()
        return [4.0] * len(completions)

    event = asyncio.Event()
    groups = [group("a", "b")]
    assert RewardSuite([sync, second, first]).score(groups) == []
    assert rewards(groups) == [7.0, 7.0]
    assert len(met) == 1


def test_async_rewards_fail_completion_by_completion_too():
    class Judge:
        async def __call__(self, completions, **kwargs):
            await asyncio.sleep(0)
            if "bad" in completions:
                raise RuntimeError("refused")
            return [1.0] * len(completions)

    groups = [group("a", "bad", "c")]
    (failure,) = RewardSuite([Judge()]).score(groups)
    assert rewards(groups) == [1.0, None, 1.0]
    assert failure.reward == "Judge"
    assert failure.error == f"RuntimeError: refused (test_rewards.py, line {line_of(Judge.__call__) + 3})"


@pytest.fixture
def release():
    """What keeps a reward from answering until the test is over."""
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize("kind", ["async", "sync"])
def test_a_reward_that_does_not_answer_in_time_fails_on_all_completions_and_is_not_asked_again(release, kind):
    calls, cancelled = [], []

    def hangs(completions, **kwargs):
        calls.append(len(completions))
        release.wait(60)
        return [1.0] * len(completions)

    async def hangs_async(completions, **kwargs):
        calls.append(len(completions))
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            release.set()
            raise

    reward = hangs if kind == "sync" else hangs_async
    groups = [group("a", "b", index=5)]
    (failure,) = RewardSuite([length, reward], max_failure_fraction=1.0, timeout=0.2).score(groups)
    assert rewards(groups) == [None, None]
    assert [sample.rewards for sample in groups[0].samples] == [{"length": 1.0, reward.__name__: None}] * 2
    left = "; its thread was abandoned, and may still run" if kind == "sync" else ""
    assert str(failure) == (
        f"reward {reward.__name__!r} failed on 2 of 2 completions (first on prompt 5): no answer within 0.2 s{left} "
        f"(test_rewards.py, line {line_of(reward)})"
    )
    assert calls == [2]
    assert kind == "sync" or (release.wait(60) and cancelled)
    with pytest.raises(RewardFailure, match=r"failed on 2 of 2 completions.* no answer within 0\.2 s"):
        RewardSuite([reward], timeout=0.2).score(groups)


def test_an_abandoned_reward_that_answers_after_all_is_not_heard(release, monkeypatch):
    def late(completions, log_metric, **kwargs):
        release.wait(60)
        return [1.0] * len(completions)

    raised, groups = [], [group("a")]
    monkeypatch.setattr(threading, "excepthook", raised.append)
    RewardSuite([late], max_failure_fraction=1.0, timeout=0.2).score(groups)
    threads = [thread for thread in threading.enumerate() if thread.name == "fastrl-reward"]
    release.set()
    for thread in threads:
        thread.join(60)
    assert threads
    assert raised == []
    assert rewards(groups) == [None]


@pytest.mark.parametrize("kind", ["async", "sync"])
def test_the_calls_for_single_completions_have_the_timeout_together(release, kind):
    calls = []

    def odd(completions, **kwargs):
        calls.append(completions)
        if len(completions) > 1:
            raise RuntimeError("one by one, please")
        if completions == ["hang"]:
            release.wait(60)
        return [1.0]

    async def odd_async(completions, **kwargs):
        calls.append(completions)
        if len(completions) > 1:
            raise RuntimeError("one by one, please")
        if completions == ["hang"]:
            await asyncio.sleep(60)
        return [1.0]

    groups = [group("a", "hang", "hang", "b")]
    suite = RewardSuite([odd if kind == "sync" else odd_async], max_failure_fraction=1.0, timeout=0.5)
    (failure,) = suite.score(groups)
    assert "no answer within 0.5 s" in failure.error
    # One thread after the other: nothing is begun once the time is up. The async ones run at the same time.
    assert rewards(groups) == [1.0, None, None, None if kind == "sync" else 1.0]
    assert len(calls) == (3 if kind == "sync" else 5)


def test_the_calls_for_single_completions_have_a_timeout_of_their_own():
    def slow(completions, **kwargs):
        time.sleep(1.2 if len(completions) > 1 or completions == ["slow"] else 0.0)
        if "bad" in completions:
            raise RuntimeError("refused")
        return [1.0] * len(completions)

    groups = [group("bad", "slow", "quick")]
    (failure,) = RewardSuite([slow], timeout=2.0).score(groups)
    assert failure.error.startswith("RuntimeError: refused")
    assert rewards(groups) == [None, 1.0, 1.0]


def test_with_a_timeout_rewards_that_answer_or_fail_do_as_without(release):
    def quick(completions, **kwargs):
        assert threading.current_thread().daemon
        return [float(len(text)) for text in completions]

    def fails(completions, **kwargs):
        return [1.0 / len(text) for text in completions]

    def own_timeout(completions, **kwargs):
        if "bad" in completions:
            raise TimeoutError("the judge's own")
        return [0.0] * len(completions)

    def quits(completions, **kwargs):
        if "" in completions:
            sys.exit(3)
        return [0.0] * len(completions)

    groups = [group("a", "", "bad")]
    suite = RewardSuite([quick, fails, own_timeout, quits], max_failure_fraction=1.0, timeout=60.0)
    failures = suite.score(groups)
    assert rewards(groups) == [2.0, None, None]
    assert [failure.error.split(" (")[0] for failure in failures] == [
        "ZeroDivisionError: float division by zero",
        "TimeoutError: the judge's own",
        "SystemExit(3)",
    ]
    assert f"line {line_of(fails) + 1})" in failures[0].error


def test_after_an_async_reward_timed_out_the_next_call_of_others_is_answered():
    async def hangs(completions, **kwargs):
        await asyncio.sleep(60)

    async def answers(completions, **kwargs):
        await asyncio.sleep(0)
        return [2.0] * len(completions)

    groups = [group("a")]
    assert len(RewardSuite([hangs, answers], max_failure_fraction=1.0, timeout=0.2).score(groups)) == 1
    assert groups[0].samples[0].rewards == {"hangs": None, "answers": 2.0}
    assert RewardSuite([answers], timeout=60.0).score(groups) == []
    assert rewards(groups) == [2.0]


def test_async_rewards_work_inside_a_running_event_loop():
    async def one(completions, **kwargs):
        return [1.0] * len(completions)

    async def notebook():
        groups = [group("a")]
        RewardSuite([one]).score(groups)
        return rewards(groups)

    assert asyncio.run(notebook()) == [1.0]


def test_repeated_calls_log_nothing():
    logged = []

    def chatty(completions, log_extra, log_metric, **kwargs):
        log_extra("texts", completions)
        log_metric("count", len(completions))
        return [1.0 / len(text) for text in completions]

    RewardSuite([chatty]).score(
        [group("a", "")], log_extra=lambda *args: logged.append(args), log_metric=lambda *args: logged.append(args)
    )
    assert logged == [("texts", ["a", ""]), ("count", 2)]


def test_rewards_are_resolved_by_name_with_their_options(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def fixed(completions, value=1.0, **kwargs):\n    return [value] * len(completions)\n"
        "class Scaled:\n    def __init__(self, by): self.by = by\n"
        "    def __call__(self, completions, **kwargs): return [self.by] * len(completions)\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    suite = RewardSuite(
        [
            resolve_reward("my_rewards:fixed", value=2.0),
            resolve_reward("my_rewards:Scaled", by=4.0),
            resolve_reward("format", pattern="a+"),
        ]
    )
    groups = [group("aa", "b")]
    assert suite.score(groups) == []
    assert suite.names == ["fixed", "Scaled", "format"]
    assert rewards(groups) == [7.0, 6.0]


@pytest.mark.parametrize(("limit", "cache"), [(16, 4), (16, 16), (5, 0)])
def test_soft_overlong_is_trls_at_every_length(limit, cache):
    from trl.rewards import get_soft_overlong_punishment

    ids = [[0] * length for length in range(20)]
    ours = resolve_reward("soft_overlong", max_tokens=limit, cache=cache)
    assert ours(completion_ids=ids) == get_soft_overlong_punishment(limit, cache)(ids)
    assert (ours([ids[limit]]), ours([ids[limit + 1]])) == ([-1.0 if cache else 0.0], [-1.0])
    groups = [group("a", "b")]
    assert RewardSuite([ours]).score(groups) == []
    assert rewards(groups) == ours([[0, 9]] * 2)  # the tokens of each sample


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("formatt", {}, r"got 'formatt'\. Did you mean 'format'\?"),
        ("no_such_module:f", {}, "'no_such_module:f' cannot be imported: No module named 'no_such_module'"),
        ("math:no_such", {}, "module 'math' has no attribute 'no_such'"),
        ("math:pi", {}, r"expected a function or class, got math:pi = 3\.14"),
        ("reasoning_gym", {"extracts": "full"}, "expected some of extract, strict, allow_eval for reasoning_gym"),
        ("reasoning_gym", {"extract": "last"}, r"extract: expected one of last_number, .* got 'last'\."),
        ("format", {"pattern": "("}, r"format: pattern: expected a regular expression, got '\('"),
        ("soft_overlong", {}, "expected some of max_tokens, cache for soft_overlong, got missing a required argument"),
        ("soft_overlong", {"max_tokens": 8, "cache": 9}, "soft_overlong: cache: expected 0 to max_tokens = 8, got 9"),
    ],
)
def test_unknown_rewards_and_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        resolve_reward(name, **options)


THINK = "<think>2 and 2</think>\n<answer>4</answer>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (THINK, 1.0),
        (f"\n{THINK} ", 1.0),
        ("<think></think><answer></answer>", 1.0),
        (f"Well: {THINK}", 0.0),
        (f"{THINK} as I said", 0.0),
        ("<answer>4</answer>", 0.0),
        ("<think>a</think><answer>4", 0.0),
        ("<think>a<answer>1</answer></think><answer>4</answer>", 0.0),
        ("<think>a</think><answer>3</answer><answer>4</answer>", 0.0),
        ("<think>" * 20000, 0.0),
    ],
)
def test_format_wants_each_tag_once_and_nothing_else(text, expected):
    reward = resolve_reward("format")
    assert reward(completions=[text, [{"role": "assistant", "content": text}]]) == [expected, expected]


@pytest.fixture
def compared():
    """math_answer of one completion against one gold answer."""
    reward = resolve_reward("math_answer", timeout_s=100.0)  # a busy machine is no wrong answer
    return lambda gold, text: reward(completions=[text], answer=[gold])[0]


@pytest.mark.parametrize(
    ("gold", "text", "expected"),
    [
        ("72", "She has $72$ apples.", 1.0),
        ("72", "She has 72 apples.", 1.0),
        ("48 + 24 = <<48+24=72>>72\n#### 72", r"Thus \boxed{72}", 1.0),
        ("72", "27", 0.0),
        ("72", "I do not know.", 0.0),
        (r"\frac{1}{2}", "0.5", 1.0),
        (r"$\frac{1}{2}$", r"\boxed{\frac{2}{4}}", 1.0),
        ("1,234", "1234", 1.0),
        (-3, "-3", 1.0),
        ("", "7", None),
        (None, "7", None),
    ],
)
def test_math_answers_are_compared_by_value(compared, gold, text, expected):
    assert compared(gold, text) == expected


def test_the_gold_answer_may_be_in_the_column_solution_and_has_to_be_somewhere():
    reward = resolve_reward("math_answer")
    assert reward(completions=["4"], solution=["4"]) == [1.0]
    with pytest.raises(ValueError, match="in a column answer or solution, got neither"):
        reward(completions=["4"])


def test_math_answers_are_compared_off_the_main_thread_and_leave_the_alarm_alone(compared):
    before = signal.getsignal(signal.SIGALRM)
    results = []
    thread = threading.Thread(target=lambda: results.append(compared("4", "4")))
    thread.start()
    thread.join()
    assert results == [1.0]
    assert signal.getsignal(signal.SIGALRM) is before


def test_an_expression_that_takes_forever_is_wrong_and_the_next_one_is_judged(compared):
    from fastrl.rewards.math_answer import _verifier

    assert compared("7", "7") == 1.0
    impatient = resolve_reward("math_answer", timeout_s=1.0)
    assert impatient(completions=["$9^{9^{9^{9}}}$"], answer=["7"]) == [0.0]
    assert _verifier()._process is None  # it was stopped
    assert compared("7", "7") == 1.0


def test_ctrl_c_in_a_terminal_does_not_reach_the_verifier(compared):
    """A terminal signals every process of the foreground group."""
    from fastrl.rewards.math_answer import _verifier

    assert compared("7", "7") == 1.0
    assert os.getpgid(_verifier()._process.pid) != os.getpgrp()


def test_a_verifier_that_was_killed_is_started_again(compared):
    from fastrl.rewards.math_answer import _verifier

    assert compared("7", "7") == 1.0
    os.kill(_verifier()._process.pid, signal.SIGKILL)
    compared("7", "7")
    assert compared("7", "7") == 1.0
    assert compared("7", "8") == 0.0


def test_a_reward_may_be_in_a_file_or_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_here.py").write_text("def vowels(completions, **_):\n    return [len(c) for c in completions]\n")
    for name in ("mine_here:vowels", "./mine_here.py:vowels", str(tmp_path / "mine_here.py") + ":vowels"):
        assert resolve_reward(name)(["abc"]) == [3]
    with pytest.raises(ValueError, match=r"'\./gone\.py:vowels' cannot be imported"):
        resolve_reward("./gone.py:vowels")
    (tmp_path / "broken.py").write_text("def f(:")
    with pytest.raises(ValueError, match="cannot be imported"):
        resolve_reward("./broken.py:f")
