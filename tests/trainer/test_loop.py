from __future__ import annotations

import copy
import json
import math
import os
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from trainer.tiny import in_step, offline_config, sampled, tiny_config
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    FalconConfig,
    GenerationConfig,
    GPT2Config,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
)

from fastrl import advantages
from fastrl.algorithms import ALGORITHMS
from fastrl.data.pack import count, pack
from fastrl.losses.metrics import finish, merge, mismatch
from fastrl.model.attention import prepare_attention
from fastrl.model.checkpointing import checkpoint_activations
from fastrl.model.policy import Policy
from fastrl.monitor.interrupt import Interrupt, Interrupted
from fastrl.progress import Unwatched
from fastrl.sources import rewards_differ
from fastrl.trainer.build import build_algorithm
from fastrl.trainer.config import OptimizerConfig, RewardConfig, RolloutConfig
from fastrl.trainer.setup import prepare, train
from fastrl.types import Group, Prompt, Sample


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_training_raises_the_reward_and_leaves_a_model_that_transformers_loads(tmp_path):
    config = tiny_config(tmp_path, steps=25)
    outcome = train(config)
    assert outcome.status == "finished"
    assert outcome.after["sampled"] > outcome.before["sampled"] + 0.3
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 26))
    # On-policy the ratio is exactly 1, whatever the layout and the micro-batches.
    assert {line["ratio/mean"] for line in metrics if "ratio/mean" in line} == {1.0}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    out = model.generate(tokenizer("w3", return_tensors="pt")["input_ids"], max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(out[0]).split().count("w7") >= 3
    assert model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()


def test_equal_seeds_give_equal_runs_and_other_seeds_do_not(tmp_path):
    rewards = []
    for seed in (1, 1, 2):
        train(tiny_config(tmp_path, seed=seed, run_dir=str(tmp_path / f"run{len(rewards)}")))
        rewards.append([line["reward"] for line in lines(tmp_path / f"run{len(rewards)}" / "metrics.jsonl")])
    assert rewards[0] == rewards[1]
    assert rewards[0] != rewards[2]


def test_existing_run_is_never_overwritten(tmp_path):
    first, second = (train(tiny_config(tmp_path, steps=1)) for _ in range(2))
    assert first.report.parent.name == "run"
    assert second.report.parent.name == "run-2"


@pytest.fixture
def rollout(tmp_path):
    """A scored rollout with at least one group that contributes and one that is zero-advantage."""
    run = prepare(tiny_config(tmp_path, dtype="float32"))
    groups = sampled(run, 5, 4, seed=3)
    run.source.rewards.score(groups)
    for sample in groups[1].samples:
        sample.reward = 0.5
    for group in groups:
        group.greedy_reward = 0.25
    run.algorithm.advantages(groups)
    return run, groups


def gradient(run, groups, algorithm=None, **changes):
    """(loss, metrics, flat gradient in float64) of one optimizer step over `groups`."""
    algorithm = algorithm or run.algorithm
    learner = replace(run.learner, **changes)
    normalizer = algorithm.normalizer(count(groups))
    run.learner.policy.model.zero_grad()
    loss, metrics = 0.0, []
    for batch in learner.pack(algorithm.contributing(groups)):
        out = next(algorithm.losses(run.learner.policy, None, batch, normalizer, temperature=1.0, entropy=True))
        out.loss.backward()
        loss += out.loss.item()
        metrics.append(out.metrics)
    return loss, metrics, torch.cat([p.grad.flatten().double() for p in run.learner.policy.model.parameters()])


@pytest.mark.parametrize("algorithm", [name for name, entry in ALGORITHMS.items() if entry.estimator])
def test_gradient_is_the_same_for_every_layout_and_micro_batch_size(tmp_path, rollout, algorithm):
    run, groups = rollout
    built = build_algorithm(tiny_config(tmp_path, algorithm=algorithm))
    built.advantages(groups)
    loss, _, expected = gradient(run, groups, built, layout="padded", max_tokens=10_000)
    assert expected.abs().max() > 0
    for layout in ("padded", "shared"):
        for budget in (12, 31, 64):
            got_loss, _, got = gradient(run, groups, built, layout=layout, max_tokens=budget)
            assert got_loss == pytest.approx(loss, abs=1e-6)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_zero_advantage_groups_are_left_out_without_changing_the_gradient(rollout):
    run, groups = rollout
    contributing = run.algorithm.contributing(groups)
    assert groups[1] not in contributing
    assert 0 < len(contributing) < len(groups)
    _, metrics, without = gradient(run, groups)
    run.algorithm.__class__.contributing, original = (lambda self, g: list(g)), run.algorithm.__class__.contributing
    try:
        _, full_metrics, everything = gradient(run, groups)
    finally:
        run.algorithm.__class__.contributing = original
    torch.testing.assert_close(without, everything, rtol=0, atol=1e-6 * everything.abs().max().item())
    seen = [sum(float(part["ratio/mean"][1]) for part in parts) for parts in (metrics, full_metrics)]
    assert seen[0] < seen[1]  # the zero-advantage tokens were in one and not in the other
    assert finish(metrics[0])["ratio/mean"] == 1.0


def test_groups_with_a_kl_term_all_contribute(tmp_path, rollout):
    _, groups = rollout
    with_kl = build_algorithm(tiny_config(tmp_path, loss={"kl.coef": 0.1}))
    assert with_kl.contributing(groups) == groups


def test_several_optimizer_steps_per_rollout_move_the_ratio_off_one(tmp_path):
    config = tiny_config(tmp_path, steps=2, optimizer=OptimizerConfig(lr=1e-2, steps_per_rollout=2))
    train(config)
    ratios = [line["ratio/max"] for line in lines(tmp_path / "run" / "metrics.jsonl")]
    assert max(ratios) > 1.001


def test_reference_model_stays_where_it_started(tmp_path):
    config = tiny_config(tmp_path, steps=4, loss={"kl.coef": 0.01})
    train(config)
    kl = [line["kl"] for line in lines(tmp_path / "run" / "metrics.jsonl")]
    assert kl[0] == pytest.approx(0.0, abs=1e-6)
    assert kl[-1] > 1e-4


def test_dropout_of_the_model_is_switched_off(tmp_path):
    run = prepare(tiny_config(tmp_path))
    run.learner.policy.model.train()
    batch = torch.randint(1, 30, (2, 8))
    assert torch.equal(run.learner.policy.head.backbone(batch), run.learner.policy.head.backbone(batch))


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
DROPPING = {  # what drops, or perturbs, without a module that shows it
    "opt": OPTConfig(
        **SMALL, ffn_dim=64, word_embed_proj_dim=32, dropout=0.3, layerdrop=0.5, max_position_embeddings=64
    ),
    "falcon": FalconConfig(**SMALL, hidden_dropout=0.3, attention_dropout=0.3),
    "bloom": BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2, hidden_dropout=0.3, attention_dropout=0.3),
    "mixtral": MixtralConfig(
        **SMALL, intermediate_size=64, num_key_value_heads=2, num_local_experts=4, router_jitter_noise=0.5
    ),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", DROPPING)
def test_two_scores_of_the_same_weights_are_equal_and_so_are_two_gradients(name, checkpointing):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(DROPPING[name])
    layout = prepare_attention(model, "padded", dtype=torch.float32)
    samples = [Sample(list(range(4, 20)), [0.0] * 16, True, reward=1.0) for _ in range(2)]
    (batch,) = pack([Group(Prompt(0, "", (1, 2, 3)), samples)], layout=layout, max_tokens=256)
    if checkpointing:
        checkpoint_activations(model)
    policy, seen = Policy(model), []
    for _ in range(4):
        model.train()  # as somebody else's loop would
        score = policy.score(batch, temperature=1.0)
        policy.outputs(policy.hidden(batch), batch.targets).logps.sum().backward()
        seen.append((score, [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]))
        model.zero_grad()
    for score, gradients in seen[1:]:
        assert torch.equal(score, seen[0][0])
        for one, other in zip(gradients, seen[0][1], strict=True):
            assert torch.equal(one, other)


def noted(sizes, tensor):
    sizes.append(tensor.numel())
    return tensor


def test_checkpointed_layers_keep_their_inputs_alone_and_give_the_same_gradient():
    gradients, kept = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(DROPPING["gpt2"])
        if checkpointing:
            checkpoint_activations(model)
        policy, saved = Policy(model), []
        note = partial(noted, saved)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            loss = policy.head.backbone(torch.arange(32)[None]).square().sum()
        loss.backward()
        kept.append(sum(saved))
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients)
    assert kept[1] < kept[0] / 3
    assert type(copy.deepcopy(model).transformer.h[0]).__name__ == "GPT2Block"


