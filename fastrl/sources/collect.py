"""Prompts in, judged groups out: shared by rollouts, their refills and baselines, and evaluations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from math import comb
from statistics import fmean
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastrl import env
from fastrl.check import sentence
from fastrl.data.groups import sample_to_json
from fastrl.distributed import ALONE, World
from fastrl.progress import Progress, Watch
from fastrl.rewards import RewardFailure, RewardSuite
from fastrl.rewards.call import shown
from fastrl.rewards.environment import split_by_turn
from fastrl.rewards.suite import Failure
from fastrl.rollout.base import Sampler, SamplingParams
from fastrl.rollout.collect import collect
from fastrl.rollout.interruption import Interrupting, Interruption
from fastrl.rollout.turns import Turns, play
from fastrl.types import Group, Prompt, Sample


@dataclass(frozen=True)
class Sampling:
    """The sampler and its parameters; each call gets its own seed."""

    engine: Sampler
    tokenizer: PreTrainedTokenizerBase
    params: SamplingParams
    turns: Turns | None = None  # conversations with an environment, in place of single completions
    interruption: Interruption | None = None  # of single completions that are too long
    world: World = ALONE  # each process samples a part of the prompts

    @property
    def sampler(self) -> Sampler:
        """The engine, with its completions interrupted where they are to be."""
        return Interrupting(self.engine, self.tokenizer, self.interruption) if self.interruption else self.engine

    def greedy(self) -> Sampling:
        """The same, but always taking the most probable token; top_p, top_k and min_p are off.

        The repetition penalty, min_new_tokens and the stops stay: they affect which token is most probable and where an
        answer ends.
        """
        return replace(self, params=replace(self.params, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0))


@dataclass(frozen=True)
class Judge:
    """The rewards, and the training step that they are told of."""

    rewards: RewardSuite
    step: int
    total_steps: int
    numbers: dict[str, float]  # receives what rewards pass to `log_metric`
    failures: list[Failure] = field(default_factory=list)  # all failures so far

    def score(self, groups: Sequence[Group], watch: Watch, stage: str, unit: str, about: str) -> None:
        """Fills in the rewards of every sample and the values they log for it; warns of failures.

        Raises:
            RewardFailure: as `RewardSuite.score`.
        """
        logged: dict[str, list[float]] = {}
        extras: list[tuple[str, Any]] = []
        with watch.stage(stage, unit) as progress:
            failures = self.rewards.score(
                groups,
                trainer_state=SimpleNamespace(global_step=self.step - 1, max_steps=self.total_steps),
                log_extra=lambda name, values: extras.append((name, _listed(values))),
                log_metric=lambda name, value: logged.setdefault(name, []).append(float(value)),
                progress=progress,
            )
        self.failures.extend(failures)
        samples = [sample for group in groups for sample in group.samples]
        for message in (*map(str, failures), *filter(None, (_keep(samples, *extra) for extra in extras))):
            watch.warn(f"{about}: {message}")
        # Copied, because an async or abandoned reward may still be logging.
        self.numbers.update({name: fmean(values) for name, values in dict(logged).items()})


def _without_failed(groups: Sequence[Group], judge: Judge, watch: Watch, about: str) -> None:
    """Takes the reward from conversations whose environment failed, says so, and reports what environments measured.

    Raises:
        RewardFailure: more failed than a reward may.
    """
    samples = [sample for group in groups for sample in group.samples]
    noted = [sample.extra["metrics"] for sample in samples]
    names = dict.fromkeys(name for one in noted for name in one)
    for name in names:  # those of the step's own completions stay: refills and baselines come later
        judge.numbers.setdefault(f"environment/{name}", fmean(one[name] for one in noted if name in one))
    failed = [sample for sample in samples if "environment_error" in sample.extra]
    judge.numbers["environment/failures"] = judge.numbers.get("environment/failures", 0.0) + len(failed)
    for sample in failed:
        sample.reward = None
    if failed:
        first = f"{len(failed)} of {len(samples)} conversations; first with {failed[0].extra['environment_error']}"
        if len(failed) > judge.rewards.max_failure_fraction * len(samples):
            limit = f"more than max_failure_fraction = {judge.rewards.max_failure_fraction:g} allows"
            raise RewardFailure(f"the environment failed in {first}; {limit}")
        watch.warn(f"{about}: the environment failed in {first}. They are not trained on.")


def _keep(samples: Sequence[Sample], name: str, values: Any) -> str:
    """Stores a column that a reward logged, one value per sample; returns a message if the number does not match."""
    if not isinstance(values, list) or len(values) != len(samples):
        got = len(values) if isinstance(values, list) else shown(values)
        return sentence("log_extra", str(name), f"{len(samples)} values, one per completion", got)
    for sample, value in zip(samples, values, strict=True):
        sample.extra[str(name)] = _plain(value)
    return ""


def _listed(values: Any) -> Any:
    """A copy of a sequence as a list, because the reward may keep changing its own; anything else unchanged."""
    if hasattr(values, "tolist"):
        return values.tolist()
    return list(values) if isinstance(values, Sequence) and not isinstance(values, (str, bytes)) else values


def _plain(value: Any) -> Any:
    """The value in a form that JSON can hold, or else its printed form."""
    try:
        return json.loads(json.dumps(_listed(value)))
    except (TypeError, ValueError, RecursionError):
        return shown(value)


def judged(
    prompts: Sequence[Prompt],
    number: int,
    seed: int,
    sampling: Sampling,
    judge: Judge,
    watch: Watch,
    *,
    stages: tuple[str, str] = ("rollout", "reward"),
    units: tuple[str, str] = ("tokens", "rewards"),
    about: str = "",
) -> list[Group]:
    """`number` completions of each prompt, decoded and with their rewards.

    Of several processes, each samples and scores a part of the prompts, and all get all groups. Warnings start with
    `about`; `stages` and `units` name the two stages for `watch`.

    Raises:
        RewardFailure: rewards or environments failed on too many completions, in this process or another.
    """
    world, about = sampling.world, about or f"Step {judge.step}"
    sampling = replace(sampling, params=replace(sampling.params, seed=seed))
    names = {"stages": stages, "units": units, "about": about}
    if world.size == 1:
        return _judged(prompts, number, sampling, judge, watch, **names)
    places = world.places(len(prompts))
    sampling = replace(sampling, params=replace(sampling.params, places=tuple(places)))
    own, heard, groups, failed = replace(judge, numbers={}, failures=[]), _Heard(watch, world), [], None
    with world.together("sampling"):
        try:
            mine = [prompts[place] for place in places]
            groups = _judged(mine, number, sampling, own, heard, **names) if mine else []
        except RewardFailure as error:
            failed = str(error)
    found = {
        "samples": [[sample_to_json(sample) for sample in group.samples] for group in groups],
        "numbers": own.numbers,
        "failures": [asdict(failure) for failure in own.failures],
        "said": heard.said,
        "failed": failed,
    }
    every = world.gather(found)
    return _merged(prompts, every, world, judge, watch)


@dataclass(frozen=True)
class _Heard:
    """Keeps what is warned of in a process that writes no log."""

    watch: Watch
    world: World
    said: list[str] = field(default_factory=list)

    def stage(self, name: str, unit: str = "") -> AbstractContextManager[Progress]:
        """As `Watch`."""
        return self.watch.stage(name, unit)

    def warn(self, message: str) -> None:
        """As `Watch`."""
        self.watch.warn(message) if self.world.first else self.said.append(message)


def _merged(
    prompts: Sequence[Prompt], every: Sequence[dict[str, Any]], world: World, judge: Judge, watch: Watch
) -> list[Group]:
    """All processes' groups, in the order of the prompts; numbers are means over prompts, failures are added up."""
    groups: list[Any] = [None] * len(prompts)
    for rank, found in enumerate(every):
        for message in found["said"]:
            watch.warn(f"{message} (rank {rank})")
        places = range(rank, len(prompts), world.size)
        for place, samples in zip(places, found["samples"], strict=False):
            groups[place] = Group(prompts[place], [Sample(**sample) for sample in samples])
        judge.failures.extend(Failure(**values | {"prompts": tuple(values["prompts"])}) for values in found["failures"])
    failed = next((found["failed"] for found in every if found["failed"]), None)
    if failed:
        raise RewardFailure(failed)
    for name in dict.fromkeys(name for found in every for name in found["numbers"]):
        told = [(found["numbers"][name], len(found["samples"])) for found in every if name in found["numbers"]]
        if name == "environment/failures":
            judge.numbers[name] = judge.numbers.get(name, 0.0) + sum(value for value, _ in told)
            continue
        mean = sum(value * weight for value, weight in told) / sum(weight for _, weight in told)
        kept = name == "interrupted" or name.startswith("environment/")  # as where they are measured
        judge.numbers[name] = judge.numbers.get(name, mean) if kept else mean
    return groups


