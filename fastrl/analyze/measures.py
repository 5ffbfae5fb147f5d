"""The three measures of SEAL, arXiv:2408.10270: feature imprint, alignment resistance, alignment robustness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fastrl.analyze.pairs import LABELS, OP, REWARDS, SIDES, Pairs, Texts
from fastrl.check import require

TRANSITIONS = {  # (aligned before, aligned after)
    "stayed aligned": (True, True),
    "got aligned": (False, True),
    "reversed": (True, False),
    "resists": (False, False),
}
# With one differing pair a feature's clustered error is 0, with few it is far too small: MacKinnon and Webb, The wild
# bootstrap for few (treated) clusters, 2018.
FEWEST = 10
PER_FEATURE = 5  # clusters: of noise, p < 0.05 then comes in 6 to 7 % of draws; with 2 it comes in up to 14 %
COLLINEAR = 1e-9  # what the others must leave unexplained of a feature's sum of squares


@dataclass(frozen=True)
class Effect:
    """A feature's imprint: by how much it raises the reward, other features being equal."""

    feature: str
    beta: float
    error: float  # clustered standard error
    low: float  # of the 95 % interval
    high: float
    p: float
    p_adjusted: float  # Bonferroni, over the features of the regression
    differing: int  # pairs of which one text has the feature
    vif: float


@dataclass(frozen=True)
class Agreement:
    """How often a reward is aligned with the humans."""

    pairs: int
    share: float
    low: float  # of Wilson's 95 % interval
    high: float
    ties: int  # pairs of equal rewards, which are not aligned
    resistance: float  # the share of pairs that are not aligned


@dataclass(frozen=True)
class Flip:
    """What a feature that rewriting took away from a text, or added, has to do with pairs that cease to be aligned."""

    feature: str
    text: str  # chosen or rejected
    flip: str  # lost or gained
    pairs: int
    share: float  # of them, those that ceased to be aligned
    unchanged: int  # pairs of which the text has the feature before and after, or neither
    unchanged_share: float
    odds_ratio: float | None  # None if no pair, or every pair, ceased to be aligned
    low: float | None  # of the 95 % interval; None if a cell of the table is empty
    high: float | None
    p: float  # Fisher's exact test
    p_adjusted: float  # Bonferroni, over the flips of the table


@dataclass(frozen=True)
class Analysis:
    """The three measures; what the rows had no columns for is empty."""

    pairs: int
    imprint: dict[str, list[Effect]] = field(default_factory=dict)  # after, before, shift
    dropped: dict[str, str] = field(default_factory=dict)  # feature -> why it has no imprint
    agreement: dict[str, Agreement] = field(default_factory=dict)  # after, before, and rewritten
    transitions: dict[str, int] = field(default_factory=dict)
    by_labeler: dict[str, dict[str, float]] = field(default_factory=dict)
    flips: list[Flip] = field(default_factory=list)
    said: tuple[str, ...] = ()


def variance_inflation(features: np.ndarray) -> np.ndarray:
    """(k,) variance inflation factors 1 / (1 - R_f^2) of a regression without intercept; infinite for a linear
    combination of others.

    R_f^2 is that of feature f on the others, about 0. Of differences within pairs this is the centred one of the model
    with pair effects, whose columns all have the mean 0 (https://github.com/statsmodels/statsmodels/issues/2376).

    Args:
        features: (n, k), no column of zeros.
    """
    scaled = features / np.linalg.norm(features, axis=0)
    gram = scaled.T @ scaled
    unexplained = np.empty(len(gram))
    for place in range(len(gram)):
        others = np.arange(len(gram)) != place
        weights = np.linalg.lstsq(gram[np.ix_(others, others)], gram[others, place], rcond=COLLINEAR)[0]
        unexplained[place] = 1.0 - gram[others, place] @ weights
    return np.where(unexplained > COLLINEAR, 1.0 / np.maximum(unexplained, COLLINEAR), np.inf)


def choose_features(
    differences: np.ndarray, names: Sequence[str], clusters: np.ndarray, *, max_vif: float
) -> tuple[list[str], dict[str, str]]:
    """(features that can have an imprint, others -> why not).

    A feature that both texts of every pair have, or neither, is part of the pair effects. Of the rest, the one with the
    largest variance inflation factor goes, the later of equal ones, until none is above `max_vif`.

    Args:
        differences: (n, k) chosen less rejected: 1, 0 or -1.
        clusters: (n,) int.
    """
    require(max_vif > 1.0, OP, "max_vif", "above 1, which is no collinearity", max_vif)
    kept, dropped = [], {}
    for name, column in zip(names, differences.T, strict=True):
        differing = len(np.unique(clusters[column != 0]))
        if differing == 0:
            dropped[name] = "the same in both texts of every pair: part of the pair effects"
        elif differing < FEWEST:
            dropped[name] = f"differs in only {differing} pairs or clusters, fewer than {FEWEST}: no usable error"
        else:
            kept.append(name)
    place = {name: at for at, name in enumerate(names)}
    while len(kept) > 1:
        factors = variance_inflation(differences[:, [place[name] for name in kept]])
        worst = len(kept) - 1 - int(np.argmax(factors[::-1]))
        if factors[worst] <= max_vif:
            break
        others = "a combination of other features" if np.isinf(factors[worst]) else f"above {max_vif:g}"
        dropped[kept.pop(worst)] = f"collinear: variance inflation factor {factors[worst]:.3g}, {others}"
    return kept, dropped


