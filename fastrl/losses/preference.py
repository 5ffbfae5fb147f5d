"""Preference losses of pairs on per-token log-probabilities: DPO and its variants.

Length normalisation, the weights of LD-DPO and WPO, and the SFT terms need the tokens, so they are computed here and
never by the caller.
"""

from __future__ import annotations

import torch

from fastrl import check
from fastrl.losses.aggregate import check_normalizer, token_weights
from fastrl.losses.answer_rows import Rows, answer_rows, sequence_logps
from fastrl.losses.metrics import Metrics
from fastrl.losses.preference_links import Answers, Flip, flip_of, pair_loss, transform
from fastrl.preference_spec import PreferenceLoss, PreferenceMix, Sft
from fastrl.types import LossOutput

OP = "preference_loss"


def preference_loss(
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    spec: PreferenceLoss | PreferenceMix,
    *,
    chosen_mask: torch.Tensor | None = None,
    rejected_mask: torch.Tensor | None = None,
    chosen_cu_seqlens: torch.Tensor | None = None,
    rejected_cu_seqlens: torch.Tensor | None = None,
    ref_chosen_logps: torch.Tensor | None = None,
    ref_rejected_logps: torch.Tensor | None = None,
    chosen_log_sum_sq_probs: torch.Tensor | None = None,
    rejected_log_sum_sq_probs: torch.Tensor | None = None,
    margins: torch.Tensor | None = None,
    soft_labels: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    normalizer: float | torch.Tensor | None = None,
    token_normalizer: float | torch.Tensor | None = None,
) -> LossOutput:
    """The mean over the P pairs of a `PreferenceLoss`, or a `PreferenceMix` of several: sum_i weights_i loss_i / P.

    `fastrl.preference_spec` has the equations and their sources. The two log-probabilities get a gradient; everything
    else is a constant. A masked-out token has gradient exactly 0 whatever it holds; a masked-in NaN makes the loss NaN.
    With an explicit `normalizer` the losses of any split of the pairs add up to the loss of all of them, except with
    `match="aot"` and `"aot_unpaired"`: they sort the given pairs, so a split changes what is compared with what.

    Args:
        chosen_logps, rejected_logps: (P, T) padded, each side with its own T, or (N,) packed: the log-probability of
            each completion token under the current policy. Row or sequence i of both is pair i.
        chosen_mask, rejected_mask: like their log-probabilities, bool or integer; True on the completion's tokens.
            None, when packed: every token.
        chosen_cu_seqlens, rejected_cu_seqlens: (P + 1,) int, bounds of the sequences in packed tensors. `split_pairs`
            makes all of these from one packed forward pass.
        ref_chosen_logps, ref_rejected_logps: under the reference policy: like their log-probabilities, or (P,) sums
            over the completion, which suffice unless `ld_alpha` weights single tokens.
        chosen_log_sum_sq_probs, rejected_log_sum_sq_probs: like their log-probabilities: log sum_v p_v^2 of the
            policy's distribution at each token, for `weighting="wpo"`.
        margins: (P,) by how much the chosen answer's reward should be higher, replacing the spec's `margin`, which must
            be 0: DPO with an offset, arXiv:2402.10571. Each pair loss must then be a link on the margin.
        soft_labels: (P,) probability that the chosen answer is better, replacing 1 - label_smoothing: labels of a
            judge, arXiv:2309.00267. Each pair loss must then be a link on the margin, without `debias`.
        weights: (P,) factors of the pairs' losses, but not of a mix's SFT terms. They do not enter the default
            normalizer.
        normalizer: divisor of the sum over pairs; None: the number of given pairs.
        token_normalizer: the same for `Sft("token_mean")`, in chosen tokens. Required with a `normalizer`.

    Returns:
        The scalar loss, float32 (float64 for float64 `chosen_logps`). Metrics as TRL names them, per pair:
        `rewards/chosen`, `rewards/rejected`, `rewards/accuracies`, `rewards/margins` with r of the (first) pair loss,
        and `logps/chosen`, `logps/rejected`, sums over the answer; with an SFT term also `nll_loss` per chosen token.

    Raises:
        ValueError: a shape, a device, an argument that the spec needs is wrong or missing, or an answer has no token.
        TypeError: a dtype is wrong, or the spec is neither of these.
    """
    chosen_rows = answer_rows(
        OP, "chosen_", chosen_logps, chosen_mask, chosen_cu_seqlens, ref_chosen_logps, chosen_log_sum_sq_probs
    )
    rejected_rows = answer_rows(
        OP, "rejected_", rejected_logps, rejected_mask, rejected_cu_seqlens, ref_rejected_logps,
        rejected_log_sum_sq_probs,
    )  # fmt: skip
    P = len(chosen_rows.logps)
    check.require(
        len(rejected_rows.logps) == P, OP, "rejected_logps", f"{P} answers as chosen_logps", len(rejected_rows.logps)
    )
    check.device(OP, "rejected_logps", rejected_logps, chosen_logps.device, "chosen_logps")
    if not isinstance(spec, (PreferenceLoss, PreferenceMix)):
        expected = "a PreferenceLoss or PreferenceMix, such as fastrl.presets.DPO"
        raise TypeError(check.sentence(OP, "spec", expected, repr(spec)))
    terms = spec.terms if isinstance(spec, PreferenceMix) else ((1.0, spec),)
    pair_terms = [term for _, term in terms if isinstance(term, PreferenceLoss)]
    for term in pair_terms:
        _check_inputs(term, chosen_rows, rejected_rows, margins, soft_labels, weights)
    for name, tensor in (("margins", margins), ("soft_labels", soft_labels), ("weights", weights)):
        _check_per_answer(OP, name, tensor, chosen_logps, P)
    check_normalizer(OP, "token_mean", normalizer)
    pairs = max(P, 1) if normalizer is None else normalizer

    loss = chosen_rows.logps.new_zeros(())
    first: tuple[Answers, Answers] | None = None
    for scale, term in terms:
        if isinstance(term, Sft):
            loss = loss + scale * _sft(term, chosen_rows, normalizer, token_normalizer)
            continue
        sides = _answers(term, chosen_rows, rejected_rows)
        first = first or sides
        flip: Flip = term.label_smoothing
        if soft_labels is not None:
            flip = flip_of(OP, soft_labels).to(loss.dtype)
        margin: float | torch.Tensor = term.margin if margins is None else margins.detach().to(loss.dtype)
        losses = pair_loss(*sides, margin, flip, term)
        if term.weighting == "wpo":
            losses = losses * _wpo(chosen_rows) * _wpo(rejected_rows)
        if weights is not None:
            losses = losses * weights.detach().to(loss.dtype)
        loss = loss + scale * losses.sum() / pairs
    has_sft = len(pair_terms) < len(terms)
    return LossOutput(loss, _pair_metrics(*first, chosen_rows, rejected_rows, nll=has_sft))


