import copy
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from model.test_families import FAMILIES, IDS
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from trainer.tiny import write_model
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Trainer,
    TrainingArguments,
)

from fastrl.integrations import hf

DOC = (Path(__file__).parents[2] / "docs/integrations/hf.md").read_text()
VOCAB, LENGTH = 41, 12
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
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.5}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama_tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES),
    "gemma2": Gemma2Config(**SIZES, final_logit_softcapping=0.5, attn_implementation="eager"),
    "cohere": CohereConfig(**SIZES, logit_scale=0.25),
    "granite": GraniteConfig(**SIZES, logits_scaling=7.0),
    "gpt2": GPT2Config(vocab_size=VOCAB, **GPT2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "mixtral": MixtralConfig(**SIZES, **EXPERTS, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, **EXPERTS, num_experts=4, moe_intermediate_size=8),
}
DENSE = ["llama", "llama_tied", "qwen3", "gemma2", "cohere", "granite", "gpt2"]


@pytest.fixture(autouse=True)
def no_precision_of_an_earlier_test(monkeypatch):
    """The TrainingArguments of transformers 4 write theirs into the environment, where the next ones read it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


def tiny(name="llama", dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).to(dtype).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def batch(rows=3):
    """Rows of one length, with prompts and padding of several lengths that have no label."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (rows, LENGTH), generator=draw)
    labels, mask = ids.clone(), torch.ones_like(ids)
    for row in range(rows):
        labels[row, : 2 + 2 * row] = -100
        labels[row, LENGTH - row :] = -100
        mask[row, LENGTH - row :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model, **inputs):
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    return out, {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def agree(ours, own, rtol=1e-5):
    """Gradients or weights that are equal to a few roundings of the largest."""
    assert ours.keys() == own.keys()
    for name in own:
        scale = own[name].abs().max().item()
        torch.testing.assert_close(ours[name], own[name], rtol=0, atol=rtol * max(scale, 1e-3), msg=name)


KINDS = {
    "mean": {},
    "items": {"num_items_in_batch": torch.tensor(57)},
    "items_int": {"num_items_in_batch": 57},
    "shift_labels": {"shift_labels": torch.arange(3 * LENGTH).view(3, LENGTH) % VOCAB},
    "ignore_index": {"ignore_index": 5},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_the_models_own_and_there_are_no_logits(name, kind):
    model, inputs = tiny(name), batch() | KINDS[kind]
    if kind == "ignore_index":
        inputs["labels"] = inputs["labels"].clamp_min(5)
    own, own_grads = gradients(model, **inputs)
    with hf.accelerate(model):
        out, grads = gradients(model, **inputs)
    torch.testing.assert_close(out.loss, own.loss, rtol=1e-6, atol=1e-6)  # float32; twelve digits in float64 below
    agree(grads, own_grads)
    assert own.logits is not None
    assert out.logits is None
    assert set(out.keys()) == set(own.keys()) - {"logits"}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_keeps_its_loss(name):
    model = FAMILIES[name].model()
    if name == "gemma3_vl" and "loss_function" not in inspect.getsource(type(model).forward):
        pytest.skip(f"Gemma 3 with vision computes its loss itself in transformers {transformers.__version__}")
    own, own_grads = gradients(model, input_ids=IDS, labels=IDS)
    hf.accelerate(model, logits="never")
    out, grads = gradients(model, input_ids=IDS, labels=IDS)
    assert out.logits is None
    # float32 through recurrent layers and experts, whose own orders of summation differ by as much.
    torch.testing.assert_close(out.loss, own.loss, rtol=1e-5, atol=1e-5)
    agree(grads, own_grads, rtol=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_the_routers_loss_is_added_as_the_model_adds_it(name):
    model, inputs = tiny(name), batch()
    with hf.accelerate(model):
        out = model(**inputs)
        without = model(**inputs, output_router_logits=False)
    assert out.aux_loss > 0
    assert out.router_logits is not None
    torch.testing.assert_close(out.loss, without.loss + 0.5 * out.aux_loss)


def test_in_float64_the_loss_is_the_models_own_to_twelve_digits(monkeypatch):
    model, inputs = tiny(dtype=torch.float64), batch()
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # transformers takes the loss in float32
    own, own_grads = gradients(model, **inputs)
    hf.accelerate(model)
    out, grads = gradients(model, **inputs)
    torch.testing.assert_close(out.loss, own.loss, rtol=1e-12, atol=1e-12)
    agree(grads, own_grads, rtol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_in_bfloat16_the_loss_is_no_farther_from_float32s_than_the_models_own(autocast):
    exact = tiny()
    model = copy.deepcopy(exact) if autocast else tiny(dtype=torch.bfloat16)
    if not autocast:
        exact = copy.deepcopy(model).float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        own, own_grads = gradients(model, **batch())
        hf.accelerate(model)
        out, grads = gradients(model, **batch())
    true, true_grads = gradients(exact, **batch())
    assert out.loss.dtype == torch.float32
    eps = torch.finfo(torch.bfloat16).eps
    assert abs(out.loss - true.loss) <= abs(own.loss - true.loss) + eps * true.loss
    for name, grad in grads.items():
        assert grad.dtype == own_grads[name].dtype
        error, plain = ((one[name].double() - true_grads[name]).norm() for one in (grads, own_grads))
        assert error <= 1.5 * plain + eps * true_grads[name].norm(), name


class Rows(torch.utils.data.Dataset):
    """Rows with a column that no model takes."""

    def __init__(self, count=12):
        self.rows = [{name: one[i % 3] for name, one in batch().items()} | {"text": "x"} for i in range(count)]
        for i, row in enumerate(self.rows):
            row["input_ids"] = row["input_ids"].roll(i)
            row["labels"] = torch.where(row["labels"] == -100, -100, row["input_ids"])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def trainer(model, folder, *, metrics=None, **options):
    defaults = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "seed": 3}
    arguments = TrainingArguments(output_dir=str(folder), **defaults | quiet | options)
    return Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows(4), compute_metrics=metrics)


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def logits_per_call(model):
    """A list that grows with each product of the head: the width of what it gave."""
    widths = []
    model.get_output_embeddings().register_forward_hook(lambda _, args, out: widths.append(out.shape[-1]))
    return widths


def lora(model, targets=("q_proj", "v_proj")):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=list(targets), task_type="CAUSAL_LM", lora_dropout=0.0)
    return get_peft_model(model, config)


OPTIONS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    "checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},  # transformers 5's default, and adapters need it
        "gradient_accumulation_steps": 2,
    },
    "autocast": {"bf16": True},
    "smoothing": {"label_smoothing_factor": 0.1},
}


