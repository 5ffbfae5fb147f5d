"""Weighted sums of rewards. Completions on which a reward fails are excluded; the run goes on.

A reward is any callable with TRL's signature (https://huggingface.co/docs/trl/grpo_trainer, "Using a custom reward
function"), sync or async, that returns one number per completion, or None where it does not apply:

    reward(prompts=, completions=, completion_ids=, trainer_state=, log_extra=, log_metric=, **columns)

A reward with an attribute `required` that is true always applies: where it returns None its value is missing, and the
completion has no reward. An exception in place of a value is a failure on that completion alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastrl import check
from fastrl.progress import Progress, unseen
from fastrl.rewards.call import call_rewards, defined, shown, silent, spot, told
from fastrl.types import Group, Messages, Prompt, Sample

Values = Sequence[float | None]
RewardFunc = Callable[..., Values] | Callable[..., Awaitable[Values]]
RESERVED = frozenset(
    ("prompt", "completion", "prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
)


LARGEST = 3.4028234663852886e38  # the largest float32, the dtype of rewards and advantages in training


class RewardFailure(RuntimeError):
    """A reward failed on more completions than the suite allows."""


@dataclass(frozen=True)
class Failure:
    """Completions on which a reward failed in the same way; they get no reward and are not trained on."""

    reward: str
    error: str  # the exception's type and text
    prompts: tuple[int, ...]  # `Prompt.index` of each completion
    total: int  # completions in the batch

    def __str__(self) -> str:
        first = f"first on prompt {self.prompts[0]}"
        return (
            f"reward {self.reward!r} failed on {len(self.prompts)} of {self.total} completions ({first}): {self.error}"
        )


class RewardSuite:
    """Reward functions and their weights: reward = sum_k weight_k reward_k over the rewards that apply.

    Args:
        funcs: called once with all completions of a rollout; async ones run concurrently with all others.
        weights: one per function; 1 each by default.
        max_failure_fraction: the share of completions on which a reward may fail before `score` raises.
        timeout: seconds that a reward may take for a batch; then it counts as failed on the whole batch. 0 is off. An
            async reward is cancelled. With a timeout, a sync reward runs in a thread, where it cannot use signals. A
            timed-out thread keeps running and may hold resources until the process ends.
    """

    def __init__(
        self,
        funcs: Sequence[RewardFunc],
        weights: Sequence[float] | None = None,
        *,
        max_failure_fraction: float = 0.5,
        timeout: float = 0.0,
    ) -> None:
        self.funcs = list(funcs)
        self.weights = [1.0] * len(self.funcs) if weights is None else [float(weight) for weight in weights]
        self.names = [reward_name(func) for func in self.funcs]
        self.max_failure_fraction = max_failure_fraction
        self.timeout = timeout
        self._required = {name for name, func in zip(self.names, self.funcs, strict=True) if _is_required(func)}
        op = "RewardSuite"
        check.require(len(self.funcs) > 0, op, "funcs", "at least one reward", "none")
        check.require(
            len(self.weights) == len(self.funcs),
            op,
            "weights",
            f"{len(self.funcs)}, one per reward",
            len(self.weights),
        )
        check.require(all(map(math.isfinite, self.weights)), op, "weights", "finite numbers", self.weights)
        check.require(0 <= max_failure_fraction <= 1, op, "max_failure_fraction", "0 to 1", max_failure_fraction)
        check.require(0 <= timeout < math.inf, op, "timeout", "seconds, or 0 (off)", timeout)
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        check.require(
            not twice, op, "funcs", "different names", f"{', '.join(twice)} twice", "Set __name__ on one of them."
        )

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Shows the prompts to the rewards that have a method `check_prompts`, before the first step.

        Raises:
            ValueError: a reward cannot judge the answers to one of them.
        """
        for func in self.funcs:
            if hasattr(func, "check_prompts"):
                func.check_prompts(prompts)  # ty: ignore[not-callable]

    def score(
        self,
        groups: Sequence[Group],
        *,
        trainer_state: Any = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        progress: Progress = unseen,
    ) -> list[Failure]:
        """Fills in `rewards` and `reward` of every sample, and returns the failures.

        If a reward raises on the batch, it is called again for each completion alone, without logging, and only those
        on which it raises fail. Values or sums that are not finite float32 numbers fail too. A reward that does not
        return one value per completion in time fails on all. `Sample.reward` is None if no reward applies, or if one
        failed, because a sum that lacks a term is not comparable. `progress` is called before each reward.

        Raises:
            RewardFailure: a reward failed on more than `max_failure_fraction` of the completions.
        """
        pairs = [(group, sample) for group in groups for sample in group.samples]
        if not pairs:
            return []
        arguments = _arguments(pairs)
        extras = {
            "trainer_state": trainer_state,
            "log_extra": log_extra or silent,
            "log_metric": log_metric or silent,
        }
        timeout = self.timeout or math.inf
        results = call_rewards(self.funcs, self.names, arguments, extras, progress, timeout=timeout)
        failures, failed = [], [False] * len(pairs)
        for _, sample in pairs:
            sample.rewards = {}
        for func, name, result in zip(self.funcs, self.names, results, strict=True):
            errors = [_record(sample, func, name, value) for (_, sample), value in zip(pairs, result, strict=True)]
            failed = [before or error is not None for before, error in zip(failed, errors, strict=True)]
            found = _grouped(name, errors, pairs)
            self._require_few(name, found, len(pairs))
            failures += found
        errors = [self._add_up(sample, lost) for (_, sample), lost in zip(pairs, failed, strict=True)]
        found = _grouped(" + ".join(self.names), errors, pairs)
        self._require_few(" + ".join(self.names), found, len(pairs))
        return failures + found

    def _add_up(self, sample: Sample, lost: bool) -> str | None:
        """Sets the sample's reward; returns what is wrong with the sum, if anything."""
        terms = [
            weight * value
            for name, weight in zip(self.names, self.weights, strict=True)
            if (value := sample.rewards[name]) is not None
        ]
        sample.reward = None
        missing = any(sample.rewards[name] is None for name in self._required)
        if lost or missing or not terms:
            return None
        total = sum(terms) if max(map(abs, terms)) > LARGEST else math.fsum(terms)  # fsum raises where sum overflows
        if not abs(total) <= LARGEST:
            return f"expected a weighted sum that float32 holds, got {total:g}"
        sample.reward = total
        return None

    def _require_few(self, name: str, failures: list[Failure], total: int) -> None:
        count = sum(len(failure.prompts) for failure in failures)
        if count > self.max_failure_fraction * total:
            most = max(failures, key=lambda failure: len(failure.prompts))
            raise RewardFailure(
                f"reward {name!r} failed on {count} of {total} completions, more than max_failure_fraction = "
                f"{self.max_failure_fraction:g} allows; most often with {most.error}"
            )