def imprint(differences: np.ndarray, rewards: np.ndarray, names: Sequence[str], clusters: np.ndarray) -> list[Effect]:
    """The feature imprint beta: OLS with pair effects, errors clustered, p-values by Bonferroni.

        beta = (sum_i x_i x_i')^-1 sum_i x_i d_i,    x_i = f(t_c) - f(t_r),  d_i = r(t_c) - r(t_r)

    which is the model with an intercept alpha_i per pair: a pair has two texts, and their difference is without it. The
    covariance of G clusters has the correction G / (G - 1) (n - 1) / (n - k); intervals and p-values are of Student's t
    with G - 1 degrees of freedom. With every pair a cluster, this is the error of the model with pair effects clustered
    by pair, and White's of the differences times n / (n - k).

    Args:
        differences: (n, k) x, from `choose_features`.
        rewards: (n,) d.
        clusters: (n,) int.

    Raises:
        ValueError: fewer clusters than `PER_FEATURE` for each feature.
        ModuleNotFoundError: statsmodels is not installed.
    """
    ols = _statsmodels("api").OLS
    count = len(np.unique(clusters))
    do = "Name fewer with --features, or add pairs."
    least = PER_FEATURE * len(names)
    require(count >= least, OP, "pairs", f"at least {least} or clusters of them, for {len(names)} features", count, do)
    about = {"groups": np.unique(clusters, return_inverse=True)[1]}
    fit = ols(rewards, differences).fit(cov_type="cluster", cov_kwds=about, use_t=True)
    factors, intervals = variance_inflation(differences), fit.conf_int(0.05)
    adjusted = np.minimum(fit.pvalues * len(names), 1.0)
    differing = (differences != 0).sum(0)
    columns = (fit.params, fit.bse, *intervals.T, fit.pvalues, adjusted)
    rows = zip(names, *(column.tolist() for column in columns), differing.tolist(), factors.tolist(), strict=True)
    return [Effect(*row) for row in rows]


