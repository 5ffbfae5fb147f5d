"""torchtitan's loss: built from its config, given a head and hidden states, called as the RL trainer calls it.

Where torchtitan is installed its own base classes are used, and its DAPO loss is the comparison. Elsewhere a stand-in
has the names and signatures of its `components/loss.py`.
"""

import importlib
import importlib.util
import inspect
import re
import sys
import types
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import pytest
import torch

REAL = importlib.util.find_spec("torchtitan") is not None
DOC = (Path(__file__).parents[2] / "docs/integrations/torchtitan.md").read_text()
H, V = 8, 31


def stand_in(monkeypatch):
    def module(name, **members):
        made = types.ModuleType(name)
        vars(made).update(members)
        monkeypatch.setitem(sys.modules, name, made)

    class BaseLoss:
        @dataclass(kw_only=True, slots=True)
        class Config:
            def build(self, **options):
                return self._owner(config=replace(self), **options)

        def __init_subclass__(cls):
            if "Config" in vars(cls):
                cls.Config._owner = cls

    class ChunkedLossWrapper(BaseLoss):
        @dataclass(kw_only=True, slots=True)
        class Config(BaseLoss.Config):
            num_chunks: int = 8

        def set_lm_head(self, lm_head):
            self.lm_head = lm_head

    for name in ("torchtitan", "torchtitan.components", "torchtitan.distributed"):
        module(name)
    loss = {"IGNORE_INDEX": -100, "BaseLoss": BaseLoss, "ChunkedLossWrapper": ChunkedLossWrapper}
    module("torchtitan.components.loss", **loss)
    module("torchtitan.distributed.spmd_types", spmd_mesh_size=lambda axis: 1)
    true = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.3.0" if name == "torchtitan" else true(name))


@pytest.fixture
def host(monkeypatch):
    """The module under test, freshly imported."""
    if not REAL:
        stand_in(monkeypatch)
    monkeypatch.delitem(sys.modules, "fastrl.integrations.torchtitan", raising=False)
    yield importlib.import_module("fastrl.integrations.torchtitan")
    sys.modules.pop("fastrl.integrations.torchtitan", None)


def built(host, **settings):
    loss = host.FastRLLoss.Config(**settings).build()
    assert isinstance(loss, sys.modules["torchtitan.components.loss"].ChunkedLossWrapper)  # which the trainers ask
    loss.set_lm_head(torch.nn.Linear(H, V, bias=False))
    return loss


def tokens(loss, shape=(12,)):
    """Hidden states and what the trainer passes beside them; one generator log-probability is not finite."""
    hidden = torch.randn(*shape, H).requires_grad_()
    labels, mask = torch.randint(V, shape), torch.rand(shape) < 0.8
    old = logps_of(loss, hidden, labels)[0].detach() + torch.randn(shape) * 0.4
    old.view(-1)[mask.reshape(-1).nonzero()[0]] = torch.nan
    others = {"generator_logprobs": old, "advantages": torch.randn(shape), "loss_mask": mask}
    return hidden, labels, others


def logps_of(loss, hidden, labels):
    logps = torch.nn.functional.linear(hidden, loss.lm_head.weight).log_softmax(-1)
    return logps.gather(-1, labels[..., None])[..., 0], -(logps.exp() * logps).sum(-1)


def by_hand(loss, hidden, labels, others, count, entropy_coef=0.0):
    """DAPO by its formula: the loss, and the metrics that need the logits."""
    logps, entropy = logps_of(loss, hidden, labels)
    old, advantages = others["generator_logprobs"], others["advantages"]
    mask = others["loss_mask"] & old.isfinite()
    ratio = torch.where(mask, logps - old, 0).exp()
    per_token = torch.maximum(-ratio * advantages, -ratio.clamp(0.8, 1.28) * advantages) - entropy_coef * entropy
    log_ratio = torch.where(mask, logps - old, 0)
    metrics = {
        "loss/ratio_mean": ratio[mask].sum() / count,
        "bit_wise/logprob_diff/mean": log_ratio.sum() / count,
        "bit_wise/logprob_diff/max": log_ratio.abs().max(),
        "bit_wise/ratio_tokens_different/mean": mask.sum() / count,
        "trainer/entropy/mean": entropy[mask].sum() / count,
    }
    total = per_token[mask].sum() / count
    return total, metrics | {"loss/mean": total}


