"""Recipes: YAML files of a `TrainConfig`, read strictly."""

from __future__ import annotations

import types
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from fastrl.trainer.build import build_algorithm
from fastrl.trainer.config import ConfigError, TrainConfig

RENAMED = {  # keys of older recipes
    "tokens_per_batch": "max_tokens_per_microbatch",
    "batch": "rows_per_step",
    "prompts": "prompts_per_step",
    "samples": "group_size",
}


def load_recipe(path: str | Path) -> TrainConfig:
    """Reads a YAML recipe. Unknown keys and wrong types are errors that name the key, the nearest one, and the file.

    Raises:
        ConfigError: the file is missing, not YAML, or not a recipe.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such recipe. `recipes/` has some to start from.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected text in UTF-8, got {error}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    data = {} if data is None else data
    config = from_dict(TrainConfig, data, str(path))
    try:
        build_algorithm(config)  # refuses what the algorithm does not have
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    return config


def from_dict(cls: type, data: Any, where: str) -> Any:
    """An instance of dataclass `cls` from plain YAML values; `where` is named in errors."""
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected a mapping of settings, got {type(data).__name__}.")
    hints = get_type_hints(cls)
    values = {}
    for key, value in data.items():
        if RENAMED.get(key) in hints:
            raise ConfigError(f"{where}: {key}: it is called {RENAMED[key]!r} now.")
        if key not in hints:
            near = get_close_matches(str(key), hints, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(hints)}."
            raise ConfigError(f"{where}: {key}: unknown key.{hint}")
        values[key] = _convert(hints[key], value, f"{where}: {key}")
    missing = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    for name in missing:
        if name not in values:
            raise ConfigError(f"{where}: {name}: missing.")
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return from_dict(hint, value, where)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (only,) = (a for a in args if a is not type(None))
        return _convert(only, value, where)
    if origin is Literal:
        if value not in args:
            near = get_close_matches(str(value), map(str, args), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{where}: expected one of {', '.join(map(str, args))}, got {value!r}.{hint}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{where}: expected a list, got {value!r}.")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) != len(value):
            raise ConfigError(f"{where}: expected {len(kinds)} values, got {len(value)}.")
        return tuple(_convert(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: expected a mapping, got {value!r}.")
        return dict(value)
    return _scalar(hint, value, where)


def _scalar(kind: type, value: Any, where: str) -> Any:
    if kind is float and isinstance(value, str):
        # YAML 1.1 reads 1e-5, without a dot, as text.
        try:
            return float(value)
        except ValueError:
            pass
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{where}: expected {kind.__name__}, got {value!r}.")
    return value