def _judged(
    prompts: Sequence[Prompt],
    number: int,
    sampling: Sampling,
    judge: Judge,
    watch: Watch,
    *,
    stages: tuple[str, str],
    units: tuple[str, str],
    about: str,
) -> list[Group]:
    with watch.stage(stages[0], units[0]) as progress:
        env.return_freed_memory()  # a rollout cannot reuse the memory of training's activations
        asked = (prompts, sampling.sampler, sampling.tokenizer, number, sampling.params)
        groups = play(*asked, sampling.turns, progress) if sampling.turns else collect(*asked, progress)
        env.return_freed_memory()  # nor can training reuse the memory of a rollout's caches
    judge.score(groups, watch, stages[1], units[1], about)
    if sampling.turns:
        _without_failed(groups, judge, watch, about)
        weight = dict(zip(judge.rewards.names, judge.rewards.weights, strict=True)).get("environment", 0.0)
        for sample in (one for group in groups for one in group.samples if one.reward is not None):
            sample.turn_rewards = split_by_turn(sample, weight)
    if sampling.interruption:
        told = [sample.extra["interrupted"] for group in groups for sample in group.samples]
        judge.numbers.setdefault("interrupted", fmean(told))
    return groups


def pass_at_k(groups: Sequence[Group], k: int, threshold: float) -> float:
    """The probability that at least one of `k` completions of a prompt reaches `threshold`, averaged over prompts.

        pass@k = 1 - C(n - c, k) / C(n, k)    where c of a prompt's n scored completions reach it

    This estimate is unbiased (Chen et al. 2021, arXiv:2107.03374 eq. 1). Prompts with fewer than `k` scored completions
    have no unbiased estimate and are left out; NaN if that leaves none.
    """
    estimates = []
    for group in groups:
        rewards = [sample.reward for sample in group.samples if sample.reward is not None]
        failed = sum(reward < threshold for reward in rewards)
        if len(rewards) >= k:
            estimates.append(1.0 - comb(failed, k) / comb(len(rewards), k))
    return fmean(estimates) if estimates else float("nan")


def mean_reward(groups: Sequence[Group]) -> float:
    """Mean reward of the samples that were scored; NaN if none was."""
    rewards = [sample.reward for group in groups for sample in group.samples if sample.reward is not None]
    return fmean(rewards) if rewards else float("nan")
