"""Writes the pages that are made from the code: docs/algorithms.md and docs/recipes/index.md.

python docs/generate.py
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from fastrl.menu import about_recipes, page
from fastrl.trainer.config import TrainConfig
from fastrl.typed import without_none

DOCS = Path(__file__).resolve().parent
INTRODUCTION = """# Recipes

Written by `python docs/generate.py`.

`fastrl train NAME` runs one from any folder; `fastrl train NAME --print` shows it in full. A recipe of your own is a
YAML file with the fields below; each is a flag too, as in `--optimizer.lr 1e-5`. The pages of this section say what
some of them found.
"""
FIELDS = """## Fields

A section is a mapping in YAML; its heading says where it belongs.
"""


def recipes_page() -> str:
    """All recipes, and all fields of one."""
    lines = [INTRODUCTION, "| recipe | algorithm | about |", "| --- | --- | --- |"]
    for path, algorithm, about in about_recipes(DOCS.parent / "recipes"):
        lines.append(f"| [{path.stem}](../../recipes/{path.name}) | `{algorithm}` | {about} |")
    lines += ["", FIELDS]
    for title, values in _sections(TrainConfig, ""):
        lines += [f"### {title}", "", "| field | default | |", "| --- | --- | --- |"]
        lines += [f"| `{name}` | {_shown(default)} | {about} |" for name, default, about in values]
        lines.append("")
    return "\n".join(lines)


def _sections(cls: type, where: str) -> Iterator[tuple[str, list[tuple[str, Any, str]]]]:
    """(heading, (name, default, description) of its fields), those of nested dataclasses after it."""
    hints, about, own, nested = get_type_hints(cls), _descriptions(cls), [], []
    for field in fields(cls):
        hint = without_none(hints[field.name])
        inside = get_args(hint)[0] if get_origin(hint) is tuple else hint
        if is_dataclass(inside):
            nested.append((f"{where}{field.name}", inside))
        if not is_dataclass(hint):
            own.append((field.name, _default(field), about[field.name]))
    yield where.rstrip(".") or "The run", own
    for name, inside in nested:
        yield from _sections(inside, f"{name}.")


def _descriptions(cls: type) -> dict[str, str]:
    """The string under each field of a dataclass, in one line."""
    (body,) = (node.body for node in ast.parse(inspect.getsource(cls)).body if isinstance(node, ast.ClassDef))
    found = {}
    for field, after in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            found[field.target.id] = " ".join(str(after.value.value).split()).replace("|", "\\|")
    return found


def _default(field: Field) -> Any:
    return field.default_factory() if field.default is MISSING else field.default


def _shown(value: Any) -> str:
    """A default as YAML has it."""
    if isinstance(value, tuple) and value and is_dataclass(value[0]):
        return "one with its defaults"
    if isinstance(value, bool) or value is None:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return "empty" if value == "" else f"`{value}`"


PAGES = {"algorithms.md": page, "recipes/index.md": recipes_page}

if __name__ == "__main__":
    for name, make in PAGES.items():
        (DOCS / name).write_text(make(), encoding="utf-8")
        print(f"wrote {DOCS / name}", file=sys.stderr)
