"""prime-rl's plug-in: the custom loss under `LossInputs` and `LossOutputs`, and the head's function.

Where prime_rl is installed its own modules are used and compared with. Elsewhere a stand-in has the names and
signatures of its `trainer/rl/loss.py` and `trainer/models/layers/lm_head.py` of 2026-08-21.
"""

import importlib.util
import re
import sys
import types
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
import torch

from fastrl.integrations import prime_rl
from fastrl.integrations.host_loss import preset
from fastrl.spec import KL, Cispo, Clip

REAL = importlib.util.find_spec("prime_rl") is not None
DOC = (Path(__file__).parents[2] / "docs/integrations/prime_rl.md").read_text()
needs_prime_rl = pytest.mark.skipif(not REAL, reason="compares with prime-rl's own functions")


@dataclass
class LossInputs:
    trainer_logprobs: torch.Tensor
    inference_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor | None
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    loss_weights: torch.Tensor | None = None


@dataclass
class LossOutputs:
    loss: torch.Tensor
    metrics: dict


@pytest.fixture(autouse=True)
def _host(monkeypatch):
    if REAL:
        return

    def module(name, **members):
        made = types.ModuleType(name)
        vars(made).update(members)
        monkeypatch.setitem(sys.modules, name, made)
        parent, _, own = name.rpartition(".")
        if parent:
            monkeypatch.setattr(sys.modules[parent], own, made, raising=False)

    for name in ("prime_rl", "prime_rl.trainer", "prime_rl.trainer.rl", "prime_rl.trainer.models"):
        module(name)
    module("prime_rl.trainer.models.layers")
    module("prime_rl.trainer.rl.loss", LossInputs=LossInputs, LossOutputs=LossOutputs)
    module("prime_rl.trainer.models.layers.lm_head", _SequenceChunkedLogProbEntropyFn=object())
    true = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.8.0" if name == "prime-rl" else true(name))


def sequence(tokens=7, **others):
    from prime_rl.trainer.rl.loss import LossInputs

    old = torch.randn(tokens) - 2
    logps = (old + torch.randn(tokens) * 0.4).requires_grad_()
    mask = torch.arange(tokens) > 1
    old = torch.where(mask, old, torch.nan)  # what is not trained on may hold anything
    given = {"ref_logprobs": None, "advantages": torch.full((tokens,), 0.7), "loss_mask": mask}
    return LossInputs(trainer_logprobs=logps, inference_logprobs=old, **given | others)


def gradient(loss, inputs):
    return torch.autograd.grad(loss, inputs.trainer_logprobs, retain_graph=True)[0]


def ratio_of(inputs):
    mask = inputs.loss_mask
    return torch.where(mask, inputs.trainer_logprobs - inputs.inference_logprobs.nan_to_num(), 0).exp()


def test_the_loss_is_the_unnormalised_sum_over_the_sequence_times_the_weight_stream():
    inputs = sequence(advantages=torch.randn(7), loss_weights=torch.rand(7))
    out = prime_rl.policy_loss(inputs)  # dapo
    ratio, advantages = ratio_of(inputs), inputs.advantages
    per_token = torch.maximum(-ratio * advantages, -ratio.clamp(0.8, 1.28) * advantages)
    expected = (per_token * inputs.loss_weights * inputs.loss_mask).sum()
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(gradient(out.loss, inputs), gradient(expected, inputs))


def test_a_sequence_loss_has_one_ratio_for_the_sequence():
    inputs = sequence()
    out = prime_rl.policy_loss(inputs, preset="gspo", surrogate={"low": 0.5, "high": 0.6})
    mean = (ratio_of(inputs).log() * inputs.loss_mask).sum() / inputs.loss_mask.sum()
    assert mean.abs() < 0.4  # inside the bounds
    expected = -mean.exp() * 0.7 * inputs.loss_mask.sum()
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(gradient(out.loss, inputs), gradient(expected, inputs))


