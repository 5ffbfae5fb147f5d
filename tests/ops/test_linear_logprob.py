from __future__ import annotations

import math
from contextlib import ExitStack, nullcontext

import pytest
import torch
from backends import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.cases import IGNORE, ORDERS, SHAPES, Inputs, dense, gaussian, peaked
from ops.threads import with_threads
from tolerance import assert_exact, assert_no_worse

from fastrl.kernels import tuning
from fastrl.kernels.linear_logprob import chunked
from fastrl.kernels.triton_jit import launch
from fastrl.ops import linear_logprob as module
from fastrl.ops.linear_logprob import linear_logprob

BACKENDS = ("reference", "chunked")
EVERYTHING = ("hidden", "weight", "bias")
OPTIONS = {
    "no options": lambda rows: {},
    "temperature a float": lambda rows: {"temperature": 0.7},
    "temperature 0-d": lambda rows: {"temperature": torch.tensor(1.3, dtype=torch.float64)},
    "temperature per row": lambda rows: {"temperature": torch.linspace(0.3, 2.0, rows, dtype=torch.float64)},
    "softcap that bites": lambda rows: {"softcap": 2.5},
    "logit_scale": lambda rows: {"logit_scale": 0.125},
    "ignore_index a valid id": lambda rows: {"ignore_index": 0},
    "all": lambda rows: {
        "temperature": torch.linspace(0.3, 2.0, rows, dtype=torch.float64),
        "softcap": 2.5,
        "logit_scale": 0.7,
    },
}


@pytest.fixture
def small_chunks(monkeypatch):
    """Three rows of a float64 vocabulary of 37 at a time, and weights widened ten rows at a time."""
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 3 * 37 * 8)
    monkeypatch.setattr(chunked, "VOCABULARY_TILE", 10)


def fused(inputs: Inputs, **options):
    return linear_logprob(inputs.hidden, inputs.weight, inputs.targets, bias=inputs.bias, **options)


def upstream(shape):
    """Gradients of logps and entropy, every fourth zero."""
    grads = torch.randn(2, *shape, dtype=torch.float64)
    grads[..., 3::4] = 0
    return grads


def pull(outputs, grads):
    """Backpropagates through logps and, where there is one, entropy."""
    pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs[:2], grads, strict=True) if o is not None and o.requires_grad]
    torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])


def compare_with_dense(inputs, requires, options, **paths):
    """Values and gradients in float64 against autograd through the dense expression."""
    ours, theirs = inputs.leaves(*requires), inputs.leaves(*requires)
    out, (logps, entropy) = fused(ours, **options, **paths), dense(theirs, **options)
    assert_exact(out.logps, logps)
    if paths.get("entropy"):
        assert_exact(out.entropy, entropy)
    grads = upstream(inputs.targets.shape)
    if not paths.get("entropy"):
        entropy = None
    if requires:
        pull(out, grads)
        pull((logps, entropy), grads)
    for name, expected in theirs.grads().items():
        got = ours.grads()[name]
        assert (got is None) == (expected is None), name
        if expected is not None:
            assert_exact(got, expected)


# The definition.


@pytest.mark.parametrize("memory", ["store", "recompute"])
@pytest.mark.parametrize("entropy", [False, True], ids=["logps", "entropy"])
@pytest.mark.parametrize("option", OPTIONS)
def test_equals_dense_with_every_option(backend, option, entropy, memory, small_chunks):
    options = OPTIONS[option](11)
    inputs = gaussian(11, 8, 37, ignored="ignore_index" not in options)
    inputs.targets[2] = 0
    compare_with_dense(inputs, EVERYTHING, options, entropy=entropy, memory=memory, backend=backend)


@pytest.mark.parametrize("memory", ["store", "recompute"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_dense_at_every_shape(backend, shape, memory):
    inputs = gaussian(*SHAPES[shape])
    compare_with_dense(inputs, EVERYTHING, {"softcap": 20.0}, entropy=True, memory=memory, backend=backend)


@pytest.mark.parametrize("option", ["no options", "all"])
@pytest.mark.parametrize(
    "requires",
    [(), ("hidden",), ("weight",), ("bias",), ("hidden", "weight"), ("hidden", "bias"), ("weight", "bias")],
    ids=lambda names: "+".join(names) or "nothing",
)
def test_gives_a_gradient_to_exactly_what_requires_one(backend, requires, option, small_chunks):
    inputs = gaussian(11, 8, 37)
    compare_with_dense(inputs, requires, OPTIONS[option](11), entropy=True, backend=backend)


@pytest.mark.parametrize("memory", ["auto", "store", "recompute", 0, 1 << 20])
def test_memory_changes_no_result(backend, memory):
    compare_with_dense(gaussian(11, 8, 37), EVERYTHING, {}, entropy=True, memory=memory, backend=backend)


def test_a_head_without_bias(backend):
    compare_with_dense(gaussian(11, 8, 37, bias=False), ("hidden", "weight"), {}, entropy=True, backend=backend)


@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (2, 1, 3), (2, 0)], ids=str)
def test_any_leading_shape(backend, shape):
    flat = gaussian(math.prod(shape), 8, 37)
    inputs = Inputs(flat.hidden.reshape(*shape, 8), flat.weight, flat.targets.reshape(shape), flat.bias)
    temperature = torch.rand(shape, dtype=torch.float64) + 0.5
    compare_with_dense(inputs, EVERYTHING, {"temperature": temperature}, entropy=True, backend=backend)
    assert fused(inputs).logps.shape == shape