def _check_per_answer(op: str, name: str, tensor: torch.Tensor | None, logps: torch.Tensor, P: int) -> None:
    if tensor is not None:
        check.floating(op, name, tensor)
        check.shape(op, name, tensor, (P,), "one per pair")
        check.device(op, name, tensor, logps.device, "the log-probabilities")


def _check_inputs(
    term: PreferenceLoss,
    chosen: Rows,
    rejected: Rows,
    margins: torch.Tensor | None,
    soft_labels: torch.Tensor | None,
    weights: torch.Tensor | None,
) -> None:
    """Requires what the term reads, and refuses what it would ignore."""
    for side, rows in (("chosen", chosen), ("rejected", rejected)):
        given = rows.ref_logps is not None
        do = f"Pass ref_{side}_logps, or set reference=False."
        check.require(given or not term.reference, OP, f"ref_{side}_logps", "a tensor, which the spec needs", None, do)
        by_token = not given or rows.ref_logps.dim() == 2 or not term.reference or term.ld_alpha == 1.0
        check.require(by_token, OP, f"ref_{side}_logps", "one per token for ld_alpha", "sums")
        squares = rows.log_sum_sq_probs is not None or term.weighting == "none"
        name = f"{side}_log_sum_sq_probs"
        check.require(squares, OP, name, "a tensor, for weighting='wpo'", None, f"Pass {name}.")
    if margins is not None:
        expected = "None for a loss that has no margin, or its own"
        check.require(term.takes_margins, OP, "margins", expected, "a tensor")
    if soft_labels is not None:
        expected = "None for a loss that has no label noise, or its own"
        check.require(term.takes_soft_labels, OP, "soft_labels", expected, "a tensor")
    if weights is not None:
        expected = f"None for match={term.match!r}, which mixes pairs"
        check.require(term.match == "pairs", OP, "weights", expected, "a tensor")


