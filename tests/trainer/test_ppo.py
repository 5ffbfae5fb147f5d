"""PPO: what the critic estimates, what the two losses push on, and the run as a whole."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from trainer.test_resume import config_for, everything, run_until_crash
from trainer.tiny import sampled, tiny_config, write_model
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from fastrl.algorithms import ActorCritic, KLController
from fastrl.algorithms.policy_gradient import Part
from fastrl.data.pack import count
from fastrl.losses.presets import PPO
from fastrl.model.scalar import ScalarModel, load_scalar_model
from fastrl.trainer.build import build_algorithm
from fastrl.trainer.config import (
    OptimizerConfig,
    PolicyGradientConfig,
    PPOConfig,
    RolloutConfig,
    TrainConfig,
)
from fastrl.trainer.setup import prepare, train
from fastrl.types import MicroBatch


@pytest.fixture(autouse=True)
def _report_without_pictures(monkeypatch):
    """They would take half of the time."""
    monkeypatch.setattr("fastrl.monitor.report.charts", lambda run: [])


CRITICS = pytest.mark.parametrize("critic", ["separate", "shared"])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def ppo_config(tmp_path, **changes):
    ppo = PPOConfig(critic_lr=1e-2, kl_coef=0.02)
    return tiny_config(tmp_path, **({"algorithm": "ppo", "ppo": ppo} | changes))


def micro_batch(bounds, **tensors):
    """Token vectors alone; nothing here reads what a model would."""
    nothing = torch.empty(0, dtype=torch.int64)
    rest = dict.fromkeys(
        ("input_ids", "position_ids", "attention_mask", "hidden_index", "targets", "group_ids", "group_tokens"), nothing
    )
    rest |= {"advantages": nothing, "sampling_logps": nothing}
    mask = torch.ones(bounds[-1], dtype=torch.bool)
    return MicroBatch(cu_seqlens=torch.tensor(bounds), mask=mask, **rest, **tensors)


def test_estimates_are_those_computed_by_hand():
    """Two completions of 2 and 1 tokens, gamma 1/2, lambda 1/2, KL coefficient 1/10."""
    batch = micro_batch(
        [0, 2, 3],
        scores=torch.tensor([1.0, -2.0]),
        old_logps=torch.tensor([-1.0, -2.0, -3.0]),
        ref_logps=torch.tensor([-2.0, -2.0, -1.0]),
        values=torch.tensor([0.5, 0.25, 1.0]),
    )
    algorithm = ActorCritic(PPO, KLController(0.1), gamma=0.5, lam=0.5, whiten=False)
    (part,), numbers = algorithm.estimate([Part([batch], 3.0)])
    (got,), normalizer = part.batches, part.normalizer
    # Rewards -0.1, 1, and -2 + 0.2. Errors: -0.1 + 0.25 / 2 - 0.5, 1 - 0.25, -1.8 - 1.
    errors = [-0.475, 0.75, -2.8]
    advantages = torch.tensor([errors[0] + 0.25 * errors[1], errors[1], errors[2]])
    torch.testing.assert_close(got.advantages, advantages)
    torch.testing.assert_close(got.returns, advantages + batch.values)
    assert normalizer == 3.0
    assert numbers == {"objective/kl": pytest.approx((1.0 - 2.0) / 2), "objective/kl_coef": 0.1}


def test_whitening_is_over_the_tokens_of_all_micro_batches():
    generator = torch.Generator().manual_seed(0)
    whole = {name: torch.randn(7, generator=generator) for name in ("old_logps", "ref_logps", "values")}
    scores, algorithm = torch.randn(3, generator=generator), ActorCritic(PPO, KLController(0.1))
    together = [Part([micro_batch([0, 2, 6, 7], scores=scores, **whole)], 7.0)]
    pieces = [
        Part([micro_batch([0, 2], scores=scores[:1], **{name: x[:2] for name, x in whole.items()})], 2.0),
        Part([micro_batch([0, 4, 5], scores=scores[1:], **{name: x[2:] for name, x in whole.items()})], 5.0),
    ]
    (one,) = algorithm.estimate(together)[0][0].batches
    apart = [batch for part in algorithm.estimate(pieces)[0] for batch in part.batches]
    torch.testing.assert_close(torch.cat([batch.advantages for batch in apart]), one.advantages)
    assert one.advantages.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert one.advantages.std().item() == pytest.approx(1.0, abs=1e-6)


def test_kl_controller_moves_towards_its_target_and_a_fixed_one_does_not():
    fixed, adaptive = KLController(0.1), KLController(0.1, target=2.0, horizon=100)
    fixed.update(50.0, 10)
    assert fixed.coef == 0.1
    adaptive.update(2.2, 10)  # 10 % too much
    assert adaptive.coef == pytest.approx(0.1 * 1.01)
    adaptive.update(50.0, 10)  # clipped at 20 %
    assert adaptive.coef == pytest.approx(0.1 * 1.01 * 1.02)
    adaptive.update(0.0, 10)
    assert adaptive.coef == pytest.approx(0.1 * 1.01 * 1.02 * 0.98)


def scored_rollout(run):
    """A function from packing options to one optimizer step's micro-batches with estimates, and its normaliser."""
    groups = sampled(run, 5, 3, seed=3)
    run.source.rewards.score(groups)

    def packed(layout, max_tokens):
        for sample in (sample for group in groups for sample in group.samples):
            sample.old_logps = sample.ref_logps = sample.values = None
        learner = replace(run.learner, layout=layout, max_tokens=max_tokens)
        batches = learner.score(learner.pack(groups), old=True)
        (part,), _ = run.algorithm.estimate([Part(batches, run.algorithm.normalizer(count(groups)))])
        return part.batches, part.normalizer

    return packed