@pytest.mark.parametrize("adapters", [(), ("q_proj",), ("q_proj", "lm_head")], ids=["full", "lora", "lora_head"])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_trainer_takes_the_same_steps(tmp_path, options, adapters):
    runs, widths = [], []
    for fused in (False, True):
        model = lora(tiny(), adapters) if adapters else tiny()
        if fused:
            hf.accelerate(model)
        widths.append(logits_per_call(model))
        runs.append(trainer(model, tmp_path, **OPTIONS[options]))
        runs[-1].train()
    plain, fused = runs
    # Under autocast transformers rounds the logits to bfloat16, eight bits, and fastrl does not.
    rounding = 2e-2 if options == "autocast" else 1e-5
    assert len(losses(fused)) == 3
    np.testing.assert_allclose(losses(fused), losses(plain), rtol=rounding)
    norms = [[e["grad_norm"] for e in run.state.log_history if "grad_norm" in e] for run in runs]
    np.testing.assert_allclose(norms[1], norms[0], rtol=5 * rounding)
    if options != "autocast":  # Adam's first steps have the size of the learning rate, however small the gradient
        agree(dict(fused.model.named_parameters()), dict(plain.model.named_parameters()), rtol=1e-3)
    assert set(widths[0]) == {VOCAB}
    assert set(widths[1]) == ({VOCAB} if options == "smoothing" else set(widths[1]) - {VOCAB})