def test_gradient_checkpointing_does_not_change_the_run(tmp_path):
    rewards = []
    for checkpointing in (False, True):
        directory = tmp_path / f"run_{checkpointing}"
        train(tiny_config(tmp_path, gradient_checkpointing=checkpointing, run_dir=str(directory)))
        rewards.append([(line["reward"], line["grad_norm"]) for line in lines(directory / "metrics.jsonl")])
    assert rewards[0] == [(pytest.approx(r, abs=1e-6), pytest.approx(n, rel=1e-4)) for r, n in rewards[1]]


def test_interrupt_stops_inside_the_step_with_everything_before_it_saved(tmp_path, monkeypatch):
    in_step(monkeypatch, 2, lambda run: os.kill(os.getpid(), signal.SIGINT))
    before = signal.getsignal(signal.SIGINT)
    outcome = train(tiny_config(tmp_path, steps=50))
    assert (outcome.status, outcome.steps) == ("interrupted", 1)
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert outcome.report.is_file()
    assert signal.getsignal(signal.SIGINT) is before


def test_second_interrupt_stops_at_once():
    interrupt = Interrupt()
    with interrupt.listening():
        interrupt.check()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted, match="SIGINT"):
            interrupt.check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_nan_stops_the_run_updates_nothing_and_saves_the_batch(tmp_path, monkeypatch):
    def poison(run):
        hidden = run.learner.policy.hidden
        monkeypatch.setattr(run.learner.policy, "hidden", lambda batch: hidden(batch) * float("nan"))

    in_step(monkeypatch, 2, poison)
    outcome = train(tiny_config(tmp_path, steps=5))
    assert (outcome.status, outcome.steps) == ("diverged", 1)
    saved = load_file(tmp_path / "run" / "non_finite_batch.safetensors")
    assert saved["0.input_ids"].numel() > 0
    assert saved["0.targets"].shape == saved["0.sampling_logps"].shape
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    assert all(value.isfinite().all() for value in weights.values())


