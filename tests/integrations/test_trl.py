"""Real TRL trainers on a tiny random model, three steps each, with and without fastrl's log-probabilities."""

from __future__ import annotations

import importlib
import math
import re
import runpy
import warnings
from collections import defaultdict
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from integrations.hosts import model, saved, texts

trl = pytest.importorskip("trl")

from fastrl import presets  # noqa: E402
from fastrl.integrations import trl as integration  # noqa: E402
from fastrl.spec import KL, Cispo, Clip, Sapo, Vespo  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
UTILS = importlib.import_module("trl.trainer.utils")
STEPS = 3
CLOCKS = ("time", "runtime", "per_second", "flos")


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def mixture_of_experts(tmp_path_factory):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    folder = tmp_path_factory.mktemp("moe")
    return saved(folder, kind=Qwen3MoeForCausalLM, config=Qwen3MoeConfig, output_router_logits=True, **experts)


def reward(completion_ids, **_):
    """Different within groups, and often the group's mean."""
    return [float(sum(ids) % 3) for ids in completion_ids]


def arguments(kind, folder, **options):
    common = {
        "output_dir": f"{folder}/out", "max_steps": STEPS, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True,
        "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "seed": 1, "bf16": False,
        "per_device_train_batch_size": 4, "gradient_checkpointing": False,
    }  # fmt: skip
    return getattr(trl, f"{kind}Config")(**common | options)


def online(kind, folder, **options):
    sampling = {"num_generations": 4, "max_completion_length": 8}
    rows = Dataset.from_list([{"prompt": text} for text in texts()])
    make = getattr(trl, f"{kind}Trainer")
    return make(folder, reward_funcs=reward, args=arguments(kind, folder, **sampling | options), train_dataset=rows)


def offline(kind, folder, **options):
    answers = texts(seed=1), texts(seed=2)
    rows = {
        "SFT": [{"prompt": p, "completion": f" {a}"} for p, a in zip(texts(), answers[0], strict=True)],
        "DPO": [
            {"prompt": p, "chosen": f" {a}", "rejected": f" {b}"} for p, a, b in zip(texts(), *answers, strict=True)
        ],
        "KTO": [
            {"prompt": p, "completion": f" {a}", "label": n % 2 == 0}
            for n, (p, a) in enumerate(zip(texts(), answers[0], strict=True))
        ],
    }[kind]  # fmt: skip
    make = getattr(trl, f"{kind}Trainer")
    return make(folder, args=arguments(kind, folder, **options), train_dataset=Dataset.from_list(rows))


def train(make, kind, folder, accelerated=None, **options):
    """(what was logged, weights) after the steps; `accelerated`: arguments of `accelerate`, None without it."""
    trainer = make(kind, folder, **options)
    handle = None if accelerated is None else integration.accelerate(trainer, **accelerated)
    try:
        trainer.train()
    finally:
        if handle is not None:
            handle.undo()
    logged = [
        {name: value for name, value in row.items() if not any(clock in name for clock in CLOCKS)}
        for row in trainer.state.log_history
    ]
    return logged, dict(trainer.model.state_dict())


def assert_same(with_it, without, tolerance=2e-5, steps=STEPS):
    """Everything logged, and the weights, which three updates of 1e-2 have moved far.

    The gradient's norm is relative to itself and the run's largest: one part in 1e5 is what torch's own order of
    summation changes. Adam divides a gradient by its size, so that one of rounding moves its weight by up to a step:
    5e-4 is a twentieth of one.
    """
    (logged, weights), (expected, expected_weights) = with_it, without
    assert [row.keys() for row in logged] == [row.keys() for row in expected]
    assert len(logged) == steps + 1
    largest = max(row.get("grad_norm", 0.0) for row in expected)
    assert largest > 1e-3
    for row, other in zip(logged, expected, strict=True):
        for name, value in row.items():
            want = other[name]
            if isinstance(want, float) and math.isfinite(want):
                least = min(tolerance, 1e-6 * largest) if name == "grad_norm" else tolerance
                assert value == pytest.approx(want, rel=tolerance, abs=least), name
            else:
                assert value == want or (value != value and want != want), name
    for name, want in expected_weights.items():
        torch.testing.assert_close(weights[name], want, rtol=0, atol=5e-4, msg=lambda text, n=name: f"{n}: {text}")


# The log-probability, under every trainer that goes through TRL's fused head.

