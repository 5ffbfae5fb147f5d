"""What a run on answers written before training is; `config.py` reads the recipe."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from fastrl.algorithms.offline import OFFLINE, Objective, objective_of
from fastrl.check import choice, require
from fastrl.preference_spec import (
    Baseline,
    JensenShannon,
    Length,
    Link,
    LogOdds,
    Match,
    Power,
    PreferenceLoss,
    PreferenceMix,
    SftAggregate,
    Weighting,
)
from fastrl.trainer.config import RunConfig

TRANSFORMS = {"power": Power, "jensen_shannon": JensenShannon, "log_odds": LogOdds}


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
    ranked: bool = False
    """For reward models: a row has several responses and their ranking, 1 for the best; all of them are compared."""
    margin_column: str = ""
    """Of pairs: the column with how much better the chosen answer is, which its reward then should be."""
    soft_label_column: str = ""
    """Of pairs: the column with the probability that the chosen answer is the better one, such as a judge's."""
    chat: bool = True
    """Render text with the model's chat template, when it has one."""
    system: str = ""
    """System message of chat prompts."""
    template_options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the chat template, such as enable_thinking; a row's chat_template_kwargs come on top."""
    max_prompt_tokens: int = 1024
    """Rows with longer prompts are left out, counted and reported."""
    max_tokens: int = 2048
    """So are rows whose prompt and answer together are longer than this, or than the model has positions for."""


@dataclass(frozen=True)
class OfflineLossConfig:
    """Overrides of the algorithm's preset; None keeps the preset's value, and one it does not have is refused."""

    link: Link | None = None
    """The loss as a function of the margin, or of the two rewards; of a mix, that of all its pair losses."""
    beta: float | None = None
    reference: bool | None = None
    """Whether a reward is of the log-ratio to the reference, or of the log-probability itself."""
    length: Length | None = None
    """Where a reward is divided by the answer's length."""
    transform: Literal["power", "jensen_shannon", "log_odds"] | None = None
    """The f-divergence from the reference: power with an exponent of 0 is reverse KL, -1 forward KL; or ORPO's odds."""
    exponent: float | None = None
    """Of the transform power: alpha - 1 of an alpha divergence."""
    margin: float | None = None
    """Target margin of rewards, as in SimPO."""
    label_smoothing: float | None = None
    """Probability that a pair's label is wrong."""
    debias: bool | None = None
    """Make the loss under label noise unbiased, as robust DPO does."""
    match: Match | None = None
    """What is compared: the sides of each pair, or what the batch's sorted ones are, as in AOT."""
    ld_alpha: float | None = None
    """Weight of the tokens past the length of the pair's shorter answer."""
    weighting: Weighting | None = None
    """wpo weighs a pair by how probable its answers are."""
    tau: float | None = None
    """Temperature of discopop."""
    weights: tuple[float, ...] | None = None
    """Of the terms of a mix, in the order of its preset: ORPO's is 1 of the NLL, then its lambda."""
    aggregate: SftAggregate | None = None
    """How the NLL of a mix is averaged."""
    baseline: Baseline | None = None
    """What KTO's rewards are compared with."""
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
        require(self.eval.every >= 0, op, "eval.every", "0 (only before and after) or more", self.eval.every)
        per_batch = self.optimizer.steps_per_rollout
        require(per_batch == 1, op, "optimizer.steps_per_rollout", "1, as there is no rollout", per_batch, "Set batch.")
        epochs = self.optimizer.epochs_per_rollout
        require(epochs == 1, op, "optimizer.epochs_per_rollout", "1, as there is no rollout", epochs, "Set steps.")
        whole = self.algorithm != "reward_model" or self.adapter.rank == 0
        require(whole, op, "adapter.rank", "0 for reward_model, whose head is new", self.adapter.rank)
        objective = build_objective(self)
        labelled = objective.kind == "labelled" or not self.data.unpair
        require(labelled, op, "data.unpair", f"false for {self.algorithm}, whose rows are {objective.kind}", True)
        ranked = self.algorithm == "reward_model" or not self.data.ranked
        require(ranked, op, "data.ranked", f"false for {self.algorithm}; only reward_model compares several", True)
        columns = {
            "margin_column": (self.data.margin_column, objective.takes_margins),
            "soft_label_column": (self.data.soft_label_column, objective.takes_soft_labels),
        }
        loss = "ranked rows" if self.data.ranked else f"{self.algorithm} with this loss"
        for name, (column, taken) in columns.items():
            allowed = not column or (taken and not self.data.ranked)
            require(allowed, op, f"data.{name}", f"nothing for {loss}", repr(column))
        unused = self.reference and not objective.needs_ref
        require(not unused, op, "reference", f"nothing for {self.algorithm}, which compares with none", self.reference)


def build_objective(config: OfflineConfig) -> Objective:
    """The algorithm's preset with the overrides of `config.loss`.

    Raises:
        ValueError: the algorithm has no such factor, or cannot have that value.
    """
    preset = OFFLINE[config.algorithm]
    given = {name: value for name, value in vars(config.loss).items() if value is not None}
    mix = isinstance(preset, PreferenceMix)
    terms = [term for _, term in preset.terms] if mix else [preset]
    known = {name for term in terms for name in _settable(term)} | ({"weights"} if mix else set())
    has = ", ".join(name for name in vars(config.loss) if name in known) or "no factors"
    for name, value in given.items():
        expected = f"nothing for {config.algorithm}, which has {has}"
        require(name in known, "OfflineConfig", f"loss.{name}", expected, value)
    terms = [_changed(term, {name: given[name] for name in _settable(term) if name in given}) for term in terms]
    if not mix:
        return objective_of(*terms)
    weights = given.get("weights", tuple(weight for weight, _ in preset.terms))
    require(len(weights) == len(terms), "OfflineConfig", "loss.weights", f"{len(terms)} weights", weights)
    return objective_of(PreferenceMix(tuple(zip(weights, terms, strict=True))))


def _settable(term: Any) -> list[str]:
    """The names in `OfflineLossConfig` of a term's factors."""
    return [f.name for f in fields(term)] + (["exponent"] if isinstance(term, PreferenceLoss) else [])


def _changed(term: Any, given: dict[str, Any]) -> Any:
    """The term with these factors; of a transform a recipe gives the name and the exponent apart."""
    name, exponent = given.pop("transform", None), given.pop("exponent", None)
    if name or exponent is not None:
        kind = TRANSFORMS[name] if name else type(term.transform)
        power = kind is Power or exponent is None
        require(power, "OfflineConfig", "loss.exponent", f"nothing for {kind.__name__}", exponent)
        given["transform"] = kind() if exponent is None else Power(exponent)
    return replace(term, **given)
