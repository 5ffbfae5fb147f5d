"""Prompts and rows as a recipe names them, and whether they fit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from fastrl.check import require
from fastrl.data.curriculum import (
    ERRORS,
    Curriculum,
    DifficultyPools,
    EasyToHard,
    Learnability,
    Rule,
    Waker,
    bucket_of,
    require_columns,
)
from fastrl.data.preferences import load_preferences, unpair
from fastrl.data.prompts import load_prompts, split
from fastrl.data.sampler import PromptSampler
from fastrl.trainer.config import TrainConfig
from fastrl.types import Group, Prompt

if TYPE_CHECKING:
    from typing import TypeVar

    Loaded = TypeVar("Loaded")


def load_task(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]] | None = None
) -> tuple[list[Prompt], list[Prompt], tuple[str, ...]]:
    """(training prompts, held-out prompts, warnings about dropped rows); no question is in both sets."""
    task = config.task

    def load() -> tuple[list[Prompt], list[Prompt]]:
        prompts = load_prompts(
            task.source if rows is None else rows,
            tokenizer,
            size=task.size,
            seed=config.seed,
            options=task.options,
            chat=task.chat,
            system=task.system,
            suffix=task.suffix,
            examples=task.examples,
            template_options=task.template_options,
            max_prompt_tokens=task.max_prompt_tokens,
        )
        by = buckets(config)
        require_columns(prompts, by, "TrainConfig", "eval.by" if config.eval.by else "curriculum.by")
        train, held_out = split(prompts, task.held_out, config.seed, partial(bucket_of, by=by) if by else None)
        measured = {bucket_of(prompt, by) for prompt in held_out}
        missed = {bucket_of(prompt, by) for prompt in train} - measured if by and held_out else ()
        if missed:
            warnings.warn(
                f"No prompt of {', '.join(sorted(missed))} is held out: evaluation says nothing of them. Raise "
                "task.held_out.",
                stacklevel=2,
            )
        return train, held_out

    (train, held_out), said = with_warnings(load)
    return train, held_out, said


def buckets(config: TrainConfig) -> tuple[str, ...]:
    """Columns that name a held-out prompt's bucket."""
    return config.eval.by or config.curriculum.by


def sampler_of(config: TrainConfig, prompts: Sequence[Prompt]) -> PromptSampler[Prompt]:
    """Draws training prompts as `config.curriculum` says.

    Raises:
        ValueError: a prompt lacks a column, or easy_to_hard's column is not a number.
    """
    asked, threshold = config.curriculum, config.rollout.threshold
    if asked.kind == "epochs" and asked.leave_out is None:
        return PromptSampler(prompts, seed=config.seed)
    curriculum = Curriculum(
        prompts,
        Rule(),
        asked.by,
        seed=config.seed,
        leave_out=asked.leave_out,
        threshold=threshold,
        one_bucket=asked.kind == "epochs",
    )
    curriculum.rule = _rule(config, list(curriculum.buckets))
    return curriculum


def _rule(config: TrainConfig, names: Sequence[str]) -> Rule:
    asked, threshold = config.curriculum, config.rollout.threshold
    shares: dict[str, Any] = {"random_share": asked.random_share, "interval": asked.interval}
    match asked.kind:
        case "waker_m" | "waker_r":
            reduction = asked.kind == "waker_r"
            temperature = asked.temperature if asked.temperature is not None else 0.5 if reduction else 1.0
            error = partial(ERRORS[asked.error], threshold=threshold)
            return Waker(error, reduction=reduction, temperature=temperature, **shares)
        case "learnability":
            return Learnability(threshold, asked.power, **shares)
        case "difficulty_pools":
            return DifficultyPools(asked.pool_thresholds, asked.pool_weights)
        case "easy_to_hard":
            return EasyToHard(names, config.steps * config.rollout.prompts_per_step)
    return Rule()


def with_warnings(load: Callable[[], Loaded]) -> tuple[Loaded, tuple[str, ...]]:
    """(what `load` returns, the warnings it raised for the user), to be logged once there is a log."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = load()
    return loaded, tuple(str(one.message) for one in caught if issubclass(one.category, UserWarning))


def load_rows(
    config: TrainConfig,
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    given: Sequence[Mapping[str, Any]] | None,
) -> tuple[list[Group], tuple[str, ...]]:
    """(groups of that kind, warnings about dropped rows)."""
    data = config.data
    groups, said = with_warnings(
        lambda: load_preferences(
            data.source if given is None else given,
            tokenizer,
            kind="pairs" if data.unpair else "ranked" if data.ranked else kind,
            size=data.size,
            seed=config.seed,
            options=data.options,
            chat=data.chat,
            system=data.system,
            template_options=data.template_options,
            max_prompt_tokens=data.max_prompt_tokens,
            max_tokens=max_tokens,
            margin_column=data.margin_column,
            soft_label_column=data.soft_label_column,
        )
    )
    if data.unpair:
        groups = [
            Group(replace(group.prompt, index=index), group.samples) for index, group in enumerate(unpair(groups))
        ]
    return groups, said


def require_room(config: TrainConfig, layout: str, groups: Sequence[Group]) -> None:
    """Refuses a token budget that the longest group exceeds; `pack` would notice only when that group is drawn."""

    def tokens(group: Group) -> int:
        prompt, completions = len(group.prompt.token_ids), [len(sample.token_ids) - 1 for sample in group.samples]
        if layout == "padded":
            return len(completions) * (prompt + max(completions))
        copies = len(completions) if layout == "varlen" else 1  # of the prompt
        return copies * prompt + sum(completions)

    longest = max(map(tokens, groups))
    expected = f"at least {longest}, the tokens of the longest row"
    enough = config.max_tokens_per_microbatch >= longest
    require(
        enough,
        "TrainConfig",
        "max_tokens_per_microbatch",
        expected,
        config.max_tokens_per_microbatch,
        "Or lower data.max_tokens.",
    )
