"""Specifications of policy losses: frozen dataclasses, one per factor. Data only; `fastrl.losses` computes them.

A policy-gradient loss is ratio level x surrogate x KL term x aggregation. Named algorithms are combinations of these
(`fastrl.losses.presets`), so there is no `loss_type` anywhere.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import lru_cache
from typing import Literal, get_args

Ratio = Literal["token", "sequence", "sequence_token"]
Level = Literal["token", "sequence"]
Aggregate = Literal["token_mean", "prompt_mean", "seq_mean_token_mean", "seq_mean_token_sum", "token_sum"]
AGGREGATES = get_args(Aggregate)
KLKind = Literal["k1", "k2", "k3", "k3_ratio", "k1+", "k3+"]


def _require(condition: bool, what: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{what}: expected {expected}, got {got!r}.")


def _require_choice(what: str, literal: object, got: object) -> None:
    choices = get_args(literal)
    _require(got in choices, what, f"one of {', '.join(choices)}", got)


def _require_finite(what: str, value: float, low: float, *, above: bool = False) -> None:
    ok = isinstance(value, int | float) and math.isfinite(value) and (value > low if above else value >= low)
    _require(ok, what, f"a finite number {'above' if above else 'of at least'} {low:g}", value)


@dataclass(frozen=True)
class Clip:
    """-min(rho A, clip(rho, 1-low, 1+high) A): PPO, arXiv:1707.06347 eq. 7. `dual` = c > 1 bounds the loss of a
    negative advantage at -c A: dual-clip PPO, arXiv:1912.09729 eq. 5.

    The two-sided clipping of INTELLECT-2, arXiv:2505.07291, -min(min(rho, delta) A, clip(rho, 1-low, 1+high) A), is the
    same bound: `dual` = delta, for a delta of at least 1+high, as in the paper. A smaller delta, which TRL and Liger
    also accept, is Clip(low, delta - 1, dual=1 + high).
    """

    low: float
    high: float
    dual: float | None = None

    def __post_init__(self) -> None:
        _require_finite("Clip.low", self.low, 0.0)
        _require_finite("Clip.high", self.high, 0.0)
        if self.dual is not None:
            _require_finite("Clip.dual", self.dual, 1.0, above=True)


@dataclass(frozen=True)
class Cispo:
    """-sg(clamp(rho, ratio_min, ratio_max)) A log pi: CISPO, arXiv:2506.13585 eq. 4. The bounds are absolute values of
    the ratio, not distances from 1: `ratio_max=5` clamps at 5, not at 6.

    ScaleRL, TRL, Liger and Tinker use absolute bounds too. The default upper bound of TRL and Liger is 0.2, which
    weights each token near a ratio of 1 by 0.2. verl and NeMo-RL use distances low and high, which are
    Cispo(ratio_max=1 + high, ratio_min=max(0, 1 - low)).
    """

    ratio_max: float
    ratio_min: float = 0.0

    def __post_init__(self) -> None:
        _require_finite("Cispo.ratio_min", self.ratio_min, 0.0)
        _require_finite("Cispo.ratio_max", self.ratio_max, self.ratio_min)


@dataclass(frozen=True)
class Sapo:
    """-(4 / tau) sigmoid(tau (rho - 1)) A, with tau_pos where A > 0 and tau_neg elsewhere: SAPO, arXiv:2511.20347."""

    tau_pos: float = 1.0
    tau_neg: float = 1.05

    def __post_init__(self) -> None:
        _require_finite("Sapo.tau_pos", self.tau_pos, 0.0, above=True)
        _require_finite("Sapo.tau_neg", self.tau_neg, 0.0, above=True)


@dataclass(frozen=True)
class Reinforce:
    """-A log pi: the score-function estimator, no ratio."""


@dataclass(frozen=True)
class Dppo:
    """-M rho A, with a mask M that is 0 if the token's probability has moved by more than a total variation of `high`
    (A > 0, upwards) or `low` (A < 0, downwards), else 1: DPPO-Binary-TV, arXiv:2602.04879. For `ratio="token"`.

    The bounds are differences of probabilities, pi - pi_old, so a rare token may change its ratio a lot. The paper and
    prime-rl use this form; verl uses -M sg(min(rho, 20)) A log pi, which has the same gradient up to a ratio of 20.
    pi_old is the policy of `old_logps`. The paper compares with the sampler: pass its log-probabilities there.
    """

    low: float = 0.2
    high: float = 0.2

    def __post_init__(self) -> None:
        _require_finite("Dppo.low", self.low, 0.0)
        _require_finite("Dppo.high", self.high, 0.0)


@dataclass(frozen=True)
class Gmpo:
    """-exp(mean_t l_t) A, with the token's log-ratio log rho_t clipped against its advantage's pull: l_t =
    min(log rho_t, high) where A > 0, max(log rho_t, -low) elsewhere: GMPO, arXiv:2507.20673. For `ratio="sequence"`.

    The geometric mean of clipped token ratios. The bounds are in log space: exp(-0.4) to exp(0.4) by default, as in
    the paper, TRL and verl. A clipped token gets no gradient. TRL's entropy mask also leaves low-entropy tokens out of
    the mean; here the mean is over the tokens of `mask`.
    """

    low: float = 0.4
    high: float = 0.4

    def __post_init__(self) -> None:
        _require_finite("Gmpo.low", self.low, 0.0)
        _require_finite("Gmpo.high", self.high, 0.0)


@dataclass(frozen=True)
class Vespo:
    """-sg(phi(W)) A log pi, phi(W) = W^k exp(lam (1 - W)), with the whole sequence's ratio W = exp(sum_t log rho_t),
    and k and lam for the advantage's sign (0 counts as positive): VESPO, arXiv:2602.10693. For `ratio="sequence"`.

    phi(1) = 1, and phi vanishes for sequences that have become much rarer or more frequent. There is no length
    normalisation. Defaults are from TRL and Liger, which also multiply W by the product of their correction weights;
    here, pass the sampler's log-probabilities as `old_logps` instead. log W is clamped to [-20, 20].
    """

    k_pos: float = 2.0
    lam_pos: float = 3.0
    k_neg: float = 3.0
    lam_neg: float = 2.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            _require_finite(f"Vespo.{name}", value, 0.0, above=True)


Surrogate = Clip | Cispo | Sapo | Reinforce | Dppo | Gmpo | Vespo
SURROGATES = {cls.__name__: cls for cls in (Clip, Cispo, Sapo, Reinforce, Dppo, Gmpo, Vespo)}
ONLY_RATIO: dict[type, Ratio] = {Dppo: "token", Gmpo: "sequence", Vespo: "sequence"}


@dataclass(frozen=True)
class KL:
    """`coef` times a per-token estimate of KL(pi || pi_ref), d = ref_logps - logps (http://joschu.net/blog/kl-approx.html).

    | kind       | value               | expected gradient on-policy                    |
    |------------|---------------------|------------------------------------------------|
    | `k1`       | -d                  | 0: useful in the reward, not in the loss       |
    | `k2`       | d^2 / 2             | reverse KL                                     |
    | `k3`       | e^d - d - 1         | forward KL                                     |
    | `k3_ratio` | rho (e^d - d - 1)   | reverse KL, also off-policy (DeepSeek-V3.2)    |
    | `k1+`      | -d                  | reverse KL                                     |
    | `k3+`      | e^d - d - 1         | reverse KL                                     |

    rho is the loss's ratio, per token or per sequence, as in TRL; with GMPO and VESPO it is per token. The table's
    gradient is for the token's ratio. A plus is verl's straight-through form: the value of the estimate with the
    derivative of k2. If d is above 20, e^d is clamped to the constant e^20. The derivative of `k3_ratio` with the
    token's rho is always -rho d.
    """

    kind: KLKind
    coef: float

    def __post_init__(self) -> None:
        _require_choice("KL.kind", KLKind, self.kind)
        _require_finite("KL.coef", self.coef, 0.0)


@dataclass(frozen=True)
class Correction:
    """Importance weight for the mismatch between the sampler and the trainer, applied to the surrogate as a constant.

    w = exp(old_logps - sampling_logps) at `level="token"`; exp of the *mean* over the sequence's tokens at
    `level="sequence"`, so the weight does not grow with length. `truncate`: min(w, high), TIS.
    `mask`: w where low <= w <= high, 0 elsewhere, IcePop.

    Libraries disagree at the sequence level: TRL, and verl by default, take exp of the *sum*. Every surrogate is linear
    in the size of the advantage, so that is the loss without a correction and with each sequence's advantages
    multiplied by its weight.
    """

    kind: Literal["truncate", "mask"]
    level: Literal["token", "sequence"]
    high: float
    low: float = 0.0

    def __post_init__(self) -> None:
        _require_choice("Correction.kind", Literal["truncate", "mask"], self.kind)
        _require_choice("Correction.level", Level, self.level)
        _require_finite("Correction.low", self.low, 0.0)
        _require_finite("Correction.high", self.high, self.low)


@dataclass(frozen=True)
class PolicyLoss:
    """A policy loss: sum_t w_t (c_t surrogate_t + kl.coef KL_t - entropy_coef H_t).

    The weights w_t combine mask, aggregation and normaliser (`fastrl.losses.aggregate`); c_t is `correction`'s weight.
    `ratio="sequence"` uses rho_i = exp(mean_t(logps - old_logps)) for every token of sequence i: GSPO,
    arXiv:2507.18071. `ratio="sequence_token"` is GSPO-token, its section 4.3: sg(rho_i) pi_t / sg(pi_t), the same value
    with a derivative by the token's own log-probability instead of the mean. It lets advantages differ within a
    sequence; with one advantage and equal weights per sequence, the gradients are the same too.
    """

    ratio: Ratio = "token"
    surrogate: Surrogate = Clip(low=0.2, high=0.2)
    kl: KL | None = None
    aggregate: Aggregate = "seq_mean_token_mean"
    entropy_coef: float = 0.0
    correction: Correction | None = None
    # All of the above as text, to cross the operator boundary; made here because torch.compile cannot trace json.
    # `decode` is the inverse.
    code: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _require_choice("PolicyLoss.ratio", Ratio, self.ratio)
        _require(
            isinstance(self.surrogate, tuple(SURROGATES.values())),
            "PolicyLoss.surrogate",
            f"one of {', '.join(SURROGATES)}",
            self.surrogate,
        )
        only = ONLY_RATIO.get(type(self.surrogate), self.ratio)
        _require(self.ratio == only, "PolicyLoss.ratio", f"{only!r} with {type(self.surrogate).__name__}", self.ratio)
        _require(self.kl is None or isinstance(self.kl, KL), "PolicyLoss.kl", "a KL or None", self.kl)
        _require_choice("PolicyLoss.aggregate", Aggregate, self.aggregate)
        _require_finite("PolicyLoss.entropy_coef", self.entropy_coef, -math.inf, above=True)
        _require(
            self.correction is None or isinstance(self.correction, Correction),
            "PolicyLoss.correction",
            "a Correction or None",
            self.correction,
        )
        factors = {name: asdict(value) if is_dataclass(value) else value for name, value in vars(self).items()}
        factors["surrogate"]["name"] = type(self.surrogate).__name__
        object.__setattr__(self, "code", json.dumps(factors, sort_keys=True))

    @property
    def separable(self) -> bool:
        """True if a token's loss does not depend on other tokens' log-probabilities: it can be computed in chunks."""
        per_sequence_correction = self.correction is not None and self.correction.level == "sequence"
        return self.ratio == "token" and not per_sequence_correction

    @property
    def needs_ref(self) -> bool:
        """True when the loss reads `ref_logps`."""
        return self.kl is not None and self.kl.coef != 0.0

    @property
    def needs_entropy(self) -> bool:
        """True if the entropy is part of the loss and so needs a gradient."""
        return self.entropy_coef != 0.0


@lru_cache
def decode(text: str) -> PolicyLoss:
    """The `PolicyLoss` whose `code` this is."""
    fields = json.loads(text)
    surrogate = fields.pop("surrogate")
    kl, correction = fields.pop("kl"), fields.pop("correction")
    return PolicyLoss(
        surrogate=SURROGATES[surrogate.pop("name")](**surrogate),
        kl=KL(**kl) if kl else None,
        correction=Correction(**correction) if correction else None,
        **fields,
    )
