"""From log-ratios to rewards and from rewards to the loss of a pair: one function per transform, link and match.

`fastrl.preference_spec` has the equations and their papers. Every function except the matches is elementwise on (P,).
All are numerically stable: no exponential of something large, no logarithm of a rounded sigmoid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid

from fastrl import check
from fastrl.preference_spec import JensenShannon, LogOdds, Power, PreferenceLoss, Transform

EXPONENT_BOUND = 80.0  # e^80 is 5e34: finite in float32, as are its products with beta and a gradient
Flip = float | torch.Tensor  # the probability that a pair's label is wrong


def flip_of(op: str, soft_labels: torch.Tensor) -> torch.Tensor:
    """1 - p, for the probabilities p that the chosen answer is better; refuses values outside [0, 1]."""
    p = soft_labels.detach()
    return 1 - check.values(op, "soft_labels", p, (p >= 0) & (p <= 1), "probabilities")


def transform(h: torch.Tensor, kind: Transform) -> torch.Tensor:
    """The reward of a log-ratio, before beta."""
    return _TRANSFORMS[type(kind)](h, kind)


def _power(h: torch.Tensor, kind: Power) -> torch.Tensor:
    c = kind.exponent
    return h if c == 0.0 else torch.expm1((c * h).clamp(max=EXPONENT_BOUND)) / c


def _jensen_shannon(h: torch.Tensor, _: JensenShannon) -> torch.Tensor:
    return math.log(2.0) + logsigmoid(h)


def _log_odds(h: torch.Tensor, _: LogOdds) -> torch.Tensor:
    h = h.clamp(max=-torch.finfo(h.dtype).eps)
    return h - torch.log(-torch.expm1(h))


_TRANSFORMS = {Power: _power, JensenShannon: _jensen_shannon, LogOdds: _log_odds}


def _sigmoid(margin: torch.Tensor, _: PreferenceLoss) -> torch.Tensor:
    return -logsigmoid(margin)


def _hinge(margin: torch.Tensor, _: PreferenceLoss) -> torch.Tensor:
    return torch.relu(1 - margin)


def _ipo(margin: torch.Tensor, spec: PreferenceLoss) -> torch.Tensor:
    return ((margin - 0.5) / spec.beta) ** 2


def _discopop(margin: torch.Tensor, spec: PreferenceLoss) -> torch.Tensor:
    modulation = margin / spec.tau
    # m e^{-D} as one exponential: apart, e^{-D} overflows where m is 0
    return -torch.sigmoid(-modulation) * logsigmoid(margin) + torch.exp(logsigmoid(modulation) - margin)


_MARGIN_LINKS: dict[str, Callable[[torch.Tensor, PreferenceLoss], torch.Tensor]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "discopop": _discopop,
}


def margin_loss(margin: torch.Tensor, flip: Flip, spec: PreferenceLoss) -> torch.Tensor:
    """The link applied to D, with label noise."""
    if spec.link == "exo_pair":
        log_q, log_not_q = logsigmoid(margin), logsigmoid(-margin)
        return log_q.exp() * (log_q - math.log1p(-flip)) + log_not_q.exp() * (log_not_q - math.log(flip))
    link = _MARGIN_LINKS[spec.link]
    if isinstance(flip, float) and flip == 0.0:
        return link(margin, spec)
    kept, flipped = (1 - flip) * link(margin, spec), flip * link(-margin, spec)
    return (kept - flipped) / (1 - 2 * flip) if spec.debias else kept + flipped


def _bco_pair(chosen: torch.Tensor, rejected: torch.Tensor, _: PreferenceLoss) -> torch.Tensor:
    return -logsigmoid(chosen) - logsigmoid(-rejected)


def _nca_pair(chosen: torch.Tensor, rejected: torch.Tensor, _: PreferenceLoss) -> torch.Tensor:
    return -logsigmoid(chosen) - 0.5 * (logsigmoid(-chosen) + logsigmoid(-rejected))


def _sppo_hard(chosen: torch.Tensor, rejected: torch.Tensor, spec: PreferenceLoss) -> torch.Tensor:
    return ((chosen - 0.5) / spec.beta) ** 2 + ((rejected + 0.5) / spec.beta) ** 2


def _apo_zero(chosen: torch.Tensor, rejected: torch.Tensor, _: PreferenceLoss) -> torch.Tensor:
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def _apo_down(chosen: torch.Tensor, rejected: torch.Tensor, _: PreferenceLoss) -> torch.Tensor:
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


_REWARD_LINKS: dict[str, Callable[[torch.Tensor, torch.Tensor, PreferenceLoss], torch.Tensor]] = {
    "bco_pair": _bco_pair,
    "nca_pair": _nca_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
}


class Answers(NamedTuple):
    """One side of the pairs, each (P,)."""

    policy: torch.Tensor  # x
    reference: torch.Tensor  # x_ref, zeros without a reference
    reward: torch.Tensor  # r


def _aot(chosen: Answers, rejected: Answers, spec: PreferenceLoss) -> torch.Tensor:
    policy = (chosen.policy - rejected.policy).sort().values
    return spec.beta * (policy - (chosen.reference - rejected.reference).sort().values)


_MATCHES: dict[str, Callable[[Answers, Answers, PreferenceLoss], torch.Tensor]] = {
    "pairs": lambda chosen, rejected, _: chosen.reward - rejected.reward,
    "aot": _aot,
    "aot_unpaired": lambda chosen, rejected, _: chosen.reward.sort().values - rejected.reward.sort().values,
}


def pair_loss(
    chosen: Answers, rejected: Answers, margin: float | torch.Tensor, flip: Flip, spec: PreferenceLoss
) -> torch.Tensor:
    """(P,) losses of the pairs or, if `match` sorts, of the ranks."""
    if not spec.compares:
        return _REWARD_LINKS[spec.link](chosen.reward, rejected.reward, spec)
    return margin_loss(_MATCHES[spec.match](chosen, rejected, spec) - margin, flip, spec)
