"""axolotl's plug-in: its hooks called as axolotl's loader calls them, and the configurations it refuses.

Where axolotl is installed its own `BasePlugin` and `PluginManager` are used. Elsewhere the plug-in's base class is a
stand-in without behaviour, as axolotl's is.
"""

import importlib
import importlib.util
import re
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

REAL = importlib.util.find_spec("axolotl") is not None
DOC = (Path(__file__).parents[2] / "docs/integrations/axolotl.md").read_text()
NAME = "fastrl.integrations.axolotl"


@pytest.fixture
def host(monkeypatch):
    """The module under test, freshly imported."""
    if not REAL:
        for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules["axolotl.integrations.base"].BasePlugin = type("BasePlugin", (), {})
        true = metadata.version
        monkeypatch.setattr(metadata, "version", lambda name: "0.19.0" if name == "axolotl" else true(name))
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)


def tiny():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes)).train()


def test_a_supervised_model_trains_on_its_own_loss_without_logits_until_training_ends(host):
    model, plugin, ids = tiny(), host.FastRLPlugin(), torch.randint(40, (2, 7))
    before = model(input_ids=ids, labels=ids)
    gradient = torch.autograd.grad(before.loss, model.lm_head.weight)[0]
    plugin.register({"plugins": [f"{NAME}.FastRLPlugin"]})
    plugin.post_model_load({}, model)
    after = model(input_ids=ids, labels=ids)
    assert before.logits is not None
    assert after.logits is None
    torch.testing.assert_close(after.loss, before.loss)
    # float32 sums over 40 entries in another order; tests/integrations/test_hf.py has twelve digits in float64.
    torch.testing.assert_close(torch.autograd.grad(after.loss, model.lm_head.weight)[0], gradient, rtol=1e-4, atol=1e-6)
    plugin.post_train({}, model)
    assert model(input_ids=ids, labels=ids).logits is not None


def test_settings_under_the_key_reach_the_model(host):
    model, plugin, ids = tiny().eval(), host.FastRLPlugin(), torch.randint(40, (2, 7))
    plugin.post_model_load({"fastrl": {"logits": "never"}}, model)
    assert model(input_ids=ids, labels=ids).logits is None
    plugin.post_train({}, model)


def test_an_unknown_setting_under_the_key_is_refused(host):
    with pytest.raises(ValueError, match=r"logit\n.*Extra inputs are not permitted"):
        host.FastRLArgs(fastrl={"logit": "never"})


@pytest.mark.parametrize("kind", ["dpo", "ipo", "kto", "grpo", "gdpo"])
def test_a_run_with_rl_leaves_the_models_alone_and_accelerates_trl_for_its_trainer(host, monkeypatch, kind):
    calls, trainer, plugin, cfg = [], object(), host.FastRLPlugin(), {"rl": kind, "fastrl": {"cpu": True}}
    handle = types.SimpleNamespace(undo=lambda: calls.append("undo"))

    def accelerate(trainer=None, *, loss=False, cpu=False):
        calls.append((trainer, loss, cpu))
        return handle

    monkeypatch.setattr(importlib.import_module("fastrl.integrations.trl"), "accelerate", accelerate)
    for model in (tiny(), tiny()):  # the policy and its reference
        plugin.post_model_load(cfg, model)
        assert "forward" not in vars(model)
    assert calls == []
    plugin.post_trainer_create(cfg, trainer)
    assert calls == [(trainer, False, True)]
    plugin.post_train(cfg, tiny())
    assert calls[1:] == ["undo"]


def test_a_dpo_trainer_of_trl_computes_with_fastrl_until_training_ends(host, tmp_path):
    trl = pytest.importorskip("trl")  # an extra
    utils = importlib.import_module("trl.trainer.utils")
    own, plugin, model = utils._ChunkedLogProbFunction, host.FastRLPlugin(), tiny()
    trainer = object.__new__(trl.DPOTrainer)
    trainer.model = model
    utils.add_fused_lm_head(model, outputs=("log_probs",))
    plugin.post_trainer_create({"rl": "dpo"}, trainer)
    assert utils._ChunkedLogProbFunction is not own
    plugin.post_train({"rl": "dpo"}, model)
    assert utils._ChunkedLogProbFunction is own


