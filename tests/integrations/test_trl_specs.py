"""`preference_spec` on real TRL trainers: TRL's own loss of a batch, and fastrl's on the same log-probabilities."""

from __future__ import annotations

import warnings
from itertools import product

import pytest
import torch
from datasets import Dataset
from integrations.hosts import model, texts, tokenizer
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

trl = pytest.importorskip("trl")

from fastrl import preference_loss, presets  # noqa: E402
from fastrl.integrations.trl import preference_spec  # noqa: E402
from fastrl.integrations.trl_specs import DIVERGENT, LOSS_TYPES  # noqa: E402
from fastrl.losses.unpaired import mismatched_kl, unpaired_preference_loss  # noqa: E402
from fastrl.preference_spec import (  # noqa: E402
    JensenShannon,
    Power,
    PreferenceLoss,
    PreferenceMix,
    Sft,
    UnpairedPreferenceLoss,
)


def ids(answers):
    return [tokenizer()(text).input_ids for text in answers]


class Tokenized(trl.DPOTrainer):
    """Given tokens, because TRL's preparation of eight rows takes longer than everything else here."""

    def _prepare_dataset(self, dataset, *_):
        return dataset


PAIRS = [
    {"prompt_ids": p, "chosen_ids": [*a, 2], "rejected_ids": [*b, 2]}
    for p, a, b in zip(ids(texts()), ids(texts(seed=1)), ids(texts(seed=2, length=4)), strict=True)
]
ANSWERS = [
    {"prompt": p, "completion": f" {a}", "label": n % 3 != 0}
    for n, (p, a) in enumerate(zip(texts(), texts(seed=1), strict=True))
]


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def make(kind, folder, policy=None, host=None, **options):
    """A trainer whose reference model is another one than its policy."""
    common = {
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    args = getattr(trl, f"{kind}Config")(output_dir=str(folder), **common, **options)
    host = host or (Tokenized if kind == "DPO" else trl.KTOTrainer)
    rows = Dataset.from_list(PAIRS if kind == "DPO" else ANSWERS)
    return host(policy or model(), ref_model=model(seed=1), args=args, train_dataset=rows, processing_class=tokenizer())


class Recorded:
    """A model whose log-probabilities are a leaf, so that a loss has its gradient there."""

    def __init__(self, made):
        self.made, self.calls = made, []

    def __call__(self, **batch):
        out = self.made(**batch)
        out.log_probs = out.log_probs.detach().requires_grad_(torch.is_grad_enabled())
        self.calls.append(out)
        return out


def trl_loss(trainer):
    """(the batch, TRL's loss, its gradient, the policy's outputs, the reference's) of a batch of all rows."""
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])
    policy = Recorded(trainer.model)
    trainer.ref_model = Recorded(trainer.ref_model)
    loss = trainer._compute_loss(policy, dict(batch), False)
    (out,) = [call for call in policy.calls if call.log_probs.requires_grad]
    (grad,) = torch.autograd.grad(loss, out.log_probs)
    grad = grad * batch["completion_mask"][:, 1:]  # TRL adds up the zeros that its head gives for the other tokens
    assert grad.any()
    return batch, loss, grad, policy.calls, trainer.ref_model.calls


def sides_of(batch, out, ref):
    """What `preference_loss` reads beside the log-probabilities; TRL's batches are chosen over rejected."""
    names = {"chosen_mask": batch["completion_mask"][:, 1:], "ref_chosen_logps": ref.log_probs}
    if out.log_sum_sq_probs is not None:
        names["chosen_log_sum_sq_probs"] = out.log_sum_sq_probs
    sides = {}
    for name, both in names.items():
        sides[name], sides[name.replace("chosen", "rejected")] = both.chunk(2)
    return sides


def assert_preference_loss_is_trl_s(trainer):
    batch, loss, grad, (out,), (ref,) = trl_loss(trainer)
    ours = preference_loss(*out.log_probs.chunk(2), preference_spec(trainer), **sides_of(batch, out, ref)).loss
    torch.testing.assert_close(ours, loss, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(ours, out.log_probs)[0], grad, rtol=1e-4, atol=1e-6)


# DPO: every loss type by itself, and then everything that it may be combined with.

DIVERGENCES = {
    "reverse_kl": {},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence"},
    "alpha_divergence, 1": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
    "alpha_divergence, 1.3": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.3},
}
BETAS = {"sigmoid_norm": 2.0, "discopop": 0.02, "hinge": 0.02}  # that leave the hinge and e^-D of these models in sight
EXTRAS = {
    "plain": {},
    "ld_alpha": {"ld_alpha": 0.3},
    "ld_alpha 0": {"ld_alpha": 0.0},
    "use_weighting": {"use_weighting": True},
    "both": {"ld_alpha": 0.5, "use_weighting": True},
    "label_smoothing": {"label_smoothing": 0.2},
}