@CRITICS
def test_gradient_of_policy_and_critic_is_the_same_for_every_layout_and_micro_batch_size(tmp_path, critic):
    run = prepare(ppo_config(tmp_path, ppo=PPOConfig(critic=critic, kl_coef=0.1)))
    head = run.learner.critic.head
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(1))
    params = [*run.learner.policy.model.parameters(), *(head.parameters() if critic == "shared" else [])]
    params += run.learner.critic.model.parameters() if critic == "separate" else []
    packed, found = scored_rollout(run), []
    for layout in ("padded", "shared"):
        for budget in (12, 31, 64, 10_000):
            batches, normalizer = packed(layout, budget)
            for param in params:
                param.grad = None
            for batch in batches:
                options = {"temperature": 1.0, "entropy": False}
                for out in run.algorithm.losses(run.learner.policy, run.learner.critic, batch, normalizer, **options):
                    out.loss.backward()
            found.append(torch.cat([param.grad.flatten().double() for param in params]))
    assert found[0].abs().max() > 0
    assert head.weight.grad.abs().max() > 0
    for gradient in found[1:]:
        torch.testing.assert_close(gradient, found[0], rtol=0, atol=1e-6 * found[0].abs().max().item())


@CRITICS
def test_training_raises_the_reward_and_the_critic_learns_to_foresee_it(tmp_path, critic):
    optimizer = OptimizerConfig(lr=1e-2, steps_per_rollout=2, epochs_per_rollout=2)
    ppo = PPOConfig(critic=critic, critic_lr=1e-2, kl_coef=0.01, value_coef=0.5)
    outcome = train(ppo_config(tmp_path, steps=20, ppo=ppo, optimizer=optimizer))
    assert outcome.status == "finished"
    assert outcome.after["sampled"] > outcome.before["sampled"] + 0.3
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert metrics[0]["objective/kl"] == pytest.approx(0.0, abs=1e-5)  # the reference is where the policy begins
    assert metrics[-1]["objective/kl"] > 0.1
    assert metrics[-1]["return/mean"] > 0.3
    assert metrics[-1]["value/mean"] == pytest.approx(metrics[-1]["return/mean"], rel=0.3)
    assert metrics[0]["value/mean"] == pytest.approx(0.0, abs=0.1)  # began as zero; the mean is over four updates
    if critic == "separate":
        assert metrics[0]["critic/learning_rate"] == 1e-2
        saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "critic")
        assert saved.config.num_labels == 1
        assert saved.score.weight.abs().max() > 0


@CRITICS
def test_a_resumed_run_is_bit_for_bit_the_run_that_never_stopped(tmp_path, critic):
    ppo = PPOConfig(critic=critic, critic_lr=1e-2, kl_coef=0.05, kl_target=0.5, kl_horizon=50)
    optimizer = OptimizerConfig(lr=1e-2, steps_per_rollout=2, epochs_per_rollout=2)
    config = config_for(tmp_path, "whole", algorithm="ppo", ppo=ppo, optimizer=optimizer, dtype="bfloat16")
    train(config)
    stopped = replace(config, run_dir=str(tmp_path / "stopped"))
    run_until_crash(stopped, 7)
    assert train(replace(stopped, resume=stopped.run_dir)).status == "finished"
    assert everything(tmp_path / "stopped") == everything(tmp_path / "whole")
    coefs = [line["objective/kl_coef"] for line in lines(tmp_path / "whole" / "metrics.jsonl")]
    assert len(set(coefs)) == len(coefs)
    if critic == "separate":
        assert (tmp_path / "stopped/checkpoints/step_000007/critic/exp_avg.safetensors").is_file()  # compared above