GRPO = {
    "defaults": {},
    "reference": {"beta": 0.1},
    "reference, plain k3": {"beta": 0.1, "use_bias_correction_kl": False},
    "two updates a rollout": {"num_iterations": 2},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "steps_per_generation": 2},
    "temperature": {"temperature": 0.7},
    "entropy bonus": {"entropy_coef": 0.01},
    "adaptive entropy": {"use_adaptive_entropy": True, "entropy_target": 3.0},
    "high-entropy tokens": {"top_entropy_quantile": 0.5},
    "off-policy mask": {"off_policy_mask_threshold": 0.5, "num_iterations": 2},
    "two-sided clipping": {"delta": 2.0, "num_iterations": 2},
    "float32 head": {"cast_lm_head_to_fp32": True},
    "truncated completions masked": {
        "mask_truncated_completions": True, "max_completion_length": 48, "optim": "sgd",
    },  # Adam makes steps of rounding, which so many tokens then sum up
}  # fmt: skip
LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")
GRPO |= {
    f"{loss}, {level}": {"loss_type": loss, "importance_sampling_level": level, "num_iterations": 2, "beta": 0.05}
    for loss, level in product(LOSS_TYPES, ("token", "sequence"))
    if (loss, level) != ("vespo", "sequence")
}


@pytest.mark.parametrize("options", GRPO)
def test_grpo_trains_the_same(folder, options):
    given = GRPO[options]
    assert_same(train(online, "GRPO", folder, {}, **given), train(online, "GRPO", folder, **given))


def test_grpo_with_bf16_weights_starts_with_the_same_gradient(folder):
    """TRL rounds logits to bf16 and fastrl does not, so that only the first step, on equal weights, can be compared."""
    given = {"model_init_kwargs": {"dtype": "bfloat16"}, "max_steps": 1}
    (ours, *_), (theirs, *_) = (train(online, "GRPO", folder, used, **given)[0] for used in ({}, None))
    assert theirs["grad_norm"] > 1e-3
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-2)
    assert ours["entropy"] == pytest.approx(theirs["entropy"], rel=1e-2)
    assert ours["reward"] == theirs["reward"]


@pytest.mark.parametrize("options", [{}, {"beta": 0.1}, {"num_iterations": 2, "learning_rate": 1e-4}], ids=str)
def test_rloo_trains_the_same(folder, options):
    without = train(online, "RLOO", folder, **options)
    for loss in (False, True):
        assert_same(train(online, "RLOO", folder, {"loss": loss}, **options), without)


DPO_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
DPO = {
    loss: {"loss_type": [loss], "label_smoothing": 0.1 if loss in ("exo_pair", "robust") else 0.0}
    for loss in DPO_LOSSES
}
DPO |= {
    "WPO": {"use_weighting": True},
    "mixed": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    "length-desensitised": {"ld_alpha": 0.5},
}


@pytest.mark.parametrize("options", DPO)
def test_dpo_trains_the_same(folder, options):
    assert_same(train(offline, "DPO", folder, {}, **DPO[options]), train(offline, "DPO", folder, **DPO[options]))


def test_reference_log_probabilities_that_the_constructor_computes_are_accelerated_too(folder):
    given = {"precompute_ref_log_probs": True}
    with integration.accelerate():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as construction:
            offline("DPO", folder, **given)
        with_it = train(offline, "DPO", folder, **given)
    assert any(event.key.startswith("fastrl::linear_logprob") for event in construction.key_averages())
    without = train(offline, "DPO", folder, **given)
    for logged, _ in (with_it, without):
        del logged[0]["rewards/accuracies"]  # counts the signs of margins that are rounding in the first step
    assert_same(with_it, without)


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_kto_trains_the_same(folder, loss):
    assert_same(*(train(offline, "KTO", folder, used, loss_type=loss) for used in ({}, None)))


@pytest.mark.parametrize(
    "options", [{}, {"loss_type": "dft"}, {"label_smoothing_factor": 0.1}, {"packing": True}], ids=str
)
def test_sft_trains_the_same(folder, options):
    assert_same(train(offline, "SFT", folder, {}, **options), train(offline, "SFT", folder, **options))


def test_a_mixture_of_experts_keeps_its_router_loss(mixture_of_experts):
    with_it, without = (train(offline, "SFT", mixture_of_experts, used) for used in ({}, None))
    assert_same(with_it, without)
    assert "aux_loss" in with_it[0][0]


def test_an_adapter_trains_the_same(folder):
    from peft import LoraConfig

    def make(kind, folder, **options):
        rows = Dataset.from_list([{"prompt": text} for text in texts()])
        args = arguments(kind, folder, num_generations=4, max_completion_length=8, beta=0.1, **options)
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        torch.manual_seed(0)
        return trl.GRPOTrainer(folder, reward_funcs=reward, args=args, train_dataset=rows, peft_config=lora)

    for loss in (False, True):
        assert_same(train(make, "GRPO", folder, {"loss": loss}), train(make, "GRPO", folder))


# TRL's loss with its gradient formed in the forward pass.

COVERED = [
    *(name for name in GRPO if name.split(",")[0] in LOSS_TYPES), "defaults", "reference", "reference, plain k3",
    "accumulation", "temperature", "two-sided clipping", "truncated completions masked", "float32 head",
]  # fmt: skip
REFUSED = {
    "entropy bonus": "entropy_coef: expected no entropy bonus, for fastrl's loss, got 0.01",
    "adaptive entropy": "entropy_coef: expected no entropy bonus",
    "high-entropy tokens": "top_entropy_quantile: expected 1.0, for fastrl's loss, got 0.5",
    "off-policy mask": "off_policy_mask_threshold: expected None, for fastrl's loss, got 0.5",
}


