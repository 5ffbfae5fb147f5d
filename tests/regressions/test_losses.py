"""Bugs that other losses had, one test each; the docstring links to the report."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fastrl.losses.metrics import finish
from fastrl.losses.policy import policy_loss
from fastrl.losses.presets import PRESETS
from fastrl.ops.policy_loss import policy_loss as op
from fastrl.spec import KL, Cispo, Clip, Correction, PolicyLoss, Reinforce, Sapo


def tokens(*shape, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    logps = -2 * torch.rand(shape, generator=g, dtype=dtype)
    return logps, logps + 0.3 * torch.randn(shape, generator=g, dtype=dtype)


def gradient(spec, logps, advantages, **arguments):
    logps = logps.detach().requires_grad_()
    out = policy_loss(logps, advantages, spec, **arguments)
    return out.loss.detach(), torch.autograd.grad(out.loss, logps)[0]


def test_gradient_accumulation_is_not_a_mean_of_means():
    """Micro-batches of 10 and 1000 tokens weighed the same.

    https://github.com/huggingface/transformers/pull/34191
    """
    spec = replace(PRESETS["PPO"])
    logps, old = tokens(1010)
    advantages, mask = torch.ones(1010, dtype=torch.float64), torch.ones(1010, dtype=torch.bool)
    whole = gradient(spec, logps, advantages, mask=mask, old_logps=old)
    parts = [
        gradient(spec, logps[s], advantages[s], mask=mask[s], old_logps=old[s], normalizer=1010.0)
        for s in (slice(0, 10), slice(10, 1010))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat([parts[0][1], parts[1][1]]), whole[1], rtol=1e-12, atol=0)
    means = [
        gradient(spec, logps[s], advantages[s], mask=mask[s], old_logps=old[s])[0] / 2
        for s in (slice(0, 10), slice(10, 1010))
    ]
    assert abs(sum(means) - whole[0]) > 1e-3  # the batch can tell the two apart


@pytest.mark.parametrize("sizes", [[12], [6, 6], [3, 3, 3, 3], [1, 7, 4]])
def test_token_mean_is_the_same_under_any_dynamic_batch(sizes):
    """Each micro-batch's token mean was scaled by its share of samples.

    https://github.com/verl-project/verl/issues/5625
    """
    logps, old = tokens(12, 9)
    mask = torch.arange(9) < torch.arange(1, 13)[:, None].clamp(max=9)
    advantages = torch.linspace(-1, 1, 12, dtype=torch.float64)
    total = mask.sum()  # a tensor: counting the batch needs no host synchronisation
    whole = gradient(PRESETS["DAPO"], logps, advantages, mask=mask, old_logps=old)
    parts = [
        gradient(PRESETS["DAPO"], x, a, mask=m, old_logps=o, normalizer=total)
        for x, a, m, o in zip(*(t.split(sizes) for t in (logps, advantages, mask, old)), strict=True)
    ]
    losses, grads = zip(*parts, strict=True)
    torch.testing.assert_close(sum(losses), whole[0], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(torch.cat(grads), whole[1], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", [name for name, spec in PRESETS.items() if spec.aggregate != "token_sum"])
def test_numerator_and_denominator_use_one_mask(name):
    """Truncated completions were masked in the sum and counted in the denominator.

    https://github.com/huggingface/trl/issues/6369
    """
    logps, old = tokens(4, 5)
    advantages = torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[2:] = False  # two of four completions were cut and are filtered
    spec, groups = replace(PRESETS[name], kl=None), torch.tensor([0, 0, 1, 1])
    ours = gradient(spec, logps, advantages, mask=mask, old_logps=old, group_ids=groups)
    kept = gradient(spec, logps[:2], advantages[:2], mask=mask[:2], old_logps=old[:2], group_ids=groups[:2])
    torch.testing.assert_close(ours[0], kept[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(ours[1][:2], kept[1], rtol=1e-12, atol=0)
    assert (ours[1][2:] == 0).all()


@pytest.mark.parametrize("name", PRESETS)
def test_a_batch_without_a_token_has_loss_and_gradient_zero_and_finite_metrics(name):
    """All completions masked: 0 / 0 was NaN in the loss or in the KL metric.

    https://github.com/unslothai/unsloth-zoo/pull/1286, https://github.com/huggingface/trl/issues/3248
    """
    logps, old = tokens(3, 4)
    loss_args = {"mask": torch.zeros(3, 4, dtype=torch.bool), "old_logps": old, "ref_logps": old, "entropy": old.abs()}
    normalizer = 12.0 if PRESETS[name].aggregate == "token_sum" else None
    logps = logps.requires_grad_()
    out = policy_loss(
        logps,
        torch.ones(3, dtype=torch.float64),
        PRESETS[name],
        group_ids=torch.arange(3),
        normalizer=normalizer,
        **loss_args,
    )
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert (logps.grad == 0).all()
    assert all(value.isfinite() for row in out.metrics.values() for value in row)
    assert finish(out.metrics) == {}


BASE = PolicyLoss("token", Clip(0.2, 0.2), KL("k3", 0.1), "seq_mean_token_mean", 0.01, Correction("mask", "token", 1.2))
CHANGES = {
    "ratio": {"ratio": "sequence"},
    "clip_low": {"surrogate": Clip(0.1, 0.2)},
    "clip_high": {"surrogate": Clip(0.2, 0.3)},
    "clip_dual": {"surrogate": Clip(0.2, 0.2, dual=1.1)},
    "cispo": {"surrogate": Cispo(1.1)},
    "cispo_max": {"surrogate": Cispo(1.2)},
    "cispo_min": {"surrogate": Cispo(1.1, ratio_min=0.9)},
    "sapo": {"surrogate": Sapo(1.0, 1.0)},
    "sapo_pos": {"surrogate": Sapo(1.1, 1.0)},
    "sapo_neg": {"surrogate": Sapo(1.0, 1.1)},
    "reinforce": {"surrogate": Reinforce()},
    "no_kl": {"kl": None},
    **{f"kl_{kind}": {"kl": KL(kind, 0.1)} for kind in ("k1", "k2", "k3_ratio")},
    "kl_coef": {"kl": KL("k3", 0.2)},
    **{name: {"aggregate": name} for name in ("token_mean", "prompt_mean", "seq_mean_token_sum", "token_sum")},
    "entropy_coef": {"entropy_coef": 0.02},
    "no_correction": {"correction": None},
    "correction_kind": {"correction": Correction("truncate", "token", 1.2)},
    "correction_level": {"correction": Correction("mask", "sequence", 1.2)},
    "correction_high": {"correction": Correction("mask", "token", 1.5)},
    "correction_low": {"correction": Correction("mask", "token", 1.2, low=0.9)},
}


def test_every_option_changes_both_the_loss_and_the_gradient():
    """A fused path ignored the importance-sampling ratio and other options in silence.

    https://github.com/linkedin/Liger-Kernel/issues/1082
    """
    logps, old = tokens(6, 40)
    g = torch.Generator().manual_seed(1)
    ref, sampling = (logps + 0.3 * torch.randn(6, 40, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.arange(40) < torch.tensor([40, 13, 25, 1, 30, 28])[:, None]
    results = {}
    for name, change in {"base": {}, **CHANGES}.items():
        spec = replace(BASE, **change)
        x, entropy = logps.detach().requires_grad_(), old.abs().requires_grad_()
        loss = policy_loss(
            x,
            torch.tensor([1.0, -1.0, 0.5, 2.0, -0.3, -2.0], dtype=torch.float64),
            spec,
            mask=mask,
            old_logps=old,
            ref_logps=ref,
            sampling_logps=sampling,
            entropy=entropy,
            group_ids=torch.tensor([0, 0, 0, 1, 1, 2]),
            normalizer=7.0 if spec.aggregate == "token_sum" else None,
        ).loss
        grads = torch.autograd.grad(loss, (x, entropy))
        results[name] = (round(loss.item(), 12), tuple(torch.cat(grads).flatten().tolist()))
    losses, gradients = zip(*results.values(), strict=True)
    assert len(set(losses)) == len(results)
    assert len(set(gradients)) == len(results)


def test_grpo_averages_inside_each_sequence_first():
    """The fused loss averaged over all tokens, so that long completions dominated.

    https://github.com/linkedin/Liger-Kernel/pull/628
    """
    logps = torch.zeros(2, 100, dtype=torch.float64)
    mask = torch.arange(100) < torch.tensor([1, 100])[:, None]
    advantages = torch.tensor([1.0, -3.0], dtype=torch.float64)
    expected = {  # with every ratio 1, a token's loss is -A
        "token_mean": (-1 * 1 + 3 * 100) / 101,
        "prompt_mean": (-1 + 3) / 2,
        "seq_mean_token_mean": (-1 + 3) / 2,
        "seq_mean_token_sum": (-1 * 1 + 3 * 100) / 2,
        "token_sum": (-1 * 1 + 3 * 100) / 200,
    }
    for aggregate, value in expected.items():
        normalizer = 200.0 if aggregate == "token_sum" else None
        groups = torch.tensor([0, 1])
        spec = PolicyLoss(aggregate=aggregate)
        loss = policy_loss(logps, advantages, spec, mask=mask, group_ids=groups, normalizer=normalizer).loss
        assert loss.item() == pytest.approx(value, rel=1e-12), aggregate


def test_a_ratio_of_one_still_changes_the_gradient_of_the_kl_term():
    """k3 without its ratio follows the forward KL; the ratio, 1 in value, carries the missing part of the gradient.

    https://github.com/OpenRLHF/OpenRLHF/pull/1309
    """
    logps = torch.tensor([[-1.0, -2.0]], dtype=torch.float64)
    ref = torch.tensor([[-1.5, -0.5]], dtype=torch.float64)
    arguments = {"mask": torch.ones(1, 2, dtype=torch.bool), "ref_logps": ref}
    zero = torch.zeros(1, dtype=torch.float64)
    specs = [PolicyLoss(surrogate=Reinforce(), kl=KL(k, 1.0), aggregate="token_mean") for k in ("k3", "k3_ratio")]
    (k3, k3_grad), (k3_ratio, k3_ratio_grad) = (gradient(spec, logps, zero, **arguments) for spec in specs)
    d = ref - logps
    assert torch.equal(k3, k3_ratio)
    torch.testing.assert_close(k3_grad, (1 - d.exp()) / 2, rtol=1e-12, atol=0)
    torch.testing.assert_close(k3_ratio_grad, -d / 2, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("ratio", ["sequence", "sequence_token"])
def test_the_kl_is_weighted_by_the_ratio_of_the_loss_which_shares_its_gradient_as_the_loss_does(ratio):
    """A sequence's ratio is a function of all its tokens, that of GSPO-token of one: its own.

    https://github.com/huggingface/trl/issues/6586, whose default this is
    """
    logps, old = tokens(1, 4)
    ref = logps.clone()
    ref[0, 2] += 0.7  # only this token differs from the reference
    spec = PolicyLoss(ratio, Reinforce(), KL("k3_ratio", 1.0), "token_sum")
    arguments = {"mask": torch.ones(1, 4, dtype=torch.bool), "old_logps": old, "ref_logps": ref, "normalizer": 1.0}
    _, grad = gradient(spec, logps, torch.zeros(1, dtype=torch.float64), **arguments)
    mean = (logps - old).mean().exp()
    shared = mean * (math.exp(0.7) - 0.7 - 1) / 4 if ratio == "sequence" else torch.zeros((), dtype=torch.float64)
    own = mean * (1 - math.exp(0.7)) if ratio == "sequence" else mean * -0.7
    torch.testing.assert_close(grad[0, [0, 1, 3]], shared.expand(3), rtol=1e-12, atol=0)
    torch.testing.assert_close(grad[0, 2], own + shared, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["k2", "k3", "k3_ratio"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_kl_term_pulls_the_policy_towards_the_reference(kind, sign):
    """A flipped sign pushed the policy away. (k1's derivative is 1 wherever the reference is: `fastrl.spec.KL`.)

    https://github.com/huggingface/trl/pull/6594
    """
    logps = torch.full((1, 1), -2.0, dtype=torch.float64)
    spec = PolicyLoss(surrogate=Reinforce(), kl=KL(kind, 1.0), aggregate="token_mean")
    arguments = {"mask": torch.ones(1, 1, dtype=torch.bool), "ref_logps": logps + sign}
    _, grad = gradient(spec, logps, torch.zeros(1, dtype=torch.float64), **arguments)
    assert grad.item() * sign < 0  # descending moves logps the way of the reference


@pytest.mark.parametrize("dual", [None, 1.4])
def test_a_token_counts_as_clipped_only_where_its_gradient_is_zero(dual):
    """The clip fraction counted ratios on the side that is not clipped.

    https://github.com/huggingface/trl/issues/3032
    """
    ratios = torch.tensor([0.5, 0.79, 0.8, 1.0, 1.2, 1.21, 1.5, 3.0], dtype=torch.float64)
    logps = ratios.log().repeat(3)
    advantages = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64).repeat_interleave(8)
    spec = PolicyLoss(surrogate=Clip(0.2, 0.2, dual=dual), aggregate="token_sum")
    ones, mask = torch.ones(24, dtype=torch.float64), torch.ones(24, dtype=torch.bool)
    old = torch.zeros(24, dtype=torch.float64)
    constants = (old, None, None, None, None, 0, spec.code, "auto")
    _, dlogps, _, table = op(logps, advantages, ones, mask, *constants)
    still = dlogps == 0
    assert table[0].tolist() == [(still & (advantages < 0)).sum().item(), 24]
    assert table[1].tolist() == [(still & (advantages > 0)).sum().item(), 24]
    assert (table[0, 0].item(), table[1, 0].item()) == (2 if dual is None else 4, 3)
