"""Value, gradient and metrics against TRL's DPO, KTO, CPO and ORPO trainers, on the same tensors.

TRL computes a loss inside a trainer's method, so the methods are called here with an object that holds what they read:
a model that returns the log-probabilities to compare on, and an accelerator that gathers from one process.

Left out, because the definitions differ: `use_weighting` together with `sft`, which TRL then weighs too, and the
rewards that TRL reports for losses that normalise by length (it reports sums over tokens).
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import pad
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

from fastrl.losses.metrics import finish
from fastrl.losses.preference import preference_loss
from fastrl.losses.unpaired import mismatched_kl, unpaired_preference_loss
from fastrl.preference_spec import (
    JensenShannon,
    LogOdds,
    Power,
    PreferenceLoss,
    PreferenceMix,
    Sft,
    UnpairedPreferenceLoss,
)

PROMPT = 3
CHOSEN, REJECTED = (4, 1, 6, 2), (2, 5, 6, 1)  # tokens of each answer


def answers(lengths, seed, dtype):
    """Log-probabilities, reference ones, log sum p^2 and mask, (P, T); zeros behind each answer, as TRL's head."""
    g = torch.Generator().manual_seed(seed)
    size = (len(lengths), max(lengths))
    mask = torch.arange(size[1]) < torch.tensor(lengths)[:, None]
    logps = -3 * torch.rand(size, generator=g, dtype=torch.float64)
    ref = logps + 2 * torch.randn(size, generator=g, dtype=torch.float64)
    squares = -torch.rand(size, generator=g, dtype=torch.float64)
    logps, ref, squares = (torch.where(mask, x, 0.0).to(dtype) for x in (logps, ref, squares))
    return logps.requires_grad_(), ref, squares, mask


def pairs(dtype=torch.float64):
    return answers(CHOSEN, 1, dtype), answers(REJECTED, 2, dtype)


def one_process(**fields):
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)
    return SimpleNamespace(
        accelerator=accelerator,
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **fields,
    )


class Model(torch.nn.Module):
    """Returns what TRL's fused head would, given the completions' log-probabilities."""

    is_gradient_checkpointing = False

    def __init__(self, logps, squares=None):
        super().__init__()
        self.logps, self.squares = logps, squares

    def forward(self, **_):
        like = torch.zeros_like(self.logps)
        return SimpleNamespace(
            log_probs=self.logps, log_sum_sq_probs=self.squares, entropy=like, mean_logits=like, is_top1=like.bool()
        )


def side_by_side(*sides):
    """(2 P, PROMPT - 1 + T): each side behind its prompt, chosen over rejected."""
    width = max(x.shape[1] for x in sides)
    return torch.cat([pad(x, (PROMPT - 1, width - x.shape[1])) for x in sides])


def trl_inputs(*masks):
    completion = pad(side_by_side(*(mask.long() for mask in masks)), (1, 0))
    return {"input_ids": torch.ones_like(completion), "attention_mask": completion, "completion_mask": completion}


def trl_dpo(chosen, rejected, loss_types, weights, fields):
    (lp_w, ref_w, sq_w, m_w), (lp_l, ref_l, sq_l, m_l) = chosen, rejected
    model = Model(side_by_side(lp_w * m_w, lp_l * m_l), side_by_side(sq_w, sq_l))
    defaults = dict(
        beta=0.1,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        f_alpha_divergence_coef=0.5,
        label_smoothing=0.0,
        use_weighting=False,
        args=SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None),
    )
    trainer = one_process(
        model=model, ref_model=Model(side_by_side(ref_w, ref_l)), loss_types=loss_types, loss_weights=weights,
        **(defaults | fields),
    )  # fmt: skip
    loss = DPOTrainer._compute_loss(trainer, model, trl_inputs(m_w, m_l), return_outputs=False)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


def ours(chosen, rejected, spec):
    (lp_w, ref_w, sq_w, m_w), (lp_l, ref_l, sq_l, m_l) = chosen, rejected
    return preference_loss(
        lp_w, lp_l, spec, chosen_mask=m_w, rejected_mask=m_l, ref_chosen_logps=ref_w, ref_rejected_logps=ref_l,
        chosen_log_sum_sq_probs=sq_w, rejected_log_sum_sq_probs=sq_l,
    )  # fmt: skip


