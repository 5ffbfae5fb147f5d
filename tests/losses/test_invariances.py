"""What must not change a loss: padding, packing, the order of sequences, and how a batch is split."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastrl.losses.policy import policy_loss
from fastrl.losses.presets import PRESETS
from fastrl.spec import KL, Cispo, Correction

LENGTHS = (5, 1, 9, 3, 7, 2, 8, 4)
GROUP_IDS = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
TOKEN_NAMES = ("logps", "old_logps", "ref_logps", "sampling_logps", "entropy")

SPECS = {
    name: replace(spec, kl=KL("k3_ratio", 0.1), entropy_coef=0.05, correction=Correction("mask", "sequence", 1.2, 0.7))
    for name, spec in PRESETS.items()
}
SPECS["sequence_cispo"] = replace(SPECS["GSPO"], surrogate=Cispo(ratio_max=1.1, ratio_min=0.9))

both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
every_spec = pytest.mark.parametrize("name", SPECS)


def batch(dtype):
    g = torch.Generator().manual_seed(11)
    size = (len(LENGTHS), max(LENGTHS))
    logps = -2 * torch.rand(size, generator=g, dtype=torch.float64)
    data = {"logps": logps, "entropy": torch.rand(size, generator=g, dtype=torch.float64)}
    for other in ("old_logps", "ref_logps", "sampling_logps"):
        data[other] = logps + 0.3 * torch.randn(size, generator=g, dtype=torch.float64)
    data["advantages"] = torch.randn(len(LENGTHS), generator=g, dtype=torch.float64)
    data = {key: value.to(dtype) for key, value in data.items()}
    return data | {"mask": torch.arange(size[1]) < torch.tensor(LENGTHS)[:, None], "group_ids": GROUP_IDS}


def global_normalizer(spec):
    """What the weights divide by, counted over the whole batch."""
    sequences, tokens = len(LENGTHS), sum(LENGTHS)
    by_aggregate = {"token_mean": tokens, "prompt_mean": 4, "token_sum": 100}
    return float(by_aggregate.get(spec.aggregate, sequences))


def evaluate(spec, data, normalizer=None):
    """Loss, and gradients by `logps` and `entropy`."""
    data = dict(data)
    leaves = [data[key].detach().requires_grad_() for key in ("logps", "entropy")]
    data["logps"], data["entropy"] = leaves
    logps, advantages = data.pop("logps"), data.pop("advantages")
    if normalizer is None and spec.aggregate == "token_sum":
        normalizer = global_normalizer(spec)
    loss = policy_loss(logps, advantages, spec, normalizer=normalizer, **data).loss
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def assert_same(ours, expected, dtype):
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert expected[1].abs().sum() > 0


@both_precisions
@every_spec
def test_padding_columns_change_nothing(name, dtype):
    data = batch(dtype)
    padded = dict(data)
    for key in TOKEN_NAMES:
        padded[key] = torch.nn.functional.pad(data[key], (2, 3), value=torch.nan)
    padded["mask"] = torch.nn.functional.pad(data["mask"], (2, 3))
    ours = evaluate(SPECS[name], padded)
    assert_same((ours[0], *(x[:, 2:-3] for x in ours[1:])), evaluate(SPECS[name], data), dtype)


@both_precisions
@every_spec
def test_packing_changes_nothing(name, dtype):
    data = batch(dtype)
    expected = evaluate(SPECS[name], data)
    mask = data["mask"]
    tail = 4  # tokens of no sequence, as left by a fixed-size buffer
    packed = {key: torch.cat([data[key][mask], torch.full((tail,), torch.nan, dtype=dtype)]) for key in TOKEN_NAMES}
    packed |= {"mask": torch.ones(sum(LENGTHS) + tail, dtype=torch.bool), "group_ids": GROUP_IDS}
    packed |= {"advantages": data["advantages"], "cu_seqlens": torch.tensor((0, *LENGTHS)).cumsum(0)}
    ours = evaluate(SPECS[name], packed)
    assert_same((ours[0], *(x[:-tail] for x in ours[1:])), (expected[0], *(x[mask] for x in expected[1:])), dtype)
    assert all((x[-tail:] == 0).all() for x in ours[1:])


@both_precisions
@every_spec
def test_order_of_sequences_changes_nothing(name, dtype):
    data = batch(dtype)
    order = torch.tensor([3, 7, 0, 5, 2, 6, 1, 4])  # groups are torn apart
    ours = evaluate(SPECS[name], {key: value[order] for key, value in data.items()})
    expected = evaluate(SPECS[name], data)
    assert_same(ours, (expected[0], *(x[order] for x in expected[1:])), dtype)


SPLITS = {"one": [8], "two": [4, 4], "four": [2, 2, 2, 2], "uneven": [2, 6]}


@both_precisions
@pytest.mark.parametrize("split", SPLITS)
@every_spec
def test_micro_batches_with_a_global_normalizer_add_up_to_the_batch(name, split, dtype):
    data = batch(dtype)
    spec = SPECS[name]
    parts = zip(*(value.split(SPLITS[split]) for value in data.values()), strict=True)
    results = [evaluate(spec, dict(zip(data, part, strict=True)), global_normalizer(spec)) for part in parts]
    losses, *grads = zip(*results, strict=True)
    assert_same((sum(losses), *(torch.cat(g) for g in grads)), evaluate(spec, data), dtype)


@pytest.mark.parametrize("kind", ["truncate", "mask"])
@every_spec
def test_a_correction_is_a_factor_of_the_advantages_of_a_sequence(name, kind):
    """So that another library's weight of a sequence needs no correction of its own."""
    data, spec = batch(torch.float64), replace(SPECS[name], correction=Correction(kind, "sequence", 1.05, 0.9))
    log_weight = (data["old_logps"] - data["sampling_logps"]) * data["mask"]
    weight = (log_weight.sum(1) / data["mask"].sum(1)).exp()
    kept = weight.clamp(max=1.05) if kind == "truncate" else weight * ((weight >= 0.9) & (weight <= 1.05))
    assert kept.unique().numel() > 2
    scaled = data | {"advantages": data["advantages"] * kept, "sampling_logps": None}
    normalizer = 8.0 if spec.aggregate == "token_sum" else None
    grads = []
    for values, its_spec in ((data, spec), (scaled, replace(spec, correction=None))):
        logps = values["logps"].clone().requires_grad_()
        out = policy_loss(**(values | {"logps": logps}), spec=its_spec, normalizer=normalizer, backend="reference")
        grads.append((out.loss.detach(), *torch.autograd.grad(out.loss, logps)))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
