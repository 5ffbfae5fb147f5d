import copy
import gc
import re
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from test_families import FAMILIES, IDS
from test_head import CONFIGS, LENGTH, VOCAB, exact_softmax, ids, one_rank_mesh, tiny  # noqa: F401
from tolerance import assert_no_worse
from torch.nn.parallel import DistributedDataParallel
from trainer.tiny import write_model
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    PersimmonConfig,
)

import fastrl
from fastrl.model import logps as module
from fastrl.model.load import load_model

NOTHING = dict.fromkeys(("cache", "past_key_values", "hidden_states", "attentions"))


def by_logits(model, input_ids, *, temperature=1.0, **inputs):
    """(B, L) log-probabilities and entropies from the model's own logits; 0 at each row's first token."""
    logits = model(input_ids, **inputs).logits.double()[:, :-1] / temperature
    logp = torch.log_softmax(logits, -1)
    first = logp.new_zeros(len(input_ids), 1)
    taken = logp.gather(-1, input_ids[:, 1:, None])[..., 0]
    return torch.cat([first, taken], 1), torch.cat([first, -(logp.exp() * logp).sum(-1)], 1)


def fresh(name):
    """A model whose configuration no other test has."""
    return tiny(copy.deepcopy(CONFIGS[name]), attention="eager" if name == "gemma2" else "sdpa")


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.fixture
def accelerator():
    """Accelerator's precision is one for the whole process, until it is reset."""
    accelerate = pytest.importorskip("accelerate")

    def reset():
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)

    reset()  # trainers of earlier tests have chosen one
    yield accelerate.Accelerator
    reset()


@pytest.mark.parametrize("name", CONFIGS)
def test_each_place_holds_the_log_probability_of_its_own_token_and_the_entropy_it_was_drawn_from(name):
    model = tiny(name)
    expected, entropy = by_logits(model, ids())
    out = fastrl.logps(model, ids(), entropy=True)
    assert out.logps.shape == ids().shape
    assert (out.logps[:, 0] == 0).all()
    assert (out.entropy[:, 0] == 0).all()
    close(out.logps, expected)
    close(out.entropy, entropy)
    assert fastrl.logps(model, ids()).entropy is None


def test_the_last_columns_are_the_completions_log_probabilities_as_trl_selects_them():
    from trl.trainer.utils import selective_log_softmax

    model, width = tiny("llama"), 4
    logits = model(ids(), logits_to_keep=width + 1).logits[:, :-1]
    close(fastrl.logps(model, ids()).logps[:, -width:], selective_log_softmax(logits, ids()[:, -width:]))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "cohere"])
def test_gradients_of_log_probabilities_and_entropies_are_those_of_the_logits(name):
    model = tiny(name)
    twin = copy.deepcopy(model)
    factor = torch.rand(2, 2, LENGTH, dtype=torch.float64)
    out = fastrl.logps(model, ids(), entropy=True)
    (factor[0] * out.logps + factor[1] * out.entropy).sum().backward()
    expected, entropy = by_logits(twin, ids())
    (factor[0] * expected + factor[1] * entropy).sum().backward()
    for ours, own in zip(model.parameters(), twin.parameters(), strict=True):
        close(ours.grad, own.grad)


def test_in_bfloat16_values_and_gradients_are_no_worse_than_from_rounded_logits():
    model = tiny("llama", dtype=torch.bfloat16)
    hidden = model.model(ids()).last_hidden_state.detach()
    model.model.forward = lambda *args, **named: type("Output", (), {"last_hidden_state": hidden} | NOTHING)
    exact, plain = model.lm_head.weight.detach().double().requires_grad_(), copy.deepcopy(model)
    values = [fastrl.logps(model, ids()).logps, *(by_logits(plain, ids())[0].float(),)]
    true = torch.log_softmax(hidden.double() @ exact.T, -1)[:, :-1].gather(-1, ids()[:, 1:, None])[..., 0]
    weights = torch.rand(2, LENGTH - 1)
    for one in (values[0][:, 1:], values[1][:, 1:], true):
        (weights.to(one.dtype) * one).sum().backward()
    assert values[0].dtype == torch.float32
    assert_no_worse(values[0][:, 1:].detach(), values[1][:, 1:].detach(), true.detach())
    assert_no_worse(model.lm_head.weight.grad, plain.lm_head.weight.grad, exact.grad)


