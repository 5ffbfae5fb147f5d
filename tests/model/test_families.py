"""One tiny random model per family: log-probabilities from its halves are those of its own logits."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import peft
import pytest
import torch
import transformers
from tolerance import assert_no_worse
from torch import nn
from transformers import PreTrainedModel

from fastrl import FusedLMHead, linear_logprob
from fastrl.model.head import split_head
from fastrl.model.router import about_router, router_loss

VOCAB = 41
IDS = torch.randint(9, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))  # below 9 are special tokens
TEXT = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
HEAD_DIM = {"head_dim": 8}
GPT = {
    "vocab_size": VOCAB, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"router_aux_loss_coef": 0.5}
LATENT = {
    "num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}  # fmt: skip
DEEPSEEK = LATENT | {
    "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 0, "n_shared_experts": 1,
}  # fmt: skip
MAMBA = {"mamba_d_ssm": 48, "mamba_n_heads": 4, "mamba_d_head": 12, "mamba_d_state": 8}
LINEAR_ATTENTION = {
    "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2,
    "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "head_dim": 8,
}  # fmt: skip
ROPE = "rope_parameters" if hasattr(transformers.LlamaConfig(), "rope_parameters") else "rope_scaling"  # transformers 4
SECTIONS = {ROPE: {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
QWEN_VISION = {"depth": 1, "hidden_size": 16, "num_heads": 2, "patch_size": 8}
QWEN3_VISION = QWEN_VISION | {
    "intermediate_size": 16, "out_hidden_size": 16, "deepstack_visual_indexes": [0], "num_position_embeddings": 16
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A configuration, and the constants of its logits."""

    config: str
    changes: dict[str, Any] = field(default_factory=dict)
    scale: float = 1.0
    softcap: float | None = None
    bias: bool = False
    base: dict[str, Any] = field(default_factory=lambda: TEXT)

    def tied(self, tied: bool = True) -> PreTrainedModel:
        """transformers 4 reads it in a language model's own configuration, transformers 5 in the outermost."""
        changes = self.changes | {"tie_word_embeddings": tied}
        inner = copy.deepcopy(changes.get("text_config"))
        if isinstance(inner, dict):
            inner["tie_word_embeddings"] = tied
        elif inner is not None:
            inner.tie_word_embeddings = tied
        return replace(self, changes=changes if inner is None else changes | {"text_config": inner}).model()

    def model(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """Weights are large enough for a cap or a bias to show."""
        torch.manual_seed(0)
        if not hasattr(transformers, f"{self.config}Config"):
            pytest.skip(f"transformers {transformers.__version__} has no {self.config}Config")
        config = getattr(transformers, f"{self.config}Config")(**self.base | self.changes)
        kind = transformers.AutoModelForCausalLM
        if "vision_config" in self.changes:
            kind = transformers.AutoModelForImageTextToText
        return spread(kind.from_config(config, attn_implementation="eager").to(dtype).eval())


def text(config: str, **changes: Any) -> Any:
    """The language model's configuration inside a vision-language one."""
    return getattr(transformers, f"{config}Config")(**TEXT | changes)


def wrapped(config: str, language: Any, vision: Any, **changes: Any) -> dict[str, Any]:
    """Arguments of a vision-language family."""
    return {"config": config, "changes": {"text_config": language, "vision_config": vision, **changes}, "base": {}}


CLIP, SIGLIP = ({**VISION, "model_type": f"{name}_vision_model"} for name in ("clip", "siglip"))
CAPPED = {"final_logit_softcapping": 3.0}
FAMILIES = {
    "llama": Family("Llama"),
    "llama4": Family("Llama4Text", HEAD_DIM | {"num_local_experts": 4, "intermediate_size_mlp": 32}),
    "qwen2": Family("Qwen2"),
    "qwen3": Family("Qwen3", HEAD_DIM),
    "qwen3_moe": Family("Qwen3Moe", HEAD_DIM | QWEN_EXPERTS | ROUTED),
    "qwen3_next": Family("Qwen3Next", LINEAR_ATTENTION | QWEN_EXPERTS | {"shared_expert_intermediate_size": 16}),
    "qwen3_5": Family("Qwen3_5Text", LINEAR_ATTENTION),
    "gemma": Family("Gemma", HEAD_DIM),
    "gemma2": Family("Gemma2", HEAD_DIM | CAPPED, softcap=3.0),
    "gemma3": Family("Gemma3Text", HEAD_DIM | CAPPED, softcap=3.0),
    "mistral": Family("Mistral", HEAD_DIM),
    "mixtral": Family("Mixtral", EXPERTS | ROUTED),
    "phi3": Family("Phi3"),
    "phi": Family("Phi", bias=True),
    "cohere": Family("Cohere", {"logit_scale": 0.25}, scale=0.25),
    "cohere2": Family("Cohere2", HEAD_DIM | {"logit_scale": 0.25}, scale=0.25),
    "granite": Family("Granite", {"logits_scaling": 7.0}, scale=1 / 7),
    "granite_moe": Family("GraniteMoe", EXPERTS | ROUTED | {"logits_scaling": 7.0}, scale=1 / 7),
    "hyperclova_x": Family("HyperCLOVAX", HEAD_DIM | {"logits_scaling": 7.0}, scale=7.0),
    "minicpm3": Family("MiniCPM3", LATENT | {"hidden_size": 32, "dim_model_base": 16}, scale=0.5),
    "gpt2": Family("GPT2", base=GPT),
    "gptj": Family("GPTJ", {"rotary_dim": 4}, bias=True, base=GPT),
    "gpt_neox": Family("GPTNeoX"),
    "olmo2": Family("Olmo2"),
    "olmo3": Family("Olmo3"),
    "smollm3": Family("SmolLM3"),
    "falcon_h1": Family("FalconH1", MAMBA | {"hidden_size": 48, "lm_head_multiplier": 0.5}, scale=0.5),
    "deepseek_v3": Family("DeepseekV3", DEEPSEEK),
    "gpt_oss": Family("GptOss", HEAD_DIM | EXPERTS | ROUTED | {"sliding_window": 4}),
    "glm4": Family("Glm4", HEAD_DIM),
    "qwen2_vl": Family(**wrapped("Qwen2VL", TEXT | SECTIONS, QWEN_VISION | {"embed_dim": 16, "mlp_ratio": 1})),
    "qwen2_5_vl": Family(
        **wrapped("Qwen2_5_VL", TEXT | SECTIONS, QWEN_VISION | {"intermediate_size": 16, "out_hidden_size": 16})
    ),
    "qwen3_vl_moe": Family(**wrapped("Qwen3VLMoe", TEXT | SECTIONS | HEAD_DIM | QWEN_EXPERTS | ROUTED, QWEN3_VISION)),
    # The wrappers below leave out the language model's own constant: with them its log-probabilities would be wrong.
    "gemma3_vl": Family(**wrapped("Gemma3", TEXT | HEAD_DIM | CAPPED, VISION, mm_tokens_per_image=4)),
    "llava_granite": Family(**wrapped("LlavaNext", text("Granite", logits_scaling=7.0), CLIP, image_token_index=5)),
    "aya_vision": Family(**wrapped("AyaVision", text("Cohere2", logit_scale=0.25), SIGLIP, image_token_index=5)),
    "llava": Family(**wrapped("Llava", text("Llama"), CLIP, image_token_index=5)),
}


def spread(module: nn.Module) -> Any:
    """Gives every trained weight a size at which it shows in the logits."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.normal_(std=0.3)
    return module


def target_logps(logits: torch.Tensor) -> torch.Tensor:
    """(2, 8): of each token after the first, in at least float32."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0]


def fused(halves: Any) -> torch.Tensor:
    """The same, without logits."""
    return linear_logprob(halves.backbone(IDS)[:, :-1], halves.weight, IDS[:, 1:], **halves.options).logps


def exact(model: nn.Module) -> torch.Tensor:
    """What the model's head and its arithmetic after the head give in float64, on the same hidden states."""
    wide = copy.deepcopy(model)
    head = wide.get_output_embeddings()
    for module in head.modules():  # other objects, since the embeddings may share the old ones
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.double()))
    head.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    products = []
    head.register_forward_hook(lambda _, inputs, product: products.append(product))
    logits = wide(input_ids=IDS, use_cache=False).logits
    if logits.dtype != torch.float64:  # GPT-J in transformers 4 rounds them to float32, and does nothing else
        assert torch.equal(products[0].to(logits.dtype), logits)
        logits = products[0]
    return target_logps(logits)


