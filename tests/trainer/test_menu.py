"""What a recipe selects besides a name: each choice through the real loop, where it must act."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from trainer.test_resume import config_for, everything, run_until_crash
from trainer.tiny import sampled, tiny_config

from fastrl import advantages
from fastrl.algorithms import ActorCritic, KLController, TokenMasks
from fastrl.algorithms.masks import masked
from fastrl.algorithms.policy_gradient import Part
from fastrl.data.pack import count
from fastrl.losses.policy import policy_loss
from fastrl.losses.presets import PPO
from fastrl.losses.token_masks import kl_cov_penalty
from fastrl.ops.gae import gae
from fastrl.rollout.collect import collect
from fastrl.sources import collect as judging
from fastrl.trainer.build import build_algorithm
from fastrl.trainer.config import (
    OptimizerConfig,
    PolicyGradientConfig,
    PPOConfig,
    RewardConfig,
    RolloutConfig,
    TrainConfig,
)
from fastrl.trainer.setup import prepare, train

MASKS = {
    "top_entropy": TokenMasks(top_entropy=0.3),
    "off_policy": TokenMasks(off_policy=0.1),
    "total_variation": TokenMasks(total_variation=0.003),
    "clip_cov": TokenMasks(clip_cov=0.1, cov_low=0.0),
    "kl_cov": TokenMasks(kl_cov=0.1, kl_cov_coef=0.5),
}


@pytest.fixture(autouse=True)
def _report_without_pictures(monkeypatch):
    """They would take half of the time."""
    monkeypatch.setattr("fastrl.monitor.report.charts", lambda run: [])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def sampler_is_off_by(monkeypatch, nats):
    """The sampler reports log-probabilities that are that much larger than the policy's."""

    def shifted(*args):
        groups = collect(*args)
        for group in groups:
            for sample in group.samples:
                sample.sampling_logps = [logp + nats for logp in sample.sampling_logps]
        return groups

    monkeypatch.setattr(judging, "collect", shifted)


# Estimators


def f64(values):
    return torch.tensor([float("nan") if v is None else v for v in values], dtype=torch.float64)


@pytest.mark.parametrize("name", ["opo", "gdpo", "reinforce_pp_baseline", "max_rl", "pass_at_k"])
def test_a_run_trains_on_the_advantages_of_the_estimator_that_its_recipe_names(tmp_path, name):
    rewards = (RewardConfig("trainer.tiny:wanted_words"), RewardConfig("trainer.tiny:short", 0.5))
    train(tiny_config(tmp_path, steps=1, algorithm=name, rewards=rewards))
    rows = lines(tmp_path / "run" / "completions.jsonl")
    total, lengths = f64(row["reward"] for row in rows), torch.tensor([row["tokens"] for row in rows])
    each = torch.stack([f64(row["rewards"][key] for row in rows) for key in ("wanted_words", "short")], 1)
    weights, groups = torch.tensor([1.0, 0.5], dtype=torch.float64), {"group_size": 4}
    torch.testing.assert_close(total, each @ weights)
    expected = {
        "opo": lambda: advantages.opo(total, lengths, **groups),
        "gdpo": lambda: advantages.gdpo(each, weights=weights, **groups),
        "reinforce_pp_baseline": lambda: advantages.reinforce_pp_baseline(total, lengths, **groups),
        "max_rl": lambda: advantages.max_rl(total, **groups),
        "pass_at_k": lambda: advantages.pass_at_k(total, **groups),
    }[name]()
    assert expected.abs().max() > 0
    assert [row["advantage"] for row in rows] == expected.tolist()
    assert lines(tmp_path / "run" / "metrics.jsonl")[0]["grad_norm"] > 0


