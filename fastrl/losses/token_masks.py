"""Masks for papers that train on only some tokens of a policy loss, and weights for the terms that some papers add.

Every surrogate is proportional to its advantage, so an advantage of 0 takes a token out of it:

    policy_loss(logps, advantages * keep, spec, mask=mask, ...)          with advantages (B, T), or advantages[:, None]

The token keeps its KL and entropy terms and its place in the normaliser: every paper below divides the sum over tokens
by the count of all of them. `linear_policy_loss` skips rows without any term left. Tokens that should leave the
normaliser too, such as those of truncated completions, belong in `mask` itself.

A mask that compares a token with the whole batch takes a threshold, computed once over the batch before it is split, so
the split into micro-batches changes nothing. Only `kl_cov_penalty` has a gradient.
"""

from __future__ import annotations

import torch

from fastrl import check
from fastrl.kernels.policy_loss.reference import moved_too_far, segment_sum
from fastrl.losses.aggregate import check_layout, inside, sequence_ids


def entropy_threshold(entropy: torch.Tensor, mask: torch.Tensor, keep: float = 0.2) -> torch.Tensor:
    """The entropy that a share `keep` of the batch's masked-in tokens reach: the 1 - keep quantile, interpolated.

    For `top_entropy_mask`; TRL's top_entropy_quantile = keep. Gather the entropies of all ranks first.

    Args:
        entropy: any shape, floating point.
        mask: as entropy; bool, or numbers that are zero where masked.
        keep: in [0, 1].

    Returns:
        0-d, dtype of entropy; infinite if nothing is masked in.
    """
    op = "entropy_threshold"
    check.shape(op, "mask", mask, entropy.shape, "as entropy")
    check.require(0.0 <= keep <= 1.0, op, "keep", "a share from 0 to 1", keep)
    ordered = entropy.detach()[mask != 0].sort().values  # torch.quantile takes at most 16 million
    if len(ordered) == 0:
        return entropy.new_full((), torch.inf)
    place = (len(ordered) - 1) * (1.0 - keep)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return torch.lerp(ordered[low], ordered[high], place - low)


