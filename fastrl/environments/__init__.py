"""Environments by name: the other side of conversations of several turns."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from fastrl import check
from fastrl.environments.agent import AgentEnvironment
from fastrl.environments.reasoning_gym import ReasoningGymEnvironment
from fastrl.environments.tools import Call, ToolEnvironment, calculator
from fastrl.environments.verifiers import VerifiersEnvironment
from fastrl.rewards.resolve import _module
from fastrl.rollout.turns import Environment

__all__ = [
    "AgentEnvironment",
    "Call",
    "Environment",
    "ReasoningGymEnvironment",
    "ToolEnvironment",
    "VerifiersEnvironment",
    "calculator",
    "resolve_environment",
]

BUILTINS: dict[str, Callable[..., Any]] = {
    "calculator": functools.partial(ToolEnvironment, [calculator]),
    "reasoning_gym": ReasoningGymEnvironment,
    "verifiers": VerifiersEnvironment,
}


def resolve_environment(name: str, /, **options: Any) -> Callable[[], Environment]:
    """The factory of that name: a built-in one, `package.module:factory`, or `path/to/file.py:factory`.

    A factory is a class or function that takes `options` and returns an environment; it is called once per sample. A
    name with a colon runs that module's code.

    Raises:
        ValueError: there is no such factory, or it does not take these options.
    """
    op = "resolve_environment"
    if ":" not in name:
        check.choice(op, "name", name, (*BUILTINS, "package.module:factory"))
        target: Any = BUILTINS[name]
    else:
        module, _, attribute = name.rpartition(":")
        try:
            target = getattr(_module(module), attribute)
        except (ImportError, AttributeError, OSError, SyntaxError) as error:
            raise ValueError(f"{op}: name: {name!r} cannot be imported: {error}.") from error
        check.require(callable(target), op, "name", "a function or class", f"{name} = {target!r}")
    try:
        inspect.signature(target).bind(**options)
    except TypeError as error:
        known = ", ".join(inspect.signature(target).parameters) or "none"
        raise ValueError(f"{op}: options: expected some of {known} for {name}, got {error}.") from error
    return functools.partial(target, **options)