def default_loss(inputs, kl_tau):
    """prime-rl's default loss: a mask on the change of probability, and a squared log-ratio."""
    mask, ratio, advantages = inputs.loss_mask, ratio_of(inputs), inputs.advantages
    moved = torch.where(mask, inputs.trainer_logprobs.exp() - inputs.inference_logprobs.nan_to_num().exp(), 0)
    far = torch.where(advantages > 0, moved > 0.2, moved < -0.2)
    return (-1.0 * (mask & ~far) * advantages * ratio + kl_tau * mask * ratio.log().square()).sum()


def test_dppo_with_k2_to_the_sampler_is_prime_rls_default_loss():
    weights = torch.rand(40)
    inputs = sequence(40, advantages=torch.randn(40))
    inputs.trainer_logprobs = (inputs.trainer_logprobs.detach() / 4 + torch.randn(40) / 2).clamp(max=0).requires_grad_()
    inputs.inference_logprobs = inputs.inference_logprobs / 4
    inputs.ref_logprobs = inputs.inference_logprobs
    out = prime_rl.policy_loss(inputs, preset="dppo", kl={"kind": "k2", "coef": 2e-3})
    expected = default_loss(inputs, 1e-3)
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient(out.loss, inputs), gradient(expected, inputs), rtol=1e-5, atol=1e-6)
    assert out.metrics["clip_ratio/low_mean"] > 0
    inputs.loss_weights = weights  # the KL is weighted too
    weighted = prime_rl.policy_loss(inputs, preset="dppo", kl={"kind": "k2", "coef": 2e-3})
    torch.testing.assert_close(
        gradient(weighted.loss, inputs), gradient(expected, inputs) * weights, rtol=1e-5, atol=1e-6
    )


def test_a_sequence_without_tokens_reports_zero_under_the_same_names():
    empty = prime_rl.policy_loss(sequence(loss_mask=torch.zeros(7, dtype=torch.bool)))
    full = prime_rl.policy_loss(sequence())
    assert empty.metrics.keys() == full.metrics.keys()
    assert empty.loss == 0
    assert not any(empty.metrics.values())
    assert all(value.shape == () for value in full.metrics.values())
    assert full.metrics["ratio/mean"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "dapoo"}, "preset: expected one of .* Did you mean 'dapo'"),
        ({"aggregate": "token_sum"}, "aggregate: expected no override"),
        ({"entropy_coef": 0.1}, "entropy_coef: expected 0, got 0.1. A custom loss gets no entropy"),
        ({"correction": {"kind": "mask", "level": "token", "high": 2.0}}, "correction: expected none"),
        ({"preset": "grpo"}, "ref_logprobs: expected a tensor, for the KL of grpo, got None"),
        ({"surrogate": {"hihg": 0.3}}, "surrogate.hihg: unknown key. Did you mean 'high'"),
        ({"surrogate.low": 0.3, "surrogate": {"low": 0.1}}, "surrogate: a second time"),
        ({"surrogate": {"name": "cispo"}}, "surrogate: ratio_max: missing"),
    ],
)
def test_what_a_custom_loss_cannot_serve_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        prime_rl.policy_loss(sequence(), **options)


def test_overrides_change_a_field_or_choose_another_factor():
    assert preset("op", "dapo", {"surrogate.high": 0.3}).surrogate == Clip(0.2, 0.3)
    assert preset("op", "dapo", {"surrogate": {"name": "cispo", "ratio_max": 4.0}}).surrogate == Cispo(4.0)
    assert preset("op", "dapo", {"kl": {"kind": "k3", "coef": 0.1}}).kl == KL("k3", 0.1)
    assert preset("op", "grpo", {"kl": {"coef": 0.1}, "surrogate.dual": 3.0}).kl == KL("k3", 0.1)
    assert preset("op", "grpo", {"kl": None, "entropy_coef": 0.1}).kl is None
    with pytest.raises(ValueError, match=r"op\.kl: expected a mapping, of kl \(kind, coef\), got 0\.1"):
        preset("op", "grpo", {"kl": 0.1})


