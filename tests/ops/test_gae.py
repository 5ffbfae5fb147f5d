"""gae: every backend against the definition, the definition against eq. 16 written out."""

from __future__ import annotations

import pytest
import torch
from backends import FASTER
from ops.threads import with_threads
from torch.testing import assert_close

from fastrl.kernels import tuning
from fastrl.ops.gae import gae

NAN, INF = float("nan"), float("inf")
each_decay = pytest.mark.parametrize(
    ("gamma", "lam"), [(1.0, 0.95), (1, 1), (0.9, 0.8), (0.0, 0.95), (0.99, 0), (0, 0)]
)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def packed(seed=0, keep=0.7):
    """Sequences of 0, 1, 2, 37, 128, 129 and 300 tokens and a tail of padding; masked values are NaN and infinite."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([0, 37, 1, 128, 0, 129, 300, 2])
    cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    tokens = int(cu_seqlens[-1]) + 11
    rewards, values = torch.randn(2, tokens, dtype=torch.float64, generator=generator)
    mask = torch.rand(tokens, generator=generator) < keep
    masked = (~mask).nonzero().squeeze(1)
    values[masked[::2]], values[masked[1::2]] = NAN, INF
    rewards[masked[::3]] = NAN
    return rewards, values, mask, cu_seqlens


def written_out(rewards, values, mask, gamma, lam):
    """arXiv:1506.02438 eq. 16, as a sum, for one sequence whose rewards are all on valid tokens."""
    valid = mask.nonzero().squeeze(1).tolist()
    advantages = torch.zeros_like(rewards)
    for i, t in enumerate(valid):
        for k, u in enumerate(valid[i:]):
            later = valid[i + k + 1] if i + k + 1 < len(valid) else None
            delta = rewards[u] + (gamma * values[later] if later is not None else 0.0) - values[u]
            advantages[t] += (gamma * lam) ** k * delta
    return advantages


@each_decay
def test_equals_equation_16_written_out(backend, gamma, lam):
    rewards, values = torch.randn(2, 4, 13, dtype=torch.float64)
    mask = torch.rand(4, 13) < 0.6
    rewards = rewards * mask
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam, backend=backend)
    want = torch.stack([written_out(*row, gamma, lam) for row in zip(rewards, values, mask, strict=True)])
    assert_close(advantages, want, rtol=1e-12, atol=1e-12)
    assert_close(returns, torch.where(mask, want + values, 0.0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", FASTER, indirect=True)
@each_decay
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.7, 1.0])
def test_backend_equals_reference_in_float64(backend, gamma, lam, keep):
    rewards, values, mask, cu_seqlens = packed(keep=keep)
    got, want = (
        gae(rewards, values, mask, gamma=gamma, lam=lam, cu_seqlens=cu_seqlens, backend=name)
        for name in (backend, "reference")
    )
    assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert got[0].isfinite().all()


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.0), (0.0, 0.0)])
def test_triton_scan_over_many_blocks_equals_reference_and_stops_a_nan_at_the_sequence(gamma, lam):
    rewards, values, mask, cu_seqlens = packed()
    rewards[(mask & (torch.arange(len(mask)) < 400)).nonzero()[-1]] = NAN
    with tuning.trying("gae", BLOCK=8), tuning.trying("gae carries", BLOCK=8):
        # Sequences cross blocks, and 77 blocks take ten turns.
        got, want = (
            gae(rewards, values, mask, gamma=gamma, lam=lam, cu_seqlens=cu_seqlens, backend=name)
            for name in ("triton", "reference")
        )
    assert 0 < want[0].isnan().sum() < mask.sum()
    assert_close(got, want, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_decay_zero_and_one_are_exact(backend, gamma, lam):
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randint(-8, 9, (2, 3, 200), generator=generator).double()
    advantages, _ = gae(rewards, values, torch.ones(3, 200), gamma=gamma, lam=lam, backend=backend)
    next_values = torch.cat((values[:, 1:], values.new_zeros(3, 1)), 1)
    one_step = rewards + gamma * next_values - values
    monte_carlo = rewards.flip(1).cumsum(1).flip(1) - values
    assert torch.equal(advantages, monte_carlo if gamma * lam == 1.0 else one_step)


def test_padded_equals_packed(backend):
    rewards, values = torch.randn(2, 3, 50, dtype=torch.float64)
    mask = torch.rand(3, 50) < 0.8
    padded = gae(rewards, values, mask, backend=backend)
    flat = gae(rewards.flatten(), values.flatten(), mask.flatten(), cu_seqlens=torch.arange(4) * 50, backend=backend)
    for a, b in zip(padded, flat, strict=True):
        assert torch.equal(a.flatten(), b)


def test_masked_tokens_are_as_if_removed(backend):
    rewards, values, mask, cu_seqlens = packed()
    rewards = torch.where(mask, rewards, 0.0)
    bounds = torch.cat((torch.zeros(1, dtype=torch.int64), mask.cumsum(0)))[cu_seqlens]
    inside = mask & (torch.arange(len(mask)) < cu_seqlens[-1])
    with_gaps = gae(rewards, values, mask, cu_seqlens=cu_seqlens, backend=backend)
    kept = rewards[inside], values[inside], torch.ones(inside.sum())
    without = gae(*kept, cu_seqlens=bounds.int(), backend=backend)
    for a, b in zip(with_gaps, without, strict=True):
        assert_close(a[inside], b, rtol=1e-13, atol=1e-13)
        assert torch.equal(a[~inside], torch.zeros_like(a[~inside]))


def test_a_masked_reward_is_earned_undiscounted_by_the_last_valid_token_before_it(backend):
    values, mask = f64([0.5, 9, 9, 0.25, 9]), f64([1, 0, 0, 1, 0])
    options = dict(gamma=0.5, lam=0.5, backend=backend)
    got = gae(f64([0, 1, 2, 0, 4]), values, mask, **options)
    want = gae(f64([3, 0, 0, 4, 0]), values, mask, **options)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[0], f64([3 + 0.125 - 0.5 + 0.25 * 3.75, 0, 0, 3.75, 0]))


def test_a_masked_reward_with_no_action_before_it_is_dropped(backend):
    rewards, values = f64(1, 5, 2, 7, 3), torch.zeros(5)
    mask = torch.tensor([True, False, False, True, False])
    # Sequences [0, 2) and [2, 4): the 2 opens the second sequence, and the 3 is padding behind it.
    advantages, _ = gae(rewards, values, mask, lam=1.0, cu_seqlens=torch.tensor([0, 2, 4]), backend=backend)
    assert torch.equal(advantages, f64(6, 0, 0, 7, 0))
    # A sequence with nothing valid hands its reward to no neighbour.
    advantages, _ = gae(f64([1, 0], [5, 5]), torch.zeros(2, 2), torch.tensor([[1, 1], [0, 0]]), backend=backend)
    assert torch.equal(advantages, f64([1, 0], [0, 0]))


@pytest.mark.parametrize("junk", [NAN, INF, -INF])
def test_junk_where_masked_changes_no_bit(backend, junk):
    rewards, values = torch.randn(2, 2, 40)
    mask = torch.rand(2, 40) < 0.5
    rewards = rewards * mask
    clean = gae(rewards, values, mask, backend=backend)
    dirty = gae(rewards.masked_fill(~mask, junk), values.masked_fill(~mask, junk), mask, backend=backend)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)


def test_a_nan_on_a_valid_token_reaches_only_its_own_past(backend):
    rewards, values = torch.randn(2, 3, 40, dtype=torch.float64)
    clean, _ = gae(rewards, values, torch.ones(3, 40), backend=backend)
    rewards[1, 20] = NAN
    dirty, _ = gae(rewards, values, torch.ones(3, 40), backend=backend)
    assert dirty[1, :21].isnan().all()
    dirty[1, :21] = clean[1, :21]
    assert torch.equal(dirty, clean)


def test_answers_in_float32_rounded_once_and_in_float64_for_float64(backend):
    rewards, values, mask, cu_seqlens = packed()
    narrow = rewards.float(), values.bfloat16()
    got = gae(*narrow, mask, cu_seqlens=cu_seqlens, backend=backend)
    wide = gae(narrow[0], narrow[1].double(), mask, cu_seqlens=cu_seqlens, backend=backend)
    for a, b in zip(got, wide, strict=True):
        assert a.dtype == torch.float32
        assert b.dtype == torch.float64
        assert torch.equal(a, b.float())


def test_any_strides(backend):
    rewards, values = torch.randn(9, 2).T.clone().T, torch.randn(1, 2).expand(9, 2)  # transposed; stride 0
    mask = (torch.rand(9, 4) < 0.7)[:, ::2]
    want = gae(rewards.contiguous(), values.contiguous(), mask.contiguous(), backend=backend)
    for a, b in zip(gae(rewards, values, mask, backend=backend), want, strict=True):
        assert torch.equal(a, b)


def test_threads_change_no_bit(native_isa):
    rewards, values, mask, cu_seqlens = packed()
    one, two = (
        with_threads(n, lambda: gae(rewards, values, mask, cu_seqlens=cu_seqlens, backend="cpu")) for n in (1, 2)
    )
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_no_tokens_are_legal(backend, shape):
    empty = torch.zeros(shape)
    for got in gae(empty, empty, empty, backend=backend):
        assert torch.equal(got, empty)


def test_no_sequences_leave_only_padding(backend):
    tokens = torch.ones(4)
    for got in gae(tokens, tokens, tokens, cu_seqlens=torch.tensor([0]), backend=backend):
        assert torch.equal(got, torch.zeros(4))


def test_advantages_and_returns_are_constants():
    values = torch.randn(2, 3, requires_grad=True)
    advantages, returns = gae(torch.randn(2, 3), values, torch.ones(2, 3))
    assert not advantages.requires_grad
    assert not returns.requires_grad


def test_operator_passes_opcheck(backend):
    rewards, values, mask, cu_seqlens = packed()
    finite = rewards.nan_to_num(0.0), values.nan_to_num(0.0, posinf=0.0)
    for r, v in (finite, (finite[0].float(), finite[1].float())):
        torch.library.opcheck(torch.ops.fastrl.gae.default, (r, v, mask, cu_seqlens, 1.0, 0.95, backend))


def test_compiled_equals_eager(backend):
    torch._dynamo.reset()  # it stops compiling a function after eight times, and there are more backends
    compiled = torch.compile(gae, fullgraph=True, backend="aot_eager")
    rewards, values, mask, cu_seqlens = packed()
    cases = [
        ((rewards, values, mask), {"cu_seqlens": cu_seqlens}),
        ((rewards[:60].view(3, 20), values[:60].view(3, 20), mask[:60].view(3, 20)), {"gamma": 0.9}),
    ]
    for inputs, options in cases:
        for got, want in zip(compiled(*inputs, **options, backend=backend), gae(*inputs, **options), strict=True):
            assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": torch.zeros(2, 4)}, ValueError, r"values: expected shape \(2, 3\) as rewards, got \(2, 4\)"),
        ({"mask": torch.ones(2)}, ValueError, r"mask: expected shape \(2, 3\) as rewards"),
        ({"rewards": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "rewards: expected a floating-point tensor"),
        ({"gamma": 1.5}, ValueError, "gamma: expected a number from 0 to 1, got 1.5"),
        ({"lam": NAN}, ValueError, "lam: expected a number from 0 to 1, got nan"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, r"rewards: expected shape \(N,\) with cu_seqlens"),
        ({"backend": "triton_"}, ValueError, "backend: expected one of auto, "),
    ],
)
def test_refuses_with_a_sentence(change, error, message):
    arguments = {"rewards": torch.zeros(2, 3), "values": torch.zeros(2, 3), "mask": torch.ones(2, 3)} | change
    with pytest.raises(error, match=message):
        gae(**arguments)


@pytest.mark.parametrize("cu_seqlens", [[0, 7], [1, 6], [0, 4, 3], [-1, 6]])
def test_refuses_bounds_that_are_none(cu_seqlens):
    tokens = torch.zeros(6)
    with pytest.raises(ValueError, match="cu_seqlens: expected bounds that start at 0, never decrease and end at most"):
        gae(tokens, tokens, tokens, cu_seqlens=torch.tensor(cu_seqlens))


def test_refuses_tokens_without_a_layout():
    with pytest.raises(ValueError, match=r"rewards: expected shape \(B, T\), or \(N,\) with cu_seqlens, got \(6,\)"):
        gae(torch.zeros(6), torch.zeros(6), torch.zeros(6))
    with pytest.raises(TypeError, match="cu_seqlens: expected an int64 or int32 tensor"):
        gae(torch.zeros(6), torch.zeros(6), torch.zeros(6), cu_seqlens=torch.tensor([0.0, 6.0]))


@pytest.mark.gpu
@each_decay
def test_cuda_equals_cpu(gamma, lam):
    rewards, values, mask, cu_seqlens = packed()
    on_cpu, on_gpu = ([move(x) for x in (rewards, values, mask)] for move in (torch.Tensor.cpu, torch.Tensor.cuda))
    want = gae(*on_cpu, gamma=gamma, lam=lam, cu_seqlens=cu_seqlens.cpu())
    got = gae(*on_gpu, gamma=gamma, lam=lam, cu_seqlens=cu_seqlens.cuda())
    for a, b in zip(got, want, strict=True):
        assert_close(a.cpu(), b, rtol=1e-12, atol=1e-12)