STRIDES = {
    "hidden transposed": lambda x: x | {"hidden": torch.randn(4, 3, 8, dtype=torch.float64).transpose(0, 1)},
    "hidden expanded": lambda x: x | {"hidden": torch.randn(3, 1, 8, dtype=torch.float64).expand(3, 4, 8)},
    "hidden sliced": lambda x: x | {"hidden": torch.randn(3, 9, 17, dtype=torch.float64)[:, 1::2, 1::2]},
    "hidden column-major": lambda x: x | {"hidden": torch.randn(8, 3, 4, dtype=torch.float64).permute(1, 2, 0)},
    "weight transposed": lambda x: x | {"weight": torch.randn(8, 37, dtype=torch.float64).T},
    "weight sliced": lambda x: x | {"weight": torch.randn(75, 9, dtype=torch.float64)[1::2, 1:]},
    "weight expanded": lambda x: x | {"weight": torch.randn(1, 8, dtype=torch.float64).expand(37, 8)},
    "targets transposed": lambda x: x | {"targets": torch.randint(37, (4, 3)).T},
    "targets expanded": lambda x: x | {"targets": torch.randint(37, (4,)).expand(3, 4)},
    "targets int32": lambda x: x | {"targets": torch.randint(37, (3, 4), dtype=torch.int32)},
    "bias sliced": lambda x: x | {"bias": torch.randn(74, dtype=torch.float64)[::2]},
}


@pytest.mark.parametrize("memory", ["store", "recompute"])
@pytest.mark.parametrize("layout", STRIDES)
def test_any_strides(backend, layout, memory, small_chunks):
    names = {"hidden": torch.randn(3, 4, 8, dtype=torch.float64), "weight": torch.randn(37, 8, dtype=torch.float64)}
    names |= {"targets": torch.randint(37, (3, 4)), "bias": torch.randn(37, dtype=torch.float64)}
    case = STRIDES[layout](names)
    bases = {name: case[name].requires_grad_() for name in EVERYTHING}
    outputs = fused(Inputs(**case), entropy=True, memory=memory, backend=backend)[:2]
    expected = dense(Inputs(**case))
    weights = torch.randn(2, 3, 4, dtype=torch.float64)
    got = torch.autograd.grad([(w * o).sum() for w, o in zip(weights, outputs, strict=True)], list(bases.values()))
    want = torch.autograd.grad([(w * o).sum() for w, o in zip(weights, expected, strict=True)], list(bases.values()))
    for ours, theirs in zip((*outputs, *got), (*expected, *want), strict=True):
        assert_exact(ours.detach(), theirs.detach())


def test_expanded_temperature(backend):
    inputs = gaussian(12, 8, 37)
    inputs = Inputs(inputs.hidden.view(3, 4, 8), inputs.weight, inputs.targets.view(3, 4), inputs.bias)
    temperature = torch.tensor([[0.5], [1.0], [2.0]], dtype=torch.float64).expand(3, 4)
    compare_with_dense(inputs, EVERYTHING, {"temperature": temperature}, entropy=True, backend=backend)


def test_a_tied_weight_collects_the_gradient_of_both_uses(backend):
    ids, targets = torch.randint(37, (9,)), torch.randint(37, (9,))
    table = torch.randn(37, 8, dtype=torch.float64)
    tied = table.clone().requires_grad_()
    linear_logprob(torch.tanh(tied[ids]), tied, targets, backend=backend).logps.sum().backward()
    embedding, head = table.clone().requires_grad_(), table.clone().requires_grad_()
    dense(Inputs(torch.tanh(embedding[ids]), head, targets))[0].sum().backward()
    assert_exact(tied.grad, embedding.grad + head.grad)


def test_only_the_entropy_is_differentiated(backend, small_chunks):
    inputs = gaussian(11, 8, 37)
    ours, theirs = inputs.leaves(*EVERYTHING), inputs.leaves(*EVERYTHING)
    fused(ours, entropy=True, backend=backend).entropy.sum().backward()
    dense(theirs)[1].sum().backward()
    for name, expected in theirs.grads().items():
        assert_exact(ours.grads()[name], expected)


@pytest.mark.parametrize("requires", [EVERYTHING, ("hidden",)], ids=["trainable head", "frozen head"])
@pytest.mark.parametrize("memory", ["store", "recompute"])
def test_gradcheck(backend, memory, requires, small_chunks):
    inputs = gaussian(5, 3, 7).leaves(*requires)
    temperature = torch.linspace(0.5, 2.0, 5, dtype=torch.float64)

    def op(hidden, weight, bias):
        return linear_logprob(
            hidden, weight, inputs.targets, bias=bias, temperature=temperature, softcap=3.0, logit_scale=0.8,
            entropy=True, memory=memory, backend=backend,
        )  # fmt: skip

    assert torch.autograd.gradcheck(op, (inputs.hidden, inputs.weight, inputs.bias))


# 16 bit and float32: no worse than plain torch.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("memory", ["store", "recompute", "frozen head"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "softcap": 30.0}], ids=["plain", "softcap"])
def test_no_worse_than_plain_torch_on_peaked_logits(backend, dtype, memory, options, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 100 * 515 * 4)
    monkeypatch.setattr(chunked, "VOCABULARY_TILE", 128)
    inputs = peaked(264, 64, 515, dtype)
    requires = ("hidden",) if memory == "frozen head" else EVERYTHING
    grads = upstream(inputs.targets.shape)
    ours, truth = inputs.leaves(*requires), inputs.leaves(*requires, dtype=torch.double)
    plains = [inputs.leaves(*requires) for _ in range(ORDERS)]
    out = fused(ours, entropy=True, memory="auto" if memory == "frozen head" else memory, backend=backend, **options)
    plain_outs = [dense(x.reordered(seed), upcast=torch.float32, **options) for seed, x in enumerate(plains)]
    truth_out = dense(truth, **options)
    p = truth_out[0][inputs.targets != IGNORE].exp()
    assert (p > 0.999).sum() > 10
    assert (p < 1e-12).sum() > 10
    for outputs in (out, *plain_outs, truth_out):
        pull(outputs, grads)
    for name, got, plain, want in zip(("logps", "entropy"), out, zip(*plain_outs, strict=True), truth_out, strict=True):
        assert_no_worse(got, plain, want, name=name)
    for name in requires:
        assert_no_worse(ours.grads()[name], [x.grads()[name] for x in plains], truth.grads()[name], name=f"d {name}")


