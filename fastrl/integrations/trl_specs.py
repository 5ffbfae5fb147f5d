"""The losses of TRL's trainers as fastrl's: read off a configuration, or refused by the option's name."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastrl import check
from fastrl.preference_spec import (
    JensenShannon,
    Power,
    PreferenceLoss,
    PreferenceMix,
    Sft,
    Transform,
    UnpairedPreferenceLoss,
)
from fastrl.spec import KL, Cispo, Clip, PolicyLoss, Sapo, Vespo

if TYPE_CHECKING:
    import torch

    from fastrl.spec import Surrogate

POLICY, PREFERENCE = "fastrl.integrations.trl.policy_spec", "fastrl.integrations.trl.preference_spec"


def policy_spec(trainer: Any) -> PolicyLoss:
    """The loss of a `GRPOTrainer` as a `PolicyLoss`, read off its configuration.

    Raises:
        ValueError: the trainer is no GRPOTrainer, or one of its options has no counterpart; the message names it.
    """
    grpo = importlib.import_module("trl").GRPOTrainer
    do = "RLOO's ratio is of a sum over whole completions, and the other trainers have no policy loss."
    grpo_trainer = isinstance(trainer, grpo)
    check.require(grpo_trainer, POLICY, "trainer", "a GRPOTrainer, for its loss", type(trainer).__name__, do)
    args, kind = trainer.args, trainer.loss_type
    corrected = trainer.use_vllm and trainer.vllm_importance_sampling_correction
    for option, got, covered, expected in (
        ("loss_type", kind, kind in AGGREGATE, f"one of {', '.join(AGGREGATE)}"),
        ("top_entropy_quantile", args.top_entropy_quantile, trainer.top_entropy_quantile >= 1.0, "1.0"),
        ("off_policy_mask_threshold", args.off_policy_mask_threshold, args.off_policy_mask_threshold is None, "None"),
        ("entropy_coef", args.entropy_coef, not trainer._entropy_bonus_enabled, "no entropy bonus"),
        ("vllm_importance_sampling_correction", corrected, not (corrected and kind == "vespo"), "False with vespo"),
        ("delta", args.delta, args.delta is None or args.delta > 1, "above 1"),
        (
            "trainer",
            "one with its own _compute_loss",
            type(trainer)._compute_loss is grpo._compute_loss,
            "a GRPOTrainer with TRL's loss",
        ),
    ):
        do = "Leave it to TRL: accelerate without loss=True."
        check.require(covered, POLICY, option, f"{expected}, for fastrl's loss", got, do)
    level = "sequence" if kind == "vespo" else trainer.importance_sampling_level
    kl = KL("k3_ratio" if args.use_bias_correction_kl else "k3", trainer.beta) if trainer.beta else None
    return PolicyLoss(ratio=level, surrogate=_surrogate(trainer), kl=kl, aggregate=AGGREGATE[kind])


# TRL's loss types by how they average over tokens; `normalizer` gives the number each divides by.
AGGREGATE = {
    "grpo": "seq_mean_token_mean",
    "sapo": "seq_mean_token_mean",
    "bnpo": "token_mean",
    "dapo": "token_mean",
    "cispo": "token_mean",
    "vespo": "token_mean",
    "dr_grpo": "token_sum",
    "luspo": "seq_mean_token_sum",
}


def _surrogate(trainer: Any) -> Surrogate:
    args, kind = trainer.args, trainer.loss_type
    low, high, delta = trainer.epsilon_low, trainer.epsilon_high, args.delta
    if kind == "cispo":
        return Cispo(ratio_max=high)
    if kind == "sapo":
        return Sapo(args.sapo_temperature_pos, args.sapo_temperature_neg)
    if kind == "vespo":
        return Vespo(args.vespo_k_pos, args.vespo_lambda_pos, args.vespo_k_neg, args.vespo_lambda_neg)
    if delta is None:
        return Clip(low, high)
    return Clip(low, high, dual=delta) if delta >= 1 + high else Clip(low, delta - 1, dual=1 + high)


def normalizer(trainer: Any, inputs: dict[str, Any], mask: torch.Tensor) -> torch.Tensor | float:
    """What TRL's loss of a micro-batch is divided by, as `linear_policy_loss` takes it for `policy_spec`'s aggregate.

    Args:
        mask: (B, T), the tokens of the loss.
    """
    training, kind = trainer.model.training, trainer.loss_type
    accumulated = trainer.current_gradient_accumulation_steps if training else 1.0
    if kind in ("dapo", "cispo", "vespo"):
        items = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
        return items * accumulated / trainer.args.steps_per_generation if training else items
    if kind == "bnpo":
        return mask.sum().clamp(min=1.0) * accumulated
    if kind == "dr_grpo":
        return float(mask.shape[0] * trainer.max_completion_length * accumulated)
    return float(mask.shape[0] * accumulated)


def preference_spec(trainer: Any) -> PreferenceLoss | PreferenceMix | UnpairedPreferenceLoss:
    """The loss of a `DPOTrainer` or a `KTOTrainer`, read off its configuration.

    On one micro-batch of one process, `preference_loss` with the first two and `unpaired_preference_loss` with the
    third, on TRL's log-probabilities, are TRL's loss. TRL's z of KTO is the mean of `mismatched_kl` over all processes.

    Raises:
        ValueError: the trainer is neither, or one of its options has no counterpart; the message names it.
    """
    trl = importlib.import_module("trl")
    host = next((kind for kind in (trl.DPOTrainer, trl.KTOTrainer) if isinstance(trainer, kind)), None)
    _require(host is not None, "trainer", "a DPOTrainer or a KTOTrainer", type(trainer).__name__)
    own = type(trainer)._compute_loss is not host._compute_loss
    _require(not own, "trainer", f"a {host.__name__} with TRL's loss", f"{type(trainer).__name__} with its own")
    _require(not trainer.aux_loss_enabled, "router_aux_loss_coef", "0: no router loss", "a mixture of experts' own")
    return _unpaired(trainer) if host is trl.KTOTrainer else _pairs(trainer)


# TRL's loss types, as fields of a PreferenceLoss. `mean` divides the reward, behind TRL's f-divergence.
LOSS_TYPES: dict[str, dict[str, Any]] = {
    "sigmoid": {"link": "sigmoid"},
    "sigmoid_norm": {"link": "sigmoid", "length": "mean"},
    "hinge": {"link": "hinge"},
    "ipo": {"link": "ipo", "length": "mean"},
    "exo_pair": {"link": "exo_pair"},
    "robust": {"link": "sigmoid", "debias": True},
    "discopop": {"link": "discopop"},
    "aot": {"link": "sigmoid", "match": "aot"},
    "aot_unpaired": {"link": "sigmoid", "match": "aot_unpaired"},
    "nca_pair": {"link": "nca_pair"},
    "bco_pair": {"link": "bco_pair"},
    "sppo_hard": {"link": "sppo_hard"},
    "apo_zero": {"link": "apo_zero"},
    "apo_down": {"link": "apo_down"},
}
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")  # the others do not read TRL's label_smoothing
DIVERGENT = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
SORTED = ("aot", "aot_unpaired")


def _pairs(trainer: Any) -> PreferenceLoss | PreferenceMix:
    kinds, weights, divergence = trainer.loss_types, trainer.loss_weights, trainer.f_divergence_type
    known = (*LOSS_TYPES, "sft")
    weighted = [kind for kind in kinds if kind == "sft" or kind in SORTED] if trainer.use_weighting else []
    divergent = divergence == "reverse_kl" or set(kinds) <= set(DIVERGENT)
    for option, got, covered, expected in (
        ("loss_type", kinds, set(kinds) <= set(known), f"of {', '.join(known)}"),
        ("loss_type", kinds, set(kinds) != {"sft"}, "a loss of pairs beside sft"),
        ("loss_weights", weights, min(weights) >= 0, "weights of at least 0"),
        ("loss_weights", weights, len(weights) == len(kinds), f"{len(kinds)} weights"),
        ("use_weighting", f"True with {', '.join(weighted)}", not weighted, "False, with losses that have no pair"),
        ("f_divergence_type", f"{divergence} with {kinds}", divergent, "reverse_kl, with losses of single rewards"),
        (
            "f_divergence_type",
            divergence,
            divergence in ("reverse_kl", "alpha_divergence", *TRANSFORMS),
            f"one of reverse_kl, alpha_divergence, {', '.join(TRANSFORMS)}",
        ),
    ):
        _require(covered, option, expected, got)
    terms = tuple((float(weight), _pair(trainer, kind)) for weight, kind in zip(weights, kinds, strict=True))
    alone = terms[0][1] if len(terms) == 1 and terms[0][0] == 1.0 else None
    return alone if isinstance(alone, PreferenceLoss) else PreferenceMix(terms)


def _pair(trainer: Any, kind: str) -> PreferenceLoss | Sft:
    if kind == "sft":
        return Sft("token_mean")
    fields, transform = dict(LOSS_TYPES[kind]), _transform(trainer)
    if fields.get("length") == "mean" and transform != Power(0.0):
        fields["length"] = "reward_mean"
    if kind in SMOOTHED:
        fields["label_smoothing"] = trainer.label_smoothing
    if kind == "discopop":
        fields["tau"] = trainer.args.discopop_tau
    return PreferenceLoss(
        beta=trainer.beta,
        transform=transform,
        ld_alpha=1.0 if trainer.ld_alpha is None else trainer.ld_alpha,
        weighting="wpo" if trainer.use_weighting else "none",
        **fields,
    )


TRANSFORMS: dict[str, Transform] = {"forward_kl": Power(-1.0), "js_divergence": JensenShannon()}


def _transform(trainer: Any) -> Transform:
    if trainer.f_divergence_type != "alpha_divergence":
        return TRANSFORMS.get(trainer.f_divergence_type, Power(0.0))
    exponent = trainer.f_alpha_divergence_coef - 1.0
    return Power(0.0 if abs(exponent) < 1e-6 else exponent)


def _unpaired(trainer: Any) -> UnpairedPreferenceLoss:
    baselines = {"kto": "kl", "apo_zero_unpaired": "zero"}
    kind = trainer.loss_type
    _require(kind in baselines, "loss_type", f"one of {', '.join(baselines)}", kind)
    return UnpairedPreferenceLoss(
        beta=trainer.beta,
        baseline=baselines[kind],
        desirable_weight=trainer.desirable_weight,
        undesirable_weight=trainer.undesirable_weight,
    )


def _require(condition: bool, argument: str, expected: str, got: object) -> None:
    check.require(condition, PREFERENCE, argument, expected, got, "Leave this loss to TRL.")
