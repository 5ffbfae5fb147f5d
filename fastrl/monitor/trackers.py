"""Sends metrics to common trackers, in addition to metrics.jsonl, which is always written."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

Name = Literal["tensorboard", "trackio", "wandb"]
PROJECT = "fastrl"


class Tracker(Protocol):
    """Receives numbers by name."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """The numbers of one step."""

    def close(self) -> None:
        """Finishes writing everything that was logged."""


class TensorBoard:
    """Event files in `run_dir`/tensorboard; a resumed run hides what was logged after `done` steps."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any], done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(run_dir / "tensorboard", purge_step=done + 1 if done else None)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """As `Tracker.log`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """As `Tracker.close`."""
        self._writer.close()


class Trackio:
    """A run of trackio's project `fastrl`, under the run directory's name."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any], done: int) -> None:
        import trackio

        self._trackio = trackio
        trackio.init(project=PROJECT, name=run_dir.name, config=dict(config), resume="allow", embed=False)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """As `Tracker.log`."""
        self._trackio.log(dict(values), step=step)

    def close(self) -> None:
        """As `Tracker.close`."""
        self._trackio.finish()


class Wandb:
    """A run of the project `fastrl` in Weights & Biases; a resumed directory continues the same run."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any], done: int) -> None:
        import wandb

        number = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]
        self._run = wandb.init(
            project=PROJECT, name=run_dir.name, id=number, resume="allow", dir=str(run_dir), config=dict(config)
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """As `Tracker.log`."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """As `Tracker.close`."""
        self._run.finish()


TRACKERS: dict[str, type] = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": Wandb}


def require_installed(names: Iterable[str]) -> None:
    """Refuses a tracker whose package is missing.

    Raises:
        ModuleNotFoundError: it is.
    """
    for name in names:
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"log_to: {name} is not installed: pip install {name}")


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The entries of a log record that a tracker can plot."""
    kept = {name: value for name, value in record.items() if isinstance(value, int | float)}
    return {name: float(value) for name, value in kept.items() if math.isfinite(value)}
