import copy
import re

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen3Config,
    RecurrentGemmaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from fastrl.model.head import LARGE, split_head
from fastrl.model.load import load_model

NanoChatConfig = getattr(transformers, "NanoChatConfig", None)  # from transformers 5 on
VOCAB, LENGTH = 41, 11
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GEMMA_LAYERS = ["sliding_attention", "full_attention"]

# The window of 4 is smaller than the sequences, so a mask that forgets it gives other hidden states.
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama_biased_tied": LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True),
    "qwen3": Qwen3Config(**SIZES),
    "qwen3_windows": Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=4, layer_types=GEMMA_LAYERS),
    "mistral_window": MistralConfig(**SIZES, sliding_window=4),
    "gemma2": Gemma2Config(**SIZES, sliding_window=4, layer_types=GEMMA_LAYERS, final_logit_softcapping=0.5),
    "gemma3": Gemma3TextConfig(**SIZES, sliding_window=4, layer_types=GEMMA_LAYERS),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64),
    "cohere": CohereConfig(**SIZES, logit_scale=0.25),
    "granite": GraniteConfig(**SIZES, logits_scaling=7.0),
}


def tiny(name, *, dtype=torch.float64, attention="sdpa"):
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name]) if isinstance(name, str) else name  # transformers 4 lets a model keep it
    if name == "gemma2":
        attention = "eager"  # transformers has no SDPA for it
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.fixture
def exact_softmax(monkeypatch):
    """transformers' eager attention takes its softmax in float32 whatever the model computes in; here float64 stays,
    so that what is compared to twelve digits has them."""
    softmax = torch.nn.functional.softmax

    def wide(scores, *args, dtype=None, **kwargs):
        return softmax(scores, *args, dtype=None if scores.dtype == torch.float64 else dtype, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "softmax", wide)


def ids(rows=2, length=LENGTH):
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def causal(rows, length):
    return torch.ones(length, length, dtype=torch.bool).tril().expand(rows, 1, -1, -1)


@pytest.mark.parametrize("name", CONFIGS)
def test_backbone_and_head_give_the_models_logits(name):
    model = tiny(name)
    halves = split_head(model)
    expected = model(ids()).logits
    assert expected.std() > 0.01
    torch.testing.assert_close(halves.logits(halves.backbone(ids())), expected, rtol=1e-12, atol=1e-12)


def test_scales_and_caps_are_read_from_the_config():
    assert split_head(tiny("cohere")).logit_scale == 0.25
    assert split_head(tiny("granite")).logit_scale == 1 / 7
    assert split_head(tiny("gemma2")).softcap == 0.5
    plain = split_head(tiny("llama"))
    assert (plain.logit_scale, plain.softcap, plain.bias) == (1.0, None, None)


def test_tied_weight_is_the_embedding_itself_and_a_new_head_is_seen():
    model = tiny("llama_biased_tied")
    halves = split_head(model)
    assert halves.weight is model.get_input_embeddings().weight
    model.resize_token_embeddings(VOCAB + 3)
    assert split_head(model).weight.shape == (VOCAB + 3, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["cohere", "granite", "gemma2", "gemma3", "gpt2"])