def _answers(term: PreferenceLoss, chosen: Rows, rejected: Rows) -> tuple[Answers, Answers]:
    """Both sides' log-probabilities and rewards."""
    shared = torch.minimum(chosen.lengths, rejected.lengths) if term.ld_alpha != 1.0 else None
    sides = []
    for rows in (chosen, rejected):
        token_weights = None
        if shared is not None:
            beyond = rows.mask.cumsum(1) > shared[:, None]  # (P, T)
            token_weights = torch.ones_like(rows.logps).masked_fill(beyond, term.ld_alpha)
        policy, reference = sequence_logps(rows, token_weights)
        if not term.reference:
            reference = torch.zeros_like(policy)
        if term.length == "mean":
            policy, reference = policy / rows.lengths, reference / rows.lengths
        reward = term.beta * transform(policy - reference, term.transform)
        sides.append(Answers(policy, reference, reward / rows.lengths if term.length == "reward_mean" else reward))
    return sides[0], sides[1]


def _wpo(rows: Rows) -> torch.Tensor:
    """(P,) exp(mean_t(log p_t - log sum_v p_v^2)), without gradient."""
    return ((rows.logps.detach() - rows.log_sum_sq_probs).sum(1) / rows.lengths).exp()


def _sft(
    term: Sft,
    rows: Rows,
    normalizer: float | torch.Tensor | None,
    token_normalizer: float | torch.Tensor | None,
) -> torch.Tensor:
    if term.aggregate == "token_mean":
        same = (normalizer is None) == (token_normalizer is None)
        expected = "a number, as normalizer" if normalizer is not None else "None, as normalizer"
        do = "An average over tokens is divided by the chosen tokens of the whole batch."
        check.require(same, OP, "token_normalizer", expected, token_normalizer, do)
        normalizer = token_normalizer
    weights = token_weights(rows.mask, term.aggregate, normalizer=normalizer, dtype=rows.logps.dtype)
    return -(weights * rows.logps).sum()


def _pair_metrics(chosen: Answers, rejected: Answers, chosen_rows: Rows, rejected_rows: Rows, *, nll: bool) -> Metrics:
    r_w, r_l = chosen.reward.detach(), rejected.reward.detach()
    values = {
        "rewards/chosen": r_w,
        "rewards/rejected": r_l,
        "rewards/accuracies": (r_w > r_l).to(r_w.dtype),
        "rewards/margins": r_w - r_l,
        "logps/chosen": chosen_rows.logps.detach().sum(1),
        "logps/rejected": rejected_rows.logps.detach().sum(1),
    }
    count = r_w.new_tensor(len(r_w))
    metrics = {name: (value.sum(), count) for name, value in values.items()}
    if nll:
        metrics["nll_loss"] = (-chosen_rows.logps.detach().sum(), chosen_rows.lengths.sum())
    return metrics
