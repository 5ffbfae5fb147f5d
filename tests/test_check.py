"""Likely mistakes, and messages that say what to do instead."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from fastrl import (
    FusedLMHead,
    linear_logprob,
    linear_policy_loss,
    linear_token_loss,
    logprob,
    policy_loss,
    presets,
    split_head,
)
from fastrl.model.load import load_model
from fastrl.trainer.recipe import load_recipe
from fastrl.typed import ConfigError

IDS = torch.tensor([[5, 6, 7]])
ADVANTAGES, MASK = torch.ones(1), torch.ones(1, 3, dtype=torch.bool)


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(
        vocab_size=37, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


def on_the_head(hidden, weight):
    """The ops that take a head, called with these."""
    return {
        "linear_logprob": lambda: linear_logprob(hidden, weight, IDS),
        "linear_policy_loss": lambda: linear_policy_loss(hidden, weight, IDS, ADVANTAGES, presets.DAPO, mask=MASK),
        "linear_token_loss": lambda: linear_token_loss(hidden, weight, IDS, torch.neg, weights=MASK.float()),
    }


@pytest.mark.parametrize("op", on_the_head(None, None))
def test_a_models_output_as_hidden_states_is_told_which_part_of_it_to_pass(model, op):
    weight = model.lm_head.weight
    for output, part in (
        (model.model(IDS), r"last_hidden_state\."),
        (model(IDS, output_hidden_states=True), r"hidden_states\[-1\]\."),
    ):
        message = rf"^{op}: hidden: expected a tensor, got a {type(output).__name__}\. Pass its {part}$"
        with pytest.raises(TypeError, match=message):
            on_the_head(output, weight)[op]()
    with pytest.raises(TypeError, match=r"^linear_policy_loss: hidden: .* Pass its last_hidden_state\.$"):
        FusedLMHead(model.lm_head).policy_loss(model.model(IDS), IDS, ADVANTAGES, presets.DAPO, mask=MASK)


@pytest.mark.parametrize("op", on_the_head(None, None))
def test_a_layer_as_a_weight_is_told_to_pass_its_weight(model, op):
    message = rf"^{op}: weight: expected a tensor, got a Linear\. Pass its weight\.$"
    with pytest.raises(TypeError, match=message):
        on_the_head(torch.zeros(1, 3, 16), model.lm_head)[op]()


def test_outputs_in_the_place_of_their_parts_are_told_which(model):
    with pytest.raises(TypeError, match=r"^logprob: logits: expected a tensor, got a CausalLM\w+\. Pass its logits\.$"):
        logprob(model(IDS), IDS)
    out = linear_logprob(torch.zeros(1, 3, 16), model.lm_head.weight, IDS, entropy=True)
    with pytest.raises(TypeError, match=r"^policy_loss: logps: .*got a LogprobOutput\. Pass its logps\.$"):
        policy_loss(out, ADVANTAGES, presets.DAPO, mask=MASK)
    with pytest.raises(TypeError, match=r"^policy_loss: entropy: .*got a LogprobOutput\. Pass its entropy\.$"):
        policy_loss(out.logps, ADVANTAGES, presets.DAPO, mask=MASK, entropy=out)


def test_a_flag_as_main_grad_is_told_which_tensor_it_is(model):
    message = r"^linear_policy_loss: main_grad: expected a tensor of shape \(37, 16\) as weight, got a bool\.$"
    weight = model.lm_head.weight
    with pytest.raises(TypeError, match=message):
        linear_policy_loss(
            torch.zeros(1, 3, 16), weight, IDS, ADVANTAGES, presets.DAPO, mask=MASK, main_grad=True
        )  # fmt: skip


@pytest.mark.parametrize("name", ["logps", "advantages", "mask", "old_logps", "ref_logps", "sampling_logps", "entropy"])
def test_sharded_tokens_in_a_policy_loss_are_told_to_be_local_or_whole(name):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        given = {"logps": -torch.ones(1, 3), "advantages": ADVANTAGES, "mask": MASK}
        given[name] = torch.distributed.tensor.distribute_tensor(given.get(name, -torch.ones(1, 3)), mesh)
        message = rf"^policy_loss: {name}: expected a plain tensor, got a DTensor\. Pass .* to_local\(\), with the norm"
        with pytest.raises(TypeError, match=message):
            policy_loss(spec=presets.DAPO, **given)
    finally:
        torch.distributed.destroy_process_group()


def test_an_encoder_and_decoder_is_told_what_fastrl_can_do_with_it(tmp_path):
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=37, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match=r"pass what its head is given, and the head's weight, to linear_logprob\.$"):
        split_head(t5)
    t5.eval()
    seen = []
    t5.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits = t5(input_ids=IDS, decoder_input_ids=IDS).logits
    ours = linear_logprob(seen[0], t5.lm_head.weight, IDS).logps
    torch.testing.assert_close(ours, logits.log_softmax(-1).gather(-1, IDS[..., None])[..., 0], rtol=1e-5, atol=1e-6)
    t5.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^load_model: .*got one with a T5Config\. fastrl trains decoder-only models"):
        load_model(tmp_path)


def test_a_missing_or_empty_recipe_is_told_how_to_begin_one_that_works(tmp_path):
    path = tmp_path / "recipe.yaml"
    for _ in range(2):
        with pytest.raises(
            ConfigError, match=r"A file with the line `algorithm: grpo` is one, .*`fastrl recipes` lists"
        ):
            load_recipe(path)
        path.write_text("")
    path.write_text("algorithm: grpo")
    assert load_recipe(path).algorithm == "grpo"
