"""The policy loss in plain torch: the definition that every other backend is compared with.

Each surrogate and each KL estimate is one function that returns the value and, worked out by hand, the derivatives:
operator bodies run below autograd.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastrl.kernels.inputs import LossTokens
from fastrl.kernels.policy_loss.metrics import METRICS, merge_metrics, metric_table
from fastrl.spec import Cispo, Clip, Correction, Dppo, Gmpo, KLKind, PolicyLoss, Sapo, Surrogate, Vespo

__all__ = ["METRICS", "forward", "merge_metrics"]

LOG_RATIO_BOUND = 20.0  # exp of it is 5e8: still finite, also squared, and far beyond any ratio worth learning from


class TokenTerm(NamedTuple):
    """One term of the loss, per token: its value, its derivative through the log-ratio, its direct one by logps."""

    loss: torch.Tensor
    dlog_ratio: torch.Tensor
    dlogp: torch.Tensor
    low: torch.Tensor | None = None  # clipped from below, for the metrics
    high: torch.Tensor | None = None


class Tokens(NamedTuple):
    """The inputs, each (N,), with harmless zeros where the mask is False."""

    logps: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    mask: torch.Tensor
    old_logps: torch.Tensor
    ref_logps: torch.Tensor | None
    sampling_logps: torch.Tensor | None
    entropy: torch.Tensor | None


class Terms(NamedTuple):
    """The loss of some tokens; their derivatives, weights included, before a sequence shares its ratio's; metrics."""

    loss: torch.Tensor  # scalar
    dlog_ratio: torch.Tensor  # (N,)
    dlogp: torch.Tensor  # (N,)
    dentropy: torch.Tensor  # (N,)
    metrics: torch.Tensor  # (K, 2)


# The surrogates: log_ratio is already bounded, and old policies are constants.


def clip(log_ratio: torch.Tensor, advantages: torch.Tensor, low: float, high: float, dual: float | None) -> TokenTerm:
    """-min(rho A, clip(rho, 1-low, 1+high) A), with `dual` at most -dual A where A < 0. A tie is not clipped."""
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - low, 1 + high)
    clipped = ratio * advantages > bounded * advantages
    loss = -torch.where(clipped, bounded, ratio) * advantages
    if dual is not None:
        ceiling = -dual * advantages
        beyond = (advantages < 0) & (loss > ceiling)
        loss = torch.where(beyond, ceiling, loss)
        clipped = clipped | beyond
    dlog_ratio = torch.where(clipped, 0, -ratio * advantages)
    zeros = torch.zeros_like(loss)
    return TokenTerm(loss, dlog_ratio, zeros, clipped & (advantages < 0), clipped & (advantages > 0))


def cispo(log_ratio: torch.Tensor, logps: torch.Tensor, advantages: torch.Tensor, low: float, high: float) -> TokenTerm:
    """-sg(clamp(rho, low, high)) A log pi: the ratio is a constant, so no token loses its gradient."""
    ratio = log_ratio.exp()
    dlogp = -ratio.clamp(low, high) * advantages
    return TokenTerm(dlogp * logps, torch.zeros_like(dlogp), dlogp, ratio < low, ratio > high)


def sapo(log_ratio: torch.Tensor, advantages: torch.Tensor, tau_pos: float, tau_neg: float) -> TokenTerm:
    """-(4 / tau) sigmoid(tau (rho - 1)) A, tau_pos where A > 0 and tau_neg elsewhere."""
    ratio = log_ratio.exp()
    tau = torch.full_like(ratio, tau_neg).masked_fill(advantages > 0, tau_pos)
    gate = torch.sigmoid(tau * (ratio - 1))
    loss = -4 / tau * gate * advantages
    return TokenTerm(loss, -4 * gate * (1 - gate) * ratio * advantages, torch.zeros_like(loss))


def reinforce(logps: torch.Tensor, advantages: torch.Tensor) -> TokenTerm:
    """-A log pi."""
    return TokenTerm(-advantages * logps, torch.zeros_like(logps), -advantages)


