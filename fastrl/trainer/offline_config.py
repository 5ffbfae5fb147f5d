"""What a run on answers written before training is; `config.py` reads the recipe."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from fastrl.algorithms.offline import OFFLINE, Objective, objective_of
from fastrl.check import choice, require
from fastrl.preference_spec import PreferenceLoss, PreferenceMix
from fastrl.trainer.config import RunConfig


@dataclass(frozen=True)
class DataConfig:
    """Where answers come from; the kind of a row follows from the algorithm."""

    source: str = "reasoning_gym:chain_sum"
    """A .jsonl file, a folder written by datasets' save_to_disk, a hub id, or reasoning_gym:TASK."""
    options: dict[str, Any] = field(default_factory=dict)
    """Passed to the source: a dataset's split and name, or a reasoning-gym task's own settings."""
    size: int = 2000
    """Questions to generate, where the source is a generator."""
    held_out: int = 200
    """Rows kept for evaluation and never trained on; no question is in both parts."""
    unpair: bool = False
    """For losses on labelled answers: the rows are pairs, and each side is an answer of its own."""
    chat: bool = True
    """Render text with the model's chat template, when it has one."""
    system: str = ""
    """System message of chat prompts."""
    max_prompt_tokens: int = 1024
    """Rows with longer prompts are left out, counted and reported."""
    max_tokens: int = 2048
    """So are rows whose prompt and answer together are longer."""


@dataclass(frozen=True)
class OfflineLossConfig:
    """Overrides of the algorithm's preset; None keeps the preset's value, and one it does not have is refused."""

    beta: float | None = None
    label_smoothing: float | None = None
    margin: float | None = None
    """Target margin of rewards, as in SimPO."""
    length: Literal["sum", "mean", "reward_mean"] | None = None
    """Where a reward is divided by the answer's length."""
    ld_alpha: float | None = None
    """Weight of the tokens past the length of the pair's shorter answer."""
    tau: float | None = None
    """Temperature of discopop."""
    weights: tuple[float, ...] | None = None
    """Of the terms of a mix, in the order of its preset: ORPO's is 1 of the NLL, then its lambda."""
    desirable_weight: float | None = None
    undesirable_weight: float | None = None
    center_coef: float | None = None
    """Of a reward model: weight of the term that keeps rewards around 0."""


@dataclass(frozen=True)
class OfflineEvalConfig:
    """Evaluation on held-out rows, before and after training and now and then between."""

    every: int = 0
    """Steps between evaluations; 0 evaluates before and after only."""


@dataclass(frozen=True)
class OfflineConfig(RunConfig):
    """A training run on answers written before training."""

    algorithm: Literal[
        "dpo", "cdpo", "robust_dpo", "dpo_norm", "slic", "ipo", "exo", "nca", "bco", "sppo_hard", "aot",
        "aot_unpaired", "apo_zero", "apo_down", "discopop", "ld_dpo", "wpo", "rpo", "mpo", "simpo", "alphapo", "cpo",
        "orpo", "kto", "apo_zero_unpaired", "sft", "reward_model",
    ] = "dpo"  # fmt: skip
    """Selects a loss of fastrl.presets, or supervised fine-tuning, or a reward model; `loss` overrides its factors."""
    reference: str = ""
    """The frozen model that a preference loss compares with; empty is the model itself, before training."""
    batch: int = 16
    """Rows of a step: pairs, labelled answers, or demonstrations."""
    data: DataConfig = DataConfig()
    loss: OfflineLossConfig = OfflineLossConfig()
    eval: OfflineEvalConfig = OfflineEvalConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        op = "OfflineConfig"
        choice(op, "algorithm", self.algorithm, OFFLINE)
        require(self.batch >= 1, op, "batch", "at least 1", self.batch)
        per_batch = self.optimizer.steps_per_rollout
        require(per_batch == 1, op, "optimizer.steps_per_rollout", "1, as there is no rollout", per_batch, "Set batch.")
        epochs = self.optimizer.epochs_per_rollout
        require(epochs == 1, op, "optimizer.epochs_per_rollout", "1, as there is no rollout", epochs, "Set steps.")
        whole = self.algorithm != "reward_model" or self.adapter.rank == 0
        require(whole, op, "adapter.rank", "0 for reward_model, whose head is new", self.adapter.rank)
        objective = build_objective(self)
        labelled = objective.kind == "labelled" or not self.data.unpair
        require(labelled, op, "data.unpair", f"false for {self.algorithm}, whose rows are {objective.kind}", True)
        unused = self.reference and not objective.needs_ref
        require(not unused, op, "reference", f"nothing for {self.algorithm}, which compares with none", self.reference)


def build_objective(config: OfflineConfig) -> Objective:
    """The algorithm's preset with the overrides of `config.loss`.

    Raises:
        ValueError: the algorithm has no such factor, or cannot have that value.
    """
    preset = OFFLINE[config.algorithm]
    given = {name: value for name, value in vars(config.loss).items() if value is not None}
    if not isinstance(preset, PreferenceMix):
        _require_known(config, given, [f.name for f in fields(preset)])
        return objective_of(replace(preset, **given))
    _require_known(config, given, ["weights", *(f.name for f in fields(PreferenceLoss))])
    weights = given.pop("weights", tuple(weight for weight, _ in preset.terms))
    require(len(weights) == len(preset.terms), "OfflineConfig", "loss.weights", f"{len(preset.terms)} weights", weights)
    terms = [replace(term, **given) if isinstance(term, PreferenceLoss) else term for _, term in preset.terms]
    return objective_of(PreferenceMix(tuple(zip(weights, terms, strict=True))))


def _require_known(config: OfflineConfig, given: dict[str, Any], known: list[str]) -> None:
    settable = [name for name in vars(config.loss) if name in known]
    for name, value in given.items():
        expected = f"nothing for {config.algorithm}, which has {', '.join(settable) or 'no factors'}"
        require(name in settable, "OfflineConfig", f"loss.{name}", expected, value)
