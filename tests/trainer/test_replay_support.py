"""`rollout.replay_support`: training on the distribution that top-p, top-k and min-p left."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from trainer.tiny import offline_config, sampled, tiny_config

from fastrl.algorithms.policy_gradient import policy_gradient_loss
from fastrl.data.pack import pack
from fastrl.losses.policy import policy_loss
from fastrl.trainer.build import build_algorithm
from fastrl.trainer.config import OptimizerConfig, RolloutConfig
from fastrl.trainer.setup import prepare, train
from fastrl.types import Group, Prompt, Sample

LAYOUTS = ("padded", "shared", "varlen")
CUT = {"top_p": 0.8, "top_k": 20, "min_p": 0.05}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def rollout_config(**changes):
    return RolloutConfig(4, 4, max_new_tokens=6, temperature=0.7, **changes)


def sample(ids, sets, own=None):
    return Sample(ids, [-0.5] * len(ids), True, reward=1.0, own=own, support=sets)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_sets_follow_the_targets(layout):
    samples = [sample([3, 4], [[3, 9], [4]]), sample([5], [[1, 5, 7]]), sample([6, 2], [[6], [2, 3]])]
    groups = [Group(Prompt(0, "", (1, 2)), samples[:2]), Group(Prompt(1, "", (8, 8, 8)), samples[2:])]
    batches = pack(groups, layout=layout, max_tokens=16)
    found = []
    for batch in batches:
        ids, offsets = batch.support
        sets = [ids[start:end].tolist() for start, end in pairwise(offsets.tolist())]
        found += zip(batch.targets.tolist(), sets, strict=True)
    expected = zip([3, 4, 5, 6, 2], [[3, 9], [4], [1, 5, 7], [6], [2, 3]], strict=True)
    assert sorted(found) == sorted(expected)


def test_sets_that_do_not_fit_the_tokens_and_sets_of_only_some_samples_are_refused():
    prompt = Prompt(0, "", (1, 2))
    with pytest.raises(ValueError, match=r"groups\[0\] support: expected 2 sets, one per token, got 1"):
        pack([Group(prompt, [sample([3, 4], [[3]])])], layout="padded", max_tokens=16)
    with pytest.raises(ValueError, match="support: expected 2 samples with one, or none, got 1"):
        pack([Group(prompt, [sample([3], [[3]]), sample([4], None)])], layout="padded", max_tokens=16)


def rolled(tmp_path, **changes):
    """A run that recorded its sets, and its micro-batches."""
    run = prepare(tiny_config(tmp_path, rollout=rollout_config(replay_support=True, **CUT), **changes))
    groups = sampled(run, 3, 4, seed=3)
    run.source.rewards.score(groups)
    run.algorithm.advantages(groups)
    return run, groups, run.learner.pack(groups)


def masked_logps(policy, batch):
    """(logps, entropy) from all logits, those outside the sets at -inf."""
    head, (ids, offsets) = policy.head, batch.support
    z = policy.hidden(batch) @ head.weight[: head.vocab_size].T / 0.7
    rows = torch.arange(len(batch.targets)).repeat_interleave(offsets.diff())
    keep = torch.zeros(z.shape, dtype=torch.bool)
    keep[rows, ids] = True
    log_p = z.masked_fill(~keep, -torch.inf).log_softmax(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(~keep, 0)).sum(-1)
    return log_p.gather(-1, batch.targets[:, None])[:, 0], entropy


@pytest.mark.parametrize("of", ["token", "sequence"])
def test_loss_and_gradient_are_those_of_the_masked_distribution(tmp_path, of):
    run, _, batches = rolled(tmp_path)
    policy, batch = run.learner.policy, batches[0]
    spec = replace(run.algorithm.spec, ratio=of)
    batch = replace(batch, old_logps=batch.sampling_logps + 0.1 * torch.randn(len(batch.targets)))
    out = policy_gradient_loss(policy, batch, spec, 3.0, temperature=0.7, entropy=True)
    logps, entropy = masked_logps(policy, batch)
    expected = policy_loss(
        logps,
        batch.advantages,
        spec,
        mask=batch.mask,
        old_logps=batch.old_logps,
        sampling_logps=batch.sampling_logps,
        entropy=entropy,
        group_ids=batch.group_ids,
        normalizer=3.0,
        cu_seqlens=batch.cu_seqlens,
    )
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.metrics["entropy"], expected.metrics["entropy"], rtol=1e-5, atol=1e-5)
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    got, want = (torch.autograd.grad(one.loss, parameters, retain_graph=True) for one in (out, expected))
    assert any(grad.abs().max() > 1e-3 for grad in want)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_scores_of_the_policy_before_an_update_are_the_sampling_logps_in_every_layout(tmp_path):
    run, groups, _ = rolled(tmp_path)
    for layout in ("padded", "shared"):
        for batch in pack(groups, layout=layout, max_tokens=64):
            logps = run.learner.policy.score(batch, temperature=0.7)
            torch.testing.assert_close(logps, batch.sampling_logps, rtol=0, atol=1e-4)
            without = run.learner.policy.score(replace(batch, support=None), temperature=0.7)
            assert (without - batch.sampling_logps).abs().max() > 0.05


def test_tokens_that_the_policy_did_not_write_need_no_set_and_do_not_train(tmp_path):
    run, groups, _ = rolled(tmp_path)
    for one in (one for group in groups for one in group.samples if len(one.token_ids) > 1):
        one.own = [False, *[True] * (len(one.token_ids) - 1)]
        one.support[0] = []
    (batch, *_) = run.learner.pack(groups)
    logps = run.learner.policy.score(batch, temperature=0.7)
    assert not batch.mask.all()
    assert not logps[~batch.mask].any()
    torch.testing.assert_close(logps[batch.mask], batch.sampling_logps[batch.mask], rtol=0, atol=1e-4)


@pytest.mark.parametrize("replay", [True, False])
def test_a_run_with_truncated_rollouts_scores_what_was_sampled_only_if_it_replays_the_support(tmp_path, replay):
    config = tiny_config(tmp_path, rollout=rollout_config(replay_support=replay, **CUT))
    train(config)
    for line in lines(tmp_path / "run" / "metrics.jsonl"):
        difference = line["sampling/sampling_logp_difference/max"]
        assert difference < 1e-4 if replay else difference > 0.05


@pytest.mark.parametrize("algorithm", ["grpo", "ppo", "dppo"])
def test_old_policy_reference_and_several_updates_work_under_the_support(tmp_path, algorithm):
    changes = {"loss": {"kl": {"kind": "k3", "coef": 0.01}}} if algorithm == "grpo" else {}
    optimizer = OptimizerConfig(lr=1e-2, epochs_per_rollout=2)
    rollout = rollout_config(replay_support=True, **CUT)
    train(tiny_config(tmp_path, algorithm=algorithm, rollout=rollout, optimizer=optimizer, **changes))
    written = lines(tmp_path / "run" / "metrics.jsonl")
    assert len(written) == 3
    if algorithm == "grpo":
        assert written[-1]["kl"] > 0


def test_the_refusal_of_truncation_with_a_correction_is_lifted_and_its_weights_are_one(tmp_path):
    loss = {"correction": {"kind": "truncate", "level": "token", "high": 2.0}}
    with pytest.raises(ValueError, match=r"rollout.top_p, .*Leave loss.correction out. Or set rollout.replay_support"):
        build_algorithm(tiny_config(tmp_path, loss=loss, rollout=rollout_config(**CUT)))
    rollout = rollout_config(replay_support=True, **CUT)
    train(tiny_config(tmp_path, loss=loss, rollout=rollout))
    for line in lines(tmp_path / "run" / "metrics.jsonl"):
        assert line["sampling/kept_fraction"] == 1
    penalised = rollout_config(replay_support=True, repetition_penalty=1.1, **CUT)
    with pytest.raises(ValueError, match=r"rollout.repetition_penalty: expected its default"):
        build_algorithm(tiny_config(tmp_path, loss=loss, rollout=penalised))


@pytest.mark.parametrize("algorithm", ["sft", "online_dpo", "dpo"])
def test_replay_is_refused_where_the_loss_would_not_read_the_sets(tmp_path, algorithm):
    config = offline_config(tmp_path, "dpo") if algorithm == "dpo" else tiny_config(tmp_path, algorithm="dpo")
    config = replace(config, algorithm="sft" if algorithm == "sft" else "dpo")
    with pytest.raises(ValueError, match=r"rollout.replay_support: expected false, except for policy gradients"):
        build_algorithm(replace(config, rollout=rollout_config(replay_support=True, **CUT)))


def test_positive_nll_is_that_of_the_masked_distribution(tmp_path):
    run, _, batches = rolled(tmp_path)
    policy, batch = run.learner.policy, batches[0]
    weights = torch.linspace(0.1, 1.0, len(batch.targets)) * batch.mask
    batch = replace(batch, nll_weights=weights, advantages=torch.zeros_like(batch.advantages))
    out = policy_gradient_loss(policy, batch, run.algorithm.spec, 3.0, temperature=0.7, entropy=False)
    expected = -(weights * masked_logps(policy, batch)[0]).sum()
    # float32 against float32; tests/ops/test_support.py has twelve digits in float64.
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-6)
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    got, want = (torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (out.loss, expected))
    assert any(grad.abs().max() > 1e-3 for grad in want)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_named_backend_is_refused_with_the_support(tmp_path):
    rollout = rollout_config(replay_support=True, **CUT)
    with pytest.raises(ValueError, match=r"backend: expected auto with rollout.replay_support, got chunked"):
        build_algorithm(tiny_config(tmp_path, backend="chunked", rollout=rollout))