def top_entropy_mask(entropy: torch.Tensor, mask: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """True for masked-in tokens whose entropy is at least `entropy_threshold`: arXiv:2506.01939, with keep = 0.2.

    Args:
        entropy, mask: as `entropy_threshold`, of the whole batch or of a part.
        threshold: of the whole batch.
    """
    check.shape("top_entropy_mask", "mask", mask, entropy.shape, "as entropy")
    return (mask != 0) & (entropy >= threshold)


def off_policy_sequence_mask(
    logps: torch.Tensor,
    sampling_logps: torch.Tensor,
    advantages: torch.Tensor,
    *,
    mask: torch.Tensor,
    threshold: float = 0.5,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """False for sequences with negative advantage that the policy has already left: DeepSeek-V3.2, arXiv:2512.02556
    eq. 9.

    keep_i = A_i >= 0 or mean_t(sampling_logps - logps) <= threshold, over the masked-in tokens. The paper gives no
    threshold. As in TRL's off_policy_mask_threshold, a NaN counts as no difference.

    Args:
        logps: (B, T), or (N,) with `cu_seqlens`; under the current policy.
        sampling_logps: as logps, under the policy that sampled.
        advantages: (B,) or (S,), one per sequence.
        mask: as logps, bool or integer.
        threshold: nats per token.
        cu_seqlens: (S + 1,) bounds of packed sequences.

    Returns:
        (B,) or (S,) bool: multiply the advantages by it. A masked sequence still counts in the normaliser.
    """
    op = "off_policy_sequence_mask"
    check_layout(op, mask, cu_seqlens)
    do = "Pass rows, or cu_seqlens."
    check.require(mask.dim() == 2 or cu_seqlens is not None, op, "cu_seqlens", "sequence bounds", None, do)
    for name, tensor in (("logps", logps), ("sampling_logps", sampling_logps)):
        check.shape(op, name, tensor, mask.shape, "as mask")
    ids, count = sequence_ids(mask.shape, mask.device, cu_seqlens)
    check.shape(op, "advantages", advantages, (count,), "one per sequence")
    live = inside(mask, cu_seqlens)
    drift = torch.where(live, sampling_logps.detach() - logps.detach(), 0).nan_to_num(nan=0.0)
    total, tokens = (segment_sum(x.reshape(-1), ids, count) for x in (drift, live.to(drift.dtype)))
    return (advantages >= 0) | (total / tokens.clamp(min=1) <= threshold)


def binary_tv_mask(
    logps: torch.Tensor, old_logps: torch.Tensor, advantages: torch.Tensor, *, low: float = 0.2, high: float = 0.2
) -> torch.Tensor:
    """False for tokens whose probability left DPPO's trust region, arXiv:2602.04879: the mask of `fastrl.Dppo`, for use
    with other surrogates.

    keep = not (A > 0 and p - p_old > high) and not (A < 0 and p - p_old < -low).

    Args:
        logps, old_logps, advantages: of one shape.
    """
    for name, tensor in (("old_logps", old_logps), ("advantages", advantages)):
        check.shape("binary_tv_mask", name, tensor, logps.shape, "as logps")
    down, up = moved_too_far(logps.detach(), old_logps.detach(), advantages, low, high)
    return ~(down | up)


def covariance(
    logps: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    means: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """(log pi_t - mean log pi) (A_t - mean A), each token's share of the covariance that drives entropy down:
    arXiv:2505.22617. For `clip_cov_score` and `kl_cov_penalty`.

    Args:
        logps, advantages: of one shape, one per token.
        mask: likewise; bool, or numbers that are zero where masked.
        means: means of logps and advantages over the batch's masked-in tokens; computed from the given tensors by
            default.

    Returns:
        Shaped as logps; -inf where masked.
    """
    for name, tensor in (("advantages", advantages), ("mask", mask)):
        check.shape("covariance", name, tensor, logps.shape, "as logps")
    live, logps = mask != 0, logps.detach()
    if means is None:
        count = live.sum().clamp(min=1)
        means = torch.where(live, logps, 0).sum() / count, torch.where(live, advantages, 0).sum() / count
    return torch.where(live, (logps - means[0]) * (advantages - means[1]), -torch.inf)


def top_threshold(scores: torch.Tensor, mask: torch.Tensor, fraction: float = 2e-4) -> torch.Tensor:
    """The score that max(1, floor(fraction n)) of the batch's n masked-in tokens reach.

    Select with `scores >= threshold`, which includes ties. Scores of -inf are not candidates: with fewer candidates
    than that, the threshold takes them all; with none, it is infinite.

    Args:
        scores: any shape, floating point.
        mask: as scores; bool, or numbers that are zero where masked.
        fraction: of the masked-in tokens.
    """
    check.shape("top_threshold", "mask", mask, scores.shape, "as scores")
    check.require(0.0 < fraction <= 1.0, "top_threshold", "fraction", "a share above 0", fraction)
    live = mask != 0
    candidates = scores[live & (scores > -torch.inf)]
    if len(candidates) == 0:
        return scores.new_full((), torch.inf)
    wanted = max(1, int(fraction * int(live.sum())))
    return candidates.topk(min(wanted, len(candidates))).values[-1]


def clip_cov_score(
    covariances: torch.Tensor, noise: torch.Tensor, *, low: float = 1.0, high: float = 5.0
) -> torch.Tensor:
    """`noise` where low < covariance < high, else -inf: Clip-Cov, arXiv:2505.22617.

    The paper detaches a random share of the tokens between the bounds:

        score = clip_cov_score(covariance(logps, advantages, mask), torch.rand_like(logps))
        keep = score < top_threshold(score, mask, fraction=2e-4)

    keep is also True where masked. Defaults are verl's, which excludes tokens that the ratio's clip already stops: give
    those a covariance of -inf.

    Args:
        covariances: as `covariance` returns them.
        noise: likewise; any random numbers, drawn once for the batch.
    """
    check.shape("clip_cov_score", "noise", noise, covariances.shape, "as covariances")
    return torch.where((covariances > low) & (covariances < high), noise, -torch.inf)


def kl_cov_penalty(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    selected: torch.Tensor,
    weights: torch.Tensor,
    *,
    coef: float = 1.0,
) -> torch.Tensor:
    """coef sum_t w_t |log pi_t - log pi_old,t| over the selected tokens, to add to a loss: KL-Cov, arXiv:2505.22617, as
    in its code and verl's.

        cov = covariance(logps, advantages, mask)
        selected = cov >= top_threshold(cov, mask, fraction=2e-4)
        weights = token_weights(mask, spec.aggregate)
        loss = policy_loss(...).loss + kl_cov_penalty(logps, old_logps, selected, weights)

    Their surrogate is unclipped: -rho A is `Clip(low=1, high=1e9)`. With the weights of the loss itself, the penalty is
    divided by all tokens, as in theirs.

    Args:
        logps: any shape; gets a gradient, which is 0 where the two policies agree.
        old_logps, weights: as logps. Values of unselected tokens, even NaN, are never read.
        selected: as logps, bool.

    Returns:
        A scalar.

    Raises:
        ValueError: shapes differ. TypeError: `selected` is not bool.
    """
    op = "kl_cov_penalty"
    for name, tensor in (("old_logps", old_logps), ("selected", selected), ("weights", weights)):
        check.shape(op, name, tensor, logps.shape, "as logps")
    # Integers would be read as indices of rows.
    check.require(selected.dtype == torch.bool, op, "selected", "a bool tensor", selected.dtype, error=TypeError)
    difference = logps[selected] - old_logps.detach()[selected]
    return coef * (weights.detach()[selected] * difference.abs()).sum()


def positive_nll_weights(
    mask: torch.Tensor,
    correct: torch.Tensor,
    *,
    coef: float = 0.1,
    normalizer: float | torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Token weights of VAPO's "Positive Example LM Loss", which imitates correct completions: arXiv:2504.05118.

    mu NLL = -sum_t w_t log pi_t with w_t = coef / n on the tokens of correct sequences, 0 elsewhere: a term to add to a
    loss, from log-probabilities or with `linear_token_loss`. n counts only the tokens of correct sequences.

    Args:
        mask: (B, T), or (N,) with `cu_seqlens`; bool or integer.
        correct: (B,) or (S,) bool, such as rewards > 0.
        coef: the paper's mu.
        normalizer: n of the whole batch, if this is a part of it; None counts the given tensors.
        cu_seqlens: (S + 1,) bounds of packed sequences.

    Returns:
        float32, shaped as mask; all 0 if nothing is correct.

    Raises:
        ValueError: a shape or `normalizer` is wrong, or packed tokens have no bounds. TypeError: `correct` is not bool.
    """
    op = "positive_nll_weights"
    check_layout(op, mask, cu_seqlens)
    do = "Pass rows, or cu_seqlens."
    check.require(mask.dim() == 2 or cu_seqlens is not None, op, "cu_seqlens", "sequence bounds", None, do)
    ids, count = sequence_ids(mask.shape, mask.device, cu_seqlens)
    check.shape(op, "correct", correct, (count,), "one per sequence")
    do = "Pass rewards > 0: a reward below 0 is no 0."
    check.require(correct.dtype == torch.bool, op, "correct", "a bool tensor", correct.dtype, do, TypeError)
    if isinstance(normalizer, torch.Tensor):
        check.shape(op, "normalizer", normalizer, (), "or a number")
    else:  # 0 for a batch without a correct sequence
        check.require(normalizer is None or normalizer >= 0, op, "normalizer", "a number of at least 0", normalizer)
    learns = inside(mask, cu_seqlens) & correct[ids].view(mask.shape)
    total = torch.as_tensor(learns.sum() if normalizer is None else normalizer, dtype=torch.float32)
    return torch.where(learns, coef / total, 0.0)
