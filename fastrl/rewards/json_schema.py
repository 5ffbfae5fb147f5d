"""Whether a completion is JSON that fits a schema."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NoReturn

from fastrl import check
from fastrl.rewards.extract import answer_tag, completion_text
from fastrl.types import Prompt

BLOCK = re.compile(r"```[ \t]*(?:json)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
DEEPEST = 100  # nesting; a validator walks it by recursion


@dataclass(frozen=True)
class JsonSchemaReward:
    """1 if the completion is JSON that is valid under the prompt's schema (https://json-schema.org), else 0: a verifier
    of structured output. None without a schema.

    The JSON is the last <answer>, else the last ``` block, else the whole completion after any </think>; text around it
    scores 0. NaN, Infinity and a name given twice are no JSON. References to schemas elsewhere are not followed.

    Args:
        schema: the column of the schema, a mapping or JSON text; its `$schema` names the draft, by default 2020-12.
        expected: a column with the JSON value that the completion must equal besides, as mapping, list or JSON text.
    """

    schema: str = "schema"
    expected: str = "expected"

    __name__ = "json_schema"

    def __post_init__(self) -> None:
        if find_spec("jsonschema") is None:
            raise ModuleNotFoundError("json_schema: jsonschema is not installed. Run `pip install jsonschema`.")

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """One score per completion."""
        do = "Name it with the option schema."
        named = ", ".join(columns) or "none"
        check.require(self.schema in columns, "json_schema", "columns", f"a column {self.schema!r}", named, do)
        total = len(completions)
        rows = zip(columns[self.schema], columns.get(self.expected, [None] * total), strict=True)
        return [
            self._score(completion_text(one), schema, expected)
            for one, (schema, expected) in zip(completions, rows, strict=True)
        ]

    def check_prompts(self, prompts: Iterable[Prompt]) -> None:
        """Refuses prompts whose schema is none, or which the expected value does not fit.

        Raises:
            ValueError: with the prompt's index.
        """
        for prompt in prompts:
            where = f"json_schema: prompt {prompt.index}"
            schema, expected = prompt.columns.get(self.schema), prompt.columns.get(self.expected)
            if schema is None:
                continue
            try:
                validator = _validator(schema)
                fits = expected is None or validator.is_valid(_value(expected))
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            check.require(fits, where, self.expected, "a value that fits the schema", f"{expected!r:.80}")

    def _score(self, text: str, schema: Any, expected: Any) -> float | None:
        if schema is None:
            return None
        validator = _validator(schema)
        try:
            value = strict_json(_answer(text))
        except (ValueError, RecursionError):
            return 0.0
        if depth(value) > DEEPEST or not validator.is_valid(value):
            return 0.0
        # As JSON has it: 1 and 1.0 are equal, 1 and true are not.
        return float(expected is None or _validator({"const": _value(expected)}).is_valid(value))


def strict_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, or a name occurs twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name occurs twice")
        return dict(pairs)

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)


def depth(value: Any) -> int:
    """How deeply a JSON value is nested, up to `DEEPEST` + 1."""
    level, deep = [value], 0
    while level and deep <= DEEPEST:
        level = [
            item
            for one in level
            if isinstance(one, (dict, list))
            for item in (one.values() if isinstance(one, dict) else one)
        ]
        deep += 1
    return deep


def _answer(text: str) -> str:
    text = text.rpartition("</think>")[2]
    blocks = BLOCK.findall(text)
    tagged = answer_tag(text)
    return tagged if tagged is not None else blocks[-1] if blocks else text


def _value(given: Any) -> Any:
    return strict_json(given) if isinstance(given, str) else given


def _validator(given: Any) -> Any:
    """The validator of a schema.

    Raises:
        ValueError: it is no schema.
    """
    import jsonschema
    import referencing

    try:
        schema = _value(given)
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        kind.check_schema(schema, format_checker=kind.FORMAT_CHECKER)  # ty: ignore[unknown-argument]  patterns too
    except (ValueError, TypeError, AttributeError, jsonschema.SchemaError) as error:
        got = f"{given!r:.80} ({' '.join(str(error).split())[:120]})"
        raise ValueError(check.sentence("json_schema", "schema", "a JSON schema", got)) from error
    check.require(isinstance(schema, (Mapping, bool)), "json_schema", "schema", "a JSON schema", f"{given!r:.80}")
    return kind(schema, registry=referencing.Registry())  # without one it would fetch references from the network