@pytest.mark.parametrize("samples", [1, 3])
def test_remax_compares_each_completion_with_the_greedy_one_of_its_prompt(tmp_path, samples):
    rollout = RolloutConfig(prompts_per_step=5, group_size=samples, max_new_tokens=6, top_p=0.9)
    config = tiny_config(tmp_path, steps=1, algorithm="remax", rollout=rollout)
    run = prepare(config)
    prompts = {prompt.index: prompt for prompt in run.source.prompts.prompts}
    train(config)
    rows = lines(tmp_path / "run" / "completions.jsonl")
    greedy = {}
    for index in {row["prompt_index"] for row in rows}:
        ids = torch.tensor([prompts[index].token_ids])
        out = run.learner.policy.model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        words = run.tokenizer.decode(out, skip_special_tokens=True).split()
        greedy[index] = words.count("w7") / max(1, len(words))
    assert [row["advantage"] for row in rows] == [
        pytest.approx(row["reward"] - greedy[row["prompt_index"]]) for row in rows
    ]
    (line,) = lines(tmp_path / "run" / "metrics.jsonl")
    assert line["greedy/reward"] == pytest.approx(sum(greedy.values()) / 5)
    assert ("frac_reward_zero_std" in line) == (samples > 1)  # no alarm about one completion's equal rewards
    assert line["grad_norm"] > 0


def test_remax_learns_from_one_completion_per_prompt(tmp_path):
    rollout = RolloutConfig(prompts_per_step=12, group_size=1, max_new_tokens=6)
    outcome = train(tiny_config(tmp_path, steps=20, algorithm="remax", rollout=rollout))
    assert outcome.after["sampled"] > outcome.before["sampled"] + 0.3


# What the ratio compares with


@pytest.mark.parametrize(
    ("algorithm", "asked", "updates", "ratio_to_sampler"),
    [
        ("dppo", None, 1, True),
        ("dppo", None, 2, True),
        ("vespo", None, 2, True),
        ("scale_rl", None, 1, True),
        ("grpo", True, 2, True),
        ("grpo", None, 2, False),
        ("dppo", False, 1, False),
    ],
)
def test_ratio_is_to_the_policy_that_the_paper_or_the_recipe_names(
    tmp_path, monkeypatch, algorithm, asked, updates, ratio_to_sampler
):
    sampler_is_off_by(monkeypatch, -0.25)
    changes = {"algorithm": algorithm, "policy_gradient": PolicyGradientConfig(ratio_to_sampler=asked)}
    changes["optimizer"] = OptimizerConfig(lr=0.0, steps_per_rollout=updates)
    changes["rollout"] = RolloutConfig(
        prompts_per_step=4, group_size=4, max_new_tokens=1
    )  # a sequence's ratio is its token's
    changes["rewards"] = (RewardConfig("trainer.tiny:noisy_words"),)
    train(tiny_config(tmp_path, steps=1, **changes))
    (line,) = lines(tmp_path / "run" / "metrics.jsonl")
    assert line["ratio/mean"] == pytest.approx(1.2840254 if ratio_to_sampler else 1.0, rel=1e-5)
    assert ("sampling/sampling_logp_difference/mean" in line) != ratio_to_sampler


def test_ppo_clips_the_ratio_to_the_sampler_where_its_recipe_says_so(tmp_path, monkeypatch):
    sampler_is_off_by(monkeypatch, -0.25)
    train(tiny_config(tmp_path, steps=1, algorithm="ppo", policy_gradient=PolicyGradientConfig(ratio_to_sampler=True)))
    (line,) = lines(tmp_path / "run" / "metrics.jsonl")
    assert line["ratio/mean"] == pytest.approx(1.2840254, rel=1e-5)
    assert line["objective/kl"] == pytest.approx(0.0, abs=1e-5)  # of the trainer's own numbers


def test_dual_clip_bounds_what_a_negative_advantage_costs(tmp_path, monkeypatch):
    sampler_is_off_by(monkeypatch, -2.0)  # every ratio is e^2
    losses = {}
    for dual in (None, 3.0):
        changes = {"loss": {"surrogate.dual": dual}, "advantages": {"scale": "none"}}
        changes["policy_gradient"] = PolicyGradientConfig(ratio_to_sampler=True)
        train(tiny_config(tmp_path, steps=1, **changes, run_dir=str(tmp_path / f"run{dual}")))
        losses[dual] = lines(tmp_path / f"run{dual}" / "metrics.jsonl")[0]["loss"]
    rows = lines(tmp_path / "runNone" / "completions.jsonl")
    negative = -sum(min(row["advantage"], 0.0) for row in rows) / len(rows)
    assert losses[None] - losses[3.0] == pytest.approx((7.3890561 - 3.0) * negative, rel=1e-4)


# Masks of tokens


