"""A self-contained HTML report of a run: results, curves, what the model wrote, and how to repeat it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from fastrl.files import replace_text
from fastrl.monitor.charts import WINDOW, charts, rolling
from fastrl.monitor.records import Evaluation, Record, RunRecord, read_run
from fastrl.monitor.units import duration, fixed, number
from fastrl.monitor.untrusted import clean

SHOWN_PROMPTS = 3  # of a training step, with the best and the worst completion of each
SHOWN_PAIRS = 2  # held-out prompts of each kind of change
LONGEST = 4000  # characters of a completion that the page carries


def write_report(run_dir: Path) -> Path:
    """Writes report.html into `run_dir`, finished run or not, and returns its path.

    The page loads nothing: styles and pictures are embedded. Everything a model wrote is cleaned and escaped.

    Raises:
        ValueError: `run_dir` holds no run.
    """
    run = read_run(Path(run_dir))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fastrl.monitor", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.jinja").render(
        run=run,
        verdict=verdict(run),
        subtitle=_subtitle(run),
        charts=charts(run),
        training=[(step, _training_samples(samples, full_marks(run))) for step, samples in run.completions.items()],
        held_out=held_out(run),
        judged=judged(run),
        metrics=_metric_rows(run),
        window=WINDOW,
        config=flatten(run.config),
        environment=flatten(run.environment),
    )
    path = Path(run_dir) / "report.html"
    replace_text(path, page)
    return path


def verdict(run: RunRecord) -> str:
    """The run in one sentence: `Held-out accuracy 0.31 → 0.74 (greedy), 45 steps, 5 min 12 s on 2 cores`."""
    done = run.steps[-1] if run.steps else 0
    steps = f"{done} steps" if done == run.total_steps else f"{done} of {run.total_steps} steps"
    where = _where(run)
    return ", ".join((_achievement(run), steps, duration(run.seconds) + (f" on {where}" if where else "")))


def _achievement(run: RunRecord) -> str:
    changes = []
    for name in dict.fromkeys(name for e in run.evaluations for name in e.numbers):
        found = sorted((e.step, e.numbers[name]) for e in run.evaluations if name in e.numbers)
        changes.append(f"{name.replace('_', ' ')} {' → '.join(number(v) for _, v in (found[0], *found[1:][-1:]))}")
    if changes:
        return f"Held-out {', '.join(changes)}"
    for name in _evaluation_names(run):
        rewards = [fixed(e.reward) for e in _first_and_last(run, name)]
        changes.append(f"{' → '.join(rewards)} ({name})")
    if changes:
        kind = "accuracy" if _is_accuracy(run) else "reward"
        return f"Held-out {kind} {', '.join(changes)}"
    rewards = run.series("reward")
    if not rewards:
        return "No step completed"
    first, last = rolling(rewards)[min(WINDOW, len(rewards)) - 1], rolling(rewards)[-1]
    if len(rewards) <= WINDOW:
        return f"Training reward {fixed(last)}"
    return f"Training reward {fixed(first)} → {fixed(last)} (means of {WINDOW} steps)"


def _evaluation_names(run: RunRecord) -> list[str]:
    return list(dict.fromkeys(e.name for e in run.evaluations))


def _first_and_last(run: RunRecord, name: str) -> list[Evaluation]:
    """The first and the last evaluation of a name, or the only one."""
    found = sorted((e for e in run.evaluations if e.name == name), key=lambda e: e.step)
    return found if len(found) < 2 else [found[0], found[-1]]


def full_marks(run: RunRecord) -> float:
    """The reward of a sample that scores 1 with every reward function."""
    rewards = run.config.get("rewards") or []
    return sum(float(reward.get("weight", 1.0)) for reward in rewards) if rewards else 1.0


def mark(reward: float | None, full: float) -> str:
    """right, wrong (less than half of full marks), partly right, or not scored."""
    if reward is None:
        return "not scored"
    if float(reward) >= full - 1e-6:
        return "right"
    return "wrong" if not float(reward) >= full / 2 else "partly right"


def _is_accuracy(run: RunRecord) -> bool:
    """Whether every held-out sample got 0 or 1, so that the mean reward is the accuracy."""
    rewards = [s["reward"] for e in run.evaluations for s in e.samples if s["reward"] is not None]
    return bool(rewards) and full_marks(run) == 1.0 and all(reward in (0, 1) for reward in rewards)


def _where(run: RunRecord) -> str:
    gpus, cores = run.environment.get("gpus") or [], (run.environment.get("threads") or {}).get("torch")
    if gpus and run.config.get("device") != "cpu":
        return gpus[0] if len(gpus) == 1 else f"a machine with {len(gpus)} x {gpus[0]}"
    return f"{cores} {'core' if cores == 1 else 'cores'}" if cores else ""


def _subtitle(run: RunRecord) -> str:
    data = run.environment.get("data") or {}
    parts = (run.config.get("model"), run.config.get("algorithm"), data.get("source"), run.name)
    return " · ".join(clean(str(part)) for part in parts if part)


def _shown(sample: Record, full: float) -> Record:
    """A sample as the page prints it."""
    return {
        "prompt": clean(sample["prompt"]),
        "completion": _cut(clean(sample["completion"])),
        "reward": "none" if sample["reward"] is None else f"{float(sample['reward']):.3g}",
        "advantage": fixed(float(sample["advantage"]), sign="+"),
        "mark": mark(sample["reward"], full),
        "finished": sample["finished"],
        "tokens": sample["tokens"],
    }


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + f" ... ({len(text) - LONGEST} more characters)"


def _training_samples(samples: list[Record], full: float) -> list[list[Record]]:
    """The best and the worst completion of the first prompts of a step."""
    groups: dict[int, list[Record]] = {}
    for sample in samples:
        groups.setdefault(sample["prompt_index"], []).append(sample)
    shown = []
    for group in list(groups.values())[:SHOWN_PROMPTS]:
        group.sort(key=lambda s: float("inf") if s["reward"] is None else -float(s["reward"]))
        shown.append([_shown(sample, full) for sample in group[:1] + group[1:][-1:]])
    return shown


@dataclass(frozen=True)
class Change:
    """The held-out samples whose mark changed in one way: their number and the first few."""

    label: str
    count: int
    pairs: list[tuple[Record, Record]]


@dataclass(frozen=True)
class HeldOut:
    """The same prompts before and after training; `changes` has every kind that occurs."""

    name: str
    steps: tuple[int, int]
    total: int
    changes: list[Change]


def held_out(run: RunRecord) -> HeldOut | None:
    """The first evaluation's samples before and after training, grouped by how their marks changed.

    With only one evaluation, before and after are the same, and `steps` shows it.
    """
    names = _evaluation_names(run)
    ends = _first_and_last(run, names[0]) if names else []
    if not ends or not ends[0].samples or ends[0].numbers:
        return None
    full = full_marks(run)
    before, after = ends[0], ends[-1]
    later = dict(_by_prompt(after.samples))
    pairs: dict[str, list[tuple[Record, Record]]] = {}
    for key, sample in _by_prompt(before.samples):
        if key in later:
            pair = (_shown(sample, full), _shown(later[key], full))
            label = pair[0]["mark"] if before is after else f"{pair[0]['mark']} → {pair[1]['mark']}"
            pairs.setdefault(label, []).append(pair)
    changes = [Change(label, len(found), found[:SHOWN_PAIRS]) for label, found in sorted(pairs.items(), key=_order)]
    return HeldOut(names[0], (before.step, after.step), sum(c.count for c in changes), changes)


@dataclass(frozen=True)
class JudgedRow:
    """A held-out pre-written row, and what was measured on it before and after training."""

    prompt: str
    answers: list[tuple[str, str, str]]  # what it is, its mark, its text
    numbers: list[tuple[str, str]]  # name, `before → after`


@dataclass(frozen=True)
class Judged:
    """The first held-out rows; with only one evaluation, just its numbers."""

    steps: tuple[int, int]
    total: int
    rows: list[JudgedRow]


def judged(run: RunRecord) -> Judged | None:
    """The rows that were measured one by one; None if completions were sampled instead or nothing was held out."""
    names = _evaluation_names(run)
    ends = _first_and_last(run, names[0]) if names else []
    if not ends or not ends[0].samples or not ends[0].numbers:
        return None
    by_row = [_by_row(evaluation.samples) for evaluation in ends]
    rows = []
    for index, samples in by_row[0].items():
        numbers = []
        for name in samples[0]["rewards"]:
            values = [found[index][0]["rewards"].get(name, math.nan) for found in by_row if index in found]
            numbers.append((name.replace("_", " "), " → ".join(fixed(round(value, 3) + 0.0, 3) for value in values)))
        answers = [(*_role(names[0], s, samples), _cut(clean(s["completion"]))) for s in samples]
        rows.append(JudgedRow(clean(samples[0]["prompt"]), answers, numbers))
    return Judged((ends[0].step, ends[-1].step), int(ends[0].rows), rows)


def _by_row(samples: list[Record]) -> dict[int, list[Record]]:
    rows: dict[int, list[Record]] = {}
    for sample in samples:
        rows.setdefault(sample["prompt_index"], []).append(sample)
    return rows


def _role(kind: str, sample: Record, row: list[Record]) -> tuple[str, str]:
    """The data's label of an answer, and the mark it is printed with."""
    advantage = float(sample["advantage"])
    best = advantage == max(float(other["advantage"]) for other in row)
    return {
        "pairs": ("chosen", "right") if advantage > 0 else ("rejected", "wrong"),
        "ranked": (f"rank {-advantage:g}", "right" if best else ""),
        "labelled": ("desirable", "right") if advantage > 0 else ("undesirable", "wrong"),
    }.get(kind, ("demonstration", ""))