def test_gradient_accumulation_weighs_tokens_not_micro_batches(tmp_path):
    """Three micro-batches with other numbers of labels than each other step like one batch of all:
    https://github.com/fla-org/flash-linear-attention/issues/539"""
    weights = []
    for options in ({"per_device_train_batch_size": 6}, {"gradient_accumulation_steps": 3}):
        model = tiny()
        hf.accelerate(model)
        run = trainer(model, tmp_path, max_steps=1, optim="sgd", max_grad_norm=0.0, **options)
        run.train()
        weights.append(dict(model.named_parameters()))
    agree(weights[1], weights[0], rtol=1e-6)


def accuracy(prediction):
    logits, labels = prediction
    assert logits.shape == (4, LENGTH, VOCAB)
    right = logits[:, :-1].argmax(-1) == labels[:, 1:]
    return {"accuracy": right[labels[:, 1:] != -100].mean()}


@pytest.mark.parametrize(("logits", "metrics"), [("eval", None), ("eval", accuracy), ("never", None)])
def test_evaluation_gives_the_same_numbers(tmp_path, logits, metrics):
    """Without metrics it can do without logits: https://github.com/huggingface/trl/pull/5069"""
    model = tiny()
    own = trainer(model, tmp_path, metrics=metrics).evaluate()
    hf.accelerate(model, logits=logits)
    widths = logits_per_call(model)
    ours = trainer(model, tmp_path, metrics=metrics).evaluate()
    assert ours["eval_loss"] == pytest.approx(own["eval_loss"], rel=1e-6)
    assert ours.get("eval_accuracy") == own.get("eval_accuracy")
    assert (VOCAB in widths) == (logits == "eval")


def test_evaluation_between_steps_has_logits_and_training_goes_on_without(tmp_path):
    model = tiny()
    hf.accelerate(model)
    widths = logits_per_call(model)
    run = trainer(model, tmp_path, metrics=accuracy, eval_strategy="steps", eval_steps=2)
    run.train()
    assert [width == VOCAB for width in widths[:4]] == [False, False, True, False]
    assert any("eval_accuracy" in entry for entry in run.state.log_history)


def test_columns_that_the_model_does_not_take_are_removed_as_before(tmp_path):
    model = tiny()
    signature = inspect.signature(model.forward)
    with hf.accelerate(model):
        assert inspect.signature(model.forward) == signature
        assert trainer(model, tmp_path).model_accepts_loss_kwargs


def test_a_call_decides_about_its_logits():
    model, inputs = tiny(), batch()
    labels = inputs.pop("labels")
    with hf.accelerate(model):
        assert model(**inputs).logits.shape == (3, LENGTH, VOCAB)
        assert model(**inputs, labels=labels).logits is None
        assert model(**inputs, labels=labels, skip_logits=False).logits is not None
        assert model(inputs["input_ids"], inputs["attention_mask"], labels=labels).logits is None
        assert model(**inputs, logits_to_keep=1).logits.shape == (3, 1, VOCAB)
        model.eval()
        assert model(**inputs, labels=labels).logits is not None
        assert model(**inputs, labels=labels, skip_logits=True).logits is None
    with hf.accelerate(model, logits="never"):
        assert model(**inputs, labels=labels).logits is None
        assert model(**inputs).logits is not None


def test_other_outputs_come_as_before():
    model, inputs = tiny(), batch() | {"output_hidden_states": True}
    own = model(**inputs)
    hf.accelerate(model)
    out = model(**inputs)
    assert len(out.hidden_states) == len(own.hidden_states) == 3
    for ours, theirs in zip(out.hidden_states, own.hidden_states, strict=True):
        assert torch.equal(ours, theirs)


def test_generate_gives_the_same_tokens():
    model = tiny().eval()
    prompt = batch()["input_ids"][:, :4]
    own = model.generate(prompt, max_new_tokens=5, do_sample=False)
    hf.accelerate(model, logits="never")
    assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=False), own)


def test_applied_twice_it_changes_nothing_more_and_undo_gives_the_very_forward_back():
    model, given = tiny(), batch()
    mine = model.forward
    first = hf.accelerate(model)
    fused = model.forward
    second = hf.accelerate(model)
    assert model.forward is fused
    second.undo()
    assert model.forward is fused
    first.undo()
    assert "forward" not in vars(model)
    assert model(**given).logits is not None
    model.forward = mine
    with hf.accelerate(model):
        assert model(**given).logits is None
    assert vars(model)["forward"] is mine