@pytest.fixture
def rollout(tmp_path):
    """A scored rollout whose sampler and old policy are a little off, and one zero-advantage group."""
    run = prepare(tiny_config(tmp_path))
    groups = sampled(run, 5, 4, seed=3)
    run.source.rewards.score(groups)
    noise = torch.Generator().manual_seed(1)
    for group in groups:
        for sample in group.samples:
            moved = 0.3 * torch.randn(len(sample.token_ids), generator=noise)
            sample.sampling_logps = (torch.tensor(sample.sampling_logps) + moved).tolist()
    for sample in groups[1].samples:
        sample.reward = 0.5
    return run, groups


def with_masks(tmp_path, masks, **changes):
    optimizer = OptimizerConfig(lr=1e-2, epochs_per_rollout=2)
    return build_algorithm(tiny_config(tmp_path, masks=masks, optimizer=optimizer, **changes))


def packed(run, groups, algorithm, layout, budget):
    """The micro-batches of one optimizer step; the old policy is where the sampler is, and a little beyond."""
    batches = replace(run.learner, max_tokens=budget, layout=layout).pack(algorithm.contributing(groups))
    return [replace(batch, old_logps=batch.sampling_logps - 0.1) for batch in batches]


def select(run, algorithm, batches, *, seed):
    """The micro-batches of an optimizer step as the algorithm's masks leave them, and metrics."""
    options = {"temperature": 1.0, "ratio_to_sampler": algorithm.ratio_to_sampler, "seed": seed}
    return masked(run.learner.policy, batches, algorithm.masks, algorithm.spec, **options)


def gradient(run, algorithm, batches, normalizer):
    """(loss, flat gradient in float64) of one optimizer step, as `Learner.step` takes it."""
    run.learner.policy.model.zero_grad()
    total = 0.0
    batches, _ = select(run, algorithm, batches, seed=5)
    for batch in batches:
        for out in algorithm.losses(run.learner.policy, None, batch, normalizer, temperature=1.0, entropy=False):
            out.loss.backward()
            total += out.loss.item()
    return total, torch.cat([p.grad.flatten().double() for p in run.learner.policy.model.parameters()])


@pytest.mark.parametrize("name", MASKS)
def test_masked_gradient_is_the_same_for_every_layout_and_micro_batch_size(tmp_path, rollout, name):
    run, groups = rollout
    algorithm = with_masks(tmp_path, MASKS[name])
    algorithm.advantages(groups)
    plain, normalizer = with_masks(tmp_path, TokenMasks()), algorithm.normalizer(count(groups))
    whole = packed(run, groups, algorithm, "padded", 10_000)
    loss, expected = gradient(run, algorithm, whole, normalizer)
    assert (gradient(run, plain, whole, normalizer)[1] - expected).abs().max() > 1e-3 * expected.abs().max()
    for layout in ("padded", "shared"):
        for budget in (12, 31, 64):
            got_loss, got = gradient(run, algorithm, packed(run, groups, algorithm, layout, budget), normalizer)
            assert got_loss == pytest.approx(loss, abs=1e-6)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def plain_tokens(run, batch):
    """(log-probabilities, entropies) of the batch's tokens, from the model's own logits, with gradient."""
    out = run.learner.policy.model(
        batch.input_ids, position_ids=batch.position_ids, attention_mask=batch.attention_mask
    )
    logits = out.logits.flatten(0, 1)[batch.hidden_index].double().log_softmax(-1)
    return logits.gather(1, batch.targets[:, None])[:, 0], -(logits.exp() * logits).sum(1)


def expected_keep(masks, batch, logps, entropies, each):
    """The tokens that learn, and those that are held, written again by what the papers say."""
    live = each != 0
    keep, held = live.clone(), torch.zeros_like(live)
    if masks.top_entropy:
        keep &= entropies >= torch.quantile(entropies[live], 1 - masks.top_entropy)
    drift = batch.sampling_logps - logps
    if masks.off_policy:
        for start, end in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
            if each[start] < 0 and drift[start:end].mean() > masks.off_policy:
                keep[start:end] = False
    if masks.total_variation:
        moved = logps.exp() - batch.sampling_logps.double().exp()
        keep &= ~((each > 0) & (moved > masks.total_variation)) & ~((each < 0) & (moved < -masks.total_variation))
    if masks.kl_cov:
        cov = (logps - logps[live].mean()) * (each - each[live].mean())
        held[cov.masked_fill(~live, -torch.inf).topk(int(masks.kl_cov * live.sum())).indices] = True
    return keep, held


