"""The number of matmuls is a promise: in units of 2 N H V floating-point operations, exactly."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from ops.cases import IGNORE, gaussian
from torch.utils._python_dispatch import TorchDispatchMode

from fastrl import linear_policy_loss
from fastrl.kernels.linear_logprob import chunked
from fastrl.kernels.registry import resolve
from fastrl.ops import linear_logprob as head_op
from fastrl.ops import linear_policy_loss as policy_op
from fastrl.ops.linear_logprob import linear_logprob
from fastrl.ops.linear_token_loss import linear_token_loss
from fastrl.spec import KL, Clip, PolicyLoss, Reinforce

ROWS, SIZE, VOCABULARY = 24, 5, 37
UNIT = 2 * ROWS * SIZE * VOCABULARY
EVERYTHING = ("hidden", "weight", "bias")
MATMULS = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1}  # and where the left factor is


class MatmulFlops(TorchDispatchMode):
    """Adds up 2 M N K over the matmuls that run below it."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:  # below autograd, matmul and its kin arrive whole
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in MATMULS:
            self.flops += 2 * result.numel() * args[MATMULS[name]].shape[-1]
        return result


@pytest.fixture
def matmuls(monkeypatch):
    """A function that returns the matmuls of the head since it was last called, in units."""
    mode = MatmulFlops()

    def counted(function):
        def run(*args, **kwargs):
            with mode:
                return function(*args, **kwargs)

        return run

    def counting(op, backend, device):
        kernel = resolve(op, backend, device)
        return SimpleNamespace(
            **{name: counted(getattr(kernel, name)) for name in ("forward", "backward") if hasattr(kernel, name)}
        )

    for module in (head_op, policy_op):
        monkeypatch.setattr(module, "resolve", counting)
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 5 * VOCABULARY * 8)

    def taken():
        count, mode.flops = mode.flops / UNIT, 0
        return count

    return taken


def inputs_for(*requires):
    return gaussian(ROWS, SIZE, VOCABULARY, ignored=False).leaves(*requires)


def logprob_of(inputs, **options):
    return linear_logprob(inputs.hidden, inputs.weight, inputs.targets, bias=inputs.bias, backend="chunked", **options)


def policy_loss_of(inputs, advantages, spec, *, mask=None, **options):
    mask = torch.ones(ROWS, dtype=torch.bool) if mask is None else mask
    return linear_policy_loss(
        inputs.hidden, inputs.weight, inputs.targets, advantages, spec, bias=inputs.bias, mask=mask, backend="chunked",
        **options,
    ).loss  # fmt: skip


@pytest.mark.parametrize("below_autograd", [False, True])
def test_the_counter_counts_every_kind_of_matmul_once(below_autograd):
    a, b, c = torch.ones(2, 3), torch.ones(3, 4), torch.ones(2, 4)
    kinds = (
        lambda: torch.mm(a, b),
        lambda: torch.mm(a, b, out=c),
        lambda: a @ b,
        lambda: c.addmm_(a, b),
        lambda: torch.addmm(c, a, b),
        lambda: torch.nn.functional.linear(a, b.T),
        lambda: torch.bmm(a[None], b[None]),
        lambda: torch.baddbmm(c[None], a[None], b[None]),
        lambda: a[None] @ b,
        lambda: torch.einsum("ij,jk->ik", a, b),
    )
    for kind in kinds:
        with torch._C._AutoDispatchBelowAutograd() if below_autograd else nullcontext(), MatmulFlops() as mode:
            kind()
        assert mode.flops == 2 * 2 * 3 * 4


# linear_logprob.


@pytest.mark.parametrize("entropy", [False, True])
def test_without_gradient_one(matmuls, entropy):
    logprob_of(inputs_for(), entropy=entropy)
    assert matmuls() == 1
    with torch.no_grad():
        logprob_of(inputs_for(*EVERYTHING), entropy=entropy)
    assert matmuls() == 1


def test_frozen_head_two_and_none_in_backward(matmuls):
    out = logprob_of(inputs_for("hidden"))
    assert matmuls() == 2
    out.logps.sum().backward()
    assert matmuls() == 0


def test_frozen_head_with_entropy_three_and_none_in_backward(matmuls):
    out = logprob_of(inputs_for("hidden"), entropy=True)
    assert matmuls() == 3
    (out.logps + out.entropy).sum().backward()
    assert matmuls() == 0


@pytest.mark.parametrize(("memory", "backward"), [("store", 2), ("recompute", 3)])
@pytest.mark.parametrize("entropy", [False, True])
def test_trainable_head_one_and_two_or_three(matmuls, memory, backward, entropy):
    out = logprob_of(inputs_for(*EVERYTHING), memory=memory, entropy=entropy)
    assert matmuls() == 1
    (out.logps + (out.entropy if entropy else 0)).sum().backward()
    assert matmuls() == backward


@pytest.mark.parametrize(("requires", "keep"), [(("weight",), 1), (("bias",), 0), (("hidden", "bias"), 1)])
def test_only_the_products_that_someone_needs(matmuls, requires, keep):
    for memory, recomputed in (("store", 0), ("recompute", 1)):
        out = logprob_of(inputs_for(*requires), memory=memory)
        assert matmuls() == 1
        out.logps.sum().backward()
        assert matmuls() == keep + recomputed


