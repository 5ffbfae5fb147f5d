from __future__ import annotations

import copy

import pytest
import torch
from ops.cases import IGNORE, dense, gaussian
from tolerance import assert_exact
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from fastrl import linear_policy_loss, linear_token_loss, presets
from fastrl.model.fused_lm_head import FusedLMHead
from fastrl.model.head import split_head


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
    torch.autograd.backward([out.logps, out.entropy], grads)
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


def squared(logps, old):
    return (logps - old).square()


def losses(fused, inputs, hidden, backend):
    """Both losses by the module's methods and by the functions: name -> (output, what it should be)."""
    generator = torch.Generator().manual_seed(3)
    advantages, old = torch.randn(2, len(inputs.targets), generator=generator, dtype=torch.float64)
    mask = inputs.targets != IGNORE
    head = {"bias": fused.bias, "softcap": fused.softcap, "logit_scale": fused.logit_scale, "vocab_size": 30}
    both = {"temperature": 0.7, "backend": backend}
    policy = {"mask": mask, "old_logps": old, **both}
    token = {"weights": mask / 5.0, "context": (old,), **both}
    args = (hidden, inputs.targets)
    weighted = (hidden, fused.weight, inputs.targets)
    return {
        "policy_loss": (
            fused.policy_loss(*args, advantages, presets.DAPO, **policy),
            linear_policy_loss(*weighted, advantages, presets.DAPO, **policy, **head),
        ),
        "token_loss": (
            fused.token_loss(*args, squared, **token),
            linear_token_loss(*weighted, squared, **token, **head),
        ),
    }


@pytest.mark.parametrize("name", ["policy_loss", "token_loss"])
def test_a_loss_is_that_of_the_function_with_the_heads_weight_and_constants(backend, name):
    inputs = gaussian(11, 8, 37, bias=True)
    inputs.targets[inputs.targets >= 30] = 1
    hidden = inputs.hidden.clone().requires_grad_()
    fused = FusedLMHead(linear(inputs), softcap=4.0, logit_scale=0.5, vocab_size=30)
    ours, theirs = losses(fused, inputs, hidden, backend)[name]
    assert torch.equal(ours.loss, theirs.loss)
    assert ours.metrics.keys() == theirs.metrics.keys()
    leaves = (hidden, fused.weight, fused.bias)
    for got, expected in zip(*(torch.autograd.grad(one.loss, leaves) for one in (ours, theirs)), strict=True):
        assert torch.equal(got, expected)
        assert expected.any()


def test_hooks_of_a_wrapper_see_its_forward_in_every_method():
    inputs = gaussian(6, 8, 37)
    fused, seen = FusedLMHead(linear(inputs), vocab_size=30), []
    inputs.targets.clamp_(max=29)
    fused.register_forward_pre_hook(lambda module, args: seen.append("before"))
    fused.register_forward_hook(lambda module, args, output: seen.append("after"))
    fused(inputs.hidden, inputs.targets)
    assert seen == ["before", "after"]
    losses(fused, inputs, inputs.hidden, "auto")
    assert seen == ["before", "after"] * 3


def test_state_dict_is_that_of_the_wrapped_head():
    inputs = gaussian(6, 8, 37, bias=True)
    head = linear(inputs)
    one, other = FusedLMHead(head), FusedLMHead(linear(gaussian(6, 8, 37, bias=True)))
    assert one.state_dict().keys() == head.state_dict().keys() == {"weight", "bias"}
    other.load_state_dict(one.state_dict())
    assert torch.equal(*(m(inputs.hidden, inputs.targets).logps for m in (one, other)))
    copy.deepcopy(other).load_state_dict(head.state_dict())
    head.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: .*lm_head.bias"):
        other.load_state_dict({"weight": head.weight})


SIZES = {
    "vocab_size": 37, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(params=["capped and tied", "plain"])
def model(request):
    if request.param == "plain":
        return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    config = Gemma2Config(**SIZES, final_logit_softcapping=0.01, attn_implementation="eager")
    return Gemma2ForCausalLM(config).eval()


def test_in_the_place_of_a_models_head_it_leaves_forward_generate_and_checkpoints_as_they_were(model, tmp_path):
    ids = torch.tensor([[5, 6, 7]])
    logits, names = model(ids).logits, list(model.state_dict())
    answer = model.generate(ids, max_new_tokens=5, do_sample=False)
    model.lm_head = FusedLMHead(model.lm_head, softcap=model.config.to_dict().get("final_logit_softcapping"))
    assert torch.equal(model(ids).logits, logits)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), answer)
    hidden = model.model(ids).last_hidden_state
    logps = model.lm_head(hidden[:, :-1], ids[:, 1:]).logps
    expected = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-6)
    assert list(model.state_dict()) == names
    assert get_model_state_dict(model).keys() == set(names)
    set_model_state_dict(model, {name: value.clone() for name, value in model.state_dict().items()})
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="eager").eval()
    torch.testing.assert_close(again(ids).logits, logits, rtol=1e-5, atol=1e-6)


def test_a_model_with_it_in_place_is_split_like_one_without(model):
    head = model.lm_head
    before = split_head(model)
    model.lm_head = FusedLMHead(head)
    after = split_head(model)
    assert after.head is head
    assert (after.softcap, after.logit_scale) == (before.softcap, before.logit_scale)


def test_it_has_the_attributes_of_the_layer():
    head = linear(gaussian(6, 8, 37, bias=True))
    fused = FusedLMHead(head)
    assert (fused.weight is head.weight, fused.bias is head.bias) == (True, True)
    assert (fused.in_features, fused.out_features) == (8, 37)


def test_options_without_targets_are_refused():
    fused = FusedLMHead(linear(gaussian(6, 8, 37)))
    with pytest.raises(
        ValueError, match=r"FusedLMHead: targets: expected a tensor with other options, got None\. Pass"
    ):
        fused(torch.zeros(3, 8, dtype=torch.float64), temperature=0.7)


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


def test_a_whole_model_is_refused_with_what_to_pass(model):
    with pytest.raises(TypeError, match=r"got \w+ForCausalLM\. Pass its head, model\.get_output_embeddings\(\)\."):
        FusedLMHead(model)


def test_an_ignored_row_that_holds_nan_reaches_no_parameter(backend):
    inputs = gaussian(6, 8, 37)
    inputs.hidden[inputs.targets == IGNORE] = float("nan")
    fused = FusedLMHead(linear(inputs))
    fused(inputs.hidden, inputs.targets, backend=backend).logps.sum().backward()
    assert all(p.grad.isfinite().all() for p in fused.parameters())