def test_a_new_scalar_head_is_zero_and_a_saved_one_stays(tmp_path):
    model = ppo_config(tmp_path).model
    fresh, tokenizer = load_scalar_model(model)
    assert not fresh.score.weight.any()
    torch.nn.init.ones_(fresh.score.weight)
    fresh.save_pretrained(tmp_path / "critic")
    tokenizer.save_pretrained(tmp_path / "critic")
    again, _ = load_scalar_model(tmp_path / "critic")
    assert again.score.weight.eq(1.0).all()


def test_value_of_a_token_does_not_see_the_token_or_what_follows(tmp_path):
    run = prepare(ppo_config(tmp_path))
    torch.nn.init.normal_(run.learner.critic.head.weight)
    assert isinstance(run.learner.critic, ScalarModel)
    (group,) = sampled(run, 1, 1, seed=3)
    group.samples[0].reward = 0.0
    sample = group.samples[0]
    values = []
    for last in (3, 4):
        sample.token_ids, sample.sampling_logps = [5, 6, last, 7 + last], [0.0] * 4
        (batch,) = run.learner.pack([group])
        with torch.no_grad():
            values.append(run.learner.critic.values(batch))
    torch.testing.assert_close(values[0][:3], values[1][:3], rtol=0, atol=0)
    assert values[0][3] != values[1][3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"kl": {}}}, "loss.kl: expected nothing: PPO's"),
        ({"loss": {"aggregate": "prompt_mean"}}, "spec.aggregate: expected 'token_mean'"),
        ({"advantages": {"baseline": "mean"}}, "advantages: expected nothing with ppo"),
        (
            {"policy_gradient": PolicyGradientConfig(filter_zero_variance=True)},
            "policy_gradient.filter_zero_variance: expected False",
        ),
        ({"ppo": PPOConfig(lam=1.5)}, "lam: expected a number from 0 to 1"),
        ({"ppo": PPOConfig(critic="shared", critic_model="x")}, "ppo.critic_model: expected none"),
        ({"ppo": PPOConfig(kl_coef=-1.0)}, "coef: expected at least 0"),
        ({"algorithm": "grpo", "ppo": PPOConfig(lam=0.9)}, "ppo: expected its defaults"),
    ],
)
def test_settings_that_cannot_work_together_are_refused_in_one_sentence(changes, message):
    with pytest.raises((ValueError), match=message):
        build_algorithm(TrainConfig(**({"algorithm": "ppo"} | changes)))


def test_a_critic_of_another_tokenizer_is_refused(tmp_path):
    config = ppo_config(tmp_path)
    _, tokenizer = load_scalar_model(config.model)
    other = tmp_path / "other"
    load_scalar_model(config.model)[0].save_pretrained(other)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(other)
    with pytest.raises(ValueError, match=r"ppo\.critic_model: expected a model with the policy's tokenizer"):
        prepare(replace(config, ppo=PPOConfig(critic_model=str(other))))


def test_a_critic_with_fewer_embeddings_than_tokens_is_refused(tmp_path):
    config, small = ppo_config(tmp_path), write_model(tmp_path / "small")
    LlamaForCausalLM(LlamaConfig.from_pretrained(small, vocab_size=20)).save_pretrained(small)
    with pytest.raises(
        ValueError, match=r"ppo\.critic_model: expected embeddings of the policy's 32 tokens, got a mod"
    ):
        prepare(replace(config, ppo=PPOConfig(critic_model=str(small))))


def test_epochs_pass_over_the_same_completions_again(tmp_path):
    optimizer, rollout = OptimizerConfig(lr=1e-2, epochs_per_rollout=2), RolloutConfig(4, 4, max_new_tokens=4)
    config = ppo_config(tmp_path, steps=1, algorithm="grpo", ppo=PPOConfig(), optimizer=optimizer, rollout=rollout)
    train(config)
    (line,) = lines(tmp_path / "run" / "metrics.jsonl")
    assert line["ratio/mean"] != 1.0  # the second pass is off-policy