@pytest.mark.parametrize("name", ["top_entropy", "off_policy", "total_variation", "kl_cov"])
def test_masked_gradient_is_that_of_the_plain_expression(tmp_path, rollout, name):
    run, groups = rollout
    algorithm, masks = with_masks(tmp_path, MASKS[name]), MASKS[name]
    algorithm.advantages(groups)
    (batch,) = packed(run, groups, algorithm, "padded", 10_000)
    normalizer = algorithm.normalizer(count(groups))
    loss, got = gradient(run, algorithm, [batch], normalizer)
    each = batch.advantages.repeat_interleave(batch.cu_seqlens.diff())
    run.learner.policy.model.zero_grad()
    logps, entropies = plain_tokens(run, batch)
    keep, held = expected_keep(masks, batch, logps.detach(), entropies.detach(), each)
    assert 0 < keep.sum() <= (each != 0).sum()
    assert keep.sum() < (each != 0).sum() or held.any()
    options = {"mask": batch.mask, "cu_seqlens": batch.cu_seqlens, "normalizer": normalizer}
    spec = algorithm.spec
    total = policy_loss(logps, (each * keep).double(), spec, old_logps=batch.old_logps.double(), **options).loss
    per_token = 1 / batch.cu_seqlens.diff().repeat_interleave(batch.cu_seqlens.diff()) / normalizer
    total = total + kl_cov_penalty(logps, batch.old_logps, held, per_token, coef=masks.kl_cov_coef)
    total.backward()
    expected = torch.cat([p.grad.flatten().double() for p in run.learner.policy.model.parameters()])
    assert loss == pytest.approx(total.item(), rel=1e-4)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


def test_clip_cov_drops_its_share_of_the_tokens_between_its_bounds_and_others_at_each_step(tmp_path, rollout):
    run, groups = rollout
    masks = TokenMasks(clip_cov=0.1, cov_low=0.0, cov_high=1.0)
    algorithm = with_masks(tmp_path, masks, loss={"surrogate.low": 1.0, "surrogate.high": 9.0})
    algorithm.advantages(groups)
    (batch,) = packed(run, groups, algorithm, "padded", 10_000)
    each = batch.advantages.repeat_interleave(batch.cu_seqlens.diff())
    live, logps = each != 0, run.learner.policy.score(batch, temperature=1.0)
    cov = (logps - logps[live].mean()) * (each - each[live].mean())
    found = []
    for seed in (1, 2):
        ((out,), metrics) = select(run, algorithm, [batch], seed=seed)
        dropped = live & (out.advantages == 0)
        assert dropped.sum() == int(0.1 * live.sum())
        assert ((cov > 0) & (cov < 1))[dropped].all()
        assert torch.equal(out.advantages[~dropped], each[~dropped])
        kept, total = metrics["masks/kept_fraction"]
        assert (int(kept), int(total)) == (int(live.sum() - dropped.sum()), int(live.sum()))
        found.append(dropped)
    assert not torch.equal(*found)


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_a_recipe_act_in_the_run(tmp_path, monkeypatch, name):
    sampler_is_off_by(monkeypatch, 0.2 if name == "off_policy" else 0.02)
    weights = []
    for masks in (TokenMasks(), MASKS[name]):
        run_dir = tmp_path / f"run{len(weights)}"
        optimizer = OptimizerConfig(lr=1e-2, epochs_per_rollout=2)
        train(tiny_config(tmp_path, steps=2, masks=masks, optimizer=optimizer, run_dir=str(run_dir)))
        weights.append((run_dir / "model" / "model.safetensors").read_bytes())
    assert weights[0] != weights[1]
    metrics = lines(tmp_path / "run1" / "metrics.jsonl")
    assert "masks/kept_fraction" not in lines(tmp_path / "run0" / "metrics.jsonl")[0]
    for line in metrics:
        if name == "kl_cov":
            assert line["masks/kept_fraction"] == 1.0
            assert 0.03 < line["masks/kl_cov_fraction"] <= 0.1
            assert line["masks/kl_cov_distance"] > 0
        else:
            assert 0 < line["masks/kept_fraction"] < 1
            assert line["gradient_fraction"] <= line["masks/kept_fraction"]
        if name == "top_entropy":
            assert line["masks/kept_fraction"] == pytest.approx(0.3, abs=0.05)


