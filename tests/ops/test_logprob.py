from __future__ import annotations

import math

import pytest
import torch
from backends import BACKENDS, DEVICE, using
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.cases import IGNORE, dense_logits, dense_logprob, peaked
from ops.threads import with_threads
from tolerance import assert_exact, assert_no_worse

from fastrl.kernels.logprob import chunked
from fastrl.ops import logprob as module
from fastrl.ops.logprob import logprob

OPTIONS = {
    "no options": lambda rows: {},
    "temperature a float": lambda rows: {"temperature": 0.7},
    "temperature 0-d": lambda rows: {"temperature": torch.tensor(1.3, dtype=torch.float64)},
    "temperature per row": lambda rows: {"temperature": torch.linspace(0.3, 2.0, rows, dtype=torch.float64)},
    "ignore_index a valid id": lambda rows: {"ignore_index": 0},
}
# (rows, vocabulary), each with its reason.
SHAPES = {
    "one of each": (1, 1),
    "a vocabulary of one": (5, 1),
    "no rows": (0, 5),
    "one row, more chunks than rows": (1, 65),
    "a vocabulary that no block size divides (GPT-2)": (5, 50257),
    "more rows than vocabulary": (131, 2),
}


@pytest.fixture
def small_chunks(monkeypatch):
    """About three rows of a vocabulary of 37 at a time."""
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 3 * 37 * 4)


def random_case(rows, vocabulary, *, ignored=True, dtype=torch.float64):
    targets = torch.randint(vocabulary, (rows,))
    if ignored:
        targets[1::5] = IGNORE
    return torch.randn(rows, vocabulary, dtype=dtype) * 3, targets


def scaled(z, temperature=1.0):
    per_row = isinstance(temperature, torch.Tensor) and temperature.dim() > 0
    return z / (temperature.unsqueeze(-1) if per_row else temperature)


def dense(z, targets, *, ignore_index=IGNORE, temperature=1.0):
    return dense_logprob(scaled(z, temperature), targets, ignore_index)


def compare_with_dense(logits, targets, options, *, backend):
    """Values and gradients in float64; `logits` may be any view, the gradient is taken by it."""
    ours, theirs = (logits.detach().requires_grad_() for _ in range(2))
    out, (logps, entropy) = (
        logprob(ours, targets, entropy=True, backend=backend, **options),
        dense(theirs, targets, **options),
    )
    assert_exact(out.logps, logps)
    assert_exact(out.entropy, entropy)
    grads = torch.randn(2, *targets.shape, dtype=torch.float64)
    grads[..., 3::4] = 0
    (got,) = torch.autograd.grad([out.logps, out.entropy], ours, list(grads))
    (want,) = torch.autograd.grad([logps, entropy], theirs, list(grads))
    assert_exact(got, want)
    (got,) = torch.autograd.grad(logprob(ours, targets, backend=backend, **options).logps, ours, grads[0])
    (want,) = torch.autograd.grad(dense(theirs, targets, **options)[0], theirs, grads[0])
    assert_exact(got, want)


# The definition.


@pytest.mark.parametrize("option", OPTIONS)
def test_equals_dense_with_every_option(backend, option, small_chunks):
    options = OPTIONS[option](11)
    logits, targets = random_case(11, 37, ignored="ignore_index" not in options)
    targets[2] = 0
    compare_with_dense(logits, targets, options, backend=backend)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_dense_at_every_shape(backend, shape, small_chunks):
    compare_with_dense(*random_case(*SHAPES[shape]), {}, backend=backend)


@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (2, 1, 3), (0, 3)], ids=str)
def test_any_leading_shape(backend, shape, small_chunks):
    logits, targets = random_case(math.prod(shape), 37)
    temperature = torch.rand(shape, dtype=torch.float64) + 0.5
    logits, targets = logits.reshape(*shape, 37), targets.reshape(shape)
    compare_with_dense(logits, targets, {"temperature": temperature}, backend=backend)
    assert logprob(logits, targets).logps.shape == shape