def test_the_check_allows_the_rounding_of_the_dtype(name, dtype):
    assert split_head(tiny(name, dtype=dtype)).weight.dtype == dtype


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_4d_causal_mask_gives_the_hidden_states_of_the_plain_path(name, attention, exact_softmax):
    halves = split_head(tiny(name, attention=attention))
    plain = halves.backbone(ids())
    masked = halves.backbone(ids(), causal(2, LENGTH))
    torch.testing.assert_close(masked, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_sequences_sharing_a_prompt_in_one_row_equal_sequences_in_rows_of_their_own(name, attention, exact_softmax):
    prompt, first, second = 5, 6, 4
    halves = split_head(tiny(name, attention=attention))
    row = ids(1, prompt + first + second)
    owner = torch.tensor([0] * prompt + [1] * first + [2] * second)
    mask = (owner[:, None] == owner) | (owner[None, :] == 0)
    mask = (mask & torch.ones_like(mask).tril())[None, None]
    positions = torch.cat([torch.arange(prompt + first), torch.arange(prompt, prompt + second)])[None]
    shared = halves.backbone(row, mask, positions)[0]
    alone_first = halves.backbone(row[:, : prompt + first])[0]
    alone_second = halves.backbone(torch.cat([row[:, :prompt], row[:, prompt + first :]], dim=1))[0]
    torch.testing.assert_close(shared[: prompt + first], alone_first, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(shared[prompt + first :], alone_second[prompt:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_in_a_2d_mask_changes_no_hidden_state(name, side, exact_softmax):
    halves = split_head(tiny(name))
    short = ids(1, 7)
    pad = torch.zeros(1, LENGTH - 7, dtype=torch.long)
    parts = (pad, short) if side == "left" else (short, pad)
    padded = torch.cat(parts, dim=1)
    mask = torch.cat([torch.full_like(part, part is short) for part in parts], dim=1).bool()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    hidden = halves.backbone(padded, mask, positions)[mask]
    torch.testing.assert_close(hidden, halves.backbone(short)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_query_that_may_attend_to_nothing_makes_no_other_token_nan(attention):
    halves = split_head(tiny("llama", attention=attention))
    mask = causal(1, LENGTH).clone()
    mask[..., 8:, :] = False
    mask[..., :, 8:] = False
    hidden = halves.backbone(ids(1), mask)
    torch.testing.assert_close(hidden[:, :8], halves.backbone(ids(1)[:, :8]), rtol=1e-12, atol=1e-12)
    assert torch.isfinite(hidden).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named_and_the_head_not_blamed(value):
    model = tiny("llama")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = value
    message = r"split_head: model: expected finite weights, got NaN or infinity in 1 of its tensors, .*up_proj.weight"
    with pytest.raises(ValueError, match=message):
        split_head(model)


def test_gradients_reach_the_backbone_through_hidden_states():
    model = tiny("gemma3")
    split_head(model).backbone(ids(), causal(2, LENGTH)).sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


def test_dropout_does_not_disturb_the_check_and_training_mode_survives_it():
    model = tiny("gpt2").train()
    model.transformer.h[0].eval()
    split_head(model)
    assert model.training
    assert model.transformer.drop.training
    assert not model.transformer.h[0].attn.training


class Bent(torch.nn.Module):
    """A head that is not a Linear."""

    def __init__(self, head):
        super().__init__()
        self.head, self.weight = head, head.weight

    def forward(self, hidden):
        return self.head(hidden)


def test_a_head_that_is_not_linear_is_refused_by_name():
    model = tiny("llama")
    model.lm_head = Bent(model.lm_head)
    with pytest.raises(ValueError, match=r"split_head: head: expected a torch.nn.Linear, got Bent\."):
        split_head(model)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match=r"expected a model with output embeddings, got LlamaModel\."):
        split_head(tiny("llama").model)


def test_unknown_arithmetic_on_the_logits_is_refused(monkeypatch):
    model = tiny("llama")
    halves = split_head(model)
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda *a, **k: type("Output", (), {"logits": forward(*a, **k).logits.square()})
    )
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM whose own differ .* This model's head cannot be split off\."
    ):
        split_head(model)
    assert halves.logit_scale == 1.0


def test_hidden_states_that_are_not_the_heads_input_are_refused():
    model = tiny(OPTConfig(vocab_size=VOCAB, hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2))
    assert split_head(model).weight.shape == (VOCAB, 16)
    scaled = model.forward
    model.forward = lambda *args, **kwargs: type("Output", (), {"logits": scaled(*args, **kwargs).logits + 0.1})
    with pytest.raises(ValueError, match="cannot be split off"):
        split_head(model)


@pytest.fixture
def one_rank_mesh():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_a_sharded_head_is_refused(one_rank_mesh):
    model = tiny("llama")
    torch.distributed.fsdp.fully_shard(model.lm_head, mesh=one_rank_mesh)
    with pytest.raises(
        ValueError, match=r"head.weight: expected a plain tensor, got a DTensor\. Split the model before"
    ):
        split_head(model)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 1, 3, 3, dtype=torch.bool), r"shape \(2, 1, 11, 11\)"),
        (torch.ones(2, 1, LENGTH, LENGTH), r"expected torch.bool when 4-D, got torch.float32"),
    ],
)
def test_a_4d_mask_of_another_shape_or_dtype_is_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        split_head(tiny("llama")).backbone(ids(), mask)


