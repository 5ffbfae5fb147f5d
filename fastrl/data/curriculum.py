"""Curricula: which prompts are drawn next, given how earlier ones went.

`Curriculum` draws a bucket of prompts (an environment, a level, a single prompt), then the bucket's next prompt in
shuffled epochs. A rule gives the buckets their weights: `Waker`, `Learnability`, `DifficultyPools`, `EasyToHard`, or
`Rule` itself, domain randomisation, the control. No-positive-resampling leaves solved prompts out, under any rule.

WAKER was written for world models in simulators. Left out here: the world model and its imagined trajectories, which
need environments with states to imagine. The error is measured on the completions themselves instead.
"""

from __future__ import annotations

import copy
import math
import random
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev
from typing import Any, ClassVar

from fastrl import check
from fastrl.data.sampler import PromptSampler
from fastrl.types import Group, Prompt

BURN_IN = 5  # intervals before WAKER compares errors, as in the authors' code
DECAY = 0.95  # of WAKER's running mean of the errors' reductions, as in the authors' code
SHOWN = 64  # with more buckets, their probabilities are not logged one by one


def bucket_of(prompt: Prompt, by: Sequence[str]) -> str:
    """The name of a prompt's bucket: its values in the columns `by`, or without columns its own index."""
    return "/".join(str(prompt.columns[column]) for column in by) if by else str(prompt.index)


def require_columns(prompts: Sequence[Prompt], by: Sequence[str], op: str, argument: str) -> None:
    """Refuses columns that not every prompt has."""
    for prompt in prompts:
        missing = [column for column in by if prompt.columns.get(column) is None]
        known = ", ".join(map(repr, prompt.columns)) or "none"
        expected, got = f"columns of every row; row {prompt.index} has {known}", ", ".join(map(repr, missing))
        check.require(not missing, op, argument, expected, got)


def cvar(values: Sequence[float], alpha: float) -> float:
    """The conditional value at risk: the mean of the worst share `alpha` of equally likely values.

        CVaR_alpha = (x_(1) + ... + x_(k) + (alpha n - k) x_(k+1)) / (alpha n)    with k = floor(alpha n), x ascending

    The lower tail of Rockafellar & Uryasev 2002 (Journal of Banking & Finance 26), proposition 8. A share that ends
    within a value counts that part of it, so alpha n <= 1 is the minimum and alpha = 1 the mean. NaN if any value is.

    Raises:
        ValueError: no values, or `alpha` outside (0, 1].
    """
    check.require(0 < alpha <= 1, "cvar", "alpha", "a share above 0, at most 1", alpha)
    check.require(len(values) > 0, "cvar", "values", "at least one", "none")
    if any(math.isnan(value) for value in values):
        return math.nan
    mass = alpha * len(values)
    parts = [min(1.0, max(0.0, mass - place)) for place in range(len(values))]
    return math.fsum(part * value for part, value in zip(parts, sorted(values), strict=True)) / math.fsum(parts)


def scored(group: Group) -> list[float]:
    """The rewards of the samples that have one."""
    return [sample.reward for sample in group.samples if sample.reward is not None]


def pass_rate(group: Group, threshold: float) -> float:
    """The share of the scored samples whose reward is at least `threshold`."""
    return fmean(reward >= threshold for reward in scored(group))


def pass_variance(group: Group, threshold: float) -> float | None:
    """p (1 - p) of the group's pass rate p, the variance of passing."""
    rate = pass_rate(group, threshold)
    return rate * (1.0 - rate)


def disagreement(group: Group, threshold: float) -> float | None:
    """The standard deviation between the rewards of a sample, a mean over samples with two or more; None without any.

    The rewards are the ensemble: they must have the same scale, and their weights do not enter.
    """
    ensembles = [[one for one in sample.rewards.values() if one is not None] for sample in group.samples]
    spreads = [pstdev(ensemble) for ensemble in ensembles if len(ensemble) > 1]
    return fmean(spreads) if spreads else None


def advantage(group: Group, threshold: float) -> float | None:
    """The mean magnitude of the advantages r - mean(r)."""
    rewards = scored(group)
    centre = fmean(rewards)
    return fmean(abs(reward - centre) for reward in rewards)


Error = Callable[[Group, float], float | None]
ERRORS: dict[str, Error] = {"pass_variance": pass_variance, "disagreement": disagreement, "advantage": advantage}