def assert_same_loss(mine, theirs, leaves, tolerance=1e-12):
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance, check_dtype=False)
    for a, b in zip(torch.autograd.grad(mine, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        assert a.abs().sum() > 0


DPO = PreferenceLoss("sigmoid")
SFT = Sft("token_mean")
CASES = {
    "sigmoid": (["sigmoid"], {}, DPO),
    "hinge": (["hinge"], {"beta": 0.4}, PreferenceLoss("hinge", beta=0.4)),
    "ipo": (["ipo"], {}, PreferenceLoss("ipo", length="mean")),
    "exo_pair": (["exo_pair"], {"label_smoothing": 1e-3}, PreferenceLoss("exo_pair", label_smoothing=1e-3)),
    "nca_pair": (["nca_pair"], {}, PreferenceLoss("nca_pair")),
    "robust": (["robust"], {"label_smoothing": 0.2}, PreferenceLoss(label_smoothing=0.2, debias=True)),
    "bco_pair": (["bco_pair"], {}, PreferenceLoss("bco_pair")),
    "sppo_hard": (["sppo_hard"], {}, PreferenceLoss("sppo_hard")),
    "aot": (["aot"], {"label_smoothing": 0.1}, PreferenceLoss(match="aot", label_smoothing=0.1)),
    "aot_unpaired": (["aot_unpaired"], {}, PreferenceLoss(match="aot_unpaired")),
    "apo_zero": (["apo_zero"], {}, PreferenceLoss("apo_zero")),
    "apo_down": (["apo_down"], {}, PreferenceLoss("apo_down")),
    "discopop": (["discopop"], {}, PreferenceLoss("discopop")),
    "sigmoid_norm": (["sigmoid_norm"], {"beta": 2.0}, PreferenceLoss(beta=2.0, length="mean")),
    "ld_dpo": (["sigmoid"], {"ld_alpha": 0.3}, PreferenceLoss(ld_alpha=0.3)),
    "ld_dpo_ipo": (["ipo"], {"ld_alpha": 0.0}, PreferenceLoss("ipo", length="mean", ld_alpha=0.0)),
    "wpo": (["sigmoid"], {"use_weighting": True}, PreferenceLoss(weighting="wpo")),
    "wpo_nca": (["nca_pair"], {"use_weighting": True}, PreferenceLoss("nca_pair", weighting="wpo")),
    "rpo": (["sigmoid", "sft"], {"weights": [1.0, 0.7]}, PreferenceMix(((1.0, DPO), (0.7, SFT)))),
    "mpo": (
        ["sigmoid", "bco_pair", "sft"],
        {"weights": [0.8, 0.2, 1.0]},
        PreferenceMix(((0.8, DPO), (0.2, PreferenceLoss("bco_pair")), (1.0, SFT))),
    ),
}
DIVERGENCES = {
    "forward_kl": ({}, Power(-1.0)),
    "js_divergence": ({}, JensenShannon()),
    "alpha_divergence": ({"f_alpha_divergence_coef": 0.3}, Power(-0.7)),
    "alpha_divergence_of_1": ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0}, Power(0.0)),
}
for _link, _length in (("sigmoid", "sum"), ("hinge", "sum"), ("ipo", "reward_mean"), ("discopop", "sum")):
    for _name, (_fields, _transform) in DIVERGENCES.items():
        _spec = PreferenceLoss(_link, length=_length, transform=_transform)
        CASES[f"{_link}-{_name}"] = ([_link], {"f_divergence_type": _name, **_fields}, _spec)
NARROW = {"exo_pair"} | {name for name in CASES if "alpha_divergence" in name}  # TRL computes these in float32


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_equal_trl_dpo(name):
    loss_types, fields, spec = CASES[name]
    fields = dict(fields)
    weights = fields.pop("weights", [1.0])
    narrow = name in NARROW
    chosen, rejected = pairs(torch.float32 if narrow else torch.float64)
    theirs, metrics = trl_dpo(chosen, rejected, loss_types, weights, fields)
    out = ours(chosen, rejected, spec)
    assert_same_loss(out.loss, theirs, [chosen[0], rejected[0]], 3e-6 if narrow else 1e-12)
    first = spec.terms[0][1] if isinstance(spec, PreferenceMix) else spec
    if first.length == "sum" and first.transform == Power(0.0):
        mine = finish(out.metrics)
        names = {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"}
        names |= {"logps/chosen", "logps/rejected"} if first.ld_alpha == 1.0 else set()
        assert {key: mine[key] for key in names} == pytest.approx({key: metrics[key] for key in names}, rel=1e-6)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_value_gradient_and_metrics_equal_trl_kto(loss_type):
    (logps, ref, _, mask), (kl_logps, kl_ref, _, kl_mask) = pairs()
    kl_logps = kl_logps.detach() + 2.0 * kl_mask  # a mean above 0, which would else be clamped away
    labels = torch.tensor([True, False, True, True])
    widened = [side_by_side(x) for x in (logps * mask, ref, kl_logps, kl_ref)]
    model, ref_model = Model(widened[0]), Model(widened[1])
    kl_of = {id(model): widened[2], id(ref_model): widened[3]}
    kto = loss_type == "kto"
    trainer = one_process(
        model=model,
        ref_model=ref_model,
        loss_type=loss_type,
        calculate_KL=kto,
        beta=0.3,
        desirable_weight=1.5,
        undesirable_weight=0.5,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        _compute_kl_logps=lambda which, _: kl_of[id(which)].sum(-1) if kto else None,
    )
    theirs = KTOTrainer._compute_loss(trainer, model, trl_inputs(mask) | {"label": labels}, return_outputs=False)
    total, count = mismatched_kl(kl_logps, kl_ref, mask=kl_mask)
    assert not kto or total > 0
    spec = UnpairedPreferenceLoss(0.3, "kl" if kto else "zero", desirable_weight=1.5, undesirable_weight=0.5)
    out = unpaired_preference_loss(logps, labels, spec, mask=mask, ref_logps=ref, kl=total / count if kto else None)
    assert_same_loss(out.loss, theirs, [logps])
    names = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "kl")
    metrics = {name: trainer._metrics["train"][name][0] for name in names}
    assert finish(out.metrics) == pytest.approx(metrics)


