"""Preference losses of single answers, each desirable or not: KTO and its variants."""

from __future__ import annotations

import torch

from fastrl import check
from fastrl.losses.aggregate import check_normalizer
from fastrl.losses.answer_rows import answer_rows, sequence_logps
from fastrl.preference_spec import UnpairedPreferenceLoss
from fastrl.types import LossOutput

OP = "unpaired_preference_loss"


def unpaired_preference_loss(
    logps: torch.Tensor,
    labels: torch.Tensor,
    spec: UnpairedPreferenceLoss,
    *,
    ref_logps: torch.Tensor,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    kl: float | torch.Tensor | None = None,
    normalizer: float | torch.Tensor | None = None,
) -> LossOutput:
    """The mean over S single answers of an `UnpairedPreferenceLoss`: KTO, and APO-zero without pairs.

    `fastrl.preference_spec` has the equation. `logps` get a gradient; `ref_logps` and `kl` are constants. With an
    explicit `normalizer` and `kl` the losses of any split of the answers add up to the loss of all of them.

    Args:
        logps: (S, T) padded or (N,) packed, the log-probability of each completion token under the current policy.
        labels: (S,) bool, True where the answer is desirable.
        ref_logps: like `logps`, or (S,) sums over the completion, under the reference policy.
        mask: like `logps`, bool or integer; None, when packed: every token.
        cu_seqlens: (S + 1,) int, bounds of the sequences in packed tensors.
        kl: KTO's z before max(0, z): sum / count of `mismatched_kl` over the whole batch, so a micro-batch cannot
            compute its own. None if the baseline is zero.
        normalizer: divisor of the sum over answers; None: the number of given answers.

    Returns:
        The scalar loss, float32 (float64 for float64 `logps`). Metrics as TRL names them, per desirable (chosen) or
        undesirable (rejected) answer: `rewards/chosen`, `rewards/rejected`, `logps/chosen`, `logps/rejected`; `kl`.

    Raises:
        ValueError: a shape, a device, an argument that the spec needs is wrong or missing, or an answer has no token.
        TypeError: a dtype is wrong, or the spec is not an UnpairedPreferenceLoss.
    """
    if not isinstance(spec, UnpairedPreferenceLoss):
        expected = "an UnpairedPreferenceLoss, such as fastrl.presets.KTO"
        raise TypeError(check.sentence(OP, "spec", expected, repr(spec)))
    rows = answer_rows(OP, "", logps, mask, cu_seqlens, ref_logps, None)
    S, dtype = len(rows.logps), rows.logps.dtype
    check.require(labels.dtype == torch.bool, OP, "labels", "a bool tensor", labels.dtype, error=TypeError)
    check.shape(OP, "labels", labels, (S,), "one per answer")
    check.device(OP, "labels", labels, logps.device, "logps")
    check_normalizer(OP, "token_mean", normalizer)
    wanted = spec.baseline == "kl"
    expected = "a number, for baseline='kl'" if wanted else "None, for baseline='zero'"
    check.require((kl is not None) == wanted, OP, "kl", expected, kl, "See mismatched_kl." if wanted else "")
    baseline = torch.as_tensor(0.0 if kl is None else kl, dtype=dtype, device=logps.device).detach().clamp(min=0.0)
    check.require(baseline.dim() == 0, OP, "kl", "a number or 0-d tensor", tuple(baseline.shape))

    policy, reference = sequence_logps(rows, None)
    rewards = spec.beta * (policy - reference)
    sign = torch.ones_like(rewards).masked_fill(~labels, -1.0)
    scale = torch.full_like(rewards, spec.desirable_weight).masked_fill(~labels, spec.undesirable_weight)
    losses = scale * torch.sigmoid(-sign * (rewards - spec.beta * baseline))
    metrics = {}
    for side, which in (("chosen", labels), ("rejected", ~labels)):
        for name, values in (("rewards", rewards), ("logps", policy)):
            metrics[f"{name}/{side}"] = (torch.where(which, values.detach(), 0.0).sum(), which.sum().to(dtype))
    metrics["kl"] = (baseline, torch.ones_like(baseline))
    return LossOutput(losses.sum() / (max(S, 1) if normalizer is None else normalizer), metrics)


def mismatched_kl(
    logps: torch.Tensor,
    ref_logps: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum, count) of x - x_ref over answers to mismatched prompts, without gradient: KTO's z is sum / count.

    Both add up over micro-batches and ranks like a metric. `fastrl.data.preferences.mismatched` makes the answers.

    Args and Raises: as `unpaired_preference_loss`.
    """
    rows = answer_rows("mismatched_kl", "", logps.detach(), mask, cu_seqlens, ref_logps, None)
    policy, reference = sequence_logps(rows, None)
    return (policy - reference).sum(), rows.logps.new_tensor(len(policy))
