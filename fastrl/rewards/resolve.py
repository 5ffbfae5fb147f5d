"""Rewards by name."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from fastrl import check
from fastrl.rewards.code import CodeReward
from fastrl.rewards.environment import environment
from fastrl.rewards.format import FormatReward
from fastrl.rewards.instructions import InstructionsReward
from fastrl.rewards.json_schema import JsonSchemaReward
from fastrl.rewards.judge import JudgeReward
from fastrl.rewards.language import LanguageConsistencyReward
from fastrl.rewards.math_answer import MathAnswerReward
from fastrl.rewards.model import ModelReward
from fastrl.rewards.overlong import SoftOverlongReward
from fastrl.rewards.reasoning_gym import ReasoningGymReward
from fastrl.shipped import located

BUILTINS: dict[str, Callable[..., Any]] = {
    "code": CodeReward,
    "environment": lambda: environment,
    "format": FormatReward,
    "instructions": InstructionsReward,
    "json_schema": JsonSchemaReward,
    "judge": JudgeReward,
    "language_consistency": LanguageConsistencyReward,
    "math_answer": MathAnswerReward,
    "model": ModelReward,
    "reasoning_gym": ReasoningGymReward,
    "soft_overlong": SoftOverlongReward,
}


def resolve_reward(name: str, /, **options: Any) -> Callable[..., Any]:
    """The reward of that name: a built-in one, `package.module:function`, or `path/to/file.py:function`.

    Modules are also searched for in the current folder; a file of `recipes/` that is not here is the one that comes
    with fastrl. `options` are the arguments of a built-in reward or a class, or extra keyword arguments of a function.
    A name with a colon runs that module's code.

    Raises:
        ValueError: there is no such reward, or it does not take these options.
    """
    if ":" not in name:
        check.choice("resolve_reward", "name", name, (*BUILTINS, "package.module:function"))
        return _made(name, BUILTINS[name], options)
    module_name, _, attribute = name.rpartition(":")
    try:
        target = getattr(_module(module_name), attribute)
    except (ImportError, AttributeError, OSError, SyntaxError) as error:
        raise ValueError(f"resolve_reward: name: {name!r} cannot be imported: {error}.") from error
    check.require(callable(target), "resolve_reward", "name", "a function or class", f"{name} = {target!r}")
    if inspect.isclass(target):
        return _made(name, target, options)
    return functools.partial(target, **options) if options else target


def _module(name: str) -> ModuleType:
    """A module, by its name or by its file, whose name it then gets."""
    if name.endswith(".py"):
        path = Path(located(name)).expanduser().resolve()
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} is no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module  # classes of the file are looked up here
        spec.loader.exec_module(module)
        return module
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:  # a console script has its own folder there instead
        sys.path.append(here)
    return importlib.import_module(name)


def _made(name: str, target: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    try:
        inspect.signature(target).bind(**options)
    except TypeError as error:
        known = ", ".join(inspect.signature(target).parameters) or "none"
        raise ValueError(f"resolve_reward: options: expected some of {known} for {name}, got {error}.") from error
    return target(**options)
