"""Tools: Python functions that the policy calls in its text, and whose results come back as messages."""

from __future__ import annotations

import ast
import inspect
import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastrl.check import choice, require
from fastrl.types import Messages

OP = "tools"
_CALL = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)
_PLAIN = re.compile(r"(?<![\w.])([A-Za-z_]\w*)\(([^()\n]*(?:\([^()\n]*\)[^()\n]*)*)\)")


@dataclass(frozen=True)
class Call:
    """A call that the policy wrote; `error` says why it cannot be made."""

    name: str
    arguments: Mapping[str, Any] | str  # by name, or the text of the only one
    error: str = ""


Parser = Callable[[str, Sequence[str]], list[Call]]


def hermes(text: str, names: Sequence[str]) -> list[Call]:
    """Calls as Hermes and Qwen models write them: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

    What is not such JSON is a call with an error, which the policy is told of.
    """
    calls = []
    for found in _CALL.finditer(text):
        try:
            value = json.loads(found[1])
        except (json.JSONDecodeError, RecursionError) as error:
            calls.append(Call("", {}, f"the call is not JSON: {error}"))
            continue
        arguments = value.get("arguments", {}) if isinstance(value, dict) else None
        if isinstance(arguments, str):  # some models write them as JSON text
            try:
                arguments = json.loads(arguments)
            except (json.JSONDecodeError, RecursionError):
                arguments = None
        good = isinstance(arguments, dict) and isinstance(value.get("name"), str)
        calls.append(Call(value["name"], arguments) if good else Call("", {}, 'a call has "name" and "arguments"'))
    return calls


def plain(text: str, names: Sequence[str]) -> list[Call]:
    """Calls in plain text: `calculator(12 + 30)`, with the text of the only argument; only of the tools' names."""
    return [Call(found[1], found[2].strip().strip("\"'")) for found in _PLAIN.finditer(text) if found[1] in names]


PARSERS: dict[str, Parser] = {"hermes": hermes, "plain": plain}


class ToolEnvironment:
    """Runs the tools that a turn calls; a turn without a call ends the conversation.

    Each result is one message with the role `tool`. What a tool raises goes back to the policy as `Error: ...`, as does
    a call that cannot be made; both count in the metric `call_failures`.

    Args:
        tools: functions with type hints and a docstring in Google's style, of which the chat template gets the schema.
        parser: one of `PARSERS`, or a function from a turn's text and the tools' names to the calls in it.
        role: role of the messages with results.
    """

    def __init__(
        self, tools: Sequence[Callable[..., Any]], parser: str | Parser = "hermes", role: str = "tool"
    ) -> None:
        if isinstance(parser, str):
            choice(OP, "parser", parser, PARSERS)
        named: Any = tools  # functions have names
        self.tools = {tool.__name__: tool for tool in named}
        require(0 < len(self.tools) == len(tools), OP, "tools", "functions of different names", list(self.tools))
        self.parse: Parser = PARSERS[parser] if isinstance(parser, str) else parser
        self.role = role
        self.metrics = {"calls": 0.0, "call_failures": 0.0}

    def reset(self, row: Mapping[str, Any]) -> None:
        """Begins anew."""
        self.metrics = {"calls": 0.0, "call_failures": 0.0}

    async def step(self, completion: str) -> tuple[Messages, float | None, bool]:
        """The results of the turn's calls, in order; no reward, and the end if there are none."""
        calls = self.parse(completion, list(self.tools))
        results = [await self._run(call) for call in calls]
        return [{"role": self.role, "content": result} for result in results], None, not calls

    async def _run(self, call: Call) -> str:
        self.metrics["calls"] += 1
        tool = self.tools.get(call.name)
        try:
            require(not call.error, "call", "JSON", "a call with a name and arguments", call.error)
            require(tool is not None, "call", "name", f"one of {', '.join(self.tools)}", repr(call.name))
            given = call.arguments
            result = tool(given) if isinstance(given, str) else tool(**given)
            if inspect.isawaitable(result):
                result = await result
        except Exception as error:
            self.metrics["call_failures"] += 1
            return f"Error: {error}"
        return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)

    def schemas(self) -> list[dict[str, Any]]:
        """The tools' JSON schemas, for the chat template.

        Raises:
            ValueError: a tool lacks type hints or a docstring.
        """
        from transformers.utils import get_json_schema
        from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

        try:
            return [get_json_schema(tool) for tool in self.tools.values()]
        except (DocstringParsingException, TypeHintParsingException) as error:
            raise ValueError(f"{OP}: tools: expected type hints and a docstring with Args: {error}") from error


_LARGEST = 10**15
_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip


def calculator(expression: str) -> str:
    """Computes an arithmetic expression.

    Args:
        expression: Numbers, + - * / // % and parentheses, such as 12 * (3 + 4).
    """
    require(len(expression) <= 200, "calculator", "expression", "at most 200 characters", len(expression))
    value = _value(ast.parse(expression.strip().replace("^", "**"), mode="eval").body)
    return str(int(value) if value == int(value) else round(value, 6))


def _value(node: ast.AST) -> float:
    """The value of an expression that is read, never run as code."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value: Any = node.value
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        value = _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    elif isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        value = _OPERATORS[type(node.op)](_value(node.operand))
    else:
        raise ValueError("expected numbers, + - * / // % and parentheses")
    require(abs(value) <= _LARGEST, "calculator", "expression", f"values up to {_LARGEST:.0e}", "more")
    return value
