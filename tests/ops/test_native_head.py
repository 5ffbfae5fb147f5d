"""The native LM head on AMX tiles against float64 torch, in builds that emulate the tiles: FASTRL_EMULATE_TILES=1."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from fastrl.kernels import native
from fastrl.kernels.native import address

EXTENSION = native.load()[0]
TILES = "amx_emulated"
pytestmark = pytest.mark.skipif(
    EXTENSION is None or TILES not in EXTENSION.isas(), reason="not built with FASTRL_EMULATE_TILES=1"
)
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


class Result(NamedTuple):
    logps: torch.Tensor
    entropy: torch.Tensor
    grad_hidden: torch.Tensor
    grad_weight: torch.Tensor
    grad_bias: torch.Tensor


def make(n, width, vocabulary, *, options, gap=0):
    """Rows in gaps of others, `gap` columns between a row's end and the next; `options` turns bias and the like on."""
    total = n + 3
    hidden = torch.randn(total, width + gap).bfloat16()[:, :width]
    weight = (torch.randn(vocabulary, width + gap) * 3 / width**0.5).bfloat16()[:, :width]
    return Case(
        hidden,
        weight,
        torch.randn(vocabulary).bfloat16() if options else None,
        torch.randperm(total)[:n].sort().values,
        torch.randint(0, vocabulary, (total,)),
        torch.rand(total) + 0.5 if options else torch.full((1,), 0.8),
        5.0 if options else 0.0,
        torch.randn(total),
        torch.randn(total) if options else None,
    )


def run(isa, case, *, keep_logits, threads=1, add_to=None):
    """Forward and backward on `isa`; the gradient of the weight is added to `add_to` where given."""
    total, width = case.hidden.shape
    vocabulary, n = len(case.weight), len(case.rows)
    before = EXTENSION.isa()
    EXTENSION.use(isa)
    try:
        head = EXTENSION.Head(
            native.DTYPES[torch.bfloat16], address(case.hidden), address(case.weight), address(case.bias),
            case.hidden.stride(0), case.weight.stride(0), width, vocabulary, address(case.rows), n, total,
            address(case.targets), address(case.temperature), len(case.temperature) > 1, case.softcap, 1.0, threads,
        )  # fmt: skip
        padded = -(-n // EXTENSION.lane_tile(False)) * EXTENSION.lane_tile(False)
        logits = torch.empty(vocabulary, padded) if keep_logits else None
        logps, lse, entropy = torch.zeros(total), torch.zeros(2, total), torch.zeros(total)
        EXTENSION.head_forward(head, address(logps), address(lse), address(entropy), address(logits))
        grad_hidden = torch.zeros(total, width)
        grad_weight = torch.full((vocabulary, width), float("nan")) if add_to is None else add_to.clone()
        grad_bias = torch.zeros(vocabulary)
        EXTENSION.head_backward(
            head, address(logps), address(lse), address(entropy), address(case.grad_logps), address(case.grad_entropy),
            address(logits), 0, 0, address(grad_hidden), address(grad_weight),
            address(grad_bias) if case.bias is not None else 0, add_to is not None, False, False,
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
def test_values_and_gradients_on_tiles_are_those_of_float64(n, width, vocabulary, options, keep_logits):
    case = make(n, width, vocabulary, options=options, gap=0 if n == 67 else 5)
    got, expected = run(TILES, case, keep_logits=keep_logits), truth(case)
    assert error(got.logps, expected.logps) < 2e-6
    assert error(got.entropy, expected.entropy) < 2e-6
    # dz is rounded to bfloat16 before the products: half a unit in the last place of each term.
    assert error(got.grad_hidden, expected.grad_hidden) < 2**-8
    assert error(got.grad_weight, expected.grad_weight) < 2**-8
    if options:
        assert error(got.grad_bias, expected.grad_bias) < 2e-6


@pytest.mark.parametrize(("n", "width", "vocabulary"), [(67, 65, 1003), (130, 128, 1500), (33, 62, 2081)])
def test_tiles_differ_from_paired_products_by_the_order_of_sums_alone(n, width, vocabulary):
    case = make(n, width, vocabulary, options=True)
    tiles, paired = (run(isa, case, keep_logits=False) for isa in (TILES, "avx512_bf16"))
    for name in ("logps", "entropy", "grad_bias"):
        assert error(getattr(tiles, name), getattr(paired, name).double()) < 2e-6, name
    # A logit that differs in its last bit may round dz to the neighbouring bfloat16.
    for name in ("grad_hidden", "grad_weight"):
        assert error(getattr(tiles, name), getattr(paired, name).double()) < 2**-9, name


def test_threads_change_no_bit_on_tiles():
    case = make(130, 65, 6000, options=True)  # several stripes with one thread, cut otherwise with more
    one = run(TILES, case, keep_logits=False)
    for threads in (2, 7):
        for got, expected in zip(run(TILES, case, keep_logits=False, threads=threads), one, strict=True):
            assert torch.equal(got, expected)


def test_other_rows_change_no_bit_of_a_row_on_tiles():
    case = make(130, 65, 1003, options=True)
    whole = run(TILES, case, keep_logits=False)
    few = case._replace(rows=case.rows[37:60])
    part = run(TILES, few, keep_logits=False)
    assert torch.equal(part.logps, whole.logps[37:60])
    assert torch.equal(part.entropy, whole.entropy[37:60])
    assert torch.equal(part.grad_hidden[few.rows], whole.grad_hidden[few.rows])


def test_gradients_of_the_weight_are_added_to_what_is_there_on_tiles():
    case = make(67, 65, 211, options=False)
    there = torch.randn(case.weight.shape)
    got, expected = run(TILES, case, keep_logits=False, add_to=there), truth(case)
    assert error(got.grad_weight, expected.grad_weight + there.double()) < 2**-8


def test_nothing_beyond_the_rows_of_an_operand_is_read_by_tiles():
    case = make(33, 62, 273, options=False, gap=2)
    expected = run(TILES, case, keep_logits=False)
    for operand in (case.hidden, case.weight):  # what lies in the gaps would turn every sum into NaN
        operand.as_strided((len(operand), 2), operand.stride(), operand.shape[1]).fill_(float("nan"))
    for got, clean in zip(run(TILES, case, keep_logits=False), expected, strict=True):
        assert torch.equal(got, clean)
