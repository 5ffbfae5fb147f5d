"""The critic's loss against cases worked out by hand."""

from __future__ import annotations

import pytest
import torch

from fastrl.losses.metrics import finish, merge
from fastrl.losses.value import value_loss


def column(*numbers, **options):
    return torch.tensor([numbers], dtype=torch.float64, **options)


EVERY = torch.ones(1, 1, dtype=torch.bool)


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "gradient", "case"),
    [
        (1.0, 1.0, 3.0, 2.0, -2.0, "inside: the squared error"),
        (1.5, 1.0, 3.0, 1.62, 0.0, "moved towards the return, beyond the clip: held at 1.2"),
        (0.0, 1.0, 3.0, 4.5, -3.0, "moved away from it: the larger error is its own"),
        (4.0, 1.0, 3.0, 1.62, 0.0, "moved past the return: held at 1.2"),
        (1.2, 1.0, 3.0, 1.62, -1.8, "exactly at the clip: not clipped"),
    ],
)
def test_one_token_by_hand(value, old, target, loss, gradient, case):
    values = column(value, requires_grad=True)
    out = value_loss(values, column(old), column(target), mask=EVERY, clip=0.2)
    assert out.loss.item() == pytest.approx(loss), case
    assert torch.autograd.grad(out.loss, values)[0].item() == pytest.approx(gradient), case
    assert finish(out.metrics)["value/clip_fraction"] == float(gradient == 0.0), case


def test_without_clip_it_is_half_the_mean_squared_error():
    values, returns = torch.randn(2, 3, 5, dtype=torch.float64)
    out = value_loss(values, None, returns, mask=torch.ones(3, 5, dtype=torch.bool), clip=None)
    torch.testing.assert_close(out.loss, 0.5 * torch.nn.functional.mse_loss(values, returns))


def batch():
    g = torch.Generator().manual_seed(4)
    values, old, returns = torch.randn(3, 4, 6, generator=g, dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor([6, 2, 5, 1])[:, None]
    return [x.masked_fill(~mask, torch.nan) for x in (values, old, returns)], mask


def test_gradcheck_and_masked_tokens_of_nan():
    (values, old, returns), mask = batch()
    leaf = values.nan_to_num().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: value_loss(x, old, returns, mask=mask).loss, leaf)
    values.requires_grad_()
    out = value_loss(values, old, returns, mask=mask)
    (grad,) = torch.autograd.grad(out.loss, values)
    assert (grad[~mask] == 0).all()
    assert grad[mask].isfinite().all()
    assert all(total.isfinite() for total, _ in out.metrics.values())


@pytest.mark.parametrize("split", [[1, 1, 1, 1], [2, 2], [3, 1]])
def test_micro_batches_with_a_global_normalizer_add_up_to_the_batch(split):
    tensors, mask = batch()
    values = tensors[0].requires_grad_()
    whole = value_loss(*tensors, mask=mask)
    parts = [
        value_loss(*part[:3], mask=part[3], normalizer=float(mask.sum()))
        for part in zip(*(x.split(split) for x in (*tensors, mask)), strict=True)
    ]
    total = sum(part.loss for part in parts)
    torch.testing.assert_close(total, whole.loss)
    torch.testing.assert_close(torch.autograd.grad(total, values), torch.autograd.grad(whole.loss, values))
    merged = finish(merge(part.metrics for part in parts))
    for name in ("value/clip_fraction", "value/mean", "return/mean"):
        assert merged[name] == pytest.approx(finish(whole.metrics)[name])


def test_explained_variance_of_a_perfect_a_constant_and_a_useless_critic():
    returns = column(1.0, 2.0, 3.0, 6.0)
    mask = torch.ones(1, 4, dtype=torch.bool)
    for values, expected in ((returns + 5, 1.0), (torch.full_like(returns, 3.0), 0.0), (2 * returns, 0.0)):
        metrics = finish(value_loss(values, None, returns, mask=mask, clip=None).metrics)
        assert metrics["value/explained_variance"] == pytest.approx(expected)


def test_equal_returns_have_no_explained_variance_though_their_mean_rounds():
    returns = torch.full((1, 7), 0.1)
    metrics = finish(value_loss(torch.randn(1, 7), None, returns, mask=returns > 0, clip=None).metrics)
    assert "value/explained_variance" not in metrics


@pytest.mark.parametrize("size", [(2, 3), (0, 3)])
def test_no_token_has_loss_zero_and_finite_metrics(size):
    values = torch.zeros(size, requires_grad=True)
    out = value_loss(values, values, values, mask=torch.zeros(size, dtype=torch.bool))
    assert out.loss == 0
    assert (torch.autograd.grad(out.loss, values)[0] == 0).all()
    assert finish(out.metrics) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"old_values": None}, r"value_loss: old_values: expected a tensor, which clip needs, got None\."),
        ({"clip": 0.0}, r"value_loss: clip: expected a number above 0, or None, got 0\.0\."),
        ({"returns": torch.zeros(1, 3)}, r"value_loss: returns: expected shape \(1, 2\) as values, got \(1, 3\)\."),
        ({"mask": torch.ones(2, dtype=torch.bool)}, r"value_loss: mask: expected shape \(1, 2\) as values, got"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_one_sentence(change, message):
    zeros = torch.zeros(1, 2)
    arguments = {"old_values": zeros, "returns": zeros, "mask": zeros.bool()} | change
    with pytest.raises(ValueError, match=message):
        value_loss(zeros, **arguments)
