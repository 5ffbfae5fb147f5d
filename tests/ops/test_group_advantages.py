"""group_advantages: every backend against the definition, the definition against closed forms."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from backends import BACKENDS, FASTER, using
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fastrl.kernels import tuning
from fastrl.ops.group_advantages import group_advantages

NAN = float("nan")
ESTIMATORS = [
    (baseline, scale)
    for baseline, scale in itertools.product(("mean", "leave_one_out", "none"), ("group", "batch", "none"))
    if (baseline, scale) != ("none", "group")
]
each_estimator = pytest.mark.parametrize(("baseline", "scale"), ESTIMATORS)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def unequal_groups():
    """Groups of 1, 4, 3, 7 and 5 in shuffled order, ids with gaps and signs; one constant, one part NaN, one all."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([7] * 1 + [-3] * 4 + [0] * 3 + [2**40] * 7 + [12] * 5)
    rewards = torch.randn(20, dtype=torch.float64, generator=generator)
    rewards[1:5] = 0.1
    rewards[5:8] = NAN
    rewards[9:11] = NAN
    order = torch.randperm(20, generator=generator)
    return rewards[order], ids[order]


@pytest.mark.parametrize("backend", FASTER, indirect=True)
@each_estimator
def test_backend_equals_reference_in_float64(backend, baseline, scale):
    rewards, ids = unequal_groups()
    for values in (rewards, rewards + 1e6, rewards * 1e-6, (rewards > 0).double(), torch.full_like(rewards, NAN)):
        got, want = (
            group_advantages(values, group_ids=ids, baseline=baseline, scale=scale, backend=name)
            for name in (backend, "reference")
        )
        assert_close(got, want, rtol=1e-12, atol=1e-12)
        assert got.isfinite().all()


@each_estimator
def test_triton_in_many_blocks_equals_reference(baseline, scale):
    rewards, ids = unequal_groups()
    with tuning.trying("group_advantages", BLOCK=2), tuning.trying("group_advantages batch", BLOCK=4):
        got, want = (
            group_advantages(rewards, group_ids=ids, baseline=baseline, scale=scale, backend=name)
            for name in ("triton", "reference")
        )
    assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_closed_forms(backend):
    rewards = f64(1, 2, 3, 0, 0, 1, 1)
    ids = torch.tensor([4, 4, 4, 9, 9, 9, 9])
    std = (1.0, 1 / math.sqrt(3))  # sample standard deviations of the two groups
    mean_centred = f64(-1, 0, 1, -0.5, -0.5, 0.5, 0.5)
    batch_std = math.sqrt((2 + 4 * 0.25) / 6)  # the centred advantages have mean 0 and 7 entries

    def advantages(baseline, scale):
        return group_advantages(rewards, group_ids=ids, baseline=baseline, scale=scale, eps=0.0, backend=backend)

    assert_close(advantages("mean", "none"), mean_centred, rtol=1e-14, atol=0)
    assert_close(advantages("mean", "group"), mean_centred / f64(*[std[0]] * 3, *[std[1]] * 4), rtol=1e-14, atol=0)
    assert_close(advantages("mean", "batch"), mean_centred / batch_std, rtol=1e-14, atol=0)
    loo = f64(1 - 2.5, 2 - 2, 3 - 1.5, -2 / 3, -2 / 3, 2 / 3, 2 / 3)
    assert_close(advantages("leave_one_out", "none"), loo, rtol=1e-14, atol=0)
    assert torch.equal(advantages("none", "none"), rewards)
    assert_close(advantages("none", "batch"), rewards / rewards.std(), rtol=1e-14, atol=0)


def test_eps_is_added_to_the_standard_deviation(backend):
    got = group_advantages(f64(0, 1), group_size=2, eps=0.5, backend=backend)
    assert_close(got, f64(-0.5, 0.5) / (math.sqrt(0.5) + 0.5), rtol=1e-14, atol=0)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_constant_and_single_groups_get_exactly_zero(backend, scale, baseline, eps, dtype):
    for value in (0.1, 1 / 3, 1e6 + 0.1, -7.3, 0.0):
        rewards = torch.tensor([value] * 8 + [value, NAN, NAN], dtype=dtype)
        ids = torch.tensor([0] * 8 + [1] * 3)
        got = group_advantages(rewards, group_ids=ids, baseline=baseline, scale=scale, eps=eps, backend=backend)
        assert torch.equal(got, torch.zeros_like(got))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_large_common_offset_changes_no_advantage(backend, dtype):
    small = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=dtype)  # exact also after the offset
    for baseline, scale in (("mean", "group"), ("mean", "batch"), ("leave_one_out", "none")):
        near, far = (
            group_advantages(x, group_size=4, baseline=baseline, scale=scale, backend=backend)
            for x in (small, small + 1e6)
        )
        assert torch.equal(near, far)


@each_estimator
def test_nan_rewards_are_zero_and_as_if_absent(backend, baseline, scale):
    rewards, ids = unequal_groups()
    scorable = ~rewards.isnan()
    options = dict(baseline=baseline, scale=scale, backend=backend)
    got = group_advantages(rewards, group_ids=ids, **options)
    want = group_advantages(rewards[scorable], group_ids=ids[scorable], **options)
    assert_close(got[scorable], want, rtol=1e-14, atol=1e-14)
    assert torch.equal(got[~scorable], torch.zeros_like(got[~scorable]))


@pytest.mark.parametrize("rewards", [(0.7,), (0.7, NAN), (0.7, 0.7, 0.7)])
def test_a_batch_without_spread_is_left_unscaled(backend, rewards):
    got = group_advantages(f64(*rewards), group_size=1, baseline="none", scale="batch", backend=backend)
    assert torch.equal(got, f64(*rewards).nan_to_num(0.0))


