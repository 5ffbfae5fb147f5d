"""Training from Python: a recipe as a call, with objects in place of names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastrl.algorithms import Algorithm, Estimator, GroupPolicyGradient
from fastrl.algorithms.offline import objective_of
from fastrl.algorithms.policy_gradient import LossTerm, PolicyGradient
from fastrl.check import require
from fastrl.monitor.log import Callback
from fastrl.preference_spec import PreferenceLoss, PreferenceMix, UnpairedPreferenceLoss
from fastrl.rewards import RewardFunc
from fastrl.rewards.suite import reward_name
from fastrl.rollout.turns import Environment
from fastrl.sources import Source
from fastrl.spec import PolicyLoss
from fastrl.trainer.build import build_algorithm
from fastrl.trainer.checkpoint import save_model
from fastrl.trainer.config import TrainConfig
from fastrl.trainer.evaluate import Evaluation
from fastrl.trainer.recipe import from_dict
from fastrl.trainer.setup import Given, prepare

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fastrl.trainer.loop import Outcome

Spec = PolicyLoss | PreferenceLoss | PreferenceMix | UnpairedPreferenceLoss
Rewards = RewardFunc | Sequence[RewardFunc | tuple[RewardFunc, float]]
OP = "Trainer"


class Trainer:
    """Trains a language model. Every recipe setting is an argument of the same name.

        trainer = Trainer("smollm2-135m-instruct", rows, rewards=judge, algorithm="grpo", steps=40)
        trainer.train()
        trainer.save("sums")

    Args:
        model: a name as in a recipe, or a loaded (model, tokenizer), which is trained in place.
        rows: mappings with a `prompt` and the columns that the rewards read, or with the columns of pre-written answers
            (`chosen` and `rejected`, `completion`, ...), or your own `Source`. None uses `task` or `data` of the
            settings.
        rewards: a function with TRL's signature, sync or async, or several, each alone or as (function, weight).
        algorithm: a name, the preset or spec of a loss, or an `Algorithm`. A policy loss uses GRPO's advantages.
        estimator: your own advantages: (rewards (B,) float64, group_ids=(B,)) -> (B,).
        terms: functions (log-probabilities (N,) with gradient, micro-batch) -> (N,), added to each token's loss with
            the token's weight in the policy loss; logged as `loss/` and the function's name.
        environment: makes the other side of a conversation of several turns, once per sample: see
            `fastrl.rollout.turns.Environment`; or the recipe's settings of one.
        callbacks: called with (step, numbers by name) after each step, and after each evaluation with names that begin
            with eval/. An exception in one ends the run, which is saved.
        evaluations: additional evaluations; each has `run(learner, log, step)`.
        settings: the rest of the recipe: steps=40, rollout={"group_size": 8}, optimizer={"lr": 1e-5}, ...

    Raises:
        ValueError: something does not exist or does not fit; the message says what.
    """

    def __init__(
        self,
        model: str | Path | tuple[PreTrainedModel, PreTrainedTokenizerBase] = TrainConfig.model,
        rows: Sequence[Mapping[str, Any]] | Source | None = None,
        *,
        rewards: Rewards | None = None,
        algorithm: str | Spec | Algorithm = "grpo",
        estimator: Callable[..., torch.Tensor] | None = None,
        terms: Sequence[LossTerm] = (),
        environment: Callable[[], Environment] | Mapping[str, Any] | None = None,
        callbacks: Sequence[Callback] = (),
        evaluations: Sequence[Evaluation] = (),
        **settings: Any,
    ) -> None:
        loaded = isinstance(model, tuple)
        own = {"model": f"{type(model[0]).__name__}, given" if loaded else str(model), "algorithm": _name(algorithm)}
        weighted = None if rewards is None else _weighted(rewards)
        factory = environment if callable(environment) else None
        if factory:
            own["environment"] = {"name": reward_name(factory)}
        elif environment:
            own["environment"] = dict(environment)
        if weighted is not None:
            own["rewards"] = [{"name": reward_name(func), "weight": weight} for func, weight in weighted]
        config = from_dict(TrainConfig, _listed({**_defaults(algorithm), **settings, **own}), OP)
        if loaded and config.dtype == "auto":  # the model has one
            config = replace(config, dtype=str(model[0].dtype).removeprefix("torch."))
        source = rows if hasattr(rows, "next") else None
        if source is None and rows is not None:
            config = _of_rows(config, len(rows), settings)
        given = Given(
            model=model if loaded else None,
            rows=None if source or rows is None else list(rows),
            rewards=weighted,
            algorithm=_algorithm(config, algorithm, estimator, tuple(terms)),
            environment=factory,
            source=source,
            callbacks=callbacks,
            evaluations=evaluations,
        )
        self.run = prepare(config, given)

    def train(self) -> Outcome:
        """Runs the remaining steps, writes to `run_dir` and returns how the run ended."""
        return self.run.train()

    def evaluate(self) -> dict[str, float]:
        """Evaluates the current weights on the held-out set; prints and returns the numbers."""
        return self.run.evaluate()

    def save(self, folder: str | Path) -> Path:
        """Writes the model or adapter, and the tokenizer, to `folder`; `from_pretrained` loads them."""
        return save_model(self.run.learner.models()["model"], self.run.tokenizer, Path(folder))


def _name(algorithm: str | Spec | Algorithm) -> str:
    """The algorithm's name in the configuration; an object stands under the name of a similar algorithm."""
    if isinstance(algorithm, str):
        return algorithm
    kind = getattr(algorithm, "kind", None)
    if isinstance(algorithm, PolicyLoss) or kind == "rewarded":
        return "grpo"
    if isinstance(algorithm, UnpairedPreferenceLoss) or kind == "labelled":
        return "kto"
    return "sft" if kind == "completions" else "dpo"


