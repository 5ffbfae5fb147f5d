"""Bugs that other trainers had between the model and the loss."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from trainer.tiny import tiny_config
from transformers import GPT2Config, GPT2LMHeadModel

from fastrl.data.pack import count, minibatches, pack
from fastrl.model.policy import Policy
from fastrl.trainer.build import build_algorithm
from fastrl.trainer.config import OptimizerConfig
from fastrl.trainer.optimizer import MasterOptimizer
from fastrl.trainer.setup import prepare
from fastrl.types import Group, Prompt, Sample

ANY_LAYOUT = pytest.mark.parametrize("layout", ["padded", "shared"])


def make_groups(vocabulary=32, lengths=((3, (4, 1, 6)), (7, (2, 5)), (1, (3, 3, 8, 1)))):
    """Groups of unequal prompts and completions, with token ids that include 0."""
    generator = torch.Generator().manual_seed(5)

    def ids(n):
        return torch.randint(0, vocabulary, (n,), generator=generator).tolist()

    groups = []
    for index, (prompt, completions) in enumerate(lengths):
        samples = [
            Sample(ids(n), [-1.0] * n, True, reward=float(i % 2), advantage=i - 0.5) for i, n in enumerate(completions)
        ]
        groups.append(Group(Prompt(index, "", tuple(ids(prompt))), samples))
    return groups


def plain_logps(model, prompt, completion):
    """Token i of the completion scored by the logits at the position before it, one sequence at a time."""
    ids = torch.tensor([[*prompt, *completion]])
    logps = model(ids).logits.log_softmax(-1)[0]
    return torch.stack([logps[len(prompt) + i - 1, token] for i, token in enumerate(completion)])


def by_sample(batches, vectors):
    """Per-token vectors of all micro-batches as lists keyed by the sequence's target ids."""
    found = {}
    for batch, vector in zip(batches, vectors, strict=True):
        bounds = batch.cu_seqlens.tolist()
        for start, end in pairwise(bounds):
            found[tuple(batch.targets[start:end].tolist())] = vector[start:end]
    return found


@ANY_LAYOUT
@pytest.mark.parametrize("aggregate", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "prompt_mean"])
@pytest.mark.parametrize("steps_per_rollout", [1, 2, 3])
def test_loss_scale_does_not_depend_on_steps_per_rollout_and_micro_batches(
    tmp_path, layout, aggregate, steps_per_rollout
):
    """Gradients were off by 0.5x or 4x when the two did not match: https://github.com/huggingface/trl/pull/6024."""
    run = prepare(tiny_config(tmp_path))
    built = build_algorithm(tiny_config(tmp_path))
    algorithm = replace(built, spec=replace(built.spec, aggregate=aggregate))
    groups = make_groups(30)
    for part in minibatches(groups, steps_per_rollout, torch.Generator().manual_seed(0)):
        gradients = []
        for budget in (16, 40, 400):
            run.learner.policy.model.zero_grad()
            for batch in pack(part, layout=layout, max_tokens=budget):
                normalizer = algorithm.normalizer(count(part))
                (out,) = algorithm.losses(run.learner.policy, None, batch, normalizer, temperature=1.0, entropy=False)
                out.loss.backward()
            gradients.append(torch.cat([p.grad.flatten() for p in run.learner.policy.model.parameters()]))
        assert gradients[0].abs().max() > 0
        for other in gradients[1:]:
            torch.testing.assert_close(other, gradients[0], rtol=0, atol=1e-6 * gradients[0].abs().max().item())


@ANY_LAYOUT
def test_sequence_log_probability_is_the_sum_over_completion_tokens_only(tmp_path, layout):
    """Prompt tokens were summed, or the sum was a mean: https://github.com/huggingface/trl/pull/3346."""
    run = prepare(tiny_config(tmp_path))
    groups = make_groups(30)
    batches = pack(groups, layout=layout, max_tokens=400)
    got = by_sample(batches, [run.learner.policy.score(batch, temperature=1.0) for batch in batches])
    for group in groups:
        for sample in group.samples:
            expected = plain_logps(run.learner.policy.model, group.prompt.token_ids, sample.token_ids)
            torch.testing.assert_close(got[tuple(sample.token_ids)].sum(), expected.sum(), rtol=0, atol=1e-4)


@ANY_LAYOUT
def test_log_probability_i_scores_token_i(tmp_path, layout):
    """Logits were shifted and labels were not: https://github.com/PrimeIntellect-ai/prime-rl/pull/1525."""
    run = prepare(tiny_config(tmp_path))
    groups = [Group(Prompt(0, "", (3, 4)), [Sample([5, 6], [0.0, 0.0], True, reward=1.0)])]
    (batch,) = pack(groups, layout=layout, max_tokens=16)
    logps = run.learner.policy.model(torch.tensor([[3, 4, 5, 6]])).logits.log_softmax(-1)[0]
    expected = torch.stack([logps[1, 5], logps[2, 6]])  # the distributions after 3 4, and after 3 4 5
    torch.testing.assert_close(run.learner.policy.score(batch, temperature=1.0), expected, rtol=0, atol=1e-5)


