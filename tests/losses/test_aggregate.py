"""`token_weights`: each aggregation against the sum written out, on padded and packed masks."""

from __future__ import annotations

import pytest
import torch

from fastrl.losses.aggregate import sequence_ids, token_weights

# Lengths 3, 0, 1, 2; prompts a, a, b, a. Row 0 has a hole: three masked-in tokens over four positions.
MASK = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
GROUP_IDS = torch.tensor([9, 9, -4, 9])
PER_TOKEN = {  # weight of a masked-in token of rows 0, 2, 3 by default
    "token_mean": (1 / 6, 1 / 6, 1 / 6),
    "prompt_mean": (1 / 5 / 2, 1 / 1 / 2, 1 / 5 / 2),
    "seq_mean_token_mean": (1 / 3 / 3, 1 / 1 / 3, 1 / 2 / 3),
    "seq_mean_token_sum": (1 / 3, 1 / 3, 1 / 3),
}
DEFAULT_NORMALIZER = {"token_mean": 6, "prompt_mean": 2, "seq_mean_token_mean": 3, "seq_mean_token_sum": 3}


def padded(values):
    weights = torch.zeros(4, 4, dtype=torch.float64)
    for row, value in zip((0, 2, 3), values, strict=True):
        weights[row] = value
    return weights.where(MASK, 0)


def pack(x, tail=0):
    """Rows cut to positions 4, 0, 1, 2 and laid end to end, and their bounds; `tail` more tokens belong to no row."""
    lengths = (4, 0, 1, 2)
    flat = torch.cat([row[:n] for row, n in zip(x, lengths, strict=True)] + [torch.ones(tail, dtype=x.dtype)])
    return flat, torch.tensor([0, 4, 4, 5, 7])


@pytest.mark.parametrize("aggregate", PER_TOKEN)
def test_default_weights(aggregate):
    weights = token_weights(MASK, aggregate, group_ids=GROUP_IDS, dtype=torch.float64)
    torch.testing.assert_close(weights, padded(PER_TOKEN[aggregate]), rtol=1e-15, atol=0)
    assert token_weights(MASK, aggregate, group_ids=GROUP_IDS).dtype == torch.float32


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("aggregate", [*PER_TOKEN, "token_sum"])
def test_an_explicit_normalizer_replaces_only_the_count(aggregate, as_tensor):
    normalizer = torch.tensor(50) if as_tensor else 50.0
    weights = token_weights(MASK, aggregate, normalizer=normalizer, group_ids=GROUP_IDS, dtype=torch.float64)
    if aggregate == "token_sum":
        expected = MASK / 50
    else:
        expected = padded(PER_TOKEN[aggregate]) * DEFAULT_NORMALIZER[aggregate] / 50
    torch.testing.assert_close(weights, expected.double(), rtol=1e-7 if aggregate == "token_sum" else 1e-15, atol=0)


@pytest.mark.parametrize("tail", [0, 3])
@pytest.mark.parametrize("aggregate", [*PER_TOKEN, "token_sum"])
def test_packed_weights_equal_padded_ones_and_the_tail_weighs_nothing(aggregate, tail):
    normalizer = 7.0 if aggregate == "token_sum" else None
    arguments = {"normalizer": normalizer, "group_ids": GROUP_IDS, "dtype": torch.float64}
    mask, bounds = pack(MASK, tail)
    for dtype in (torch.int64, torch.int32):
        weights = token_weights(mask, aggregate, cu_seqlens=bounds.to(dtype), **arguments)
        assert torch.equal(weights[:7], pack(token_weights(MASK, aggregate, **arguments))[0])
        assert (weights[7:] == 0).all()


@pytest.mark.parametrize("aggregate", [*PER_TOKEN, "token_sum"])
def test_all_masked_weighs_zero_everywhere(aggregate):
    mask = torch.zeros(3, 4, dtype=torch.bool)
    normalizer = 10.0 if aggregate == "token_sum" else None
    weights = token_weights(mask, aggregate, normalizer=normalizer, group_ids=torch.tensor([0, 0, 1]))
    assert (weights == 0).all()


@pytest.mark.parametrize("aggregate", [*PER_TOKEN, "token_sum"])
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_empty_masks_have_empty_weights(shape, aggregate):
    group_ids = torch.zeros(shape[0], dtype=torch.int64)
    weights = token_weights(torch.ones(shape, dtype=torch.bool), aggregate, normalizer=2.0, group_ids=group_ids)
    assert weights.shape == shape