@pytest.mark.parametrize("options", COVERED)
def test_the_one_pass_loss_trains_and_logs_as_trl_does(folder, options):
    given = GRPO[options]
    assert_same(train(online, "GRPO", folder, {"loss": True}, **given), train(online, "GRPO", folder, **given))


def half(completions, **_):
    """Every other group of four has no signal."""
    return [float(n % 2) if n // 4 % 2 else 1.0 for n in range(len(completions))]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("GRPO", {}),
        ("GRPO", {"loss_type": "grpo"}),
        ("GRPO", {"importance_sampling_level": "sequence"}),
        ("RLOO", {"beta": 0.0}),
        ("RLOO", {"beta": 0.0, "num_iterations": 2}),
    ],
    ids=str,
)
def test_completions_without_an_advantage_go_through_the_model_without_a_gradient(folder, kind, options, monkeypatch):
    seen = []

    def make(kind, folder, **options):
        sizes = {"num_generations": 4, "max_completion_length": 8, "per_device_train_batch_size": 8}
        rows = Dataset.from_list([{"prompt": text} for text in texts()])
        args = arguments(kind, folder, **sizes | options)
        trainer = getattr(trl, f"{kind}Trainer")(folder, reward_funcs=half, args=args, train_dataset=rows)
        decoder = trainer.model.model
        decoder.register_forward_pre_hook(
            lambda module, args, kwargs: (
                seen.append((len(kwargs["input_ids"]), torch.is_grad_enabled())) if module.training else None
            ),
            with_kwargs=True,
        )
        return trainer

    without = train(make, kind, folder, **options)
    assert {rows for rows, gradient in seen if gradient} == {8}
    seen.clear()
    assert_same(train(make, kind, folder, {"loss": True}, **options), without)
    assert [rows for rows, gradient in seen if gradient] == [4] * STEPS


@pytest.mark.parametrize("options", REFUSED)
def test_an_option_that_the_one_pass_loss_lacks_is_refused_by_name(folder, options):
    trainer = online("GRPO", folder, **GRPO[options])
    before = UTILS._ChunkedLogProbFunction
    with pytest.raises(ValueError, match=REFUSED[options]):
        integration.accelerate(trainer, loss=True)
    assert UTILS._ChunkedLogProbFunction is before
    assert "_compute_loss" not in vars(trainer)


def test_other_trainers_and_losses_of_ones_own_are_refused_by_name(folder):
    class Own(trl.GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, inputs) * 2

    class OwnRloo(trl.RLOOTrainer):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, inputs) * 2

    with pytest.raises(ValueError, match="trainer: expected a GRPOTrainer, for its loss, got SFTTrainer"):
        integration.accelerate(offline("SFT", folder), loss=True)
    rows = Dataset.from_list([{"prompt": text} for text in texts()])
    own = Own(folder, reward_funcs=reward, args=arguments("GRPO", folder, num_generations=4), train_dataset=rows)
    with pytest.raises(ValueError, match="expected a GRPOTrainer with TRL's loss"):
        integration.accelerate(own, loss=True)
    own = OwnRloo(folder, reward_funcs=reward, args=arguments("RLOO", folder, num_generations=4), train_dataset=rows)
    with pytest.raises(ValueError, match="expected an RLOOTrainer with TRL's loss, got one with its own _compute_loss"):
        integration.accelerate(own, loss=True)


@pytest.mark.parametrize(
    ("options", "spec"),
    [
        ({}, {"surrogate": Clip(0.2, 0.2), "aggregate": "token_mean"}),
        ({"loss_type": "grpo", "beta": 0.1}, {"kl": KL("k3_ratio", 0.1), "aggregate": "seq_mean_token_mean"}),
        ({"beta": 0.1, "use_bias_correction_kl": False}, {"kl": KL("k3", 0.1)}),
        ({"loss_type": "cispo", "epsilon_high": 5.0}, {"surrogate": Cispo(ratio_max=5.0)}),
        ({"loss_type": "sapo"}, {"surrogate": Sapo(1.0, 1.05)}),
        ({"loss_type": "vespo"}, {"surrogate": Vespo(2.0, 3.0, 3.0, 2.0), "ratio": "sequence"}),
        ({"delta": 4.0}, {"surrogate": Clip(0.2, 0.2, dual=4.0)}),
        ({"delta": 1.1}, {"surrogate": Clip(0.2, 1.1 - 1, dual=1.2)}),
        ({"importance_sampling_level": "sequence"}, {"ratio": "sequence"}),
        ({"loss_type": "dr_grpo"}, {"aggregate": "token_sum"}),
        ({"loss_type": "luspo"}, {"aggregate": "seq_mean_token_sum"}),
    ],
    ids=str,
)  # fmt: skip
def test_policy_spec_reads_the_loss_off_the_configuration(folder, options, spec):
    got = integration.policy_spec(online("GRPO", folder, **options))
    assert {name: getattr(got, name) for name in spec} == spec


