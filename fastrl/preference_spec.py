"""Specifications of preference losses: frozen dataclasses, one per factor. Data only; `fastrl.losses` computes them.

Log-probabilities become rewards, a link combines the two rewards of a pair, and terms add up:

    x(y) = sum_t log pi(y_t), with the tokens past the length of the pair's shorter answer times `ld_alpha`
    h(y) = x(y) - x_ref(y), or x(y) where `reference` is False
    r(y) = beta transform(h(y)), with the division by |y| that `length` asks for
    D    = r(chosen) - r(rejected) - margin
    loss = link(D), or link(r(chosen), r(rejected))

Named losses are combinations of these (`fastrl.losses.presets`), so there is no `loss_type` anywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from fastrl import check

MarginLink = Literal["sigmoid", "hinge", "ipo", "exo_pair", "discopop"]
RewardLink = Literal["bco_pair", "nca_pair", "sppo_hard", "apo_zero", "apo_down"]
Link = Literal[MarginLink, RewardLink]
Length = Literal["sum", "mean", "reward_mean"]
Match = Literal["pairs", "aot", "aot_unpaired"]
Weighting = Literal["none", "wpo"]
SftAggregate = Literal["seq_mean_token_mean", "token_mean", "seq_mean_token_sum"]
Baseline = Literal["kl", "zero"]


def _choice(what: str, literal: object, got: object) -> None:
    check.choice(*what.split("."), got, get_args(literal))


def _number(what: str, got: object, expected: str, low: float, high: float = math.inf, *, above: bool = False) -> None:
    ok = isinstance(got, int | float) and math.isfinite(got) and low <= got < high and not (above and got == low)
    op, argument = what.split(".")
    check.require(ok, op, argument, expected, repr(got))


@dataclass(frozen=True)
class Power:
    """(e^{c h} - 1) / c with c = `exponent`; h itself for c = 0. c h is clamped to at most 80, without gradient beyond.

    | c         | f'(e^h), f-DPO, arXiv:2309.16240                      | without a reference        |
    |-----------|-------------------------------------------------------|----------------------------|
    | 0         | reverse KL: DPO                                       | SimPO, CPO                 |
    | -1        | forward KL, 1 - e^{-h}                                |                            |
    | alpha - 1 | alpha divergence, TRL's `f_alpha_divergence_coef`     |                            |
    | -alpha    |                                                       | AlphaPO, arXiv:2501.03884  |
    """

    exponent: float = 0.0

    def __post_init__(self) -> None:
        _number("Power.exponent", self.exponent, "a finite number", -math.inf)


@dataclass(frozen=True)
class JensenShannon:
    """log 2 + log sigmoid(h): the Jensen-Shannon divergence from the reference, arXiv:2309.16240."""


@dataclass(frozen=True)
class LogOdds:
    """log(p / (1 - p)) with p = e^h, without a reference: ORPO, arXiv:2403.07691.

    h is clamped to at most -eps of its dtype, without gradient beyond, because a certain answer has infinite odds.
    """


Transform = Power | JensenShannon | LogOdds


@dataclass(frozen=True)
class PreferenceLoss:
    """The loss of a pair; the module's docstring has the equations.

    Links on the margin D. Label noise e = `label_smoothing` makes them (1 - e) l(D) + e l(-D), which is cDPO for
    `sigmoid`; `debias` makes that ((1 - e) l(D) - e l(-D)) / (1 - 2e), robust DPO, arXiv:2403.00409:

    | link       | l(D)                                                   | source                     |
    |------------|--------------------------------------------------------|----------------------------|
    | `sigmoid`  | -log sigmoid(D)                                        | DPO, arXiv:2305.18290      |
    | `hinge`    | max(0, 1 - D)                                          | SLiC, arXiv:2305.10425     |
    | `ipo`      | ((D - 1/2) / beta)^2                                   | IPO, arXiv:2310.12036      |
    | `exo_pair` | KL([q, 1 - q] to [1 - e, e]), q = sigmoid(D)           | EXO, arXiv:2402.00856      |
    | `discopop` | (1 - m) (-log sigmoid(D)) + m e^{-D}, m = sigmoid(D / tau) | arXiv:2406.08414       |

    Links on the two rewards r, which take no margin, label noise, transform or match:

    | link        | value                                                                 | source                |
    |-------------|-----------------------------------------------------------------------|-----------------------|
    | `bco_pair`  | -log sigmoid(r_w) - log sigmoid(-r_l), with a reward shift of 0       | BCO, arXiv:2404.04656 |
    | `nca_pair`  | -log sigmoid(r_w) - (log sigmoid(-r_w) + log sigmoid(-r_l)) / 2       | NCA, arXiv:2402.05369 |
    | `sppo_hard` | ((r_w - 1/2)^2 + (r_l + 1/2)^2) / beta^2, win probabilities 1 and 0   | arXiv:2405.00675      |
    | `apo_zero`  | sigmoid(-r_w) + sigmoid(r_l)                                          | arXiv:2408.06266      |
    | `apo_down`  | sigmoid(r_w) + sigmoid(r_l - r_w)                                     | arXiv:2408.06266      |

    `length` says where a completion's token count |y| divides: `sum` nowhere, `mean` h before the transform,
    `reward_mean` the reward after it; the last two differ only under a transform. `match` says what D compares: the
    two sides of each pair; or (`aot`, arXiv:2406.05882) the sorted policy margins with the sorted reference margins of
    the batch; or (`aot_unpaired`) the sorted chosen rewards with the sorted rejected ones. `weighting="wpo"` multiplies
    a pair by exp(mean_t(log p_t - log sum_v p_v^2)) of both sides, a constant: arXiv:2406.11827.
    `ld_alpha`: arXiv:2409.06411.
    """

    link: Link = "sigmoid"
    beta: float = 0.1
    reference: bool = True
    length: Length = "sum"
    transform: Transform = Power(0.0)
    margin: float = 0.0
    label_smoothing: float = 0.0
    debias: bool = False
    match: Match = "pairs"
    ld_alpha: float = 1.0
    weighting: Weighting = "none"
    tau: float = 0.05  # of `discopop`

    def __post_init__(self) -> None:
        _choice("PreferenceLoss.link", Link, self.link)
        _choice("PreferenceLoss.length", Length, self.length)
        _choice("PreferenceLoss.match", Match, self.match)
        _choice("PreferenceLoss.weighting", Weighting, self.weighting)
        _number("PreferenceLoss.beta", self.beta, "a finite number above 0", 0.0, above=True)
        _number("PreferenceLoss.margin", self.margin, "a finite number of at least 0", 0.0)
        _number("PreferenceLoss.label_smoothing", self.label_smoothing, "a number from 0 to below 0.5", 0.0, 0.5)
        _number("PreferenceLoss.ld_alpha", self.ld_alpha, "a number from 0 to 1", 0.0, math.nextafter(1.0, 2.0))
        _number("PreferenceLoss.tau", self.tau, "a finite number above 0", 0.0, above=True)
        known = isinstance(self.transform, Power | JensenShannon | LogOdds)
        self._require(known, "transform", "Power, JensenShannon or LogOdds", self.transform)
        self._check_combination()

    def _check_combination(self) -> None:
        plain = self.transform == Power(0.0)
        of_policy = not isinstance(self.transform, LogOdds) or not self.reference
        self._require(of_policy, "reference", "False for LogOdds, whose ratio is not a probability", True)
        if not self.compares:
            noiseless = self.label_smoothing == 0.0 and not self.debias
            self._require(noiseless, "label_smoothing", f"no label noise for {self.link}", self.label_smoothing)
            self._require(self.margin == 0.0, "margin", f"0 for {self.link}", self.margin)
            self._require(plain, "transform", f"Power(0.0) for {self.link}", self.transform)
            self._require(self.match == "pairs", "match", f"'pairs' for {self.link}", self.match)
        if self.link == "exo_pair":
            self._require(self.label_smoothing > 0, "label_smoothing", "above 0 for exo_pair, such as 1e-3", 0.0)
            self._require(not self.debias, "debias", "False for exo_pair", True)
        if self.match != "pairs":
            self._require(plain, "transform", f"Power(0.0) for match={self.match!r}", self.transform)
            unweighted = self.weighting == "none"
            self._require(unweighted, "weighting", f"'none' for match={self.match!r}, which mixes pairs", "wpo")
        used = self.link == "discopop" or self.tau == type(self).tau
        self._require(used, "tau", f"its default for {self.link}, which has no tau", self.tau)

    @staticmethod
    def _require(condition: bool, argument: str, expected: str, got: object) -> None:
        check.require(condition, "PreferenceLoss", argument, expected, repr(got))

    @property
    def compares(self) -> bool:
        """True if the link takes the margin between the two rewards."""
        return self.link in get_args(MarginLink)

    @property
    def takes_soft_labels(self) -> bool:
        """True if each pair may have its own label noise: the spec has none and compares pair by pair."""
        noiseless = self.label_smoothing == 0.0 and not self.debias
        return self.compares and self.match == "pairs" and self.link != "exo_pair" and noiseless

    @property
    def takes_margins(self) -> bool:
        """True if each pair may have its own margin: the spec has none and compares pair by pair."""
        return self.compares and self.match == "pairs" and self.margin == 0.0

    @property
    def needs_ref(self) -> bool:
        """True when the loss reads the reference's log-probabilities."""
        return self.reference