def test_undo_after_a_trainers_autocast_wants_it_taken_off_first(tmp_path):
    model = tiny()
    handle = hf.accelerate(model)
    trainer(model, tmp_path, bf16=True).train()
    with pytest.raises(RuntimeError, match=r"Undo what replaced it first\."):
        handle.undo()
    model.forward = model._original_forward
    handle.undo()
    assert "forward" not in vars(model)


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "mixtral"])
def test_a_model_that_a_trainer_ran_in_autocast_before_gets_the_same_loss_and_gradients(name, tmp_path):
    model = tiny(name)
    trainer(model, tmp_path, bf16=True).evaluate()
    wrapper = vars(model)["forward"]
    model.train()
    own, own_grads = gradients(model, **batch())
    with hf.accelerate(model):
        out, grads = gradients(model, **batch())
    assert vars(model)["forward"] is wrapper
    assert out.logits is None
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(out.loss, own.loss, rtol=eps, atol=0)
    for key, grad in own_grads.items():
        assert (grads[key] - grad).norm() <= 4 * eps * grad.norm() + 1e-6, key


def test_nothing_but_forward_changes_even_if_a_call_fails():
    model = tiny()
    state = {name: dict(vars(one)) for name, one in model.named_modules()}
    with hf.accelerate(model):
        model(**batch())
        with pytest.raises(IndexError):
            model(**batch() | {"labels": batch()["labels"] + VOCAB})
        fused = {name: dict(vars(one)) for name, one in model.named_modules()}
        assert fused[""].pop("forward") is model.forward
        assert fused == state
    assert {name: dict(vars(one)) for name, one in model.named_modules()} == state


def test_a_deep_copy_computes_with_its_own_weights():
    model = tiny()
    hf.accelerate(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.mul_(2.0)
    out, grads = gradients(twin, **batch())
    assert out.logits is None
    assert abs(out.loss - model(**batch()).loss) > 1e-2
    assert "lm_head.weight" in grads
    assert model.lm_head.weight.grad is None


def test_a_resized_vocabulary_and_adapters_added_later_are_seen():
    model, inputs = tiny(), batch()
    hf.accelerate(model)
    model.resize_token_embeddings(VOCAB + 5)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)).train()
    out = adapted(**inputs)
    assert out.logits is None
    torch.testing.assert_close(out.loss, adapted(**inputs, skip_logits=False).loss)


def test_prompt_tuning_trains_its_prompt():
    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    model = get_peft_model(tiny(), config).train()
    own, own_grads = gradients(model, **batch())
    hf.accelerate(model)
    out, grads = gradients(model, **batch())
    assert out.logits is None
    torch.testing.assert_close(out.loss, own.loss)
    agree(grads, own_grads)


@pytest.fixture
def one_rank_mesh():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("wrapper", "name"),
    [("ddp", "llama"), ("ddp", "llama_tied"), ("fsdp", "llama"), ("fsdp", "llama_tied"), ("fsdp_head_too", "llama")],
)
def test_wrapped_models_get_the_same_gradients(one_rank_mesh, wrapper, name):
    model = tiny(name)
    own, own_grads = gradients(model, **batch())
    own_grads = {key: one.clone() for key, one in own_grads.items()}
    model.zero_grad()
    if wrapper == "ddp":
        model = DistributedDataParallel(model)
        hf.accelerate(model)
    else:
        hf.accelerate(model)
        for part in ([model.lm_head] if wrapper == "fsdp_head_too" else []) + [model.model.layers[0], model]:
            torch.distributed.fsdp.fully_shard(part, mesh=one_rank_mesh)
    out, grads = gradients(model, **batch())
    assert out.logits is None
    torch.testing.assert_close(out.loss, own.loss)
    grads = {
        key.removeprefix("module."): getattr(one, "full_tensor", lambda one=one: one)() for key, one in grads.items()
    }
    agree(grads, own_grads)