def test_weights_that_are_not_finite_stop_the_run_in_its_last_evaluation_too(tmp_path):
    outcome = train(tiny_config(tmp_path, steps=1, optimizer=OptimizerConfig(lr=1e38)))
    assert (outcome.status, outcome.steps) == ("diverged", 1)
    assert "Evaluation after step 1: " in (tmp_path / "run" / "warnings.jsonl").read_text()
    assert outcome.report.exists()


def test_a_held_out_loss_that_is_not_finite_stops_a_run_on_rows_too(tmp_path):
    outcome = train(offline_config(tmp_path, "sft", steps=1, optimizer=OptimizerConfig(lr=1e38)))
    assert (outcome.status, outcome.steps) == ("diverged", 1)
    said = (tmp_path / "run" / "warnings.jsonl").read_text()
    assert "Evaluation after step 1: the loss on the held-out rows is" in said


def test_reward_that_raises_on_some_samples_excludes_only_those(tmp_path):
    rewards = (RewardConfig("trainer.tiny:raises_on_some"),)
    outcome = train(tiny_config(tmp_path, steps=2, rewards=rewards, max_failure_fraction=0.9))
    assert outcome.status == "finished"
    warnings = (tmp_path / "run" / "warnings.jsonl").read_text()
    assert "cannot judge this" in warnings
    unscored = [line["completions/unscored"] for line in lines(tmp_path / "run" / "metrics.jsonl")]
    assert 0 < max(unscored) < 16


