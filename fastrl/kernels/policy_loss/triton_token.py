"""One token of a policy loss, w (c surrogate + coef KL - entropy_coef H), its derivatives and what it reports: the
Triton copy of the formulas, as csrc/math/policy_token.h is the C++ one.

The kinds of a spec's factors are compile-time constants (`kinds`), their numbers are read at run time (`parameters`): a
coefficient on a schedule compiles nothing anew.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from fastrl.kernels.policy_loss.reference import LOG_RATIO_BOUND
from fastrl.kernels.triton_jit import device_function, scalars
from fastrl.kernels.triton_math import exp, expm1, is_finite
from fastrl.spec import Cispo, Clip, Dppo, Gmpo, PolicyLoss, Sapo, Vespo

BOUND = tl.constexpr(LOG_RATIO_BOUND)
# Where `parameters` has which number: four of the surrogate, then one of the KL, two of the correction, one of H.
FIRST, SECOND, THIRD, FOURTH, KL_COEF, CORRECTION_LOW, CORRECTION_HIGH, ENTROPY_COEF = map(tl.constexpr, range(8))


def kinds(spec: PolicyLoss) -> dict[str, Any]:
    """The compile-time arguments of `policy_token`."""
    return {
        "SURROGATE": type(spec.surrogate).__name__,
        "SEQUENCE_RATIO": spec.ratio != "token",
        "SHARED_RATIO": spec.ratio == "sequence",
        "KL": spec.kl.kind if spec.needs_ref else "",
        "CORRECTION": spec.correction.kind if spec.correction else "",
        "SEQUENCE_CORRECTION": spec.correction is not None and spec.correction.level == "sequence",
        "WITH_ENTROPY": spec.needs_entropy,
    }


def parameters(spec: PolicyLoss, device: torch.device) -> torch.Tensor:
    """(8,) float64: the numbers of a spec. Bounds are those of the ratio itself, or, of a Dppo, distances of
    probabilities, of a Gmpo, of log-ratios; a dual of 0 is none."""
    s, correction = spec.surrogate, spec.correction
    surrogate = (0.0, 0.0, 0.0, 0.0)
    if isinstance(s, Clip):
        surrogate = (1 - s.low, 1 + s.high, s.dual or 0.0, 0.0)
    elif isinstance(s, Cispo):
        surrogate = (s.ratio_min, s.ratio_max, 0.0, 0.0)
    elif isinstance(s, Dppo | Gmpo):
        surrogate = (s.low, s.high, 0.0, 0.0)
    elif isinstance(s, Sapo):
        surrogate = (s.tau_pos, s.tau_neg, 0.0, 0.0)
    elif isinstance(s, Vespo):
        surrogate = (s.k_pos, s.k_neg, s.lam_pos, s.lam_neg)
    corrected = (correction.low, correction.high) if correction else (0.0, 0.0)
    return scalars(device, *surrogate, spec.kl.coef if spec.kl else 0.0, *corrected, spec.entropy_coef)


@device_function
def clamp(x: tl.tensor, low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@device_function
def bound(raw: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """A log-ratio held where its exp is finite, and whether it was beyond: there it is a constant. NaN stays NaN."""
    return clamp(raw, -BOUND, BOUND), tl.abs(raw) > BOUND


@device_function
def summed_log_ratio(params: tl.tensor, raw: tl.tensor, advantage: tl.tensor, SURROGATE: tl.constexpr) -> tl.tensor:
    """A token's log-ratio as its sequence adds it up: Gmpo clips it where it goes on as its advantage pulls."""
    if SURROGATE == "Gmpo":
        low = tl.load(params + FIRST).to(raw.dtype)
        high = tl.load(params + SECOND).to(raw.dtype)
        below = tl.where(raw > high, high, raw)
        above = tl.where(raw < -low, -low, raw)
        raw = tl.where(advantage > 0.0, below, above)
    return raw


