"""Lists what you can train with: the recipes in a folder and the table of algorithms, for the terminal or as a page."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastrl.algorithms import ALGORITHMS, Kind
from fastrl.algorithms.registry import ROWS
from fastrl.shipped import recipes_folder

if TYPE_CHECKING:
    from rich.console import Console

HEADER = ("algorithm", "what it is", "paper", "needs")
INTRODUCTION = """# Algorithms

Values of a recipe's `algorithm`, written by `fastrl recipes --markdown`. `loss` changes fields of a preset, as in
`loss: {surrogate.high: 0.28}`. A policy loss has a KL, and with it a reference model, only if `loss.kl` is named.
With `source: rollouts`, algorithms that do not learn from rewards take sampled completions too: the best and the worst
of each group as a pair, those that score `rollout.threshold` or more as demonstrations, or all, labelled by that
threshold.
"""


def print_menu(console: Console, folder: Path) -> None:
    """Prints all tables."""
    shipped = folder == recipes_folder()
    recipes = [(path.stem if shipped else path.name, *about) for path, *about in about_recipes(folder)]
    if recipes:
        title = "Recipes, for `fastrl train RECIPE`" if shipped else f"Recipes in {folder}"
        _print(console, title, ("recipe", "algorithm", "about"), recipes)
    for kind, rows in _by_kind():
        _print(console, f"Algorithms that learn from {ROWS[kind]}", HEADER, rows)


def page() -> str:
    """The algorithms in Markdown."""
    lines = [INTRODUCTION]
    for kind, rows in _by_kind():
        lines += [f"## From {ROWS[kind]}", ""]
        cells = [HEADER, ("---",) * len(HEADER), *((f"`{name}`", line, _link(of), do) for name, line, of, do in rows)]
        lines += [f"| {' | '.join(row)} |" for row in cells] + [""]
    return "\n".join(lines)


def _by_kind() -> Iterator[tuple[Kind, list[tuple[str, ...]]]]:
    for kind in ROWS:
        of_kind = {name: entry for name, entry in ALGORITHMS.items() if entry.kind == kind}
        yield kind, [(name, one.line, one.paper, ", ".join(one.needs)) for name, one in of_kind.items()]


def _print(console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in header:
        table.add_column(name, style="dim" if name == "paper" else None, overflow="fold")
    for row in rows:
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    console.print(table)
    console.print()


def about_recipes(folder: Path) -> Iterator[tuple[Path, str, str]]:
    """(file, algorithm, first sentence of the leading comment) of each recipe in a folder."""
    for path in sorted(folder.glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        comment = " ".join(line.lstrip("# ") for line in re.findall(r"\A(?:#.*\n)*", text)[0].splitlines())
        algorithms = re.findall(r"^ *algorithm:\s*(\w+)", text, re.MULTILINE)  # several in a recipe of stages
        yield path, ", ".join(algorithms), re.split(r"(?<=\w)[.:] ", comment)[0].rstrip(".")


def _link(paper: str) -> str:
    if paper.startswith("arXiv:"):
        return f"[{paper}](https://arxiv.org/abs/{paper.removeprefix('arXiv:')})"
    return f"[{paper.rsplit('/', 1)[-1]}]({paper})"