# The contract at the edges.


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("memory", ["store", "recompute", "frozen head"])
def test_ignored_rows_are_exactly_zero_whatever_they_hold(backend, garbage, memory, small_chunks):
    clean = gaussian(11, 8, 37)
    ignored = clean.targets == IGNORE
    requires = ("hidden",) if memory == "frozen head" else EVERYTHING
    paths = {"entropy": True, "memory": "auto" if memory == "frozen head" else memory, "backend": backend}
    grads = torch.randn(2, 11, dtype=torch.float64)
    results = []
    for fill in (0.0, garbage):
        inputs = clean.leaves(*requires)
        inputs.hidden.data[ignored] = fill
        out = fused(inputs, **paths)
        pull(out, grads)
        results.append([*(t.detach() for t in out), *(g for g in inputs.grads().values() if g is not None)])
    for without, with_garbage in zip(*results, strict=True):
        torch.testing.assert_close(with_garbage, without, rtol=0, atol=0)
    logps, entropy, grad_hidden = results[1][:3]
    for tensor in (logps, entropy, grad_hidden):
        assert (tensor[ignored] == 0).all()


@pytest.mark.parametrize("masked", [(0, 36), (0, 20), (5, 6), (20, 37)], ids=["all but one", "first", "one", "last"])
@pytest.mark.parametrize("memory", ["store", "recompute"])
def test_a_masked_vocabulary_equals_a_smaller_one(backend, masked, memory, small_chunks):
    inputs = gaussian(11, 8, 37)
    live = torch.ones(37, dtype=torch.bool)
    live[slice(*masked)] = False
    positions = torch.randint(int(live.sum()), (11,))
    inputs.targets, inputs.bias[~live] = live.nonzero().squeeze(-1)[positions], -math.inf
    ours = inputs.leaves(*EVERYTHING)
    theirs = Inputs(inputs.hidden, inputs.weight[live], positions, inputs.bias[live]).leaves(*EVERYTHING)
    outputs, expected = fused(ours, entropy=True, memory=memory, backend=backend)[:2], dense(theirs)
    grads = upstream((11,))
    pull(outputs, grads)
    pull(expected, grads)
    for got, want in zip(outputs, expected, strict=True):
        assert_exact(got, want)
    assert_exact(ours.hidden.grad, theirs.hidden.grad)
    for name in ("weight", "bias"):
        got, want = ours.grads()[name], theirs.grads()[name]
        assert_exact(got[live], want)
        assert (got[~live] == 0).all()


@pytest.mark.parametrize("requires", [EVERYTHING, ("hidden",)], ids=["trainable head", "frozen head"])
@pytest.mark.parametrize("memory", ["store", "recompute"])
def test_a_masked_target_has_logp_minus_infinity_and_a_finite_gradient(backend, requires, memory):
    inputs = gaussian(4, 8, 37, ignored=False)
    inputs.targets[:] = 5
    inputs.bias[5] = -math.inf
    ours = inputs.leaves(*requires)
    out = fused(ours, entropy=True, memory=memory, backend=backend)
    assert (out.logps == -math.inf).all()
    p = (inputs.hidden @ inputs.weight.T + inputs.bias).softmax(-1)
    assert_exact(out.entropy, torch.special.entr(p).sum(-1))
    out.logps.sum().backward()
    dz = torch.nn.functional.one_hot(inputs.targets, 37) - p
    assert_exact(ours.hidden.grad, dz @ inputs.weight)
    if "weight" in requires:
        assert_exact(ours.weight.grad, dz.T @ inputs.hidden)
        assert_exact(ours.bias.grad, dz.sum(0))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_stays_alone(backend, poison, small_chunks):
    clean = gaussian(11, 8, 37, bias=False, ignored=False)
    broken = clean.leaves()
    broken.hidden[4] = poison  # +-inf logits of both signs
    others = torch.arange(11) != 4
    for requires in (("hidden",), ("hidden", "weight")):
        results = []
        for inputs in (clean.leaves(*requires), broken.leaves(*requires)):
            out = fused(inputs, entropy=True, backend=backend)
            pull(out, torch.ones(2, 11, dtype=torch.float64))
            results.append((out.logps.detach(), out.entropy.detach(), inputs.hidden.grad))
        for want, got in zip(*results, strict=True):
            assert got[4].isnan().all()
            torch.testing.assert_close(got[others], want[others], rtol=0, atol=0)


@pytest.mark.parametrize("fill", [-math.inf, math.inf, math.nan])
def test_a_head_bias_that_breaks_every_logit_gives_nan(backend, fill):
    inputs = gaussian(4, 8, 37, ignored=False)
    inputs.bias[:] = fill
    out = fused(inputs, entropy=True, backend=backend)
    assert out.logps.isnan().all()
    assert out.entropy.isnan().all()


def test_a_broken_row_without_upstream_gradient_reaches_no_weight(backend, small_chunks):
    inputs = gaussian(11, 8, 37, ignored=False)
    inputs.hidden[4] = math.nan
    grads = upstream((11,))
    grads[:, 4] = 0
    others = torch.arange(11) != 4
    for memory in ("store", "recompute"):
        ours = inputs.leaves(*EVERYTHING)
        theirs = Inputs(inputs.hidden[others], inputs.weight, inputs.targets[others], inputs.bias).leaves(*EVERYTHING)
        pull(fused(ours, entropy=True, memory=memory, backend=backend), grads)
        pull(dense(theirs), grads[:, others])
        assert (ours.hidden.grad[4] == 0).all()
        assert_exact(ours.hidden.grad[others], theirs.hidden.grad)
        assert_exact(ours.weight.grad, theirs.weight.grad)
        assert_exact(ours.bias.grad, theirs.bias.grad)


def test_a_broken_row_without_upstream_gradient_is_zero_with_a_frozen_head(backend):
    for fill, row in ((math.nan, 4), (math.inf, 7)):
        ours = gaussian(11, 8, 37, ignored=False).leaves("hidden")
        ours.hidden.data[row] = fill
        grads = upstream((11,))
        grads[:, row] = 0
        pull(fused(ours, entropy=True, backend=backend), grads)
        assert (ours.hidden.grad[row] == 0).all()
        assert ours.hidden.grad.isfinite().all()


@pytest.mark.parametrize("memory", ["store", "recompute"])
def test_all_rows_ignored_gives_zeros_and_zero_gradients(backend, memory):
    inputs = gaussian(6, 8, 37)
    inputs.targets[:] = IGNORE
    ours = inputs.leaves(*EVERYTHING)
    out = fused(ours, entropy=True, memory=memory, backend=backend)
    pull(out, torch.ones(2, 6))
    for tensor in (*out[:2], *ours.grads().values()):
        assert (tensor == 0).all()