def test_masks_act_on_the_advantages_of_a_critic(tmp_path):
    config = tiny_config(tmp_path, steps=2, algorithm="ppo", masks=TokenMasks(top_entropy=0.3))
    train(config)
    for line in lines(tmp_path / "run" / "metrics.jsonl"):
        assert line["masks/kept_fraction"] == pytest.approx(0.3, abs=0.05)
        assert line["gradient_fraction"] <= line["masks/kept_fraction"]


def test_a_resumed_run_draws_the_tokens_that_clip_cov_would_have_drawn(tmp_path):
    masks = TokenMasks(clip_cov=0.1, cov_low=0.0)
    changes = {"masks": masks, "steps": 4, "save_every": 2, "optimizer": OptimizerConfig(lr=1e-2, epochs_per_rollout=2)}
    config = config_for(tmp_path, "whole", **changes)
    train(config)
    stopped = replace(config, run_dir=str(tmp_path / "stopped"))
    run_until_crash(stopped, 4)
    assert train(replace(stopped, resume=stopped.run_dir)).status == "finished"
    assert everything(tmp_path / "stopped", "step_000004") == everything(tmp_path / "whole", "step_000004")


# VAPO


def test_policy_and_critic_take_lambdas_of_their_own(tmp_path):
    run = prepare(tiny_config(tmp_path, algorithm="ppo"))
    groups = sampled(run, 4, 3, seed=3)
    for index, sample in enumerate(sample for group in groups for sample in group.samples):
        sample.token_ids, sample.sampling_logps = (
            sample.token_ids[: 1 + index % 5],
            sample.sampling_logps[: 1 + index % 5],
        )
        sample.reward = float(index % 3)
    (batch,) = replace(run.learner, max_tokens=10_000).pack(groups)
    values = torch.randn(len(batch.targets), generator=torch.Generator().manual_seed(0))
    batch = replace(batch, values=values, old_logps=batch.sampling_logps)
    options = {"gamma": 0.9, "whiten": False}
    base = ActorCritic(PPO, KLController(0.0), lam=1.0, **options)
    fixed, by_length = replace(base, lam_policy=0.5), replace(base, length_alpha=0.4)
    (one,), (two,), (three,) = (a.estimate([Part([batch], 1.0)])[0][0].batches for a in (base, fixed, by_length))
    assert torch.equal(one.returns, two.returns)
    torch.testing.assert_close(one.returns, three.returns)
    # Rewards are the scores at the last tokens, the KL coefficient being 0.
    rewards = torch.zeros_like(values).index_copy_(0, batch.cu_seqlens[1:] - 1, batch.scores)
    for start, end in zip(batch.cu_seqlens.tolist(), batch.cu_seqlens.tolist()[1:], strict=False):
        cut, length = slice(start, end), end - start
        inputs = (rewards[None, cut], values[None, cut], batch.mask[None, cut])
        torch.testing.assert_close(two.advantages[cut], gae(*inputs, gamma=0.9, lam=0.5)[0][0])
        adaptive = gae(*inputs, gamma=0.9, lam=max(0.0, 1 - 1 / (0.4 * length)))[0][0]
        torch.testing.assert_close(three.advantages[cut], adaptive)


def test_vapo_by_recipe_imitates_what_scored_and_learns(tmp_path):
    found = {}
    for nll in (0.0, 0.3):
        ppo = PPOConfig(critic="shared", lam=1.0, length_alpha=0.4, positive_nll=nll, kl_coef=0.0, value_coef=0.5)
        loss, directory = {"surrogate.high": 0.28}, tmp_path / f"run{nll}"
        optimizer = OptimizerConfig(lr=1e-2, steps_per_rollout=2)
        changes = {"loss": loss, "ppo": ppo, "optimizer": optimizer, "run_dir": str(directory), "algorithm": "ppo"}
        outcome = train(tiny_config(tmp_path, steps=12, **changes))
        assert outcome.after["sampled"] > outcome.before["sampled"] + 0.2
        found[nll] = lines(directory / "metrics.jsonl")
    assert not any("positive_nll" in line for line in found[0.0])
    series = [line["positive_nll"] for line in found[0.3] if "positive_nll" in line]
    assert series[-1] < series[0] - 1.0  # nats per token of what scored above 0


