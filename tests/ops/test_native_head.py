"""The native LM head on AMX tiles against float64 torch, in builds that emulate the tiles: FASTRL_EMULATE_TILES=1."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from backends import using
from ops.cases import ORDERS, dense, gaussian
from tolerance import assert_no_worse

from fastrl.kernels import native
from fastrl.kernels.inputs import HeadInputs
from fastrl.kernels.linear_logprob.native import NativeHead
from fastrl.kernels.native import address
from fastrl.ops.linear_logprob import linear_logprob

EXTENSION = native.load()[0]
TILES = "amx_emulated"
pytestmark = pytest.mark.skipif(
    EXTENSION is None or TILES not in EXTENSION.isas(), reason="not built with FASTRL_EMULATE_TILES=1"
)


class Kind(NamedTuple):
    """How a head's products are made of bfloat16, and their largest error relative to the largest value."""

    dtype: torch.dtype
    reduced: bool
    values: float  # of logps and entropy
    gradients: float


KINDS = {
    # dz is rounded to bfloat16 before the products: half a unit in the last place of each term.
    "bfloat16": Kind(torch.bfloat16, False, 2e-6, 2**-8),
    "float32 of three": Kind(torch.float32, False, 2e-6, 2e-6),
    "float32 of two": Kind(torch.float32, True, 2**-15, 2**-14),
}
# Rows, width, vocabulary: no whole tile, whole tiles only, and every remainder of 2, 16, 32 and 64 near them.
SHAPES = [(n, k, v) for n in (1, 67, 130) for k in (31, 64, 65) for v in (7, 211, 1003, 1500)]
SHAPES += [(64, 32, 32), (64, 96, 512), (49, 1, 1), (16, 34, 273), (33, 62, 2081)]


class Case(NamedTuple):
    """Arguments of one head; only `rows` of hidden are its rows."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    rows: torch.Tensor
    targets: torch.Tensor
    temperature: torch.Tensor
    softcap: float
    grad_logps: torch.Tensor
    grad_entropy: torch.Tensor | None
    reduced: bool


class Result(NamedTuple):
    logps: torch.Tensor
    entropy: torch.Tensor
    grad_hidden: torch.Tensor
    grad_weight: torch.Tensor
    grad_bias: torch.Tensor


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def make(n, width, vocabulary, *, kind, options, gap=0):
    """Rows in gaps of others, `gap` columns between a row's end and the next; `options` turns bias and the like on."""
    total = n + 3
    hidden = torch.randn(total, width + gap).to(kind.dtype)[:, :width]
    weight = (torch.randn(vocabulary, width + gap) * 3 / width**0.5).to(kind.dtype)[:, :width]
    return Case(
        hidden,
        weight,
        torch.randn(vocabulary).to(kind.dtype) if options else None,
        torch.randperm(total)[:n].sort().values,
        torch.randint(0, vocabulary, (total,)),
        torch.rand(total) + 0.5 if options else torch.full((1,), 0.8),
        5.0 if options else 0.0,
        torch.randn(total),
        torch.randn(total) if options else None,
        kind.reduced,
    )