def grid():
    for kind, divergence, extra in product(LOSS_TYPES, DIVERGENCES, EXTRAS):
        weighted = extra in ("use_weighting", "both")
        if (divergence != "reverse_kl" and kind not in DIVERGENT) or (weighted and kind.startswith("aot")):
            continue  # TRL refuses these
        if divergence != "reverse_kl" and extra in ("ld_alpha 0", "both"):
            continue  # the same code again
        if weighted and kind == "hinge":
            continue  # TRL's loss has no gradient there: see the test below
        options = {"label_smoothing": 1e-2} if kind == "exo_pair" else {}
        beta = {"beta": BETAS.get(kind, 0.1)}
        yield (
            f"{kind}, {divergence}, {extra}",
            {"loss_type": [kind], **options, **beta, **DIVERGENCES[divergence], **EXTRAS[extra]},
        )


GRID = dict(grid())


@pytest.mark.parametrize("kind", LOSS_TYPES)
def test_a_dpo_loss_is_trl_s_under_every_divergence_weighting_and_smoothing(tmp_path, kind):
    cases = [name for name in GRID if name.startswith(f"{kind},")]
    assert len(cases) >= (4 if kind.startswith("aot") else 6)
    for name in cases:
        try:
            assert_preference_loss_is_trl_s(make("DPO", tmp_path, **GRID[name]))
        except AssertionError as error:
            raise AssertionError(name) from error


def test_hinge_with_wpo_has_a_loss_in_trl_but_no_gradient_and_is_computed_here(tmp_path):
    trainer = make("DPO", tmp_path, loss_type="hinge", use_weighting=True, beta=0.02)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    policy, trainer.ref_model = Recorded(trainer.model), Recorded(trainer.ref_model)
    expected = trainer._compute_loss(policy, dict(batch), False)
    (out,), (ref,) = policy.calls, trainer.ref_model.calls
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        expected.backward()
    ours = preference_loss(*out.log_probs.chunk(2), preference_spec(trainer), **sides_of(batch, out, ref)).loss
    torch.testing.assert_close(ours, expected, rtol=2e-5, atol=1e-6)
    assert torch.autograd.grad(ours, out.log_probs)[0].any()


MIXES = {
    "RPO": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]},
    "MPO": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "equal weights": {"loss_type": ["sft", "ipo", "apo_zero"]},
    "one, halved": {"loss_type": ["hinge"], "loss_weights": [0.5], "beta": 0.02},
    "smoothed beside not": {"loss_type": ["sigmoid", "robust", "exo_pair"], "label_smoothing": 0.1},
    "sorted beside pairs": {"loss_type": ["aot", "aot_unpaired", "sigmoid"], "ld_alpha": 0.5},
    "weighted": {"loss_type": ["sigmoid", "nca_pair"], "use_weighting": True},
    "forward KL, with sft": {"loss_type": ["sigmoid", "sft", "ipo"], "f_divergence_type": "forward_kl"},
}


@pytest.mark.parametrize("name", MIXES)
def test_a_mix_of_dpo_losses_is_trl_s(tmp_path, name):
    trainer = make("DPO", tmp_path, **MIXES[name])
    assert isinstance(preference_spec(trainer), PreferenceMix)
    assert_preference_loss_is_trl_s(trainer)


@pytest.mark.parametrize(
    ("options", "spec"),
    [
        ({}, presets.DPO),
        ({"loss_type": "ipo"}, presets.IPO),
        ({"loss_type": "sppo_hard", "beta": 1e-3}, PreferenceLoss("sppo_hard", beta=1e-3)),
        ({"loss_type": "sigmoid", "label_smoothing": 0.3}, presets.DPO),  # which TRL does not read there
        ({"loss_type": "robust", "label_smoothing": 0.3}, PreferenceLoss(label_smoothing=0.3, debias=True)),
        ({"loss_type": "aot", "label_smoothing": 0.3}, PreferenceLoss(label_smoothing=0.3, match="aot")),
        ({"loss_type": "discopop", "discopop_tau": 0.1}, PreferenceLoss("discopop", tau=0.1)),
        ({"f_divergence_type": "js_divergence"}, PreferenceLoss(transform=JensenShannon())),
        ({"f_divergence_type": "alpha_divergence"}, PreferenceLoss(transform=Power(-0.5))),
        (
            {"loss_type": "ipo", "f_divergence_type": "forward_kl"},
            PreferenceLoss("ipo", length="reward_mean", transform=Power(-1.0)),
        ),
        ({"ld_alpha": 0.5, "use_weighting": True}, PreferenceLoss(ld_alpha=0.5, weighting="wpo")),
        (
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
            PreferenceMix(((1.0, presets.DPO), (0.5, Sft("token_mean")))),
        ),
    ],
    ids=str,
)
def test_preference_spec_reads_the_loss_off_the_configuration(tmp_path, options, spec):
    assert preference_spec(make("DPO", tmp_path, **options)) == spec