def test_a_critic_that_is_warmed_up_learns_alone_and_then_the_policy_with_it(tmp_path):
    ppo = PPOConfig(critic_warmup=2, critic_lr=1e-2, kl_coef=0.0)
    optimizer = OptimizerConfig(lr=1e-2, steps_per_rollout=2, schedule="cosine")
    config = tiny_config(tmp_path, steps=4, algorithm="ppo", ppo=ppo, optimizer=optimizer, save_every=2, keep_last=2)
    train(config)
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert ["grad_norm" in line for line in metrics] == [False, False, True, True]
    assert all(line["critic/grad_norm"] > 0 for line in metrics)
    checkpoints = tmp_path / "run" / "checkpoints"
    began, warm, end = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "model", checkpoints / "step_000002" / "model", checkpoints / "step_000004" / "model")
    )
    assert all(torch.equal(began[name], warm[name]) for name in began)
    assert any(not torch.equal(end[name], warm[name]) for name in began)
    rates = [line["learning_rate"] for line in metrics[2:]]  # means of a step's two updates, of four in all
    expected = [0.5 * (1 + math.cos(math.pi * place / 4)) for place in range(4)]
    assert rates == pytest.approx([0.005 * (expected[0] + expected[1]), 0.005 * (expected[2] + expected[3])])


def test_imitation_weighs_the_tokens_of_each_optimizer_step_that_scored(tmp_path):
    run = prepare(tiny_config(tmp_path, algorithm="ppo"))
    groups = sampled(run, 4, 3, seed=3)
    for index, sample in enumerate(sample for group in groups for sample in group.samples):
        sample.reward = float(index % 3) - 1.0
    algorithm = ActorCritic(PPO, KLController(0.0), positive_nll=0.2)
    batches = run.learner.pack(groups)
    assert len(batches) > 1
    filled = [replace(b, values=torch.zeros(len(b.targets)), old_logps=b.sampling_logps) for b in batches]
    batches = algorithm.estimate([Part(filled, 1.0), Part(filled[:1], 1.0)])[0][0].batches
    weights = torch.cat([batch.nll_weights for batch in batches])
    scores = torch.cat([batch.scores.repeat_interleave(batch.cu_seqlens.diff()) for batch in batches])
    tokens = sum(len(sample.token_ids) for group in groups for sample in group.samples if sample.reward > 0)
    torch.testing.assert_close(weights, torch.where(scores > 0, 0.2 / tokens, 0.0))


# REINFORCE++


