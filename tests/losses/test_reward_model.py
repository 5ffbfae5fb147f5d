"""The reward model's loss against TRL's trainer, its identities, and what must not change it."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import logsigmoid, softplus
from trl.trainer.reward_trainer import RewardTrainer

from fastrl.losses.metrics import finish
from fastrl.losses.reward_model import reward_model_loss


def scores():
    chosen, rejected = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return chosen.requires_grad_(), rejected.requires_grad_()


@pytest.mark.parametrize("center", [None, 0.3])
@pytest.mark.parametrize("margin", [False, True])
def test_value_gradient_and_metrics_equal_trl(center, margin):
    chosen, rejected = scores()
    margins = torch.rand(5, dtype=torch.float64) if margin else None
    identity = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=identity,
        args=SimpleNamespace(center_rewards_coefficient=center),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"attention_mask": torch.ones(10)} | ({"margin": margins} if margin else {})
    logits = SimpleNamespace(logits=torch.cat([chosen, rejected])[:, None])
    theirs = RewardTrainer.compute_loss(trainer, lambda **_: logits, inputs)
    out = reward_model_loss(chosen, rejected, margins=margins, center_coef=center or 0.0)
    torch.testing.assert_close(out.loss, theirs)
    grads = [torch.autograd.grad(loss, (chosen, rejected)) for loss in (out.loss, theirs)]
    torch.testing.assert_close(*grads)
    metrics = trainer._metrics["train"]
    assert finish(out.metrics) == pytest.approx(
        {name: metrics[name][0] for name in ("accuracy", "margin", "mean_reward")}
    )


def test_it_equals_log_one_plus_exp():
    chosen, rejected = scores()
    torch.testing.assert_close(reward_model_loss(chosen, rejected).loss, softplus(rejected - chosen).mean())


@pytest.mark.parametrize("label", [-0.1, 1.5, float("nan")])
def test_a_soft_label_that_is_no_probability_is_refused(label):
    with pytest.raises(ValueError, match=rf"reward_model_loss: soft_labels: expected probabilities, got {label:g}\."):
        reward_model_loss(torch.zeros(2), torch.ones(2), soft_labels=torch.tensor([0.5, label]))


def test_soft_labels_are_a_cross_entropy_whose_optimum_is_their_log_odds():
    chosen, rejected = scores()
    p = torch.tensor([0.1, 0.5, 0.9, 1.0, 0.0], dtype=torch.float64)
    d = chosen - rejected
    expected = -(p * logsigmoid(d) + (1 - p) * logsigmoid(-d)).mean()
    torch.testing.assert_close(reward_model_loss(chosen, rejected, soft_labels=p).loss, expected)
    best = torch.logit(p[:3]).requires_grad_()
    loss = reward_model_loss(best, torch.zeros_like(best), soft_labels=p[:3]).loss
    torch.testing.assert_close(torch.autograd.grad(loss, best)[0], torch.zeros(3, dtype=torch.float64))


def test_every_ranking_of_a_prompt_weighs_the_same():
    """arXiv:2203.02155 eq. 1: K answers are K (K - 1) / 2 pairs of weight one over that number."""
    chosen, rejected = scores()
    weights = torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0, 1.0], dtype=torch.float64)  # a prompt with K = 3, two with K = 2
    losses = softplus(rejected - chosen)
    out = reward_model_loss(chosen, rejected, weights=weights, normalizer=3.0)
    torch.testing.assert_close(out.loss, (losses[:3].mean() + losses[3] + losses[4]) / 3)


def test_gradcheck_and_scores_far_apart():
    options = {"center_coef": 0.1, "soft_labels": torch.full((5,), 0.8)}
    assert torch.autograd.gradcheck(lambda *x: reward_model_loss(*x, **options).loss, scores())
    far = torch.tensor([-1e6, 1e6], requires_grad=True)
    loss = reward_model_loss(far, -far).loss
    assert loss == 1e6
    assert torch.autograd.grad(loss, far)[0].tolist() == [-1.0, 0.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected_rewards": torch.zeros(4)}, r"rejected_rewards: expected shape \(5,\) as chosen_rewards, got"),
        ({"chosen_rewards": torch.zeros(5, 1)}, r"chosen_rewards: expected shape \(P,\), got \(5, 1\)\."),
        ({"center_coef": -1.0}, r"center_coef: expected a number of at least 0, got -1\.0\."),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_one_sentence(change, message):
    arguments = {"chosen_rewards": torch.zeros(5), "rejected_rewards": torch.zeros(5)} | change
    with pytest.raises(ValueError, match=rf"^reward_model_loss: {message}"):
        reward_model_loss(**arguments)
