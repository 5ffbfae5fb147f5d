"""Reads back what a run wrote, whether it has finished, is still going or was killed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fastrl.check import require

Record = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """One line of evaluations.jsonl, and its samples in the order of the prompts."""

    step: int
    name: str
    reward: float
    samples: list[Record]
    numbers: dict[str, float] = field(default_factory=dict)  # measurements, if there is no reward
    rows: float = 0.0  # number of rows measured


@dataclass(frozen=True)
class RunRecord:
    """A run directory in memory, with training completions only for the steps that a report shows."""

    name: str
    config: Record
    environment: Record
    metrics: list[Record]
    evaluations: list[Evaluation]
    completions: dict[int, list[Record]]  # step -> samples
    warnings: list[str]
    seconds: float  # from the start of the log to its last line

    @property
    def steps(self) -> list[int]:
        """The steps that were logged."""
        return [record["step"] for record in self.metrics]

    @property
    def total_steps(self) -> int:
        """The steps that were planned."""
        return int(self.config.get("steps", len(self.metrics)))

    def series(self, metric: str) -> list[float]:
        """A metric over the steps, NaN where it is missing."""
        return [float(record.get(metric, "nan")) for record in self.metrics]

    def stages(self) -> list[str]:
        """The timed stages, in the order they first ran."""
        seen = {key: None for record in self.metrics for key in record if key.startswith("time/")}
        return [key.removeprefix("time/") for key in seen]


def read_run(run_dir: Path) -> RunRecord:
    """Everything a report needs.

    Raises:
        ValueError: `run_dir` holds no run.
    """
    require(
        (run_dir / "config.yaml").is_file(),
        "read_run",
        "run_dir",
        "a directory with a config.yaml",
        str(run_dir),
        "Give the run_dir of a training run.",
    )
    metrics = list(lines(run_dir / "metrics.jsonl"))
    evaluations = list(lines(run_dir / "evaluations.jsonl"))
    warnings = list(lines(run_dir / "warnings.jsonl"))
    environment = run_dir / "env.json"
    return RunRecord(
        name=run_dir.resolve().name,
        config=yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8")) or {},
        environment=json.loads(environment.read_text(encoding="utf-8")) if environment.is_file() else {},
        metrics=metrics,
        evaluations=_evaluations(run_dir, evaluations),
        completions=_first_middle_last(run_dir / "completions.jsonl"),
        warnings=[record["message"] for record in warnings],
        seconds=max((float(record["time"]) for record in metrics + evaluations + warnings), default=0.0),
    )


def lines(path: Path) -> Iterator[Record]:
    """The records of a JSON lines file, without a last line that a killed run did not finish."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as handle:
        for line in handle:
            if line.endswith("\n"):
                yield json.loads(line)


def measured(record: Record) -> dict[str, float]:
    """An evaluation's results: the mean reward under its name or, without rewards, each number."""
    if "reward" in record:
        return {record["name"]: float(record["reward"])}
    about = ("step", "time", "name", "seconds", "rows")
    return {name: float(value) for name, value in record.items() if name not in about}


def _evaluations(run_dir: Path, records: list[Record]) -> list[Evaluation]:
    samples: dict[tuple[int, str], list[Record]] = {}
    for sample in lines(run_dir / "evaluation_completions.jsonl"):
        samples.setdefault((sample["step"], sample["name"]), []).append(sample)
    return [
        Evaluation(
            r["step"],
            r["name"],
            float(r.get("reward", "nan")),
            samples.get((r["step"], r["name"]), []),
            {} if "reward" in r else measured(r),
            float(r.get("rows", 0.0)),
        )
        for r in records
    ]


def _first_middle_last(path: Path) -> dict[int, list[Record]]:
    """Reads in two passes, because a long run's completions may not fit in memory."""
    steps = sorted({record["step"] for record in lines(path)})
    chosen = {step: [] for step in sorted({steps[0], steps[len(steps) // 2], steps[-1]})} if steps else {}
    for record in lines(path):
        if record["step"] in chosen:
            chosen[record["step"]].append(record)
    return chosen
