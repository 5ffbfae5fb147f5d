"""Every op and loss under torch.compile with inductor: no graph break, the numbers of eager mode, and no second
compilation for another batch size but where it is named."""

from __future__ import annotations

import pytest
import torch
from backends import DEVICE
from torch._dynamo.testing import CompileCounterWithBackend

from fastrl import (
    GroupAdvantage,
    gae,
    group_advantages,
    group_policy_loss,
    linear_logprob,
    linear_policy_loss,
    linear_token_loss,
    logprob,
    policy_loss,
    preference_loss,
    presets,
    reward_model_loss,
    unpaired_preference_loss,
    value_loss,
)

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="tensors are made on the CPU here")

H, V, T = 8, 37, 6


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    """inductor's cache on disk knows an operator by its name alone: what another version left there is not found."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()


def targets(rows):
    return torch.randint(V, (rows, T)).masked_fill(torch.rand(rows, T) < 0.2, -100)


def numbers(rows, *shape):
    return torch.randn(rows, *(shape or (T,)))


def mask(rows):
    return torch.arange(T) < torch.arange(rows).unsqueeze(1) % T + 1


def head(rows):
    """hidden and weight, which take gradients, and the ids."""
    return (numbers(rows, T, H).requires_grad_(), torch.randn(V, H).requires_grad_()), (targets(rows),)


def of_head(hidden, weight, ids):
    out = linear_logprob(hidden, weight, ids, entropy=True, log_sum_sq_probs=True, is_top1=True)
    return out.logps, out.entropy, out.log_sum_sq_probs, out.is_top1


def of_sets(hidden, weight, ids, kept, offsets):
    out = linear_logprob(hidden, weight, ids, support=(kept, offsets), entropy=True)
    return out.logps, out.entropy


def sets(rows):
    ids = torch.randint(V - 5, (rows, T))
    kept = (ids.view(-1, 1) + torch.arange(5)).reshape(-1)
    return head(rows)[0], (ids, kept, torch.arange(rows * T + 1) * 5)


def policy(rows):
    return (numbers(rows).requires_grad_(),), (numbers(rows, 1)[:, 0], mask(rows), numbers(rows), numbers(rows))


def of_policy(spec):
    def run(logps, advantages, mask, old, ref):
        out = policy_loss(logps, advantages, spec, mask=mask, old_logps=old, ref_logps=ref)
        return out.loss, *(value for pair in out.metrics.values() for value in pair)

    return run


def of_groups(logps, rewards, mask, old, ref):
    given = {"mask": mask, "old_logps": old, "ref_logps": ref, "group_size": 2}
    return (group_policy_loss(logps, rewards, GroupAdvantage(), presets.GRPO, **given).loss,)


def of_linear_policy(hidden, weight, ids, advantages, mask, old, ref):
    given = {"mask": mask, "old_logps": old, "ref_logps": ref}
    return (linear_policy_loss(hidden, weight, ids, advantages, presets.GRPO, **given).loss,)


def of_pairs(chosen, rejected, mask, ref_chosen, ref_rejected):
    masks = {"chosen_mask": mask, "rejected_mask": mask}
    given = {"ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected}
    return (preference_loss(chosen, rejected, presets.DPO, **masks, **given).loss,)


def of_answers(logps, labels, mask, ref):
    given = {"ref_logps": ref, "mask": mask, "kl": 0.1}
    return (unpaired_preference_loss(logps, labels, presets.KTO, **given).loss,)


def of_logits(logits, ids, temperature):
    out = logprob(logits, ids, temperature=temperature, entropy=True)
    return out.logps, out.entropy


# What runs; the tensors that take gradients, and the constants, of a number of rows. The first group is our operators
# alone, which inductor calls as they are, and sums of theirs; of the second it compiles formulas of its own.
OURS = {
    "linear_logprob": (of_head, head),
    "linear_logprob of sets": (of_sets, sets),
    "logprob": (of_logits, lambda rows: ((numbers(rows, T, V).requires_grad_(),), (targets(rows), 0.7))),
    "gae": (lambda r, v, m: gae(r, v, m, gamma=0.9), lambda rows: ((), (numbers(rows), numbers(rows), mask(rows)))),
    "group_advantages": (
        lambda rewards: (group_advantages(rewards, group_size=2),),
        lambda rows: ((), (numbers(rows, 1)[:, 0],)),
    ),
}
FORMULAS = {
    "linear_token_loss": (
        lambda h, w, ids, weights: (linear_token_loss(h, w, ids, lambda logps: -logps, weights=weights).loss,),
        lambda rows: (head(rows)[0], (targets(rows), torch.rand(rows, T))),
    ),
    "policy_loss": (of_policy(presets.GRPO), policy),
    "policy_loss of sequences": (of_policy(presets.GSPO), policy),
    "group_policy_loss": (of_groups, policy),
    "linear_policy_loss": (of_linear_policy, lambda rows: (head(rows)[0], (targets(rows), *policy(rows)[1]))),
    "preference_loss": (
        of_pairs,
        lambda rows: (
            (numbers(rows).requires_grad_(), numbers(rows).requires_grad_()),
            (mask(rows), numbers(rows), numbers(rows)),
        ),
    ),
    "unpaired_preference_loss": (
        of_answers,
        lambda rows: ((numbers(rows).requires_grad_(),), (torch.arange(rows) % 3 > 0, mask(rows), numbers(rows))),
    ),
    "value_loss": (
        lambda values, old, returns, mask: (value_loss(values, old, returns, mask=mask).loss,),
        lambda rows: ((numbers(rows).requires_grad_(),), (numbers(rows), numbers(rows), mask(rows))),
    ),
    "reward_model_loss": (
        lambda chosen, rejected, margins: (reward_model_loss(chosen, rejected, margins=margins).loss,),
        lambda rows: (
            tuple(numbers(rows, 1)[:, 0].clone().requires_grad_() for _ in range(2)),
            (torch.rand(rows),),
        ),
    ),
}


def results(function, leaves, constants):
    """Outputs, and gradients of their weighted sum."""
    outputs = function(*leaves, *constants)
    floating = [one for one in outputs if one.requires_grad]
    weights = [torch.linspace(0.5, 1.5, one.numel()).view(one.shape) for one in floating]
    grads = torch.autograd.grad(floating, leaves, weights) if leaves else ()
    return [*(one.detach() for one in outputs), *grads]


def compare(case, again=0, **tolerance):
    """Compiled results are those of eager mode for two batch sizes, the second with `again` new compilations."""
    function, make = case
    counter, compilations = CompileCounterWithBackend("inductor"), []
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for rows in (4, 10):  # no other dimension's size, which the compiler would take for the same
        leaves, constants = make(rows)
        want = results(function, leaves, constants)
        got = results(compiled, leaves, constants)
        assert len(want) == len(got)
        assert all(one.isfinite().all() for one in want)
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, **tolerance)
        compilations.append(counter.frame_count)
    assert 0 < compilations[0] == compilations[1] - again


@pytest.mark.parametrize("op", OURS)
def test_an_op_in_one_graph_of_any_batch_size_has_the_bits_of_eager(op):
    compare(OURS[op], rtol=0, atol=0)


AGAIN = {  # why another number of tokens is another graph
    "linear_token_loss": "its loop over chunks is unrolled",
    "preference_loss": "the number of pairs is taken for a constant",
}


@pytest.mark.parametrize("loss", sorted(FORMULAS.keys() - AGAIN))
def test_a_loss_in_one_graph_of_any_batch_size_is_that_of_eager(loss):
    compare(FORMULAS[loss], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", AGAIN)
def test_a_loss_in_a_graph_per_batch_size_is_that_of_eager(loss):
    compare(FORMULAS[loss], again=1, rtol=1e-5, atol=1e-6)