def test_reward_that_always_raises_stops_the_run_with_an_explanation(tmp_path):
    rewards = (RewardConfig("trainer.tiny:always_raises"),)
    with pytest.raises(RuntimeError, match=r"failed on .* max_failure_fraction = 0.5 .*no judge at home"):
        train(tiny_config(tmp_path, rewards=rewards))


def test_budget_smaller_than_a_sequence_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="max_tokens_per_microbatch: expected at least 9"):
        train(tiny_config(tmp_path, max_tokens_per_microbatch=8))
    assert not (tmp_path / "run").exists()


def test_what_a_rollout_would_refuse_is_refused_before_anything_is_written(tmp_path):
    config = tiny_config(tmp_path, max_tokens_per_microbatch=512)
    for changes, message in [
        ({"rollout": RolloutConfig(top_p=1.5)}, "top_p: expected a number in"),
        ({"rollout": RolloutConfig(top_k=-1)}, "top_k: expected 0"),
        ({"rollout": RolloutConfig(temperature=math.inf)}, "temperature: expected 0"),
        ({"rollout": RolloutConfig(max_new_tokens=62)}, "within the model's 64 positions, got 65 tokens"),
        ({"backend": "fast"}, "backend: expected one of auto, .* got 'fast'"),
        ({"device": "gpu"}, "device: expected auto, cpu or another that torch has here, got 'gpu': "),
    ]:
        with pytest.raises(ValueError, match=message):
            train(replace(config, **changes))
    assert not (tmp_path / "run").exists()


def test_truncated_samples_leave_loss_and_normaliser_together(tmp_path, rollout):
    run, groups = rollout
    for sample in groups[0].samples[:2]:
        sample.finished = False
    for group in groups:
        for sample in group.samples[2:]:
            sample.finished = True
    everything, finished = count(groups), count(groups, mask_truncated=True)
    assert finished.sequences < everything.sequences
    assert run.algorithm.normalizer(finished) == finished.sequences


def test_top_p_and_temperature_reach_the_sampler_and_the_scorer(tmp_path):
    config = tiny_config(
        tmp_path, steps=1, rollout=RolloutConfig(prompts_per_step=4, group_size=4, max_new_tokens=6, temperature=0.6)
    )
    train(config)
    (line,) = lines(tmp_path / "run" / "metrics.jsonl")
    assert line["sampling/sampling_logp_difference/max"] < 1e-4  # scored at the temperature it was sampled at
    assert line["sampling/outside_share"] == 0.0
    assert abs(line["sampling/mismatch_kl"]) < 1e-8


def test_the_mismatch_is_that_of_closed_forms_and_a_run_at_another_temperature_shows_it(tmp_path):
    torch.manual_seed(0)
    sampler, trainer = torch.randn(2, 50).log_softmax(-1)
    drawn = torch.multinomial(sampler.exp(), 200_000, replacement=True)
    found = finish(mismatch(trainer[drawn], sampler[drawn], torch.ones(len(drawn))))
    exact = float((sampler.exp() * (sampler - trainer)).sum())
    assert found["sampling/mismatch_kl"] == pytest.approx(exact, rel=0.02)
    assert found["sampling/mismatch_kl_k1"] == pytest.approx(exact, rel=0.02)
    ratio = (trainer - sampler).exp()
    assert found["sampling/outside_share"] == pytest.approx(
        float(sampler.exp()[(ratio < 0.9) | (ratio > 1.1)].sum()), abs=0.005
    )
    masked = mismatch(torch.tensor([0.0, math.nan]), torch.tensor([0.0, 0.0]), torch.tensor([1, 0]))
    assert finish(masked) == dict.fromkeys(masked, 0.0)
    run = prepare(tiny_config(tmp_path, steps=1, algorithm="grpo"))
    run.learner.temperature = 0.5  # the trainer believes that samples came from there
    batch = run.source.next(run.learner, Unwatched())
    (part,) = run.algorithm.updates(run.learner, batch, Unwatched())
    _, metrics = run.algorithm.accumulate(run.learner, part)
    assert (
        finish(merge(metrics))["sampling/outside_share"] > 0.2
    )  # of a model that is nearly uniform at any temperature


