"""Low-rank adapters: what trains, what the head becomes, and what is saved."""

from __future__ import annotations

import json
from dataclasses import replace

import peft
import pytest
import torch
from backends import BACKENDS, using
from safetensors.torch import load_file
from trainer.tiny import offline_config, sampled, tiny_config, write_model
from transformers import AutoModelForCausalLM

from fastrl import FusedLMHead, linear_logprob
from fastrl.data.pack import count
from fastrl.model.adapter import add_adapter, merged
from fastrl.model.head import split_head
from fastrl.model.load import load_model
from fastrl.model.policy import Policy
from fastrl.trainer.config import AdapterConfig, OptimizerConfig
from fastrl.trainer.setup import evaluate_model, prepare, train

TARGETS = pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "lm_head"), ("lm_head",)])
IDS = torch.tensor([[3, 4, 5, 6]])


@pytest.fixture(autouse=True)
def _report_without_pictures(monkeypatch):
    """They would take half of the time."""
    monkeypatch.setattr("fastrl.monitor.report.charts", lambda run: [])


def adapted_model(tmp_path, targets):
    model, _ = load_model(write_model(tmp_path / "model"))
    adapted = add_adapter(model, rank=4, alpha=8.0, targets=targets)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_" in name:  # neither half zero, as after some training
                param.normal_(std=0.2, generator=generator)
    return model, adapted


@TARGETS
def test_logits_of_a_cut_model_are_those_of_the_adapted_one(tmp_path, targets):
    model, adapted = adapted_model(tmp_path, targets)
    halves = split_head(model)
    hidden = halves.backbone(IDS)
    logits = model(IDS).logits
    torch.testing.assert_close(hidden @ halves.weight.T, logits, rtol=1e-5, atol=1e-5)
    with adapted.disable_adapter():
        plain = model(IDS).logits
        torch.testing.assert_close(halves.backbone(IDS) @ halves.weight.T, plain, rtol=1e-5, atol=1e-5)
    assert (plain - logits).abs().max() > 1e-2
    torch.testing.assert_close(merged(adapted)(IDS).logits, logits, rtol=1e-4, atol=1e-4)


@TARGETS
def test_gradient_from_hidden_states_is_that_of_the_adapted_models_own_logits(tmp_path, targets):
    config = tiny_config(tmp_path, adapter=AdapterConfig(rank=4, targets=targets))
    run = prepare(config)
    model = run.learner.policy.model
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    assert all("lora_" in name for name in trained)
    for param in trained.values():
        torch.nn.init.normal_(param, std=0.2)
    groups = sampled(run, 3, 2, seed=3)
    for index, group in enumerate(groups):
        for sample, reward in zip(group.samples, (0.0, 1.0 + index), strict=True):
            sample.reward = reward
    run.algorithm.advantages(groups)
    normalizer = run.algorithm.normalizer(count(groups))

    def gradient():
        found = torch.cat([param.grad.flatten() for param in trained.values()])
        model.zero_grad()
        return found

    batches = replace(run.learner, layout="padded").pack(groups)
    for batch in batches:
        (out,) = run.algorithm.losses(run.learner.policy, None, batch, normalizer, temperature=1.0, entropy=False)
        out.loss.backward()
    got = gradient()
    for batch in batches:
        logits = model(batch.input_ids, attention_mask=batch.attention_mask.long()).logits.flatten(0, 1)
        logps = logits[batch.hidden_index].log_softmax(-1).gather(1, batch.targets[:, None]).squeeze(1)
        lengths = batch.cu_seqlens.diff()
        weights = (batch.advantages / lengths).repeat_interleave(lengths) / normalizer
        (-(weights * logps).sum()).backward()
    torch.testing.assert_close(got, gradient(), rtol=1e-4, atol=1e-6)
    assert got.abs().max() > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_an_adapter_raises_the_reward_and_leaves_all_other_weights_alone(tmp_path, dtype):
    adapter = AdapterConfig(rank=8, alpha=16.0, targets=("all-linear",), save="adapter")
    config = tiny_config(
        tmp_path, steps=20, dtype=dtype, adapter=adapter, loss={"kl.coef": 0.001},
        optimizer=OptimizerConfig(lr=3e-2),
    )  # fmt: skip
    outcome = train(config)
    assert outcome.after["greedy"] > outcome.before["greedy"] + 0.3  # with a frozen head little can be made sharper
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-6)  # the reference is the model without its adapter
    assert lines[-1]["kl"] > 0.01
    saved = {path.name for path in (tmp_path / "run" / "model").iterdir()}
    assert "adapter_model.safetensors" in saved
    assert "model.safetensors" not in saved
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (config.model, tmp_path / "run/model"))
    weights = dict(after.named_parameters())
    for name, weight in before.named_parameters():
        module, _, leaf = name.rpartition(".")
        there = name if name in weights else f"{module}.base_layer.{leaf}"
        assert weights[there].to(weight.dtype).equal(weight.to(weights[there].dtype).to(weight.dtype))
    again, _ = load_model(tmp_path / "run" / "model")
    assert (again(IDS).logits - before(IDS).logits).abs().max() > 0.1