class Rule:
    """Weighs buckets by what was observed of them; the base class is domain randomisation: all the same."""

    state: ClassVar[tuple[str, ...]] = ()  # names of the fields that a checkpoint holds

    def observe(self, bucket: str, group: Group) -> None:
        """Learns from a group with at least one scored sample."""

    def weights(self, buckets: Sequence[str]) -> list[float]:
        """One weight per bucket, 0 or more and not all 0; only their ratios count."""
        return [1.0] * len(buckets)

    def state_dict(self) -> dict[str, Any]:
        """What was observed, in a form that JSON can hold."""
        return copy.deepcopy({name: getattr(self, name) for name in self.state})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a `state_dict`."""
        for name in self.state:
            setattr(self, name, copy.deepcopy(state[name]))


@dataclass
class Waker(Rule):
    """WAKER: environments are drawn by the model's error in them, or by its fall (arXiv:2306.09205, algorithm 1).

        p(b) = random_share / B + (1 - random_share) softmax_b(s_b / temperature)
        e_b <- (1 - 1/K) e_b + e / K                        at each observed error e of b; the first sets e_b
        c_b <- 0.95 c_b + 0.05 (e_b K groups ago - e_b)     every K groups, after 5 K
        WAKER-M: s = (e - mean(e)) / (std(e) + 1e-6)        WAKER-R: s = c / mean(|c|)

    The softmax is over the buckets with an error (of WAKER-R: with a change); before the first, all are equal. K counts
    observed groups where the paper counts environment steps. The paper's minimax regret bound, that regret is at most
    the largest error of the model over environments, is about a world model's error, which these errors stand in for.

    Args:
        error: of a group; None leaves it out.
        reduction: WAKER-R instead of WAKER-M.
        temperature: eta of the softmax; 1 for WAKER-M and 0.5 for WAKER-R in the paper.
        random_share: probability of domain randomisation, 0.2 in the paper.
        interval: K, in groups.
    """

    error: Callable[[Group], float | None]
    reduction: bool
    temperature: float
    random_share: float
    interval: int
    errors: dict[str, float] = field(default_factory=dict)
    previous: dict[str, float] = field(default_factory=dict)
    changes: dict[str, float] = field(default_factory=dict)
    observed: int = 0
    state: ClassVar[tuple[str, ...]] = ("errors", "previous", "changes", "observed")

    def observe(self, bucket: str, group: Group) -> None:
        """As `Rule`."""
        error = self.error(group)
        if error is None:
            return
        _smooth(self.errors, bucket, error, 1.0 / self.interval)
        self.observed += 1
        if self.observed >= BURN_IN * self.interval and self.observed % self.interval == 0:
            for name, before in self.previous.items():
                change = before - self.errors[name]
                self.changes[name] = DECAY * self.changes.get(name, 0.0) + (1.0 - DECAY) * change
            self.previous = dict(self.errors)

    def weights(self, buckets: Sequence[str]) -> list[float]:
        """As `Rule`; the probabilities themselves."""
        found = self.changes if self.reduction else self.errors
        known = [bucket for bucket in buckets if bucket in found]
        if not known:
            return super().weights(buckets)
        values = [found[bucket] for bucket in known]
        if self.reduction:
            scale = fmean(map(abs, values))
            scores = [value / scale if scale else 0.0 for value in values]
        else:
            centre, scale = fmean(values), pstdev(values) + 1e-6
            scores = [(value - centre) / scale for value in values]
        most = max(scores)
        boltzmann = {b: math.exp((s - most) / self.temperature) for b, s in zip(known, scores, strict=True)}
        return _mixed([boltzmann.get(bucket, 0.0) for bucket in buckets], self.random_share)


@dataclass
class Learnability(Rule):
    """Buckets are drawn by p (1 - p) of their pass rate p, which is largest for what is learned half
    (arXiv:2408.15099).

        w_b = (p_b (1 - p_b))^power        p_b <- (1 - 1/K) p_b + p / K at each group's pass rate p; the first sets p_b
        P(b) = random_share / B + (1 - random_share) w_b / sum(w)

    A bucket not observed yet has p = 1/2. If all w are 0, all buckets are equal.

    Args:
        threshold: minimum reward of a sample that passes.
        power: 1, or 1/2 for the standard deviation in place of the variance.
        random_share: without it a bucket whose pass rate reached 0 or 1 would never be drawn again.
        interval: K, in groups of the bucket.
    """

    threshold: float
    power: float
    random_share: float
    interval: int
    rates: dict[str, float] = field(default_factory=dict)
    state: ClassVar[tuple[str, ...]] = ("rates",)

    def observe(self, bucket: str, group: Group) -> None:
        """As `Rule`."""
        _smooth(self.rates, bucket, pass_rate(group, self.threshold), 1.0 / self.interval)

    def weights(self, buckets: Sequence[str]) -> list[float]:
        """As `Rule`; the probabilities themselves."""
        rates = [self.rates.get(bucket, 0.5) for bucket in buckets]
        return _mixed([max(0.0, rate * (1.0 - rate)) ** self.power for rate in rates], self.random_share)


@dataclass
class DifficultyPools(Rule):
    """Buckets are drawn by the weight of the pool that their last group's mean reward falls in, as in prime-rl.

    A pool holds mean rewards up to and including its threshold; the last one also those above. A bucket not observed
    yet has weight 1.

    Args:
        thresholds: ascending; 0.25, 0.75, 1 are prime-rl's hard, normal and easy.
        pool_weights: of each pool, 0.2, 1, 0.2 in prime-rl; 0 never draws from it.
    """

    thresholds: tuple[float, ...]
    pool_weights: tuple[float, ...]
    latest: dict[str, float] = field(default_factory=dict)
    state: ClassVar[tuple[str, ...]] = ("latest",)

    def observe(self, bucket: str, group: Group) -> None:
        """As `Rule`."""
        self.latest[bucket] = fmean(scored(group))

    def weights(self, buckets: Sequence[str]) -> list[float]:
        """As `Rule`.

        Raises:
            ValueError: every bucket is in a pool of weight 0.
        """
        weights = [self._weight(self.latest.get(bucket)) for bucket in buckets]
        expected, got = "a bucket in a pool with a weight above 0", f"none of {len(buckets)}"
        do = "Give curriculum.pool_weights no 0, or use harder or easier prompts."
        check.require(any(weights), "DifficultyPools", "pool_weights", expected, got, do)
        return weights

    def _weight(self, reward: float | None) -> float:
        if reward is None:
            return 1.0
        return self.pool_weights[min(bisect_left(self.thresholds, reward), len(self.thresholds) - 1)]


@dataclass
class EasyToHard(Rule):
    """Static: the levels up to one that rises from the easiest to the hardest over the run (Bengio et al. 2009, ICML).

    After the share u of `total` groups, the first 1 + floor(u L) of L levels have equal weights, the others 0. The
    paper's condition that the entropy of the training distribution grows holds.

    Args:
        levels: numbers as text, the buckets' names; a larger number is harder.
        total: groups of the whole run.
    """

    levels: Sequence[str]
    total: int
    observed: int = 0
    state: ClassVar[tuple[str, ...]] = ("observed", "total")  # a longer run keeps the pace that it began with

    def __post_init__(self) -> None:
        for level in self.levels:
            expected, do = "a column of numbers for easy_to_hard", "A larger number is a harder level."
            check.require(_is_number(level), "Curriculum", "by", expected, repr(level), do)
        self.levels = sorted(self.levels, key=float)

    def observe(self, bucket: str, group: Group) -> None:
        """As `Rule`."""
        self.observed += 1

    def weights(self, buckets: Sequence[str]) -> list[float]:
        """As `Rule`; if all prompts of the levels so far are left out, the easiest other one."""
        reached = self.levels[: 1 + self.observed * len(self.levels) // self.total]
        open_ = set(reached) & set(buckets) or {min(buckets, key=float)}
        return [float(bucket in open_) for bucket in buckets]


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _smooth(means: dict[str, float], name: str, value: float, share: float) -> None:
    """A running mean that starts at its first value."""
    means[name] = (1.0 - share) * means[name] + share * value if name in means else value


def _mixed(weights: Sequence[float], random_share: float) -> list[float]:
    """Probabilities: the weights' share of their sum, mixed with the uniform distribution; uniform if all are 0."""
    total, uniform = math.fsum(weights), 1.0 / len(weights)
    return [random_share * uniform + (1.0 - random_share) * (w / total if total else uniform) for w in weights]