@device_function
def surrogate_term(
    params: tl.tensor,
    log_ratio: tl.tensor,
    ratio: tl.tensor,
    logp: tl.tensor,
    old_logp: tl.tensor,
    advantage: tl.tensor,
    SURROGATE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """loss, its derivatives through the log-ratio and directly by logp, clipped from below, clipped from above.

    Clip: -min(rho A, clip(rho, low, high) A), with `dual` > 0 at most -dual A where A < 0; a tie is not clipped.
    Cispo: -sg(clamp(rho, low, high)) A log pi. Sapo: -(4 / tau) sigmoid(tau (rho - 1)) A. Reinforce: -A log pi.
    Dppo: -rho A, and nothing where the probability fell by more than `low` and A < 0, or rose by more than `high` and
    A > 0. Gmpo: -rho A, rho the mean of clipped log-ratios. Vespo: -sg(W^k exp(lam (1 - W))) A log pi, log W =
    `log_ratio`.
    """
    zero = tl.full(logp.shape, 0.0, logp.dtype)
    first = tl.load(params + FIRST).to(logp.dtype)
    second = tl.load(params + SECOND).to(logp.dtype)
    loss, dlog_ratio, dlogp = zero, zero, zero
    low, high = zero < zero, zero < zero
    if SURROGATE == "Clip":
        dual = tl.load(params + THIRD).to(logp.dtype)
        bounded = clamp(ratio, first, second)
        clipped = ratio * advantage > bounded * advantage
        loss = -(tl.where(clipped, bounded, ratio) * advantage)
        ceiling = -dual * advantage
        beyond = (ceiling > 0.0) & (loss > ceiling)  # above 0 where A < 0 and there is a dual
        loss = tl.where(beyond, ceiling, loss)
        clipped = clipped | beyond
        dlog_ratio = tl.where(clipped, 0.0, -ratio * advantage)
        low, high = clipped & (advantage < 0.0), clipped & (advantage > 0.0)
    elif SURROGATE == "Cispo":
        dlogp = -clamp(ratio, first, second) * advantage
        loss = dlogp * logp
        low, high = ratio < first, ratio > second
    elif SURROGATE == "Sapo":
        tau = tl.where(advantage > 0.0, first, second)
        gate = 1.0 / (1.0 + exp(tau * (1.0 - ratio)))
        loss = -4.0 / tau * gate * advantage
        dlog_ratio = -4.0 * gate * (1.0 - gate) * ratio * advantage
    elif SURROGATE == "Dppo":
        moved = exp(logp) - exp(old_logp)
        low, high = (advantage < 0.0) & (moved < -first), (advantage > 0.0) & (moved > second)
        loss = tl.where(low | high, 0.0, -ratio * advantage)
        dlog_ratio = loss
    elif SURROGATE == "Gmpo":
        raw = logp - old_logp
        clipped = (summed_log_ratio(params, raw, advantage, SURROGATE) == raw) == 0
        loss = -ratio * advantage
        dlog_ratio = loss
        low, high = clipped & ((advantage > 0.0) == 0), clipped & (advantage > 0.0)
    elif SURROGATE == "Vespo":
        positive = advantage >= 0.0
        k = tl.where(positive, first, second)
        lam = tl.where(positive, tl.load(params + THIRD).to(logp.dtype), tl.load(params + FOURTH).to(logp.dtype))
        dlogp = -exp(k * log_ratio - lam * expm1(log_ratio)) * advantage
        loss = dlogp * logp
    else:
        tl.static_assert(SURROGATE == "Reinforce")
        dlogp = -advantage
        loss = dlogp * logp
    return loss, dlog_ratio, dlogp, low, high


@device_function
def k3(raw: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """e^d - d - 1, its derivative by -d, and where d is held at its bound and a constant."""
    beyond = raw > BOUND
    d = tl.where(beyond, BOUND, raw)
    growth = expm1(d)
    return growth - d, tl.where(beyond, 0.0, -growth), beyond


@device_function
def kl_term(
    d: tl.tensor, ratio: tl.tensor, KL: tl.constexpr, OF_SEQUENCE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """k1 = -d, k2 = d^2 / 2, k3 = e^d - d - 1 or k3_ratio = rho k3, with d = ref_logp - logp and the loss's own rho;
    its derivatives through the ratio, where that is a sequence's, and by the token's logp, which k1+ and k3+ take from
    k2; and where it exponentiates a d beyond the bound. With the token's rho, d (rho k3) is -rho d, at any d."""
    dlog_ratio = tl.full(d.shape, 0.0, d.dtype)
    if KL == "k1":
        loss, dlogp, beyond = -d, tl.full(d.shape, 1.0, d.dtype), d < d
    elif KL == "k1+":
        loss, dlogp, beyond = -d, -d, d < d
    elif KL == "k2":
        loss, dlogp, beyond = d * d / 2.0, -d, d < d
    else:
        loss, dlogp, beyond = k3(d)
        if KL == "k3_ratio":
            loss = ratio * loss
            if OF_SEQUENCE:
                dlog_ratio = tl.where(beyond, 0.0, loss)
                dlogp = ratio * dlogp
            else:
                dlogp = -ratio * d
        elif KL == "k3+":
            dlogp = -d
        else:
            tl.static_assert(KL == "k3")
    return loss, dlog_ratio, dlogp, beyond


@device_function
def correction_weight(
    params: tl.tensor, log_weight: tl.tensor, CORRECTION: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """min(w, high), or w within [low, high] and 0 outside, with w = exp(log_weight); whether w was left as it is."""
    held, _ = bound(log_weight)
    weight = exp(held)
    high = tl.load(params + CORRECTION_HIGH).to(weight.dtype)
    if CORRECTION == "truncate":
        kept = weight <= high
        weight = tl.where(weight > high, high, weight)
    else:
        tl.static_assert(CORRECTION == "mask")
        outside = (weight < tl.load(params + CORRECTION_LOW).to(weight.dtype)) | (weight > high)
        kept = outside == 0
        weight = tl.where(outside, 0.0, weight)
    return weight, kept


@device_function
def policy_token(
    params: tl.tensor,
    logp: tl.tensor,
    advantage: tl.tensor,
    weight: tl.tensor,
    old_logp: tl.tensor,
    ref_logp: tl.tensor,
    sampling_logp: tl.tensor,
    entropy: tl.tensor,
    mean_log_ratio: tl.tensor,
    mean_mismatch: tl.tensor,
    SURROGATE: tl.constexpr,
    SEQUENCE_RATIO: tl.constexpr,
    SHARED_RATIO: tl.constexpr,
    KL: tl.constexpr,
    CORRECTION: tl.constexpr,
    SEQUENCE_CORRECTION: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """loss, dlog_ratio, dlogp, dentropy, weighted, before a sequence shares its ratio's derivative; then the metrics
    clipped low, clipped high, ratio, kl, old_kl, |mismatch|, importance, kept, clamped, nonfinite.

    What is not given is 0, but old_logp and ref_logp, which are then logp, and sampling_logp, which is then old_logp.
    The means are those of the token's sequence, read where the spec asks for them; Vespo's log-ratio is a sum.
    """
    own_raw, mismatch, d = logp - old_logp, old_logp - sampling_logp, ref_logp - logp
    log_ratio, beyond = bound(own_raw)
    own = log_ratio
    if SEQUENCE_RATIO:
        log_ratio, beyond = bound(mean_log_ratio)
    ratio = exp(log_ratio)
    loss, dlog_ratio, dlogp, low, high = surrogate_term(params, log_ratio, ratio, logp, old_logp, advantage, SURROGATE)
    dlog_ratio = tl.where(beyond, 0.0, dlog_ratio)

    if CORRECTION != "":
        log_weight = mean_mismatch if SEQUENCE_CORRECTION else mismatch
        importance, kept = correction_weight(params, log_weight, CORRECTION)
        loss, dlog_ratio, dlogp = importance * loss, importance * dlog_ratio, importance * dlogp
    else:
        held, kept = bound(mismatch)  # reported nowhere as kept
        importance = exp(held)
    if KL != "":
        coef = tl.load(params + KL_COEF).to(logp.dtype)
        # What Gmpo and Vespo make of a sequence is no ratio of its probabilities: there the token's own is taken.
        OF_TOKEN: tl.constexpr = SURROGATE == "Gmpo" or SURROGATE == "Vespo"
        OF_SEQUENCE: tl.constexpr = SHARED_RATIO and not OF_TOKEN
        kl_ratio = exp(own) if OF_TOKEN else ratio
        kl_loss, kl_dlog_ratio, kl_dlogp, kl_beyond = kl_term(d, kl_ratio, KL, OF_SEQUENCE)
        loss, dlogp = loss + coef * kl_loss, dlogp + coef * kl_dlogp
        if KL == "k3_ratio" and OF_SEQUENCE:
            dlog_ratio = dlog_ratio + tl.where(beyond, 0.0, coef * kl_dlog_ratio)
        beyond = beyond | kl_beyond
    dentropy = tl.full(logp.shape, 0.0, logp.dtype)
    if WITH_ENTROPY:
        entropy_coef = tl.load(params + ENTROPY_COEF).to(logp.dtype)
        loss = loss - entropy_coef * entropy
        dentropy = -entropy_coef * weight

    silent = weight == 0.0  # exactly nothing, also where the term is NaN
    loss = tl.where(silent, 0.0, weight * loss)
    dlog_ratio = tl.where(silent, 0.0, weight * dlog_ratio)
    dlogp = tl.where(silent, 0.0, weight * dlogp)
    kl, _, _ = k3(d)
    old_kl, _, _ = k3(own_raw)  # of the old policy against this one, from the old one's samples
    broken = (is_finite(logp) & is_finite(loss)) == 0
    difference = tl.abs(mismatch)
    return loss, dlog_ratio, dlogp, dentropy, low, high, ratio, kl, old_kl, difference, importance, kept, beyond, broken