@dataclass(frozen=True)
class Sft:
    """-log pi of the chosen answers' tokens, averaged as in `fastrl.losses.aggregate`: the SFT term of RPO and ORPO.

    `seq_mean_token_mean` averages over each answer first, as in RPO's paper; `token_mean` averages over all tokens of
    the batch, as TRL does for every loss; `seq_mean_token_sum` is -E log pi(y), as in CPO's paper.
    """

    aggregate: SftAggregate = "seq_mean_token_mean"

    def __post_init__(self) -> None:
        _choice("Sft.aggregate", SftAggregate, self.aggregate)


@dataclass(frozen=True)
class PreferenceMix:
    """A weighted sum of terms, sum_k weight_k term_k: RPO, MPO, CPO, ORPO. Metrics are of its first pair loss."""

    terms: tuple[tuple[float, PreferenceLoss | Sft], ...]

    def __post_init__(self) -> None:
        pairs = isinstance(self.terms, tuple) and all(isinstance(term, tuple) and len(term) == 2 for term in self.terms)
        check.require(pairs, "PreferenceMix", "terms", "a tuple of (weight, term)", repr(self.terms))
        for weight, term in self.terms:
            _number("PreferenceMix.terms", weight, "finite weights of at least 0", 0.0)
            known = isinstance(term, PreferenceLoss | Sft)
            check.require(known, "PreferenceMix", "terms", "PreferenceLoss or Sft terms", repr(term))
        some = any(isinstance(term, PreferenceLoss) for _, term in self.terms)
        check.require(some, "PreferenceMix", "terms", "at least one PreferenceLoss", repr(self.terms))

    @property
    def needs_ref(self) -> bool:
        """True when a term reads the reference's log-probabilities."""
        return any(isinstance(term, PreferenceLoss) and term.needs_ref for _, term in self.terms)


@dataclass(frozen=True)
class UnpairedPreferenceLoss:
    """w_y sigmoid(-s_y (r - beta z)), with r = beta h, s_y = 1 for desirable answers and -1 for the others, and w_y
    `desirable_weight` or `undesirable_weight`.

    `baseline="kl"`: z = max(0, mean of x - x_ref over answers to other prompts), a constant: KTO, arXiv:2402.01306.
    `baseline="zero"`: z = 0, the unpaired APO-zero, arXiv:2408.06266.
    """

    beta: float = 0.1
    baseline: Baseline = "kl"
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        _choice("UnpairedPreferenceLoss.baseline", Baseline, self.baseline)
        _number("UnpairedPreferenceLoss.beta", self.beta, "a finite number above 0", 0.0, above=True)
        for name in ("desirable_weight", "undesirable_weight"):
            _number(f"UnpairedPreferenceLoss.{name}", getattr(self, name), "a finite number of at least 0", 0.0)