@pytest.mark.parametrize("shape", [(12,), (3, 4)])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_the_loss_its_gradients_and_metrics_are_those_of_the_formula_on_full_logits(host, shape, entropy_coef):
    loss = built(host, overrides={"entropy_coef": entropy_coef})
    hidden, labels, others = tokens(loss, shape)
    value, metrics = loss(hidden, labels, 20, **others)
    expected, wanted = by_hand(loss, hidden, labels, others, 20, entropy_coef)
    torch.testing.assert_close(value, expected)
    leaves = (hidden, loss.lm_head.weight)
    ours, theirs = (torch.autograd.grad(one, leaves) for one in (value, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert min(one.abs().max() for one in ours) > 0
    for name, number in wanted.items():
        torch.testing.assert_close(metrics[name], number.detach(), rtol=1e-5, atol=1e-6, msg=name)
    assert all(name.endswith(("/mean", "_mean", "_frac", "/max")) for name in metrics)
    assert not any(number.requires_grad for number in metrics.values())


def test_micro_batches_divided_by_the_global_count_add_up(host):
    loss = built(host, preset="cispo")
    hidden, labels, others = tokens(loss)
    whole, metrics = loss(hidden, labels, torch.tensor(9), **others)
    parts = [
        loss(hidden[rows], labels[rows], 9, **{name: one[rows] for name, one in others.items()})
        for rows in (slice(0, 5), slice(5, 12))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole)
    for name in metrics:
        if not name.endswith("/max"):
            torch.testing.assert_close(parts[0][1][name] + parts[1][1][name], metrics[name], msg=name)


def test_the_head_keeps_its_own_forward_and_its_hooks_fire(host):
    loss, calls = built(host), []
    own = loss.lm_head.forward
    loss.lm_head.register_forward_pre_hook(lambda *_: calls.append("before"))
    hidden, labels, others = tokens(loss)
    loss(hidden, labels, 9, **others)
    assert calls == ["before"]
    assert "forward" not in vars(loss.lm_head)
    torch.testing.assert_close(loss.lm_head(hidden), own(hidden))


def test_the_clipped_fraction_counts_tokens_that_lose_their_gradient(host):
    loss = built(host)
    hidden, labels, others = tokens(loss)
    old, advantages = others["generator_logprobs"], others["advantages"]
    ratio = (logps_of(loss, hidden, labels)[0] - old).exp()
    lost = ((advantages > 0) & (ratio > 1.28) | (advantages < 0) & (ratio < 0.8)) & others["loss_mask"]
    assert lost.any()
    assert loss(hidden, labels, 9, **others)[1]["loss/ratio_clipped_frac"] == pytest.approx(lost.sum().item() / 9)


def test_the_entropy_is_left_out_if_it_is_not_asked_for(host):
    loss = built(host, entropy=False)
    hidden, labels, others = tokens(loss)
    value, metrics = loss(hidden, labels, 9, **others)
    assert "trainer/entropy/mean" not in metrics
    torch.testing.assert_close(value, by_hand(loss, hidden, labels, others, 9)[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "gspo"}, "ratio: expected 'token', got 'sequence'"),
        ({"preset": "grpo"}, "kl: expected none"),
        ({"overrides": {"aggregate": 1.0}}, "aggregate: expected no override"),
        ({"preset": "gropo"}, "preset: expected one of .* Did you mean 'grpo'"),
        ({"overrides": {"surrogate.hihg": 0.1}}, "surrogate.hihg: unknown key. Did you mean 'high'"),
    ],
)
def test_a_loss_that_torchtitan_cannot_feed_is_refused_by_name(host, settings, message):
    with pytest.raises(ValueError, match=message):
        host.FastRLLoss.Config(**settings).build()