@pytest.mark.parametrize("target", [-1, 37, -99, 2**40])
def test_an_id_outside_the_vocabulary_raises_and_names_the_row(backend, target):
    inputs = gaussian(6, 8, 37, ignored=False)
    inputs.targets[4] = target
    with pytest.raises(IndexError, match=rf"got {target} at row 4"):
        fused(inputs, backend=backend)


def test_an_ignored_id_outside_the_vocabulary_is_never_read(backend, small_chunks):
    inputs = gaussian(11, 8, 37, ignored=False)
    inputs.targets[2] = 2**40
    compare_with_dense(inputs, EVERYTHING, {"ignore_index": 2**40}, entropy=True, backend=backend)


@pytest.mark.parametrize("memory", ["store", "recompute", "frozen head"])
@pytest.mark.parametrize("size", [1e4, 1.7e38])
def test_huge_logits_stay_exact(backend, size, memory):
    # one hidden state of 1, so that the head's rows are the logits
    logits = torch.tensor([size, -size, 0.0, size], dtype=torch.float32)
    weight = logits[:, None].clone().requires_grad_(memory != "frozen head")
    hidden = torch.ones(4, 1, requires_grad=True)
    out = linear_logprob(
        hidden, weight, torch.arange(4), entropy=True, memory="auto" if memory == "frozen head" else memory,
        backend=backend,
    )  # fmt: skip
    expected = torch.tensor([0.0, -2 * size, -size, 0.0]) - math.log(2)
    torch.testing.assert_close(out.logps, expected)
    torch.testing.assert_close(out.entropy, torch.full((4,), math.log(2)))
    out.logps.sum().backward()
    if memory != "frozen head":
        torch.testing.assert_close(weight.grad, torch.tensor([[-1.0], [1.0], [1.0], [-1.0]]))
    torch.testing.assert_close(hidden.grad, torch.tensor([[0.0], [-2 * size], [-size], [0.0]]))