def means_and_sums(side):
    logps, _, _, mask = side
    total = (logps * mask).sum(1)
    return total / mask.sum(1), total


CPO_CASES = {
    "sigmoid": ({"label_smoothing": 0.1}, PreferenceLoss(reference=False, label_smoothing=0.1)),
    "hinge": ({}, PreferenceLoss("hinge", reference=False)),
    "ipo": ({}, PreferenceLoss("ipo", reference=False, length="mean")),
    "simpo": (
        {"beta": 2.0, "label_smoothing": 0.2},
        PreferenceLoss(beta=2.0, reference=False, length="mean", margin=0.5, label_smoothing=0.2),
    ),
    "alphapo": (
        {"beta": 2.0, "alpha": 0.3},
        PreferenceLoss(beta=2.0, reference=False, length="mean", margin=0.5, transform=Power(-0.3)),
    ),
}


@pytest.mark.parametrize("name", CPO_CASES)
@pytest.mark.parametrize("cpo_alpha", [0.0, 0.7])
def test_value_gradient_and_rewards_equal_trl_cpo(name, cpo_alpha):
    fields, spec = CPO_CASES[name]
    chosen, rejected = pairs()
    average = name in ("ipo", "simpo", "alphapo")
    nll = -(chosen[0] * chosen[3]).sum() / chosen[3].sum()
    sides = [means_and_sums(side)[0 if average else 1] for side in (chosen, rejected)]
    defaults = {"beta": 0.1, "label_smoothing": 0.0, "alpha": 0.0, "simpo_gamma": 0.5}
    trainer = one_process(loss_type="simpo" if name == "alphapo" else name, cpo_alpha=cpo_alpha, **(defaults | fields))
    trainer.concatenated_forward = lambda *_: (*sides, torch.zeros(1), torch.zeros(1), nll)
    trainer.cpo_loss = lambda *logps: CPOTrainer.cpo_loss(trainer, *logps)
    theirs, metrics = CPOTrainer.get_batch_loss_metrics(trainer, None, {})
    out = ours(chosen, rejected, PreferenceMix(((1.0, spec), (cpo_alpha, SFT))))
    assert_same_loss(out.loss, theirs, [chosen[0], rejected[0]])
    mine = finish(out.metrics)
    for key in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "nll_loss"):
        assert mine[key] == pytest.approx(metrics[key]), key


def test_value_and_gradient_equal_trl_orpo():
    chosen, rejected = pairs()
    nll = -(chosen[0] * chosen[3]).sum() / chosen[3].sum()
    trainer = one_process(beta=0.1)
    sides = [means_and_sums(side)[0] for side in (chosen, rejected)]
    trainer.concatenated_forward = lambda *_: (*sides, torch.zeros(1), torch.zeros(1), nll)
    trainer.odds_ratio_loss = lambda *logps: ORPOTrainer.odds_ratio_loss(trainer, *logps)
    theirs, metrics = ORPOTrainer.get_batch_loss_metrics(trainer, None, {})
    odds = PreferenceLoss(beta=1.0, reference=False, length="mean", transform=LogOdds())
    out = ours(chosen, rejected, PreferenceMix(((0.1, odds), (1.0, SFT))))
    assert_same_loss(out.loss, theirs, [chosen[0], rejected[0]], 3e-6)  # TRL casts to float32
    assert finish(out.metrics)["rewards/margins"] == pytest.approx(metrics["log_odds_chosen"], rel=1e-5)