LAYOUTS = {
    "transposed": lambda: torch.randn(4, 3, 37, dtype=torch.float64).transpose(0, 1),
    "expanded": lambda: torch.randn(3, 1, 37, dtype=torch.float64).expand(3, 4, 37),
    "shifted by one, as from a causal model": lambda: torch.randn(3, 5, 37, dtype=torch.float64)[:, :-1],
    "every other column": lambda: torch.randn(3, 4, 75, dtype=torch.float64)[..., 1::2],
    "vocabulary first": lambda: torch.randn(37, 3, 4, dtype=torch.float64).permute(1, 2, 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(backend, layout, small_chunks):
    compare_with_dense(LAYOUTS[layout](), torch.randint(37, (4, 3)).T, {}, backend=backend)


def test_int32_targets(backend):
    logits, targets = random_case(6, 37, ignored=False)
    narrow, wide = (logprob(logits, t, backend=backend).logps for t in (targets.int(), targets))
    assert torch.equal(narrow, wide)


def test_gradcheck(backend, small_chunks):
    logits, targets = random_case(5, 7)
    temperature = torch.linspace(0.5, 2.0, 5, dtype=torch.float64)

    def op(z):
        return tuple(logprob(z, targets, temperature=temperature, entropy=True, backend=backend))

    assert torch.autograd.gradcheck(op, logits.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_no_worse_than_plain_torch_on_peaked_logits(backend, dtype, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 100 * 515 * 4)
    inputs = peaked(264, 64, 515, torch.float32)
    z, targets = dense_logits(inputs).to(dtype), inputs.targets
    ours, plain, truth = z.clone().requires_grad_(), z.clone().requires_grad_(), z.double().requires_grad_()
    grads = torch.randn(2, 264, dtype=torch.float64)
    out = logprob(ours, targets, temperature=0.7, entropy=True, backend=backend)
    plain_out, truth_out = dense(plain.float(), targets, temperature=0.7), dense(truth, targets, temperature=0.7)
    p = truth_out[0][targets != IGNORE].exp()
    assert (p > 0.999).sum() > 10
    assert (p < 1e-12).sum() > 10
    for outputs in (out, plain_out, truth_out):
        torch.autograd.backward(list(outputs), [g.to(outputs[0].dtype) for g in grads])
    for name, *values in zip(("logps", "entropy"), out, plain_out, truth_out, strict=True):
        assert_no_worse(*values, name=name)
    assert_no_worse(ours.grad, plain.grad, truth.grad, name="d logits")


# The contract at the edges.


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_ignored_rows_are_exactly_zero_whatever_they_hold(backend, garbage, small_chunks):
    logits, targets = random_case(11, 37)
    ignored = targets == IGNORE
    grads = torch.randn(2, 11, dtype=torch.float64)
    results = []
    for fill in (0.0, garbage):
        z = logits.clone()
        z[ignored] = fill
        out = logprob(z.requires_grad_(), targets, entropy=True, backend=backend)
        torch.autograd.backward(list(out), list(grads))
        results.append((out.logps.detach(), out.entropy.detach(), z.grad))
    for without, with_garbage in zip(*results, strict=True):
        assert (with_garbage[ignored] == 0).all()
        torch.testing.assert_close(with_garbage, without, rtol=0, atol=0)


@pytest.mark.parametrize("masked", [(0, 36), (0, 20), (5, 6), (20, 37)], ids=["all but one", "first", "one", "last"])
def test_a_masked_vocabulary_equals_a_smaller_one(backend, masked, small_chunks):
    logits, _ = random_case(11, 37)
    live = torch.ones(37, dtype=torch.bool)
    live[slice(*masked)] = False
    positions = torch.randint(int(live.sum()), (11,))
    ours = logits.masked_fill(~live, -math.inf).requires_grad_()
    theirs = logits[:, live].requires_grad_()
    out = logprob(ours, live.nonzero().squeeze(-1)[positions], entropy=True, backend=backend)
    expected = dense(theirs, positions)
    grads = list(torch.randn(2, 11, dtype=torch.float64))
    torch.autograd.backward(list(out), grads)
    torch.autograd.backward(list(expected), grads)
    for got, want in zip(out, expected, strict=True):
        assert_exact(got, want)
    assert_exact(ours.grad[:, live], theirs.grad)
    assert (ours.grad[:, ~live] == 0).all()


def test_a_masked_target_has_logp_minus_infinity_and_a_finite_gradient(backend):
    logits, targets = random_case(4, 37, ignored=False)
    logits[torch.arange(4), targets] = -math.inf
    z = logits.clone().requires_grad_()
    out = logprob(z, targets, entropy=True, backend=backend)
    assert (out.logps == -math.inf).all()
    assert_exact(out.entropy, torch.special.entr(logits.softmax(-1)).sum(-1))
    out.logps.sum().backward()
    assert_exact(z.grad, torch.nn.functional.one_hot(targets, 37) - logits.softmax(-1))


def one_nan(row):
    row[7] = math.nan


def one_infinity(row):
    row[7] = math.inf


def all_masked(row):
    row[:] = -math.inf


@pytest.mark.parametrize("break_row", [one_nan, one_infinity, all_masked])
def test_a_row_that_is_not_finite_stays_alone(backend, break_row, small_chunks):
    logits, targets = random_case(11, 37, ignored=False)
    broken = logits.clone()
    break_row(broken[4])
    others = torch.arange(11) != 4
    results = []
    for z in (logits.clone().requires_grad_(), broken.requires_grad_()):
        out = logprob(z, targets, entropy=True, backend=backend)
        (out.logps + out.entropy).sum().backward()
        results.append((out.logps.detach(), out.entropy.detach(), z.grad))
    for want, got in zip(*results, strict=True):
        assert got[4].isnan().any()
        torch.testing.assert_close(got[others], want[others], rtol=0, atol=0)
    assert results[1][0][4].isnan()
    assert results[1][1][4].isnan()


def test_all_rows_ignored_gives_zeros_and_zero_gradients(backend):
    logits, targets = random_case(6, 37)
    z = logits.requires_grad_()
    out = logprob(z, targets.fill_(IGNORE), entropy=True, backend=backend)
    (out.logps + out.entropy).sum().backward()
    for tensor in (*out, z.grad):
        assert (tensor == 0).all()


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU does not wait for a check: the row is NaN instead")
@pytest.mark.parametrize("target", [-1, 37, -99, 2**40])
def test_an_id_outside_the_vocabulary_raises_and_names_the_row(backend, target):
    logits, targets = random_case(6, 37, ignored=False)
    targets[4] = target
    with pytest.raises(IndexError, match=rf"got {target} at row 4"):
        logprob(logits, targets, backend=backend)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e4), (torch.float32, 1.7e38), (torch.float16, 32752.0)])
