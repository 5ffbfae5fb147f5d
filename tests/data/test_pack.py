from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrl.data.pack import LAYOUTS, count, minibatches, pack, trained
from fastrl.data.plan import LAUNCH_SHARE, ModelShape, Row, plan, split
from fastrl.types import Group, Prompt, Sample

LAID_OUT = ("padded", "shared", "varlen")


def make_group(prompt_length, completion_lengths, *, first_id=0.0, reward=1.0, finished=True):
    """`sampling_logps` number the completion tokens from `first_id` on, so that each can be found again."""
    samples = []
    for length in completion_lengths:
        ids = [first_id + token for token in range(length)]
        first_id += length
        samples.append(
            Sample([10 + token for token in range(length)], ids, finished, reward=reward, advantage=first_id)
        )
    return Group(Prompt(0, "", tuple(100 + token for token in range(prompt_length))), samples)


def make_groups(lengths):
    groups, first_id = [], 0.0
    for prompt_length, completion_lengths in lengths:
        groups.append(make_group(prompt_length, completion_lengths, first_id=first_id))
        first_id += sum(completion_lengths)
    return groups


UNEQUAL = [(5, [3, 1, 7]), (2, [4]), (9, [2, 6, 6, 1])]


def total_tokens(batches):
    return sum(batch.num_tokens for batch in batches)


@pytest.mark.parametrize("layout", ["padded", "varlen"])
def test_four_token_case_laid_out_by_hand(layout):
    group = Group(Prompt(0, "", (1, 2)), [Sample([3, 4], [-0.5, -0.25], True, reward=1.0, advantage=2.0)])
    (batch,) = pack([group], layout=layout, max_tokens=8)
    assert batch.input_ids.tolist() == [[1, 2, 3]]  # 4 predicts nothing
    assert batch.position_ids.tolist() == [[0, 1, 2]]
    assert batch.hidden_index.tolist() == [1, 2]  # token 3 is scored after 2, token 4 after 3
    assert batch.targets.tolist() == [3, 4]
    assert batch.cu_seqlens.tolist() == [0, 2]
    assert batch.advantages.tolist() == [2.0]
    assert batch.sampling_logps.tolist() == [-0.5, -0.25]


def test_shared_row_laid_out_by_hand():
    samples = [Sample([3, 4], [0.0] * 2, True, reward=1.0), Sample([5, 6, 7], [0.0] * 3, True, reward=1.0)]
    (batch,) = pack([Group(Prompt(0, "", (1, 2)), samples)], layout="shared", max_tokens=8)
    assert batch.input_ids.tolist() == [[1, 2, 3, 5, 6]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 2, 3]]
    assert batch.hidden_index.tolist() == [1, 2, 1, 3, 4]
    assert batch.targets.tolist() == [3, 4, 5, 6, 7]
    assert batch.attention_mask.int().tolist() == [
        [
            [
                [1, 0, 0, 0, 0],
                [1, 1, 0, 0, 0],
                [1, 1, 1, 0, 0],
                [1, 1, 0, 1, 0],
                [1, 1, 0, 1, 1],
            ]
        ]
    ]


def test_varlen_bounds_cut_the_row_into_its_sequences():
    (batch,) = pack(make_groups([(2, [3]), (4, [1, 2])]), layout="varlen", max_tokens=64)
    assert batch.attention_cu_seqlens.tolist() == [0, 4, 8, 13]
    assert batch.attention_cu_seqlens.dtype == torch.int32
    assert batch.attention_max_seqlen == 5
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 4]]
    assert batch.attention_mask is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_query_is_left_without_a_key(layout):
    for batch in pack(make_groups(UNEQUAL), layout=layout, max_tokens=64):
        if batch.attention_mask is not None and batch.attention_mask.dim() == 4:
            assert batch.attention_mask.any(-1).all()


ragged = st.lists(st.tuples(st.integers(1, 20), st.lists(st.integers(1, 30), min_size=1, max_size=6)), max_size=8)


