from __future__ import annotations

import math

import pytest
import torch
from ops.cases import IGNORE, SHAPES, Inputs, dense, gaussian, peaked
from tolerance import assert_exact, assert_no_worse

from fastrl.kernels.linear_logprob import chunked
from fastrl.ops.linear_token_loss import linear_token_loss

EVERYTHING = ("hidden", "weight", "bias")
ROW = 37 * 8  # bytes that one row of float64 probabilities keeps
OPTIONS = {
    "no options": lambda rows: {},
    "temperature a float": lambda rows: {"temperature": 0.7},
    "temperature per row": lambda rows: {"temperature": torch.linspace(0.3, 2.0, rows, dtype=torch.float64)},
    "softcap": lambda rows: {"softcap": 2.5},
    "logit_scale": lambda rows: {"logit_scale": 0.125},
    "ignore_index a valid id": lambda rows: {"ignore_index": 0},
}


def clipped(logps, old_logps, advantages):
    """PPO's surrogate: not linear, not smooth."""
    ratio = (logps - old_logps).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)


def clipped_with_entropy(logps, entropy, old_logps, advantages):
    return clipped(logps, old_logps, advantages) - 0.3 * entropy.square()


def fused(inputs, token_loss, **options):
    return linear_token_loss(inputs.hidden, inputs.weight, inputs.targets, token_loss, bias=inputs.bias, **options)


def case(rows=11, size=8, vocabulary=37, **options):
    """Inputs, weights of which every fourth is zero, and a context near the policy."""
    inputs = gaussian(rows, size, vocabulary, **options)
    weights = torch.rand(rows, dtype=torch.float64)
    weights[2::4] = 0
    keep = (inputs.targets != IGNORE).double()
    old_logps = dense(inputs)[0].detach() + 0.3 * torch.randn(rows, dtype=torch.float64) * keep
    return inputs, weights, (old_logps, torch.randn(rows, dtype=torch.float64))


def compare_with_dense(inputs, weights, context, requires, options, *, entropy=True, **paths):
    ours, theirs = inputs.leaves(*requires), inputs.leaves(*requires)
    token_loss = clipped_with_entropy if entropy else clipped
    out = fused(ours, token_loss, weights=weights, context=context, entropy=entropy, **options, **paths)
    logps, h = dense(theirs, **options)
    loss = (weights * token_loss(logps, *((h,) if entropy else ()), *context)).sum()
    assert_exact(out.loss, loss)
    if requires:
        (3 * out.loss).backward()
        (3 * loss).backward()
    for name, expected in theirs.grads().items():
        got = ours.grads()[name]
        assert (got is None) == (expected is None), name
        if expected is not None:
            assert_exact(got, expected)
    live = (weights != 0) & (inputs.targets != options.get("ignore_index", IGNORE))
    for name, values in (("logps", logps), ("entropy", h))[: 1 + entropy]:
        total, count = out.metrics[name]
        assert_exact(total, values[live].sum())
        assert count == live.sum()


@pytest.mark.parametrize("entropy", [False, True], ids=["logps", "entropy"])
@pytest.mark.parametrize("memory", [None, 0, 4 * ROW], ids=["one piece", "row by row", "unequal pieces"])
@pytest.mark.parametrize("option", OPTIONS)
def test_equals_dense_with_every_option(backend, option, memory, entropy):
    options = OPTIONS[option](11)
    inputs, weights, context = case(ignored="ignore_index" not in options)
    inputs.targets[3] = 0
    compare_with_dense(inputs, weights, context, EVERYTHING, options, entropy=entropy, memory=memory, backend=backend)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_dense_at_every_shape(backend, shape):
    compare_with_dense(*case(*SHAPES[shape]), EVERYTHING, {}, backend=backend)


