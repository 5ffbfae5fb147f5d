"""The environment that a recipe names, and whether conversations with it fit the chat template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastrl.chat import render
from fastrl.check import require
from fastrl.environments import resolve_environment
from fastrl.rollout.turns import Environment, Turns, continuation
from fastrl.trainer.config import TrainConfig

OP = "TrainConfig"


def prepare_turns(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, factory: Callable[[], Environment] | None
) -> tuple[TrainConfig, Turns | None]:
    """(the configuration, with the environment's tools among the chat template's arguments; how conversations run).

    Args:
        factory: makes environments, in place of the one that the configuration names.

    Raises:
        ValueError: there is no such environment, or the chat template does not show its tools or their results.
    """
    asked = config.environment
    if not asked.name:
        return config, None
    factory = factory or resolve_environment(asked.name, **asked.options)
    chat, do = config.task.chat and getattr(tokenizer, "chat_template", None) is not None, "Use task.chat: true."
    require(chat, OP, "environment.name", "none without a chat template, which separates the turns", asked.name, do)
    probe, task = factory(), config.task
    if tools := probe.schemas() if hasattr(probe, "schemas") else []:
        options: dict[str, Any] = {**task.template_options, "tools": tools}
        _require_shown(tokenizer, tools, task.template_options, f"{task.system} {task.suffix} {task.examples}")
        config = replace(config, task=replace(task, template_options=options))
    turns = Turns(
        factory,
        asked.max_turns,
        asked.turn_tokens or config.rollout.max_new_tokens,
        asked.timeout,
        config.task.template_options,
    )
    continuation(tokenizer, [{"role": getattr(probe, "role", "user"), "content": "a message"}], turns.template_options)
    return config, turns


def _require_shown(
    tokenizer: PreTrainedTokenizerBase, tools: list[dict[str, Any]], options: dict[str, Any], told: str
) -> None:
    """Refuses tools that the policy would never hear of: many templates ignore them in silence."""
    messages = [{"role": "user", "content": "a question"}]
    shown = render(tokenizer, messages, **options) != render(tokenizer, messages, **options, tools=tools)
    names = [tool["function"]["name"] for tool in tools]
    known = shown or all(name in told for name in names)
    expected = f"a text that names {', '.join(names)}, as this chat template shows no tools"
    require(known, OP, "task.system", expected, repr(told), "Say there how they are called.")
