"""The policy loss a slice of tokens at a time: the formulas of `reference`, with temporaries of bounded size."""

from __future__ import annotations

from typing import overload

import torch

from fastrl.kernels.inputs import LossTokens
from fastrl.kernels.policy_loss.metrics import METRICS, merge_metrics, metric_table
from fastrl.kernels.policy_loss.reference import (
    Tokens,
    clean,
    segment_sum,
    sequence_mean,
    sequence_sums,
    token_log_ratio,
    token_terms,
    with_gradient_fraction,
)
from fastrl.spec import PolicyLoss

__all__ = ["METRICS", "forward", "merge_metrics"]

SLICE = 65536  # some thirty temporaries of this length live at once: 8 MB in float32


@overload
def _part(x: torch.Tensor, start: int) -> torch.Tensor: ...
@overload
def _part(x: torch.Tensor | None, start: int) -> torch.Tensor | None: ...
def _part(x: torch.Tensor | None, start: int) -> torch.Tensor | None:
    return None if x is None else x[start : start + SLICE]


def forward(
    logps: torch.Tensor,
    tokens: LossTokens,
    entropy: torch.Tensor | None,
    seq_ids: torch.Tensor | None,
    num_seqs: int,
    spec: PolicyLoss,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss, dlogps (N,), dentropy (N,), metrics (K, 2): the contract is in `fastrl.kernels.policy_loss`.

    A sequence may cross slices: a pass before sums what its tokens share, a pass after spreads its ratio's derivative.
    """
    starts = range(0, logps.numel(), SLICE)

    def safe(start: int) -> Tokens:
        own = LossTokens(*(_part(x, start) for x in tokens))
        return clean(_part(logps, start), own, _part(entropy, start))

    sums = None
    if not spec.separable:
        sums = logps.new_zeros(3, num_seqs)
        for start in starts:
            sums += sequence_sums(safe(start), spec, _part(seq_ids, start), num_seqs)

    by_sequence = spec.ratio == "sequence"
    loss = logps.new_zeros(())
    through_ratio = logps.new_zeros(num_seqs)  # d loss / d log-ratio of each sequence
    dlogps, dentropy = torch.empty_like(logps), torch.empty_like(logps)
    metrics = metric_table({}, tokens.mask, logps.dtype)
    for start in starts:
        ids = _part(seq_ids, start)
        terms = token_terms(safe(start), spec, sums, ids)
        loss += terms.loss
        metrics = merge_metrics(metrics, terms.metrics)
        _part(dentropy, start).copy_(terms.dentropy)
        _part(dlogps, start).copy_(terms.dlogp if by_sequence else terms.dlogp + terms.dlog_ratio)
        if by_sequence:
            through_ratio += segment_sum(terms.dlog_ratio, ids, num_seqs)

    for start in starts:
        part = _part(dlogps, start)
        if by_sequence:
            mean = sequence_mean(through_ratio, sums[0], _part(seq_ids, start))
            part += torch.where(token_log_ratio(spec.surrogate, safe(start))[1], mean, 0)
        metrics = with_gradient_fraction(metrics, _part(tokens.mask, start), part, _part(dentropy, start))
    return loss, dlogps, dentropy, metrics