# The handle.


def test_undo_gives_trl_its_own_objects_back(folder):
    trainer = online("GRPO", folder)
    before = dict(vars(UTILS)), dict(vars(trainer))
    with integration.accelerate(trainer, loss=True):
        assert UTILS._ChunkedLogProbFunction is integration.FusedLogprob
        with integration.accelerate(trainer, loss=True):  # nothing the second time
            pass
        assert UTILS._ChunkedLogProbFunction is integration.FusedLogprob
        assert isinstance(vars(trainer)["_compute_loss"], integration._OnePass)
    assert (vars(UTILS), vars(trainer)) == before


def test_a_trainer_without_trl_s_fused_head_is_refused_by_name(folder):
    from transformers import AutoModelForCausalLM

    with pytest.raises(ValueError, match="trainer: expected a trainer on TRL's fused LM head, or its model, got Llama"):
        integration.accelerate(AutoModelForCausalLM.from_pretrained(folder))
    for name in ("OnlineDPOTrainer",):
        fake = type(name, (), {"model": AutoModelForCausalLM.from_pretrained(folder)})()
        with pytest.raises(ValueError, match=f"got {name}. It reads whole logits"):
            integration.accelerate(fake)


def test_an_old_trl_is_refused(monkeypatch):
    monkeypatch.delattr(UTILS, "_ChunkedLogProbFunction")
    with pytest.raises(ImportError, match=r"trl: expected 1\.15 or newer, got trl .* without its fused LM head"):
        integration.accelerate()


def test_the_model_alone_may_be_given_and_its_layers_run_on_the_cpu_products_until_undo(folder):
    from torch import nn

    trainer = offline("SFT", folder)
    handle = integration.accelerate(trainer.model, cpu=True)
    kinds = {type(module).__name__ for module in trainer.model.modules()}
    handle.undo()
    after = {type(module) for module in trainer.model.modules()}
    assert "NativeLinear" in kinds
    assert nn.Linear in after
    assert "NativeLinear" not in {one.__name__ for one in after}


# The function itself, beside TRL's.


def head(count=9, dtype=torch.float32, bias=True):
    hidden, weight = torch.randn(count, 16, dtype=dtype), torch.randn(70, 16, dtype=dtype)
    return hidden, weight, torch.randn(70, dtype=dtype) if bias else None, torch.randint(70, (count,))