def fused(bias=None):
    from prime_rl.trainer.models.layers import lm_head

    hidden, weight = torch.randn(9, 8).requires_grad_(), torch.randn(31, 8).requires_grad_()
    labels, temperature = torch.randint(31, (9,)), torch.rand(9) + 0.5
    extra = () if bias is None else (bias,)
    out = lm_head._SequenceChunkedLogProbEntropyFn.apply(hidden, weight, labels, 1 / temperature, 4, *extra)
    logits = torch.nn.functional.linear(hidden, weight, bias) / temperature[:, None]
    logps = logits.log_softmax(-1)
    expected = logps.gather(-1, labels[:, None])[:, 0], -(logps.exp() * logps).sum(-1)
    return out, expected, (hidden, weight) if bias is None else (hidden, weight, bias)


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_head_has_a_gradient_through_the_entropy_and_takes_a_bias(with_bias):
    with prime_rl.accelerate():
        (logps, entropy), expected, leaves = fused(torch.randn(31).requires_grad_() if with_bias else None)
    torch.testing.assert_close((logps, entropy), expected, rtol=1e-5, atol=1e-5)
    grads = [
        torch.autograd.grad((one * torch.arange(9)).sum() + 3 * two.sum(), leaves)
        for one, two in ((logps, entropy), expected)
    ]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)


def test_undo_gives_prime_rl_its_own_function_back():
    from prime_rl.trainer.models.layers import lm_head

    before = lm_head._SequenceChunkedLogProbEntropyFn
    handle = prime_rl.accelerate()
    assert lm_head._SequenceChunkedLogProbEntropyFn is prime_rl.LogProbEntropy
    handle.undo()
    assert lm_head._SequenceChunkedLogProbEntropyFn is before


def test_the_page_s_settings_are_a_loss_and_its_module_accelerates():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    (text,) = re.findall(r"```toml\n(.*?)```", DOC, flags=re.DOTALL)
    (module,) = re.findall(r"```python\n(.*?)```", DOC, flags=re.DOTALL)
    assert (text + module).count("\n") <= 15
    settings = tomllib.loads(text)["trainer"]["loss"]
    where, _, name = settings["import_path"].rpartition(".")
    out = getattr(importlib.import_module(where), name)(sequence(), **settings["kwargs"])
    assert out.loss.requires_grad
    kwargs = dict(settings["kwargs"])
    assert prime_rl.spec_of(kwargs.pop("preset"), kwargs).surrogate == Cispo(ratio_max=4.0)
    names, handles, accelerate = {}, [], prime_rl.accelerate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prime_rl, "accelerate", lambda: handles.append(accelerate()))
        exec(module, names)
    assert names["policy_loss"] is prime_rl.policy_loss
    handles[0].undo()


@needs_prime_rl
def test_the_default_loss_of_this_file_is_prime_rls():
    from prime_rl.trainer.rl.loss import default_loss_fn

    config = types.SimpleNamespace(dppo_mask_low=0.2, dppo_mask_high=0.2, adv_tau=1.0, kl_tau=1e-3)
    inputs = sequence(40, advantages=torch.randn(40), loss_mask=torch.ones(40, dtype=torch.bool))
    inputs.inference_logprobs = inputs.inference_logprobs.nan_to_num(-2.0)
    theirs = default_loss_fn(inputs, config).loss
    torch.testing.assert_close(default_loss(inputs, 1e-3), theirs)
    inputs.ref_logprobs = inputs.inference_logprobs
    ours = prime_rl.policy_loss(inputs, preset="dppo", kl={"kind": "k2", "coef": 2e-3})
    torch.testing.assert_close(gradient(ours.loss, inputs), gradient(theirs, inputs), rtol=1e-5, atol=1e-6)


@needs_prime_rl
def test_the_head_is_prime_rls_own_in_its_module():
    from prime_rl.trainer.models.layers.lm_head import FusedOutputLinear

    head = FusedOutputLinear(8, 31, chunk_size=4)
    hidden, labels = torch.randn(2, 5, 8).requires_grad_(), torch.randint(31, (2, 5))
    results = []
    for accelerated in (False, True):
        handle = prime_rl.accelerate() if accelerated else None
        out = head(hidden, labels, temperature=torch.arange(10).view(2, 5) / 10 + 0.5)
        grads = torch.autograd.grad(out["logprobs"].sum(), (hidden, head.weight))
        results.append((out["logprobs"].detach(), out["entropy"].detach(), *grads))
        if handle:
            handle.undo()
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
