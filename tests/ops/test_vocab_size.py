"""Rows of the head that only pad it: the ops with `vocab_size` are the ops on the rows before."""

from __future__ import annotations

import pytest
import torch
from backends import BACKENDS, using
from ops.cases import IGNORE, gaussian
from tolerance import assert_exact

from fastrl import FusedLMHead, linear_logprob, linear_policy_loss, linear_token_loss
from fastrl.spec import PolicyLoss

TOKENS, ROWS = 29, 37  # of 37 rows, 29 are tokens


def inputs():
    torch.manual_seed(0)
    made = gaussian(11, 8, ROWS)
    made.targets[made.targets != IGNORE] %= TOKENS
    made.weight[TOKENS:] *= 30  # rows that would take all of the probability
    return made


def of_the_tokens(leaves):
    """The same leaves without what pads."""
    return leaves.weight[:TOKENS], leaves.bias[:TOKENS]


@pytest.mark.parametrize("memory", ["store", "recompute"])
@pytest.mark.parametrize("name", BACKENDS)
def test_log_probabilities_entropy_and_gradients_leave_padding_rows_out(name, memory):
    ours, theirs = (inputs().leaves("hidden", "weight", "bias") for _ in range(2))
    weight, bias = of_the_tokens(theirs)
    with using(name) as backend:
        options = {"entropy": True, "memory": memory, "backend": backend}
        out = linear_logprob(ours.hidden, ours.weight, ours.targets, bias=ours.bias, vocab_size=TOKENS, **options)
        expected = linear_logprob(theirs.hidden, weight, theirs.targets, bias=bias, **options)
        assert torch.equal(out.logps, expected.logps)
        assert torch.equal(out.entropy, expected.entropy)
        for one in (out, expected):
            (one.logps.sum() + 0.3 * one.entropy.sum()).backward()
    for got, wanted in zip(ours.grads().values(), theirs.grads().values(), strict=True):
        assert torch.equal(got, wanted)
    assert not ours.weight.grad[TOKENS:].any()
    z = (ours.hidden @ ours.weight.T + ours.bias).detach()[:, :TOKENS]
    live = ours.targets != IGNORE
    plain = z.log_softmax(-1).gather(-1, ours.targets.clamp(min=0)[:, None])[:, 0]
    assert_exact(out.logps[live], plain[live])


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", BACKENDS)
def test_the_policy_loss_leaves_padding_rows_out_and_their_gradient_as_it_was(name, in_place):
    ours, theirs = (inputs().leaves("hidden", "weight", "bias") for _ in range(2))
    weight, bias = of_the_tokens(theirs)
    advantages, spec = torch.randn(11, dtype=torch.float64), PolicyLoss(aggregate="token_mean")
    main = torch.full((ROWS, 8), 2.0, dtype=torch.float64) if in_place else None
    rest = {"mask": torch.ones(11, dtype=torch.bool)}
    with using(name) as backend:
        out = linear_policy_loss(
            *(ours.hidden, ours.weight, ours.targets, advantages, spec),
            **(rest | {"bias": ours.bias, "vocab_size": TOKENS, "main_grad": main, "backend": backend}),
        )
        expected = linear_policy_loss(
            *(theirs.hidden, weight, theirs.targets, advantages, spec), **(rest | {"bias": bias, "backend": backend})
        )
    assert_exact(out.loss, expected.loss)
    out.loss.backward()
    expected.loss.backward()
    assert_exact(ours.hidden.grad, theirs.hidden.grad)
    assert_exact(ours.bias.grad, theirs.bias.grad)
    if in_place:
        assert ours.weight.grad is None
        assert_exact(main, theirs.weight.grad + 2.0)
        assert (main[TOKENS:] == 2.0).all()
    else:
        assert_exact(ours.weight.grad, theirs.weight.grad)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_loss_of_ones_own_and_the_module_leave_padding_rows_out(name):
    ours = inputs()
    ones = torch.ones(11, dtype=torch.float64)
    head = torch.nn.Linear(8, ROWS, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(ours.weight)
        head.bias.copy_(ours.bias)
    with using(name) as backend:
        expected = linear_logprob(
            ours.hidden, ours.weight[:TOKENS], ours.targets, bias=ours.bias[:TOKENS], backend=backend
        ).logps
        loss = linear_token_loss(
            *(ours.hidden, ours.weight, ours.targets, torch.neg),
            **{"weights": ones, "bias": ours.bias, "vocab_size": TOKENS, "backend": backend},
        ).loss
        module = FusedLMHead(head, vocab_size=TOKENS)(ours.hidden, ours.targets, backend=backend).logps
    assert_exact(loss, -expected.sum())
    assert torch.equal(module, expected)


@pytest.mark.parametrize("vocab_size", [0, ROWS + 1, -1])
def test_a_vocabulary_that_the_head_does_not_have_is_refused(vocab_size):
    ours = inputs()
    with pytest.raises(ValueError, match=rf"vocab_size: expected 1 to {ROWS}, the rows of weight, got {vocab_size}"):
        linear_logprob(ours.hidden, ours.weight, ours.targets, vocab_size=vocab_size)


def test_a_target_that_is_no_token_is_out_of_range():
    ours = inputs()
    ours.targets[0] = TOKENS
    with pytest.raises(IndexError):
        linear_logprob(ours.hidden, ours.weight, ours.targets, vocab_size=TOKENS, backend="reference")