def test_merged_model_is_a_plain_one_with_the_adapters_logits(tmp_path):
    finals = {}
    for save in ("adapter", "merged"):
        adapter = AdapterConfig(rank=4, save=save)
        train(tiny_config(tmp_path, adapter=adapter, run_dir=str(tmp_path / save)))
        finals[save] = AutoModelForCausalLM.from_pretrained(tmp_path / save / "model")
    assert not any("lora_" in name for name, _ in finals["merged"].named_parameters())
    torch.testing.assert_close(finals["merged"](IDS).logits, finals["adapter"](IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_resumed_adapter_is_bit_for_bit_the_one_that_never_stopped(tmp_path):
    weights = {}
    for name in ("whole", "stopped"):
        config = tiny_config(
            tmp_path, steps=4, dtype="bfloat16", adapter=AdapterConfig(rank=4), save_every=2,
            loss={"kl": {}}, run_dir=str(tmp_path / name),
        )  # fmt: skip
        if name == "whole":
            train(config)
        else:
            train(replace(config, steps=2))
            train(replace(config, resume=config.run_dir))
        weights[name] = (tmp_path / name / "model" / "adapter_model.safetensors").read_bytes()
    assert weights["whole"] == weights["stopped"]


def test_a_saved_adapter_is_judged_as_it_was_when_training_ended(tmp_path):
    """By the recipe that trained it, which is not to put a new adapter into its place."""
    online = tiny_config(tmp_path, steps=5, adapter=AdapterConfig(rank=8), optimizer=OptimizerConfig(lr=3e-2))
    after = train(online).after
    assert evaluate_model(replace(online, model=str(tmp_path / "run" / "model"))) == pytest.approx(after)
    written = offline_config(tmp_path, adapter=AdapterConfig(rank=8), run_dir=str(tmp_path / "written"))
    outcome = train(written)
    judged = evaluate_model(written, str(tmp_path / "written" / "model"))
    assert judged == pytest.approx(outcome.after, rel=1e-5)
    assert judged["margin"] > 0.01


def test_an_adapter_is_trained_further_in_a_second_stage(tmp_path):
    """Offline, then on rollouts, with the first stage's policy as the reference; stopped and resumed, too."""
    adapter = AdapterConfig(rank=4, alpha=8.0)
    train(offline_config(tmp_path, "sft", steps=6, adapter=adapter, run_dir=str(tmp_path / "first")))
    folder = str(tmp_path / "first" / "model")
    optimizer = OptimizerConfig(lr=1e-2)
    second = tiny_config(
        tmp_path, steps=4, model=folder, adapter=adapter, loss={"kl": {}}, optimizer=optimizer, save_every=2
    )
    begins = evaluate_model(replace(second, adapter=AdapterConfig()), folder)
    outcome = train(second)
    assert outcome.before == pytest.approx(begins)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert lines[-1]["kl"] > 1e-4
    first, then = (load_file(f"{run}/adapter_model.safetensors") for run in (folder, tmp_path / "run" / "model"))
    assert first.keys() == then.keys()
    assert all(not first[name].equal(then[name]) for name in first)
    train(replace(second, steps=2, run_dir=str(tmp_path / "stopped")))
    train(replace(second, run_dir=str(tmp_path / "stopped"), resume=str(tmp_path / "stopped")))
    stopped = load_file(tmp_path / "stopped" / "model" / "adapter_model.safetensors")
    assert all(stopped[name].equal(then[name]) for name in then)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "adapter.rank: expected the rank of the adapter in .*, to train it further, got 0. Or name"),
        ({"rank": 8}, "adapter.rank: expected 4, as in the adapter in .*, got 8"),
        ({"alpha": 16.0}, r"adapter.alpha: expected 8.0, as in the adapter in .*, got 16.0"),
        ({"targets": ("q_proj",)}, r"adapter.targets: expected \['down_proj', .*\], as in the adapter in .*"),
    ],
)
def test_a_trained_adapter_is_trained_further_as_it_is_or_not_at_all(tmp_path, changes, message):
    config = tiny_config(tmp_path, steps=1, adapter=AdapterConfig(rank=4, alpha=8.0))
    train(config)
    again = replace(config, model=str(tmp_path / "run"), adapter=replace(config.adapter, **changes))
    with pytest.raises(ValueError, match=message):
        prepare(again)


def test_an_adapter_on_a_loaded_model_that_has_one_is_refused(tmp_path):
    model, _ = adapted_model(tmp_path, ("all-linear",))
    with pytest.raises(ValueError, match="add_adapter: model: expected a model without an adapter, got Llama"):
        add_adapter(model, rank=4, alpha=8.0)


def test_a_target_that_no_module_has_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"targets: expected names of LlamaForCausalLM's modules, got q_porj"):
        prepare(tiny_config(tmp_path, adapter=AdapterConfig(rank=4, targets=("q_porj",))))


