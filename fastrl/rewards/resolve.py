"""Rewards by name."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from fastrl import check
from fastrl.rewards.format import FormatReward
from fastrl.rewards.math_answer import MathAnswerReward
from fastrl.rewards.model import ModelReward
from fastrl.rewards.overlong import SoftOverlongReward
from fastrl.rewards.reasoning_gym import ReasoningGymReward

BUILTINS: dict[str, Callable[..., Any]] = {
    "format": FormatReward,
    "math_answer": MathAnswerReward,
    "model": ModelReward,
    "reasoning_gym": ReasoningGymReward,
    "soft_overlong": SoftOverlongReward,
}


def resolve_reward(name: str, **options: Any) -> Callable[..., Any]:
    """The reward of that name: a built-in one, or `package.module:function` from anything that can be imported.

    `options` are the arguments of a built-in reward, of a class, or further keyword arguments of a function. A name
    with a colon runs that module's code.

    Raises:
        ValueError: there is no such reward, or it does not take these options.
    """
    if ":" not in name:
        check.choice("resolve_reward", "name", name, (*BUILTINS, "package.module:function"))
        return _made(name, BUILTINS[name], options)
    module_name, _, attribute = name.partition(":")
    try:
        target = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"resolve_reward: name: {name!r} cannot be imported: {error}.") from error
    check.require(callable(target), "resolve_reward", "name", "a function or class", f"{name} = {target!r}")
    if inspect.isclass(target):
        return _made(name, target, options)
    return functools.partial(target, **options) if options else target


def _made(name: str, target: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    try:
        inspect.signature(target).bind(**options)
    except TypeError as error:
        known = ", ".join(inspect.signature(target).parameters) or "none"
        raise ValueError(f"resolve_reward: options: expected some of {known} for {name}, got {error}.") from error
    return target(**options)