def assert_logps_are_the_models_own(model: nn.Module) -> None:
    ours = fused(split_head(model))
    with torch.no_grad():
        plain, truth = target_logps(model(input_ids=IDS, use_cache=False).logits), exact(model)
    assert truth.dtype == torch.float64
    assert truth.std() > 0.01
    assert_no_worse(ours, plain, truth)


def backbone_parameter(model: nn.Module) -> nn.Parameter:
    """A trained matrix of an attention, in whatever layer is there."""
    names = ("q_proj", "qkv_proj", "query_key_value", "c_attn", "q_b_proj")
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    text_only = [(n, w) for n, w in trained if "vision" not in n and "visual" not in n and w.dim() == 2]
    return next(weight for name, weight in text_only if any(part in name for part in names))


def assert_gradients_are_the_models_own(model: nn.Module) -> None:
    parameter = backbone_parameter(model)
    gradients = []
    for logps in (fused(split_head(model)), target_logps(model(input_ids=IDS, use_cache=False).logits)):
        gradients.append(*torch.autograd.grad(logps.square().sum(), parameter))
    scale = gradients[1].abs().max().item()
    assert scale > 0
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logps_and_constants_of_a_family_are_its_own(name, dtype):
    family = FAMILIES[name]
    model = family.model(dtype)
    halves = split_head(model)
    assert (halves.softcap, halves.bias is not None) == (family.softcap, family.bias)
    assert halves.logit_scale == pytest.approx(family.scale)
    assert_logps_are_the_models_own(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_of_a_familys_backbone_is_that_of_its_own_logits(name):
    assert_gradients_are_the_models_own(FAMILIES[name].model())


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_vl_moe", "mixtral", "granite_moe", "gpt_oss"])
def test_the_router_loss_of_a_mixture_is_kept_with_and_without_an_adapter(name):
    model = FAMILIES[name].model()
    assert router_loss(model).coef == 0.5
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert router_loss(adapted).coef == 0.5
    assert about_router(adapted).endswith("the routers' load-balancing loss is added, times 0.5.")


ADAPTERS = {
    "head_left_out": {"r": 2, "target_modules": ["q_proj"]},
    "head_adapted": {"r": 2, "target_modules": ["q_proj", "lm_head"]},
    "head_saved": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("name", ["llama", "cohere", "phi", "llava"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_logps_and_gradients_under_an_adapter_are_the_models_own_with_it_and_without(name, adapter):
    plain = FAMILIES[name].model()
    with torch.no_grad():
        before = target_logps(plain(input_ids=IDS).logits)
    adapted = spread(peft.get_peft_model(plain, peft.LoraConfig(**ADAPTERS[adapter])).eval())
    halves = split_head(adapted)
    assert_gradients_are_the_models_own(adapted)
    with torch.no_grad():
        with_it, expected = fused(halves), target_logps(adapted(input_ids=IDS).logits)
        with adapted.disable_adapter():
            without = fused(halves)
    torch.testing.assert_close(with_it, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(without, before, rtol=1e-5, atol=1e-5)
    assert (with_it - without).abs().max() > 0.01


TIED_ADAPTERS = {
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [9, 12, 40]},
    "both_adapted": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "both_saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "saved_together": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("name", ["llama", "gemma2", "falcon_h1", "minicpm3"])
@pytest.mark.parametrize("adapter", TIED_ADAPTERS)
def test_logps_and_gradients_of_a_tied_head_under_an_adapter_are_the_models_own(name, adapter):
    options = copy.deepcopy(TIED_ADAPTERS[adapter])
    options["target_modules"] += ["q_b_proj"] if name == "minicpm3" else []
    adapted = spread(peft.get_peft_model(FAMILIES[name].tied(), peft.LoraConfig(r=2, **options)).eval())
    assert_logps_are_the_models_own(adapted)
    assert_gradients_are_the_models_own(adapted)


def test_trained_tokens_get_a_gradient_through_the_head():
    options = TIED_ADAPTERS["tokens"]
    adapted = spread(peft.get_peft_model(FAMILIES["llama"].tied(), peft.LoraConfig(r=2, **options)))
    halves = split_head(adapted)
    hidden = halves.backbone(IDS).detach()  # so that the embeddings have no part in it
    logps = linear_logprob(hidden, halves.weight, IDS, **halves.options).logps
    assert torch.equal(FusedLMHead(adapted.get_output_embeddings())(hidden, IDS).logps, logps)
    logps.sum().backward()
    (delta,) = [weight for name, weight in adapted.named_parameters() if "trainable_tokens_delta" in name]
    assert delta.grad.any(1).all()


def test_trained_tokens_of_a_head_with_a_bias_are_refused_since_peft_drops_the_bias():
    options = TIED_ADAPTERS["tokens"]
    adapted = peft.get_peft_model(FAMILIES["phi"].tied(), peft.LoraConfig(r=2, **options))
    with pytest.raises(ValueError, match=r"one with another adapter of peft \(utils\.TrainableTokensWrapper\)"):
        split_head(adapted)


def test_each_of_two_adapters_has_its_own_head():
    adapted = peft.get_peft_model(FAMILIES["llama"].model(), peft.LoraConfig(**ADAPTERS["head_saved"]))
    adapted.add_adapter("other", peft.LoraConfig(**ADAPTERS["head_left_out"]))
    halves, heads = split_head(spread(adapted)), []
    for name in ("default", "other", "default"):
        adapted.set_adapter(name)
        with torch.no_grad():
            torch.testing.assert_close(fused(halves), target_logps(adapted(input_ids=IDS).logits), rtol=1e-5, atol=1e-5)
        heads.append(halves.weight)
    assert heads[0] is heads[2]
    assert heads[1] is adapted.get_output_embeddings().original_module.weight


def test_a_merged_adapter_counts_once():
    adapted = spread(peft.get_peft_model(FAMILIES["llama"].model(), peft.LoraConfig(**ADAPTERS["head_adapted"])).eval())
    adapted.merge_adapter()
    assert_logps_are_the_models_own(adapted)


def test_a_head_that_an_adapter_saves_gets_the_gradient_and_the_original_none():
    adapted = spread(peft.get_peft_model(FAMILIES["llama"].model(), peft.LoraConfig(**ADAPTERS["head_saved"])))
    halves, wrapper = split_head(adapted), adapted.get_output_embeddings()
    assert halves.weight is wrapper.modules_to_save["default"].weight
    fused(halves).sum().backward()
    assert halves.weight.grad.any()
    assert wrapper.original_module.weight.grad is None


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "gpt2", "qwen2_vl", "llava"])
def test_logps_after_a_resize_are_the_models_own(name, tied):
    model = FAMILIES[name].tied(tied)
    model.resize_token_embeddings(VOCAB + 7, mean_resizing=False)
    spread(model)
    halves = split_head(model)
    assert halves.weight.shape[0] == VOCAB + 7
    assert (halves.weight is model.get_input_embeddings().weight) == tied
    assert_logps_are_the_models_own(model)


@pytest.mark.parametrize("name", ["llama", "phi", "gemma2"])
def test_padding_rows_of_a_head_have_no_probability(name):
    model = FAMILIES[name].model()
    model.resize_token_embeddings(VOCAB, pad_to_multiple_of=16, mean_resizing=False)
    spread(model)
    halves = split_head(model, VOCAB)
    assert halves.weight.shape[0] == 48
    ours = fused(halves)
    logits = halves.model(input_ids=IDS).logits[..., :VOCAB]
    torch.testing.assert_close(ours, target_logps(logits), rtol=1e-5, atol=1e-5)
    assert (ours - fused(split_head(model))).abs().max() > 1e-3
