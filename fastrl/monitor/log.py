"""A run's log: append-only JSON lines on disk, and a screen."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from fastrl.files import replace_text, sync
from fastrl.monitor.alarms import Alarms
from fastrl.monitor.interrupt import Interrupt
from fastrl.monitor.records import lines, measured
from fastrl.monitor.screen import BETWEEN_STEPS, COLUMNS, Column, Screen
from fastrl.monitor.trackers import TRACKERS, Tracker, numbers
from fastrl.monitor.untrusted import question
from fastrl.progress import Progress
from fastrl.types import Group

Callback = Callable[[int, dict[str, float]], None]  # (step, numbers by name; those of evaluations begin with eval/)
FILES = ("metrics", "completions", "evaluations", "evaluation_completions", "warnings")  # .jsonl


def encode(record: dict[str, Any]) -> str:
    """One line of strict JSON. Non-finite numbers become the strings NaN, Infinity and -Infinity, which `float` reads
    back. Non-ASCII text is escaped, so printing the file cannot control a terminal."""
    return json.dumps(_plain(record), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


class RunLog:
    """The record of one run in `run_dir`:

        config.yaml  env.json               what was run, and where
        metrics.jsonl                       one line per step
        completions.jsonl                   one line per training sample
        evaluations.jsonl                   one line per evaluation
        evaluation_completions.jsonl        one line per held-out sample
        warnings.jsonl                      one line per warning

    Lines of metrics, evaluations and warnings hold `time`, the run's seconds so far. Every line is flushed as it is
    written. `clock` counts seconds. Once `interrupt` asks the run to stop, a stage ends at its next progress report.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        total_steps: int,
        show_every: int = 10,
        columns: Sequence[Column] = COLUMNS,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.show_every = show_every
        self.interrupt = Interrupt()
        self._clock = clock
        self._began = self._mark = clock()
        self._seconds: dict[str, float] = {}
        self._tokens = 0.0
        self._alarms = Alarms()
        self._evaluated: dict[int, dict[str, float]] = {}
        self._screen = Screen(total_steps, columns, console, clock, self.interrupt)
        self._trackers: dict[str, Tracker] = {}
        self._callbacks: list[Callback] = []

    def start(
        self, config: dict[str, Any], environment: dict[str, Any], *, trackers: Sequence[str] = (), done: int = 0
    ) -> None:
        """Writes config.yaml and env.json, opens `trackers`, and shows on screen what is about to run.

        `done` is the number of steps already done.
        """
        self.run_dir.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True)
        replace_text(self.run_dir / "config.yaml", text)
        replace_text(self.run_dir / "env.json", json.dumps(_plain(environment), indent=2) + "\n")
        self._screen.header(config, environment, self.run_dir)
        for name in trackers:
            self._trackers[name] = TRACKERS[name](self.run_dir, _plain(config), done)

    def call(self, callbacks: Sequence[Callback]) -> None:
        """Registers callbacks for the numbers of every step and evaluation; an exception in one ends the run."""
        self._callbacks = list(callbacks)

    def state(self) -> dict[str, Any]:
        """`position`, after syncing the log so far to disk."""
        for path in self._paths():
            sync(path)
        return self.position()

    def position(self) -> dict[str, Any]:
        """The log's position, in a form that JSON can hold."""
        now = self._clock()
        return {
            "bytes": {path.name: path.stat().st_size for path in self._paths()},
            "seconds": now - self._began,
            "seconds_of_step": now - self._mark,
            "stages": dict(self._seconds),
        }

    def resume(self, state: dict[str, Any], where_from: str) -> None:
        """Continues from `state`: later lines are cut off, and the clock counts on from there.

        Alarms, rolling means and evaluations are restored from the remaining lines.
        """
        self._began = self._clock() - state["seconds"]
        short = self.rewind(state)
        for record in lines(self._path("metrics")):
            record = {name: float(value) for name, value in record.items()} | {"step": record["step"]}
            list(self._alarms.check(int(record["step"]), record))  # these warnings were already given
            self._screen.remember(record)
        self._screen.resumed(where_from)
        for name in short:
            self.warn(f"{name} is shorter than it was when the checkpoint was written: lines are missing.")

    def rewind(self, state: dict[str, Any]) -> list[str]:
        """Removes lines logged after `state` and restores the stages' times; returns files that lack earlier lines.

        The run's clock keeps running: the lost time counts.
        """
        short = []
        for path in map(self._path, FILES):
            size = state["bytes"].get(path.name, 0)
            found = path.stat().st_size if path.is_file() else 0
            if found > size:
                os.truncate(path, size)
            elif found < size:
                short.append(path.name)
                _drop_half_line(path)
        self._mark, self._seconds = self._clock() - state["seconds_of_step"], dict(state["stages"])
        self._tokens = max((record.get("num_tokens", 0.0) for record in lines(self._path("metrics"))), default=0.0)
        self._evaluated = {}
        for record in lines(self._path("evaluations")):
            self._evaluated.setdefault(record["step"], {}).update(measured(record))
        return short

    def evaluated(self, step: int) -> dict[str, float]:
        """Evaluation name -> mean reward at `step`, or, without rewards, each number by its name."""
        return self._evaluated.get(step, {})

    @contextmanager
    def stage(self, name: str, unit: str = "") -> Generator[Progress]:
        """Adds the block's time to stage `name` of the current step; `BETWEEN_STEPS` do not count as step time.

        Yields a function that shows how many `unit`s are done, and raises `Interrupted` once the run should stop.
        """

        def progress(done: int, total: int) -> None:
            self.interrupt.check()
            self._screen.progress(done, total, unit)

        begin = self._clock()
        self._screen.stage(name)
        try:
            yield progress
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - begin
            self._screen.stage(None)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Writes a line of metrics.jsonl: `metrics`, `tokens_per_second`, `step_time` and `time/<stage>` (seconds).

        `num_tokens` in `metrics` is the step's count; the line has the run's total so far, as in TRL.
        """
        now = self._clock()
        outside = sum(self._seconds.get(name, 0.0) for name in BETWEEN_STEPS)
        step_time = now - self._mark - outside
        record = {"step": step, "time": now - self._began, **metrics, "step_time": step_time}
        if "num_tokens" in metrics:
            record["num_tokens"] = self._tokens = self._tokens + metrics["num_tokens"]
            if step_time > 0:
                record["tokens_per_second"] = metrics["num_tokens"] / step_time
        stages, self._seconds, self._mark = self._seconds, {}, now
        record |= {f"time/{name}": seconds for name, seconds in stages.items()}
        self._append("metrics", record)
        self._track(record, step)
        self._screen.step(record, {name: s for name, s in stages.items() if name not in BETWEEN_STEPS})
        for message in self._alarms.check(step, metrics):
            self.warn(message)

    def completions(self, step: int, groups: list[Group]) -> None:
        """Writes all samples of a step to completions.jsonl, and shows a few on screen every `show_every` steps."""
        self._append("completions", *_samples({"step": step}, groups))
        if self.show_every > 0 and (step == 1 or step % self.show_every == 0):
            self._screen.completions(step, groups)

    def evaluation(self, step: int, name: str, result: dict[str, float], samples: list[Group]) -> None:
        """Writes a line of evaluations.jsonl, with the `seconds` of stage `eval`, and all samples to their own file."""
        seconds = self._seconds.pop("eval", 0.0)
        self._mark += seconds  # not counted in the next step
        now = self._clock() - self._began
        self._evaluated.setdefault(step, {}).update(measured({"name": name, **result}))
        self._append("evaluations", {"step": step, "time": now, "name": name, **result, "seconds": seconds})
        self._append("evaluation_completions", *_samples({"step": step, "name": name}, samples))
        self._track({f"eval/{name}/{key}": value for key, value in result.items()}, step)
        self._screen.evaluation(step, name, result, seconds)

    def warn(self, message: str) -> None:
        """Shows a warning on screen and writes it to warnings.jsonl, if that is possible."""
        self._screen.warn(message)
        with suppress(OSError):
            self._append("warnings", {"time": self._clock() - self._began, "message": message})

    def close(self, status: str, summary: dict[str, Any]) -> None:
        """Shows the last panel: how the run ended, evaluations before and after, and where everything is."""
        for name in list(self._trackers):
            self._try(name, lambda tracker: tracker.close())
        self._screen.close(status, summary, self._clock() - self._began, self.run_dir)

    def _track(self, record: dict[str, Any], step: int) -> None:
        values = numbers({name: value for name, value in record.items() if name != "step"})
        for callback in self._callbacks:
            callback(step, dict(values))
        for name in list(self._trackers):
            self._try(name, lambda tracker: tracker.log(values, step))

    def _try(self, name: str, action: Callable[[Tracker], None]) -> None:
        """Runs `action`. A tracker that fails, for example without a network, is reported once and dropped."""
        try:
            action(self._trackers[name])
        except Exception as error:
            del self._trackers[name]
            self.warn(f"{name} failed and is off from now on: {type(error).__name__}: {error}")

    def _append(self, name: str, *records: dict[str, Any]) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with self._path(name).open("a", encoding="utf-8") as handle:
            handle.write("".join(encode(record) + "\n" for record in records))

    def _paths(self) -> list[Path]:
        """The log files that exist."""
        return [path for name in FILES if (path := self._path(name)).is_file()]

    def _path(self, name: str) -> Path:
        return self.run_dir / f"{name}.jsonl"


class UnwrittenLog(RunLog):
    """The log of a process whose run another one records: the same clock and numbers, no file and no screen."""

    def __init__(self, *, total_steps: int) -> None:
        super().__init__(Path(os.devnull), total_steps=total_steps, show_every=0, console=Console(quiet=True))
        self.interrupt.shown = True

    def start(self, *_: Any, **__: Any) -> None:
        """Writes nothing."""

    def resume(self, state: dict[str, Any], where_from: str) -> None:
        """Continues the clock."""
        self._began = self._clock() - state["seconds"]

    def rewind(self, state: dict[str, Any]) -> list[str]:
        """Restores the stages' times."""
        self._mark, self._seconds = self._clock() - state["seconds_of_step"], dict(state["stages"])
        return []

    def warn(self, message: str) -> None:
        """The process that records the run says it."""

    def close(self, status: str, summary: dict[str, Any]) -> None:
        """Nothing is shown."""

    def _append(self, name: str, *records: dict[str, Any]) -> None:
        pass

    def _paths(self) -> list[Path]:
        return []


def _drop_half_line(path: Path) -> None:
    """Removes an unfinished last line, which the next line would be appended to."""
    if path.is_file():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def _samples(about: dict[str, Any], groups: list[Group]) -> Iterator[dict[str, Any]]:
    for group in groups:
        for sample in group.samples:
            yield {
                **about,
                "prompt_index": group.prompt.index,
                "prompt": question(group.prompt.content),
                "completion": sample.text,
                "rewards": sample.rewards,
                "reward": sample.reward,
                "advantage": sample.advantage,
                "finished": sample.finished,
                "tokens": len(sample.token_ids),
            } | ({"extra": sample.extra} if sample.extra else {})