def test_algorithms_hand_lengths_and_each_reward_to_their_estimators(tmp_path, rollout):
    _, groups = rollout
    groups[0].samples[1].reward = None
    for index, sample in enumerate(sample for group in groups for sample in group.samples):
        sample.rewards = {"first": sample.reward, "second": None if index % 5 == 0 else float(index % 3)}
    samples = [sample for group in groups for sample in group.samples]
    ids = torch.arange(len(groups)).repeat_interleave(4)

    def numbers(rewards):
        return torch.tensor([float("nan") if r is None else r for r in rewards], dtype=torch.float64)

    total, lengths = numbers(s.reward for s in samples), torch.tensor([len(s.token_ids) for s in samples])
    each = torch.stack([numbers(s.rewards[name] for s in samples) for name in ("first", "second")], 1)
    each[1] = torch.nan  # a sample that could not be scored by one reward is not scored by the others
    weights = torch.tensor([1.0, 0.5], dtype=torch.float64)
    expected = {
        "opo": advantages.opo(total, lengths, group_ids=ids),
        "reinforce_pp_baseline": advantages.reinforce_pp_baseline(total, lengths, group_ids=ids),
        "max_rl": advantages.max_rl(total, group_ids=ids),
        "pass_at_k": advantages.pass_at_k(total, group_ids=ids),
        "gdpo": advantages.gdpo(each, weights=weights, group_ids=ids),
    }
    rewards = (RewardConfig("trainer.tiny:wanted_words"), RewardConfig("format", 0.5))
    for name, want in expected.items():
        build_algorithm(tiny_config(tmp_path, algorithm=name, rewards=rewards)).advantages(groups)
        assert [s.advantage for s in samples] == want.tolist(), name
        assert samples[1].advantage == 0.0


def test_dynamic_sampling_replaces_groups_that_teach_nothing_within_its_rounds(tmp_path, monkeypatch):
    """Every prompt of an even index gets equal rewards, the others do not."""

    def score(groups, **_):
        for group in groups:
            for place, sample in enumerate(group.samples):
                sample.reward = float(place) * (group.prompt.index % 2)
        return []

    run = prepare(tiny_config(tmp_path, rollout=RolloutConfig(4, 2, max_new_tokens=2, dynamic_sampling=2)))
    monkeypatch.setattr(run.source.rewards, "score", score)
    even, odd = ([p for p in run.source.prompts.prompts if p.index % 2 == odd] for odd in (0, 1))
    asked = []

    def next_prompts(number):
        asked.append(number)
        return [queue.pop(0) for _ in range(number)]

    monkeypatch.setattr(run.source.prompts, "next", next_prompts)

    def refilled(first, later):
        queue[:] = [*first, *later]
        asked.clear()
        batch = run.source.next(run.learner, Unwatched())
        assert asked.pop(0) == 4
        return [group.prompt for group in batch.groups], batch.numbers

    queue = []
    # Two of four teach something; the first round finds one more, the second the last one.
    first, later = [even[0], odd[0], odd[1], even[1]], [even[2], odd[2], odd[3]]
    kept, metrics = refilled(first, later)
    assert (kept, asked) == ([odd[0], odd[1], odd[2], odd[3]], [2, 1])
    report = {"dynamic_sampling/rounds": 2.0, "dynamic_sampling/groups": 7.0, "dynamic_sampling/reward": 4 / 14}
    assert metrics == pytest.approx(report)
    # Nothing is found in two rounds: the batch keeps its size, with the first that teach nothing.
    kept, metrics = refilled(first, even[2:6])
    assert (kept, asked) == ([odd[0], odd[1], even[0], even[1]], [2, 2])
    # Nothing is missing: no round.
    kept, metrics = refilled(odd[:4], [])
    assert (kept, asked, metrics["dynamic_sampling/rounds"]) == (odd[:4], [], 0.0)


