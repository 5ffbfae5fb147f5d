"""Value and gradient against liger-kernel's GRPO loss, for every option that both have.

Left out, because the definitions differ: the ratio-weighted KL at sequence level (Liger multiplies by the sequence's
ratio, fastrl by the token's), `vespo` with a correction (which Liger multiplies into the sequence's ratio), and `luspo`
on a ragged mask wherever it has per-token terms (Liger then sums them over the padding too).
"""

from __future__ import annotations

import itertools

import pytest
import torch
from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction

from fastrl.losses.policy import policy_loss
from fastrl.spec import KL, Cispo, Clip, Correction, PolicyLoss, Sapo, Vespo

B, T, MAX_LENGTH = 4, 6, 9
LOW, HIGH = 0.2, 0.3
CLIPPED = {
    "grpo": ("seq_mean_token_mean", B),
    "bnpo": ("token_mean", None),
    "dr_grpo": ("token_sum", B * MAX_LENGTH),
    "dapo": ("token_mean", None),
    "luspo": ("seq_mean_token_sum", B),
}
OTHERS = {"cispo": ("token_mean", None), "sapo": ("seq_mean_token_mean", B)}
SURROGATES = {"cispo": Cispo(ratio_max=1.4), "sapo": Sapo(tau_pos=1.0, tau_neg=1.05)}
CORRECTIONS = [
    None,
    Correction("truncate", "token", high=1.05),
    Correction("mask", "token", high=1.3, low=0.8),
    Correction("truncate", "sequence", high=1.0),
]


def batch(ragged):
    g = torch.Generator().manual_seed(5)
    logps = -2 * torch.rand(B, T, generator=g, dtype=torch.float64)
    old, ref, sampling = (logps + 0.4 * torch.randn(B, T, generator=g, dtype=torch.float64) for _ in range(3))
    lengths = torch.tensor([T, 2, 0, 5] if ragged else [T] * B)
    mask = torch.arange(T) < lengths[:, None]
    return logps.requires_grad_(), old, ref, sampling, torch.tensor([1.0, -2.0, 0.7, -0.1], dtype=torch.float64), mask


def is_ratio(correction, old, sampling, mask):
    """What a trainer hands to Liger as `vllm_is_ratio`."""
    if correction is None:
        return None
    difference = old - sampling
    if correction.level == "sequence":
        difference = (difference * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    weight = difference.exp()
    if correction.kind == "truncate":
        return weight.clamp(max=correction.high)
    return weight * ((weight >= correction.low) & (weight <= correction.high))


def compare(loss_type, level, beta, unbiased, correction, on_policy, ragged):
    logps, old, ref, sampling, advantages, mask = batch(ragged)
    old_of_correction = logps.detach() if on_policy else old
    epsilon_high = SURROGATES["cispo"].ratio_max if loss_type == "cispo" else HIGH
    theirs, _ = LigerFusedLinearGRPOFunction.ppo_loss_fn(
        logps,
        mask.double(),
        advantages,
        mask.double(),
        ref_per_token_logps=ref,
        old_per_token_logps=None if on_policy else old,
        epsilon_low=LOW,
        epsilon_high=epsilon_high,
        beta=beta,
        loss_type=loss_type,
        max_completion_length=MAX_LENGTH,
        importance_sampling_level=level,
        vllm_is_ratio=is_ratio(correction, old_of_correction, sampling, mask),
        use_bias_correction_kl=unbiased,
    )
    aggregate, normalizer = (CLIPPED | OTHERS)[loss_type]
    spec = PolicyLoss(
        ratio=level,
        surrogate=SURROGATES.get(loss_type, Clip(low=LOW, high=HIGH)),
        kl=KL("k3_ratio" if unbiased else "k3", coef=beta) if beta else None,
        aggregate=aggregate,
        correction=correction,
    )
    ours = policy_loss(
        logps,
        advantages,
        spec,
        mask=mask,
        old_logps=None if on_policy else old,
        ref_logps=ref,
        sampling_logps=sampling,
        normalizer=normalizer,
    ).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    a, b = (torch.autograd.grad(loss, logps)[0] for loss in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert a.abs().sum() > 0


@pytest.mark.parametrize("loss_type", [*CLIPPED, *OTHERS])
def test_token_level_losses_agree(loss_type):
    for kl, correction, on_policy in itertools.product(
        [(0.0, False), (0.04, False), (0.04, True)], CORRECTIONS, (False, True)
    ):
        compare(loss_type, "token", *kl, correction, on_policy, ragged=loss_type != "luspo")


@pytest.mark.parametrize("loss_type", CLIPPED)
def test_sequence_level_losses_agree(loss_type):
    for beta, correction, on_policy in itertools.product((0.0, 0.04), CORRECTIONS, (False, True)):
        per_token = beta > 0 or (correction is not None and correction.level == "token")
        compare(loss_type, "sequence", beta, False, correction, on_policy, not (loss_type == "luspo" and per_token))


def agree(spec, loss_type, level="token", **options):
    """One loss on a ragged batch of ratios from 0.2 to 5, value and gradient."""
    logps, old, ref, _, advantages, mask = batch(ragged=True)
    old = logps.detach() + 2 * (old - logps.detach())
    theirs, _ = LigerFusedLinearGRPOFunction.ppo_loss_fn(
        logps,
        mask.double(),
        advantages,
        mask.double(),
        ref_per_token_logps=ref,
        old_per_token_logps=old,
        epsilon_low=LOW,
        epsilon_high=HIGH,
        beta=0.04,
        loss_type=loss_type,
        importance_sampling_level=level,
        **options,
    )
    ours = policy_loss(logps, advantages, spec, mask=mask, old_logps=old, ref_logps=ref).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    a, b = (torch.autograd.grad(loss, logps)[0] for loss in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    return a


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("delta", "clip"), [(1.5, Clip(LOW, HIGH, dual=1.5)), (1.1, Clip(LOW, 0.1, dual=1 + HIGH))])
def test_two_sided_delta_is_the_dual_clip(delta, clip, level):
    spec = PolicyLoss(level, clip, KL("k3", 0.04), "token_mean")
    capped = agree(spec, "dapo", level, delta=delta)
    uncapped = agree(PolicyLoss(level, Clip(LOW, HIGH), KL("k3", 0.04), "token_mean"), "dapo", level)
    assert not torch.equal(capped, uncapped) or level == "sequence"


@pytest.mark.parametrize(("k", "lam"), [((2.0, 3.0), (3.0, 2.0)), ((0.5, 1.0), (0.25, 0.125))])
def test_vespo_agrees(k, lam):
    (k_pos, k_neg), (lam_pos, lam_neg) = k, lam
    names = {"vespo_k_pos": k_pos, "vespo_k_neg": k_neg, "vespo_lambda_pos": lam_pos, "vespo_lambda_neg": lam_neg}
    surrogate = Vespo(k_pos=k_pos, k_neg=k_neg, lam_pos=lam_pos, lam_neg=lam_neg)
    agree(PolicyLoss("sequence", surrogate, KL("k3", 0.04), "token_mean"), "vespo", **names)