ALL = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.mark.parametrize("outputs", [ALL, ("log_probs",), ("log_probs", "mean_logits", "is_top1")], ids=len)
@pytest.mark.parametrize("options", [(1.0, None, 1.0), (0.7, 3.0, 0.5)], ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_the_function_gives_what_trl_s_gives(outputs, options, biased):
    temperature, softcap, scale = options
    hidden, weight, bias, targets = head(bias=biased)
    results = []
    for function in (integration.FusedLogprob, UTILS._ChunkedLogProbFunction):
        leaves = [x if x is None else x.clone().requires_grad_() for x in (hidden, weight, bias)]
        out = function.apply(*leaves, targets, temperature, 32, softcap, scale, outputs)
        loss = out[0].square().sum() + (0 if out[1] is None else out[1].sum())
        results.append((out, torch.autograd.grad(loss, [x for x in leaves if x is not None])))
    (ours, our_grads), (theirs, their_grads) = results
    for got, want in zip((*ours, *our_grads), (*theirs, *their_grads), strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            assert got.dtype == want.dtype
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    assert [one is not None and one.requires_grad for one in ours] == [
        one is not None and one.requires_grad for one in theirs
    ]


def test_no_token_gives_no_result_that_still_hangs_on_the_graph():
    hidden, weight, bias, targets = head(0)
    hidden.requires_grad_()
    logps, *_ = integration.FusedLogprob.apply(hidden, weight, bias, targets, 1.0, 32)
    logps.sum().backward()
    assert logps.shape == (0,)
    assert hidden.grad is not None


def test_a_float32_hidden_state_meets_a_bf16_head_without_rounding():
    hidden, weight, bias, targets = head(dtype=torch.bfloat16)
    weight.requires_grad_()
    out = integration.FusedLogprob.apply(hidden.float(), weight, bias, targets, 1.0, 32)
    expected = (hidden.double() @ weight.double().T + bias.double()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(out[0].double(), expected, rtol=1e-5, atol=1e-5)
    out[0].sum().backward()
    assert weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("of", ["logps", "hidden", "weight"])
def test_in_bf16_fastrl_is_nearer_to_float64_than_trl(of):
    hidden, weight, _, targets = head(40, dtype=torch.bfloat16)

    def run(function, dtype):
        leaves = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        logps = function(*leaves)
        grads = torch.autograd.grad(logps.sum(), leaves)
        return dict(zip(("logps", "hidden", "weight"), (logps.detach(), *grads), strict=True))[of].double()

    def exact(h, w):
        return (h @ w.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]

    truth = run(exact, torch.float64)
    errors = [
        (run(lambda h, w, f=function: f.apply(h, w, None, targets, 1.0, 32)[0], torch.bfloat16) - truth).norm()
        for function in (integration.FusedLogprob, UTILS._ChunkedLogProbFunction)
    ]
    assert errors[0] <= errors[1]


def test_under_autocast_the_head_multiplies_in_its_dtype_and_gradients_are_float32():
    hidden, weight, bias, targets = head()
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = integration.FusedLogprob.apply(hidden, weight, bias, targets, 1.0, 32)[0]
        theirs = UTILS._ChunkedLogProbFunction.apply(hidden, weight, bias, targets, 1.0, 32)[0]
    ours.sum().backward()
    assert weight.grad.dtype == torch.float32
    assert (ours - theirs).abs().max() < 0.1  # TRL rounds the logits to bf16, of units 1/16 at 8; fastrl does not
    exact = (hidden.bfloat16().double() @ weight.bfloat16().double().T + bias.bfloat16().double()).log_softmax(-1)
    torch.testing.assert_close(ours.double(), exact.gather(1, targets[:, None])[:, 0], rtol=1e-5, atol=1e-5)


def test_trl_s_default_loss_with_dapo_s_upper_bound_is_the_preset(folder):
    assert integration.policy_spec(online("GRPO", folder, epsilon_high=0.28)) == presets.DAPO


# What is documented.


def test_the_documented_example_trains(tmp_path, monkeypatch):
    doc = (ROOT / "docs/integrations/trl.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", doc, flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    saved(tmp_path / "HuggingFaceTB/SmolLM2-135M-Instruct")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code.replace("max_steps=20", "max_steps=2"), names)
    names["handle"].undo()
    assert names["trainer"].state.global_step == 2


def test_the_example_trains(tmp_path, monkeypatch):
    folder = saved(tmp_path / "model")
    (Path(folder) / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    )
    monkeypatch.setattr("fastrl.model.packaged.converted", lambda name: folder)
    monkeypatch.chdir(tmp_path)
    trainer = runpy.run_path(str(ROOT / "examples/trl_grpo.py"), run_name="__main__")["trainer"]
    assert trainer.state.global_step == 10
    assert UTILS._ChunkedLogProbFunction is not integration.FusedLogprob


# A real model.


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """Its folder under a name of its own, in which trainers write."""
    from fastrl.model.packaged import PACKAGED, converted

    folder = tmp_path_factory.mktemp("smollm2") / "model"
    folder.symlink_to(converted(PACKAGED["smollm2-135m-instruct"]))
    return folder


def answered(completions, **_):
    return [float(len(text) % 7) for text in completions]


def test_smollm2_trains_the_same_under_grpo(smollm2, tmp_path):
    rows = Dataset.from_list([{"prompt": f"{n} + {n} ="} for n in range(8)])

    def make(kind, folder, **_):
        sizes = {"num_generations": 4, "max_completion_length": 4, "learning_rate": 1e-5, "max_steps": 2}
        args = arguments(kind, tmp_path, model_init_kwargs={"dtype": "float32"}, **sizes)
        return trl.GRPOTrainer(str(folder), answered, args=args, train_dataset=rows)

    assert_same(train(make, "GRPO", smollm2, {"loss": True}), train(make, "GRPO", smollm2), tolerance=1e-4, steps=2)


def test_smollm2_trains_the_same_under_dpo(smollm2, tmp_path):
    pairs = [{"prompt": f"{n} + {n} =", "chosen": f" {2 * n}", "rejected": f" {2 * n + 1}"} for n in range(12)]

    def make(kind, folder, **_):
        sizes = {"learning_rate": 1e-6, "max_steps": 2, "model_init_kwargs": {"dtype": "float32"}}
        return trl.DPOTrainer(
            str(folder), args=arguments(kind, tmp_path, **sizes), train_dataset=Dataset.from_list(pairs)
        )

    assert_same(*(train(make, "DPO", smollm2, used) for used in ({}, None)), tolerance=1e-4, steps=2)


# What was reported of TRL and of other fused heads under it: tried on both, with and without the one-pass loss.


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Models whose logits are capped, scaled or both."""
    import transformers

    options = {
        "Gemma2": {"final_logit_softcapping": 3.0, "head_dim": 8, "query_pre_attn_scalar": 8},
        "Cohere": {"logit_scale": 0.25},
        "Granite": {"logits_scaling": 4.0},
        "tied Llama": {"tie_word_embeddings": True},
    }
    made = {}
    for name, given in options.items():
        kind = name.split()[-1]
        classes = {
            "kind": getattr(transformers, f"{kind}ForCausalLM"),
            "config": getattr(transformers, f"{kind}Config"),
        }
        made[name] = saved(tmp_path_factory.mktemp(name.replace(" ", "_")), **classes, **given)
    return made


# https://github.com/huggingface/trl/pull/5691 scaled behind the cap, https://github.com/unslothai/unsloth-zoo/pull/593
# did not cap, https://github.com/unslothai/unsloth/pull/8997 multiplied by what divides.
@pytest.mark.parametrize("family", ["Gemma2", "Cohere", "Granite", "tied Llama"])
def test_capped_scaled_and_tied_heads_train_as_trl_does(families, family):
    # A tied head of these models repeats a token unless it is warm.
    given = {"temperature": 4.0 if "tied" in family else 0.6, "beta": 0.05, "num_iterations": 2}
    without = train(online, "GRPO", families[family], **given)
    for loss in (False, True):
        assert_same(train(online, "GRPO", families[family], {"loss": loss}, **given), without)
    assert_same(*(train(offline, "DPO", families[family], used) for used in ({}, None)))


# https://github.com/huggingface/trl/issues/6668, https://github.com/huggingface/trl/pull/5826: nothing left to learn.
@pytest.mark.parametrize("loss", [False, True])
def test_a_batch_whose_tokens_are_all_masked_is_trl_s_zero(folder, loss):
    given = {"mask_truncated_completions": True, "max_completion_length": 2}
    runs = [train(online, "GRPO", folder, used, **given) for used in ({"loss": loss}, None)]
    for logged, _ in runs:
        assert [row["grad_norm"] for row in logged[:STEPS]] == [0.0] * STEPS
        assert [row["loss"] for row in logged[:STEPS]] == [0.0] * STEPS
    for name, weight in runs[1][1].items():
        assert torch.equal(runs[0][1][name], weight)


def test_sft_without_a_label_is_trl_s_zero(folder):
    trainer = offline("SFT", folder)
    ids = torch.randint(3, 60, (2, 6))
    with integration.accelerate(trainer):
        out = trainer.model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    out.loss.backward()
    assert out.loss == 0
    assert not any(one.grad.any() for one in trainer.model.parameters() if one.grad is not None)


# https://github.com/huggingface/trl/issues/835: recomputed forwards.
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_trains_as_trl_does(folder, reentrant):
    given = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}, "beta": 0.1}
    without = train(online, "GRPO", folder, **given)
    for loss in (False, True):
        assert_same(train(online, "GRPO", folder, {"loss": loss}, **given), without)
    assert_same(*(train(offline, "DPO", folder, used, **given) for used in ({}, None)))


# https://github.com/unslothai/unsloth/pull/8261, https://github.com/huggingface/trl/pull/5710: divided once too often.
@pytest.mark.parametrize("kind", ["SFT", "DPO", "KTO"])
def test_accumulated_gradients_are_divided_as_trl_does(folder, kind):
    given = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    assert_same(*(train(offline, kind, folder, used, **given) for used in ({}, None)))


def adapted(config):
    def make(kind, folder, **options):
        torch.manual_seed(0)
        if kind != "GRPO":
            rows = offline(kind, folder).train_dataset
            return getattr(trl, f"{kind}Trainer")(
                folder, args=arguments(kind, folder, **options), train_dataset=rows, peft_config=config
            )
        rows = Dataset.from_list([{"prompt": text} for text in texts()])
        args = arguments(kind, folder, num_generations=4, max_completion_length=8, **options)
        return trl.GRPOTrainer(folder, reward_funcs=reward, args=args, train_dataset=rows, peft_config=config)

    return make


# https://github.com/huggingface/trl/pull/6159: a copy of the head that trains beside an adapter.
# https://github.com/huggingface/trl/pull/6186: virtual tokens before the prompt.
@pytest.mark.parametrize("kind", ["GRPO", "DPO", "SFT"])
@pytest.mark.parametrize("adapter", ["head that trains", "virtual tokens"])
def test_adapters_that_change_the_head_s_weight_or_positions_train_as_trl_does(folder, kind, adapter):
    import peft

    if adapter == "virtual tokens":
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    else:
        config = peft.LoraConfig(
            r=4, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["lm_head"], task_type="CAUSAL_LM"
        )
    without = train(adapted(config), kind, folder)
    for options in ({}, {"loss": True}) if kind == "GRPO" else ({},):
        assert_same(train(adapted(config), kind, folder, options), without)


# https://github.com/huggingface/trl/issues/3640: probabilities of 0.
def test_a_temperature_near_zero_gives_exact_log_probabilities():
    hidden, weight, bias, targets = head()
    hidden.requires_grad_()
    logps, entropy, *_ = integration.FusedLogprob.apply(hidden, weight, bias, targets, 1e-3, 32)
    exact = ((hidden.double() @ weight.double().T + bias.double()) / 1e-3).log_softmax(-1)
    torch.testing.assert_close(logps.double(), exact.gather(1, targets[:, None])[:, 0], rtol=1e-6, atol=1e-2)
    (logps.sum() + entropy.sum()).backward()
    assert hidden.grad.isfinite().all()
    assert logps.min() < -1000


# https://github.com/huggingface/trl/pull/6330: a float32 head under autocast.
@pytest.mark.parametrize("loss", [False, True])
def test_a_float32_head_under_autocast_trains_as_trl_does(folder, loss):
    given = {"bf16": True, "cast_lm_head_to_fp32": True, "optim": "sgd"}
    (logged, weights), (expected, expected_weights) = (
        train(online, "GRPO", folder, used, **given) for used in ({"loss": loss}, None)
    )
    for row, other in zip(logged[:STEPS], expected[:STEPS], strict=True):
        assert row["entropy"] == pytest.approx(other["entropy"], rel=1e-6)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    for name, want in expected_weights.items():
        torch.testing.assert_close(weights[name], want, rtol=0, atol=1e-5)


# https://github.com/huggingface/trl/pull/4976, /pull/6439, /issues/6166: tokens of tools, ratios of the sampler.


def written(seed=0, **more):
    """A batch as GRPO's loss takes it, with everything that may be in one."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.ones(4, 7, dtype=torch.long)
    mask[1, 5:], mask[2, 2:] = 0, 0
    tools = torch.ones_like(mask)
    tools[0, 2:4], tools[2] = 0, 0  # the third completion is all a tool's
    logps = -4 + torch.rand(4, 7, generator=g)
    return {
        "prompt_ids": torch.randint(3, 64, (4, 3), generator=g),
        "prompt_mask": torch.ones(4, 3, dtype=torch.long),
        "completion_ids": torch.randint(3, 64, (4, 7), generator=g),
        "completion_mask": mask,
        "tool_mask": tools,
        "advantages": torch.tensor([1.0, -1.0, 0.5, 0.0]),
        "old_per_token_logps": logps,
        "ref_per_token_logps": logps + 0.1 * torch.randn(4, 7, generator=g),
        "num_items_in_batch": (mask * tools).sum(),
        **more,
    }


WRITTEN = {
    "tools": {},
    "an advantage per token": {"advantages": torch.linspace(-1, 1, 28).view(4, 7)},
    "ratios per token": {"importance_sampling_ratio": torch.linspace(0, 2, 28).view(4, 7)},
    "ratios per sequence": {"importance_sampling_ratio": torch.tensor([[0.5], [1.5], [0.0], [2.0]])},
}


@pytest.mark.parametrize(
    ("loss_type", "name"),
    [pair for pair in product(LOSS_TYPES, WRITTEN) if pair[0] != "vespo" or "ratios" not in pair[1]],  # refused
)
def test_tools_tokens_and_the_sampler_s_ratios_have_trl_s_gradient_in_one_pass(folder, loss_type, name):
    sampled = "ratios" in name
    trainer = online("GRPO", folder, loss_type=loss_type, beta=0.05)
    trainer.current_gradient_accumulation_steps = 1
    trainer.use_vllm = sampled
    found = []
    for used in (True, False):
        handle = integration.accelerate(trainer, loss=True) if used else None
        trainer.model.zero_grad()
        trainer._metrics["train"].clear()
        loss = trainer._compute_loss(trainer.model, written(**WRITTEN[name]))
        loss.backward()
        metrics = {key: values[-1] for key, values in trainer._metrics["train"].items()}
        found.append((loss.detach(), metrics, [one.grad.clone() for one in trainer.model.parameters()]))
        if handle is not None:
            handle.undo()
    (loss, metrics, grads), (want, want_metrics, want_grads) = found
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    assert metrics == pytest.approx(want_metrics, rel=1e-4, abs=1e-6, nan_ok=True)
    assert sum(one.square().sum() for one in want_grads) > 0
    for got, wanted in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()) + 1e-9)


def test_evaluation_between_the_steps_is_trl_s(folder):
    def make(kind, folder, **options):
        rows = Dataset.from_list([{"prompt": text} for text in texts()])
        sizes = {"num_generations": 4, "max_completion_length": 8, "per_device_eval_batch_size": 4}
        args = arguments(kind, folder, eval_strategy="steps", eval_steps=1, **sizes | options)
        return trl.GRPOTrainer(folder, reward_funcs=reward, args=args, train_dataset=rows, eval_dataset=rows)

    (logged, _), (expected, _) = (train(make, "GRPO", folder, used) for used in ({"loss": True}, None))
    losses = [row["eval_loss"] for row in expected if "eval_loss" in row]
    assert len(losses) == STEPS
    assert max(map(abs, losses)) > 1e-3
    assert [row["eval_loss"] for row in logged if "eval_loss" in row] == pytest.approx(losses, rel=1e-5, abs=1e-6)


def test_a_router_s_loss_keeps_its_gradient_beside_the_one_pass_loss(mixture_of_experts):
    given = {"router_aux_loss_coef": 0.1}
    with_it, without = (train(online, "GRPO", mixture_of_experts, used, **given) for used in ({"loss": True}, None))
    assert_same(with_it, without)
    assert without[0][0]["aux_loss"] > 0


# https://github.com/huggingface/trl/pull/5575: a vision-language model's images enter below the head.
def test_a_vision_language_model_has_trl_s_log_probabilities_and_gradients():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"intermediate_size": 16, "num_hidden_layers": 2}
    vision = CLIPVisionConfig(hidden_size=16, num_attention_heads=2, image_size=8, patch_size=4, **sizes)
    text = LlamaConfig(vocab_size=64, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, **sizes)
    images = {"image_token_id": 63, "image_seq_length": 4}
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, **images))
    UTILS.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    ids = torch.randint(3, 60, (2, 10))
    ids[:, 1:5] = 63
    batch = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8), "labels": ids.clone()}
    batch["labels"][:, :6] = -100
    found = []
    for used in (True, False):
        handle = integration.accelerate(model) if used else None
        model.zero_grad()
        out = model(**batch, fused_lm_head=True)
        (out.log_probs.square().sum() + out.entropy.sum()).backward()
        grads = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
        found.append((out.log_probs.detach(), out.entropy.detach(), grads))
        if handle is not None:
            handle.undo()
    assert any("vision" in name and grad.any() for name, grad in found[1][2].items())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_a_head_that_is_gathered_for_the_forward_pass_alone_has_its_gradient():
    """As DeepSpeed's ZeRO-3 does it: outside the forward pass the parameter's values are elsewhere."""
    hidden, values, _, ids = head(bias=False)
    found = []
    for partitioned in (False, True):
        weight = torch.nn.Parameter(values.clone())
        if partitioned:
            weight.ds_id = 0
        logps, *_ = integration.FusedLogprob.apply(hidden, weight, None, ids, 0.7, 64)
        if partitioned:
            weight.data.fill_(math.nan)
        found += torch.autograd.grad(logps.sum(), weight)
    assert found[0].any()
    assert torch.equal(*found)