def peft_model(tmp_path, **config):
    """The tiny model with an adapter of peft whose numbers are no zeros."""
    from peft import get_peft_model

    model, _ = load_model(write_model(tmp_path / "model"))
    kind = config.pop("kind", "LoraConfig")
    adapted = get_peft_model(model, getattr(peft, kind)(**({"task_type": "CAUSAL_LM"} | config)))
    with torch.no_grad():
        for param in adapted.parameters():
            if param.requires_grad:
                param.add_(0.2 * torch.randn(param.shape, generator=torch.Generator().manual_seed(0)))
    return adapted.eval()


ON_THE_HEAD = {"r": 4, "target_modules": ["lm_head"]}


@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"lora_bias": True}, {"use_rslora": True, "lora_alpha": 3}],
    ids=["lora", "dora", "lora_bias", "rslora"],
)
@pytest.mark.parametrize("name", BACKENDS)
def test_an_adapter_on_the_head_is_computed_exactly_with_gradients_to_all_of_it(tmp_path, name, options):
    adapted = peft_model(tmp_path, **ON_THE_HEAD, **options)
    halves, hidden = split_head(adapted), split_head(adapted).backbone(IDS).detach()
    with using(name) as backend:
        ours = linear_logprob(hidden[:, :-1], halves.weight, IDS[:, 1:], bias=halves.bias, backend=backend).logps
    head = adapted.get_output_embeddings()
    theirs = head(hidden)[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    trained = [param for param in adapted.parameters() if param.requires_grad]
    assert len(trained) == (2 if not {"use_dora", "lora_bias"} & options.keys() else 3)
    with using(name):
        gradients = [torch.autograd.grad(x.sum(), trained) for x in (ours, theirs)]
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert expected.any()
    with adapted.disable_adapter():
        assert halves.weight is head.base_layer.weight
        assert halves.bias is head.base_layer.bias


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({**ON_THE_HEAD, "lora_dropout": 0.5}, "got one with LoRA with a dropout of 0.5"),
        ({"kind": "LoHaConfig", **ON_THE_HEAD}, r"one with another adapter of peft \(loha\.Linear\)"),
        ({"kind": "LoKrConfig", **ON_THE_HEAD}, r"one with another adapter of peft \(lokr\.Linear\)"),
        ({"kind": "VeraConfig", **ON_THE_HEAD}, r"one with another adapter of peft \("),
        ({"kind": "OFTConfig", "oft_block_size": 4, "target_modules": ["lm_head"]}, "one with another adapter of peft"),
        (
            {"kind": "IA3Config", "target_modules": ["lm_head"], "feedforward_modules": []},
            "one with another adapter of peft",
        ),
        ({"kind": "PromptTuningConfig", "num_virtual_tokens": 3}, "got prompt tuning"),
    ],
    ids=["dropout", "loha", "lokr", "vera", "oft", "ia3", "prompt tuning"],
)
def test_an_adapter_that_is_not_computed_exactly_is_refused_by_name(tmp_path, config, said):
    adapted = peft_model(tmp_path, **config)
    with pytest.raises(ValueError, match=rf"^split_head: .*{said}"):
        split_head(adapted)


def test_dropout_of_an_adapter_on_the_head_is_switched_off_for_a_policy(tmp_path):
    adapted = peft_model(tmp_path, **ON_THE_HEAD, lora_dropout=0.5).train()
    policy = Policy(adapted.get_base_model())
    hidden = policy.head.backbone(IDS)
    torch.testing.assert_close(hidden @ policy.head.weight.T, policy.model(IDS).logits, rtol=1e-5, atol=1e-5)


def test_an_adapter_on_the_embeddings_trains(tmp_path):
    targets = AdapterConfig(rank=2, alpha=4.0, targets=("embed_tokens", "q_proj"))
    outcome = train(tiny_config(tmp_path, adapter=targets, steps=2))
    assert outcome.status == "finished"
    assert (tmp_path / "run" / "model" / "adapter_config.json").is_file()


@pytest.mark.parametrize("options", [ON_THE_HEAD, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}])
def test_a_fused_head_with_an_adapter_is_exact_with_gradients_to_all_of_it(tmp_path, options):
    adapted = peft_model(tmp_path, **options)
    head, hidden = adapted.get_output_embeddings(), split_head(adapted).backbone(IDS).detach()[:, :-1]
    fused = FusedLMHead(head)
    ours = fused(hidden, IDS[:, 1:]).logps
    theirs = head(hidden).log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(fused(hidden), head(hidden))
    assert fused.state_dict().keys() == head.state_dict().keys()
    trained = [param for param in head.parameters() if param.requires_grad]
    for got, expected in zip(*(torch.autograd.grad(x.sum(), trained) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert expected.any()


def test_a_fused_head_names_an_adapter_that_it_does_not_compute_and_says_what_to_do(tmp_path):
    adapted = peft_model(tmp_path, kind="LoHaConfig", **ON_THE_HEAD)
    message = r"FusedLMHead: lm_head: .* got one with another adapter of peft \(loha\.Linear\)\. .*merge_and_unload"
    with pytest.raises(TypeError, match=message):
        FusedLMHead(adapted.get_output_embeddings())