def run(isa, case, *, keep_logits, threads=1, add_to=None):
    """Forward and backward on `isa`; the gradient of the weight is added to `add_to` where given."""
    total, width = case.hidden.shape
    vocabulary, n = len(case.weight), len(case.rows)
    before = EXTENSION.isa()
    EXTENSION.use(isa)
    try:
        head = EXTENSION.Head(
            native.DTYPES[case.hidden.dtype], address(case.hidden), address(case.weight), address(case.bias),
            case.hidden.stride(0), case.weight.stride(0), width, vocabulary, address(case.rows), n, total,
            address(case.targets), address(case.temperature), len(case.temperature) > 1, case.softcap, 1.0,
            case.reduced, threads,
        )  # fmt: skip
        logits = torch.empty(vocabulary * n) if keep_logits else None
        logps, lse, entropy = torch.zeros(total), torch.zeros(2, total), torch.zeros(total)
        EXTENSION.head_forward(head, address(logps), address(lse), address(entropy), address(logits), 0)
        grad_hidden = torch.zeros(total, width)
        grad_weight = torch.full((vocabulary, width), float("nan")) if add_to is None else add_to.clone()
        grad_bias = torch.zeros(vocabulary)
        EXTENSION.head_backward(
            head, address(logps), address(lse), address(entropy), address(case.grad_logps), address(case.grad_entropy),
            address(logits), 0, 0, 0, address(grad_hidden), address(grad_weight),
            address(grad_bias) if case.bias is not None else 0, add_to is not None, False,
        )  # fmt: skip
    finally:
        EXTENSION.use(before)
    return Result(logps[case.rows], entropy[case.rows], grad_hidden, grad_weight, grad_bias)


def truth(case):
    """The same in float64 by torch."""
    hidden, weight = case.hidden.double().requires_grad_(), case.weight.double().requires_grad_()
    bias = torch.zeros(len(weight), dtype=torch.float64) if case.bias is None else case.bias.double()
    bias.requires_grad_()
    z = hidden[case.rows] @ weight.T + bias
    if case.softcap:
        z = case.softcap * torch.tanh(z / case.softcap)
    temperature = case.temperature.double().expand(len(hidden))[case.rows]
    all_logps = (z / temperature[:, None]).log_softmax(-1)
    logps = all_logps.gather(1, case.targets[case.rows][:, None])[:, 0]
    entropy = -(all_logps.exp() * all_logps).sum(-1)
    value = logps @ case.grad_logps[case.rows].double()
    if case.grad_entropy is not None:
        value = value + entropy @ case.grad_entropy[case.rows].double()
    value.backward()
    return Result(logps.detach(), entropy.detach(), hidden.grad, weight.grad, bias.grad)


def error(got, expected):
    assert torch.isfinite(got).all()
    return ((got.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-3)).item()


@pytest.mark.parametrize("keep_logits", [False, True])
@pytest.mark.parametrize("options", [False, True])
@pytest.mark.parametrize(("n", "width", "vocabulary"), SHAPES)
def test_values_and_gradients_on_tiles_are_those_of_float64(n, width, vocabulary, kind, options, keep_logits):
    case = make(n, width, vocabulary, kind=kind, options=options, gap=0 if n == 67 else 5)
    got, expected = run(TILES, case, keep_logits=keep_logits), truth(case)
    assert error(got.logps, expected.logps) < kind.values
    assert error(got.entropy, expected.entropy) < kind.values
    assert error(got.grad_hidden, expected.grad_hidden) < kind.gradients
    assert error(got.grad_weight, expected.grad_weight) < kind.gradients
    if options:
        assert error(got.grad_bias, expected.grad_bias) < kind.values


@pytest.mark.parametrize(("n", "width", "vocabulary"), [(67, 65, 1003), (130, 128, 1500), (33, 62, 2081)])
def test_tiles_differ_from_paired_products_by_the_order_of_sums_alone(n, width, vocabulary):
    case = make(n, width, vocabulary, kind=KINDS["bfloat16"], options=True)
    tiles, paired = (run(isa, case, keep_logits=False) for isa in (TILES, "avx512_bf16"))
    for name in ("logps", "entropy", "grad_bias"):
        assert error(getattr(tiles, name), getattr(paired, name).double()) < 2e-6, name
    # A logit that differs in its last bit may round dz to the neighbouring bfloat16.
    for name in ("grad_hidden", "grad_weight"):
        assert error(getattr(tiles, name), getattr(paired, name).double()) < 2**-9, name


