from __future__ import annotations

import math

import pytest
import torch

from fastrl.trainer.config import OptimizerConfig
from fastrl.trainer.optimizer import MasterOptimizer


def train(dtype, steps, lr=1e-5):
    weight = torch.nn.Parameter(torch.full((4,), 1.0, dtype=dtype))
    optimizer = MasterOptimizer([weight], OptimizerConfig(lr=lr, max_grad_norm=0.0), steps)
    for _ in range(steps):
        (weight * torch.tensor([1.0, -1.0, 2.0, 0.5], dtype=dtype)).sum().backward()
        optimizer.step()
    return weight, optimizer


def test_updates_too_small_for_bfloat16_accumulate_in_the_masters():
    weight, optimizer = train(torch.bfloat16, steps=500)
    exact, _ = train(torch.float32, steps=500)
    assert optimizer.masters[0].dtype == torch.float32
    torch.testing.assert_close(optimizer.masters[0].detach(), exact.detach(), rtol=0, atol=1e-6)
    assert (weight != 1.0).all()  # 500 updates of 1e-5 are visible, one is below half the spacing of 2^-8
    assert torch.equal(weight.detach(), optimizer.masters[0].detach().bfloat16())


def test_micro_batch_gradients_add_in_float32():
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = MasterOptimizer([weight], OptimizerConfig(), 1)
    for value in (256.0, 1.0, 1.0, 1.0):  # 256 + 1 is 256 in bfloat16
        (weight * value).sum().backward()
    assert weight.grad is None
    assert optimizer.grads[0].item() == 259.0


def test_float32_parameters_are_their_own_masters():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = MasterOptimizer([weight, torch.nn.Parameter(torch.ones(1), requires_grad=False)], OptimizerConfig(), 1)
    assert [master.data_ptr() for master in optimizer.masters] == [weight.data_ptr()]
    (weight * 3).sum().backward()
    assert optimizer.flat.grad.tolist() == [3.0, 3.0]


def test_step_returns_the_norm_before_clipping_and_clips():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = MasterOptimizer([weight], OptimizerConfig(max_grad_norm=1.0), 1)
    (weight * torch.tensor([3.0, 4.0])).sum().backward()
    seen = []
    optimizer.adamw.register_step_pre_hook(lambda *_: seen.append(optimizer.flat.grad.norm().item()))
    assert optimizer.step() == pytest.approx(5.0)
    assert seen == [pytest.approx(1.0, abs=1e-5)]
    assert not optimizer.flat.grad.any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_gradient_changes_nothing_and_is_reported(value):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = MasterOptimizer([weight], OptimizerConfig(lr=0.1), 1)
    (weight * torch.tensor([1.0, value])).sum().backward()
    assert not math.isfinite(optimizer.step())
    assert torch.equal(weight.detach(), torch.ones(2))
    assert optimizer.steps == 0


def test_learning_rate_warms_up_then_follows_the_schedule():
    def rates(schedule):
        config = OptimizerConfig(lr=1.0, warmup_steps=4, schedule=schedule)
        optimizer = MasterOptimizer([torch.nn.Parameter(torch.ones(1))], config, total_steps=12)
        for optimizer.steps in range(13):
            yield optimizer.learning_rate()

    constant, cosine = list(rates("constant")), list(rates("cosine"))
    assert constant == [0.25, 0.5, 0.75, 1.0] + [1.0] * 9
    assert cosine[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert cosine[4:] == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(9)], abs=1e-6)


def test_tied_weight_gets_one_master_and_the_sum_of_both_gradients():
    embedding = torch.nn.Embedding(5, 3)
    head = torch.nn.Linear(3, 5, bias=False)
    head.weight = embedding.weight
    model = torch.nn.ModuleList([embedding, head])
    optimizer = MasterOptimizer(model.parameters(), OptimizerConfig(), 1)
    assert len(optimizer.masters) == 1
    ids, coefficients = torch.tensor([1, 2]), torch.randn(2, 5)
    (head(embedding(ids)) * coefficients).sum().backward()
    detached = embedding.weight.detach()
    as_embedding, as_head = detached.clone().requires_grad_(), detached.clone().requires_grad_()
    ((as_embedding[ids] @ as_head.T) * coefficients).sum().backward()
    torch.testing.assert_close(optimizer.grads[0], as_embedding.grad + as_head.grad)