def _order(item: tuple[str, list[Any]]) -> tuple[bool, int]:
    """What changed first, then the most frequent."""
    before, _, after = item[0].partition(" → ")
    return before == after, -len(item[1])


def _by_prompt(samples: list[Record]) -> list[tuple[tuple[int, int], Record]]:
    """Samples by (prompt, number of earlier samples of that prompt)."""
    seen: dict[int, int] = {}
    keyed = []
    for sample in samples:
        index = sample["prompt_index"]
        keyed.append(((index, seen.get(index, 0)), sample))
        seen[index] = seen.get(index, 0) + 1
    return keyed


def _metric_rows(run: RunRecord) -> list[tuple[str, str, str, str]]:
    """(name, first step, last step, mean of the last steps) of every metric."""
    names = list(dict.fromkeys(key for record in run.metrics for key in record if key not in ("step", "time")))
    rows = []
    for name in names:
        values = run.series(name)
        rows.append((name, number(values[0]), number(values[-1]), number(rolling(values)[-1])))
    return rows


def flatten(values: Any, prefix: str = "") -> list[tuple[str, str]]:
    """(dotted name, value) of a nested mapping."""
    if isinstance(values, dict) and values:
        return [row for key, value in values.items() for row in flatten(value, f"{prefix}{key}.")]
    if isinstance(values, list) and any(isinstance(value, dict) for value in values):
        return [row for index, value in enumerate(values) for row in flatten(value, f"{prefix}{index}.")]
    text = ", ".join(map(str, values)) if isinstance(values, list) else str(values)
    return [(prefix.removesuffix("."), clean(text))]