def test_threads_change_no_bit_on_tiles(kind):
    case = make(130, 65, 6000, kind=kind, options=True)  # several stripes with one thread, cut otherwise with more
    one = run(TILES, case, keep_logits=False)
    for threads in (2, 7):
        for got, expected in zip(run(TILES, case, keep_logits=False, threads=threads), one, strict=True):
            assert torch.equal(got, expected)


def test_other_rows_change_no_bit_of_a_row_on_tiles(kind):
    case = make(130, 65, 1003, kind=kind, options=True)
    whole = run(TILES, case, keep_logits=False)
    few = case._replace(rows=case.rows[37:60])
    part = run(TILES, few, keep_logits=False)
    assert torch.equal(part.logps, whole.logps[37:60])
    assert torch.equal(part.entropy, whole.entropy[37:60])
    assert torch.equal(part.grad_hidden[few.rows], whole.grad_hidden[few.rows])


def test_gradients_of_the_weight_are_added_to_what_is_there_on_tiles(kind):
    case = make(67, 65, 211, kind=kind, options=False)
    there = torch.randn(case.weight.shape)
    got, expected = run(TILES, case, keep_logits=False, add_to=there), truth(case)
    assert error(got.grad_weight, expected.grad_weight + there.double()) < kind.gradients


def test_nothing_beyond_the_rows_of_an_operand_is_read_by_tiles(kind):
    case = make(33, 62, 273, kind=kind, options=False, gap=2)
    expected = run(TILES, case, keep_logits=False)
    for operand in (case.hidden, case.weight):  # what lies in the gaps would turn every sum into NaN
        operand.as_strided((len(operand), 2), operand.stride(), operand.shape[1]).fill_(float("nan"))
    for got, clean in zip(run(TILES, case, keep_logits=False), expected, strict=True):
        assert torch.equal(got, clean)


# float32 as sums of bfloat16.


@pytest.fixture
def matmul_precision():
    """Sets torch's float32 matmul precision; as it was afterwards."""
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision("highest")


def head_logits(hidden, weight):
    """The logits of a head on tiles."""
    targets, rows = torch.zeros(len(hidden), dtype=torch.int64), torch.arange(len(hidden))
    with using(f"cpu-{TILES}"):
        head = NativeHead(HeadInputs(hidden, weight, targets, None, torch.ones(1), 0.0, 1.0, ignore_index=-100))
        logits, panel = head.logits_buffer(rows), EXTENSION.lane_tile(False)
        head.forward(rows, torch.empty(len(rows)), torch.empty(2, len(rows)), None, logits)
    return torch.cat([part.view(len(weight), -1).T for part in logits.split(panel * len(weight))])


def every_magnitude():
    """float32 values of all 24 bits and both signs, from 2^-102 to the largest, and 0."""
    values = torch.ldexp(torch.rand(230 * 8) + 1, torch.arange(-102, 128).repeat_interleave(8).float())
    largest = torch.finfo(torch.float32).max
    values = torch.cat([values, torch.tensor([0.0, 1.0, largest, largest * (1 - 2**-9), 2.0**126, 2.0**127])])
    return torch.cat([values, -values])[:, None]


def test_three_pieces_hold_every_bit_of_a_float32():
    x, one = every_magnitude(), torch.ones(1, 1)
    assert torch.equal(head_logits(one, x), x.T)
    assert torch.equal(head_logits(x, one), x)


def test_two_pieces_hold_sixteen_bits_of_a_float32(matmul_precision):
    x, one = every_magnitude(), torch.ones(1, 1)
    half_unit = torch.where(x.abs() < 2.0**110, 2**-17, 2**-15) * x.double().abs()  # beyond, toward zero
    matmul_precision("high")
    for got in (head_logits(one, x).T, head_logits(x, one)):
        assert ((got.double() - x.double()).abs() <= half_unit).all()
        assert not torch.equal(got, x)