def _defaults(algorithm: str | Spec | Algorithm) -> dict[str, Any]:
    return {} if isinstance(algorithm, str) else {"run_dir": f"runs/{type(algorithm).__name__}"}


def _of_rows(config: TrainConfig, number: int, settings: Mapping[str, Any]) -> TrainConfig:
    """The configuration for the given rows; none are held out unless the caller asks for it."""
    name = "data" if config.offline else "task"
    asked = settings.get(name, {}).get("held_out", 0)
    return replace(config, **{name: replace(getattr(config, name), source=f"{number} rows, given", held_out=asked)})


def _algorithm(
    config: TrainConfig,
    algorithm: str | Spec | Algorithm,
    estimator: Callable[..., torch.Tensor] | None,
    terms: tuple[LossTerm, ...],
) -> Algorithm:
    if isinstance(algorithm, PreferenceLoss | PreferenceMix | UnpairedPreferenceLoss):
        built: Algorithm = objective_of(algorithm, threshold=config.rollout.threshold)
    elif isinstance(algorithm, str | PolicyLoss):
        built = build_algorithm(config)
    else:
        built = algorithm
    if isinstance(algorithm, PolicyLoss):
        built = replace(built, spec=algorithm)
    own = estimator is None or isinstance(built, GroupPolicyGradient)
    require(own, OP, "estimator", "nothing for an algorithm without group advantages", config.algorithm)
    added = not terms or isinstance(built, PolicyGradient)
    require(added, OP, "terms", "nothing for an algorithm that is not a policy gradient", config.algorithm)
    if estimator is not None:
        built = replace(built, estimator=Estimator(estimator))
    return replace(built, terms=(*built.terms, *terms)) if terms else built


def _weighted(rewards: Rewards) -> list[tuple[RewardFunc, float]]:
    several = [rewards] if callable(rewards) else list(rewards)
    return [one if isinstance(one, tuple) else (one, 1.0) for one in several]


def _listed(value: Any) -> Any:
    """Settings as YAML would hold them: tuples become lists, paths become text."""
    if isinstance(value, Mapping):
        return {name: _listed(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_listed(item) for item in value]
    return str(value) if isinstance(value, Path) else value