def test_hooks_of_the_head_fire_and_accelerates_device_hooks_stay():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model, inputs = tiny(), batch()
    own = model(**inputs).loss
    add_hook_to_module(model.lm_head, AlignDevicesHook(execution_device="cpu"))
    hook = model.lm_head.forward
    seen = []
    model.lm_head.register_forward_pre_hook(lambda *_: seen.append(1))
    hf.accelerate(model)
    seen.clear()
    torch.testing.assert_close(model(**inputs).loss, own)
    assert seen == [1]
    assert model.lm_head.forward is hook


@pytest.mark.parametrize("whole", [False, True])
def test_a_compiled_decoder_or_model_gives_the_same_for_each_length(whole):
    model = tiny()
    lengths = (LENGTH, 9)
    inputs = [{name: one[:, :length] for name, one in batch().items()} for length in lengths]
    own = [model(**one).loss for one in inputs]
    hf.accelerate(model)
    if whole:
        model = torch.compile(model, backend="eager")
    else:
        model.get_decoder().compile(backend="eager")
    for one, loss in zip(inputs, own, strict=True):
        torch.testing.assert_close(model(**one).loss, loss)


def test_cpu_also_accelerates_the_other_layers_and_undoes_it():
    model, inputs = tiny(), batch()
    own = model(**inputs).loss
    handle = hf.accelerate(model, cpu=True)
    kind = type(model.model.layers[0].mlp.up_proj)
    assert kind is not torch.nn.Linear
    torch.testing.assert_close(model(**inputs).loss, own)
    handle.undo()
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert "forward" not in vars(model)


def test_logits_to_keep_in_training_mode_keeps_logits():
    """https://github.com/linkedin/Liger-Kernel/issues/694"""
    model, inputs = tiny(), batch()
    inputs["labels"] = inputs["labels"][:, -4:]
    own = model(**inputs, logits_to_keep=4)
    hf.accelerate(model)
    out = model(**inputs, logits_to_keep=4)
    assert out.logits.shape == (3, 4, VOCAB)
    assert torch.equal(out.loss, own.loss)


@pytest.mark.parametrize("skip_logits", [False, True])
def test_shift_labels_give_a_loss_in_evaluation_mode_too(skip_logits):
    """https://github.com/linkedin/Liger-Kernel/pull/888"""
    model, inputs = tiny().eval(), batch() | KINDS["shift_labels"]
    own = model(**inputs).loss
    hf.accelerate(model)
    torch.testing.assert_close(model(**inputs, skip_logits=skip_logits).loss, own)


def test_gemmas_softcap_is_in_the_loss():
    """https://github.com/apple/ml-cross-entropy/issues/48"""
    model, inputs = tiny("gemma2"), batch()
    with torch.no_grad():
        model.lm_head.weight.mul_(10.0)
    own = model(**inputs).loss
    with hf.accelerate(model):
        torch.testing.assert_close(model(**inputs).loss, own)
    model.config.final_logit_softcapping = None
    assert model(**inputs).loss > own + 0.1


def test_a_model_that_keeps_the_number_of_items_from_its_loss_is_refused(monkeypatch):
    """https://github.com/huggingface/transformers/issues/47688: it would train with an inflated loss."""
    model = tiny()
    forward = type(model).forward

    def dropping(self, input_ids, labels=None, attention_mask=None, num_items_in_batch=None, **kwargs):
        return forward(self, input_ids, attention_mask=attention_mask, labels=labels, **kwargs)

    monkeypatch.setattr(type(model), "forward", dropping)
    hf.accelerate(model)
    assert model(**batch()).logits is None
    with pytest.raises(ValueError, match=r"hf.accelerate: num_items_in_batch: expected the call's own"):
        model(**batch(), num_items_in_batch=torch.tensor(57))


def test_a_head_in_modules_to_save_trains_when_sharded(one_rank_mesh):
    """https://github.com/linkedin/Liger-Kernel/pull/674"""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny(), config).train()
    own, own_grads = gradients(model, **batch())
    own_grads = {name: one.clone() for name, one in own_grads.items()}
    model.zero_grad()
    hf.accelerate(model)
    inner = model.get_base_model()
    for part in (inner.lm_head, *inner.model.layers, model):
        torch.distributed.fsdp.fully_shard(part, mesh=one_rank_mesh)
    out, grads = gradients(model, **batch())
    assert out.logits is None
    torch.testing.assert_close(out.loss, own.loss)
    assert any("modules_to_save" in name for name in grads)
    agree({name: one.full_tensor() for name, one in grads.items()}, own_grads)