class Curriculum(PromptSampler[Prompt]):
    """Draws buckets by a rule's weights, with replacement, and prompts of a bucket in shuffled epochs.

    The draws depend only on the seed, their number and what was observed, so a resumed run draws the same prompts.

    Args:
        prompts: prompts to draw from; kept, not copied.
        rule: weighs the buckets.
        by: columns whose values name a prompt's bucket. None of them: each prompt is one.
        leave_out: ScaleRL's no-positive-resampling (arXiv:2510.13786, section 3.2, where it is 0.9): a prompt is not
            drawn again once its pass rate over all its completions so far is at least this; None is off. Once all
            prompts are left out, all are drawn again with a new history, and `curriculum/restarts` counts that.
        threshold: minimum reward of a completion that passes.
        one_bucket: put all prompts in one bucket, so that they come in the epochs of a `PromptSampler`.

    Raises:
        ValueError: a prompt lacks a column.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        rule: Rule,
        by: Sequence[str] = (),
        *,
        seed: int,
        leave_out: float | None = None,
        threshold: float = 0.5,
        one_bucket: bool = False,
    ) -> None:
        super().__init__(prompts, seed)
        require_columns(prompts, by, "Curriculum", "by")
        self.rule = rule
        self.leave_out, self.threshold = leave_out, threshold
        self._of = {prompt.index: "all" if one_bucket else bucket_of(prompt, by) for prompt in prompts}
        members: dict[str, list[Prompt]] = {}
        for prompt in prompts:
            members.setdefault(self._of[prompt.index], []).append(prompt)
        self.buckets = {name: PromptSampler(found, seed) for name, found in members.items()}
        self.history: dict[int, tuple[int, int]] = {}  # index -> (passed, scored)
        self.left_out: set[int] = set()
        self._out: Counter[str] = Counter()  # how many of a bucket are left out
        self.restarts = 0

    def next(self, n: int) -> list[Prompt]:
        """The next `n` prompts. A small bucket's prompt may come twice."""
        names = self._open()
        rng = random.Random(f"{self.seed}/buckets/{self._drawn}")
        self._drawn += n
        return [self._prompt(name) for name in rng.choices(names, self.rule.weights(names), k=n)]

    def observe(self, groups: Sequence[Group]) -> dict[str, float]:
        """As `PromptSampler`; groups without a scored sample are passed over.

        Returns:
            The number of prompts left out so far, and if there are not too many buckets, their next probabilities.
        """
        for group in groups:
            if scored(group):
                self.rule.observe(self._of[group.prompt.index], group)
                self._remember(group)
        numbers = {}
        if self.leave_out is not None:
            if len(self.left_out) == len(self.prompts):
                self.left_out, self._out, self.history = set(), Counter(), {}
                self.restarts += 1
            numbers = {"curriculum/left_out": float(len(self.left_out)), "curriculum/restarts": float(self.restarts)}
        if 1 < len(self.buckets) <= SHOWN:
            names = self._open()
            weights = self.rule.weights(names)
            total = math.fsum(weights)
            numbers |= {f"curriculum/probability/{name}": w / total for name, w in zip(names, weights, strict=True)}
        return numbers

    def state_dict(self) -> dict[str, Any]:
        """As `PromptSampler`, with what was observed."""
        places = {name: (bucket.epoch, bucket.drawn) for name, bucket in self.buckets.items()}
        return super().state_dict() | {
            "buckets": {name: list(place) for name, place in places.items() if place != (0, 0)},
            "rule": self.rule.state_dict(),
            "history": [[index, *counts] for index, counts in self.history.items()],
            "left_out": sorted(self.left_out),
            "restarts": self.restarts,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As `PromptSampler`."""
        super().load_state_dict(state)
        for name, bucket in self.buckets.items():
            bucket.go_to(*state["buckets"].get(name, (0, 0)))
        self.rule.load_state_dict(state["rule"])
        self.history = {index: (passed, of) for index, passed, of in state["history"]}
        self.left_out, self.restarts = set(state["left_out"]), state["restarts"]
        self._out = Counter(self._of[index] for index in self.left_out)

    def _open(self) -> list[str]:
        """The buckets with a prompt that is not left out."""
        return [name for name, bucket in self.buckets.items() if self._out[name] < len(bucket.prompts)]

    def _prompt(self, bucket: str) -> Prompt:
        while True:  # ends: the bucket is open
            (prompt,) = self.buckets[bucket].next(1)
            if prompt.index not in self.left_out:
                return prompt

    def _remember(self, group: Group) -> None:
        if self.leave_out is None:
            return
        rewards, index = scored(group), group.prompt.index
        passed, of = self.history.get(index, (0, 0))
        passed, of = passed + sum(reward >= self.threshold for reward in rewards), of + len(rewards)
        self.history[index] = passed, of
        if passed / of >= self.leave_out and index not in self.left_out:
            self.left_out.add(index)
            self._out[self._of[index]] += 1
