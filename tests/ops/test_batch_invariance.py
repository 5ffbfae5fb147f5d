"""A row's log-probability and entropy have the same bits alone, in any batch, at any place and in chunks of any size,
with and without gradients.

`docs/numerics.md` says which backends promise this. `chunked` and `reference` do not: the rounding of torch's matmul
depends on the number of rows.
"""

from __future__ import annotations

import pytest
import torch
from backends import DEVICE, NATIVE, using
from transformers import LlamaConfig, LlamaForCausalLM

import fastrl
from fastrl import linear_logprob, logprob

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the C++ kernels run on a CPU")
N, H, V = 37, 48, 211
BATCHES = {"alone": [17], "first": [17, 3, 5], "last": [*range(20, 36), 17], "twice": [17, 0, 17], "all": range(N)}
SAVES = {
    "no gradient": ((), {}),
    "frozen head": (("hidden",), {}),
    "store": (("hidden", "weight"), {"memory": "store"}),
    "recompute": (("hidden", "weight"), {"memory": "recompute"}),
}
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def same(got, want, at):
    """Whether each place of row 17 holds its bits."""
    return all(torch.equal(one[place], wanted) for place in at for one, wanted in zip(got, want, strict=True))


def places(batch):
    return [place for place, row in enumerate(batch) if row == 17]


@pytest.fixture(params=NATIVE)
def cpu(request):
    with using(request.param) as name:
        yield name


@each_dtype
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_row_has_the_same_bits_in_every_batch_and_every_kind_of_pass(cpu, dtype, temperature):
    hidden, weight, targets = torch.randn(N, H).to(dtype), torch.randn(V, H).to(dtype), torch.randint(V, (N,))
    want = None
    for requires, memory in SAVES.values():
        w = weight.clone().requires_grad_("weight" in requires)
        for batch in BATCHES.values():
            rows = list(batch)
            h = hidden[rows].requires_grad_("hidden" in requires)
            out = linear_logprob(h, w, targets[rows], temperature=temperature, entropy=True, backend=cpu, **memory)
            got = (out.logps.detach(), out.entropy.detach())
            want = want or tuple(one[places(rows)[0]] for one in got)
            assert same(got, want, places(rows))


@each_dtype
def test_a_row_has_the_same_bits_whatever_the_budget_of_stored_logits(cpu, dtype):
    """The budget says how many rows are a chunk."""
    hidden, weight, targets = torch.randn(N, H).to(dtype), torch.randn(V, H).to(dtype), torch.randint(V, (N,))
    results = []
    for rows in (1, 2, 7, N):
        given = (hidden.clone().requires_grad_(), weight.clone().requires_grad_(), targets)
        out = linear_logprob(*given, entropy=True, memory=rows * V * 4, backend=cpu)
        results.append((out.logps.detach(), out.entropy.detach()))
    for one in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one, results[0], strict=True))


@each_dtype
@pytest.mark.parametrize("backend", [*NATIVE, "triton"])
def test_a_row_of_logits_has_the_same_bits_in_every_batch(backend, dtype):
    logits, targets = torch.randn(N, V).to(dtype), torch.randint(V, (N,))
    want = None
    with using(backend) as name:
        for requires in (False, True):
            for batch in BATCHES.values():
                rows = list(batch)
                z = logits[rows].requires_grad_(requires)
                out = logprob(z, targets[rows], temperature=0.7, entropy=True, backend=name)
                got = (out.logps.detach(), out.entropy.detach())
                want = want or tuple(one[places(rows)[0]] for one in got)
                assert same(got, want, places(rows))


@each_dtype
def test_a_head_called_for_sampling_and_for_training_gives_the_same_bits(cpu, dtype):
    """One position alone, as an engine meets it, against all positions of a batch, as a trainer does."""
    sizes = {"hidden_size": H, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, **sizes)).to(dtype)
    head, hidden, targets = fastrl.FusedLMHead(model.lm_head), torch.randn(3, 5, H).to(dtype), torch.randint(V, (3, 5))
    trained = head(hidden.clone().requires_grad_(), targets, entropy=True)
    assert trained.logps.requires_grad
    for row in range(3):
        for place in range(5):
            with torch.no_grad():
                alone = head(hidden[row, place : place + 1], targets[row, place : place + 1], entropy=True)
            assert torch.equal(alone.logps[0], trained.logps[row, place].detach())
            assert torch.equal(alone.entropy[0], trained.entropy[row, place].detach())
