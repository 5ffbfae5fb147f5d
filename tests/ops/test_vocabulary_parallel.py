"""A vocabulary that is split between processes: everything is as in one, on every rank, and said if it cannot be.

What the split heads of others had:
no gradient in shards without the target, https://github.com/modelscope/ms-swift/pull/9947;
a gradient of hidden that differs between ranks, https://github.com/apple/ml-cross-entropy/pull/42, or that nobody adds
up without sequence parallelism, https://github.com/NovaSky-AI/SkyRL/pull/1886;
losses off by log(ranks) where each rank holds the whole head, https://github.com/NVIDIA/Megatron-LM/issues/7452;
other losses where ranks do not divide the vocabulary, https://github.com/NVIDIA/Megatron-LM/issues/1754;
log-probabilities above zero, https://github.com/verl-project/verl/issues/2656.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from functools import partial

import gloo
import pytest
import torch
from ops.cases import IGNORE, dense_logits, gaussian
from ops.test_matmul_count import MatmulFlops
from ops.test_support import csr, random_sets
from tolerance import assert_exact
from torch import distributed

import fastrl
from fastrl import FusedLMHead, linear_logprob, linear_policy_loss, linear_token_loss, presets
from fastrl.kernels.linear_logprob import chunked
from fastrl.ops.vocabulary_parallel import HEADER
from fastrl.spec import KL, Clip, PolicyLoss

ROWS, SIZE, VOCABULARY = 24, 8, 37
EVERYTHING = ("hidden", "weight", "bias")


def bounds(split, world, vocabulary=VOCABULARY):
    """The first and the past-the-last row of each rank's shard."""
    if split == "all but one on the first":
        ends = [vocabulary - world + 1 + rank for rank in range(world)]
    elif split == "none on the first":
        ends = [0, *(vocabulary * (rank + 1) // (world - 1) for rank in range(world - 1))]
    elif split == "none on the last":
        ends = [*(vocabulary * (rank + 1) // (world - 1) for rank in range(world - 1)), vocabulary]
    else:  # as torch.chunk does it: the last gets what is left
        size = -(-vocabulary // world)
        ends = [min(size * (rank + 1), vocabulary) for rank in range(world)]
    return list(zip([0, *ends[:-1]], ends, strict=True))


SPLITS = ("chunks", "all but one on the first", "none on the first", "none on the last")


def world_of():
    return distributed.get_world_size()


def shard_of(inputs, rank, split="chunks", requires=EVERYTHING):
    """This rank's part of `inputs`, as leaves, and where it is."""
    start, end = bounds(split, world_of(), len(inputs.weight))[rank]
    part = inputs.leaves()
    part.weight, part.bias = part.weight[start:end], None if part.bias is None else part.bias[start:end]
    return part.leaves(*requires), slice(start, end)


def scored(inputs, **options):
    return linear_logprob(inputs.hidden, inputs.weight, inputs.targets, bias=inputs.bias, **options)


def group():
    return distributed.group.WORLD


def gradient_of(outputs, inputs, seed=0):
    """Backward from made-up upstream gradients, some of them exactly zero."""
    g = torch.Generator().manual_seed(seed)
    shape = outputs[0].shape
    grads = [torch.randn(shape, generator=g, dtype=torch.float64).to(outputs[0].dtype) for _ in outputs]
    for grad in grads:
        grad[..., 3::4] = 0
    torch.autograd.backward(outputs, grads)
    return inputs.grads()


def assert_equal_part(shard, where, whole, check=assert_exact):
    check(shard["hidden"], whole["hidden"])
    for name in ("weight", "bias"):
        if whole[name] is not None:
            check(shard[name], whole[name][where])
            assert whole[name].any()


def close_to_1e_6(got, expected):
    assert got.dtype == expected.dtype == torch.float32
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6 * max(1.0, largest))


def without(split, options):
    """A named backend is refused with sets."""
    return {} if "support" in options and "backend" in split else split


def compare(rank, inputs, split="chunks", requires=EVERYTHING, check=assert_exact, **options):
    """Values and gradients of the split head are those of the whole one."""
    whole, (part, where) = inputs.leaves(*requires), shard_of(inputs, rank, split, requires)
    expected = scored(whole, **without({"backend": "chunked"}, options), **options)
    got = scored(part, process_group=group(), **options)
    outputs = [(a, b) for a, b in zip(got, expected, strict=True) if b is not None]
    for one, other in outputs:
        check(one, other) if one.is_floating_point() else torch.testing.assert_close(one, other)
    learning = [pair for pair in outputs if pair[1].requires_grad]
    grads = gradient_of([one for one, _ in learning], part)
    assert_equal_part(grads, where, gradient_of([one for _, one in learning], whole), check)


# Values and gradients.


def splits(rank):
    """Shards of unequal size, of one token, of none; 37 is a prime."""
    for split in SPLITS:
        compare(rank, gaussian(ROWS, SIZE, VOCABULARY), split, entropy=True)


def options_of_the_head(rank):
    heat = torch.rand(ROWS, dtype=torch.float64) + 0.5
    for options in (
        {"softcap": 3.0, "logit_scale": 0.5},
        {"softcap": 3.0, "memory": "recompute"},
        {"temperature": heat, "entropy": True, "memory": "recompute"},
        {"temperature": 0.7, "softcap": 4.0, "logit_scale": -1.5, "entropy": True},
    ):
        compare(rank, gaussian(ROWS, SIZE, VOCABULARY), **options)
    compare(rank, gaussian(ROWS, SIZE, VOCABULARY, bias=False))
    for ignore_index in (0, 3, VOCABULARY - 1):  # an id of some shard
        compare(rank, gaussian(ROWS, SIZE, VOCABULARY, ignored=False), ignore_index=ignore_index, entropy=True)


def rows_in_chunks(rank):
    before, chunked.CHUNK_BYTES = chunked.CHUNK_BYTES, 5 * 8 * VOCABULARY // world_of()
    for memory in ("store", "recompute"):
        compare(rank, gaussian(ROWS, SIZE, VOCABULARY), entropy=True, memory=memory)
    chunked.CHUNK_BYTES = before


def leading_shape(rank):
    inputs = gaussian(ROWS, SIZE, VOCABULARY)
    inputs.hidden, inputs.targets = inputs.hidden.view(4, 6, SIZE), inputs.targets.view(4, 6)
    compare(rank, inputs, entropy=True)


def padded_head(rank):
    """Rows that are no tokens: within a shard, and of a whole shard."""
    for vocab_size in (VOCABULARY - 1, 13, 11, 1):
        inputs = gaussian(ROWS, SIZE, VOCABULARY)
        inputs.targets = torch.where(inputs.targets == IGNORE, IGNORE, inputs.targets % vocab_size)
        if vocab_size > 1:
            compare(rank, inputs, vocab_size=vocab_size, entropy=True)
        part, where = shard_of(inputs, rank)
        scored(part, vocab_size=vocab_size, process_group=group()).logps.sum().backward()
        assert not part.weight.grad[max(vocab_size - where.start, 0) :].any()


def single_precision(rank):
    for split in SPLITS:
        compare(
            rank, gaussian(ROWS, 64, 501, dtype=torch.float32), split, check=close_to_1e_6, entropy=True, softcap=5.0
        )


def half_precision(rank):
    """Logits are never rounded to 16 bits: the values are those of float64 on the same inputs."""
    inputs = gaussian(ROWS, 64, 501).leaves(dtype=torch.bfloat16)
    whole, (part, where) = inputs.leaves(*EVERYTHING, dtype=torch.float64), shard_of(inputs, rank)
    expected, got = scored(whole, entropy=True), scored(part, entropy=True, process_group=group())
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=0, atol=2e-6)  # two roundings of a float32 of 8 to 16
    grads, exact = gradient_of(list(got), part), gradient_of(list(expected), whole)

    def rounded_once(one, other):
        assert one.dtype == torch.bfloat16
        assert ((one.double() - other).abs() <= 2**-8 * other.abs() + 1e-5 * other.abs().max()).all()

    assert_equal_part(grads, where, exact, rounded_once)


def what_needs_a_gradient(rank):
    """Only what needs one gets one; only the gradient of hidden is sent."""
    for requires in (("hidden",), ("weight",), ("hidden", "bias"), ("bias",)):
        inputs = gaussian(ROWS, SIZE, VOCABULARY)
        whole, (part, where) = inputs.leaves(*requires), shard_of(inputs, rank, requires=requires)
        with counted() as sent:
            grads = gradient_of(list(scored(part, entropy=True, process_group=group())), part)
        assert (len(sent["all_reduce"]) == 1) == ("hidden" in requires)
        expected = gradient_of(list(scored(whole, entropy=True)), whole)
        for name, one in expected.items():
            assert (grads[name] is None) == (one is None) == (name not in requires)
            if one is not None:
                assert_exact(grads[name], one if name == "hidden" else one[where])
    with torch.no_grad():
        assert not scored(shard_of(inputs, rank)[0], process_group=group()).logps.requires_grad


def outputs_without_gradient(rank):
    asked = {"log_sum_sq_probs": True, "mean_logits": True, "is_top1": True}
    inputs = gaussian(ROWS, SIZE, VOCABULARY)
    inputs.targets[::2] = dense_logits(inputs)[::2].argmax(-1)
    for split in SPLITS:
        for entropy in (False, True):
            compare(rank, inputs, split, entropy=entropy, **asked)
    assert scored(inputs, **asked).is_top1.any()
    # The first of equal logits counts, whichever rank has it.
    inputs.weight[:], inputs.bias[:] = 0, 0
    inputs.targets[0], inputs.targets[2] = 0, bounds("chunks", world_of())[-1][0]
    top1 = scored(shard_of(inputs, rank)[0], process_group=group(), is_top1=True).is_top1
    assert (top1[0], top1[2]) == (True, False)


def every_shard_learns(rank):
    """ms-swift #9947: a plain all_reduce of the target's logit gave shards without it no gradient."""
    inputs = gaussian(ROWS, SIZE, VOCABULARY, ignored=False)
    inputs.targets[:] = VOCABULARY - 1  # on the last rank
    part, where = shard_of(inputs, rank)
    scored(part, process_group=group()).logps.sum().backward()
    p = dense_logits(inputs).softmax(-1)
    one_hot = torch.zeros_like(p).index_fill_(1, torch.tensor(VOCABULARY - 1), 1)
    assert_exact(part.bias.grad, (one_hot - p).sum(0)[where])
    assert (part.bias.grad != 0).all()


# Support sets.


def support_sets(rank):
    """Sets that a rank has all of, a part, or nothing; narrow and wide."""
    for vocabulary, softcap in ((VOCABULARY, None), (2000, 3.0)):
        inputs = gaussian(ROWS, SIZE, vocabulary)
        support = csr(random_sets(inputs))
        for split in SPLITS:
            compare(rank, inputs, split, support=support, entropy=True, softcap=softcap, temperature=0.7)
    alone = csr([[] if one == IGNORE else [one] for one in inputs.targets.tolist()])
    assert not scored(shard_of(inputs, rank)[0], support=alone, process_group=group()).logps.any()
    padded = gaussian(ROWS, SIZE, VOCABULARY)
    padded.targets = torch.where(padded.targets == IGNORE, IGNORE, padded.targets % 13)
    sets = csr([[] if one == IGNORE else [one, *({0, 5, 12} - {one})] for one in padded.targets.tolist()])
    compare(rank, padded, support=sets, entropy=True, vocab_size=13)


# Losses.


def loss_inputs(rank):
    inputs = gaussian(ROWS, SIZE, VOCABULARY)
    old = scored(inputs).logps + 0.3 * torch.randn(ROWS, dtype=torch.float64)
    mask = torch.rand(ROWS) < 0.8
    return inputs, old, mask


def same_loss(rank, inputs, loss_of, **split):
    """The loss and its gradients are those of one process; `loss_of` takes inputs and options."""
    whole, (part, where) = inputs.leaves(*EVERYTHING), shard_of(inputs, rank)
    expected, got = loss_of(whole, {"backend": "chunked"}), loss_of(part, {"process_group": group(), **split})
    assert_exact(got.loss.detach(), expected.loss.detach())
    assert got.metrics.keys() == expected.metrics.keys()
    for name, pair in expected.metrics.items():
        for one, other in zip(got.metrics[name], pair, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    expected.loss.backward()
    got.loss.backward()
    assert_equal_part(part.grads(), where, whole.grads())
    return got, expected


def policy_losses(rank):
    inputs, old, mask = loss_inputs(rank)
    sets = csr(random_sets(inputs))
    bounds_of_two = {"cu_seqlens": torch.tensor([0, 10, ROWS])}
    for spec, options in (
        (PolicyLoss(surrogate=Clip(0.2, 0.2), kl=KL("k3", 0.1), aggregate="token_mean", entropy_coef=0.01), {}),
        (PolicyLoss(surrogate=Clip(0.2, 0.28), aggregate="token_mean"), {"metrics": False, "support": sets}),
        (PolicyLoss(ratio="sequence", surrogate=Clip(0.2, 0.2)), bounds_of_two),
        (presets.DAPO, {**bounds_of_two, "entropy": True, "temperature": 0.7, "softcap": 3.0, "memory": "recompute"}),
    ):
        advantages = torch.randn(2 if "cu_seqlens" in options else ROWS, dtype=torch.float64)
        if not options.get("metrics", True):
            advantages[:6] = 0  # rows that are left out

        def loss_of(one, split, spec=spec, options=options, advantages=advantages):
            named = {"mask": mask, "old_logps": old, "ref_logps": old.roll(1), **options}
            return linear_policy_loss(
                one.hidden, one.weight, one.targets, advantages, spec, bias=one.bias, **named, **without(split, options)
            )

        got, expected = same_loss(rank, inputs, loss_of)
        assert_exact(got.logps, expected.logps)
        assert (got.entropy is None) == (expected.entropy is None)


def token_losses(rank):
    inputs, old, mask = loss_inputs(rank)
    weights = mask / 7.0

    def loss_of(one, split, entropy=False):
        def token_loss(logps, *rest):
            return (logps - rest[-1]).square() - (rest[0] if entropy else 0)

        return linear_token_loss(
            one.hidden, one.weight, one.targets, token_loss, bias=one.bias, weights=weights, context=(old,),
            entropy=entropy, logit_scale=0.5, **split,
        )  # fmt: skip

    same_loss(rank, inputs, loss_of)
    same_loss(rank, inputs, partial(loss_of, entropy=True), memory=0)


def preference_losses(rank):
    """DPO with WPO's weights, from the hidden states of both answers."""
    inputs, _, _ = loss_inputs(rank)
    inputs.targets.clamp_(min=0)
    ref = scored(inputs).logps.view(4, 6).roll(1, 0)
    mask = torch.ones(2, 6, dtype=torch.bool)
    spec = fastrl.PreferenceLoss(weighting="wpo", beta=0.3)

    def loss_of(one, split):
        out = scored(one, log_sum_sq_probs=True, **split)
        (chosen, rejected), (first, second) = (x.view(2, 2, 6) for x in (out.logps, out.log_sum_sq_probs))
        return fastrl.preference_loss(
            chosen, rejected, spec, chosen_mask=mask, rejected_mask=mask, ref_chosen_logps=ref[:2],
            ref_rejected_logps=ref[2:], chosen_log_sum_sq_probs=first, rejected_log_sum_sq_probs=second,
        )  # fmt: skip

    same_loss(rank, inputs, loss_of)


def fused_head(rank):
    """A FusedLMHead of this rank's layer."""
    inputs, old, mask = loss_inputs(rank)
    part, _ = shard_of(inputs, rank)
    advantages, spec = torch.randn(ROWS, dtype=torch.float64), PolicyLoss(aggregate="token_mean")
    layer = torch.nn.Linear(SIZE, len(part.weight), dtype=torch.float64)
    layer.weight, layer.bias = torch.nn.Parameter(part.weight.detach()), torch.nn.Parameter(part.bias.detach())
    head = FusedLMHead(layer, softcap=3.0, vocab_size=VOCABULARY - 1)
    inputs.targets.clamp_(max=VOCABULARY - 2)
    part.targets = inputs.targets
    whole, named = inputs.leaves(*EVERYTHING), {"mask": mask, "old_logps": old}
    expected = linear_policy_loss(
        whole.hidden, whole.weight, whole.targets, advantages, spec, bias=whole.bias, softcap=3.0,
        vocab_size=VOCABULARY - 1, **named,
    ).loss  # fmt: skip
    expected.backward()
    got = head.policy_loss(part.hidden, part.targets, advantages, spec, process_group=group(), **named).loss
    got.backward()
    assert_exact(got.detach(), expected.detach())
    assert_exact(part.hidden.grad, whole.hidden.grad)
    assert_exact(layer.weight.grad, whole.weight.grad[bounds("chunks", world_of())[rank][0] :][: len(part.weight)])


# Rows without anything to do.


def nothing_to_do(rank):
    """No row with a target, no row at all, no upstream gradient: everything is 0, and no rank waits for another."""
    inputs = gaussian(ROWS, SIZE, VOCABULARY)
    inputs.targets[:] = IGNORE
    inputs.hidden[0] = torch.nan
    empty = gaussian(0, SIZE, VOCABULARY)
    silent = gaussian(ROWS, SIZE, VOCABULARY)
    for one, factor in ((inputs, 1), (empty, 1), (silent, 0)):
        part, _ = shard_of(one, rank)
        out = scored(part, entropy=True, process_group=group())
        (factor * (out.logps.sum() + out.entropy.sum())).backward()
        assert out.logps.shape == one.targets.shape
        assert all(not grad.any() for grad in part.grads().values())
        assert factor == 0 or not out.logps.any()
    compare(rank, gaussian(ROWS, SIZE, VOCABULARY))  # and the next call finds all ranks together


def ignored_rows_are_not_read(rank):
    inputs = gaussian(ROWS, SIZE, VOCABULARY)
    inputs.hidden[inputs.targets == IGNORE] = torch.nan
    part, _ = shard_of(inputs, rank)
    out = scored(part, entropy=True, process_group=group())
    (out.logps + out.entropy).sum().backward()
    assert all(torch.isfinite(grad).all() for grad in part.grads().values())
    assert not part.hidden.grad[inputs.targets == IGNORE].any()


# Extreme logits.


def extremes(rank):
    """Shards of logits that are all -inf, targets at -inf, peaked and huge logits; a bad row is bad alone."""
    start, end = bounds("chunks", world_of())[0]
    inputs = gaussian(ROWS, SIZE, VOCABULARY)
    inputs.bias[start:end] = -math.inf
    inputs.targets = torch.where(inputs.targets == IGNORE, IGNORE, inputs.targets.clamp(min=end))
    for memory in ("store", "recompute"):
        compare(rank, inputs, entropy=True, memory=memory)
        dead = replace(inputs, targets=inputs.targets.clone())
        dead.targets[0] = 0  # log-probability -inf, with a finite gradient
        part, where = shard_of(dead, rank)
        out = scored(part, entropy=True, process_group=group(), memory=memory)
        assert out.logps[0] == -math.inf
        assert torch.isfinite(out.entropy).all()
        grads = gradient_of(list(out), part)
        whole = dead.leaves(*EVERYTHING)
        assert_equal_part(grads, where, gradient_of(list(scored(whole, entropy=True, backend="reference")), whole))
    inputs.bias[:] = -math.inf  # no shard is left: NaN, as in one process
    for one in scored(shard_of(inputs, rank)[0], entropy=True, process_group=group()):
        assert torch.equal(one.isnan(), inputs.targets != IGNORE)
    peaked = gaussian(ROWS, SIZE, VOCABULARY, dtype=torch.float32)
    for size in (30.0, 3e3):
        peaked.bias = size * torch.randn(VOCABULARY)
        peaked.targets[:8] = dense_logits(peaked)[:8].argmax(-1)
        compare(rank, peaked, check=close_to_1e_6, entropy=True)
    broken = gaussian(ROWS, SIZE, VOCABULARY, ignored=False)
    good = scored(shard_of(broken, rank)[0], entropy=True, process_group=group())
    broken.hidden[5] = torch.nan
    bad = scored(shard_of(broken, rank)[0], entropy=True, process_group=group())
    for one, other in zip(bad, good, strict=True):
        assert one[5].isnan()
        assert torch.equal(one[6:], other[6:])


def never_above_zero(rank):
    """veRL #2656: log-probabilities of up to +123."""
    inputs = gaussian(200, SIZE, VOCABULARY, dtype=torch.float32)
    inputs.hidden *= 40
    out = scored(shard_of(inputs, rank)[0], entropy=True, process_group=group())
    assert (out.logps <= 0).all()
    assert ((out.entropy >= 0) & (out.entropy <= math.log(VOCABULARY) + 1e-5)).all()


# The same on all ranks, and again.


def bits_are_equal(rank):
    """apple/ml-cross-entropy #42: the gradient of hidden differed between ranks."""
    inputs = gaussian(200, 64, 501, dtype=torch.float32)
    runs = []
    for _ in range(2):
        part, _ = shard_of(inputs, rank)
        out = scored(part, entropy=True, process_group=group())
        grads = gradient_of(list(out), part)
        runs.append([out.logps.detach(), out.entropy.detach(), grads["hidden"], grads["weight"]])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
    for mine in runs[0][:3]:
        every = [torch.empty_like(mine) for _ in range(world_of())]
        distributed.all_gather(every, mine)
        assert all(torch.equal(mine, theirs) for theirs in every)


def backward_twice(rank):
    inputs = gaussian(ROWS, SIZE, VOCABULARY)
    whole, (part, _) = inputs.leaves(*EVERYTHING), shard_of(inputs, rank)
    for one, options in ((whole, {}), (part, {"process_group": group()})):
        loss = scored(one, **options).logps.sum()
        loss.backward(retain_graph=True)
        (3 * loss).backward()
    assert_exact(part.hidden.grad, whole.hidden.grad)
    part, _ = shard_of(inputs, rank)
    (grad,) = torch.autograd.grad(scored(part, process_group=group()).logps.sum(), part.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^linear_logprob: expected a first derivative"):
        grad.sum().backward()


def subgroups(rank):
    """A rank's place in the group counts, not its place in the world."""
    ranks = [0, world_of() - 1]
    pair = distributed.new_group(ranks)
    inputs = gaussian(ROWS, SIZE, VOCABULARY)
    if rank not in ranks:
        with pytest.raises(TypeError, match=r"process_group: expected a torch.distributed.ProcessGroup"):
            scored(inputs, process_group=pair)
        return
    start, end = [(0, 20), (20, VOCABULARY)][ranks.index(rank)]
    part = inputs.leaves()
    part.weight, part.bias = part.weight[start:end], part.bias[start:end]
    assert_exact(scored(part, process_group=pair).logps, scored(inputs).logps)


def one_rank(rank):
    """A group of one is no split: the same bits as without, and nothing is sent."""
    alone = [distributed.new_group([one]) for one in range(world_of())][rank]
    inputs = gaussian(ROWS, SIZE, VOCABULARY, dtype=torch.float32)
    with counted() as sent:
        out = scored(inputs, process_group=alone, entropy=True)
    assert not any(sent.values())
    assert torch.equal(out.logps, scored(inputs, entropy=True).logps)


# What it costs.


class counted:
    """Inside the block, the bytes that this rank gives to each collective."""

    def __enter__(self):
        self.before = {name: getattr(distributed, name) for name in ("all_gather", "all_reduce")}
        sent = {name: [] for name in self.before}

        def counting(name):
            def call(*args, **kwargs):
                given = args[1] if name == "all_gather" else args[0]
                sent[name].append(given.numel() * given.element_size())
                return self.before[name](*args, **kwargs)

            return call

        for name in self.before:
            setattr(distributed, name, counting(name))
        return sent

    def __exit__(self, *_):
        for name, function in self.before.items():
            setattr(distributed, name, function)


def traffic(rank):
    """A header and a few numbers per row that has a target, whatever the vocabulary; backward sends d hidden once."""
    for rows in (10, 40):
        for vocabulary in (37, 3000):
            for options, numbers in (({}, 3), ({"entropy": True}, 4), ({"entropy": True, "is_top1": True}, 7)):
                inputs = gaussian(rows, SIZE, vocabulary, dtype=torch.float32)
                part, _ = shard_of(inputs, rank)
                with counted() as sent:
                    out = scored(part, process_group=group(), **options)
                live = int((inputs.targets != IGNORE).sum())
                assert sent == {"all_gather": [HEADER, 4 * numbers * live], "all_reduce": []}
                with counted() as sent:
                    out.logps.sum().backward()
                assert sent == {"all_gather": [HEADER], "all_reduce": [4 * rows * SIZE]}


def matmuls(rank):
    """As many as one process takes: three with stored probabilities, four without, two with a frozen head."""
    inputs = gaussian(ROWS, SIZE, VOCABULARY, ignored=False)
    for requires, memory, count in (
        (EVERYTHING, "store", 3),
        (EVERYTHING, "auto", 3),
        (EVERYTHING, "recompute", 4),
        (("hidden",), "auto", 2),
        ((), "auto", 1),
    ):
        part, where = shard_of(inputs, rank, requires=requires)
        with MatmulFlops() as mode:
            out = scored(part, process_group=group(), memory=memory)
            if requires:
                out.logps.sum().backward()
        assert mode.flops == count * 2 * ROWS * SIZE * (where.stop - where.start)
    part, where = shard_of(inputs, rank)
    with MatmulFlops() as mode:
        linear_policy_loss(
            part.hidden, part.weight, part.targets, torch.ones(ROWS), PolicyLoss(aggregate="token_mean"),
            bias=part.bias, mask=torch.ones(ROWS, dtype=torch.bool), process_group=group(),
        ).loss.backward()  # fmt: skip
    assert mode.flops == 3 * 2 * ROWS * SIZE * (where.stop - where.start)


# Rows that are split, with and without the vocabulary.


def rows_over_ranks(rank):
    """Sequence and context parallelism: with the normalizer of all rows, the ranks' losses and gradients add up."""
    inputs, old, mask = loss_inputs(rank)
    advantages, whole = torch.randn(ROWS, dtype=torch.float64), inputs.leaves(*EVERYTHING)
    spec, world = PolicyLoss(aggregate="token_mean", entropy_coef=0.1), world_of()
    mine = slice(ROWS * rank // world, ROWS * (rank + 1) // world)
    live = mask & (inputs.targets != IGNORE)
    part = inputs.leaves()
    part.hidden, part.targets = part.hidden[mine], part.targets[mine]
    part = part.leaves(*EVERYTHING)
    expected = linear_policy_loss(
        whole.hidden, whole.weight, whole.targets, advantages, spec, bias=whole.bias, mask=mask, old_logps=old
    ).loss
    got = linear_policy_loss(
        part.hidden, part.weight, part.targets, advantages[mine], spec, bias=part.bias, mask=mask[mine],
        old_logps=old[mine], normalizer=float(live.sum()),
    ).loss  # fmt: skip
    expected.backward()
    got.backward()
    total = got.detach().clone()
    for one in (total, part.weight.grad, part.bias.grad):
        distributed.all_reduce(one)
    assert_exact(total, expected.detach())
    assert_exact(part.hidden.grad, whole.hidden.grad[mine])
    assert_exact(part.weight.grad, whole.weight.grad)
    assert_exact(part.bias.grad, whole.bias.grad)


# What is refused, on every rank.


def refused(error, message, rank, call=scored, change=None, on_rank_1=None):
    """Every rank raises; rank 1 has other inputs or options."""
    part, _ = shard_of(gaussian(ROWS, SIZE, VOCABULARY), rank)
    if change is not None and rank == 1:
        change(part)
    with pytest.raises(error, match=message):
        call(part, process_group=group(), **((on_rank_1 or {}) if rank == 1 else {}))


def disagreement(rank):
    def set_(**values):
        return lambda part: [setattr(part, name, value) for name, value in values.items()]

    def fewer(part):
        part.hidden, part.targets = part.hidden[1:], part.targets[1:]

    def other(part):
        part.targets = part.targets.roll(1)

    def narrow(part):
        part.hidden, part.weight, part.bias = part.hidden.float(), part.weight.float(), part.bias.float()

    say = partial(refused, ValueError, rank=rank)
    say(
        r"^linear_logprob: hidden: expected the same on every rank of process_group, got shape \(24, 8\) and dtype "
        r"torch.float64 on rank 0 and shape \(23, 8\) and dtype torch.float64 on rank 1\. Gather the rows",
        change=fewer,
    )
    say(r"hidden: .* torch.float64 on rank 0 and .* torch.float32 on rank 1", change=narrow)
    say(r"targets: .* of 24 ids with checksum -?\d+ on rank 0 and .* on rank 1", change=other)
    say(r"temperature: .* got 1 with sum 1.0 on rank 0 and 1 with sum 0.7 on rank 1", on_rank_1={"temperature": 0.7})
    say(r"softcap: .* got 0.0 on rank 0 and 3.0 on rank 1", on_rank_1={"softcap": 3.0})
    say(r"entropy: .* got False on rank 0 and True on rank 1", on_rank_1={"entropy": True})
    say(r"vocab_size: .* got None on rank 0 and 30 on rank 1", on_rank_1={"vocab_size": 30})
    say(r"bias: .* got True on rank 0 and False on rank 1", change=set_(bias=None))
    frozen = torch.zeros(ROWS, SIZE, dtype=torch.float64)
    say(r"hidden.requires_grad: .* got True on rank 0 and False on rank 1", change=set_(hidden=frozen))
    sets = csr([[one] for one in range(ROWS)])
    say(r"support: .* got None on rank 0 and 24 ids", on_rank_1={"support": sets})


def other_losses(rank):
    """A rank that derives another loss would add its own d hidden to that of the others."""
    inputs = gaussian(ROWS, SIZE, VOCABULARY)
    part, _ = shard_of(inputs, rank)
    mask, advantages = torch.ones(ROWS, dtype=torch.bool), torch.ones(ROWS, dtype=torch.float64)
    advantages[3] += 0.5 * rank
    loss = linear_policy_loss(
        part.hidden, part.weight, part.targets, advantages, PolicyLoss(aggregate="token_mean"), bias=part.bias,
        mask=mask, process_group=group(),
    ).loss  # fmt: skip
    with pytest.raises(
        ValueError, match=r"gradient of logps: expected a weighted sum .* got -\S+ on rank 0 and -\S+ on rank 1"
    ):
        loss.backward()
    part, _ = shard_of(inputs, rank)
    out = scored(part, entropy=True, process_group=group())
    with pytest.raises(ValueError, match=r"gradient of entropy: expected .* got \S+ on rank 0 and None on rank 1"):
        (out.logps.sum() + (out.entropy.sum() if rank == 0 else 0)).backward()
    ((1.0 + 1e-9 * rank) * scored(part, process_group=group()).logps.sum()).backward()  # rounded in another order


def refusals_of_one_rank(rank):
    """What one rank refuses by itself, the others hear of: they would wait for it."""

    def wrong(part):
        part.bias = part.bias[1:]

    told = r"^(linear_logprob: bias: expected shape|linear_logprob: process_group: expected the same call on every"
    told += r" rank, with arguments that each accepts, got an error on rank 1: ValueError: linear_logprob: bias: exp.*)"
    refused((ValueError, RuntimeError), told, rank, change=wrong)

    def policy(part, **options):
        mask = torch.ones(ROWS - (rank == 1), dtype=torch.bool)
        spec = PolicyLoss(aggregate="token_mean")
        linear_policy_loss(part.hidden, part.weight, part.targets, torch.ones(ROWS), spec, mask=mask, **options)

    refused((ValueError, RuntimeError), r"linear_policy_loss: mask: expected shape \(24,\)", rank, call=policy)

    def token(part, **options):
        weights = torch.ones(ROWS - (rank == 1))
        linear_token_loss(part.hidden, part.weight, part.targets, torch.neg, weights=weights, **options)

    refused((ValueError, RuntimeError), r"linear_token_loss: weights: expected shape \(24,\)", rank, call=token)
    part, _ = shard_of(gaussian(ROWS, SIZE, VOCABULARY), rank)
    loss = scored(part, process_group=group()).logps.sum()
    with pytest.raises(
        RuntimeError, match=r"process_group: expected the same call on every rank, .* got another call on"
    ):
        scored(part, process_group=group()) if rank == 1 else loss.backward()
    compare(rank, gaussian(ROWS, SIZE, VOCABULARY))  # and the next call finds all ranks together


def refusals_of_all(rank):
    inputs = gaussian(ROWS, SIZE, VOCABULARY)
    # Megatron-LM #7452: each rank with the whole head made the loss too large by log(ranks).
    with pytest.raises(ValueError, match=r"weight: expected other rows on every rank, got the same on ranks 0 and 1\."):
        scored(inputs, process_group=group())
    part, _ = shard_of(inputs, rank)
    part.targets[2] = VOCABULARY
    with pytest.raises(IndexError, match=r"expected ids in \[0, 37\) .* got 37 at row 2"):
        scored(part, process_group=group())
    part, _ = shard_of(gaussian(ROWS, SIZE, VOCABULARY), rank)
    for vocab_size in (0, 38):
        with pytest.raises(ValueError, match=r"vocab_size: expected 1 to 37, the rows of all ranks' weights, got"):
            scored(part, process_group=group(), vocab_size=vocab_size)
    with pytest.raises(ValueError, match=r"backend: expected 'auto' or 'chunked' with process_group, got 'cpu'"):
        scored(part, process_group=group(), backend="cpu")
    with pytest.raises(TypeError, match=r"process_group: expected a torch.distributed.ProcessGroup, got DeviceMesh\."):
        scored(part, process_group=distributed.device_mesh.init_device_mesh("cpu", (world_of(),)))
    mask, advantages = torch.ones(ROWS, dtype=torch.bool), torch.ones(ROWS, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"main_grad: expected None with process_group"):
        linear_policy_loss(
            part.hidden, part.weight, part.targets, advantages, PolicyLoss(aggregate="token_mean"), mask=mask,
            main_grad=torch.zeros_like(part.weight), process_group=group(),
        )  # fmt: skip
    missing = csr([[(one + 1) % VOCABULARY] if one >= 0 else [] for one in part.targets.tolist()])
    with pytest.raises(ValueError, match=r"support: expected the target in its row's set, got one without at row 0"):
        scored(part, process_group=group(), support=missing)


def sharded_tensors(rank):
    """A DTensor says how to go on, and what it says works."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = distributed.device_mesh.init_device_mesh("cpu", (world_of(),))
    inputs = gaussian(ROWS, SIZE, VOCABULARY, bias=False)
    weight = distribute_tensor(inputs.weight, mesh, [Shard(0)])
    fix = r"weight: expected a plain tensor, got a DTensor\. .* pass to_local\(\), and the mesh's get_group\(\) as"
    for options in ({}, {"process_group": group()}):
        with pytest.raises(TypeError, match=fix):
            linear_logprob(inputs.hidden, weight, inputs.targets, **options)
    got = linear_logprob(inputs.hidden, weight.to_local(), inputs.targets, process_group=mesh.get_group())
    assert_exact(got.logps, scored(inputs).logps)


def under_autocast(rank):
    inputs = gaussian(ROWS, SIZE, VOCABULARY, dtype=torch.float32)
    whole, (part, where) = inputs.leaves(*EVERYTHING), shard_of(inputs, rank)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = scored(whole, backend="chunked"), scored(part, process_group=group())
        close_to_1e_6(got.logps.detach(), expected.logps.detach())
    got.logps.sum().backward()
    expected.logps.sum().backward()
    assert part.weight.grad.dtype == torch.float32
    expected = whole.weight.grad[where]  # of sums of bfloat16 products: the order of the sums may round one otherwise
    torch.testing.assert_close(part.weight.grad, expected, rtol=2**-7, atol=2**-9 * expected.abs().max().item())


def under_compile(rank):
    """The split head is left out of the graph."""
    if world_of() > 2:
        return  # the compiler takes longer than all else
    inputs = gaussian(ROWS, SIZE, VOCABULARY, dtype=torch.float32)
    whole, (part, where) = inputs.leaves(*EVERYTHING), shard_of(inputs, rank)

    @torch.compile(backend="aot_eager")
    def loss_of(one, process_group):
        out = linear_logprob(one.hidden.tanh(), one.weight, one.targets, bias=one.bias, process_group=process_group)
        return out.logps.square().sum()

    loss_of(part, group()).backward()
    linear_logprob(whole.hidden.tanh(), whole.weight, whole.targets, bias=whole.bias).logps.square().sum().backward()
    assert_equal_part(part.grads(), where, whole.grads(), close_to_1e_6)


CASES = (
    splits, options_of_the_head, rows_in_chunks, leading_shape, padded_head, single_precision, half_precision,
    what_needs_a_gradient, outputs_without_gradient, every_shard_learns, support_sets, policy_losses, token_losses,
    preference_losses, fused_head, nothing_to_do, ignored_rows_are_not_read, extremes, never_above_zero, bits_are_equal,
    backward_twice, subgroups, one_rank, traffic, matmuls, rows_over_ranks, disagreement, other_losses,
    refusals_of_one_rank, refusals_of_all, sharded_tensors, under_autocast, under_compile,
)  # fmt: skip


def process(rank, world, folder):
    with gloo.process_group(rank, world, folder, seconds=20):
        gloo.run({case.__name__: case for case in CASES}, rank, folder)


@pytest.fixture(scope="module", params=[2, 3])
def outcomes(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    with contextlib.suppress(torch.multiprocessing.ProcessRaisedException):  # ranks that wait for one that failed
        torch.multiprocessing.spawn(process, (request.param, folder), nprocs=request.param)
    return folder, request.param


def said(path):
    return path.read_text() if path.exists() else "stopped before"


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_a_split_vocabulary_is_as_one_process_or_says_why_not(outcomes, case):
    folder, world = outcomes
    assert [said(folder / f"{case}.{rank}") for rank in range(world)] == [""] * world
