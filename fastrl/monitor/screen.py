"""A run on the terminal: a table that gains one line per step and, on a TTY, a live bar below it."""

from __future__ import annotations

import atexit
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.console import Group as Stack
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fastrl.monitor.interrupt import HEARD, Interrupt
from fastrl.monitor.units import clock as as_clock
from fastrl.monitor.units import duration, fixed, number
from fastrl.monitor.untrusted import clean, one_line, question
from fastrl.types import Group, Sample

WIDTH = 110  # of a line if there is no terminal to ask
WINDOW = 10  # steps in a rolling mean
HEADINGS_EVERY = 20  # lines
BETWEEN_STEPS = ("reference", "setup", "eval", "save")  # stages that do not count as step time
SHOWN_PROMPTS = 2  # per table of completions, with the best and the worst completion of each


class Column(NamedTuple):
    """One number of a step's line. `metric` is a metric's name, `rolling` or `eta`."""

    heading: str
    metric: str
    width: int


COLUMNS = (
    Column("reward", "reward", 8),
    Column("rolling", "rolling", 9),
    Column("loss", "loss", 10),
    Column("grad", "grad_norm", 7),
    Column("entropy", "entropy", 9),
    Column("length", "completions/mean_length", 8),
    Column("tok/s", "tokens_per_second", 7),
    Column("step s", "step_time", 8),
    Column("left", "eta", 8),
)
_HELD_OUT = {  # by the kind of an algorithm's groups, or its name
    "pairs": (Column("accuracy", "rewards/accuracies", 9), Column("margin", "rewards/margins", 9)),
    "labelled": (Column("desired", "rewards/chosen", 9), Column("other", "rewards/rejected", 9)),
    "completions": (Column("entropy", "entropy", 9),),
    "reward_model": (Column("accuracy", "accuracy", 9), Column("margin", "margin", 9)),
}
_EVERY = (
    Column("loss", "loss", 9),
    Column("grad", "grad_norm", 8),
    Column("tok/s", "tokens_per_second", 7),
    Column("step s", "step_time", 8),
    Column("left", "eta", 8),
)


def columns_for(kind: str) -> Sequence[Column]:
    """The columns of a step's line for an algorithm of this name, or for groups of this kind."""
    return _HELD_OUT[kind] + _EVERY if kind in _HELD_OUT else COLUMNS


