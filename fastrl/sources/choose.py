"""From sampled and judged groups to what is learned from them: pairs, or completions over a threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from fastrl.types import Group, Sample


def best_and_worst(groups: Sequence[Group]) -> list[Group]:
    """The highest- and the lowest-scored completion of each group as a pair of chosen and rejected.

    arXiv:2401.10020 section 2.3: groups whose scores are all equal are left out. So are completions without a score or
    without tokens, and pairs of the same tokens, which a judge that samples may score differently.
    """
    pairs = []
    for group in groups:
        scored = _scored(group)
        if not scored:
            continue
        best, worst = (choose(scored, key=_score) for choose in (max, min))
        if _score(best) > _score(worst) and best.token_ids != worst.token_ids:
            pairs.append(Group(group.prompt, [replace(best, advantage=1.0), replace(worst, advantage=-1.0)]))
    return pairs


def above(groups: Sequence[Group], threshold: float, *, reaches: bool = False, most: int = 0) -> list[Group]:
    """Each completion that scores more than the threshold, as a demonstration: ReST's F(x, y; tau) = 1[R(x, y) > tau],
    arXiv:2308.08998 section 3.

    Args:
        reaches: take those that score exactly the threshold too.
        most: at most this many per prompt, the best first and equal ones in the order they were drawn; 0 takes all.
            ReST-EM takes 10: arXiv:2312.06585.
    """
    rows = []
    for group in groups:
        good = [one for one in _scored(group) if _score(one) > threshold or (reaches and _score(one) == threshold)]
        good.sort(key=lambda one: -_score(one))  # stable
        rows += [Group(group.prompt, [replace(one, advantage=1.0)]) for one in good[: most or None]]
    return rows


def quantile(groups: Sequence[Group], share: float) -> float:
    """The smallest score that at least `share` of all scores do not exceed; NaN without scores."""
    scores = sorted(_score(one) for group in groups for one in _scored(group))
    return scores[max(0, math.ceil(share * len(scores)) - 1)] if scores else math.nan


def _score(sample: Sample) -> float:
    return math.nan if sample.reward is None else sample.reward


def _scored(group: Group) -> list[Sample]:
    return [one for one in group.samples if one.reward is not None and one.token_ids]