def test_attention_that_takes_no_dense_mask_refuses_one():
    model = tiny("llama")
    halves = split_head(model)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"Load the model with attn_implementation='sdpa'\."):
        halves.backbone(ids(), causal(2, LENGTH))


def test_layers_of_another_kind_refuse_a_dense_mask():
    model = tiny("qwen3")
    halves = split_head(model)
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match=r"layers of kind linear_attention\. Give each sequence its own row\."):
        halves.backbone(ids(), causal(2, LENGTH))


@pytest.mark.model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smollm2_sharing_a_row_rounds_no_worse_than_with_rows_of_its_own(dtype):
    model, tokenizer = load_model("smollm2-135m-instruct", dtype)
    model.model.layers = model.model.layers[:4]  # enough to see a mask, and quick in float64
    model.config.num_hidden_layers = 4
    halves = split_head(model)
    assert halves.weight is model.get_input_embeddings().weight
    rows = [tokenizer(text, return_tensors="pt").input_ids for text in ("The sky is blue.", "Two and two")]
    mask = torch.block_diag(*(torch.ones(row.shape[1], row.shape[1]) for row in rows)).tril().bool()[None, None]
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    with torch.no_grad():
        shared = halves.backbone(torch.cat(rows, dim=1), mask, positions).double()
        alone = torch.cat([halves.backbone(row) for row in rows], dim=1).double()
        model.double()
        exact = torch.cat([halves.backbone(row) for row in rows], dim=1)
    assert (shared - exact).norm() <= 2 * (alone - exact).norm()


FALCON_H1 = {"mamba_d_ssm": 48, "mamba_n_heads": 4, "mamba_d_head": 12, "mamba_d_state": 8, "hidden_size": 48}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("config", "scale", "softcap"),
    [
        (FalconH1Config(**SIZES | FALCON_H1 | {"head_dim": 12}, lm_head_multiplier=0.5), 0.5, None),
        (RecurrentGemmaConfig(**SIZES | {"num_hidden_layers": 3}, lru_width=16, logits_soft_cap=30.0), 1.0, 30.0),
        *([(NanoChatConfig(**SIZES, final_logit_softcapping=15.0), 1.0, 15.0)] if NanoChatConfig else []),
    ],
    ids=["falcon_h1", "recurrent_gemma", *(["nanochat"] if NanoChatConfig else [])],
)
def test_constants_of_the_logits_are_found_under_every_name_and_seen_however_small_the_logits_are(
    config, scale, softcap, dtype
):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    halves = split_head(model)
    assert (halves.logit_scale, halves.softcap) == (scale, softcap)
    for wrong in ({"logit_scale": 2 * scale}, {"softcap": 7.0}):
        with pytest.raises(ValueError, match="split_head: model: expected logits that follow from") as caught:
            split_head(model, **wrong)
        advice = re.search(r"With logit_scale=([\d.]+)(?: and softcap=([\d.]+))? they agree", str(caught.value))
        rounding = 1e-3 if dtype == torch.float32 else 1e-2
        assert float(advice[1]) == pytest.approx(scale, rel=rounding)
        assert (advice[2] and float(advice[2])) == (softcap and pytest.approx(softcap, rel=rounding))


def test_constants_by_hand_take_the_place_of_the_configurations():
    model = tiny("cohere")
    scale = model.config.logit_scale
    model.config.logit_scale = None  # of a model whose configuration calls it something else
    with pytest.raises(ValueError, match=rf"With logit_scale={scale:.4g} they agree: pass them to split_head"):
        split_head(model)
    assert split_head(model, logit_scale=scale).logit_scale == scale


def test_the_check_leaves_no_hook_behind():
    model = tiny("llama")
    split_head(model)
    assert not model.lm_head._forward_pre_hooks
    assert LARGE >= 100  # where a cap of 30 is far from straight


def test_an_encoder_and_decoder_is_refused_by_name():
    config = T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="got T5ForConditionalGeneration, an encoder and a decoder"):
        split_head(T5ForConditionalGeneration(config))


def test_rows_behind_the_vocabulary_are_in_no_logits():
    halves = split_head(tiny("llama"), 30)
    hidden = halves.backbone(ids())
    assert halves.logits(hidden).shape[-1] == 30
    assert halves.options["vocab_size"] == 30
