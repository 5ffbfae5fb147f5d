"""What only the CUDA kernels have: tiles, blocks and addresses, at sizes that need several; emulated on a CPU."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from backends import CUDA, DEVICE
from ops.test_policy_loss import each_long_spec, long_batch
from tolerance import assert_exact, assert_no_worse

from fastrl.kernels.inputs import LossTokens
from fastrl.kernels.linear_logprob import chunked
from fastrl.kernels.linear_logprob import cuda_impl as head_cuda
from fastrl.kernels.logprob import cuda_impl
from fastrl.kernels.policy_loss import METRICS
from fastrl.kernels.policy_loss import cuda_impl as policy_cuda
from fastrl.ops.gae import gae
from fastrl.ops.group_advantages import group_advantages
from fastrl.ops.logprob import logprob
from fastrl.ops.policy_loss import policy_loss as policy_loss_op

pytestmark = pytest.mark.skipif(not CUDA, reason="neither a GPU build nor one with FASTRL_EMULATE_CUDA=1")
each_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
TILE = 2048  # tokens of a block of csrc/cuda/gae.cu


def assert_same_bits(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# gae.


def long_sequences():
    """Around one tile, a few of them, and more tiles than a block has threads; a padded tail; a third is masked."""
    lengths = torch.tensor([TILE - 1, TILE, TILE + 1, 0, 5000, 257 * TILE, 1])
    cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    tokens = int(cu_seqlens[-1]) + 777
    rewards, values = torch.randn(2, tokens, dtype=torch.float64)
    mask = torch.rand(tokens) < 0.7
    mask[TILE + 100 : 2 * TILE + 3000] = False  # a masked stretch from one tile into another
    values[~mask] = math.nan
    return rewards, values, mask, cu_seqlens


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (1.0, 1.0), (0.99, 0.0)])
def test_gae_of_sequences_of_many_tiles_equals_the_reference(gamma, lam):
    rewards, values, mask, cu_seqlens = long_sequences()
    options = dict(gamma=gamma, lam=lam, cu_seqlens=cu_seqlens)
    got, want = (gae(rewards, values, mask, **options, backend=name) for name in ("cuda", "reference"))
    for a, b in zip(got, want, strict=True):
        assert_exact(a, b)
        assert (a[~mask] == 0).all()


def test_a_sequence_has_the_same_bits_alone_and_among_others():
    rewards, values, mask, cu_seqlens = long_sequences()
    packed = gae(rewards, values, mask, cu_seqlens=cu_seqlens, backend="cuda")
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        part = slice(start, end)
        alone = gae(rewards[part], values[part], mask[part], cu_seqlens=torch.tensor([0, end - start]), backend="cuda")
        assert_same_bits(alone, [x[part] for x in packed])


# logprob.


def values_and_gradient(logits, targets, grads, **options):
    z = logits.detach().requires_grad_()
    out = logprob(z, targets, entropy=True, backend="cuda", **options)
    (gradient,) = torch.autograd.grad(list(out), z, list(grads))
    return out.logps.detach(), out.entropy.detach(), gradient


@each_dtype
@pytest.mark.parametrize("vocabulary", [37, 5003], ids=["less than a warp", "several packs a thread"])
def test_neither_other_rows_nor_the_address_change_a_bit_of_a_row(dtype, vocabulary):
    rows = 9  # of an odd length: every distance to an address that is a multiple of 16 bytes
    logits = (torch.randn(rows, vocabulary) * 3).to(dtype)
    logits[3, 7] = math.nan
    targets = torch.randint(vocabulary, (rows,))
    grads = torch.randn(2, rows, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    temperature = torch.rand(rows).to(grads.dtype) + 0.5
    whole = values_and_gradient(logits, targets, grads, temperature=temperature)
    for i in range(rows):
        part = slice(i, i + 1)
        for offset in range(9):
            moved = torch.zeros(vocabulary + 20, dtype=dtype)[offset : offset + vocabulary].unsqueeze(0)
            moved.copy_(logits[part])
            alone = values_and_gradient(moved, targets[part], grads[:, part], temperature=temperature[part])
            assert_same_bits(alone, [x[part] for x in whole])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_sixteen_bit_gradient_is_the_float32_one_rounded_once(dtype):
    """From subnormal to infinite."""
    narrow = (torch.randn(40, 5003) * 6).to(dtype)
    targets = torch.randint(5003, (40,))
    grads = torch.stack([torch.logspace(-9, 9, 40), torch.zeros(40)])
    got, want = (values_and_gradient(x, targets, grads)[2] for x in (narrow, narrow.float()))
    relative = (got.double() - want.double()).abs() / want.double().abs().clamp(min=torch.finfo(dtype).tiny)
    finite = got.isfinite()
    assert (relative[finite] <= torch.finfo(dtype).eps).all()  # a float32 in another order of summation, rounded
    assert (want[~finite].abs() > torch.finfo(dtype).max * 0.99).all()


@pytest.mark.parametrize("target", [-1, 37, 2**40])
def test_an_id_outside_the_vocabulary_makes_its_row_nan_and_no_other(target, monkeypatch):
    monkeypatch.setattr(cuda_impl, "check_targets", lambda *_: None)  # which raises before the kernel does, on a CPU
    logits, targets = torch.randn(6, 37), torch.randint(37, (6,))
    grads = torch.ones(2, 6)
    want = values_and_gradient(logits, targets, grads)
    targets[4] = target
    logps, entropy, gradient = values_and_gradient(logits, targets, grads)
    assert logps[4].isnan()
    assert gradient[4].isnan().all()
    others = torch.arange(6) != 4
    assert_same_bits([x[others] for x in (logps, entropy, gradient)], [x[others] for x in want])


@pytest.mark.gpu
def test_more_than_two_to_the_31_logits_are_read_and_written_where_they_are():
    rows, vocabulary = 16_400, 131_075
    logits = torch.empty(rows, vocabulary, dtype=torch.bfloat16, device="cuda").normal_()
    targets = torch.randint(vocabulary, (rows,), device="cuda")
    grads = torch.randn(2, rows, device="cuda")
    whole = values_and_gradient(logits, targets, grads)
    for i in (0, rows // 2, rows - 1):
        part = slice(i, i + 1)
        alone = values_and_gradient(logits[part].clone(), targets[part], grads[:, part])
        assert_same_bits(alone, [x[part] for x in whole])


# Between the matmuls of linear_logprob and linear_policy_loss. An odd vocabulary: every distance of a row to an address
# that is a multiple of 16 bytes; and long enough for a thread to load several packs before it writes the first.
LONG = 9001
each_real = pytest.mark.parametrize("real", [torch.float64, torch.float32], ids=str)
each_softcap = pytest.mark.parametrize("softcap", [0.0, 5.0], ids=["no softcap", "softcap"])


def chunk_of(vocabulary, rows=5, real=torch.float32):
    """Logits, targets, temperature, bias, and gradients from above."""
    logits, bias = 3 * torch.randn(rows, vocabulary, dtype=real), torch.randn(vocabulary, dtype=real)
    logits[2, 7] = -math.inf
    targets, temperature = torch.randint(vocabulary, (rows,)), torch.rand(rows, dtype=real) + 0.5
    return logits, targets, temperature, bias, torch.randn(2, rows, dtype=real)


def read_and_derive(make, logits, targets, temperature, bias, grads, out=None, *, softcap=5.0, keep=None, **options):
    """Statistics, probabilities in `keep`, and gradients: from logits, and from these probabilities."""
    chunk = make(targets, temperature, bias, softcap, 0.7)
    known = chunk.read(logits.clone(), True)
    results = [*known]
    rows = torch.arange(len(logits)).flip(0)
    if keep is not None:
        kept = torch.empty(len(logits), logits.shape[1], dtype=keep)
        chunk.keep(known, kept, rows)
        results.append(kept)
    results.append(chunk.gradient(known, *grads, out or logits.dtype, **options))
    if keep is not None:
        chunk.recall(kept, rows)
        results.append(chunk.gradient(known, *grads, out or logits.dtype))
    return results


@each_softcap
def test_kernels_between_the_matmuls_equal_torch_in_float64(softcap):
    inputs = chunk_of(LONG, real=torch.float64)
    makes = (head_cuda.Chunk, chunked.Chunk)
    got, want = (read_and_derive(make, *inputs, softcap=softcap, keep=torch.float64) for make in makes)
    for a, b in zip(got, want, strict=True):
        assert_exact(a, b)


@each_softcap
def test_kernels_between_the_matmuls_are_no_worse_than_torch_in_float32(softcap):
    inputs = chunk_of(LONG, rows=20)
    wide = [x if x.dtype == torch.int64 else x.double() for x in inputs]
    got, plain = (read_and_derive(make, *inputs, softcap=softcap) for make in (head_cuda.Chunk, chunked.Chunk))
    truth = read_and_derive(chunked.Chunk, *wide, softcap=softcap)
    for name, a, b, c in zip(("logps", "lse", "entropy", "dz"), got, plain, truth, strict=True):
        assert_no_worse(a, b, c, name=name)


@each_real
@pytest.mark.parametrize("vocabulary", [37, LONG], ids=["less than a warp", "several packs a thread"])
def test_neither_other_rows_of_a_chunk_nor_the_address_change_a_bit_of_a_row(real, vocabulary):
    inputs = chunk_of(vocabulary, real=real)
    inputs[0][3, 5] = math.nan
    whole = read_and_derive(head_cuda.Chunk, *inputs)
    logits, targets, temperature, bias, grads = inputs
    for i in range(len(logits)):
        part = slice(i, i + 1)
        alone = read_and_derive(head_cuda.Chunk, logits[part], targets[part], temperature[part], bias, grads[:, part])
        assert_same_bits(alone, [x[:, part] if x.shape[0] == 2 else x[part] for x in whole])


@each_softcap
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_sixteen_bit_gradient_of_logits_is_the_float32_one_rounded_once(dtype, softcap):
    """Also of probabilities in 16 bits, of which both are made."""
    inputs = chunk_of(LONG, rows=3)
    narrow, wide = (
        read_and_derive(head_cuda.Chunk, *inputs, out, softcap=softcap, keep=dtype) for out in (dtype, torch.float32)
    )
    for a, b in zip(narrow, wide, strict=True):
        assert torch.equal(a, b.to(a.dtype))


def test_a_gradient_in_the_memory_of_the_logits_has_the_bits_of_one_beside_it():
    inputs = chunk_of(LONG)
    beside, inside = (read_and_derive(head_cuda.Chunk, *inputs, last=last) for last in (False, True))
    assert_same_bits(beside, inside)


@pytest.mark.skipif(DEVICE != "cpu" or sys.platform != "linux", reason="relies on memory that is mapped when written")
def test_kept_rows_beyond_two_to_the_31_elements_are_written_and_read_where_they_are():
    far, few = 2**31 // LONG + 2, 3
    logits, targets, temperature, bias, grads = chunk_of(LONG, rows=few)
    memory = torch.UntypedStorage(2 * (far + few) * LONG)  # of which only the last rows are touched
    results = []
    for kept, start in ((torch.empty(0, dtype=torch.bfloat16).set_(memory).view(-1, LONG), far), (None, 0)):
        kept = torch.empty(few, LONG, dtype=torch.bfloat16) if kept is None else kept
        chunk, rows = head_cuda.Chunk(targets, temperature, bias, 0.0, 1.0), torch.arange(start, start + few)
        known = chunk.read(logits, True)
        chunk.keep(known, kept, rows)
        chunk.recall(kept, rows)
        results.append((kept[start : start + few], chunk.gradient(known, *grads, torch.bfloat16)))
    assert_same_bits(*results)


@pytest.mark.gpu
def test_a_chunk_of_more_than_two_to_the_31_logits_is_read_and_written_where_it_is():
    rows = 2**31 // LONG + 7
    logits, targets, temperature, bias, grads = chunk_of(LONG, rows=rows)
    whole = read_and_derive(head_cuda.Chunk, logits, targets, temperature, bias, grads)
    for i in (0, rows // 2, rows - 1):
        part = slice(i, i + 1)
        alone = read_and_derive(head_cuda.Chunk, logits[part], targets[part], temperature[part], bias, grads[:, part])
        assert_same_bits(alone, [x[:, part] if x.shape[0] == 2 else x[part] for x in whole])


# policy_loss.


@each_long_spec
def test_a_policy_loss_of_many_blocks_is_that_of_the_reference(spec):
    tokens, ids, sequences = long_batch()
    wide = [x if x.dtype == torch.bool else x.double() for x in tokens]
    names = ("loss", "dlogps", "dentropy", "metrics")
    got, want = (policy_loss_op(*wide, ids, sequences, spec.code, name) for name in ("cuda", "reference"))
    for name, a, b in zip(names, got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
    narrow, plain = (policy_loss_op(*tokens, ids, sequences, spec.code, name) for name in ("cuda", "reference"))
    for a, b, truth, name in zip(narrow[1:3], plain[1:3], want[1:3], names[1:3], strict=True):
        assert_no_worse(a, b, truth, name=name)
    for a, truth in ((narrow[0], want[0]), (narrow[3], want[3])):
        torch.testing.assert_close(a.double(), truth, rtol=1e-6, atol=1e-6)


def test_sequence_ids_that_decrease_make_the_loss_nan():
    tokens, ids, sequences = long_batch()
    spec = each_long_spec.args[1][1]
    assert not spec.separable
    assert policy_loss_op(*tokens, ids, sequences, spec.code, "cuda")[0].isfinite()
    assert policy_loss_op(*tokens, ids.flip(0), sequences, spec.code, "cuda")[0].isnan()


def test_the_table_of_metrics_has_a_row_for_each_name():
    tokens, ids, sequences = long_batch()
    table = policy_loss_op(*tokens, ids, sequences, each_long_spec.args[1][0].code, "cuda")[3]
    assert table.shape == (len(METRICS), 2)
    assert table.isfinite().all()


@pytest.mark.parametrize(("baseline", "scale"), [("mean", "group"), ("leave_one_out", "none")])
@each_long_spec
def test_rewards_in_the_launch_of_the_loss_give_the_bits_of_two_launches(spec, baseline, scale):
    """With sequences that end inside blocks, one without tokens and one without a reward."""
    (logps, _, *others, entropy), _, _ = long_batch()
    tokens = LossTokens(None, *others)
    ids = (torch.arange(len(logps)) // 97).add_(torch.arange(len(logps)) >= 4 * 97)  # none has the id 4
    sequences = int(ids[-1]) + 1
    rewards, groups = torch.randn(sequences), torch.arange(sequences) * 7 % 5
    rewards[2] = math.nan
    options = {"baseline": baseline, "scale": scale, "eps": 1e-6}
    got = policy_cuda.forward_from_rewards(logps, rewards, groups, tokens, entropy, ids, spec, **options)
    advantages = group_advantages(rewards, group_ids=groups, backend="cuda", **options)
    tokens = tokens._replace(advantages=advantages[ids])
    want = policy_cuda.forward(logps, tokens, entropy, ids, sequences, spec)
    assert_same_bits(got, want)
    assert (got[1] != 0).any()


# group_advantages, and all together.


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_of_a_batch_of_many_blocks_equal_the_reference(scale):
    rewards, ids = torch.randn(1003, dtype=torch.float64), torch.randint(60, (1003,)) * 2**40 - 7
    rewards[::17] = math.nan
    got, want = (group_advantages(rewards, group_ids=ids, scale=scale, backend=name) for name in ("cuda", "reference"))
    assert_exact(got, want)


def test_each_run_gives_the_same_bits():
    """The emulation turns the order of blocks around at every launch, a GPU takes whichever it likes."""
    tokens, ids, sequences = long_batch()
    rewards, values, mask, cu_seqlens = long_sequences()
    logits, targets, grads = torch.randn(5, 5003), torch.randint(5003, (5,)), torch.randn(2, 5)
    chunk = chunk_of(5003)

    def run():
        results = [*gae(rewards, values, mask, cu_seqlens=cu_seqlens, backend="cuda")]
        results += values_and_gradient(logits, targets, grads)
        results += read_and_derive(head_cuda.Chunk, *chunk)
        for spec in each_long_spec.args[1]:
            results += policy_loss_op(*tokens, ids, sequences, spec.code, "cuda")
        batch = group_advantages(tokens[0], group_size=1, baseline="none", scale="batch", backend="cuda")
        return [*results, batch]

    first = run()
    for _ in range(2 if DEVICE == "cpu" else 49):
        assert_same_bits(run(), first)