@pytest.mark.parametrize(
    ("cfg", "name"),
    [
        ({"cut_cross_entropy": True}, "cut_cross_entropy"),
        ({"liger_cross_entropy": True}, "liger_cross_entropy"),
        ({"liger_fused_linear_cross_entropy": True}, "liger_fused_linear_cross_entropy"),
        ({"chunked_cross_entropy": True}, "chunked_cross_entropy"),
        ({"trl": {"use_liger_loss": True}}, "trl.use_liger_loss"),
        ({"dpo_use_liger_kernel": True, "rl": "dpo"}, "dpo_use_liger_kernel"),
        ({"use_eaft": True}, "use_eaft"),
        ({"kd_trainer": True}, "kd_trainer"),
        ({"plugins": ["axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"]}, "plugins"),
        ({"trl": {"async_prefetch": True}, "rl": "grpo"}, "trl.async_prefetch"),
        ({"reward_model": True}, "reward_model"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size"),
        ({"context_parallel_size": 4}, "context_parallel_size"),
        ({"rl": "orpo"}, "rl"),
        ({"rl": "grpo", "fastrl": {"logits": "never"}}, "fastrl.logits"),
        ({"fastrl": {"loss": True}}, "fastrl.loss"),
    ],
)
def test_a_configuration_that_fights_or_is_not_covered_is_refused_when_it_is_read_and_at_the_model(host, cfg, name):
    plugin, model = host.FastRLPlugin(), tiny()
    for call in (lambda: plugin.register(cfg), lambda: plugin.post_model_load(cfg, model)):
        with pytest.raises(ValueError, match=rf"{NAME}: {name}: expected "):
            call()
    assert "forward" not in vars(model)


def test_the_rest_of_liger_and_a_plug_in_that_is_switched_off_may_stay(host):
    plugins = [
        "axolotl.integrations.liger.LigerPlugin",
        "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin",
    ]
    host.refuse({"plugins": plugins, "cut_cross_entropy": False, "liger_rms_norm": True, "tensor_parallel_size": 1})


def test_the_page_s_configuration_is_accepted_and_names_the_plug_in(host):
    (text,) = re.findall(r"```yaml\n(.*?)```", DOC, flags=re.DOTALL)
    assert text.count("\n") <= 15
    cfg = yaml.safe_load(text)
    (path,) = cfg["plugins"]
    where, _, name = path.rpartition(".")
    plugin = getattr(importlib.import_module(where), name)()
    plugin.register(cfg)
    module, _, args = plugin.get_input_args().rpartition(".")
    options = getattr(importlib.import_module(module), args)(**cfg).fastrl
    assert (options.logits, options.cpu) == ("eval", True)


@pytest.mark.skipif(not REAL, reason="goes through axolotl's own plug-in manager")
def test_axolotls_manager_loads_the_plug_in_and_calls_its_hooks(host):
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.dict import DictDefault

    manager, model, ids = PluginManager(), tiny(), torch.randint(40, (2, 7))
    manager.register(f"{NAME}.FastRLPlugin")
    assert manager.get_input_args() == [f"{NAME}.FastRLArgs"]
    (plugin,) = manager.plugins.values()
    cfg = DictDefault({"plugins": [f"{NAME}.FastRLPlugin"], "fastrl": {"logits": "never"}})
    plugin.register(cfg)
    manager.post_model_load(cfg, model)
    assert model(input_ids=ids, labels=ids).logits is None
    manager.post_train(cfg, model)
    assert model(input_ids=ids, labels=ids).logits is not None
    with pytest.raises(ValueError, match="liger_fused_linear_cross_entropy: expected off, got True"):
        plugin.register(DictDefault({"liger_fused_linear_cross_entropy": True}))
