"""linear: the native products and their gradients against float64, and everything that stays torch's."""

from __future__ import annotations

import copy

import pytest
import torch
from backends import NATIVE, using
from ops.threads import with_threads
from tolerance import assert_no_worse
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fastrl.kernels.linear import native as products
from fastrl.ops.linear import linear, native_linear, native_lora_linear, refusal

# Rows, width, outputs: ones, less than a lane, parts of tiles in each direction, and a real layer's.
SIZES = [(1, 1, 1), (3, 5, 7), (17, 33, 29), (64, 576, 192), (130, 70, 300), (5, 40, 1536), (97, 200, 48)]
DTYPES = [torch.float32, torch.bfloat16]
on_each = pytest.mark.parametrize("backend", NATIVE)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_size = pytest.mark.parametrize("size", SIZES, ids=str)


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def layer(size, dtype):
    """x, W, b and dy."""
    rows, width, outputs = size
    return (
        draw(rows, width, dtype=dtype),
        draw(outputs, width, dtype=dtype),
        draw(outputs, dtype=dtype),
        draw(rows, outputs, dtype=dtype),
    )


def results(function, x, weight, bias, dy):
    """y, dx, dW and db."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@on_each
@each_dtype
@each_size
def test_values_and_gradients_are_no_worse_than_torchs(backend, dtype, size):
    tensors = layer(size, dtype)
    with using(backend):
        got = results(native_linear, *tensors)
    plain = results(functional.linear, *tensors)
    truth = results(functional.linear, *(t.double() for t in tensors))
    for name, *values in zip(("y", "dx", "dW", "db"), got, plain, truth, strict=True):
        assert_no_worse(*values, name=name)


@on_each
@each_dtype
def test_rows_with_gaps_between_them_and_columns_that_are_rows(backend, dtype):
    rows, width, outputs = 19, 37, 23
    wide, tall = draw(rows, 2 * width + 3, dtype=dtype), draw(width, rows, dtype=dtype)
    weights = draw(outputs, width + 5, dtype=dtype)[:, 2 : width + 2], draw(width, outputs, dtype=dtype).T
    dy, bias = draw(rows, outputs + 9, dtype=dtype)[:, 4 : outputs + 4], draw(2 * outputs, dtype=dtype)[::2]
    for x in (wide[:, 1 : width + 1], wide[:, ::2][:, :width], tall.T, wide[:1, :width].expand(rows, width)):
        for weight in weights:
            with using(backend):
                got = results(native_linear, x, weight, bias, dy)
            truth = results(functional.linear, *(t.double() for t in (x, weight, bias, dy)))
            plain = results(functional.linear, x, weight, bias, dy)
            for values in zip(got, plain, truth, strict=True):
                assert_no_worse(*values)


@on_each
@each_dtype
@pytest.mark.parametrize("size", [(17, 33, 29), (130, 70, 300)], ids=str)
def test_what_is_there_is_added_to(backend, dtype, size):
    x, weight, bias, dy = layer(size, dtype)
    with using(backend):
        y, dx, dw = products.forward(x, weight, bias), products.grad_input(dy, weight), products.grad_weight(dy, x)
        y_there, dx_there, dw_there = torch.ones_like(y), torch.ones_like(dx), torch.ones(dw.shape)
        products.forward(x, weight, bias, out=y_there)
        products.grad_input(dy, weight, out=dx_there)
        products.grad_weight(dy, x, out=dw_there)
    for got, one in ((y_there, y), (dx_there, dx)):
        torch.testing.assert_close(
            got.float(), one.float() + 1, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=1e-2
        )
    torch.testing.assert_close(dw_there, (dy.double().T @ x.double() + 1).float(), rtol=1e-5, atol=1e-4)


@on_each
@each_dtype
def test_no_bit_depends_on_threads_or_on_other_rows(backend, dtype):
    x, weight, bias, dy = layer((200, 300, 130), dtype)
    with using(backend):
        alone = results(native_linear, x, weight, bias, dy)
        for other in (2, 3, 5):
            together = with_threads(other, lambda: results(native_linear, x, weight, bias, dy))
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
        for count in (1, 7, 64):
            y = native_linear(x[:count], weight, bias)
            assert torch.equal(y, alone[0][:count])
            assert torch.equal(products.grad_input(dy[:count], weight), alone[1][:count])


@on_each
@each_dtype
def test_a_nan_stays_in_its_row(backend, dtype):
    x, weight, bias, _ = layer((33, 40, 50), dtype)
    x[7, 3], x[20, 39] = float("nan"), float("inf")
    with using(backend):
        y = native_linear(x, weight, bias)
    assert y[7].isnan().all()
    assert not y[20].isfinite().any()
    others = [row for row in range(33) if row not in (7, 20)]
    assert y[others].isfinite().all()


@on_each
@each_dtype
def test_a_gradient_goes_straight_into_main_grad_unrounded(backend, dtype):
    x, weight, _, dy = layer((130, 70, 90), dtype)
    weight = torch.nn.Parameter(weight)
    weight.main_grad = torch.ones(weight.shape)
    with using(backend):
        for _ in range(2):
            native_linear(x, weight, None).backward(dy)
    truth = 2 * dy.double().T @ x.double() + 1
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad, truth.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("place", [torch.ones(3, 4).T, torch.ones(4, 3, dtype=torch.float64), torch.ones(12), None])
def test_a_main_grad_of_another_kind_is_left_alone(place):
    weight = torch.nn.Parameter(draw(4, 3))
    weight.main_grad = place
    native_linear(draw(5, 3), weight, None).sum().backward()
    assert weight.grad is not None
    assert place is None or bool((place == 1).all())


def test_only_the_products_that_are_needed_are_computed(monkeypatch):
    called = []
    for name in ("forward", "grad_input", "grad_weight"):
        original = getattr(products, name)
        monkeypatch.setattr(products, name, lambda *a, f=original, n=name, **k: called.append(n) or f(*a, **k))
    x, weight, bias, dy = layer((9, 8, 7), torch.float32)
    for x_trains, weight_trains, wanted in (
        (True, True, ["forward", "grad_input", "grad_weight"]),
        (True, False, ["forward", "grad_input"]),
        (False, True, ["forward", "grad_weight"]),
    ):
        called.clear()
        leaves = x.clone().requires_grad_(x_trains), weight.clone().requires_grad_(weight_trains)
        native_linear(*leaves, bias).backward(dy)
        assert called == wanted
    called.clear()
    assert not native_linear(x, weight, bias).requires_grad
    assert called == ["forward"]


def test_a_frozen_layer_keeps_no_activations():
    x, weight = draw(6, 5).requires_grad_(), draw(4, 5)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        native_linear(x, weight, None)
    assert saved == [weight.shape]


@each_dtype
def test_leading_dimensions_come_back(dtype):
    x, weight = draw(2, 3, 4, 5, dtype=dtype), draw(6, 5, dtype=dtype)
    assert native_linear(x, weight, None).shape == (2, 3, 4, 6)
    assert native_linear(x[0, 0, 0], weight, None).shape == (6,)
    x = x.transpose(0, 2).requires_grad_()
    y = native_linear(x, weight, None)
    (dx,) = torch.autograd.grad(y.sum(), x)
    truth = weight.double().sum(0).expand(x.shape)
    torch.testing.assert_close(dx.double(), truth, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


@each_dtype
def test_autocast_computes_in_its_dtype_and_gives_gradients_in_the_parameters(dtype):
    x, weight, bias = draw(9, 8).requires_grad_(), draw(7, 8).requires_grad_(), draw(7).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, plain = linear(x.to(dtype), weight, bias, backend="cpu"), functional.linear(x.to(dtype), weight, bias)
    assert y.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(y, plain, rtol=2**-7, atol=2**-7)
    y.float().sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in (x, weight, bias))


def test_activation_checkpointing_gives_the_same_gradients():
    x, weight, bias, dy = layer((9, 8, 8), torch.float32)

    def twice(x, weight, bias):
        return native_linear(native_linear(x, weight, bias).relu(), weight, bias)

    plain = results(twice, x, weight, bias, dy)
    for reentrant in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        checkpoint(twice, *leaves, use_reentrant=reentrant).backward(dy)
        assert all(torch.equal(leaf.grad, want) for leaf, want in zip(leaves, plain[1:], strict=True))


def test_a_weight_changed_in_place_before_the_backward_is_refused():
    x, weight = draw(3, 4).requires_grad_(), draw(5, 4)
    y = native_linear(x, weight, None)
    weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_second_derivative_is_refused_not_zero():
    x, weight = draw(3, 4).requires_grad_(), draw(5, 4).requires_grad_()
    (dx,) = torch.autograd.grad(native_linear(x, weight, None).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="It has no second derivative"):
        dx.sum().backward()


class Tagged(torch.Tensor):
    """A tensor subclass."""


UNUSUAL = {
    "float16": (draw(3, 4).half(), draw(5, 4).half()),
    "float64": (draw(3, 4).double(), draw(5, 4).double()),
    "no rows": (draw(0, 4), draw(5, 4)),
    "no width": (draw(3, 0), draw(5, 0)),
    "a subclass": (draw(3, 4).as_subclass(Tagged), draw(5, 4)),
    "meta": (draw(3, 4).to("meta"), draw(5, 4).to("meta")),
    "complex": (draw(3, 4).to(torch.complex64), draw(5, 4).to(torch.complex64)),
    "negated by its bit": (torch.complex(draw(3, 4), draw(3, 4)).conj().imag, draw(5, 4)),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_native_does_not_take_is_torchs(name):
    x, weight = UNUSUAL[name]
    assert refusal(x, weight, None) is not None
    got, want = linear(x, weight), functional.linear(x, weight)
    assert type(got) is type(want)
    assert got.shape == want.shape
    assert got.is_meta or torch.equal(got, want)
    with pytest.raises(ValueError, match="linear: backend: expected tensors that cpu takes, got"):
        linear(x, weight, backend="cpu")


def test_torchs_own_errors_for_shapes_and_dtypes_that_do_not_fit():
    for x, weight, bias in (
        (draw(3, 4), draw(5, 6), None),
        (draw(3, 4), draw(5, 4), draw(6)),
        (draw(3, 4), draw(5, 4).bfloat16(), None),
    ):
        with pytest.raises(RuntimeError) as ours:
            linear(x, weight, bias)
        with pytest.raises(RuntimeError) as theirs:
            functional.linear(x, weight, bias)
        assert str(ours.value) == str(theirs.value)


def test_function_transforms_counters_and_the_compiler_see_torchs_product():
    x, weight = draw(3, 4), draw(5, 4)
    assert torch.equal(torch.func.vmap(lambda row: linear(row, weight))(x), functional.linear(x, weight))
    _, tangent = torch.func.jvp(lambda w: linear(x, w), (weight,), (weight,))
    torch.testing.assert_close(tangent, functional.linear(x, weight))
    with FlopCounterMode(display=False) as counter:
        linear(x, weight)
    assert counter.get_total_flops() == 2 * 3 * 4 * 5
    graphs = []
    compiled = torch.compile(
        lambda x: linear(x, weight), backend=lambda g, _: graphs.append(g) or g.forward, fullgraph=True
    )
    torch.testing.assert_close(compiled(x), functional.linear(x, weight))
    assert len(graphs) == 1


@on_each
@each_dtype
def test_an_adapter_equals_its_formula_written_out(backend, dtype):
    rows, width, outputs, rank, scaling = 70, 48, 90, 4, 1.5
    x, weight, bias, dy = layer((rows, width, outputs), dtype)
    down, up = draw(rank, width, dtype=dtype), draw(outputs, rank, dtype=dtype)

    def written_out(x, down, up, bias):
        return functional.linear(x, weight.to(x.dtype), bias) + scaling * functional.linear(
            functional.linear(x, down), up
        )

    def fused(x, down, up, bias):
        return native_lora_linear(x, weight, bias, down, up, scaling)

    def run(function, *tensors):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    with using(backend):
        got = run(fused, x, down, up, bias)
    plain = run(written_out, x, down, up, bias)
    truth = run(written_out, *(t.double() for t in (x, down, up, bias)))
    for name, *values in zip(("y", "dx", "dA", "dB", "db"), got, plain, truth, strict=True):
        assert_no_worse(*values, name=name, units=8)


def test_an_adapters_step_leaves_out_what_does_not_train(monkeypatch):
    """Of the wide products: x W^T and dy W. dW of the frozen weight is never formed."""
    shapes = []
    original = products.grad_weight
    monkeypatch.setattr(
        products,
        "grad_weight",
        lambda dy, x, out=None: shapes.append((dy.shape[1], x.shape[1])) or original(dy, x, out),
    )
    x, weight = draw(9, 8).requires_grad_(), draw(7, 8)
    down, up = draw(2, 8).requires_grad_(), draw(7, 2).requires_grad_()
    native_lora_linear(x, weight, None, down, up, 2.0).sum().backward()
    assert sorted(shapes) == [(2, 8), (7, 2)]


def test_a_deep_copy_of_a_layer_with_main_grad_has_its_own():
    module = torch.nn.Linear(4, 5, bias=False)
    module.weight.main_grad = torch.zeros(5, 4)
    other = copy.deepcopy(module)
    native_linear(draw(3, 4), other.weight, None).sum().backward()
    assert not module.weight.main_grad.any()


@pytest.mark.parametrize("direct", [False, True], ids=["grad", "main_grad"])
def test_layers_that_share_a_weight_add_their_gradients(direct):
    """https://github.com/NVIDIA/TransformerEngine/issues/3437: one of two tied gradients was lost."""
    x, weight = draw(9, 8), torch.nn.Parameter(draw(8, 8))
    plain = torch.nn.Parameter(weight.detach().clone())
    if direct:
        weight.main_grad = torch.zeros(8, 8)
    native_linear(native_linear(x, weight, None), weight, None).sum().backward()
    functional.linear(functional.linear(x, plain), plain).sum().backward()
    torch.testing.assert_close(weight.main_grad if direct else weight.grad, plain.grad, rtol=1e-5, atol=1e-5)