def test_cpu_products_are_refused_on_layers_in_pieces(folder):
    trainer = online("GRPO", folder)
    next(iter(trainer.model.parameters())).ds_id = 0
    with pytest.raises(ValueError, match="cpu: expected False with DeepSpeed's ZeRO-3, whose layers are in pieces"):
        integration.accelerate(trainer, cpu=True)
    assert UTILS._ChunkedLogProbFunction is not integration.FusedLogprob


# AsyncGRPO: its own loss, on rollouts and attention of ours in place of vLLM's and of flash attention on trees.


def async_batch(seed=0):
    """One row of two completions of a prompt each, as its collator lays them out; the second has no advantage."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (1, 12), generator=g)
    labels = torch.full((1, 12), -100)
    places = torch.tensor([[2, 3, 4, 7, 8, 9]])  # what predicts a token of a completion
    labels[0, places[0]] = ids[0, places[0] + 1]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(12)[None],
        "shift_labels": labels,
        "token_index": places,
        "old_log_probs": -4.0 + torch.rand(1, 6, generator=g),
        "advantages": torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0, 0.0]]),
        "segment_id": torch.tensor([[0, 0, 0, 1, 1, 1]]),
        "global_n_tokens": torch.tensor([6]),
        "global_n_forward_tokens": torch.tensor([12]),
        "mean_seq_len": torch.tensor([6.0]),
        **{name: torch.tensor([[0, 12]]) for name in ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")},
        "tree_max_seqlens": torch.tensor([[12, 12]]),
    }


def test_the_loss_of_async_grpo_is_trl_s():
    from trl.experimental.async_grpo import AsyncGRPOTrainer

    found = []
    for accelerated in (False, True):
        net = model()
        UTILS.add_fused_lm_head(net, temperature=0.7, outputs=("log_probs", "entropy"))
        trainer = AsyncGRPOTrainer.__new__(AsyncGRPOTrainer)
        trainer.accelerator = Accelerator(cpu=True)
        trainer.epsilon_low, trainer.epsilon_high, trainer.aux_loss_enabled = 0.2, 0.2, False
        trainer.current_gradient_accumulation_steps = 1
        trainer._metrics = {"train": defaultdict(list)}
        for name in ("forward_tokens", "trained_tokens", "seq_len_weighted", "samples", "forward_s"):
            setattr(trainer, f"_step_{name}", 0.0)
        with integration.accelerate(net) if accelerated else nullcontext():
            loss = trainer.compute_loss(net, async_batch())
            loss.backward()
        numbers = {name: values[0] for name, values in trainer._metrics["train"].items()}
        found.append((loss.item(), numbers, [parameter.grad for parameter in net.parameters()]))
    (loss, numbers, grads), (got, got_numbers, got_grads) = found
    assert got == pytest.approx(loss, rel=2e-5)
    assert got_numbers == pytest.approx(numbers, rel=2e-5, abs=2e-6)
    assert {"ratio", "kl", "entropy", "clip_ratio/region_mean"} <= numbers.keys()
    assert max(grad.abs().max() for grad in grads) > 1e-3
    for one, other in zip(got_grads, grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)  # float32 through two layers, other orders of sums