def test_dynamic_sampling_draws_other_completions_and_is_reported(tmp_path):
    metrics = []
    for rounds in (0, 3):
        rollout = RolloutConfig(4, 2, max_new_tokens=2, dynamic_sampling=rounds)
        train(tiny_config(tmp_path, steps=2, rollout=rollout, run_dir=str(tmp_path / f"run{rounds}")))
        metrics.append(lines(tmp_path / f"run{rounds}" / "metrics.jsonl"))
    assert not any(name.startswith("dynamic_sampling") for line in metrics[0] for name in line)
    assert metrics[1][0]["dynamic_sampling/reward"] >= 0
    for line in metrics[1]:
        assert line["dynamic_sampling/groups"] >= 4
        assert line["dynamic_sampling/rounds"] <= 3
        assert line["frac_reward_zero_std"] < metrics[0][0]["frac_reward_zero_std"]


def test_the_entropy_of_what_was_sampled_is_known_where_no_group_teaches_anything(tmp_path):
    config = tiny_config(tmp_path, steps=2, rewards=(RewardConfig("trainer.tiny:always_one"),))
    train(config)
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert all("entropy" not in row and row["groups/contributing"] == 0 for row in rows)
    run = prepare(config)
    policy, batches = run.learner.policy, run.learner.pack(run.source.next(run.learner, Unwatched()).groups)
    exact = [policy.outputs(policy.hidden(batch), batch.targets, entropy=True).entropy for batch in batches]
    assert rows[0]["sampling/entropy"] == pytest.approx(
        float(torch.cat(exact).mean()), rel=0.2
    )  # drawn, not integrated


def test_rewards_differ_by_equality_and_not_for_want_of_a_score(rollout):
    group = rollout[1][0]
    for rewards, differ in (
        ((0.1, 0.1, 0.1, 0.1), False),
        ((0.1, None, 0.1, None), False),
        ((None,) * 4, False),
        ((0.1, 0.1, 0.1, 0.1000001), True),
    ):
        for sample, reward in zip(group.samples, rewards, strict=True):
            sample.reward = reward
        assert rewards_differ(group) == differ


def padded_model(folder, rows=60):
    """The tiny model with rows behind the tokenizer's, which would be drawn most of the time."""
    config = tiny_config(folder)
    model = AutoModelForCausalLM.from_pretrained(config.model)
    tokens = model.get_output_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows)
    with torch.no_grad():
        model.get_output_embeddings().weight[tokens:] = 3 * model.get_output_embeddings().weight[:1]
    model.save_pretrained(config.model)
    return config, tokens


def test_rows_that_only_pad_the_head_are_never_drawn_and_have_no_probability_in_training(tmp_path):
    config, tokens = padded_model(tmp_path)
    run = prepare(config)
    assert run.learner.policy.head.vocab_size == replace(run.source.sampling.params, seed=0).vocab_size == tokens
    groups = sampled(run, 4, 8, seed=1)
    drawn = [sample for group in groups for sample in group.samples]
    assert max(max(sample.token_ids) for sample in drawn) < tokens
    for sample in drawn:
        sample.reward = 1.0
    for batch in run.learner.pack(groups):
        scored = run.learner.policy.score(batch, temperature=1.0)
        torch.testing.assert_close(scored, batch.sampling_logps, rtol=0, atol=1e-4)
    assert train(replace(config, steps=2)).status == "finished"
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert all(line["ratio/mean"] == 1.0 for line in metrics if "ratio/mean" in line)