def reward_name(func: RewardFunc) -> str:
    """The name under which a reward is logged: its `__name__`, or its class's."""
    if isinstance(func, functools.partial):
        return reward_name(func.func)
    return getattr(func, "__name__", None) or type(func).__name__


def _is_required(func: RewardFunc) -> bool:
    return bool(getattr(func.func if isinstance(func, functools.partial) else func, "required", False))


def _arguments(pairs: Sequence[tuple[Group, Sample]]) -> dict[str, list[Any]]:
    """The keyword arguments with one value per completion; a missing column is None."""
    prompts = [group.prompt for group, _ in pairs]
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns if name not in RESERVED)
    columns = {
        "prompts": [prompt.content for prompt in prompts],
        "completions": [_completion(group, sample) for group, sample in pairs],
        "completion_ids": [list(sample.token_ids) for _, sample in pairs],
    } | {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
    if any("turn_rewards" in sample.extra for _, sample in pairs):
        columns["turn_rewards"] = [list(sample.extra.get("turn_rewards") or []) for _, sample in pairs]
    return columns


def _completion(group: Group, sample: Sample) -> str | Messages:
    """As TRL passes it: text after a text, else messages, of which a conversation with an environment has several."""
    if isinstance(group.prompt.content, str):
        return sample.text
    return list(sample.extra.get("messages") or [{"role": "assistant", "content": sample.text}])


def _record(sample: Sample, func: RewardFunc, name: str, value: Any) -> str | None:
    """Stores a reward's value in its sample; returns what is wrong with it, if anything."""
    sample.rewards[name] = None
    if value is None:
        return None
    if isinstance(value, Exception):
        return told(value, func)
    where = f"({spot(*defined(func))})"
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except OverflowError:
        return f"expected a number that float32 holds, got one of type {type(value).__name__} beyond it {where}"
    except (TypeError, ValueError, RuntimeError):  # the last from a tensor of several numbers
        number = math.nan
    if not abs(number) <= LARGEST:
        got = shown(value) if math.isnan(number) else f"{number:g}"
        return f"expected a finite number that float32 holds, or None, got {got} {where}"
    sample.rewards[name] = number
    return None


def _grouped(name: str, errors: Sequence[str | None], pairs: Sequence[tuple[Group, Sample]]) -> list[Failure]:
    places: dict[str, list[int]] = {}
    for error, (group, _) in zip(errors, pairs, strict=True):
        if error is not None:
            places.setdefault(error, []).append(group.prompt.index)
    return [Failure(name, error, tuple(prompts), len(pairs)) for error, prompts in places.items()]
