"""Prompts as the model sees them, and the part of them that is held out."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from fastrl import check
from fastrl.data.sources import Row, read_rows
from fastrl.types import Messages, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_prompts(
    source: str | Path | Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    size: int = 1000,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    chat: bool = True,
    system: str = "",
    suffix: str = "",
    max_prompt_tokens: int | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> list[Prompt]:
    """The prompts of a source, tokenised, each with the row's other columns.

    A prompt is a string or a list of chat messages. Messages are rendered by the tokenizer's chat template; so is a
    string, as one user message, when `chat` is true and the tokenizer has a template. Any other string is tokenised as
    it is, with the tokenizer's special tokens.

    Args:
        source, size, seed: see `fastrl.data.sources.read_rows`.
        options: also `prompt_column`, the column that holds the prompt; `prompt` by default.
        system: a system message for chat prompts that have none.
        suffix: appended as it is to the string, or to the last user message.
        max_prompt_tokens: longer prompts are dropped, with a warning that counts them.
        template_options: further arguments of the chat template, such as `enable_thinking`.

    Raises:
        ValueError: no rows, no such column, a prompt that is neither of the two, or no prompt short enough.
    """
    options = dict(options or {})
    column = options.pop("prompt_column", "prompt")
    rows = read_rows(source, size=size, seed=seed, options=options)
    has_template = getattr(tokenizer, "chat_template", None) is not None
    prompts = []
    for index, row in enumerate(rows):
        content = _content(row, column)
        if isinstance(content, str) and chat and has_template:
            content = [{"role": "user", "content": content}]
        if isinstance(content, str):
            content += suffix
            token_ids = tokenizer(content)["input_ids"]
        else:
            check.require(
                has_template, row.where, column, "text", "chat messages", "This tokenizer has no chat template."
            )
            content = complete(content, system, suffix)
            try:
                text = tokenizer.apply_chat_template(
                    content, add_generation_prompt=True, tokenize=False, **(template_options or {})
                )
            except TemplateError as error:
                raise ValueError(
                    check.sentence(row.where, column, "messages that the chat template takes", str(error))
                ) from error
            token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        columns = {name: value for name, value in row.values.items() if name != column}
        prompts.append(Prompt(index, content, tuple(token_ids), columns))
    return _short_enough(prompts, max_prompt_tokens)


def split(prompts: Sequence[Prompt], held_out: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Two random parts of the distinct prompts, (train, held out): no question is in both, none is in either twice.

    Prompts are the same when they say the same, whatever their white space; the first of them stays.

    Raises:
        ValueError: `held_out` leaves nothing to train on.
    """
    distinct = list({question(prompt): prompt for prompt in reversed(prompts)}.values())[::-1]
    check.require(
        0 <= held_out < len(distinct),
        "split",
        "held_out",
        f"at least 0, and fewer than the {len(distinct)} distinct prompts (of {len(prompts)})",
        held_out,
        "Use more prompts, or hold out fewer.",
    )
    random.Random(seed).shuffle(distinct)
    return distinct[held_out:], distinct[:held_out]


def question(prompt: Prompt) -> str:
    """What a prompt asks, with white space made equal: prompts with the same question are the same."""
    if isinstance(prompt.content, str):
        return " ".join(prompt.content.split())
    return json.dumps([[message["role"], " ".join(message["content"].split())] for message in prompt.content])


def _content(row: Row, column: str) -> str | Messages:
    check.require(
        column in row.values,
        row.where,
        "columns",
        repr(column),
        ", ".join(map(repr, row.values)) or "none",
        "Name the prompt's column with the option prompt_column.",
    )
    content = row.values[column]
    if isinstance(content, str):
        check.require(bool(content.strip()), row.where, column, "some text", repr(content))
        check.require(is_unicode(content), row.where, column, "text in Unicode", "half of a surrogate pair")
        return content
    check.require(
        is_messages(content) and any(message["role"] == "user" for message in content),
        row.where,
        column,
        "text, or chat messages with a role and text each, one of them the user's",
        repr(content)[:80],
    )
    return [{"role": message["role"], "content": message["content"]} for message in content]


def is_unicode(text: str) -> bool:
    """False for text with half of a surrogate pair, which JSON can write and no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_messages(content: object) -> bool:
    """True for a list of chat messages with a role and text each."""
    return isinstance(content, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        and is_unicode(message["content"])
        for message in content
    )


def complete(messages: Messages, system: str, suffix: str) -> Messages:
    """The messages with a system message where they have none, and the suffix behind the user's last words."""
    last = max(place for place, message in enumerate(messages) if message["role"] == "user")
    asked = messages[last] | {"content": messages[last]["content"] + suffix}
    messages = [*messages[:last], asked, *messages[last + 1 :]]
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return messages


def _short_enough(prompts: list[Prompt], limit: int | None) -> list[Prompt]:
    if limit is None:
        return prompts
    kept = [prompt for prompt in prompts if len(prompt.token_ids) <= limit]
    longest = max(len(prompt.token_ids) for prompt in prompts)
    dropped = len(prompts) - len(kept)
    check.require(
        len(kept) > 0,
        "load_prompts",
        "max_prompt_tokens",
        f"room for at least one prompt, of {min(len(prompt.token_ids) for prompt in prompts)} tokens or more",
        limit,
        "Raise it.",
    )
    if dropped:
        warnings.warn(
            f"load_prompts: dropped {dropped} of {len(prompts)} prompts longer than {limit} tokens, up to {longest}.",
            stacklevel=3,
        )
    return kept