@pytest.mark.parametrize("kind", ["ids", "mask"])
def test_only_labelled_tokens_are_scored_and_go_through_the_head(kind, monkeypatch):
    rows = []
    op = module.linear_logprob
    monkeypatch.setattr(module, "linear_logprob", lambda h, *a, **k: rows.append(len(h)) or op(h, *a, **k))
    mask = torch.zeros(2, LENGTH, dtype=torch.bool)
    mask[0, 4:7] = mask[1, :2] = True
    labels = mask if kind == "mask" else torch.where(mask, ids(), -100)
    model = tiny("llama")
    expected, _ = by_logits(model, ids())
    out = fastrl.logps(model, ids(), labels=labels)
    close(out.logps, torch.where(mask, expected, 0.0))
    assert rows == [4]  # three, and the second of two: nothing is before the first


def test_labels_may_be_other_tokens_than_were_read():
    model, others = tiny("llama"), ids().flip(1)
    logp = torch.log_softmax(model(ids()).logits[:, :-1], -1)
    close(fastrl.logps(model, ids(), labels=others).logps[:, 1:], logp.gather(-1, others[:, 1:, None])[..., 0])


def test_without_any_label_the_result_is_zero_and_still_has_a_backward_pass():
    model = tiny("llama")
    out = fastrl.logps(model, ids(), labels=torch.zeros(2, LENGTH, dtype=torch.bool), entropy=True)
    (out.logps + out.entropy).sum().backward()
    assert (out.logps == 0).all()
    assert all(one.grad is None or (one.grad == 0).all() for one in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_and_its_places_are_zero(name, side, exact_softmax):  # noqa: F811
    model, short = tiny(name), ids(1, 7)
    pad = torch.zeros(1, LENGTH - 7, dtype=torch.long)
    parts = (pad, short) if side == "left" else (short, pad)
    mask = torch.cat([torch.full_like(part, part is short) for part in parts], 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    out = fastrl.logps(model, torch.cat(parts, 1), mask, position_ids=positions, entropy=True)
    alone = fastrl.logps(model, short, entropy=True)
    for padded, expected in zip(out[:2], alone[:2], strict=True):
        close(padded[mask.bool()], expected[0])
        assert (padded[~mask.bool()] == 0).all()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("padding", [0, 2])
def test_sequences_packed_in_a_row_equal_rows_of_their_own(name, padding, exact_softmax):  # noqa: F811
    model, row = tiny(name), ids(1)
    bounds = [(0, 6), (6, 7), (7, LENGTH - padding)]
    positions = torch.cat([torch.arange(b - a) for a, b in [*bounds, (0, padding)]])[None]
    mask = (torch.arange(LENGTH) < LENGTH - padding).long()[None] if padding else None
    packed = fastrl.logps(model, row, mask, position_ids=positions, entropy=True)
    for a, b in bounds:
        alone = fastrl.logps(model, row[:, a:b], entropy=True)
        close(packed.logps[:, a:b], alone.logps)
        close(packed.entropy[:, a:b], alone.entropy)
    assert (packed.logps[:, LENGTH - padding :] == 0).all()


@pytest.mark.parametrize("kind", ["number", "per_sequence", "per_token"])
def test_temperature_divides_the_logits(kind):
    model = tiny("gemma2")
    given = {"number": 0.7, "per_sequence": torch.tensor([[0.7], [1.3]]), "per_token": torch.rand(2, LENGTH) + 0.5}[
        kind
    ]
    temperature = given if kind == "number" else given.double().broadcast_to(2, LENGTH)[:, 1:, None]
    expected, _ = by_logits(model, ids(), temperature=temperature)
    torch.testing.assert_close(fastrl.logps(model, ids(), temperature=given).logps, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_adapters_count_and_train(targets):
    config = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(tiny("llama"), config).double()
    expected, _ = by_logits(model, ids())
    out = fastrl.logps(model, ids())
    close(out.logps, expected)
    parameters = [one for one in model.parameters() if one.requires_grad]
    assert len(parameters) == 4 if targets == ["q_proj"] else 6
    ours = torch.autograd.grad(out.logps.sum(), parameters)
    for one, own in zip(ours, torch.autograd.grad(expected.sum(), parameters), strict=True):
        close(one, own)
    with model.disable_adapter():
        assert (fastrl.logps(model, ids()).logps - out.logps).abs().max() > 1e-3


def test_the_split_is_made_once(monkeypatch):
    made, split = [], module.split_head
    monkeypatch.setattr(module, "split_head", lambda model: made.append(model) or split(model))
    model = tiny("llama")
    for _ in range(3):
        fastrl.logps(model, ids())
    assert len(made) == 1


def grown(model):
    model.resize_token_embeddings(VOCAB + 3)
    return model


def capped(model):
    model.config.final_logit_softcapping = 0.1
    return model


def head_replaced(model):
    model.lm_head = torch.nn.Linear(16, VOCAB, dtype=torch.float64)
    return model


def adapted(model):
    config = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    get_peft_model(model, config).double()
    return model


@pytest.mark.parametrize(
    ("change", "name"), [(grown, "llama"), (capped, "gemma2"), (head_replaced, "llama"), (adapted, "llama")]
)
def test_a_head_that_changed_is_seen(change, name):
    model = fresh(name)
    before = fastrl.logps(model, ids()).logps
    model = change(model)
    after = fastrl.logps(model, ids()).logps
    assert (after - before).abs().max() > 1e-3
    close(after, by_logits(model, ids())[0])


def test_remembering_the_split_keeps_no_model_alive():
    model = tiny("llama")
    fastrl.logps(model, ids())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_nothing_of_the_model_changes():
    model = tiny("gpt2").train()
    state = {name: dict(vars(one)) for name, one in model.named_modules()}
    fastrl.logps(model, ids())
    assert {name: dict(vars(one)) for name, one in model.named_modules()} == state
    with pytest.raises(IndexError):
        fastrl.logps(model, ids(), labels=ids() + VOCAB)
    assert {name: dict(vars(one)) for name, one in model.named_modules()} == state


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_log_probabilities_of_its_own_logits(family):
    model = FAMILIES[family].model()
    out = fastrl.logps(model, IDS, entropy=True)
    with torch.no_grad():
        logits = model(IDS, use_cache=False).logits
    scale = logits.abs().max().item()
    logp = torch.log_softmax(logits.double(), -1)[:, :-1]
    expected = logp.gather(-1, IDS[:, 1:, None])[..., 0]
    torch.testing.assert_close(out.logps[:, 1:].double(), expected, rtol=1e-6, atol=1e-6 * scale)
    entropy = -(logp.exp() * logp).sum(-1)
    torch.testing.assert_close(out.entropy[:, 1:].double(), entropy, rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.parametrize("kind", ["fused_head", "modules_to_save"])
def test_a_wrapped_head_scores_and_trains(kind):
    model = fresh("llama")
    if kind == "fused_head":
        model.lm_head = fastrl.FusedLMHead(model.lm_head)
        weight = model.lm_head.lm_head.weight
    else:
        config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
        model = get_peft_model(model, config).double()
        weight = model.base_model.model.lm_head.modules_to_save["default"].weight
    for _ in range(2):
        out = fastrl.logps(model, ids())
        expected, _ = by_logits(model, ids())
        close(out.logps, expected)
        (ours,), (own,) = torch.autograd.grad(out.logps.sum(), weight), torch.autograd.grad(expected.sum(), weight)
        close(ours, own)
        with torch.no_grad():
            weight.mul_(1.5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite"])
def test_a_model_in_accelerates_bfloat16_gives_what_it_gives_in_that_autocast(name, accelerator):
    plain = fresh(name).float()
    prepared = accelerator(mixed_precision="bf16", cpu=True).prepare(copy.deepcopy(plain))
    assert "forward" in vars(prepared)  # accelerate's wrapper
    with torch.autocast("cpu", torch.bfloat16):
        expected = fastrl.logps(plain, ids()).logps
    exact = fastrl.logps(plain, ids()).logps
    ours = fastrl.logps(prepared, ids()).logps
    assert torch.equal(ours, expected)
    assert not torch.equal(ours, exact)
    (ours.sum() - expected.sum()).backward()
    for one, own in zip(prepared.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, -own.grad)


def test_images_and_other_inputs_reach_the_model():
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=4, patch_size=2
    )
    text = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=40, vision_feature_layer=-1)
    model = LlavaForConditionalGeneration(config).double().eval()
    row = torch.cat([torch.full((1, 4), 40), ids(1).clamp_max(39)], 1)
    images = torch.rand(2, 1, 3, 4, 4, dtype=torch.float64)
    outs = [fastrl.logps(model, row, pixel_values=one).logps for one in images]
    for one, out in zip(images, outs, strict=True):
        close(out, by_logits(model, row, pixel_values=one)[0])
    assert (outs[0] - outs[1]).abs().max() > 1e-6
    outs[0].sum().backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().max() > 0


def test_a_mixture_of_experts_gives_its_log_probabilities_with_router_logits_asked_for_or_not():
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    model = tiny(MixtralConfig(**sizes, **heads), dtype=torch.float32)
    expected = by_logits(model, ids())[0].float()
    for ask in (False, True):
        out = fastrl.logps(model, ids(), output_router_logits=ask).logps
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_distributed_data_parallel_fills_its_gradients(one_rank_mesh):  # noqa: F811
    model = tiny("llama")
    plain = copy.deepcopy(model)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    for _ in range(2):  # the second forward fails if the first one's gradients were not all seen
        fastrl.logps(wrapped, ids()).logps.sum().backward()
    fastrl.logps(plain, ids()).logps.sum().backward()
    close(model.lm_head.weight.grad, 2 * plain.lm_head.weight.grad)


def test_a_head_sharded_after_its_split_is_gathered_by_its_own_call(one_rank_mesh):  # noqa: F811
    model = tiny("llama")
    expected = fastrl.logps(model, ids()).logps
    expected.sum().backward()
    grad = model.lm_head.weight.grad
    model.zero_grad()
    for part in (model.lm_head, model):
        torch.distributed.fsdp.fully_shard(part, mesh=one_rank_mesh)
    out = fastrl.logps(model, ids()).logps
    out.sum().backward()
    close(out, expected)
    close(model.lm_head.weight.grad.full_tensor(), grad)


class Scaled(torch.nn.Module):
    """A model that scales its states before the head by what its configuration calls a scale of logits, and more."""

    def __init__(self, model, more):
        super().__init__()
        self.model, self.config, self.more = model, model.config, more

    def get_output_embeddings(self):
        return self.model.lm_head

    def get_decoder(self):
        return self.model.model

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None):
        hidden = self.model.model(input_ids, use_cache=False).last_hidden_state
        logits = self.model.lm_head(hidden * self.config.logit_scale / self.more) * self.more
        return type("Output", (), {"logits": logits})


def test_a_scale_before_the_head_counts_once_and_a_split_one_is_refused():
    inner = fresh("llama")
    inner.config.logit_scale = 0.5
    model = Scaled(inner, 1.0)
    close(fastrl.logps(model, ids()).logps, by_logits(model, ids())[0])
    with pytest.raises(
        ValueError, match="expected a model whose head takes the decoder's last hidden state, got a Sca"
    ):
        fastrl.logps(Scaled(inner, 4.0), ids())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"labels": torch.ones(2, LENGTH - 1).long()},
            r"logps: labels: expected shape \(2, 11\) .* Do not shift them\.",
        ),
        ({"attention_mask": torch.ones(2, LENGTH + 1)}, r"logps: attention_mask: expected shape \(2, 11\)"),
        ({"position_ids": torch.ones(1, LENGTH).long()}, r"logps: position_ids: expected shape \(2, 11\)"),
        ({"attention_mask": (torch.arange(LENGTH) != 5).expand(2, -1)}, r"side by side, got a row with a gap\. Move"),
        ({"logits_to_keep": 3}, r"logps: hidden states: expected shape \(2, 11, 16\) .* got \(2, 3, 16\)"),
    ],
)
def test_inputs_that_would_shift_or_drop_tokens_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        fastrl.logps(tiny("llama"), ids(), **inputs)