def test_huge_logits_stay_exact(backend, dtype, size):
    z = torch.tensor([[size, -size, 0.0, size]] * 4, dtype=dtype, requires_grad=True)
    out = logprob(z, torch.arange(4), entropy=True, backend=backend)
    expected = torch.tensor([0.0, -2 * size, -size, 0.0]) - math.log(2)
    torch.testing.assert_close(out.logps, expected)
    torch.testing.assert_close(out.entropy, torch.full((4,), math.log(2)))
    out.logps.sum().backward()
    torch.testing.assert_close(z.grad, torch.eye(4, dtype=dtype) - torch.tensor([0.5, 0.0, 0.0, 0.5], dtype=dtype))


def test_backward_twice_doubles_the_gradient(backend):
    logits, targets = random_case(11, 37)
    z = logits.requires_grad_()
    out = logprob(z, targets, entropy=True, backend=backend)
    loss = (out.logps * 3 + out.entropy).sum()
    loss.backward(retain_graph=True)
    once = z.grad.clone()
    loss.backward()
    assert torch.equal(z.grad, 2 * once)


def test_double_backward_raises(backend):
    logits, targets = random_case(4, 37)
    z = logits.requires_grad_()
    (grad,) = torch.autograd.grad(logprob(z, targets, backend=backend).logps.square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^logprob: expected a first derivative, .* no second derivative"):
        grad.sum().backward()


def test_backward_refuses_an_entropy_that_was_overwritten(backend):
    """It reads its own forward's: a changed one would make a wrong gradient."""
    logits, targets = random_case(4, 37)
    out = logprob(logits.requires_grad_(), targets, entropy=True, backend=backend)
    with torch.no_grad():
        out.entropy.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (out.logps + out.entropy).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_logits_are_never_overwritten(backend, dtype):
    logits, targets = random_case(11, 37, dtype=dtype)
    logits[1] = math.nan  # an ignored row
    z, before = logits.clone().requires_grad_(), logits.clone()
    out = logprob(z, targets, temperature=0.5, entropy=True, backend=backend)
    (out.logps + out.entropy).sum().backward()
    torch.testing.assert_close(z.detach(), before, rtol=0, atol=0, equal_nan=True)


# Properties.


@settings(max_examples=30, deadline=None)
@given(
    backend=st.sampled_from(BACKENDS),
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 9),
    vocabulary=st.integers(1, 70),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 3e3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_logps_are_never_positive_and_entropy_is_between_zero_and_log_v(backend, seed, rows, vocabulary, scale, dtype):
    torch.manual_seed(seed)
    logits, targets = random_case(rows, vocabulary, ignored=False, dtype=torch.float32)
    with using(backend) as name:
        out = logprob((logits * scale).to(dtype), targets, entropy=True, backend=name)
    assert (out.logps <= 0).all()
    assert (out.entropy >= 0).all()
    assert (out.entropy <= math.log(vocabulary) * (1 + 4 * torch.finfo(torch.float32).eps) + 1e-6).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 12), chunk_bytes=st.integers(1, 3000))