def test_softcap_keeps_the_gradient_of_a_target_whose_probability_underflows(backend):
    inputs = Inputs(torch.ones(1, 1), torch.tensor([[1.0], [-0.5]]) * 40, torch.tensor([1]))
    results = {}
    for dtype in (torch.float16, torch.float64):
        ours = inputs.leaves("hidden", "weight", dtype=dtype)
        fused(ours, softcap=30.0, memory="store", backend=backend).logps.sum().backward()
        results[dtype] = ours.weight.grad.double()
    assert results[torch.float64][1] > 0.5
    torch.testing.assert_close(results[torch.float16], results[torch.float64], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("memory", ["store", "recompute", "frozen head"])
def test_backward_twice_doubles_the_gradient(backend, memory, small_chunks):
    inputs = gaussian(11, 8, 37).leaves(*(("hidden",) if memory == "frozen head" else EVERYTHING))
    out = fused(inputs, entropy=True, memory="auto" if memory == "frozen head" else memory, backend=backend)
    loss = (out.logps * 3 + out.entropy).sum()
    loss.backward(retain_graph=True)
    once = {name: None if g is None else g.clone() for name, g in inputs.grads().items()}
    loss.backward()
    for name, grad in inputs.grads().items():
        if grad is not None:
            torch.testing.assert_close(grad, 2 * once[name], rtol=0, atol=0)


@pytest.mark.parametrize("memory", ["store", "recompute", "frozen head"])
def test_double_backward_raises(backend, memory):
    inputs = gaussian(4, 8, 37).leaves(*(("hidden",) if memory == "frozen head" else EVERYTHING))
    out = fused(inputs, memory="auto" if memory == "frozen head" else memory, backend=backend)
    upstream_grad = torch.ones(4, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(out.logps, inputs.hidden, upstream_grad, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^linear_logprob: expected a first derivative, .* no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("memory", ["store", "recompute"])
def test_inputs_are_never_overwritten(backend, memory, small_chunks):
    inputs = gaussian(11, 8, 37)
    temperature = torch.rand(11, dtype=torch.float64) + 0.5
    ours = inputs.leaves(*EVERYTHING)
    before = [t.clone() for t in (ours.hidden, ours.weight, ours.bias, ours.targets, temperature)]
    grads = upstream((11,))
    grads_before = grads.clone()
    pull(fused(ours, temperature=temperature, softcap=3.0, entropy=True, memory=memory, backend=backend), grads)
    for old, new in zip(before, (ours.hidden, ours.weight, ours.bias, ours.targets, temperature), strict=True):
        assert torch.equal(old, new)
    assert torch.equal(grads, grads_before)


def test_no_grad_keeps_nothing_and_gives_the_same_values(backend):
    inputs = gaussian(11, 8, 37).leaves(*EVERYTHING)
    with torch.no_grad():
        quiet = fused(inputs, entropy=True, backend=backend)
    loud = fused(inputs, entropy=True, backend=backend)
    assert not quiet.logps.requires_grad
    for a, b in zip(quiet[:2], loud[:2], strict=True):
        assert_exact(a, b.detach())


def test_results_are_float32_for_16_bit_inputs(backend):
    inputs = peaked(64, 16, 33, torch.bfloat16).leaves(*EVERYTHING)
    out = fused(inputs, entropy=True, backend=backend)
    assert out.logps.dtype == out.entropy.dtype == torch.float32
    pull(out, torch.ones(2, 64))
    assert {g.dtype for g in inputs.grads().values()} == {torch.bfloat16}


# Properties.


@settings(max_examples=30, deadline=None)
@given(
    backend=st.sampled_from(BACKENDS),
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 9),
    vocabulary=st.integers(1, 70),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_logps_are_never_positive_and_entropy_is_between_zero_and_log_v(backend, seed, rows, vocabulary, scale, dtype):
    torch.manual_seed(seed)
    inputs = gaussian(rows, 4, vocabulary, ignored=False, dtype=torch.float32)
    out = linear_logprob(
        inputs.hidden.to(dtype), (inputs.weight * scale).to(dtype), inputs.targets, entropy=True, backend=backend
    )
    assert (out.logps <= 0).all()
    assert (out.entropy >= 0).all()
    assert (out.entropy <= math.log(vocabulary) * (1 + 4 * torch.finfo(torch.float32).eps) + 1e-6).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 12), per_chunk=st.integers(1, 13), tile=st.integers(1, 40))
def test_chunks_and_row_order_change_no_result(seed, rows, per_chunk, tile):
    torch.manual_seed(seed)
    inputs = gaussian(rows, 5, 37, dtype=torch.float32)
    grads, order = torch.randn(2, rows), torch.randperm(rows)

    def run(inputs, grads):
        inputs = inputs.leaves(*EVERYTHING)
        out = fused(inputs, entropy=True, memory="recompute", backend="chunked")
        pull(out, grads)
        return (*(t.detach() for t in out), inputs.hidden.grad), (inputs.weight.grad, inputs.bias.grad)

    by_row, by_head = run(inputs, grads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "CHUNK_BYTES", per_chunk * 37 * 4)
        patch.setattr(chunked, "VOCABULARY_TILE", tile)
        shuffled = Inputs(inputs.hidden[order], inputs.weight, inputs.targets[order], inputs.bias)
        shuffled_by_row, shuffled_by_head = run(shuffled, grads[:, order])
    for a, b in zip((*(t[order] for t in by_row), *by_head), (*shuffled_by_row, *shuffled_by_head), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# What is kept for backward.


@pytest.mark.parametrize(
    ("memory", "requires", "expected"),
    [
        ("auto", (), "none"),
        ("store", (), "none"),
        ("auto", ("hidden",), "frozen"),
        ("recompute", ("hidden",), "frozen"),
        ("auto", ("weight",), "store"),
        ("auto", ("bias",), "store"),
        ("store", EVERYTHING, "store"),
        ("recompute", EVERYTHING, "recompute"),
        (11 * 37 * 8, EVERYTHING, "store"),
        (11 * 37 * 8 - 1, EVERYTHING, "recompute"),
        (0, EVERYTHING, "recompute"),
    ],
)
def test_what_is_kept_follows_the_budget(memory, requires, expected):
    inputs = gaussian(11, 8, 37).leaves(*requires)
    head = module.check_head("op", inputs.hidden, inputs.weight, inputs.targets, inputs.bias, 1.0, None, 1.0, IGNORE)
    assert module.choose_save("op", head, memory, entropy=False, backend="chunked") == expected
    with torch.no_grad():
        assert module.choose_save("op", head, memory, entropy=False, backend="chunked") == "none"


@pytest.mark.parametrize(("value", "expected"), [("0", 0), ("12345", 12345), ("", 256 << 20)])
def test_the_environment_sets_the_budget(monkeypatch, value, expected):
    monkeypatch.setenv("FASTRL_KEEP_BYTES", value)
    assert module.keep_budget(torch.device("cpu")) == expected


# The door.

WRONG = {
    "hidden an integer": ({"hidden": torch.ones(4, 8, dtype=torch.int64)}, TypeError, "hidden: expected a floating"),
    "hidden of 8 bits": ({"hidden": torch.ones(4, 8).to(torch.float8_e4m3fn)}, TypeError, "hidden: expected a float"),
    "hidden without dimensions": ({"hidden": torch.tensor(1.0)}, ValueError, "hidden: expected shape"),
    "logits for hidden": ({"hidden": torch.ones(4, 37)}, ValueError, "hidden: expected last dimension 8"),
    "weight of three dimensions": ({"weight": torch.ones(1, 37, 8)}, ValueError, "weight: expected shape"),
    "weight without rows": ({"weight": torch.ones(0, 8)}, ValueError, "weight: expected at least one row"),
    "weight of another dtype": ({"weight": torch.ones(37, 8).double()}, TypeError, "weight: expected dtype"),
    "weight on another device": ({"weight": torch.ones(37, 8, device="meta")}, ValueError, "weight: expected device"),
    "bias of another length": ({"bias": torch.ones(36)}, ValueError, "bias: expected shape"),
    "bias of another dtype": ({"bias": torch.ones(37).half()}, TypeError, "bias: expected dtype"),
    "targets of another shape": ({"targets": torch.ones(5, dtype=torch.int64)}, ValueError, "targets: expected shape"),
    "targets not integers": ({"targets": torch.ones(4)}, TypeError, "targets: expected an int64"),
    "temperature zero": ({"temperature": 0.0}, ValueError, "temperature: expected a positive"),
    "temperature infinite": ({"temperature": math.inf}, ValueError, "temperature: expected a positive"),
    "temperature of a tensor, zero": ({"temperature": torch.tensor(0.0)}, ValueError, "temperature: .* got 0"),
    "temperature of a row, negative": ({"temperature": torch.tensor([1.0, 1, -2, 1])}, ValueError, "temperature.*-2"),
    "temperature of a row, NaN": ({"temperature": torch.tensor([1.0, 1, 1, math.nan])}, ValueError, "temperature.*nan"),
    "scale NaN": ({"logit_scale": math.nan}, ValueError, "logit_scale: expected a finite number, got nan"),
    "temperature of another shape": ({"temperature": torch.ones(3)}, ValueError, "temperature: expected shape"),
    "softcap zero": ({"softcap": 0.0}, ValueError, "softcap: expected a positive"),
    "softcap infinite": ({"softcap": math.inf}, ValueError, "softcap: expected a positive, finite"),
    "memory misspelt": ({"memory": "stoer"}, ValueError, "Did you mean 'store'"),
    "memory negative": ({"memory": -1}, ValueError, "memory: expected a byte budget"),
    "memory not a number of bytes": ({"memory": None}, ValueError, "memory: expected a byte budget"),
    "backend misspelt": ({"backend": "refrence"}, ValueError, "Did you mean 'reference'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_is_refused_by_name(case):
    changes, error, message = WRONG[case]
    good = {"hidden": torch.ones(4, 8), "weight": torch.ones(37, 8), "targets": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(error, match=message):
        linear_logprob(**(good | changes))


@pytest.mark.parametrize(("old", "new"), [("keep", "store"), ("stream", "recompute")])
def test_an_older_name_of_memory_is_taken_with_a_warning(old, new):
    results, given = [], gaussian(4, 8, 37)
    for memory in (old, new):
        inputs = given.leaves(*EVERYTHING)
        warns = (
            pytest.warns(DeprecationWarning, match=f"'{old}' is called '{new}' now") if memory == old else nullcontext()
        )
        with warns:
            out = linear_logprob(inputs.hidden, inputs.weight, inputs.targets, bias=inputs.bias, memory=memory)
        out.logps.sum().backward()
        results.append((out.logps, inputs.weight.grad))
    assert all(map(torch.equal, *results))


def test_the_temperature_of_a_token_without_a_target_is_not_read(backend):
    inputs = gaussian(4, 8, 37)
    targets = inputs.targets.masked_fill(torch.tensor([False, True, False, True]), IGNORE)
    temperature = torch.tensor([0.5, 0.0, 2.0, math.nan], dtype=torch.float64)
    with_any, with_ones = (
        linear_logprob(inputs.hidden, inputs.weight, targets, temperature=t, entropy=True, backend=backend)
        for t in (temperature, torch.tensor([0.5, 1.0, 2.0, 1.0], dtype=torch.float64))
    )
    assert torch.equal(with_any.logps, with_ones.logps)
    assert torch.equal(with_any.entropy, with_ones.entropy)


# What else is asked of the same pass.


def summaries_of(logits, targets):
    """log sum p^2, mean logit and whether the target is the first argmax, of finished logits."""
    log_p = logits.log_softmax(-1)
    return torch.logsumexp(2 * log_p, -1), logits.mean(-1), logits.argmax(-1) == targets


ASKED = {"log_sum_sq_probs": True, "mean_logits": True, "is_top1": True}


@pytest.mark.parametrize("memory", ["auto", "store", "recompute"])
@pytest.mark.parametrize("trainable", ["nothing", "hidden", "everything"])
@pytest.mark.parametrize("options", ["no options", "all"])
def test_the_other_outputs_equal_their_definitions(backend, options, trainable, memory, small_chunks):
    requires = {"nothing": (), "hidden": ("hidden",), "everything": EVERYTHING}[trainable]
    inputs = gaussian(11, 8, 37).leaves(*requires)
    given = OPTIONS[options](11)
    best = finished(inputs, **given).argmax(-1)
    targets = torch.where(torch.arange(11) % 2 == 0, best, inputs.targets)  # so that some are the argmax
    targets[3] = IGNORE
    inputs.targets = targets
    out = fused(inputs, **given, **ASKED, entropy=True, memory=memory, backend=backend)
    expected = summaries_of(finished(inputs, **given), targets)
    for got, want in zip(out[2:4], expected[:2], strict=True):
        assert not got.requires_grad
        assert_exact(got, want.detach().masked_fill(targets == IGNORE, 0))
    assert out.is_top1.dtype == torch.bool
    assert torch.equal(out.is_top1, expected[2] & (targets != IGNORE))
    assert out.is_top1.any()
    assert not out.is_top1.all()


def finished(inputs, temperature=1.0, softcap=None, logit_scale=1.0):
    """The logits of which the softmax is taken."""
    z = (inputs.hidden @ inputs.weight.T + (0 if inputs.bias is None else inputs.bias)) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return z / (temperature.unsqueeze(-1) if isinstance(temperature, torch.Tensor) else temperature)


def test_what_was_not_asked_for_is_none_and_the_rest_is_bitwise_the_same(backend):
    inputs = gaussian(5, 8, 37)
    without, with_all = (
        fused(inputs, entropy=True, backend=backend),
        fused(inputs, entropy=True, **ASKED, backend=backend),
    )
    assert without._fields == ("logps", "entropy")
    assert torch.equal(without.logps, with_all.logps)
    assert torch.equal(without.entropy, with_all.entropy)
    for name in ASKED:
        out = fused(inputs, **{name: True}, backend=backend)
        assert torch.equal(getattr(out, name), getattr(with_all, name))
        assert sum(one is not None for one in out) == 2


def test_of_equal_largest_logits_the_first_is_the_top_one(backend):
    hidden, weight = torch.ones(3, 2, dtype=torch.float64), torch.zeros(9000, 2, dtype=torch.float64)
    weight[[5, 6, 8500]] = 1
    out = linear_logprob(hidden, weight, torch.tensor([5, 6, 8500]), is_top1=True, backend=backend)
    assert out.is_top1.tolist() == [True, False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_other_outputs_are_no_worse_than_plain_torch_over_a_whole_vocabulary(backend, dtype):
    inputs = gaussian(9, 64, 50257, dtype=dtype, bias=False, ignored=False)
    out = fused(inputs, **ASKED, backend=backend)
    truth = summaries_of(inputs.hidden.double() @ inputs.weight.double().T, inputs.targets)
    plain = summaries_of((inputs.hidden @ inputs.weight.T).float(), inputs.targets)
    assert_no_worse(out.log_sum_sq_probs, plain[0], truth[0], name="log_sum_sq_probs")
    assert_no_worse(out.mean_logits, plain[1], truth[1], name="mean_logits")


def test_a_row_that_is_not_finite_is_no_top_one_and_spoils_no_other(backend):
    inputs = gaussian(4, 8, 37, ignored=False)
    inputs.hidden[1] = math.nan
    out = fused(inputs, **ASKED, backend=backend)
    assert not out.is_top1[1]
    assert out.log_sum_sq_probs[1].isnan()
    assert out.mean_logits[1].isnan()
    keep = torch.tensor([0, 2, 3])
    assert out.log_sum_sq_probs[keep].isfinite().all()
    assert out.mean_logits[keep].isfinite().all()


# torch.library and torch.compile.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("save", ["recompute", "store"])
def test_gradients_are_rounded_once_from_the_accumulated_sums(backend, save, dtype):
    inputs = gaussian(70, 65, 131, dtype=dtype)
    head = (inputs.hidden, inputs.weight, inputs.targets, inputs.bias, torch.full((1,), 0.7))
    *saved, _ = module._op(*head, 0.0, 1.0, IGNORE, False, save, False, backend)
    args = (torch.randn(70), None, *head, *saved, 0.0, 1.0, IGNORE, save, True, True, True)
    wide, rounded = (module.backward_op(*args, narrow, backend) for narrow in (False, True))
    for w, r in zip(wide, rounded, strict=True):
        assert (w.dtype, r.dtype) == (torch.float32, dtype)
        assert torch.equal(r, w.to(dtype))


@pytest.mark.parametrize("save", ["none", "recompute", "store", "frozen"])
@pytest.mark.parametrize("layout", ["contiguous", "column-major"])
def test_operators_pass_opcheck(backend, save, layout):
    requires = {"none": (), "frozen": ("hidden",)}.get(save, EVERYTHING)
    inputs = gaussian(4, 3, 5, dtype=torch.float32).leaves(*requires)
    hidden = inputs.hidden
    if layout == "column-major":
        hidden = hidden.detach().T.contiguous().T.requires_grad_(hidden.requires_grad)
    head = (hidden, inputs.weight, inputs.targets, inputs.bias, torch.ones(1))
    torch.library.opcheck(module._op, (*head, 3.0, 0.5, IGNORE, True, save, True, backend))
    if save != "none":
        with torch.no_grad():
            *outputs, _ = module._op(*head, 3.0, 0.5, IGNORE, True, save, True, backend)
        plain = tuple(t.detach() for t in head)
        needs = (True, save != "frozen", save != "frozen")
        for rounded in (False, True):
            args = (torch.randn(4), torch.randn(4), *plain, *outputs, 3.0, 0.5, IGNORE, save, *needs, rounded, backend)
            torch.library.opcheck(module.backward_op, args)


@pytest.mark.parametrize(
    "requires", [EVERYTHING, ("hidden",), ()], ids=["trainable head", "frozen head", "no gradient"]
)
def test_compiles_without_a_graph_break(requires):
    def step(hidden, weight, bias, targets, temperature):
        out = linear_logprob(hidden * 2, weight, targets, bias=bias, temperature=temperature, entropy=True)
        return out.logps * 3 + out.entropy

    results = []
    torch._dynamo.reset()
    base = gaussian(7, 8, 37)
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        inputs = base.leaves(*requires)
        out = function(inputs.hidden, inputs.weight, inputs.bias, inputs.targets, 0.7)
        if requires:
            out.sum().backward()
        results.append([out.detach(), *(g for g in inputs.grads().values() if g is not None)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=0)


def test_sixteen_bit_entropy_is_recomputed_unless_keep_is_asked_for():
    def save(dtype, memory, entropy):
        weight = torch.randn(5, 3, dtype=dtype).requires_grad_()
        hidden, targets = torch.randn(2, 3, dtype=dtype), torch.tensor([1, 2])
        head = module.check_head("op", hidden, weight, targets, None, 1.0, None, 1.0, IGNORE)
        return module.choose_save("op", head, memory, entropy=entropy, backend="chunked")

    assert save(torch.bfloat16, "auto", True) == "recompute"
    assert save(torch.bfloat16, "store", True) == "store"
    assert save(torch.bfloat16, "auto", False) == "store"
    assert save(torch.float32, "auto", True) == "store"


def test_autocast_takes_float32_weights_as_a_linear_layer_does(backend):
    hidden, weight = torch.randn(7, 8), torch.randn(11, 8)
    targets = torch.randint(0, 11, (7,))
    results = []
    for cast in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            ours = (h, w) if cast else (h.bfloat16(), w.bfloat16())
            logps = linear_logprob(*ours, targets, backend=backend).logps
        logps.sum().backward()
        assert (h.grad.dtype, w.grad.dtype) == (torch.float32, torch.float32)
        results.append((logps.detach(), h.grad, w.grad))
    for with_autocast, by_hand in zip(*results, strict=True):
        assert torch.equal(with_autocast, by_hand)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_native_gradients_of_more_tokens_than_a_block_has_entries_are_no_worse_than_plain_torch(native_isa, dtype):
    """With AVX-512 the product for d hidden takes 192 tokens at once, in scratch that had room for a block's 120: the
    rest was written behind its end, which ended the process, or an address sanitizer's run."""
    inputs = gaussian(260, 70, 300, ignored=False, dtype=dtype)
    ours, truth = inputs.leaves("hidden", "weight"), inputs.leaves("hidden", "weight", dtype=torch.double)
    plains = [inputs.leaves("hidden", "weight") for _ in range(ORDERS)]
    out, grads = fused(ours, backend="cpu"), upstream(inputs.targets.shape)[:1]
    pull(out[:1], grads)
    pull(dense(truth)[:1], grads)
    for seed, plain in enumerate(plains):
        pull(dense(plain.reordered(seed), upcast=torch.float32)[:1], grads)
    for name in ("hidden", "weight"):
        assert_no_worse(ours.grads()[name], [x.grads()[name] for x in plains], truth.grads()[name], name=f"d {name}")


def test_native_bits_depend_neither_on_threads_nor_on_the_other_rows(native_isa):
    inputs = gaussian(70, 33, 1003, dtype=torch.float32)

    def run(rows):
        part = Inputs(inputs.hidden[rows], inputs.weight, inputs.targets[rows], inputs.bias).leaves("hidden", "weight")
        out = fused(part, entropy=True, backend="cpu")
        (out.logps.sum() + out.entropy.sum()).backward()
        return out.logps.detach(), out.entropy.detach(), part.hidden.grad, part.weight.grad

    every = slice(0, 70)
    whole = with_threads(1, lambda: run(every))
    for one, two in zip(whole, with_threads(2, lambda: run(every)), strict=True):
        assert torch.equal(one, two)
    alone = with_threads(1, lambda: run(slice(40, 47)))
    for among_others, by_itself in zip(whole[:3], alone[:3], strict=True):
        assert torch.equal(among_others[40:47], by_itself)


# Triton without a gradient: one kernel multiplies and keeps statistics of parts of the vocabulary.


@pytest.fixture(params=[False, True], ids=["triton", "triton-specialized"])
def inside_the_matmul(request, monkeypatch):
    """Triton never stores a logit here, and splits a vocabulary into no more than two parts."""
    from fastrl.kernels.linear_logprob import triton_impl  # imported by those who run it: it imports Triton

    if request.param and (name := tuning.architecture(torch.device(DEVICE))) not in (None, *tuning.SPECIALIZES):
        pytest.skip(f"Triton specializes no warps of this kernel on {name}")
    monkeypatch.delattr(triton_impl, "forward_in_chunks")
    with ExitStack() as stack:
        for entry, changes in tuning.SPECIALIZED.items():
            changes = {"PARTS": 2} | (changes if request.param else {})  # of two tiles or more each
            stack.enter_context(tuning.trying(entry, **changes))
        yield


def without_gradient(inputs: Inputs, backend: str, **options):
    with torch.no_grad():
        return fused(inputs, entropy=True, backend=backend, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_statistics_inside_the_matmul_equal_those_of_stored_logits(inside_the_matmul, option, dtype):
    options = OPTIONS[option](140)
    inputs = gaussian(140, 80, 300, ignored="ignore_index" not in options).leaves(dtype=dtype)
    inputs.targets[2] = 0
    inputs.hidden[inputs.targets == options.get("ignore_index", IGNORE)] = math.nan
    for got, want in zip(*(without_gradient(inputs, name, **options) for name in ("triton", "chunked")), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_statistics_inside_the_matmul_pass_over_masked_and_report_broken_vocabulary(inside_the_matmul):
    inputs = gaussian(5, 16, 300, ignored=False).leaves(dtype=torch.bfloat16)
    inputs.bias[:256] = -math.inf  # whole tiles and whole parts
    inputs.targets[:] = torch.tensor([256, 299, 280, 3, 270])
    inputs.hidden[4] = math.nan
    results = [without_gradient(inputs, name) for name in ("triton", "chunked")]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert results[0].logps[3] == -math.inf
    assert results[0].logps[4].isnan()
    assert results[0].entropy[:4].isfinite().all()


def test_statistics_inside_the_matmul_depend_on_no_other_row(inside_the_matmul):
    inputs = gaussian(140, 48, 300).leaves(dtype=torch.bfloat16)
    if DEVICE == "cpu":
        # Triton's interpreter multiplies tiles with numpy's BLAS, which may round a row by its place in the tile or in
        # memory. Products of quarters are summed without rounding.
        for tensor in (inputs.hidden, inputs.weight):
            tensor.mul_(4).round_().div_(4)
    whole = without_gradient(inputs, "triton")
    part = Inputs(inputs.hidden[97:105], inputs.weight, inputs.targets[97:105], inputs.bias)
    for among_others, alone in zip(whole, without_gradient(part, "triton"), strict=True):
        assert torch.equal(among_others[97:105], alone)


@pytest.mark.parametrize("live", [(), (300,), range(299), range(300)], ids=len)
def test_statistics_inside_the_matmul_of_any_number_of_rows(inside_the_matmul, live):
    """The number of programs is that of all 301 rows: those without a live row write nothing."""
    inputs = gaussian(301, 16, 40, ignored=False).leaves(dtype=torch.bfloat16)
    inputs.targets[[i for i in range(301) if i not in live]] = IGNORE
    results = [without_gradient(inputs, name) for name in ("triton", "chunked")]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert (got[inputs.targets == IGNORE] == 0).all()


@pytest.mark.skipif(DEVICE != "cpu", reason="the order of sums is the compiler's")
@pytest.mark.parametrize(
    ("options", "writes"),
    [({}, [True, False]), ({"temperature": 0.7}, [False, True]), (OPTIONS["all"](140), [True])],
    ids=["temperature 1", "another", "one per row"],
)
def test_specialized_warps_give_the_bits_of_the_same_tile_without(monkeypatch, options, writes):
    """A descriptor loads what pointers do; of the kernels for a temperature of 1 and for others one writes."""
    from fastrl.kernels.linear_logprob import triton_impl

    wrote = []

    def noted(kernel, programs, like, **arguments):
        before = arguments["parts_ptr"].clone()
        launch(kernel, programs, like, **arguments)
        if arguments.get("WARP_SPECIALIZE"):
            wrote.append(not torch.equal(arguments["parts_ptr"].view(torch.int32), before.view(torch.int32)))

    monkeypatch.setattr(triton_impl, "launch", noted)
    inputs = gaussian(140, 80, 300).leaves(dtype=torch.bfloat16)
    inputs.hidden[inputs.targets == IGNORE] = math.nan
    results = []
    for specialize in (False, True):
        with ExitStack() as stack:
            for entry, changes in tuning.SPECIALIZED.items():
                stack.enter_context(tuning.trying(entry, **changes | {"WARP_SPECIALIZE": specialize}))
            results.append(without_gradient(inputs, "triton", **options))
    assert wrote == writes
    for got, want in zip(*results, strict=True):
        assert got.abs().sum() > 0
        assert torch.equal(got, want)


def test_specialized_warps_take_a_view_that_starts_between_aligned_addresses(inside_the_matmul):
    inputs = gaussian(9, 48, 300).leaves(dtype=torch.bfloat16)
    inputs.hidden, inputs.weight = inputs.hidden[:, 3:35], inputs.weight[:, 3:35]
    assert inputs.weight.data_ptr() % 16 != 0
    for got, want in zip(*(without_gradient(inputs, name) for name in ("triton", "chunked")), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("size", "stride", "inside"), [(48, 48, True), (48, 50, True), (40, 48, False)])
def test_a_hidden_size_that_is_no_multiple_of_16_goes_through_stored_logits(monkeypatch, size, stride, inside):
    """What the kernel that multiplies copies has to be aligned; a slice of wider rows is made so."""
    from fastrl.kernels.linear_logprob import triton_impl

    chunked_runs = []
    monkeypatch.setattr(
        triton_impl, "forward_in_chunks", lambda *a, **k: chunked_runs.append(a) or chunked.forward_in_chunks(*a, **k)
    )
    inputs = gaussian(9, stride, 300).leaves(dtype=torch.bfloat16)
    inputs.hidden, inputs.weight = inputs.hidden[:, :size], inputs.weight[:, :size]
    for got, want in zip(*(without_gradient(inputs, name) for name in ("triton", "chunked")), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert len(chunked_runs) == (0 if inside else 1)
