"""Recipes: YAML files that hold a `TrainConfig`, read strictly."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from fastrl.shipped import recipe_file
from fastrl.trainer.build import build_algorithm
from fastrl.trainer.config import TrainConfig
from fastrl.typed import ConfigError, from_dict, without_none

START = (
    "A file with the line `algorithm: grpo` is one, whose other settings `fastrl train FILE --print` shows; "
    "`fastrl recipes` lists those that come with fastrl, and the algorithms."
)


class _Refused(yaml.YAMLError):
    """YAML would read something differently from how it looks."""


class Strict(yaml.SafeLoader):
    """YAML without its surprises: duplicate keys, where the last would win, and numbers in bases other than ten."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As the base class.

        Raises:
            yaml.YAMLError: a key appears twice.
        """
        seen: dict[Any, int] = {}
        for key, _ in node.value:
            name, line = self.construct_object(key, deep=True), key.start_mark.line + 1
            if name in seen:
                raise _Refused(f"line {line}: {name}: a second time, after line {seen[name]}.")
            seen[name] = line
        return super().construct_mapping(node, deep)

    def whole_number(self, node: yaml.ScalarNode) -> int:
        """A decimal integer; YAML 1.1 would read 010 as 8 and 1:30 as 90, so these are refused."""
        text = str(node.value).replace("_", "")
        if not text.lstrip("+-").isdecimal() or (len(text.lstrip("+-")) > 1 and text.lstrip("+-")[0] == "0"):
            line = node.start_mark.line + 1
            raise _Refused(f"line {line}: {node.value}: expected a whole number in digits that do not begin with 0.")
        return int(text)


Strict.add_constructor("tag:yaml.org,2002:int", Strict.whole_number)


def load_recipe(path: str | Path) -> TrainConfig:
    """Reads a YAML recipe, given by its path or by its name in `fastrl recipes`. Unknown keys and wrong types are
    errors that name the file, the key and the nearest match.

    Raises:
        ConfigError: the file is missing, not YAML, or not a recipe.
    """
    path = recipe_file(path)
    data = load_yaml(path)
    if isinstance(data, dict) and "stages" in data:
        do = "`fastrl train` runs all; elsewhere name one stage's: config.yaml in its folder."
        raise ConfigError(f"{path}: stages: expected a recipe of one run, got several. {do}")
    try:
        config = from_dict(TrainConfig, data, "")
        build_algorithm(config)  # refuses what the algorithm does not have
    except ValueError as error:
        message = str(error).removeprefix(": ")
        raise ConfigError(f"{path}{_line(path, message)}: {message}") from None
    return config


def load_yaml(path: Path) -> Any:
    """The values in a YAML file, read strictly.

    Raises:
        ConfigError: the file is missing, empty or not YAML.
    """
    try:
        data = Strict(path.read_text(encoding="utf-8")).get_single_data()
    except _Refused as error:
        raise ConfigError(f"{path}, {error}") from None
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such recipe. {START}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected text in UTF-8, got {error}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if data is None:
        raise ConfigError(f"{path}: the recipe is empty. {START}")
    return data


def _line(path: Path, message: str) -> str:
    """ ", line N" of the setting that a message is about: it begins with the names on the way there."""
    node, line = Strict(path.read_text(encoding="utf-8")).get_single_node(), 0
    for name in re.split(r"[:.\[\],\s]+", message.removeprefix("TrainConfig: ")):
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if str(key.value).split(".")[0] == name]
        elif isinstance(node, yaml.SequenceNode) and name.isdecimal():
            found = [(value, value) for value in node.value[int(name) : int(name) + 1]]
        else:
            break
        if not found:
            break
        key, node = found[0]
        line = key.start_mark.line + 1
    return f", line {line}" if line else ""


def with_flags(config: TrainConfig, flags: Sequence[str]) -> TrainConfig:
    """The configuration with flags applied: `--a.b value` or `--a.b=value`, for every field, entry of a mapping
    (`--task.options.min_terms 2`) and item of a list (`--rewards.0.name format`).

    A list takes several values. Values are read as YAML, except in text fields.

    Raises:
        ConfigError: a flag names no field, or its value has the wrong type.
    """
    values = plain(asdict(config))
    for flag, given in _by_flag(flags):
        where, keys = f"--{flag}", flag.replace("-", "_").split(".")
        target, hint = values, TrainConfig
        for depth, key in enumerate(keys):
            target, key, hint = _step_into(target, key, hint, where, last=depth == len(keys) - 1)
            if depth < len(keys) - 1:
                target = target[key]
        target[key] = _value(hint, given, where)
    return from_dict(TrainConfig, values, "flags")


def _by_flag(flags: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """(name, values that follow it) of each flag."""
    found: list[tuple[str, list[str]]] = []
    for word in flags:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            found.append((name, [value] if equals else []))
        elif found:
            found[-1][1].append(word)
        else:
            raise ConfigError(f"{word}: expected a flag, as in --steps 10.")
    yield from found


def _step_into(target: Any, key: str, hint: Any, where: str, *, last: bool) -> tuple[Any, Any, Any]:
    """One step along a flag's dotted name: (container, key in it, type hint of the value there)."""
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        if key not in hints:
            near = get_close_matches(key, hints, n=1)
            dotted = where[2:].replace("-", "_").split(".")
            dotted[dotted.index(key)] = near[0] if near else key
            hint_text = f" Did you mean --{'.'.join(dotted)}?" if near else f" Known: {', '.join(hints)}."
            raise ConfigError(f"{where}: no such flag.{hint_text}")
        if not last and target.get(key) is None:
            target[key] = [] if get_origin(hints[key]) is tuple else {}
        return target, key, without_none(hints[key])
    if get_origin(hint) is dict:
        if not isinstance(target, dict):
            raise ConfigError(f"{where}: no such flag: what is before .{key} is a single value.")
        if not last:
            target.setdefault(key, {})
        return target, key, get_args(hint)[1] if last else hint
    if get_origin(hint) is tuple:
        if not (key.isdecimal() and int(key) <= len(target)):
            raise ConfigError(f"{where}: expected a number up to {len(target)} in the place of {key}.")
        if int(key) == len(target):
            target.append({})
        return target, int(key), get_args(hint)[0]
    raise ConfigError(f"{where}: no such flag: what is before .{key} is a single value.")


def _value(hint: Any, given: list[str], where: str) -> Any:
    """The value that the words after a flag stand for."""
    if get_origin(hint) is tuple:
        only = given[0] if len(given) == 1 and given[0].startswith("[") else None
        return [_value(get_args(hint)[0], [word], where) for word in given] if only is None else _yaml(only, where)
    if not given:
        if hint is bool:
            return True
        raise ConfigError(f"{where}: expected a value.")
    if len(given) > 1:
        raise ConfigError(f"{where}: expected one value, got {' '.join(given)}.")
    if hint is str or (get_origin(hint) is Literal and given[0] in get_args(hint)):
        return given[0]
    return _yaml(given[0], where)


def _yaml(text: str, where: str) -> Any:
    try:
        return Strict(text).get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from None


def plain(value: Any) -> Any:
    """The value with tuples as lists, as YAML has them."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def shown(config: TrainConfig) -> str:
    """The full recipe as YAML, ready to run."""
    return yaml.safe_dump(plain(asdict(config)), sort_keys=False, allow_unicode=True)