class Screen:
    """Everything that `RunLog` shows. Completions are printed as plain text, never as markup."""

    def __init__(
        self,
        total_steps: int,
        columns: Sequence[Column],
        console: Console | None,
        clock: Callable[[], float],
        interrupt: Interrupt,
    ) -> None:
        self.console = console or Console(highlight=False)
        if not self.console.is_terminal:
            self.console.width = WIDTH
        self._total, self._columns, self._clock = total_steps, columns, clock
        self._rewards: deque[float] = deque(maxlen=WINDOW)
        self._step_times: deque[float] = deque(maxlen=WINDOW)
        self._done, self._lines = 0, 0
        self._began = clock()
        self._stage: tuple[str, float] | None = None
        self._far = ""
        self._stages: dict[str, float] = {}
        self._live: Live | None = None
        self._interrupt = interrupt

    def header(self, config: dict[str, Any], environment: dict[str, Any], run_dir: Path) -> None:
        """Shows what is about to run, in a few lines."""
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        table.add_column(overflow="fold")
        for name, value in _header_rows(config, environment, run_dir):
            table.add_row(name, Text(clean(value)))
        self.console.print(Text("fastrl", style="bold"), table, "", sep="\n")

    def stage(self, name: str | None) -> None:
        """The stage that has begun, or None between stages."""
        self._far = ""
        self._stage = None if name is None else (name, self._clock())
        if self._live is None and self.console.is_terminal:
            self._live = Live(console=self.console, get_renderable=self._status, refresh_per_second=4, transient=True)
            self._live.start()
            self._interrupt.shown = True
            atexit.register(self._stop)  # restores the cursor if the run dies

    def progress(self, done: int, total: int, unit: str) -> None:
        """Updates the stage's progress; the live display reads it a few times a second."""
        self._far = f"{done}/{total} {unit}"

    def step(self, record: dict[str, Any], stages: dict[str, float]) -> None:
        """Prints a step's line, with headings now and then."""
        self._stages = stages
        self.remember(record)
        row = record | {"rolling": fmean(self._rewards) if self._rewards else None, "eta": self.eta()}
        if self._lines % HEADINGS_EVERY == 0:
            self._print(self._line("step", [c.heading for c in self._columns], "stages"), style="dim")
        self._lines += 1
        values = [as_clock(row["eta"]) if c.metric == "eta" else number(row.get(c.metric)) for c in self._columns]
        bad = any(isinstance(v := row.get(c.metric), float) and not math.isfinite(v) for c in self._columns)
        line = self._line(f"{self._done}/{self._total}", values, _compact(stages))
        self._print(line, style="bold red" if bad else "")

    def remember(self, record: dict[str, Any]) -> None:
        """Counts a step in the rolling means without showing it."""
        self._done = record["step"]
        if math.isfinite(record.get("reward", math.nan)):
            self._rewards.append(record["reward"])
        self._step_times.append(record["step_time"])

    def resumed(self, where_from: str) -> None:
        """One line."""
        self._print(clean(where_from), style="bold")

    def eta(self) -> float:
        """Seconds left: the rolling mean step time for each remaining step."""
        return (fmean(self._step_times) if self._step_times else 0.0) * max(self._total - self._done, 0)

    def completions(self, step: int, groups: Iterable[Group]) -> None:
        """Shows the best and the worst completion of a few prompts, those with differing rewards first."""
        table = Table(
            box=SIMPLE_HEAD, expand=True, title=Text(f"completions of step {step}", style="dim"), pad_edge=False
        )
        table.add_column("prompt", ratio=4, overflow="fold")
        table.add_column("completion", ratio=5, overflow="fold")
        table.add_column("reward", justify="right", min_width=6)
        table.add_column("advantage", justify="right", min_width=9)
        for group in sorted(groups, key=lambda g: _spread(g) == 0)[:SHOWN_PROMPTS]:
            for index, sample in enumerate(_best_and_worst(group.samples)):
                prompt = one_line(question(group.prompt.content), 160) if index == 0 else ""
                table.add_row(
                    self._text(prompt, "dim"),
                    self._text(one_line(sample.text, 240) + ("" if sample.finished else " [cut]")),
                    Text(number(sample.reward)),
                    Text(fixed(sample.advantage, sign="+"), style="green" if sample.advantage > 0 else ""),
                )
        self.console.print(table)

    def evaluation(self, step: int, name: str, result: dict[str, float], seconds: float) -> None:
        """One line."""
        numbers = "  ".join(f"{key} {number(value)}" for key, value in result.items() if key != "prompts")
        if "prompts" in result:
            numbers += f"  on {result['prompts']:.0f} prompts"
        took = f"  ({duration(seconds)})" if seconds else ""
        self._print(f"held-out, {name}, after step {step}:  {numbers}{took}", style="bold")

    def warn(self, message: str) -> None:
        """One paragraph."""
        text = Text.assemble(("warning: ", "bold yellow"), self._text(clean(message)))
        self.console.print(text)

    def close(self, status: str, summary: dict[str, Any], seconds: float, run_dir: Path) -> None:
        """The last panel."""
        self._stop()
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        table.add_column(overflow="fold")
        before, after = summary.get("before") or {}, summary.get("after") or {}
        for name in before | after:
            change = number(before.get(name)) + (f" -> {number(after[name])}" if name in after else "")
            table.add_row(f"held-out, {name}", Text(change, style="bold"))
        table.add_row("steps", f"{summary.get('steps', self._done)} of {self._total}")
        table.add_row("time", duration(seconds))
        table.add_row("files", Text(str(run_dir)))
        if "report" in summary:
            table.add_row("report", Text(str(summary["report"])))
        style = "green" if status == "finished" else "yellow"
        self.console.print("", Panel(table, title=Text(status), title_align="left", border_style=style, padding=(0, 1)))
        if "resume" in summary:  # outside the panel, in one piece, to be copied
            self._print(f"To resume: {summary['resume']}", style="bold")

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
            self._interrupt.shown = False
            atexit.unregister(self._stop)

    def _print(self, line: str, style: str = "") -> None:
        self.console.print(self._text(line, style), soft_wrap=True)

    def _text(self, text: str, style: str = "") -> Text:
        """Text that the output's encoding can carry, whatever the model wrote."""
        encoding = self.console.encoding
        return Text(text.encode(encoding, "backslashreplace").decode(encoding), style=style)

    def _line(self, step: str, values: Sequence[str], tail: str) -> str:
        """As many whole columns as fit, because a cut-off number would be a different number."""
        line = step.rjust(max(7, 2 * len(str(self._total)) + 1))
        width = min(WIDTH, self.console.width)
        cells = [value.rjust(column.width) for value, column in zip(values, self._columns, strict=True)]
        for cell in (*cells, f"   {tail}"):
            if len(line) + len(cell) > width:
                break
            line += cell
        return line

    def _status(self) -> RenderableType:
        """The live display: progress bar with elapsed and remaining time, current stage and its progress, last reward
        and stage times, and whether a signal has arrived."""
        top = Table.grid(padding=(0, 1))
        percent = f"{100 * self._done / max(self._total, 1):3.0f} %"
        left = f"about {as_clock(self.eta())} left" if self._step_times else ""
        times = f"{as_clock(self._clock() - self._began)} gone  {left}"
        bar = ProgressBar(total=self._total, completed=self._done, width=min(40, max(10, self.console.width - 55)))
        top.add_row(f"step {self._done}/{self._total}", bar, percent, Text(times, style="dim"))
        bottom = Text("  ").join([*self._now(), *self._last()])
        bottom.truncate(self.console.width)
        heard = [Text(HEARD, style="bold yellow")] if self._interrupt else []
        return Stack(Text(""), top, bottom, *heard)

    def _now(self) -> list[Text]:
        if self._stage is None:
            return []
        name, began = self._stage
        where = name if name in BETWEEN_STEPS else f"step {self._done + 1}: {name}"
        return [Text(" ".join(filter(None, (where, self._far, f"{self._clock() - began:.1f}s"))), style="bold")]

    def _last(self) -> list[Text]:
        if not self._rewards:
            return []
        recent = f"reward {number(self._rewards[-1])}, mean of {len(self._rewards)} {number(fmean(self._rewards))}"
        return [Text(recent), Text(_compact(self._stages), style="dim")]


