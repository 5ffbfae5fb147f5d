"""Numbers of one step, under TRL's names where the meaning is the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, pstdev, stdev

from fastrl.losses.metrics import finish, merge
from fastrl.types import Batch, Group, Sample


def staleness(groups: Sequence[Group], updates: int) -> dict[str, float]:
    """How many updates the weights that wrote the completions are behind, a mean over the policy's own tokens.

    Empty where they are not behind, or the source does not say.
    """
    lags = [
        updates - version
        for group in groups
        for sample in group.samples
        for version, own in zip(sample.versions or [], sample.own or [True] * len(sample.token_ids), strict=False)
        if own
    ]
    return {"sampling/staleness": fmean(lags)} if any(lags) else {}


def step_metrics(batch: Batch) -> dict[str, float]:
    """Metrics of a step's groups and of the optimizer steps on them, averaged over the step."""
    values = _rewards(batch) if batch.kind == "rewarded" else {}
    if batch.updates:
        for name in batch.updates[0][1]:
            values[name] = fmean([numbers[name] for _, numbers in batch.updates])
        values |= finish(merge(metrics for metrics, _ in batch.updates))
    values["num_tokens"] = float(
        sum(len(group.prompt.token_ids) + len(sample.token_ids) for group in batch.groups for sample in group.samples)
    )
    return values | batch.numbers


def _own(sample: Sample) -> list[float]:
    """The sampler's log-probabilities of the tokens that the policy wrote."""
    own = sample.own or [True] * len(sample.token_ids)
    return [logp for logp, written in zip(sample.sampling_logps, own, strict=True) if written]


def _rewards(batch: Batch) -> dict[str, float]:
    groups = batch.groups
    samples = [sample for group in groups for sample in group.samples]
    lengths = [len(sample.token_ids) for sample in samples]
    scored = [sample.reward for sample in samples if sample.reward is not None]
    by_group = [[s.reward for s in group.samples if s.reward is not None] for group in groups]
    values = {
        "reward": fmean(scored) if scored else float("nan"),
        "completions/mean_length": fmean(lengths),
        "completions/std_length": pstdev(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": fmean([float(not sample.finished) for sample in samples]),
        "completions/unscored": float(len(samples) - len(scored)),
        "groups/contributing": len(batch.contributing) / len(groups),
    }
    surprise = [-logp for one in samples for logp in _own(one)]
    if surprise and not math.isnan(surprise[0]):  # written completions have no sampler
        # An unbiased estimate of the sampler's entropy over all groups. `entropy` is exact, but covers only groups with
        # a gradient, so it has gaps.
        values["sampling/entropy"] = fmean(surprise)
    if any(len(group.samples) > 1 for group in groups):  # one completion has no spread
        values["reward_std"] = fmean([stdev(rewards) if len(rewards) > 1 else 0.0 for rewards in by_group])
        values["frac_reward_zero_std"] = fmean([float(len(set(rewards)) <= 1) for rewards in by_group])
    for name in sorted({name for sample in samples for name in sample.rewards}):
        rewards = [r for sample in samples if (r := sample.rewards.get(name)) is not None]
        if rewards:
            values[f"rewards/{name}/mean"] = fmean(rewards)
            values[f"rewards/{name}/std"] = stdev(rewards) if len(rewards) > 1 else 0.0
    return values