@pytest.mark.parametrize(("memory", "backward"), [("store", 2), ("recompute", 3)])
@pytest.mark.parametrize("silent", [0, 6, 18, 24])
def test_rows_without_upstream_gradient_cost_nothing_in_backward(matmuls, memory, backward, silent):
    out = logprob_of(inputs_for(*EVERYTHING), memory=memory)
    assert matmuls() == 1
    grads = torch.ones(ROWS, dtype=torch.float64)
    grads[torch.randperm(ROWS)[:silent]] = 0
    out.logps.backward(grads)
    assert matmuls() == backward * (1 - silent / ROWS)


@pytest.mark.parametrize(
    "requires", [EVERYTHING, ("hidden",), ()], ids=["trainable head", "frozen head", "no gradient"]
)
def test_ignored_rows_cost_nothing(matmuls, requires):
    inputs = inputs_for(*requires)
    inputs.targets[::4] = IGNORE
    out = logprob_of(inputs, memory="store")
    if requires:
        out.logps.sum().backward()
    assert matmuls() == {3: 3, 1: 2, 0: 1}[len(requires)] * 0.75


# linear_token_loss.


@pytest.mark.parametrize(("requires", "count"), [(EVERYTHING, 3), (("hidden",), 2), ((), 1)])
@pytest.mark.parametrize("pieces", [1, 5])
def test_token_loss_all_in_the_forward_pass(matmuls, requires, count, pieces):
    inputs = inputs_for(*requires)
    out = linear_token_loss(
        inputs.hidden, inputs.weight, inputs.targets, lambda logps: -logps, bias=inputs.bias,
        weights=torch.ones(ROWS), memory=math.ceil(ROWS / pieces) * VOCABULARY * 8, backend="chunked",
    )  # fmt: skip
    assert matmuls() == count
    if requires:
        out.loss.backward()
    assert matmuls() == 0


def test_token_loss_skips_weight_zero_altogether_and_flat_losses_in_backward(matmuls):
    inputs, weights, flat = inputs_for(*EVERYTHING), torch.ones(ROWS), torch.zeros(ROWS)
    weights[::4], flat[1::4] = 0, 1
    linear_token_loss(
        inputs.hidden, inputs.weight, inputs.targets, lambda logps, flat: -logps * (1 - flat), bias=inputs.bias,
        weights=weights, context=(flat,), backend="chunked",
    )  # fmt: skip
    assert matmuls() == 0.75 + 2 * 0.5


# linear_policy_loss.


@pytest.mark.parametrize(("requires", "count"), [(EVERYTHING, 3), (("hidden",), 2), (("weight",), 2), ((), 1)])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_policy_loss_all_in_the_forward_pass(matmuls, requires, count, entropy_coef):
    spec = PolicyLoss(surrogate=Reinforce(), aggregate="token_mean", entropy_coef=entropy_coef)
    loss = policy_loss_of(inputs_for(*requires), torch.randn(ROWS), spec)
    assert matmuls() == count
    if requires:
        loss.backward()
    assert matmuls() == 0


@pytest.mark.parametrize("silent", [0, 6, 18, 24])
def test_policy_loss_rows_without_advantage(matmuls, silent):
    """Their gradient is free; with `metrics=False` so is their forward pass, unless a KL term needs it."""
    advantages = torch.randn(ROWS, dtype=torch.float64)
    advantages[torch.randperm(ROWS)[:silent]] = 0
    spec, live = PolicyLoss(surrogate=Clip(0.2, 0.2), aggregate="token_mean"), 1 - silent / ROWS
    policy_loss_of(inputs_for(*EVERYTHING), advantages, spec)
    assert matmuls() == 1 + 2 * live
    policy_loss_of(inputs_for(*EVERYTHING), advantages, spec, metrics=False)
    assert matmuls() == pytest.approx(3 * live, rel=1e-15)
    with_kl = PolicyLoss(surrogate=Clip(0.2, 0.2), kl=KL("k3", 0.1), aggregate="token_mean")
    policy_loss_of(inputs_for(*EVERYTHING), advantages, with_kl, ref_logps=torch.randn(ROWS), metrics=False)
    assert matmuls() == 3


def test_policy_loss_clipped_tokens_have_a_free_gradient(matmuls):
    inputs, advantages = inputs_for(*EVERYTHING), torch.ones(ROWS)
    with torch.no_grad():
        logps = logprob_of(inputs).logps
    matmuls()
    old_logps = logps - torch.where(torch.arange(ROWS) % 3 == 0, 0.5, 0.0)  # every third ratio is 1.65
    policy_loss_of(inputs, advantages, PolicyLoss(aggregate="token_mean"), old_logps=old_logps)
    assert matmuls() == pytest.approx(1 + 2 * (2 / 3), rel=1e-15)


def test_policy_loss_masked_tokens_cost_nothing(matmuls):
    mask = torch.arange(ROWS) % 4 != 0
    inputs = inputs_for(*EVERYTHING)
    inputs.targets[1::4] = IGNORE
    policy_loss_of(inputs, torch.ones(ROWS), PolicyLoss(aggregate="token_mean"), mask=mask)
    assert matmuls() == 1.5


@pytest.mark.parametrize(("memory", "count"), [("store", 3), ("recompute", 4)])
def test_policy_loss_of_a_sequence_ratio_runs_as_two_ops(matmuls, memory, count):
    spec = PolicyLoss(ratio="sequence", surrogate=Clip(0.2, 0.2))
    bounds = torch.tensor([0, 10, ROWS])
    policy_loss_of(inputs_for(*EVERYTHING), torch.ones(2), spec, cu_seqlens=bounds, memory=memory).backward()
    assert matmuls() == count
