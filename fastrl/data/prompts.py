"""Loads prompts as the model sees them, and splits off the held-out set."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastrl import check
from fastrl.chat import complete, content_text, is_unicode, messages_of, render, template_arguments, text_ids
from fastrl.data.sources import Row, read_rows
from fastrl.types import Messages, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kept = TypeVar("Kept")


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
    examples: Sequence[Mapping[str, Any]] = (),
    max_prompt_tokens: int | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> list[Prompt]:
    """The prompts of a source, tokenised, each with the row's other columns.

    A prompt is a string or a list of chat messages. The tokenizer's chat template renders messages, and strings too, as
    one user message, if `chat` is true and there is a template. Any other string is tokenised as it is, after the
    tokenizer's beginning-of-text token. Messages keep all fields, such as tool calls. If the last message is the
    assistant's, the model continues it. A row's columns `tools`, `documents` and `chat_template_kwargs` reach the
    template.

    Args:
        source, size, seed: see `fastrl.data.sources.read_rows`.
        options: also `prompt_column`, the column that holds the prompt; `prompt` by default.
        system: a system message for chat prompts that have none.
        suffix: appended to the string, or to the last user message.
        examples: chat messages put before the question, after its system message.
        max_prompt_tokens: longer prompts are dropped, with a warning that counts them.
        template_options: extra arguments for the chat template, such as `enable_thinking`.

    Raises:
        ValueError: no rows, no such column, a prompt that is neither string nor messages, or no prompt short enough.
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
            token_ids = text_ids(tokenizer, content)
        else:
            check.require(
                has_template, row.where, column, "text", "chat messages", "This tokenizer has no chat template."
            )
            content = _after(examples, complete(content, system, suffix))
            last = content[-1]
            unfinished = last["role"] == "assistant" and bool(content_text(last)) and not last.get("tool_calls")
            ends = {"continue_final_message": True} if unfinished else {"add_generation_prompt": True}
            try:
                text = render(tokenizer, content, **template_arguments(row.values, template_options or {}), **ends)
            except ValueError as error:
                raise ValueError(
                    check.sentence(row.where, column, "messages that the chat template takes", str(error))
                ) from error
            token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        columns = {name: value for name, value in row.values.items() if name != column}
        prompts.append(Prompt(index, content, tuple(token_ids), columns))
    return _short_enough(prompts, max_prompt_tokens)


def _after(examples: Sequence[Mapping[str, Any]], content: Messages) -> Messages:
    """The messages with the examples before the first that is not the system's."""
    shown = messages_of([dict(message) for message in examples])
    check.require(
        shown is not None, "load_prompts", "examples", "chat messages with a role and text", repr(examples)[:80]
    )
    place = int(bool(content) and content[0]["role"] in ("system", "developer"))
    return [*content[:place], *shown, *content[place:]]


def split(
    prompts: Sequence[Prompt], held_out: int, seed: int, bucket: Callable[[Prompt], str] | None = None
) -> tuple[list[Prompt], list[Prompt]]:
    """A random split of the prompts into (train, held out), without duplicate rows; no question is in both.

    Prompts that differ in their text or in any other column are different tasks. Prompts whose text differs only in
    white space are one question, and all tasks of a question are on the same side. Duplicate rows are dropped, and a
    warning counts them. With `bucket`, which names a prompt's bucket, about equally many are
    held out of each.

    Raises:
        ValueError: `held_out` leaves nothing to train on.
    """
    distinct = list({_task(prompt): prompt for prompt in reversed(prompts)}.values())[::-1]
    if len(distinct) < len(prompts):
        left_out = len(prompts) - len(distinct)
        warnings.warn(
            f"{left_out} of {len(prompts)} prompts repeat an earlier row in every column; left out.", stacklevel=2
        )
    return by_question(distinct, held_out, seed, question, bucket)


def by_question(
    rows: Sequence[Kept],
    held_out: int,
    seed: int,
    question: Callable[[Kept], str],
    bucket: Callable[[Kept], str] | None = None,
) -> tuple[list[Kept], list[Kept]]:
    """A random split of the rows into (the rest, held out) that keeps all rows of a question together.

    Questions are held out until there are `held_out` rows. A question with more rows than are still missing is skipped;
    if rows are missing at the end, the smallest remaining question is held out whole. With `bucket`, the
    buckets take turns, each with the questions whose first row it is, and none gives more than half of them while
    another has less.

    Raises:
        ValueError: `held_out` leaves nothing to train on.
    """
    questions: dict[str, list[Kept]] = {}
    for row in rows:
        questions.setdefault(question(row), []).append(row)
    order = list(questions.values())
    random.Random(seed).shuffle(order)
    if bucket:
        of: dict[str, list[list[Kept]]] = {}
        for same in order:
            of.setdefault(bucket(same[0]), []).append(same)
        halves = [same[: len(same) // 2] for same in of.values()], [same[len(same) // 2 :] for same in of.values()]
        order = [same for half in halves for turn in zip_longest(*half) for same in turn if same is not None]
    out, lacking = set(), held_out
    for place, same in enumerate(order):
        if len(same) <= lacking:
            out.add(place)
            lacking -= len(same)
    left = [place for place in range(len(order)) if place not in out]
    if lacking > 0 and left:
        out.add(min(left, key=lambda place: len(order[place])))
    check.require(
        held_out >= 0 and len(out) < len(order),
        "split",
        "held_out",
        f"at least 0, and fewer than the {len(rows)} distinct rows, with {len(order)} questions",
        held_out,
        "Use more rows, or hold out fewer.",
    )
    parts: tuple[list[Kept], list[Kept]] = ([], [])
    for place, same in enumerate(order):
        parts[place in out].extend(same)
    return parts


def question(prompt: Prompt) -> str:
    """The prompt's text with normalised white space, which identifies its question."""
    if isinstance(prompt.content, str):
        return " ".join(prompt.content.split())
    return _json([message | {"content": " ".join(content_text(message).split())} for message in prompt.content])


def _task(prompt: Prompt) -> str:
    """Everything that distinguishes a prompt's task from others."""
    return _json([prompt.content, prompt.columns])


def _json(value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True, default=repr)
    except TypeError:  # keys that JSON cannot have
        return repr(value)


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
    messages = messages_of(content)
    check.require(
        messages is not None and any(message["role"] == "user" for message in messages),
        row.where,
        column,
        "text, or chat messages with a role and text each, one of them the user's",
        repr(content)[:80],
    )
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
