from __future__ import annotations

import copy

import pytest
import torch
from ops.cases import IGNORE, dense, gaussian
from tolerance import assert_exact

from fastrl.ops.fused_lm_head import FusedLMHead


def linear(inputs):
    """A torch.nn.Linear that holds the inputs' weight and bias."""
    head = torch.nn.Linear(*reversed(inputs.weight.shape), bias=inputs.bias is not None, dtype=inputs.weight.dtype)
    head.weight.data = inputs.weight.clone()
    if inputs.bias is not None:
        head.bias.data = inputs.bias.clone()
    return head


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("memory", ["store", "recompute"])
def test_equals_the_dense_head(backend, bias, memory):
    inputs = gaussian(11, 8, 37, bias=bias)
    head = linear(inputs)
    fused = FusedLMHead(head, softcap=4.0, logit_scale=0.5)
    hidden = inputs.hidden.clone().requires_grad_()
    temperature = torch.rand(11, dtype=torch.float64) + 0.5
    out = fused(hidden, inputs.targets, temperature=temperature, entropy=True, memory=memory, backend=backend)
    theirs = inputs.leaves("hidden", "weight", *(("bias",) if bias else ()))
    logps, entropy = dense(theirs, temperature=temperature, softcap=4.0, logit_scale=0.5)
    assert_exact(out.logps, logps)
    assert_exact(out.entropy, entropy)
    grads = list(torch.randn(2, 11, dtype=torch.float64))
    torch.autograd.backward(list(out), grads)
    torch.autograd.backward([logps, entropy], grads)
    assert_exact(hidden.grad, theirs.hidden.grad)
    assert_exact(head.weight.grad, theirs.weight.grad)
    if bias:
        assert_exact(head.bias.grad, theirs.bias.grad)


def test_ignore_index_reaches_the_op(backend):
    inputs = gaussian(6, 8, 37, ignored=False)
    inputs.targets[2] = 7
    out = FusedLMHead(linear(inputs))(inputs.hidden, inputs.targets, ignore_index=7, backend=backend)
    assert out.logps[2] == 0
    assert out.entropy is None


def test_a_frozen_head_passes_the_gradient_on_and_takes_none(backend):
    inputs = gaussian(6, 8, 37)
    fused = FusedLMHead(linear(inputs)).requires_grad_(False)
    hidden, theirs = inputs.hidden.clone().requires_grad_(), inputs.leaves("hidden")
    fused(hidden, inputs.targets, backend=backend).logps.sum().backward()
    dense(theirs)[0].sum().backward()
    assert_exact(hidden.grad, theirs.hidden.grad)
    assert fused.lm_head.weight.grad is None


def test_a_tied_embedding_stays_one_parameter_and_collects_both_gradients():
    embedding = torch.nn.Embedding(37, 8, dtype=torch.float64)
    head = torch.nn.Linear(8, 37, bias=False, dtype=torch.float64)
    head.weight = embedding.weight
    model = torch.nn.ModuleDict({"embedding": embedding, "head": FusedLMHead(head)})
    assert sum(p.numel() for p in model.parameters()) == 37 * 8
    untied = copy.deepcopy(embedding.weight.detach()).requires_grad_()
    ids, targets = torch.randint(37, (9,)), torch.randint(37, (9,))
    model["head"](torch.tanh(embedding(ids)), targets).logps.sum().backward()
    lookup = untied.detach().clone().requires_grad_()
    z = torch.tanh(lookup[ids]) @ untied.T
    z.log_softmax(-1).gather(-1, targets[:, None]).sum().backward()
    assert_exact(embedding.weight.grad, untied.grad + lookup.grad)


def test_hooks_of_a_wrapper_see_its_forward():
    inputs = gaussian(6, 8, 37)
    fused, seen = FusedLMHead(linear(inputs)), []
    fused.register_forward_pre_hook(lambda module, args: seen.append("before"))
    fused.register_forward_hook(lambda module, args, output: seen.append("after"))
    fused(inputs.hidden, inputs.targets)
    assert seen == ["before", "after"]


def test_state_dict_carries_the_wrapped_head():
    inputs = gaussian(6, 8, 37)
    one, other = FusedLMHead(linear(inputs)), FusedLMHead(linear(gaussian(6, 8, 37)))
    other.load_state_dict(one.state_dict())
    assert torch.equal(*(m(inputs.hidden, inputs.targets).logps for m in (one, other)))


def test_compiles_without_a_graph_break():
    torch._dynamo.reset()
    inputs = gaussian(7, 8, 37)
    results = []
    for compiled in (False, True):
        fused = FusedLMHead(linear(inputs))
        call = torch.compile(fused, fullgraph=True, backend="aot_eager") if compiled else fused
        out = call(inputs.hidden, inputs.targets, temperature=0.7)
        out.logps.sum().backward()
        results.append((out.logps.detach(), fused.lm_head.weight.grad))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_refuses_anything_but_a_linear():
    with pytest.raises(TypeError, match=r"lm_head: expected a torch.nn.Linear, got .*Embedding"):
        FusedLMHead(torch.nn.Embedding(37, 8))


def test_an_ignored_row_that_holds_nan_reaches_no_parameter(backend):
    inputs = gaussian(6, 8, 37)
    inputs.hidden[inputs.targets == IGNORE] = float("nan")
    fused = FusedLMHead(linear(inputs))
    fused(inputs.hidden, inputs.targets, backend=backend).logps.sum().backward()
    assert all(p.grad.isfinite().all() for p in fused.parameters())