def test_models_whose_forward_cannot_be_entered_are_refused_by_name():
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"got OptimizedModule\. Pass the model itself, and compile its decoder"):
        fastrl.logps(torch.compile(model), ids())
    with pytest.raises(ValueError, match=r"got DataParallel\. Use DistributedDataParallel"):
        fastrl.logps(torch.nn.DataParallel(model), ids())
    with pytest.raises(ValueError, match=r"expected a transformers model, got Linear"):
        fastrl.logps(torch.nn.Linear(2, 2), ids())
    prompted = get_peft_model(model, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="prompt tuning"):
        fastrl.logps(prompted, ids())


def test_packing_is_refused_where_layers_cannot_keep_sequences_apart():
    model = fresh("qwen3")
    fastrl.logps(model, ids())
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match=r"layers of kind linear_attention\. Give each sequence its own row\."):
        fastrl.logps(model, ids(), position_ids=(torch.arange(LENGTH) % 6).expand(2, -1))


def test_a_compiled_decoder_gives_the_same():
    model = tiny(PersimmonConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                 num_attention_heads=2))  # fmt: skip
    expected = fastrl.logps(model, ids()).logps
    model.get_decoder().compile(backend="eager")
    close(fastrl.logps(model, ids()).logps, expected)


def test_the_documented_example_trains(tmp_path, monkeypatch):
    doc = (Path(__file__).parents[2] / "docs/integrations/plain_torch.md").read_text()
    code, of_engine = re.findall(r"```python\n(.*?)```", doc, flags=re.DOTALL)
    assert len(code.strip().splitlines()) <= 15
    folder = write_model(tmp_path / "model")
    monkeypatch.setattr("fastrl.model.load.load_model", lambda name, dtype: load_model(folder, dtype))
    names = {}
    exec(code, names)
    before, _ = load_model(folder)
    pairs = zip(names["model"].parameters(), before.parameters(), strict=True)
    assert all(not torch.equal(*pair) for pair in pairs)
    assert names["model"].lm_head.weight.isfinite().all()

    rows = zip(names["ids"], names["mask"], strict=True)
    kept = [[sorted({one, 3, 7}) for one in row[chosen].tolist()] for row, chosen in rows]
    names["requests"] = [SimpleNamespace(outputs=[SimpleNamespace(sampling_mask=sets) for sets in kept])]
    names["model"].double()
    exec(of_engine, names)
    z, targets, chosen = names["model"](names["ids"]).logits[:, :-1], names["ids"][:, 1:], names["mask"][:, 1:]
    keep = torch.zeros_like(z, dtype=torch.bool).scatter_(-1, targets[..., None], True)
    keep[..., [3, 7]] = True
    log_p = z.masked_fill(~keep, -torch.inf).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    expected = log_p.masked_fill(~chosen, 0)
    assert (expected < -0.1).any()
    close(names["logps"][:, 1:], expected)


def test_sets_are_of_the_tokens_that_are_scored():
    model, sets = fresh("qwen3"), (torch.tensor([3]), torch.tensor([0, 1]))
    scored = ids().shape[0] * (LENGTH - 1)
    with pytest.raises(ValueError, match=f"^logps: support: expected {scored} sets, one for each token .* got 1"):
        fastrl.logps(model, ids(), support=sets)