def _compact(stages: dict[str, float], shown: int = 2) -> str:
    """The longest stages, as in `rollout 1.9s  train 2.1s`, in the order they ran."""
    longest = sorted(stages, key=lambda name: -stages[name])[:shown]
    return "  ".join(f"{name} {stages[name]:.1f}s" for name in stages if name in longest)


def _spread(group: Group) -> float:
    rewards = [s.reward for s in group.samples if s.reward is not None]
    return max(rewards) - min(rewards) if rewards else 0.0


def _best_and_worst(samples: Sequence[Sample]) -> list[Sample]:
    ordered = sorted(samples, key=lambda s: -math.inf if s.reward is None else s.reward, reverse=True)
    return ordered[:1] + ordered[1:][-1:]


def _header_rows(config: dict[str, Any], environment: dict[str, Any], run_dir: Path) -> list[tuple[str, str]]:
    data: dict[str, str] = environment.get("data") or {}
    machine, threads = environment.get("machine") or {}, environment.get("threads") or {}
    gpus = environment.get("gpus") or []
    device = f"{config.get('device', 'auto')}, {config.get('dtype', '')}".rstrip(", ")
    if gpus:
        where = ", ".join(gpus)
    else:
        where = f"{machine.get('cpu', 'CPU')}, {machine.get('cores', '?')} cores, {machine.get('cpu_capability', '')}"
    return [
        ("model", str(config.get("model", "-"))),
        ("data", f"{data.get('source', '-')}, {data.get('held_out', 'nothing')} held out"),
        ("algorithm", f"{config.get('algorithm', '-')}, {config.get('steps', '-')} steps of {data.get('step', '-')}"),
        ("device", f"{device} on {where}"),
        ("threads", f"{threads.get('torch', '-')} of {threads.get('cores', '-')} cores"),
        *environment.get("speed", {}).items(),
        (
            "layout",
            f"{config.get('layout', '-')}, {config.get('max_tokens_per_microbatch', '-')} tokens per micro-batch",
        ),
        ("files", str(run_dir)),
    ]