@pytest.mark.parametrize(
    "requires",
    [(), ("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("hidden", "weight")],
    ids=lambda names: "+".join(names) or "nothing",
)
def test_gives_a_gradient_to_exactly_what_requires_one(backend, requires):
    compare_with_dense(*case(), requires, {}, memory=4 * ROW, backend=backend)


@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (2, 1, 3)], ids=str)
def test_any_leading_shape_and_strides(backend, shape):
    rows = math.prod(shape)
    inputs, weights, context = case(rows, ignored=False)
    hidden = torch.randn(8, *shape, dtype=torch.float64).movedim(0, -1)
    temperature = torch.rand(shape, dtype=torch.float64) + 0.5
    inputs = Inputs(hidden, inputs.weight.T.contiguous().T, inputs.targets.reshape(shape), inputs.bias)
    compare_with_dense(
        inputs,
        weights.reshape(shape),
        tuple(c.reshape(shape) for c in context),
        EVERYTHING,
        {"temperature": temperature},
        memory=2 * ROW,
        backend=backend,
    )


def test_gradcheck(backend):
    inputs, weights, (old_logps, _) = case(5, 3, 7)
    inputs = inputs.leaves(*EVERYTHING)

    def op(hidden, weight, bias):
        return linear_token_loss(
            hidden, weight, inputs.targets, lambda lp, h, old: (lp - old).square() + h, weights=weights,
            context=(old_logps,), bias=bias, softcap=3.0, entropy=True, memory=2 * 7 * 8, backend=backend,
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(op, (inputs.hidden, inputs.weight, inputs.bias))


@pytest.mark.parametrize("requires", [EVERYTHING, ("hidden",)], ids=["trainable head", "frozen head"])
def test_no_worse_than_plain_torch_in_bfloat16(backend, requires, monkeypatch):
    monkeypatch.setattr(chunked, "VOCABULARY_TILE", 128)
    inputs = peaked(264, 64, 515, torch.bfloat16)
    weights, advantages = torch.rand(264), torch.randn(264)
    weights[2::4] = 0
    old_logps = (dense(inputs, upcast=torch.float32)[0] + 0.1 * torch.randn(264)).float()
    ours, plain = inputs.leaves(*requires), inputs.leaves(*requires)
    truth = inputs.leaves(*requires, dtype=torch.float64)

    def smooth(logps, old_logps, advantages):  # clipping would turn a rounding into a jump
        return -torch.sigmoid(logps - old_logps) * advantages

    out = fused(ours, smooth, weights=weights, context=(old_logps, advantages), memory=100 * 515 * 2, backend=backend)
    plain_loss = (weights * smooth(dense(plain, upcast=torch.float32)[0], old_logps, advantages)).sum()
    truth_loss = (weights * smooth(dense(truth)[0], old_logps, advantages)).sum()
    for loss in (out.loss, plain_loss, truth_loss):
        loss.backward()
    assert out.loss.dtype == torch.float32
    for name in requires:
        assert_no_worse(ours.grads()[name], plain.grads()[name], truth.grads()[name], name=f"d {name}")


def test_tokens_of_weight_zero_are_never_touched(backend):
    """NaN hidden states, ids outside the vocabulary, and a loss that is infinite there."""
    inputs, weights, context = case()
    silent = weights == 0
    broken = inputs.leaves(*EVERYTHING)
    broken.hidden.data[silent] = math.nan
    broken.targets = inputs.targets.masked_fill(silent, 99)
    wild = (context[0].masked_fill(silent, -math.inf), context[1].masked_fill(silent, math.nan))
    clean = inputs.leaves(*EVERYTHING)
    losses = [
        fused(x, clipped, weights=weights, context=c, memory=4 * ROW, backend=backend).loss
        for x, c in ((broken, wild), (clean, context))
    ]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for got, want in zip(broken.grads().values(), clean.grads().values(), strict=True):
        assert torch.equal(got, want)
    assert (broken.hidden.grad[silent] == 0).all()


def test_all_weights_zero_gives_loss_zero_and_zero_gradients(backend):
    inputs, weights, context = case()
    inputs = inputs.leaves(*EVERYTHING)
    out = fused(inputs, clipped, weights=torch.zeros_like(weights), context=context, backend=backend)
    out.loss.backward()
    assert out.loss == 0
    assert all((g == 0).all() for g in inputs.grads().values())


def test_backward_twice_doubles_the_gradient(backend):
    inputs, weights, context = case()
    inputs = inputs.leaves(*EVERYTHING)
    loss = fused(inputs, clipped, weights=weights, context=context, backend=backend).loss
    loss.backward(retain_graph=True)
    once = {name: g.clone() for name, g in inputs.grads().items()}
    loss.backward()
    for name, grad in inputs.grads().items():
        assert torch.equal(grad, 2 * once[name])


def test_double_backward_raises(backend):
    """The gradient is a constant from the forward pass, so its own derivative would be wrong without an error."""
    inputs, weights, context = case()
    inputs = inputs.leaves("hidden")
    loss = fused(inputs, clipped, weights=weights, context=context, backend=backend).loss
    (grad,) = torch.autograd.grad(loss * inputs.hidden.sum(), inputs.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="It has no second derivative"):
        grad.sum().backward()


def test_context_and_weights_are_constants(backend):
    inputs, weights, context = case()
    inputs = inputs.leaves(*EVERYTHING)
    tensors = [t.clone().requires_grad_() for t in (weights, *context)]
    fused(inputs, clipped, weights=tensors[0], context=tuple(tensors[1:]), backend=backend).loss.backward()
    assert all(t.grad is None for t in tensors)
    assert inputs.weight.grad is not None


def test_the_loss_is_float32_whatever_the_weights_and_the_context_are():
    inputs = gaussian(6, 8, 37, dtype=torch.float32).leaves(*EVERYTHING)
    wide = torch.rand(6, dtype=torch.float64)
    out = fused(inputs, lambda logps, c: -logps * c, weights=wide, context=(wide,))
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert {g.dtype for g in inputs.grads().values()} == {torch.float32}


def test_compiles_without_a_graph_break():
    def step(hidden, weight, targets, weights, old_logps, advantages):
        options = {"weights": weights, "context": (old_logps, advantages), "memory": 4 * ROW}
        return linear_token_loss(hidden * 2, weight, targets, clipped, **options).loss * 3

    torch._dynamo.reset()
    base, weights, context = case(bias=False)
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        inputs = base.leaves("hidden", "weight")
        loss = function(inputs.hidden, inputs.weight, inputs.targets, weights, *context)
        loss.backward()
        results.append((loss.detach(), inputs.hidden.grad, inputs.weight.grad))
    for eager, compiled in zip(*results, strict=True):
        assert_exact(compiled, eager)


def test_without_gradients_the_loss_is_the_same(backend):
    inputs, weights, context = case()
    ours = inputs.leaves(*EVERYTHING)
    loud = fused(ours, clipped, weights=weights, context=context, backend=backend).loss
    with torch.no_grad():
        quiet = fused(ours, clipped, weights=weights, context=context, backend=backend).loss
    assert torch.equal(loud, quiet)
    assert not quiet.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": torch.ones(3)}, "weights: expected shape"),
        ({"context": (torch.ones(4), torch.ones(3))}, r"context\[1\]: expected shape"),
        ({"memory": -1}, "memory: expected a byte budget"),
        ({"memory": "recompute"}, "memory: expected a byte budget"),
        ({"token_loss": lambda logps: logps.sum()}, "token_loss: expected shape"),
        ({"backend": "chunkd"}, "Did you mean 'chunked'"),
    ],
    ids=["weights", "context", "memory", "memory by name", "token_loss", "backend"],
)
def test_a_wrong_argument_is_refused_by_name(changes, message):
    good = {"hidden": torch.ones(4, 8), "weight": torch.ones(37, 8), "targets": torch.zeros(4, dtype=torch.int64)}
    good |= {"token_loss": lambda logps, *context: -logps, "weights": torch.ones(4)}
    with pytest.raises(ValueError, match=message):
        linear_token_loss(**(good | changes))