@settings(max_examples=150, deadline=None)
@given(lengths=ragged, slack=st.integers(0, 150), layout=st.sampled_from(LAYOUTS))
def test_each_token_once_and_within_the_budget(lengths, slack, layout):
    longest = max((prompt + max(completions) - 1 for prompt, completions in lengths), default=1)
    groups = make_groups(lengths)
    batches = pack(groups, layout=layout, max_tokens=longest + slack)
    assert all(batch.num_tokens <= longest + slack for batch in batches)
    ids = [int(number) for batch in batches for number in batch.sampling_logps]
    assert sorted(ids) == list(range(sum(sum(completions) for _, completions in lengths)))
    for batch in batches:
        flat, positions = batch.input_ids.flatten(), batch.position_ids.flatten()
        for number, group_id in enumerate(batch.group_ids.tolist()):
            tokens = slice(*batch.cu_seqlens[number : number + 2])
            index, targets = batch.hidden_index[tokens], batch.targets[tokens]
            prompt = lengths[group_id][0]
            assert flat[index].tolist() == [99 + prompt, *targets[:-1].tolist()]
            assert positions[index].tolist() == list(range(prompt - 1, prompt - 1 + len(targets)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_advantages_and_group_ids_follow_their_samples(layout):
    groups = make_groups(UNEQUAL)
    want = {int(s.sampling_logps[0]): (index, s.advantage) for index, g in enumerate(groups) for s in g.samples}
    batches = pack(groups, layout=layout, max_tokens=40)
    got = {
        int(batch.sampling_logps[start]): (group_id, advantage)
        for batch in batches
        for start, group_id, advantage in zip(
            batch.cu_seqlens[:-1].tolist(), batch.group_ids.tolist(), batch.advantages.tolist(), strict=True
        )
    }
    assert got == want


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packing_twice_gives_the_same_order(layout):
    first, second = (pack(make_groups(UNEQUAL), layout=layout, max_tokens=40) for _ in range(2))
    assert [b.sampling_logps.tolist() for b in first] == [b.sampling_logps.tolist() for b in second]


def test_varlen_has_no_padding():
    batches = pack(make_groups(UNEQUAL), layout="varlen", max_tokens=40)
    assert total_tokens(batches) == sum(p + c - 1 for p, cs in UNEQUAL for c in cs)


def partitions(items):
    """All partitions of a list into non-empty sets."""
    if not items:
        yield []
        return
    for rest in partitions(items[1:]):
        yield [[items[0]], *rest]
        for number in range(len(rest)):
            yield [*rest[:number], [items[0], *rest[number]], *rest[number + 1 :]]


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=7), budget=st.integers(12, 40))
def test_plan_is_the_cheapest_of_all_partitions_and_of_those_the_one_of_the_smallest_peak(lengths, budget):
    rows = [Row(0, (1,) * length, [Sample([1], [0.0], True)]) for length in lengths]

    def cost(length):
        return length * (1 + length / 10)

    found = []  # (cost, tokens of the largest micro-batch)
    for parts in partitions(lengths):
        peak = max(len(part) * max(part) for part in parts)
        if peak <= budget:
            found.append((sum(LAUNCH_SHARE * budget + len(part) * cost(max(part)) for part in parts), peak))
    best = min(price for price, _ in found)
    price, parts = plan(rows, budget, cost)
    assert price == pytest.approx(best, rel=1e-9)
    peak = max(len(part) * max(row.length for row in part) for part in parts)
    assert peak == min(peak for price, peak in found if math.isclose(price, best, rel_tol=1e-9))
    spent = sum(LAUNCH_SHARE * budget + len(part) * cost(max(row.length for row in part)) for part in parts)
    assert spent == pytest.approx(price, rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_padding_waste_is_below_that_of_unsorted_micro_batches(seed):
    lengths = torch.randint(1, 200, (64,), generator=torch.Generator().manual_seed(seed)).tolist()
    groups = make_groups([(10, [length]) for length in lengths])
    unsorted, rows, longest = 0, 0, 0
    for length in (10 + length - 1 for length in lengths):
        if (rows + 1) * max(longest, length) > 2048:
            unsorted, rows, longest = unsorted + rows * longest, 0, 0
        rows, longest = rows + 1, max(longest, length)
    unsorted += rows * longest
    exact = sum(10 + length - 1 for length in lengths)
    waste = total_tokens(pack(groups, layout="padded", max_tokens=2048)) - exact
    assert waste < 0.5 * (unsorted - exact)


def test_shared_computes_a_prompt_once_and_auto_takes_it():
    groups = make_groups([(45, [8 + 2 * number for number in range(8)])] * 8)  # short answers, 8 of each prompt
    padded, shared, auto = (
        total_tokens(pack(groups, layout=name, max_tokens=4096)) for name in ("padded", "shared", "auto")
    )
    assert shared == auto == 8 * (45 + sum(7 + 2 * number for number in range(8)))
    assert padded > 2 * shared


def test_auto_takes_padded_where_long_completions_make_the_dense_mask_dear():
    groups = make_groups([(4, [400] * 4)] * 2)
    auto = pack(
        groups, layout="auto", max_tokens=4096, shape=ModelShape(hidden=64, layers=2, linear_params=2 * 12 * 64**2)
    )
    assert all(batch.attention_mask.dim() == 2 for batch in auto)


@pytest.mark.parametrize(("prompt", "length"), [(45, 17), (45, 300), (512, 512), (8, 1000)])
def test_split_is_within_a_tenth_of_the_cheapest_number_of_rows(prompt, length):
    shape = ModelShape()
    samples = [Sample([1] * length, [0.0] * length, True, reward=1.0) for _ in range(16)]
    row = Row(0, (1,) * prompt, samples)

    def cost(rows):
        return sum(shape.row_cost(row.length, dense=True) for row in rows)

    def split_into(n):
        return [row._replace(samples=samples[part::n]) for part in range(n)]

    assert cost(split(row, 10**6, shape.crossover)) <= 1.1 * min(cost(split_into(n)) for n in range(1, 17))


def test_row_cost_is_the_flops_of_its_matmuls():
    shape = ModelShape(hidden=64, layers=3, linear_params=5000)
    length = 37
    linear, attention = 2 * 5000 * length, 3 * 2 * (2 * length * length * 64)
    assert shape.row_cost(length, dense=True) == pytest.approx((linear + attention) / (2 * 5000), rel=1e-12)
    assert shape.row_cost(length, dense=False) == pytest.approx((linear + attention / 2) / (2 * 5000), rel=1e-12)


def test_untrained_samples_are_left_out_of_batches_and_counts_alike():
    group = make_group(3, [2, 4, 5])
    group.samples[0].reward = None
    group.samples[1].finished = False
    group.samples.append(Sample([], [], True, reward=1.0))
    empty = make_group(3, [6], finished=False)
    for mask_truncated, lengths in ((False, [[4, 5], [6]]), (True, [[5], []])):
        kept = [[len(sample.token_ids) for sample in trained(g, mask_truncated=mask_truncated)] for g in (group, empty)]
        assert kept == lengths
        counts = count([group, empty], mask_truncated=mask_truncated)
        assert counts == (sum(map(sum, lengths)), sum(map(len, lengths)), sum(map(bool, lengths)))
        for layout in LAYOUTS:
            batches = pack([group, empty], layout=layout, max_tokens=64, mask_truncated=mask_truncated)
            assert sum(int(batch.mask.sum()) for batch in batches) == counts.tokens
            assert sum(len(batch.group_ids) for batch in batches) == counts.sequences
            assert len(set(itertools.chain(*(batch.group_ids.tolist() for batch in batches)))) == counts.groups


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_to_train_on_gives_no_micro_batch(layout):
    assert pack([], layout=layout, max_tokens=8) == []
    assert pack([make_group(3, [2], reward=None)], layout=layout, max_tokens=8) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sequence_over_the_budget_is_an_error_that_names_it(layout):
    with pytest.raises(
        ValueError, match=r"max_tokens: expected at least 12 .*prompt of 5 .*completion of 8.*got 11\. Raise"
    ):
        pack([make_group(5, [8])], layout=layout, max_tokens=11)
    assert len(pack([make_group(5, [8])], layout=layout, max_tokens=12)) == 1


def test_errors():
    with pytest.raises(ValueError, match="Did you mean 'padded'"):
        pack([], layout="paded", max_tokens=8)
    with pytest.raises(ValueError, match=r"groups\[0\].prompt.token_ids: expected at least one token"):
        pack([make_group(0, [2])], layout="padded", max_tokens=8)
    group = make_group(2, [3])
    group.samples[0].sampling_logps.pop()
    with pytest.raises(ValueError, match="sampling_logps: expected 3, one per token, got 2"):
        pack([group], layout="padded", max_tokens=8)
    with pytest.raises(ValueError, match="minibatches: n: expected at least 1, got 0"):
        minibatches([], 0, torch.Generator())


def test_minibatches_keep_groups_whole_shuffle_by_seed_and_balance_tokens():
    lengths = torch.randint(1, 100, (24, 3), generator=torch.Generator().manual_seed(0)).tolist()
    groups = make_groups([(10, row) for row in lengths])
    first, again, other = (minibatches(groups, 4, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    ids = [[id(group) for group in part] for part in first]
    assert ids == [[id(group) for group in part] for part in again]
    assert ids != [[id(group) for group in part] for part in other]
    assert sorted(itertools.chain(*ids)) == sorted(map(id, groups))
    loads = [sum(30 + sum(len(s.token_ids) for s in group.samples) for group in part) for part in first]
    assert max(loads) < 1.1 * min(loads)


def test_equal_groups_make_minibatches_of_equal_size_none_empty():
    groups = make_groups([(4, [5, 5])] * 8)
    assert [len(part) for part in minibatches(groups, 4, torch.Generator())] == [2, 2, 2, 2]
    assert [len(part) for part in minibatches(groups[:3], 4, torch.Generator())] == [1, 1, 1]
    assert minibatches([], 4, torch.Generator()) == []


def test_shape_of_a_transformers_model_counts_its_matmul_weights():
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6,
    )  # fmt: skip
    for tied in (True, False):
        config.tie_word_embeddings = tied
        shape = ModelShape.of(transformers.LlamaForCausalLM(config))
        attention, mlp, norms = 16 * 24 * 2 + 16 * 12 * 2, 3 * 16 * 24, 2 * 16
        assert shape == ModelShape(hidden=24, layers=2, linear_params=2 * (attention + mlp + norms) + 16)
    assert math.isclose(shape.crossover, shape.linear_params / 96)