def test_what_is_saved_stops_where_training_stopped(tmp_path):
    """The template ends turns with another token than the model's end of sequence."""
    config = tiny_config(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["w29"]})  # a word that it has
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} {% if m.role == 'assistant' %}w29{% endif %}{% endfor %}"
    )
    tokenizer.save_pretrained(config.model)
    train(replace(config, steps=1))
    saved = GenerationConfig.from_pretrained(tmp_path / "run" / "model").eos_token_id
    assert saved == list(
        prepare(replace(config, run_dir=str(tmp_path / "other"))).source.sampling.params.stop_token_ids
    )
    assert tokenizer.convert_tokens_to_ids("w29") in saved


def test_a_mixture_of_experts_trains_with_its_routers_loss_and_says_so(tmp_path):
    config = tiny_config(tmp_path)
    torch.manual_seed(0)
    like = AutoModelForCausalLM.from_pretrained(config.model).config
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    mixture = MixtralConfig(
        vocab_size=like.vocab_size,
        **sizes,
        num_key_value_heads=2,
        num_local_experts=4,
        router_aux_loss_coef=0.02,
        eos_token_id=0,
        max_position_embeddings=64,
    )
    MixtralForCausalLM(mixture).save_pretrained(config.model)
    assert train(replace(config, steps=2)).status == "finished"
    losses = [line["aux_loss"] for line in lines(tmp_path / "run" / "metrics.jsonl") if "aux_loss" in line]
    assert losses
    assert all(1.5 < loss < 4 for loss in losses)  # top 2: balanced routing gives 2
    said = [line["message"] for line in lines(tmp_path / "run" / "warnings.jsonl")]
    assert "Mixture of 4 experts: the routers' load-balancing loss is added, times 0.02." in said


def test_rows_that_repeat_are_counted_at_the_start(tmp_path):
    config = tiny_config(tmp_path)
    rows = (tmp_path / "task.jsonl").read_text().splitlines()
    (tmp_path / "task.jsonl").write_text("\n".join([*rows, rows[0], rows[1]]) + "\n")
    train(replace(config, steps=1))
    said = [line["message"] for line in lines(tmp_path / "run" / "warnings.jsonl")]
    assert f"2 of {len(rows) + 2} prompts repeat an earlier row in every column; left out." in said


def test_constants_of_the_logits_from_the_recipe_take_the_place_of_the_models(tmp_path):
    with pytest.raises(ValueError, match=r"logits that follow .* \(softcap 3.0, logit scale 1\)"):
        prepare(tiny_config(tmp_path, softcap=3.0))
    with pytest.raises(ValueError, match="logit_scale: expected a positive number, or null, got -1"):
        tiny_config(tmp_path, logit_scale=-1.0)


def test_stops_of_the_recipe_are_added_and_template_options_reach_the_template(tmp_path):
    config = tiny_config(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}{% if shout %}w9{% endif %}"
    tokenizer.save_pretrained(config.model)
    task = replace(config.task, chat=True, template_options={"shout": True})
    run = prepare(replace(config, task=task, rollout=replace(config.rollout, stop=("w5", "w6"))))
    words = tokenizer.convert_tokens_to_ids(["<eos>", "w5", "w6"])
    assert run.source.sampling.params.stop_token_ids == tuple(words)
    assert {prompt.token_ids[-1] for prompt in run.evaluations[0].prompts} == {tokenizer.convert_tokens_to_ids("w9")}
    with pytest.raises(ValueError, match="texts that are one token each, got 'w5 w6', which is 2"):
        prepare(replace(config, rollout=replace(config.rollout, stop=("w5 w6",))))
