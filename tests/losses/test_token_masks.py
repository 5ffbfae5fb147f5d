"""Masks and weights of tokens against their papers' formulas, TRL's code, and any split of the batch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from trl.trainer.grpo_trainer import GRPOTrainer

from fastrl import token_masks as tm
from fastrl.losses.aggregate import token_weights
from fastrl.losses.policy import policy_loss
from fastrl.spec import KL, Clip, Dppo, PolicyLoss

LENGTHS = torch.tensor([6, 2, 0, 5])


def batch():
    """(B, T) float64 tensors of four ragged sequences, NaN where masked; and one advantage per sequence."""
    mask = torch.arange(6) < LENGTHS[:, None]
    logps = -2 * torch.rand(4, 6, dtype=torch.float64)
    data = {"logps": logps, "entropy": torch.rand(4, 6, dtype=torch.float64)}
    for name in ("old_logps", "sampling_logps", "ref_logps"):
        data[name] = logps + 0.5 * torch.randn(4, 6, dtype=torch.float64)
    data = {name: tensor.masked_fill(~mask, torch.nan) for name, tensor in data.items()}
    return SimpleNamespace(**data, mask=mask, advantages=torch.tensor([1.0, -2.0, 0.5, -0.3], dtype=torch.float64))


@pytest.mark.parametrize(("keep", "count"), [(0.2, 3), (0.5, 7), (1.0, 13), (0.0, 1)])
def test_top_entropy_mask_is_trls(keep, count):
    x = batch()
    accelerator = SimpleNamespace(pad_across_processes=lambda t, **_: t, gather=lambda t: t)
    entropy = x.entropy.float().nan_to_num(nan=9.0)
    theirs = GRPOTrainer.get_high_entropy_mask(
        SimpleNamespace(accelerator=accelerator), entropy, x.mask.float(), 1 - keep
    )
    ours = tm.top_entropy_mask(entropy, x.mask, tm.entropy_threshold(entropy, x.mask, keep))
    assert torch.equal(ours, theirs)
    assert ours.sum() == count


def test_entropy_threshold_of_nothing_keeps_nothing():
    nothing = torch.zeros(2, 3)
    assert not tm.top_entropy_mask(nothing, nothing, tm.entropy_threshold(nothing, nothing)).any()


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5])
def test_off_policy_sequence_mask_is_trls_and_the_same_when_packed(threshold):
    x = batch()
    x.sampling_logps[0, 1] = torch.nan  # a token that the engine could not score
    x.sampling_logps[1] += 2.0
    clean = [t.masked_fill(~x.mask, 0.0) for t in (x.logps, x.sampling_logps)]
    theirs = GRPOTrainer.get_off_policy_mask(x.advantages[:, None], *clean, x.mask, threshold)[:, 0].bool()
    ours = tm.off_policy_sequence_mask(x.logps, x.sampling_logps, x.advantages, mask=x.mask, threshold=threshold)
    assert torch.equal(ours, theirs)
    assert not ours[1]
    assert ours[[0, 2]].all()
    bounds = torch.cat((torch.zeros(1, dtype=torch.int64), LENGTHS.cumsum(0)))
    packed = [t[x.mask] for t in (x.logps, x.sampling_logps)]
    ones = torch.ones(13, dtype=torch.bool)
    again = tm.off_policy_sequence_mask(*packed, x.advantages, mask=ones, threshold=threshold, cu_seqlens=bounds)
    assert torch.equal(again, ours)


def test_a_mask_on_the_advantages_takes_out_the_surrogate_and_leaves_kl_and_normaliser():
    x = batch()
    spec = PolicyLoss(surrogate=Clip(0.2, 0.2), kl=KL("k3", 0.1), aggregate="seq_mean_token_mean")
    keep = tm.top_entropy_mask(x.entropy, x.mask, tm.entropy_threshold(x.entropy, x.mask, 0.5))
    logps = x.logps.clone().requires_grad_()
    arguments = {"mask": x.mask, "old_logps": x.old_logps, "ref_logps": x.ref_logps}
    ours = policy_loss(logps, x.advantages[:, None] * keep, spec, **arguments).loss
    ratio, d = (logps - x.old_logps).exp(), x.ref_logps - logps
    a = x.advantages[:, None]
    token = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a) * keep + 0.1 * (d.exp() - d - 1)
    means = [token[row, :length].mean() for row, length in enumerate(LENGTHS) if length > 0]
    expected = torch.stack(means).sum() / 3  # as TRL masks: every token counts in its sequence's length
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(loss, logps)[0] for loss in (ours, expected)]
    torch.testing.assert_close(grads[0], grads[1].where(x.mask, 0), rtol=1e-12, atol=1e-12)


def test_binary_tv_mask_with_an_unclipped_ratio_is_dppo():
    x = batch()
    advantages = x.advantages[:, None].expand(4, 6)
    keep = tm.binary_tv_mask(x.logps, x.old_logps, advantages, low=0.05, high=0.1)
    assert 0 < keep[x.mask].sum() < x.mask.sum()
    unclipped = PolicyLoss(surrogate=Clip(low=1.0, high=1e9), aggregate="token_mean")
    dppo = PolicyLoss(surrogate=Dppo(low=0.05, high=0.1), aggregate="token_mean")
    results = []
    for spec, a in ((unclipped, advantages * keep), (dppo, advantages)):
        logps = x.logps.clone().requires_grad_()
        loss = policy_loss(logps, a, spec, mask=x.mask, old_logps=x.old_logps).loss
        results.append((loss, torch.autograd.grad(loss, logps)[0]))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-15)


def test_covariance_is_each_tokens_share_of_the_covariance():
    x = batch()
    cov = tm.covariance(x.logps, x.advantages[:, None].expand(4, 6), x.mask)
    both = torch.stack((x.logps[x.mask], x.advantages[:, None].expand(4, 6)[x.mask]))
    torch.testing.assert_close(cov[x.mask].mean(), both.cov(correction=0)[0, 1], rtol=1e-12, atol=1e-14)
    assert (cov[~x.mask] == -torch.inf).all()


@pytest.mark.parametrize(("fraction", "count"), [(2e-4, 1), (0.25, 3), (1.0, 13)])
def test_top_threshold_selects_the_share_of_valid_tokens_and_no_masked_one(fraction, count):
    x = batch()
    selected = x.entropy >= tm.top_threshold(x.entropy, x.mask, fraction)
    assert selected.sum() == count
    assert not selected[~x.mask].any()
    assert x.entropy[selected].min() >= x.entropy[x.mask & ~selected].amax() if count < 13 else True


def test_clip_cov_drops_a_random_share_of_the_tokens_between_the_bounds_and_none_elsewhere():
    cov, mask = torch.linspace(-1, 7, 801, dtype=torch.float64), torch.ones(801, dtype=torch.bool)
    score = tm.clip_cov_score(cov, torch.rand(801, dtype=torch.float64))
    keep = score < tm.top_threshold(score, mask, fraction=0.1)
    assert (~keep).sum() == 80
    assert (cov[~keep] > 1).all()
    assert (cov[~keep] < 5).all()
    assert cov[~keep].max() - cov[~keep].min() > 2  # not the largest of them
    few = tm.clip_cov_score(torch.tensor([0.5, 2.0, 3.0, 6.0]), torch.rand(4))
    assert (few >= tm.top_threshold(few, torch.ones(4), fraction=1.0)).tolist() == [False, True, True, False]
    none = tm.clip_cov_score(torch.zeros(4), torch.rand(4))
    assert (none < tm.top_threshold(none, torch.ones(4))).all()


def test_kl_cov_penalty_is_verls_term_and_its_gradient_reaches_the_selected_tokens_only():
    x = batch()
    cov = tm.covariance(x.logps, x.advantages[:, None].expand(4, 6), x.mask)
    selected = cov >= tm.top_threshold(cov, x.mask, fraction=0.25)
    weights = token_weights(x.mask, "token_mean", dtype=torch.float64)
    logps = x.logps.clone().requires_grad_()
    penalty = tm.kl_cov_penalty(logps, x.old_logps, selected, weights, coef=0.7)
    grad = torch.autograd.grad(penalty, logps)[0]
    rows = [0.7 * abs(x.logps[i, t] - x.old_logps[i, t]).item() for i, t in selected.nonzero().tolist()]
    assert len(rows) == 3
    assert penalty.item() == pytest.approx(sum(rows) / 13, rel=1e-12)
    expected = torch.where(selected, 0.7 / 13 * (x.logps - x.old_logps).sign(), 0.0)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=0)
    same = x.old_logps.clone().requires_grad_()
    assert (torch.autograd.grad(tm.kl_cov_penalty(same, x.old_logps, selected, weights), same)[0] == 0).all()


def test_positive_nll_is_the_mean_over_the_tokens_of_correct_sequences():
    x = batch()
    correct = torch.tensor([True, False, True, True])
    weights = tm.positive_nll_weights(x.mask, correct, coef=0.1)
    nll = -(weights[x.mask] * x.logps[x.mask]).sum()
    expected = -0.1 * torch.cat((x.logps[0, :6], x.logps[3, :5])).mean()
    torch.testing.assert_close(nll, expected, rtol=1e-6, atol=0)
    bounds = torch.cat((torch.zeros(1, dtype=torch.int64), LENGTHS.cumsum(0)))
    packed = tm.positive_nll_weights(torch.ones(13, dtype=torch.bool), correct, cu_seqlens=bounds)
    assert torch.equal(packed, weights[x.mask])
    for normalizer in (None, 0.0, torch.tensor(0)):
        none = tm.positive_nll_weights(x.mask, torch.zeros(4, dtype=torch.bool), normalizer=normalizer)
        assert torch.equal(none, torch.zeros(4, 6))


@pytest.mark.parametrize("split", [[1, 3], [2, 2], [1, 1, 1, 1]])
def test_with_the_batchs_threshold_a_split_selects_the_same_tokens(split):
    x = batch()
    advantages, noise = x.advantages[:, None].expand(4, 6), torch.rand(4, 6, dtype=torch.float64)
    means = tuple(t[x.mask].mean() for t in (x.logps, advantages))
    cov = tm.covariance(x.logps, advantages, x.mask)
    score = tm.clip_cov_score(cov, noise, low=-1.0, high=1.0)
    thresholds = (
        tm.entropy_threshold(x.entropy, x.mask),
        tm.top_threshold(cov, x.mask, 0.2),
        tm.top_threshold(score, x.mask, 0.2),
    )
    correct = x.advantages < 0
    total = x.mask[correct].sum()

    def select(rows):
        part = tm.covariance(x.logps[rows], advantages[rows], x.mask[rows], means=means)
        return (
            tm.top_entropy_mask(x.entropy[rows], x.mask[rows], thresholds[0]),
            part >= thresholds[1],
            tm.clip_cov_score(part, noise[rows], low=-1.0, high=1.0) < thresholds[2],
            tm.off_policy_sequence_mask(
                x.logps[rows], x.sampling_logps[rows], x.advantages[rows], mask=x.mask[rows], threshold=0.1
            ),
            tm.positive_nll_weights(x.mask[rows], correct[rows], normalizer=total),
        )

    whole = select(slice(None))
    for name, got, want in zip(
        ("entropy", "kl_cov", "clip_cov", "off_policy", "positive"),
        zip(*(select(rows) for rows in torch.arange(4).split(split)), strict=True),
        whole,
        strict=True,
    ):
        assert torch.equal(torch.cat(got), want), name
        assert want.any(), name
    assert torch.equal(whole[4], tm.positive_nll_weights(x.mask, correct))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: tm.entropy_threshold(torch.zeros(2, 3), m[:1]), "entropy_threshold: mask: expected shape"),
        (lambda m: tm.entropy_threshold(torch.zeros(2, 3), m, 1.5), "keep: expected a share from 0 to 1, got 1.5"),
        (lambda m: tm.top_threshold(torch.zeros(2, 3), m, 0.0), "fraction: expected a share above 0, got 0.0"),
        (lambda m: tm.positive_nll_weights(m[0], torch.ones(1)), "cu_seqlens: expected sequence bounds"),
        (lambda m: tm.positive_nll_weights(m, torch.ones(3)), r"correct: expected shape \(2,\) one per sequence"),
        (lambda m: tm.positive_nll_weights(m, m[:, 0], normalizer=-1.0), "normalizer: expected a number of at least 0"),
        (lambda m: tm.positive_nll_weights(m, m[:, 0], normalizer=torch.ones(3)), r"normalizer: expected shape \(\)"),
        (
            lambda m: tm.off_policy_sequence_mask(*torch.zeros(2, 2, 3), torch.zeros(2, 3), mask=m),
            r"advantages: expected shape \(2,\) one per sequence",
        ),
        (lambda m: tm.binary_tv_mask(*torch.zeros(2, 2, 3), torch.zeros(2)), "advantages: expected shape"),
        (lambda m: tm.covariance(torch.zeros(2, 3), torch.zeros(2), m), "advantages: expected shape"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 3, dtype=torch.bool))


def test_choices_that_are_not_bool_are_refused_where_they_would_be_read_otherwise():
    logps, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"selected: expected a bool tensor, got torch\.int64"):  # indices of rows
        tm.kl_cov_penalty(logps, logps, mask.long(), logps)
    with pytest.raises(TypeError, match=r"correct: expected a bool tensor, got torch\.float32"):  # -1 is true
        tm.positive_nll_weights(mask, torch.tensor([-1.0, 1.0]))