def test_packed_without_any_sequence_weighs_zero():
    mask, bounds = torch.ones(3, dtype=torch.bool), torch.tensor([0])
    assert (token_weights(mask, "seq_mean_token_mean", cu_seqlens=bounds) == 0).all()


def test_packed_tokens_before_the_first_sequence_weigh_nothing():
    mask, bounds = torch.ones(6, dtype=torch.bool), torch.tensor([2, 3, 5])
    weights = token_weights(mask, "seq_mean_token_mean", cu_seqlens=bounds)
    assert weights.tolist() == [0.0, 0.0, 0.5, 0.25, 0.25, 0.0]


def test_integer_masks_count_as_bool():
    for dtype in (torch.int64, torch.int32, torch.uint8):
        assert torch.equal(token_weights(MASK.to(dtype), "token_mean"), token_weights(MASK, "token_mean"))


def test_groups_are_told_apart_by_their_ids_not_by_their_place():
    mask = torch.ones(4, 2, dtype=torch.bool)
    weights = token_weights(mask, "prompt_mean", group_ids=torch.tensor([5, 1, 5, 5]))
    torch.testing.assert_close(weights[:, 0], torch.tensor([1 / 6, 1 / 2, 1 / 6, 1 / 6]) / 2)


def test_prompt_mean_with_per_sequence_divisors_survives_a_split_through_a_group():
    whole = token_weights(MASK, "prompt_mean", group_ids=GROUP_IDS, dtype=torch.float64)
    divisors = torch.tensor([5, 5, 1, 5], dtype=torch.float64) * 2  # tokens of the whole group, times groups
    parts = [
        token_weights(MASK[s], "prompt_mean", normalizer=divisors[s], group_ids=GROUP_IDS[s], dtype=torch.float64)
        for s in (slice(0, 3), slice(3, 4))  # prompt 9 is cut
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-15, atol=0)
    mask, bounds = pack(MASK)
    packed = token_weights(mask, "prompt_mean", normalizer=divisors, cu_seqlens=bounds, dtype=torch.float64)
    torch.testing.assert_close(packed, pack(whole)[0], rtol=1e-15, atol=0)


def test_sequence_ids_of_padded_and_packed_tokens():
    ids, num_seqs = sequence_ids(torch.Size((2, 3)), torch.device("cpu"), None)
    assert (ids.tolist(), num_seqs) == ([0, 0, 0, 1, 1, 1], 2)
    ids, num_seqs = sequence_ids(torch.Size((6,)), torch.device("cpu"), torch.tensor([0, 2, 2, 5]))
    assert (ids[:5].tolist(), num_seqs) == ([0, 0, 2, 2, 2], 3)  # the second sequence is empty, the sixth token outside
    assert ids[5] < num_seqs


WRONG = [
    ({"aggregate": "token_means"}, "Did you mean 'token_mean'"),
    ({"mask": MASK.float()}, "mask: expected a bool or integer tensor"),
    ({"mask": MASK[None]}, "mask: expected shape"),
    ({"aggregate": "token_sum"}, "normalizer: expected"),
    ({"normalizer": -1.0}, "normalizer: expected a positive number, got -1.0"),
    ({"normalizer": torch.ones(1)}, "normalizer: expected a 0-d tensor"),
    ({"aggregate": "prompt_mean"}, "group_ids: expected"),
    ({"aggregate": "prompt_mean", "group_ids": torch.zeros(3, dtype=torch.int64)}, "group_ids: expected shape"),
    ({"aggregate": "prompt_mean", "group_ids": torch.zeros(4)}, "group_ids: expected an int64"),
    ({"aggregate": "seq_mean_token_sum", "mask": MASK[0]}, "cu_seqlens: expected"),
    ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens: expected None"),
    ({"mask": MASK[0], "cu_seqlens": torch.tensor(4)}, "cu_seqlens: expected shape"),
    ({"mask": MASK[0], "cu_seqlens": torch.tensor([0.0, 4.0])}, "cu_seqlens: expected an int64"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_arguments_are_refused(change, message):
    arguments = {"mask": MASK, "aggregate": "token_mean"} | change
    mask, aggregate = arguments.pop("mask"), arguments.pop("aggregate")
    with pytest.raises((ValueError, TypeError), match=message):
        token_weights(mask, aggregate, **arguments)
