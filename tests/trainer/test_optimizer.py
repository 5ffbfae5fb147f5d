from __future__ import annotations

import math

import pytest
import torch

from fastrl.trainer.config import OptimizerConfig
from fastrl.trainer.optimizer import MasterOptimizer, join, split


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
    (master,) = optimizer.masters()
    assert master.dtype == torch.float32
    torch.testing.assert_close(master, exact.detach(), rtol=0, atol=1e-6)
    assert (weight != 1.0).all()  # 500 updates of 1e-5 are visible, one is below half the spacing of 2^-8
    assert torch.equal(weight.detach(), master.bfloat16())


def test_micro_batch_gradients_add_in_float32():
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = MasterOptimizer([weight], OptimizerConfig(), 1)
    for value in (256.0, 1.0, 1.0, 1.0):  # 256 + 1 is 256 in bfloat16
        (weight * value).sum().backward()
    assert weight.grad is None
    assert optimizer.grad.item() == 259.0


def test_float32_parameters_are_their_own_masters():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = MasterOptimizer([weight, torch.nn.Parameter(torch.ones(1), requires_grad=False)], OptimizerConfig(), 1)
    assert [master.data_ptr() for master in optimizer.masters()] == [weight.data_ptr()]
    (weight * 3).sum().backward()
    assert optimizer.grad.tolist() == [3.0, 3.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_steps_equal_torch_adamw_with_clipping(dtype, max_grad_norm, monkeypatch):
    monkeypatch.setattr("fastrl.trainer.optimizer.SLICE", 7)  # several slices, the last one short
    start = [torch.randn(3, 4).to(dtype), torch.randn(5).to(dtype)]
    ours = [torch.nn.Parameter(t.clone()) for t in start]
    theirs = [torch.nn.Parameter(t.float()) for t in start]
    config = OptimizerConfig(lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1, max_grad_norm=max_grad_norm)
    optimizer = MasterOptimizer(ours, config, 5)
    reference = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    for _ in range(5):
        grads = [(3 * torch.randn(t.shape)).to(dtype) for t in start]
        for ours_p, theirs_p, grad in zip(ours, theirs, grads, strict=True):
            (ours_p * grad).sum().backward()
            theirs_p.grad = grad.float()
        norm = torch.nn.utils.clip_grad_norm_(theirs, max_grad_norm or math.inf)
        assert optimizer.step() == pytest.approx(norm.item(), rel=1e-6)
        reference.step()
    assert not optimizer.grad.any()
    for ours_p, master, theirs_p in zip(ours, optimizer.masters(), theirs, strict=True):
        torch.testing.assert_close(master, theirs_p.detach(), rtol=0, atol=1e-6)
        assert torch.equal(ours_p.detach(), master.to(dtype))


def test_two_halves_hold_every_bit_of_a_master_but_the_last_of_some_ties():
    bits = torch.randint(-(2**31), 2**31, (100_000,), dtype=torch.int64).int()
    masters = bits.view(torch.float32)
    masters = masters[masters.isfinite() & (masters.abs() < 3e38)]
    ties = (masters.view(torch.int32)[:1000] & ~0xFFFF | 0x8000).view(torch.float32)
    for values, exact in ((masters, True), (ties[ties.isfinite()], False)):
        weights, rest = torch.empty_like(values, dtype=torch.bfloat16), torch.empty_like(values, dtype=torch.int16)
        split(values, weights, rest)
        assert torch.equal(weights, values.bfloat16())
        difference = (join(weights, rest).view(torch.int32) - values.view(torch.int32)).abs()
        is_tie = (values.view(torch.int32) & 0xFFFF) == 0x8000
        assert (difference[~is_tie] == 0).all()
        assert difference.max() <= (0 if exact and not is_tie.any() else 1)


def test_parameters_of_two_dtypes_are_refused():
    params = [torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))]
    with pytest.raises(ValueError, match="params: expected parameters of one dtype"):
        MasterOptimizer(params, OptimizerConfig(), 1)


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
    assert len(optimizer.masters()) == 1
    ids, coefficients = torch.tensor([1, 2]), torch.randn(2, 5)
    (head(embedding(ids)) * coefficients).sum().backward()
    detached = embedding.weight.detach()
    as_embedding, as_head = detached.clone().requires_grad_(), detached.clone().requires_grad_()
    ((as_embedding[ids] @ as_head.T) * coefficients).sum().backward()
    torch.testing.assert_close(optimizer.grad.view(5, 3), as_embedding.grad + as_head.grad)
