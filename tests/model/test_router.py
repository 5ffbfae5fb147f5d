"""The load-balancing loss of a mixture of experts: its value, its gradient, its metric, in every algorithm's step."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    MixtralConfig,
    MixtralForSequenceClassification,
    Qwen3MoeConfig,
)
from transformers.models.mixtral import modeling_mixtral

from fastrl.data.pack import pack
from fastrl.model.attention import prepare_attention
from fastrl.model.policy import Policy
from fastrl.model.router import METRIC, about_router, router_loss
from fastrl.model.scalar import ScalarModel
from fastrl.types import Group, Prompt, Sample

SIZES = {
    "vocab_size": 41,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
MIXTURES = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.5),
    "qwen3": Qwen3MoeConfig(
        **SIZES, head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.5
    ),
}


def tiny(name):
    torch.manual_seed(0)
    config = MIXTURES[name] if isinstance(name, str) else name
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def groups():
    ids = torch.randint(1, 41, (4, 9), generator=torch.Generator().manual_seed(1)).tolist()
    samples = [Sample(row[3 : 5 + n], [0.0] * (2 + n), True, reward=1.0, advantage=1.0) for n, row in enumerate(ids)]
    return [Group(Prompt(0, "", tuple(ids[0][:3])), samples)]


def whole_rows():
    return [
        torch.tensor([[*group.prompt.token_ids, *sample.token_ids[:-1]]])
        for group in groups()
        for sample in group.samples
    ]


@pytest.mark.parametrize("name", MIXTURES)
def test_the_loss_is_the_models_own_and_its_gradient_reaches_the_routers_through_the_hidden_states(name):
    """transformers' own forward, one sequence at a time, so that nothing pads; averaged by tokens."""
    model = tiny(name)
    policy, batches = Policy(model), pack(groups(), layout="padded", max_tokens=8)
    assert len(batches) == 4
    for batch in batches:
        (policy.hidden(batch).sum() * 0.0).backward()  # a loss without a gradient of its own
    ours = {key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.grad is not None}
    (noted,) = [sum(one[METRIC][0] for one in policy.router.metrics())]
    model.zero_grad()
    rows = whole_rows()
    total = sum(row.shape[1] for row in rows)
    losses = [model(input_ids=row, output_router_logits=True).aux_loss * row.shape[1] / total for row in rows]
    (0.5 * sum(losses)).backward()
    torch.testing.assert_close(noted, sum(losses).detach().to(noted.dtype), rtol=1e-5, atol=0)
    routers = 0
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[key], parameter.grad, rtol=1e-4, atol=1e-6)
            routers += bool(parameter.grad.any()) and "gate" in key
    assert routers >= 2


@pytest.mark.parametrize("layout", ["padded", "shared", "varlen"])
def test_padding_has_no_part_in_it_and_a_shared_prompt_counts_as_often_as_it_is_computed(layout):
    """The expected loss is that of transformers' own router logits of the padded rows, of the tokens that count."""
    model = tiny("mixtral")
    (padded,) = pack(groups(), layout="padded", max_tokens=99)
    assert not padded.token_mask.all()  # there is padding to be left out
    with torch.no_grad():
        mask = padded.token_mask.long()
        logits = model(input_ids=padded.input_ids, attention_mask=mask, output_router_logits=True).router_logits
    counts = padded.token_mask.clone()
    if layout == "shared":
        counts[1:, :3] = False  # the three tokens of the prompt are there once
    kept = tuple(layer.reshape(*counts.shape, -1)[counts] for layer in logits)
    expected = modeling_mixtral.load_balancing_loss_func(kept, 4, 2)
    assert prepare_attention(model, layout, dtype=torch.float32) == layout
    (batch,) = pack(groups(), layout=layout, max_tokens=99)
    policy = Policy(model)
    policy.hidden(batch)
    ((noted, weight),) = (one[METRIC] for one in policy.router.metrics())
    torch.testing.assert_close(noted, expected, rtol=1e-5, atol=0)
    assert weight == 1.0


def test_a_scalar_model_takes_the_coefficient_of_the_recipe():
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.5, num_labels=1)
    model = MixtralForSequenceClassification(config)
    assert ScalarModel(model).router.coef == 0.5
    assert ScalarModel(model, router_aux_loss_coef=0.25).router.coef == 0.25
    assert ScalarModel(model, router_aux_loss_coef=0.0).router is None
    scalar = ScalarModel(model)
    scalar.values(pack(groups(), layout="padded", max_tokens=99)[0]).sum().backward()
    assert len(scalar.router.metrics()) == 1


def test_a_coefficient_of_zero_leaves_it_out_and_one_from_the_recipe_replaces_the_models():
    model = tiny("mixtral")
    assert Policy(model, router_aux_loss_coef=0.0).router is None
    assert Policy(model, router_aux_loss_coef=0.125).router.coef == 0.125
    assert Policy(model).router.coef == 0.5
    with torch.no_grad():
        policy = Policy(model)
        policy.hidden(pack(groups(), layout="padded", max_tokens=99)[0])
    assert policy.router.metrics() == []  # nothing is trained


def test_the_start_of_a_run_says_what_becomes_of_the_routers():
    assert (
        about_router(tiny("mixtral")) == "Mixture of 4 experts: the routers' load-balancing loss is added, times 0.5."
    )
    assert about_router(tiny("mixtral"), 0.0).endswith("without a load-balancing loss, with a coefficient of 0.")
    sizes = SIZES | {"num_key_value_heads": 2, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 2}
    deepseek = tiny(DeepseekV3Config(**sizes, first_k_dense_replace=1, num_experts_per_tok=2, topk_group=1))
    assert router_loss(deepseek) is None
    assert about_router(deepseek).endswith("since transformers has none for DeepseekV3ForCausalLM.")
    assert about_router(tiny(LlamaConfig(**SIZES))) == ""