def own_loss(logits, labels, vocab_size, **kwargs):
    return logits.square().mean()


def test_a_loss_of_the_users_own_is_refused_when_applied_and_when_called():
    model = tiny()
    model.loss_function = own_loss
    message = (
        r"hf.accelerate: model.loss_function: expected transformers' ForCausalLMLoss, got own_loss\. Call undo\(\)"
    )
    with pytest.raises(ValueError, match=message):
        hf.accelerate(model)
    del model._loss_function
    hf.accelerate(model)
    model.loss_function = own_loss
    with pytest.raises(ValueError, match=message):
        model(**batch())


def test_models_and_calls_that_are_not_covered_are_refused_by_name():
    model = tiny()
    with pytest.raises(ValueError, match=r"got OptimizedModule\. Pass the model itself, and compile its decoder"):
        hf.accelerate(torch.compile(model))
    with pytest.raises(ValueError, match=r"got DataParallel\. Use DistributedDataParallel"):
        hf.accelerate(torch.nn.DataParallel(model))
    with pytest.raises(
        ValueError, match=r"hf.accelerate: logits: expected one of eval, never, got 'nver'\. Did you mean"
    ):
        hf.accelerate(model, logits="nver")
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    with pytest.raises(ValueError, match="expected transformers' ForCausalLMLoss, got ForSequenceClassificationLoss"):
        hf.accelerate(BertForSequenceClassification(config))
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match=r"split_head: head: expected a torch.nn.Linear, got Sequential\."):
        hf.accelerate(model)
    assert "forward" not in vars(model)
    model = tiny()
    hf.accelerate(model)
    with pytest.raises(ValueError, match=r"hf.accelerate: return_dict: expected True, or nothing, got a tuple"):
        model(**batch(), return_dict=False)
    with pytest.raises(ValueError, match=r"hf.accelerate: labels: expected shape \(3, 12\) as the head's input"):
        model(batch()["input_ids"], labels=batch()["labels"][:, 1:])


def test_a_model_with_a_loss_of_its_own_making_is_refused(monkeypatch):
    model = tiny()
    forward = type(model).forward

    def inline(self, input_ids, labels=None, use_cache=None):
        out = forward(self, input_ids)
        if labels is not None:
            out.loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return out

    monkeypatch.setattr(type(model), "forward", inline)
    with pytest.raises(
        ValueError, match=r"a model that takes its loss from self.loss_function, got a LlamaForCausalLM"
    ):
        hf.accelerate(model)

    def doubled(self, input_ids, labels=None, use_cache=None):
        out = forward(self, input_ids, labels=labels)
        if out.logits.shape[-1] == VOCAB:
            out.loss = 2 * out.loss
        return out

    monkeypatch.setattr(type(model), "forward", doubled)
    with pytest.raises(
        ValueError, match="expected a model whose loss follows from its last hidden states, got a Llama"
    ):
        hf.accelerate(model)

    def shifted(self, input_ids, labels=None, use_cache=None):
        return forward(self, input_ids, labels=labels if labels is None else labels.clone())

    monkeypatch.setattr(type(model), "forward", shifted)
    with pytest.raises(ValueError, match=r"hf.accelerate: labels: expected the call's own in the model's loss"):
        hf.accelerate(model)
    assert "forward" not in vars(model)


def test_the_documented_example_trains_and_is_undone(tmp_path, monkeypatch):
    folder = str(write_model(tmp_path / "model"))
    for name in ("AutoModelForCausalLM", "AutoTokenizer"):
        kind = getattr(transformers, name)
        monkeypatch.setattr(kind, "from_pretrained", lambda _, load=kind.from_pretrained: load(folder))
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", DOC, flags=re.DOTALL)
    assert len(code.strip().splitlines()) <= 15
    names = {}
    exec(code, names)
    before = AutoModelForCausalLM.from_pretrained(folder)
    pairs = zip(names["model"].parameters(), before.parameters(), strict=True)
    assert all(not torch.equal(*pair) for pair in pairs)
    assert "forward" not in vars(names["model"])
