"""Bugs that other log-probability kernels had, one test each; the docstring links to the report."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from ops.cases import IGNORE, Inputs, dense, gaussian
from tolerance import assert_exact

from fastrl import KL, PolicyLoss, linear_logprob, linear_policy_loss, linear_token_loss, logprob
from fastrl.kernels.linear_logprob import chunked

MEMORY = pytest.mark.parametrize("memory", ["store", "recompute"])


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 3 * 37 * 8)
    monkeypatch.setattr(chunked, "VOCABULARY_TILE", 10)


@MEMORY
@pytest.mark.parametrize("first", ["weight zero", "ignored"])
def test_each_token_has_its_own_upstream_gradient(backend, memory, first, small_chunks):
    """Every row was scaled by the gradient of the first, so one ignored first token erased all gradients.

    https://github.com/linkedin/Liger-Kernel/pull/1298
    """
    inputs, weights = gaussian(8, 8, 37, ignored=False), torch.rand(8, dtype=torch.float64)
    if first == "ignored":
        inputs.targets[0] = IGNORE
    else:
        weights[0] = 0
    ours, theirs = inputs.leaves("hidden", "weight"), inputs.leaves("hidden", "weight")
    out = linear_logprob(ours.hidden, ours.weight, ours.targets, bias=ours.bias, memory=memory, backend=backend)
    (weights * out.logps).sum().backward()
    (weights * dense(theirs)[0]).sum().backward()
    assert_exact(ours.hidden.grad, theirs.hidden.grad)
    assert_exact(ours.weight.grad, theirs.weight.grad)
    assert (ours.weight.grad != 0).any()


@MEMORY
def test_a_head_trained_on_detached_hidden_states_gets_its_gradient(backend, memory):
    """The weight gradient was only computed when the hidden states took one too, and was None without an error.

    https://github.com/linkedin/Liger-Kernel/blob/main/src/liger_kernel/ops/fused_linear_cross_entropy.py
    """
    inputs = gaussian(8, 8, 37)
    ours, theirs = inputs.leaves("weight"), inputs.leaves("weight")
    linear_logprob(
        ours.hidden, ours.weight, ours.targets, bias=ours.bias, memory=memory, backend=backend
    ).logps.sum().backward()
    dense(theirs)[0].sum().backward()
    assert_exact(ours.weight.grad, theirs.weight.grad)


def test_a_second_backward_is_not_scaled_by_the_first(backend):
    """Gradients saved in the forward pass were scaled in place, so the second backward scaled them again.

    https://github.com/linkedin/Liger-Kernel/blob/main/src/liger_kernel/ops/fused_linear_cross_entropy.py
    """
    inputs = gaussian(8, 8, 37).leaves("hidden", "weight")
    loss = linear_token_loss(
        inputs.hidden, inputs.weight, inputs.targets, torch.neg, weights=torch.ones(8), backend=backend
    ).loss
    (3 * loss).backward(retain_graph=True)
    three_times = [inputs.hidden.grad.clone(), inputs.weight.grad.clone()]
    loss.backward()
    for grad, thrice in zip((inputs.hidden.grad, inputs.weight.grad), three_times, strict=True):
        torch.testing.assert_close(grad, thrice * 4 / 3)


@pytest.mark.parametrize(("vocabulary", "masked"), [(3000, 1024), (40_000, 32_768)], ids=["TRL", "Liger"])
def test_a_masked_first_block_equals_dense(backend, vocabulary, masked):
    """The running maximum of the first block was -inf, and -inf - -inf is NaN.

    https://github.com/huggingface/trl/blob/main/trl/kernels/logprob_entropy.py
    https://github.com/linkedin/Liger-Kernel/blob/main/src/liger_kernel/ops/cross_entropy.py
    """
    z = torch.randn(2, vocabulary, dtype=torch.float64)
    z[:, :masked] = -math.inf
    targets = torch.tensor([masked, vocabulary - 1])
    ours, tail = z.clone().requires_grad_(), z[:, masked:].clone().requires_grad_()
    out = logprob(ours, targets, entropy=True, backend=backend)
    log_p = tail.log_softmax(-1)
    expected = log_p.gather(-1, (targets - masked)[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    assert_exact(out.logps, expected[0])
    assert_exact(out.entropy, expected[1])
    (out.logps + out.entropy).sum().backward()
    (expected[0] + expected[1]).sum().backward()
    assert_exact(ours.grad[:, masked:], tail.grad)
    assert (ours.grad[:, :masked] == 0).all()


@pytest.mark.parametrize(
    ("row", "dtype", "expected"),
    [
        ([0.0, -math.inf], torch.float32, 0.0),
        ([65504.0, -65504.0], torch.float16, 0.0),
        ([0.0, 0.0, -math.inf], torch.float32, math.log(2)),
        ([0.0, 0.0, -math.inf], torch.bfloat16, math.log(2)),
    ],
    ids=str,
)
def test_an_impossible_token_adds_nothing_to_the_entropy(backend, row, dtype, expected):
    """0 * -inf is NaN, in the entropy and in its gradient.

    https://github.com/huggingface/trl/issues/7221
    """
    z = torch.tensor([row], dtype=dtype, requires_grad=True)
    out = logprob(z, torch.zeros(1, dtype=torch.int64), entropy=True, backend=backend)
    torch.testing.assert_close(out.entropy, torch.tensor([expected]))
    out.entropy.sum().backward()
    torch.testing.assert_close(z.grad, torch.zeros_like(z))


@MEMORY
def test_a_likely_target_keeps_its_small_gradient_in_bfloat16(backend, memory):
    """p was rounded to bfloat16 before 1 was subtracted: 1 - 2^-10 became 1, and the gradient 0 instead of -9.8e-4.

    https://github.com/fla-org/flash-linear-attention/pull/1231
    """
    z = torch.tensor([math.log(1023.0), 0.0])
    bias = z.bfloat16().requires_grad_()
    hidden, weight = torch.zeros(1, 1).bfloat16(), torch.zeros(2, 1).bfloat16()
    target = torch.zeros(1, dtype=torch.int64)
    out = linear_logprob(hidden, weight, target, bias=bias, memory=memory, backend=backend)
    out.logps.neg().sum().backward()
    exact = bias.detach().double().softmax(-1)[0] - 1
    assert -1.1e-3 < exact < -9e-4
    torch.testing.assert_close(bias.grad[0].double(), exact, rtol=2**-8, atol=0)


def test_logits_are_not_rounded_before_the_entropy(backend, monkeypatch):
    """Each vocabulary chunk of h W^T was rounded to bfloat16, which lowers the entropy on average.

    https://github.com/huggingface/trl/blob/main/trl/kernels/chunked_logprob.py
    """
    monkeypatch.setattr(chunked, "VOCABULARY_TILE", 128)
    inputs = gaussian(512, 64, 1024, bias=False, ignored=False, dtype=torch.float32).leaves(dtype=torch.bfloat16)
    truth = dense(inputs.leaves(dtype=torch.float64))[1]
    rounded = dense(inputs, upcast=torch.float32)[1].double() - truth
    ours = linear_logprob(inputs.hidden, inputs.weight, inputs.targets, entropy=True, backend=backend).entropy - truth
    assert ours.abs().max() < rounded.abs().max() / 100
    assert ours.mean().abs() < rounded.mean().abs() / 10 + 4 * ours.std() / 512**0.5


@pytest.mark.parametrize("size", [1.0, 30.0, 1000.0])
def test_no_logp_is_positive(backend, size):
    """A fused kernel returned log-probabilities of up to +123.

    https://github.com/verl-project/verl/issues/2656
    """
    inputs = gaussian(64, 32, 257, ignored=False, dtype=torch.float32)
    hidden, weight = (size * inputs.hidden).bfloat16(), inputs.weight.bfloat16()
    inputs.targets[:32] = (hidden.float() @ weight.float().T).argmax(-1)[:32]
    out = linear_logprob(hidden, weight, inputs.targets, entropy=True, backend=backend)
    assert (out.logps <= 0).all()
    assert ((out.entropy >= 0) & (out.entropy <= math.log(257) + 1e-5)).all()
    expected = dense(Inputs(hidden.double(), weight.double(), inputs.targets))
    rounding = torch.finfo(torch.float32).eps * (hidden.float() @ weight.float().T).abs().max().item()  # of a logit
    for got, want in zip(out, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=4 * rounding)


@pytest.mark.skipif(sys.platform != "linux", reason="relies on memory that is mapped when first written")
def test_rows_that_start_beyond_two_to_the_31_elements_are_read_where_they_are(backend):
    """Offsets of rows overflowed 32 bits. Three rows, 2^30 elements apart, in memory of which only they are touched.

    https://github.com/linkedin/Liger-Kernel/issues/803
    https://github.com/Dao-AILab/flash-attention/pull/1500
    """
    vocabulary, rows = 50, torch.randn(3, 50).bfloat16()
    buffer = torch.empty(2**31 + vocabulary, dtype=torch.bfloat16)
    z = buffer.as_strided((3, vocabulary), (2**30, 1))
    z.copy_(rows)
    targets = torch.tensor([0, 49, 25])
    far, near = z.requires_grad_(), rows.clone().requires_grad_()
    outputs = []
    for x in (far, near):
        out = logprob(x, targets, entropy=True, backend=backend)
        (grad,) = torch.autograd.grad((out.logps + out.entropy).sum(), x)
        outputs.append((out.logps.detach(), out.entropy.detach(), grad))
    for got, want in zip(*outputs, strict=True):
        assert torch.equal(got, want)


@MEMORY
def test_each_chunk_reads_its_own_labels(backend, memory, small_chunks):
    """A chunk read the labels of another, and ignore_index was accepted but not used.

    https://github.com/linkedin/Liger-Kernel/pull/330
    https://github.com/linkedin/Liger-Kernel/pull/974
    """
    inputs = gaussian(11, 8, 37, ignored=False)  # chunks of 3, 3, 3 and 2 rows
    inputs.targets = torch.arange(11)
    inputs.targets[7] = 36
    ours, theirs = inputs.leaves("hidden", "weight", "bias"), inputs.leaves("hidden", "weight", "bias")
    out = linear_logprob(
        ours.hidden, ours.weight, ours.targets, bias=ours.bias, ignore_index=36, memory=memory, backend=backend
    )
    logps = dense(theirs, ignore_index=36)[0]
    assert_exact(out.logps, logps)
    out.logps.square().sum().backward()
    logps.square().sum().backward()
    for got, want in zip(ours.grads().values(), theirs.grads().values(), strict=True):
        assert_exact(got, want)


def test_a_column_of_weights_is_refused_instead_of_broadcast(backend):
    """A metric multiplied (B,) by (B, 1) and summed a (B, B) square.

    https://github.com/huggingface/trl/pull/7059
    """
    inputs, weights = gaussian(3, 8, 37, ignored=False), torch.rand(3, dtype=torch.float64)
    arguments = (inputs.hidden, inputs.weight, inputs.targets, torch.neg)
    memory = 2 * 37 * 8  # chunks of two rows
    with pytest.raises(ValueError, match=r"weights: expected shape \(3,\) as targets, got \(3, 1\)"):
        linear_token_loss(*arguments, weights=weights[:, None], memory=memory, backend=backend)
    out = linear_token_loss(*arguments, weights=weights, memory=memory, backend=backend)
    logps = dense(Inputs(inputs.hidden, inputs.weight, inputs.targets))[0]
    assert_exact(out.loss, -(weights * logps).sum())
    assert_exact(out.metrics["logps"][0], logps.sum())
    assert out.metrics["logps"][1] == 3


@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_one_temperature_everywhere_makes_the_on_policy_ratio_one(backend, temperature):
    """The sampler divided the logits by the temperature and the trainer did not; ratios of 2 were seen on-policy.

    https://github.com/huggingface/trl/issues/4159
    """
    inputs = gaussian(60, 32, 101, bias=False, ignored=False, dtype=torch.float32).leaves(dtype=torch.bfloat16)
    z = inputs.hidden.float() @ inputs.weight.float().T
    sampled = (z / temperature).log_softmax(-1).gather(-1, inputs.targets[:, None])[:, 0]
    per_token = torch.full((60,), temperature)
    for t in (temperature, torch.tensor(temperature), per_token):
        for logps in (
            logprob(z, inputs.targets, temperature=t, backend=backend).logps,
            linear_logprob(inputs.hidden, inputs.weight, inputs.targets, temperature=t, backend=backend).logps,
        ):
            torch.testing.assert_close((logps - sampled).exp(), torch.ones(60), rtol=0, atol=1e-5)
        out = linear_policy_loss(
            inputs.hidden,
            inputs.weight,
            inputs.targets,
            torch.ones(60),
            PolicyLoss(aggregate="token_mean", kl=KL("k3", 0.1)),
            mask=torch.ones(60, dtype=torch.bool),
            old_logps=sampled,
            ref_logps=sampled,
            temperature=t,
            backend=backend,
        )
        assert out.metrics["ratio/max"][0] == pytest.approx(1, abs=1e-5)
        assert out.metrics["kl"][0] < 1e-8
        assert out.metrics["clip_ratio/high_mean"][0] == 0