def test_group_size_means_consecutive_ids(backend):
    rewards = torch.randn(12)
    ids = torch.tensor([5, 5, 5, 5, 1, 1, 1, 1, 3, 3, 3, 3])
    by_size, by_ids = (
        group_advantages(rewards, **groups, backend=backend) for groups in ({"group_size": 4}, {"group_ids": ids})
    )
    assert torch.equal(by_size, by_ids)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    estimator=st.sampled_from(ESTIMATORS),
    members=st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from([0.0, 0.1, 1.0, NAN]) | st.floats(-10, 10)),
        min_size=1,
        max_size=16,
    ),
)
def test_permuting_the_batch_permutes_the_advantages(data, estimator, members):
    order = torch.tensor(data.draw(st.permutations(range(len(members)))))
    ids, rewards = torch.tensor([i for i, _ in members]), f64(*[r for _, r in members])
    baseline, scale = estimator
    for name in BACKENDS:
        with using(name) as backend:
            straight, permuted = (
                group_advantages(r, group_ids=i, baseline=baseline, scale=scale, backend=backend)
                for r, i in ((rewards, ids), (rewards[order], ids[order]))
            )
        assert_close(permuted, straight[order], rtol=1e-9, atol=1e-9)


def test_answers_in_float32_rounded_once_and_in_float64_for_float64(backend):
    rewards, ids = unequal_groups()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        narrow = rewards.to(dtype)
        got = group_advantages(narrow, group_ids=ids, backend=backend)
        wide = group_advantages(narrow.double(), group_ids=ids, backend=backend)
        assert got.dtype == torch.float32
        assert wide.dtype == torch.float64
        assert torch.equal(got, wide.float())


def test_any_strides_and_integer_ids(backend):
    rewards, ids = torch.randn(24)[::2], torch.arange(24, dtype=torch.int32)[::2] % 3
    want = group_advantages(rewards.contiguous(), group_ids=ids.contiguous().long(), backend=backend)
    assert torch.equal(group_advantages(rewards, group_ids=ids, backend=backend), want)
    expanded = torch.tensor(0.1).expand(6)
    assert torch.equal(group_advantages(expanded, group_size=3, backend=backend), torch.zeros(6))


@each_estimator
def test_an_empty_batch_is_legal(backend, baseline, scale):
    empty = torch.zeros(0)
    for groups in ({"group_size": 4}, {"group_ids": torch.zeros(0, dtype=torch.int64)}):
        got = group_advantages(empty, **groups, baseline=baseline, scale=scale, backend=backend)
        assert torch.equal(got, empty)


def test_advantages_are_constants():
    rewards = torch.randn(8, requires_grad=True)
    assert not group_advantages(rewards, group_size=4).requires_grad


@each_estimator
def test_operator_passes_opcheck(backend, baseline, scale):
    rewards, ids = unequal_groups()
    for values in (rewards, rewards.float()):
        torch.library.opcheck(torch.ops.fastrl.group_advantages.default, (values, ids, baseline, scale, 1e-6, backend))


def test_compiled_equals_eager(backend):
    torch._dynamo.reset()  # it stops compiling a function after eight times, and there are more backends
    compiled = torch.compile(group_advantages, fullgraph=True, backend="aot_eager")
    rewards, ids = unequal_groups()
    for groups in ({"group_ids": ids}, {"group_size": 4}):
        assert torch.equal(
            compiled(rewards, **groups, backend=backend), group_advantages(rewards, **groups, backend=backend)
        )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "group_ids: expected exactly one of group_ids and group_size, got neither"),
        ({"group_size": 2, "group_ids": torch.arange(6)}, ValueError, "got group_ids and group_size"),
        ({"group_size": 4}, ValueError, "group_size: expected a divisor of the 6 rewards, got 4"),
        ({"group_size": 0}, ValueError, "group_size: expected a positive number, got 0"),
        ({"group_ids": torch.arange(5)}, ValueError, r"group_ids: expected shape \(6,\) as rewards, got \(5,\)"),
        ({"group_ids": torch.zeros(6)}, TypeError, "group_ids: expected int64 or int32, got torch.float32"),
        ({"group_size": 2, "baseline": "men"}, ValueError, "Did you mean 'mean'"),
        ({"group_size": 2, "scale": "std"}, ValueError, "scale: expected one of group, batch, none"),
        ({"group_size": 2, "eps": -1.0}, ValueError, "eps: expected a finite number of at least 0"),
        ({"group_size": 2, "baseline": "none"}, ValueError, "a constant group would be divided by eps"),
        ({"group_size": 2, "backend": "gpu"}, ValueError, "backend: expected one of auto, "),
    ],
)
def test_refuses_with_a_sentence(options, error, message):
    with pytest.raises(error, match=message):
        group_advantages(torch.randn(6), **options)


def test_refuses_rewards_that_are_not_a_float_vector():
    with pytest.raises(ValueError, match=r"rewards: expected shape \(B,\), got \(2, 3\)"):
        group_advantages(torch.randn(2, 3), group_size=1)
    with pytest.raises(TypeError, match="rewards: expected a floating-point tensor"):
        group_advantages(torch.arange(4), group_size=2)


@pytest.mark.gpu
@each_estimator
def test_cuda_equals_cpu(baseline, scale):
    rewards, ids = unequal_groups()
    want = group_advantages(rewards.cpu(), group_ids=ids.cpu(), baseline=baseline, scale=scale)
    got = group_advantages(rewards.cuda(), group_ids=ids.cuda(), baseline=baseline, scale=scale)
    assert_close(got.cpu(), want, rtol=1e-12, atol=1e-12)