def test_chunks_and_row_order_change_no_bit(seed, rows, chunk_bytes):
    torch.manual_seed(seed)
    logits, targets = random_case(rows, 37, dtype=torch.float32)
    grads, order = torch.randn(2, rows), torch.randperm(rows)

    def run(logits, targets, grads):
        z = logits.clone().requires_grad_()
        out = logprob(z, targets, entropy=True, backend="chunked")
        torch.autograd.backward(list(out), list(grads))
        return out.logps.detach(), out.entropy.detach(), z.grad

    whole = run(logits, targets, grads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "CHUNK_BYTES", chunk_bytes)
        shuffled = run(logits[order], targets[order], grads[:, order])
    for a, b in zip(whole, shuffled, strict=True):
        assert torch.equal(a[order], b)


def values_and_gradient(logits, targets, grads, **options):
    z = logits.detach().clone().requires_grad_()
    out = logprob(z, targets, entropy=True, **options)
    torch.autograd.backward(list(out), list(grads))
    return out.logps.detach(), out.entropy.detach(), z.grad


LONG_ROW = 5000  # more than one block of every instruction set, and no multiple of its lanes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_neither_threads_nor_other_rows_change_a_bit_of_a_row(native_isa, dtype):
    logits, targets = random_case(11, LONG_ROW, dtype=dtype)
    logits[3] = math.nan
    grads = torch.randn(2, 11, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    whole = values_and_gradient(logits, targets, grads, backend="cpu")
    threaded = with_threads(2, lambda: values_and_gradient(logits, targets, grads, backend="cpu"))
    for want, got in zip(whole, threaded, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    for i in range(11):
        part = slice(i, i + 1)
        alone = values_and_gradient(logits[part], targets[part], grads[:, part], backend="cpu")
        for want, got in zip(whole, alone, strict=True):
            torch.testing.assert_close(got, want[part], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_other_rows_change_no_bit_of_a_row(dtype):
    logits, targets = random_case(6, LONG_ROW, dtype=dtype)
    logits[3] = math.nan
    grads = torch.randn(2, 6)
    whole = values_and_gradient(logits, targets, grads, backend="triton")
    for i in range(6):
        part = slice(i, i + 1)
        alone = values_and_gradient(logits[part], targets[part], grads[:, part], backend="triton")
        for want, got in zip(whole, alone, strict=True):
            torch.testing.assert_close(got, want[part], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_sixteen_bit_gradient_is_the_float32_one_rounded_once(native_isa, dtype):
    """From subnormal to infinite, NaN included."""
    logits, targets = random_case(40, LONG_ROW, dtype=torch.float32)
    narrow = (logits * 2).to(dtype)
    narrow[7, 5] = math.nan
    grads = torch.stack([torch.logspace(-9, 9, 40), torch.zeros(40)])
    got = values_and_gradient(narrow, targets, grads, backend="cpu")
    want = values_and_gradient(narrow.float(), targets, grads, backend="cpu")
    torch.testing.assert_close(got[2], want[2].to(dtype), rtol=0, atol=0, equal_nan=True)
    for a, b in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# The door.

WRONG = {
    "logits an integer": ({"logits": torch.ones(4, 8, dtype=torch.int64)}, TypeError, "logits: expected a floating"),
    "logits of 8 bits": ({"logits": torch.ones(4, 8).to(torch.float8_e4m3fn)}, TypeError, "logits: expected a float"),
    "logits without dimensions": ({"logits": torch.tensor(1.0)}, ValueError, "logits: expected shape"),
    "an empty vocabulary": ({"logits": torch.ones(4, 0)}, ValueError, "logits: expected shape"),
    "targets of another shape": ({"targets": torch.ones(5, dtype=torch.int64)}, ValueError, "targets: expected shape"),
    "targets not integers": ({"targets": torch.ones(4)}, TypeError, "targets: expected an int64"),
    "targets on another device": (
        {"targets": torch.ones(4, dtype=torch.int64, device="meta")},
        ValueError,
        "targets: expected device",
    ),
    "temperature negative": ({"temperature": -1.0}, ValueError, "temperature: expected a positive"),
    "temperature of another shape": ({"temperature": torch.ones(3)}, ValueError, "temperature: expected shape"),
    "backend misspelt": ({"backend": "chunkd"}, ValueError, "Did you mean 'chunked'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_is_refused_by_name(case):
    changes, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        logprob(**({"logits": torch.ones(4, 8), "targets": torch.zeros(4, dtype=torch.int64)} | changes))


# torch.library and torch.compile.


@pytest.mark.parametrize("entropy", [False, True], ids=["logps", "entropy"])
@pytest.mark.parametrize("layout", ["contiguous", "column-major"])
def test_operators_pass_opcheck(backend, layout, entropy):
    logits, targets = random_case(4, 5, dtype=torch.float32)
    if layout == "column-major":
        logits = logits.T.contiguous().T
    grads = (torch.randn(4), torch.randn(4) if entropy else None)
    _, h, lse = module._op(logits, targets, torch.ones(4), IGNORE, entropy, backend)
    torch.library.opcheck(module._backward_op, (*grads, logits, targets, torch.ones(4), h, lse, IGNORE, backend))
    leaf = logits.detach().requires_grad_()
    torch.library.opcheck(module._op, (leaf, targets, torch.ones(1), IGNORE, entropy, backend))


def test_compiles_without_a_graph_break():
    def step(z, targets, temperature):
        out = logprob(z * 2, targets, temperature=temperature, entropy=True)
        return out.logps * 3 + out.entropy

    torch._dynamo.reset()
    logits, targets = random_case(7, 37)
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        z = logits.clone().requires_grad_()
        out = function(z, targets, 0.7)
        out.sum().backward()
        results.append((out.detach(), z.grad))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(compiled, eager)


def test_inductor_takes_the_operators_as_they_are(monkeypatch, tmp_path):
    # Its cache on disk knows an operator by its name alone: what another version left there is not to be found.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def step(z, targets, temperature):  # nothing around the operator, so that nothing is compiled but its call
        return tuple(logprob(z, targets, temperature=temperature, entropy=True))

    torch._dynamo.reset()
    logits, targets = random_case(7, 37)
    logits, temperature = logits.T.contiguous().T, torch.rand(7, dtype=torch.float64) + 0.5  # column-major
    grads, results = list(torch.randn(2, 7, dtype=torch.float64)), []
    for function in (step, torch.compile(step, fullgraph=True)):
        z = logits.detach().requires_grad_()
        outputs = function(z, targets, temperature)
        torch.autograd.backward(list(outputs), grads)
        results.append((*(o.detach() for o in outputs), z.grad))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(compiled, eager)