# KTO.


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("options", [{}, {"beta": 0.4, "desirable_weight": 1.5, "undesirable_weight": 0.5}], ids=str)
def test_a_kto_loss_is_trl_s(tmp_path, loss, options):
    trainer = make("KTO", tmp_path, loss_type=loss, per_device_train_batch_size=8, **options)
    batch, expected, grad, policy, reference = trl_loss(trainer)
    spec = preference_spec(trainer)
    assert spec == UnpairedPreferenceLoss(baseline="kl" if loss == "kto" else "zero", **{"beta": 0.1, **options})
    kl = None
    if loss == "kto":
        (kl_out, out), (kl_ref, ref) = policy, reference
        total, count = mismatched_kl(kl_out.log_probs, kl_ref.log_probs, mask=batch["KL_completion_mask"][:, 1:])
        kl = total / count
    else:
        (out,), (ref,) = policy, reference
    mask = batch["completion_mask"][:, 1:]
    labels = torch.as_tensor(batch["label"], dtype=torch.bool)
    ours = unpaired_preference_loss(out.log_probs, labels, spec, mask=mask, ref_logps=ref.log_probs, kl=kl).loss
    torch.testing.assert_close(ours, expected, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(ours, out.log_probs)[0], grad, rtol=1e-4, atol=1e-6)


# What has no counterpart.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "sft"}, "loss_type: expected a loss of pairs beside sft"),
        (
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, -0.1]},
            "loss_weights: expected weights of at least 0",
        ),
        ({"loss_type": ["sigmoid", "sft"], "use_weighting": True}, "use_weighting: .* got True with sft"),
        ({"loss_type": "robust", "label_smoothing": 0.6}, "label_smoothing: expected a number from 0 to below 0.5"),
        ({"loss_type": "aot", "label_smoothing": 0.6}, "label_smoothing: expected a number from 0 to below 0.5"),
        ({"ld_alpha": 1.5}, "ld_alpha: expected a number from 0 to 1"),
        ({"beta": 0.0}, "beta: expected a finite number above 0"),
        ({"loss_type": "discopop", "discopop_tau": 0.0}, "tau: expected a finite number above 0"),
    ],
    ids=str,
)
def test_an_option_of_dpo_without_a_counterpart_is_refused_by_name(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        preference_spec(make("DPO", tmp_path, **options))


@pytest.mark.parametrize(
    ("options", "changed", "message"),
    [
        ({"loss_type": "aot"}, {"use_weighting": True}, "use_weighting: .* got True with aot"),
        ({"loss_type": "exo_pair", "label_smoothing": 0.1}, {"label_smoothing": 0.0}, "label_smoothing: .* above 0"),
        ({"loss_type": "apo_zero"}, {"f_divergence_type": "forward_kl"}, "f_divergence_type: expected reverse_kl"),
        ({}, {"f_divergence_type": "other"}, "f_divergence_type: expected one of reverse_kl"),
        ({}, {"loss_types": ["other"]}, r"loss_type: expected of sigmoid, .* got \['other'\]"),
        ({}, {"loss_weights": [1.0, 2.0]}, "loss_weights: expected 1 weights"),
    ],
    ids=str,
)  # fmt: skip
def test_what_trl_s_constructor_refuses_is_refused_when_it_is_set_later(tmp_path, options, changed, message):
    trainer = make("DPO", tmp_path, **options)
    vars(trainer).update(changed)
    with pytest.raises(ValueError, match=message):
        preference_spec(trainer)


def test_an_option_of_kto_without_a_counterpart_is_refused_by_name(tmp_path):
    trainer = make("KTO", tmp_path, desirable_weight=-1.0, loss_type="apo_zero_unpaired")
    with pytest.raises(ValueError, match="desirable_weight: expected a finite number of at least 0"):
        preference_spec(trainer)
    trainer.loss_type = "other"
    with pytest.raises(ValueError, match="loss_type: expected one of kto, apo_zero_unpaired, got other"):
        preference_spec(trainer)


def test_other_trainers_losses_of_ones_own_and_router_losses_are_refused_by_name(tmp_path):
    class Own(Tokenized):
        def _compute_loss(self, *args):
            return super()._compute_loss(*args) * 2

    with pytest.raises(ValueError, match="trainer: expected a DPOTrainer or a KTOTrainer, got SFTTrainer"):
        preference_spec(trl.SFTTrainer.__new__(trl.SFTTrainer))
    with pytest.raises(ValueError, match="trainer: expected a DPOTrainer with TRL's loss, got Own with its own"):
        preference_spec(make("DPO", tmp_path, host=Own))
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    mixture = model(kind=Qwen3MoeForCausalLM, config=Qwen3MoeConfig, output_router_logits=True, **experts)
    with pytest.raises(ValueError, match="router_aux_loss_coef: expected 0"):
        preference_spec(make("DPO", tmp_path, policy=mixture))