def _statsmodels(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(f"statsmodels.{module}")
    except ModuleNotFoundError as error:
        do = "Install it, in the source tree: pip install '.[analyze]'"
        raise ModuleNotFoundError(f"{OP}: statsmodels cannot be imported: {error}. {do}") from error


def aligned(rewards: np.ndarray) -> np.ndarray:
    """(n,) bool of (n, 2): delta_i = 1[r(t_c) > r(t_r)]."""
    return rewards[:, 0] > rewards[:, 1]


def agreement(rewards: np.ndarray) -> Agreement:
    """How often rewards (n, 2) are aligned with the humans, with Wilson's interval."""
    interval = _statsmodels("stats.proportion").proportion_confint
    hits, pairs = int(aligned(rewards).sum()), len(rewards)
    low, high = interval(hits, pairs, method="wilson")
    ties = int((rewards[:, 0] == rewards[:, 1]).sum())
    return Agreement(pairs, hits / pairs, float(low), float(high), ties, 1.0 - hits / pairs)


def transitions(before: np.ndarray, after: np.ndarray) -> dict[str, int]:
    """How many pairs moved how, of rewards (n, 2) before and after alignment: the paper's four regimes."""
    was, now = aligned(before), aligned(after)
    return {name: int(((was == a) & (now == b)).sum()) for name, (a, b) in TRANSITIONS.items()}


def robustness(original: Texts, rewritten: Texts, names: Sequence[str]) -> list[Flip]:
    """What the flips of features have to do with pairs that were aligned and, rewritten, are not.

    For each feature, text, and direction: the odds ratio exp(b) of the logit of "ceased to be aligned" on the flip,
    against pairs whose text kept the feature as it was,

        exp(b) = (a / c) / (p / q),    var b = 1/a + 1/c + 1/p + 1/q

    with a of a + c flipped pairs, and p of p + q others, that ceased to be aligned. As in the authors' tables, pairs
    are all that were rewritten, and each flip is taken by itself.

    Args:
        original, rewritten: of the same pairs, all of them rewritten.
    """
    from scipy.stats import fisher_exact

    ceased = aligned(original.rewards["reward"]) & ~aligned(rewritten.rewards["reward"])
    change = rewritten.features - original.features  # (n, 2, k); NaN where a label is missing
    found = []
    for place, name in enumerate(names):
        for side, text in enumerate(SIDES):
            for flip, sign in (("lost", -1), ("gained", 1)):
                moved, same = change[:, side, place] == sign, change[:, side, place] == 0
                if not moved.any() or not same.any():
                    continue
                a, p = int(ceased[moved].sum()), int(ceased[same].sum())
                c, q = int(moved.sum()) - a, int(same.sum()) - p
                ratio, low, high = odds_ratio(a, c, p, q)
                value = float(fisher_exact([[a, c], [p, q]]).pvalue)
                shares = (a + c, a / (a + c), p + q, p / (p + q))
                found.append(Flip(name, text, flip, *shares, ratio, low, high, value, value))
    return [replace(one, p_adjusted=min(one.p * len(found), 1.0)) for one in found]


def odds_ratio(a: int, c: int, p: int, q: int) -> tuple[float | None, float | None, float | None]:
    """(a / c) / (p / q) and its 95 % interval; None for what an empty cell leaves undefined."""
    if min(a + p, c + q) == 0:
        return None, None, None
    ratio = a * q / (c * p) if c * p else float("inf")
    if 0 in (a, c, p, q):
        return ratio, None, None
    spread = np.exp(1.959963984540054 * np.sqrt(1 / a + 1 / c + 1 / p + 1 / q))
    return ratio, float(ratio / spread), float(ratio * spread)


def analyze(pairs: Pairs, *, max_vif: float = 10.0) -> Analysis:
    """The three measures of the pairs, as far as they have the columns.

    Raises:
        ValueError: as `imprint`; or the rewards of every pair are equal.
        ModuleNotFoundError: statsmodels is not installed.
    """
    after, before = (pairs.original.rewards.get(name) for name in REWARDS)
    said, moved, by, table = list(pairs.said), {}, {}, {"after": agreement(after)}
    if before is not None:
        table["before"] = agreement(before)
        moved = transitions(before, after)
    for label in LABELS if pairs.labeler is not None else ():
        at = pairs.labeler == label
        if at.any():
            by[label] = {"pairs": int(at.sum()), "after": float(aligned(after[at]).mean())}
            if before is not None:
                by[label] |= {"before": float(aligned(before[at]).mean())} | transitions(before[at], after[at])
    if pairs.labeler is not None:
        unlabelled = int((pairs.labeler == "").sum())
        said += [f"{unlabelled} pairs have no preference of the judge"] * bool(unlabelled)
    imprints, dropped, more = _imprints(pairs, max_vif)
    flips: list[Flip] = []
    if pairs.rewritten is not None:
        done = np.isfinite(pairs.rewritten.rewards["reward"]).all(1)
        said += ["no pair was rewritten"] * (not done.any())
        if done.any():
            old, new = pairs.original.at(done), pairs.rewritten.at(done)
            for name, when in zip(REWARDS, ("after", "before"), strict=True):
                if name in old.rewards and name in new.rewards:
                    table[f"{when}, original"] = agreement(old.rewards[name])
                    table[f"{when}, rewritten"] = agreement(new.rewards[name])
            flips = robustness(old, new, pairs.names)
    return Analysis(len(after), imprints, dropped, table, moved, by, flips, (*said, *more))


def _imprints(pairs: Pairs, max_vif: float) -> tuple[dict[str, list[Effect]], dict[str, str], list[str]]:
    """(imprints, features without one, what to say)."""
    if not pairs.names:
        return {}, {}, ["no features: no column pair chosen_NAME, rejected_NAME of true and false"]
    features = pairs.original.features
    labelled = ~np.isnan(features).any((1, 2))
    missing = int((~labelled).sum())
    said = [f"left out {missing} pairs without all features from the imprint"] * bool(missing)
    differences, clusters = features[labelled, 0] - features[labelled, 1], pairs.clusters[labelled]
    kept, dropped = choose_features(differences, pairs.names, clusters, max_vif=max_vif)
    if not kept:
        return {}, dropped, said
    columns = differences[:, [pairs.names.index(name) for name in kept]]
    gains = {name: values[labelled, 0] - values[labelled, 1] for name, values in pairs.original.rewards.items()}
    outcomes = {"after": gains["reward"]}
    if "reward_pre" in gains:
        outcomes |= {"before": gains["reward_pre"], "shift": gains["reward"] - gains["reward_pre"]}
    for when, gain in outcomes.items():
        expected = "some that change" if when == "shift" else "some that differ within a pair"
        require(bool(gain.any()), OP, f"rewards, {when}", expected, "only equal ones")
    return {when: imprint(columns, gain, kept, clusters) for when, gain in outcomes.items()}, dropped, said
