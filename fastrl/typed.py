"""Converts plain YAML values to typed dataclasses; anything that does not fit is refused in one sentence."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

RENAMED = {  # keys of older recipes
    "tokens_per_batch": "max_tokens_per_microbatch",
    "batch": "rows_per_step",
    "prompts": "prompts_per_step",
    "samples": "group_size",
}


class ConfigError(ValueError):
    """A recipe or flag is invalid; the message is one sentence."""


def from_dict(cls: type[Any], data: Any, where: str) -> Any:
    """An instance of dataclass `cls` from plain YAML values; errors name `where`."""
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected a mapping of settings, got {type(data).__name__}.")
    hints = get_type_hints(cls)
    values = {}
    for key, value in data.items():
        if RENAMED.get(key) in hints:
            raise ConfigError(f"{where}: {key}: it is called {RENAMED[key]!r} now.")
        if key not in hints:
            raise ConfigError(f"{where}: {key}: {_nearest(str(key), list(hints))}")
        values[key] = convert(hints[key], value, f"{where}: {key}")
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


def nested(changes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Changes to a dataclass's fields, with dotted names such as `surrogate.low` expanded to nested mappings.

    Raises:
        ValueError: a field is changed twice.
    """
    found: dict[str, Any] = {}
    for name, value in changes.items():
        *path, last = str(name).split(".")
        target = found
        for key in path:
            target = target.setdefault(key, {})
            if not isinstance(target, dict):
                raise ValueError(f"{where}.{name}: {key} has a value already.")
        if isinstance(value, Mapping):
            value = nested(value, f"{where}.{name}")
            if isinstance(target.get(last), dict) and not target[last].keys() & value.keys():
                value = target.pop(last) | value
        if last in target:
            raise ValueError(f"{where}.{name}: a second time.")
        target[last] = value
    return found


def changed(spec: T, changes: Mapping[str, Any], where: str) -> T:
    """A frozen dataclass with these changes.

    A field that is itself a dataclass takes a mapping of its fields. The key `name` in the mapping, or a name instead
    of it, chooses another class: `surrogate: {name: cispo, ratio_max: 5}`, `transform: log_odds`.

    Raises:
        ConfigError: there is no such field, or its value has the wrong type.
    """
    hints, values = get_type_hints(type(spec)), {}
    for key, value in changes.items():
        if key not in hints or not any(one.init for one in fields(spec) if one.name == key):
            raise ConfigError(f"{where}.{key}: {_nearest(key, [one.name for one in fields(spec) if one.init])}")
        values[key] = _field(hints[key], getattr(spec, key), value, f"{where}.{key}")
    try:
        return replace(spec, **values)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def _field(hint: Any, current: Any, value: Any, where: str) -> Any:
    """A field's new value, given its old one."""
    kinds = {snake(kind.__name__): kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)}
    if not kinds or (value is None and type(None) in get_args(hint)):
        return convert(hint, value, where)
    if isinstance(value, str) and len(kinds) > 1:
        value = {"name": value}
    if not isinstance(value, Mapping):
        of = " or ".join(f"{name} ({', '.join(one.name for one in fields(kind))})" for name, kind in kinds.items())
        raise ConfigError(f"{where}: expected a mapping, of {of}, got {value!r}.")
    rest = dict(value)
    name = rest.pop("name", snake(type(current).__name__) if current is not None else next(iter(kinds)))
    if snake(str(name)) not in kinds:
        raise ConfigError(f"{where}.name: expected one of {', '.join(kinds)}, got {name!r}.")
    kind = kinds[snake(str(name))]
    return changed(current, rest, where) if type(current) is kind else from_dict(kind, rest, where)


def snake(name: str) -> str:
    """A class name as recipes write it: LogOdds is log_odds."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _nearest(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return "unknown key." + (f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(known)}.")


def without_none(hint: Any) -> Any:
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    return kinds[0] if get_origin(hint) in (Union, types.UnionType) and len(kinds) == 1 else hint


def convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return from_dict(hint, value, where)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (only,) = (a for a in args if a is not type(None))
        return convert(only, value, where)
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
        return tuple(convert(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: expected a mapping, got {value!r}.")
        return dict(value)
    return _scalar(hint, value, where)


def _scalar(kind: type, value: Any, where: str) -> Any:
    if kind is float and isinstance(value, str):
        # YAML 1.1 reads 1e-5, which has no dot, as text.
        try:
            return float(value)
        except ValueError:
            pass
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{where}: expected {kind.__name__}, got {value!r}.")
    return value
