"""Environments of Prime Intellect's `verifiers` (https://github.com/PrimeIntellect-ai/verifiers), in its API with
`load_environment` and rubrics: 0.1, or `verifiers.legacy` of 0.2 and 0.3.

The environment runs its own rollout; its client hands what it would send to a server to `AgentEnvironment`.
"""

from __future__ import annotations

import functools
import importlib
import json
import time
import uuid
from collections.abc import Mapping
from typing import Any

from fastrl.check import choice, require
from fastrl.data.verifiers import OP, classic, loaded
from fastrl.environments.agent import AgentEnvironment, Ask
from fastrl.environments.tools import PARSERS, Call
from fastrl.rollout.turns import EnvironmentFault

GIVEN = ("answer", "info", "task", "example_id")  # columns that environments read, besides the prompt


class VerifiersEnvironment(AgentEnvironment):
    """One rollout of a `verifiers` environment, and its rubric's reward; metrics are the rubric's functions.

    Args:
        name: an environment that is installed, as `load_environment` takes it. `task.source: verifiers:NAME` are its
            rows.
        parser: how the policy calls tools, a name of `fastrl.environments.tools.PARSERS`.
        options: arguments of the environment's `load_environment`.

    Raises:
        ValueError: `verifiers` is absent or has another API, or the rubric scores whole groups.
    """

    def __init__(self, name: str, parser: str = "hermes", **options: Any) -> None:
        choice(OP, "parser", parser, PARSERS)
        super().__init__(self._rollout)
        self.environment, self.parser = loaded(name, json.dumps(options, sort_keys=True)), parser
        grouped = self.environment.rubric.has_group_rewards
        require(not grouped, OP, "rubric", "rewards of single rollouts", "one that compares a group")
        self.metrics: dict[str, float] = {}

    def schemas(self) -> list[dict[str, Any]]:
        """The tools' JSON schemas, for the chat template."""
        tools = getattr(self.environment, "tool_defs", None) or ()
        return [{"type": "function", "function": _plain(tool)} for tool in tools]

    async def _rollout(self, row: Mapping[str, Any], ask: Ask) -> float:
        api = classic()
        given = {"prompt": row["prompt"]} | {name: row[name] for name in GIVEN if row.get(name) is not None}
        state = await self.environment.rollout(given, _client(api)(ask, self.parser), "policy", {})
        if state.get("error") is not None:
            raise EnvironmentFault(f"{type(state['error']).__name__}: {state['error']}")
        await self.environment.rubric.score_rollout(state)
        self.metrics = {name: float(value) for name, value in (state["metrics"] or {}).items()}
        return float(state["reward"])


@functools.lru_cache(maxsize=1)
def _client(api: Any) -> type:
    """The class of a client whose answers are the policy's; made late, as its base is in an optional package."""
    types = importlib.import_module(f"{api.__name__}.types")
    base = importlib.import_module(f"{api.__name__}.clients").Client

    class Policy(base):
        def __init__(self, ask: Ask, parser: str) -> None:
            super().__init__(None)
            self._ask, self._parser = ask, PARSERS[parser]

        async def get_response(self, prompt: Any, model: str, sampling_args: Any, tools: Any = None, **_: Any) -> Any:
            text = await self._ask([_plain(message) for message in prompt])
            calls = self._parser(text, [tool.name for tool in tools or ()]) if tools else []
            made = [types.ToolCall(id=uuid.uuid4().hex, name=call.name, arguments=_arguments(call)) for call in calls]
            message = types.ResponseMessage(
                content=text, tool_calls=made or None, is_truncated=False,
                finish_reason="tool_calls" if made else "stop",
            )  # fmt: skip
            return types.Response(id=uuid.uuid4().hex, created=int(time.time()), model=model, message=message)

        async def _unused(self, *_: Any, **__: Any) -> Any:
            raise NotImplementedError("the policy is asked without a native client")

        setup_client = to_native_tool = to_native_prompt = get_native_response = _unused
        raise_from_native_response = from_native_response = _unused

        async def close(self) -> None:
            pass

    return Policy


def _arguments(call: Call) -> str:
    """As JSON; of a call that is none, what is wrong with it, which the environment then fails to read and says so."""
    return call.error or (call.arguments if isinstance(call.arguments, str) else json.dumps(dict(call.arguments)))


def _plain(value: Any) -> dict[str, Any]:
    """A message or a tool as a mapping without empty fields."""
    found = value.model_dump() if hasattr(value, "model_dump") else dict(value)
    return {name: one for name, one in found.items() if one is not None}