def test_reinforce_pp_by_recipe_takes_whitened_rewards_to_go_with_the_kl_in_them(tmp_path, monkeypatch):
    estimated = []

    def keep(self, parts):
        filled, numbers = estimate(self, parts)
        estimated.append(([b for part in parts for b in part.batches], [b for part in filled for b in part.batches]))
        return filled, numbers

    estimate = ActorCritic.estimate
    monkeypatch.setattr(ActorCritic, "estimate", keep)
    ppo = PPOConfig(critic="none", gamma=0.95, kl_coef=0.01)
    optimizer = OptimizerConfig(lr=1e-2, epochs_per_rollout=2)
    outcome = train(tiny_config(tmp_path, steps=15, algorithm="ppo", ppo=ppo, optimizer=optimizer))
    assert outcome.after["sampled"] > outcome.before["sampled"] + 0.3
    assert not (tmp_path / "run" / "critic").exists()
    before, after = estimated[-1]
    returns = []
    for batch in before:
        penalty = 0.01 * (batch.old_logps - batch.ref_logps)
        for start, end, score in zip(batch.cu_seqlens, batch.cu_seqlens[1:], batch.scores, strict=False):
            rewards = -penalty[start:end]
            rewards[-1] += score
            for place in range(len(rewards)):
                returns.append(sum(0.95**k * r for k, r in enumerate(rewards[place:].tolist())))
    returns = torch.tensor(returns)
    got = torch.cat([batch.advantages for batch in after])
    torch.testing.assert_close(got, (returns - returns.mean()) / returns.std(), rtol=1e-4, atol=1e-5)
    assert lines(tmp_path / "run" / "metrics.jsonl")[-1]["objective/kl"] > 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"algorithm": "remax", "rollout": RolloutConfig(dynamic_sampling=2)},
            "dynamic_sampling: expected 0 with remax",
        ),
        (
            {"algorithm": "remax", "advantages": {"baseline": "mean"}},
            "advantages: expected nothing with remax, which has its own",
        ),
        ({"algorithm": "dppo", "rollout": RolloutConfig(top_p=0.9)}, "rollout.top_p: expected its default"),
        (
            {
                "loss": {"correction": {"kind": "truncate", "level": "token", "high": 2.0}},
                "rollout": RolloutConfig(min_p=0.1, repetition_penalty=1.1),
            },
            "rollout.min_p, rollout.repetition_penalty: expected its default .* Leave loss.correction out",
        ),
        ({"masks": TokenMasks(off_policy=0.5), "rollout": RolloutConfig(top_k=9)}, "Leave masks.off_policy"),
        (
            {
                "policy_gradient": PolicyGradientConfig(ratio_to_sampler=True),
                "loss": {"correction": {"kind": "mask", "level": "token", "high": 2.0}},
            },
            "loss.correction: expected nothing with policy_gradient.ratio_to_sampler",
        ),
        (
            {"algorithm": "cispo", "loss": {"surrogate.dual": 3.0}},
            "loss.surrogate.dual: unknown key. Known: ratio_max, ratio_min",
        ),
        ({"masks": TokenMasks(kl_cov=2e-4)}, "masks.kl_cov: expected more than 1 optimizer step per rollout"),
        ({"algorithm": "gmpo", "masks": TokenMasks(top_entropy=0.2)}, "top_entropy: expected null with gmpo"),
        ({"algorithm": "dppo", "masks": TokenMasks(total_variation=0.2)}, "total_variation: expected null with dppo"),
        ({"algorithm": "cispo", "masks": TokenMasks(clip_cov=2e-4)}, "clip_cov: expected null without the clip"),
        ({"algorithm": "ppo", "masks": TokenMasks(off_policy=0.5)}, "masks.off_policy: expected null"),
        (
            {"algorithm": "ppo", "ppo": PPOConfig(lam_policy=0.9, length_alpha=0.05)},
            "lam_policy: expected None with len",
        ),
        (
            {"algorithm": "ppo", "ppo": PPOConfig(critic="shared", critic_warmup=2)},
            "ppo.critic_warmup: expected 0, or with",
        ),
        ({"algorithm": "ppo", "ppo": PPOConfig(length_alpha=0.0)}, "length_alpha: expected above 0"),
        (
            {"algorithm": "rloo", "policy_gradient": PolicyGradientConfig(ratio_to_sampler=True)},
            "policy_gradient.ratio_to_sampler: expected null with rloo",
        ),
        ({"ppo": PPOConfig(positive_nll=0.1)}, "ppo: expected its defaults, as grpo has no critic"),
        ({"algorithm": "ppo", "ppo": PPOConfig(critic="none", lam=0.9)}, "ppo.lam: expected left out without a critic"),
    ],
)
def test_choices_that_make_no_sense_together_are_refused_in_one_sentence(changes, message):
    with pytest.raises(ValueError, match=message):
        build_algorithm(TrainConfig(**changes))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_entropy": 1.5}, "top_entropy: expected a share between 0 and 1, or null, got 1.5"),
        ({"off_policy": -1.0}, "off_policy: expected at least 0, or null"),
        ({"clip_cov": 0.1, "kl_cov": 0.1}, "clip_cov, kl_cov: expected one of them"),
        ({"clip_cov": 0.1, "cov_low": 6.0}, "cov_low: expected less than cov_high, 5.0"),
        ({"cov_low": 0.5}, "cov_low, cov_high: expected left out without clip_cov, got cov_low"),
        ({"kl_cov_coef": 0.5}, "kl_cov_coef: expected left out without kl_cov, got kl_cov_coef"),
    ],
)
def test_masks_that_cannot_be_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        TokenMasks(**values)
