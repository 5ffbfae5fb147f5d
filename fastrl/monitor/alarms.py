"""Warnings that a run is not learning, each given once."""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from statistics import fmean, median
from typing import NamedTuple

from fastrl.monitor.units import number

PATIENCE = 3  # steps in a row, because one unlucky batch means nothing
FIRST = 3  # first steps whose mean is the run's starting value
RECENT = 10  # earlier steps that a spike is compared with
SPIKE = 10.0
FAR = 0.2  # share of tokens whose probability differs by a tenth, at the same weights
STALE = 8.0  # updates, as many as ScaleRL's PipelineRL allows (arXiv:2510.13786)


class Sign(NamedTuple):
    """A symptom in a step, and what to do about it."""

    active: bool
    advice: str
    patience: int = PATIENCE


class Alarms:
    """Watches the metrics of each step."""

    def __init__(self) -> None:
        self._streak: Counter[str] = Counter()
        self._said: set[str] = set()
        self._first: dict[str, list[float]] = defaultdict(list)
        self._recent: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))

    def check(self, step: int, metrics: dict[str, float]) -> Iterator[str]:
        """The warnings that are new at this step."""
        for name, value in metrics.items():
            if not math.isfinite(value) and name not in self._said:
                self._said.add(name)
                yield f"Step {step}: {name} is {value}."
        for name, sign in (_signs(metrics) | self._changes(metrics)).items():
            self._streak[name] = self._streak[name] + 1 if sign.active else 0
            if self._streak[name] == sign.patience and name not in self._said:
                self._said.add(name)
                steps = f"Step {step}" if sign.patience == 1 else f"Steps {step - sign.patience + 1} to {step}"
                yield f"{steps}: {sign.advice}"

    def _changes(self, metrics: dict[str, float]) -> dict[str, Sign]:
        """Symptoms that show only in comparison with earlier steps."""
        length, entropy = metrics.get("completions/mean_length"), metrics.get("sampling/entropy")
        first = {name: fmean(values) for name, values in self._first.items() if len(values) == FIRST}
        signs = {}
        if length is not None and "completions/mean_length" in first:
            began = first["completions/mean_length"]
            signs["length collapse"] = Sign(
                length < began / 3,
                f"completions have {length:.1f} tokens, a third or less of the {began:.1f} they began with. Read some: "
                "usually the reward pays for short answers.",
            )
        if entropy is not None and "sampling/entropy" in first:
            began = first["sampling/entropy"]
            signs["entropy collapse"] = Sign(
                entropy < 0.1 * began,
                f"the entropy is {entropy:.3f} nats per token, a tenth or less of the {began:.3f} it began with: the "
                "policy no longer explores. If the reward is still too low, lower the learning rate or add "
                "loss.entropy_coef.",
            )
        for name, where in (("grad_norm", "optimizer.max_grad_norm holds it"), ("kl", "loss.kl.coef holds it")):
            value, before = metrics.get(name), self._recent[name]
            if value is not None and len(before) == RECENT:
                usual = median(before)
                active = math.isfinite(value) and value > SPIKE * usual > 0
                advice = (
                    f"{name} is {value:.3g}, more than {SPIKE:.0f} times the {usual:.3g} of the steps before; {where}."
                )
                signs[f"{name} spike"] = Sign(active, advice, patience=1)
        for name, value in metrics.items():
            if math.isfinite(value):
                self._recent[name].append(value)
                if len(self._first[name]) < FIRST:
                    self._first[name].append(value)
        return signs


def _signs(metrics: dict[str, float]) -> dict[str, Sign]:
    equal = metrics.get("frac_reward_zero_std", 0.0)
    cut = metrics.get("completions/clipped_ratio", 0.0)
    mismatch = metrics.get("sampling/sampling_logp_difference/mean", 0.0)
    outside, fresh = metrics.get("sampling/outside_share", 0.0), metrics.get("sampling/staleness", 0.0) == 0
    return {
        "equal rewards": Sign(
            equal >= 1.0,
            "all completions of each prompt got the same reward, so there is nothing to learn from. "
            "Choose an easier or harder task, more samples per prompt, or a higher temperature.",
        ),
        "few groups": Sign(
            0.9 <= equal < 1.0,
            f"for {equal:.0%} of the prompts all completions got the same reward, so there is little left to learn. "
            "Choose another task, or replace such prompts with rollout.dynamic_sampling.",
        ),
        "stale": Sign(
            metrics.get("sampling/staleness", 0.0) > STALE,
            f"completions are {metrics.get('sampling/staleness', 0.0):.1f} updates old. Let the sampler run less far "
            "ahead, or take the ratio to it with policy_gradient.ratio_to_sampler.",
        ),
        "prompts used up": Sign(
            metrics.get("curriculum/restarts", 0.0) > 0,
            "every training prompt has reached the pass rate of curriculum.leave_out, so none is left. All of them are "
            "drawn again, with a new history. Use more or harder prompts, or end the run here.",
            patience=1,
        ),
        "length limit": Sign(
            cut > 0.9,
            f"the length limit cut {cut:.0%} of the completions. Raise rollout.max_new_tokens.",
        ),
        "sampler mismatch": Sign(
            mismatch > 0.1 or (fresh and outside > FAR),
            f"sampler and trainer differ by {number(mismatch)} nats per token on the same tokens, and for "
            f"{outside:.0%} of them by more than a tenth of the probability. Compare their dtype, temperature, "
            "truncation and repetition penalty, or set loss.correction.",
        ),
    }