def test_a_head_that_is_more_than_a_linear_layer_is_refused(host):
    class Quantised(torch.nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden.round())

    with pytest.raises(TypeError, match=r"lm_head: expected a torch.nn.Linear, got Quantised"):
        built(host).set_lm_head(Quantised(H, V))


def test_tensor_parallelism_and_a_missing_head_are_refused(host, monkeypatch):
    loss = built(host)
    hidden, labels, others = tokens(loss)
    spmd_types = importlib.import_module("torchtitan.distributed.spmd_types")
    with monkeypatch.context() as patch:
        patch.setattr(spmd_types, "spmd_mesh_size", lambda axis: {"tp": 2}[axis])
        with pytest.raises(ValueError, match="parallelism: expected the whole vocabulary on each rank"):
            loss(hidden, labels, 9, **others)
    loss.lm_head = None
    with pytest.raises(ValueError, match="lm_head: expected the model's head, got None"):
        loss(hidden, labels, 9, **others)


def test_a_sharded_head_gets_the_gradient_of_a_plain_one(host, tmp_path):
    """FSDP2 on one process: its hooks must gather the weight before, and take the gradient after."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    loss = built(host)
    hidden, labels, others = tokens(loss)
    loss(hidden, labels, 9, **others)[0].backward()
    plain, hidden.grad, loss.lm_head.weight.grad = (hidden.grad, loss.lm_head.weight.grad), None, None
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fully_shard(loss.lm_head, mesh=init_device_mesh("cpu", (1,)))
        loss.set_lm_head(loss.lm_head)
        loss(hidden, labels, 9, **others)[0].backward()
        assert isinstance(loss.lm_head.weight.grad, DTensor)
        torch.testing.assert_close((hidden.grad, loss.lm_head.weight.grad.full_tensor()), plain)
    finally:
        torch.distributed.destroy_process_group()


def test_the_page_s_configuration_builds(host):
    (example,) = re.findall(r"```python\n(.*?)```", DOC, flags=re.DOTALL)
    assert example.count("\n") <= 15
    names = {}
    exec(example, names)
    spec = names["loss"].build().spec
    assert (spec.surrogate.ratio_max, spec.entropy_coef) == (4.0, 0.001)


@pytest.mark.skipif(not REAL, reason="compares with torchtitan's own loss")
def test_dapo_is_torchtitans_own_under_its_chunks(host, monkeypatch):
    from torchtitan.components.loss import ChunkedLossWrapper, GradAccumulator

    # The package around the file imports vLLM; the file itself does not.
    (folder,) = importlib.util.find_spec("torchtitan").submodule_search_locations
    found = importlib.util.spec_from_file_location("dapo", Path(folder) / "experiments/rl/losses/dapo.py")
    dapo = importlib.util.module_from_spec(found)
    monkeypatch.setitem(sys.modules, "dapo", dapo)
    found.loader.exec_module(dapo)
    inner = dapo.DAPOLoss.Config(ratio_clip_low=0.2, ratio_clip_high=0.28)
    wrapper, loss = ChunkedLossWrapper.Config(num_chunks=4, loss_fn=inner).build(), built(host)
    wrapper.set_lm_head(loss.lm_head)
    flat = inspect.signature(GradAccumulator).parameters["seq_dim"].default == 0  # (T, H), else (B, L, H)
    hidden, labels, others = tokens(loss, (12,) if flat else (1, 12))
    results = []
    for one in (wrapper, loss):
        value, metrics = one(hidden, labels, 9, **others)
        value.backward()
        results.append((value.detach(), hidden.grad, loss.lm_head.weight.grad, metrics))
        hidden.grad = loss.lm_head.weight.grad = None
    torch.testing.assert_close(results[0][:3], results[1][:3], rtol=1e-5, atol=1e-6)
    ours, theirs = results[1][3], results[0][3]
    assert ours.keys() == theirs.keys()
    for name in theirs:
        if name != "loss/ratio_clipped_frac":  # which counts bounds that cut nothing off, too
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6, msg=name)