@ANY_LAYOUT
def test_learned_positions_do_not_see_the_padding(layout):
    """Left padding without position ids moved GPT-2 by 34 nats: https://github.com/huggingface/trl/issues/6800."""
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=64, n_embd=16, n_layer=2, n_head=2)).eval()
    model.transformer.wpe.weight.data.mul_(50)  # positions matter
    policy, groups = Policy(model), make_groups()
    batches = pack(groups, layout=layout, max_tokens=400)
    got = by_sample(batches, [policy.score(batch, temperature=1.0) for batch in batches])
    for group in groups:
        for sample in group.samples:
            expected = plain_logps(model, group.prompt.token_ids, sample.token_ids)
            torch.testing.assert_close(got[tuple(sample.token_ids)], expected, rtol=0, atol=1e-4)


@ANY_LAYOUT
def test_end_of_sequence_is_trained_when_it_is_also_the_padding(tmp_path, layout):
    """Masks made from `ids != pad` lost it: https://github.com/huggingface/trl/pull/6357."""
    run = prepare(tiny_config(tmp_path))
    assert run.tokenizer.pad_token_id == run.tokenizer.eos_token_id == 0
    ends = [[7, 0], [8, 9, 0]]
    samples = [Sample(ids, [0.0] * len(ids), True, reward=1.0, advantage=1.0) for ids in ends]
    (batch,) = pack([Group(Prompt(0, "", (5,)), samples)], layout=layout, max_tokens=32)
    assert batch.targets[batch.mask].tolist().count(0) == 2
    hidden = run.learner.policy.hidden(batch)
    hidden.retain_grad()
    run.learner.policy.hidden = lambda _: hidden
    next(run.algorithm.losses(run.learner.policy, None, batch, 2.0, temperature=1.0, entropy=False)).loss.backward()
    assert (hidden.grad.abs().sum(-1) > 0).all()


def test_tied_head_and_embedding_share_one_gradient_and_one_update(tmp_path):
    """They were updated twice with half the gradient: https://github.com/paiml/entrenar/issues/314."""
    run, groups = prepare(tiny_config(tmp_path)), make_groups(30)[:1]
    model, weight = run.learner.policy.model, run.learner.policy.head.weight
    assert weight is model.get_input_embeddings().weight
    (batch,) = pack(groups, layout="padded", max_tokens=400)

    def gradient_of(tied):
        model.zero_grad()
        head = weight if tied else torch.nn.Parameter(weight.detach().clone())
        run.learner.policy.head.head.weight = head
        next(run.algorithm.losses(run.learner.policy, None, batch, 9.0, temperature=1.0, entropy=False)).loss.backward()
        run.learner.policy.head.head.weight = weight
        return weight.grad.clone() if tied else weight.grad + head.grad

    torch.testing.assert_close(gradient_of(tied=True), gradient_of(tied=False), rtol=0, atol=1e-6)
    expected = gradient_of_reference(run, batch)
    optimizer = MasterOptimizer(model.parameters(), OptimizerConfig(), 1)
    assert sum(p is weight for p in optimizer.params) == 1
    next(run.algorithm.losses(run.learner.policy, None, batch, 9.0, temperature=1.0, entropy=False)).loss.backward()
    index = next(i for i, p in enumerate(optimizer.params) if p is weight)
    torch.testing.assert_close(optimizer._views(optimizer.grad)[index], expected, rtol=0, atol=1e-6)


def gradient_of_reference(run, batch):
    """The gradient of the tied weight from full logits and autograd."""
    weight = run.learner.policy.head.weight
    logps = run.learner.policy.model(batch.input_ids, position_ids=batch.position_ids).logits.log_softmax(-1)
    logps = logps.reshape(-1, logps.shape[-1])[batch.hidden_index].gather(-1, batch.targets[:, None]).squeeze(-1)
    lengths = batch.cu_seqlens.diff()
    token_weights = (batch.advantages / lengths / 9.0).repeat_interleave(lengths)
    loss = -((logps - logps.detach()).exp() * token_weights).sum()
    return torch.autograd.grad(loss, weight)[0]


def test_a_policy_is_a_module_whose_forward_is_all_of_it(tmp_path):
    run = prepare(tiny_config(tmp_path))
    policy, seen = run.learner.policy, []
    (batch,) = pack(make_groups(3)[:1], layout="padded", max_tokens=10_000)
    handle = policy.register_forward_hook(lambda *args: seen.append(args[-1]))
    out = policy(batch, entropy=True)
    handle.remove()
    assert seen == [out]
    assert torch.equal(out.logps, policy.score(batch, temperature=1.0))
    assert {id(p) for p in policy.parameters()} == {id(p) for p in policy.model.parameters()}
    out.logps.sum().backward()
    assert policy.head.weight.grad.abs().max() > 0