def moved_too_far(
    logps: torch.Tensor, old_logps: torch.Tensor, advantages: torch.Tensor, low: float, high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the token's probability fell by more than `low` and A < 0; where it rose by more than `high` and A > 0."""
    moved = logps.exp() - old_logps.exp()
    return (advantages < 0) & (moved < -low), (advantages > 0) & (moved > high)


def dppo(log_ratio: torch.Tensor, tokens: Tokens, low: float, high: float) -> TokenTerm:
    """-M rho A, with M = 0 where the token has moved too far."""
    down, up = moved_too_far(tokens.logps, tokens.old_logps, tokens.advantages, low, high)
    loss = torch.where(down | up, 0, -log_ratio.exp() * tokens.advantages)
    return TokenTerm(loss, loss, torch.zeros_like(loss), down, up)


def gmpo(log_ratio: torch.Tensor, tokens: Tokens, clipped: torch.Tensor) -> TokenTerm:
    """-rho A; `log_ratio` is the mean of log-ratios that were clipped before."""
    loss = -log_ratio.exp() * tokens.advantages
    up = tokens.advantages > 0
    return TokenTerm(loss, loss, torch.zeros_like(loss), clipped & ~up, clipped & up)


def vespo(log_ratio: torch.Tensor, logps: torch.Tensor, advantages: torch.Tensor, surrogate: Vespo) -> TokenTerm:
    """-sg(phi(W)) A log pi, phi(W) = W^k exp(lam (1 - W)); `log_ratio` is log W."""
    positive = advantages >= 0
    k = torch.full_like(log_ratio, surrogate.k_neg).masked_fill(positive, surrogate.k_pos)
    lam = torch.full_like(log_ratio, surrogate.lam_neg).masked_fill(positive, surrogate.lam_pos)
    dlogp = -(k * log_ratio - lam * torch.expm1(log_ratio)).exp() * advantages
    return TokenTerm(dlogp * logps, torch.zeros_like(dlogp), dlogp)


def surrogate_term(surrogate: Surrogate, log_ratio: torch.Tensor, tokens: Tokens) -> TokenTerm:
    """The surrogate named by the spec."""
    if isinstance(surrogate, Clip):
        return clip(log_ratio, tokens.advantages, surrogate.low, surrogate.high, surrogate.dual)
    if isinstance(surrogate, Cispo):
        return cispo(log_ratio, tokens.logps, tokens.advantages, surrogate.ratio_min, surrogate.ratio_max)
    if isinstance(surrogate, Sapo):
        return sapo(log_ratio, tokens.advantages, surrogate.tau_pos, surrogate.tau_neg)
    if isinstance(surrogate, Dppo):
        return dppo(log_ratio, tokens, surrogate.low, surrogate.high)
    if isinstance(surrogate, Gmpo):
        return gmpo(log_ratio, tokens, ~token_log_ratio(surrogate, tokens)[1])
    if isinstance(surrogate, Vespo):
        return vespo(log_ratio, tokens.logps, tokens.advantages, surrogate)
    return reinforce(tokens.logps, tokens.advantages)


def bound(raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A log-ratio held where its exp is finite, and whether it was beyond: there it is a constant. NaN stays NaN."""
    return raw.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND), raw.abs() > LOG_RATIO_BOUND


def kl_term(kind: KLKind, d: torch.Tensor, log_ratio: torch.Tensor, *, of_sequence: bool = False) -> TokenTerm:
    """An estimate of KL(pi || pi_ref) with d = ref_logps - logps, of a kind that `fastrl.spec.KL` lists.

    expm1 keeps the digits that e^d - 1 loses where policy and reference nearly agree. Where e^d would overflow it is
    held, and a constant. `log_ratio` is that of the loss, the token's or the sequence's.
    """
    zeros = torch.zeros_like(d)
    if kind.endswith("+"):  # straight through: the derivative of k2
        return kl_term(kind[:-1], d, log_ratio)._replace(dlogp=-d)
    if kind == "k1":
        return TokenTerm(-d, zeros, torch.ones_like(d))
    if kind == "k2":
        return TokenTerm(d.square() / 2, zeros, -d)
    beyond = d > LOG_RATIO_BOUND
    held = d.clamp(max=LOG_RATIO_BOUND)
    growth = torch.expm1(held)
    k3, dlogp = growth - held, torch.where(beyond, 0, -growth)
    if kind == "k3":
        return TokenTerm(k3, zeros, dlogp)
    ratio = log_ratio.exp()
    if of_sequence:
        return TokenTerm(ratio * k3, torch.where(beyond, 0, ratio * k3), ratio * dlogp)
    # rho (e^d - d - 1) + rho (1 - e^d), a sum of two large numbers, is the small one -rho d: right at any d.
    return TokenTerm(ratio * k3, zeros, -ratio * d)


def correction_weight(correction: Correction, log_weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The constant that multiplies the surrogate, and whether it was left as it is. NaN stays NaN."""
    weight = bound(log_weight)[0].exp()
    if correction.kind == "truncate":
        return weight.clamp(max=correction.high), weight <= correction.high
    outside = (weight < correction.low) | (weight > correction.high)
    return torch.where(outside, 0, weight), ~outside


# Sequence level: means over a sequence's masked-in tokens.


def segment_sum(values: torch.Tensor, seq_ids: torch.Tensor, num_seqs: int) -> torch.Tensor:
    """(N,) values summed into (num_seqs,), in the same order at every run."""
    out = values.new_zeros(num_seqs)
    if values.is_cuda:  # accumulating index_put_ sorts by index first; index_add_ would use atomics there
        return out.index_put_((seq_ids,), values, accumulate=True)
    return out.index_add_(0, seq_ids, values)


def token_log_ratio(surrogate: Surrogate, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """logps - old_logps as a sequence adds them up, and where the token takes part in the derivative of that sum."""
    log_ratio = tokens.logps - tokens.old_logps
    if not isinstance(surrogate, Gmpo):
        return log_ratio, tokens.mask
    positive = tokens.advantages > 0
    held = torch.where(positive, log_ratio.clamp(max=surrogate.high), log_ratio.clamp(min=-surrogate.low))
    return held, tokens.mask & (held == log_ratio)


def sequence_sums(tokens: Tokens, spec: PolicyLoss, seq_ids: torch.Tensor, num_seqs: int) -> torch.Tensor:
    """(3, S): masked-in tokens, sum of their log-ratios, sum of old_logps - sampling_logps."""
    rows = [tokens.mask.to(tokens.logps.dtype), token_log_ratio(spec.surrogate, tokens)[0]]
    rows.append(torch.zeros_like(rows[1]) if tokens.sampling_logps is None else mismatch(tokens))
    return torch.stack([segment_sum(row, seq_ids, num_seqs) for row in rows])


def mismatch(tokens: Tokens) -> torch.Tensor:
    """old_logps - sampling_logps: how far the trainer's policy is from the sampler's, per token."""
    return tokens.old_logps - tokens.sampling_logps


def sequence_mean(total: torch.Tensor, count: torch.Tensor, seq_ids: torch.Tensor) -> torch.Tensor:
    """(S,) sums over masked-in tokens as means, given back to each token, (N,).

    The derivative by one token of a function of such a mean is itself such a mean: of the sequence's derivatives.
    """
    return (total / count.clamp(min=1))[seq_ids]


# From the terms to the loss.


def clean(logps: torch.Tensor, tokens: LossTokens, entropy: torch.Tensor | None) -> Tokens:
    """Put zeros wherever the mask is False, so that a NaN there reaches nothing: NaN times a weight of 0 is NaN."""
    advantages, weights, mask, *others = tokens
    given = (logps, advantages, weights, *others, entropy)
    logps, advantages, weights, old_logps, *rest = (None if x is None else torch.where(mask, x, 0) for x in given)
    return Tokens(logps, advantages, weights, mask, logps if old_logps is None else old_logps, *rest)


def token_terms(tokens: Tokens, spec: PolicyLoss, sums: torch.Tensor | None, seq_ids: torch.Tensor | None) -> Terms:
    """Loss, derivatives and metrics of some tokens; `sums` (3, S) covers the whole of every sequence among them."""
    log_ratio, beyond = bound(_log_ratio(tokens, spec, sums, seq_ids))
    surrogate = surrogate_term(spec.surrogate, log_ratio, tokens)
    loss, dlogp, dlog_ratio = surrogate.loss, surrogate.dlogp, torch.where(beyond, 0, surrogate.dlog_ratio)

    rows = {}
    if spec.correction is not None:
        by_sequence = spec.correction.level == "sequence"
        log_weight = sequence_mean(sums[2], sums[0], seq_ids) if by_sequence else mismatch(tokens)
        weight, kept = correction_weight(spec.correction, log_weight)
        rows |= {"sampling/importance_sampling_ratio/mean": weight, "sampling/kept_fraction": kept}
        loss, dlogp, dlog_ratio = weight * loss, weight * dlogp, weight * dlog_ratio
    if spec.needs_ref:
        coef, d = spec.kl.coef, tokens.ref_logps - tokens.logps
        # What GMPO and VESPO make of a sequence is no ratio of its probabilities: there the token's own is taken.
        own = isinstance(spec.surrogate, (Gmpo, Vespo))
        ratio = bound(tokens.logps - tokens.old_logps)[0] if own else log_ratio
        kl = kl_term(spec.kl.kind, d, ratio, of_sequence=spec.ratio == "sequence" and not own)
        loss, dlogp = loss + coef * kl.loss, dlogp + coef * kl.dlogp
        dlog_ratio = dlog_ratio + torch.where(beyond, 0, coef * kl.dlog_ratio)
        if spec.kl.kind.startswith("k3"):
            beyond = beyond | (d > LOG_RATIO_BOUND)
    if spec.needs_entropy:
        loss = loss - spec.entropy_coef * tokens.entropy

    active = tokens.weights != 0
    loss, dlogp, dlog_ratio = (torch.where(active, tokens.weights * x, 0) for x in (loss, dlogp, dlog_ratio))
    dentropy = -spec.entropy_coef * tokens.weights if spec.needs_entropy else torch.zeros_like(loss)
    broken = ~(tokens.logps.isfinite() & loss.isfinite())
    rows |= {"ratio/mean": log_ratio.exp(), "log_ratio_clamped": beyond, "nonfinite_rows": broken}
    rows["ratio/max"] = rows["ratio/mean"]
    table = metric_table(_observed(tokens, surrogate) | rows, tokens.mask, loss.dtype)
    return Terms(loss.sum(), dlog_ratio, dlogp, dentropy, table)


def _log_ratio(
    tokens: Tokens, spec: PolicyLoss, sums: torch.Tensor | None, seq_ids: torch.Tensor | None
) -> torch.Tensor:
    """The logarithm of the ratio that the surrogate looks at, before it is bounded."""
    if spec.ratio == "token":
        return tokens.logps - tokens.old_logps
    return sums[1][seq_ids] if isinstance(spec.surrogate, Vespo) else sequence_mean(sums[1], sums[0], seq_ids)


def _observed(tokens: Tokens, surrogate: TokenTerm) -> dict[str, torch.Tensor]:
    """Per-token values to report that are no part of the loss."""
    rows = {}
    if surrogate.low is not None:
        rows |= {"clip_ratio/low_mean": surrogate.low, "clip_ratio/high_mean": surrogate.high}
    # k3 of the old policy against this one, from the old policy's own samples
    rows["old_kl"] = kl_term("k3", tokens.logps - tokens.old_logps, tokens.logps).loss
    if tokens.ref_logps is not None:
        rows["kl"] = kl_term("k3", tokens.ref_logps - tokens.logps, tokens.logps).loss
    if tokens.entropy is not None:
        rows["entropy"] = tokens.entropy
    if tokens.sampling_logps is not None:
        difference = mismatch(tokens)
        rows["sampling/sampling_logp_difference/mean"] = difference.abs()
        rows["sampling/sampling_logp_difference/max"] = difference.abs()
        rows["sampling/importance_sampling_ratio/mean"] = bound(difference)[0].exp()
    return rows


def with_gradient_fraction(
    metrics: torch.Tensor, mask: torch.Tensor, dlogps: torch.Tensor, dentropy: torch.Tensor
) -> torch.Tensor:
    """The metrics with the share of tokens that send a gradient, known only once the gradient is."""
    row = {"gradient_fraction": (dlogps != 0) | (dentropy != 0)}
    return merge_metrics(metrics, metric_table(row, mask, metrics.dtype))


def forward(
    logps: torch.Tensor,
    tokens: LossTokens,
    entropy: torch.Tensor | None,
    seq_ids: torch.Tensor | None,
    num_seqs: int,
    spec: PolicyLoss,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss, dlogps (N,), dentropy (N,), metrics (K, 2): the contract is in `fastrl.kernels.policy_loss`."""
    safe = clean(logps, tokens, entropy)
    sums = None if spec.separable else sequence_sums(safe, spec, seq_ids, num_seqs)
    terms = token_terms(safe, spec, sums, seq_ids)
    if spec.ratio == "sequence":
        through_ratio = segment_sum(terms.dlog_ratio, seq_ids, num_seqs)
        takes_part = token_log_ratio(spec.surrogate, safe)[1]
        dlogps = terms.dlogp + torch.where(takes_part, sequence_mean(through_ratio, sums[0], seq_ids), 0)
    else:
        dlogps = terms.dlogp + terms.dlog_ratio
    metrics = with_gradient_fraction(terms.metrics, tokens.mask, dlogps, terms.dentropy)
    return terms.loss, dlogps, terms.dentropy, metrics
