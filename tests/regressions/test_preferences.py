"""Bugs that preference losses elsewhere had; each test names where."""

from __future__ import annotations

import pytest
import torch

from fastrl.losses.metrics import finish, merge
from fastrl.losses.preference import preference_loss
from fastrl.losses.presets import DPO, KTO, ORPO, SIMPO
from fastrl.losses.unpaired import unpaired_preference_loss
from fastrl.losses.value import value_loss


def test_prompt_tokens_are_in_neither_the_sum_nor_the_mean():
    """https://github.com/huggingface/trl/pull/3346, https://github.com/linkedin/Liger-Kernel/pull/676: the fused loss
    counted prompt tokens, and took means where the plain one took sums."""
    logps = torch.randn(2, 8, dtype=torch.float64)
    completion = (torch.arange(8) >= 5).repeat(2, 1)
    for spec in (DPO, SIMPO):
        sides = [{"mask": completion, "logps": logps}, {"mask": completion[:, 5:], "logps": logps[:, 5:]}]
        losses = [
            preference_loss(
                side["logps"], side["logps"].flip(0), spec, chosen_mask=side["mask"], rejected_mask=side["mask"],
                ref_chosen_logps=torch.zeros(2), ref_rejected_logps=torch.ones(2),
            )
            for side in sides
        ]  # fmt: skip
        torch.testing.assert_close(losses[0].loss, losses[1].loss)
        assert finish(losses[0].metrics) == finish(losses[1].metrics)
        assert finish(losses[0].metrics)["logps/chosen"] == pytest.approx(float(logps[:, 5:].sum()) / 2)


def test_kto_metrics_of_three_answers_are_sums_over_answers():
    """https://github.com/huggingface/trl/pull/7059: a mask (B,) against values (B, 1) broadcast to (B, B)."""
    logps = torch.tensor([[-1.0], [-2.0], [-4.0]])
    labels = torch.tensor([True, False, True])
    out = unpaired_preference_loss(
        logps, labels, KTO, ref_logps=torch.zeros(3), mask=torch.ones(3, 1, dtype=torch.bool), kl=0.0
    )
    assert [float(x) for x in out.metrics["logps/chosen"]] == [-5.0, 2.0]
    assert [float(x) for x in out.metrics["logps/rejected"]] == [-2.0, 1.0]


def test_loss_and_metrics_do_not_depend_on_the_accumulation():
    """https://github.com/unslothai/unsloth/issues/3482: the loss of DPO and ORPO did."""
    chosen, rejected = -torch.rand(2, 4, 3)
    mask = torch.ones(4, 3, dtype=torch.bool)

    def evaluate(rows):
        return preference_loss(
            chosen[rows], rejected[rows], ORPO, chosen_mask=mask[rows], rejected_mask=mask[rows], normalizer=4.0
        )

    whole, parts = evaluate(slice(0, 4)), [evaluate(slice(0, 3)), evaluate(slice(3, 4))]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    assert finish(merge(part.metrics for part in parts)) == pytest.approx(finish(whole.metrics), rel=1e-5)


def test_a_huge_value_at_a_masked_token_does_not_leak_into_the_critics_loss():
    """https://github.com/alibaba/ROLL/pull/447: the value 100 at a masked token reached the targets of the others."""
    values = torch.tensor([[0.0, 0.0, 100.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    out = value_loss(values, torch.zeros(1, 3), torch.tensor([[0.95, 1.0, 0.0]]), mask=mask)
    assert out.loss.item() == pytest.approx((0.95**2 + 1.0) / 4)
    assert torch.autograd.grad(out.loss, values)[0].tolist()[0] == pytest.approx([-0.475, -0.5, 0.0])
    assert finish(out.metrics)["value/mean"] == 0.0
