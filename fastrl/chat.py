"""From text and chat messages to tokens: what tokenizer and chat template add, and where a turn ends."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastrl.types import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWER = "the answer"  # placeholder answer, rendered to see what follows it


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text that continues: with the tokenizer's beginning-of-text token exactly once, even if the text
    already has it, and without its end-of-text token."""
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer(text)["input_ids"]
    starts = (n for n in range(len(whole) - len(plain) + 1) if whole[n : n + len(plain)] == plain)
    before = whole[: next(starts, 0)]
    return plain if not before or plain[:1] == before[:1] else before + plain


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, **options: Any) -> str:
    """The messages as the chat template renders them; `options` are its extra arguments.

    Templates expect the arguments of tool calls as a mapping or as JSON text, and some silently render the other form
    wrong. Whichever form a row has, the template gets the one that it renders as JSON.

    Raises:
        ValueError: the template refuses them.
    """
    from jinja2 import TemplateError

    refused: Exception | None = None
    for form in _forms(messages):
        try:
            text = tokenizer.apply_chat_template(form, tokenize=False, **options)
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            refused = refused or error
            continue
        if not any(wrong in text for wrong in _written_wrong(messages)):
            return text
        refused = refused or ValueError("it writes the arguments of tool calls in no form of JSON")
    raise ValueError(" ".join(str(refused).split())) from refused


def template_arguments(row: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The chat template's arguments besides the messages: the run's options, and a row's `tools`, `documents` and
    `chat_template_kwargs`, which may be JSON text.

    Raises:
        ValueError: one of them is not a list or mapping, nor the JSON of one.
    """
    given = {}
    for name, kind in (("tools", list), ("documents", list), ("chat_template_kwargs", dict)):
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise ValueError(f"{name!r} is not JSON: {error.msg}") from error
        if not isinstance(value, (kind, type(None), str)):
            raise ValueError(f"{name!r} is not a {kind.__name__}")
        if value:
            given |= value if kind is dict else {name: value}
    return {**options, **given}


def end_of_turn(tokenizer: PreTrainedTokenizerBase, **options: Any) -> int | None:
    """The first special token that the chat template puts after an answer; None without a template or such a token.

    Generation must stop at it, and trained answers must end with it, whatever the tokenizer's end of sequence is.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    messages = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": _ANSWER}]
    try:
        _, found, behind = render(tokenizer, messages, **options).rpartition(_ANSWER)
    except ValueError:
        return None
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"] if found else ()
    return next((token for token in ids if token in tokenizer.added_tokens_decoder), None)


def messages_of(content: object) -> Messages | None:
    """Chat messages with all their fields; None if `content` is not a list of messages.

    A message has a role, and a content that is text or a list of texts, or no content but another field such as tool
    calls. Fields that are None, which `datasets` fills in if another row has them, are dropped.
    """
    if not (isinstance(content, list) and all(map(_is_message, content))):
        return None
    return [
        {name: value for name, value in message.items() if value is not None or name == "content"}
        | {"content": message.get("content")}
        for message in content
    ]


def content_text(message: Mapping[str, Any]) -> str:
    """The text of a message; empty if it has none."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def is_unicode(value: Any) -> bool:
    """False if a text in `value` has half of a surrogate pair, which JSON can hold but no tokenizer can read."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return False
        return True
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return all(map(is_unicode, inside))


def complete(messages: Messages, system: str, suffix: str) -> Messages:
    """The messages with a system message, if they have none, and the suffix after the last user message."""
    last = max(place for place, message in enumerate(messages) if message["role"] == "user")
    content = messages[last]["content"] or ""
    longer = content + suffix if isinstance(content, str) else [*content, {"type": "text", "text": suffix}]
    asked = messages[last] | {"content": longer if suffix else content}
    messages = [*messages[:last], asked, *messages[last + 1 :]]
    if system and messages[0]["role"] not in ("system", "developer"):
        messages = [{"role": "system", "content": system}, *messages]
    return messages


def _is_message(message: object) -> bool:
    if not (isinstance(message, dict) and isinstance(message.get("role"), str) and is_unicode(message)):
        return False
    content = message.get("content")
    if content is None:
        return any(value is not None for name, value in message.items() if name not in ("role", "content"))
    return isinstance(content, str) or (isinstance(content, list) and all(map(_is_text_part, content)))


def _is_text_part(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _functions(messages: Messages) -> list[dict[str, Any]]:
    calls = [call for message in messages for call in message.get("tool_calls") or () if isinstance(call, dict)]
    functions = [call.get("function") or call for call in calls]
    return [function for function in functions if isinstance(function, dict) and "arguments" in function]


def _forms(messages: Messages) -> list[Messages]:
    """The messages with tool-call arguments as mappings, and as JSON text; unchanged if there are none."""
    if not _functions(messages):
        return [messages]
    forms = []
    for as_text in (False, True):
        form = copy.deepcopy(messages)
        for function in _functions(form):
            function["arguments"] = _as_json(function["arguments"]) if as_text else _as_mapping(function["arguments"])
        forms.append(form)
    return forms


def _as_mapping(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments) if arguments.strip() else {}
    except json.JSONDecodeError:
        return arguments


def _as_json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _written_wrong(messages: Messages) -> set[str]:
    """Strings that a rendered text must not contain: a mapping in Python's notation, and JSON text quoted again."""
    wrong = set()
    for function in _functions(messages):
        mapping = _as_mapping(function["arguments"])
        if isinstance(mapping, dict) and mapping:
            said = {json.dumps(mapping, ensure_ascii=False), json.dumps(mapping), _as_json(function["arguments"])}
            wrong |= {str(mapping), *map(json.dumps, said), *(json.dumps(text, ensure_ascii=False) for text in said)}
            wrong -= said
    return wrong