# Sums over the width, the tokens and the entries that are longer than a partial sum.
@pytest.mark.parametrize("shape", [(520, 96, 200), (70, 1100, 150), (33, 40, 5000)], ids=str)
def test_float32_is_no_worse_than_plain_torch_on_tiles(shape):
    inputs = gaussian(*shape, bias=False, dtype=torch.float32)
    grads = torch.randn(2, shape[0])

    def run(x, op):
        logps, entropy = op(x)
        torch.autograd.backward([logps, entropy], list(grads.to(logps.dtype)))
        return logps.detach(), entropy.detach(), x.hidden.grad, x.weight.grad

    leaves = ("hidden", "weight")
    with using(f"cpu-{TILES}") as name:
        got = run(
            inputs.leaves(*leaves),
            lambda x: linear_logprob(x.hidden, x.weight, x.targets, entropy=True, memory="recompute", backend=name),
        )
    plains = []
    for seed in range(ORDERS):
        plain = inputs.leaves(*leaves)
        plains.append(run(plain, lambda x, seed=seed: dense(x.reordered(seed))))
    expected = run(inputs.leaves(*leaves, dtype=torch.float64), dense)
    for name, ours, theirs, want in zip(Result._fields, got, zip(*plains, strict=True), expected, strict=False):
        assert_no_worse(ours, theirs, want, name=name)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_stays_alone_on_tiles(kind, poison):
    case = make(67, 65, 211, kind=kind, options=False)
    clean = run(TILES, case, keep_logits=False)
    broken = int(case.rows[20])
    case.hidden[broken] = poison
    got = run(TILES, case, keep_logits=False)
    others = torch.arange(67) != 20
    for name in ("logps", "entropy"):
        assert getattr(got, name)[20].isnan()
        assert torch.equal(getattr(got, name)[others], getattr(clean, name)[others])
    assert got.grad_hidden[broken].isnan().all()
    assert torch.equal(got.grad_hidden[case.rows[others]], clean.grad_hidden[case.rows[others]])
    assert got.grad_weight.isnan().all()
    case.grad_logps[broken] = 0  # without upstream gradient it reaches no weight
    quiet = run(TILES, case, keep_logits=False)
    assert (quiet.grad_hidden[broken] == 0).all()
    without = run(TILES, case._replace(rows=case.rows[others]), keep_logits=False)
    assert error(quiet.grad_weight, without.grad_weight.double()) < 2e-6


def test_torch_decides_how_many_pieces_a_float32_has(matmul_precision):
    inputs = gaussian(20, 70, 300, bias=False, ignored=False, dtype=torch.float32)

    def logps(backend, precision):
        matmul_precision(precision)
        with using(backend) as name:
            return linear_logprob(inputs.hidden, inputs.weight, inputs.targets, backend=name).logps

    expected = dense(inputs.leaves(dtype=torch.float64))[0]
    three, two = logps(f"cpu-{TILES}", "highest"), logps(f"cpu-{TILES}", "high")
    assert error(three, expected) < 2e-7
    assert 2e-7 < error(two, expected) < 2**-15
    assert torch.equal(logps(f"cpu-{TILES}", "medium"), two)
    assert torch.equal(logps("cpu-avx512_bf16", "high"), logps("cpu-avx512_bf16", "highest"))


@pytest.mark.parametrize(("precision", "reduced"), [("highest", False), ("high", True), ("medium", True)])
def test_both_forms_of_the_switch_of_torch_are_read(precision, reduced, matmul_precision, monkeypatch):
    matmul_precision(precision)
    assert native.reduced_float32() == reduced
    monkeypatch.setattr(torch.backends.mkldnn, "matmul", None, raising=False)  # as before torch 2.9
    assert native.reduced_float32() == reduced


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="torch 2.9 and newer")
def test_the_switch_for_gpus_alone_reduces_nothing_on_cpus(matmul_precision):
    matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert not native.reduced_float32()
    torch.backends.mkldnn.matmul.fp32_precision = "tf32"
    assert native.reduced_float32()
