"""Whole training steps on the demo task: fastrl, TRL and a plain loop, each in a process of its own, in turns.

python -m bench.run step --against trl,naive
python -m bench.run step --against trl --dtype auto --trl-dtype float32
python -m bench.run step --against trl,trl+cpu --dtype float32
python -m bench.run step --against trl,trl+fastrl,trl+fastrl-loss --dtype float32 --reward half
python -m bench.run step --algorithm ppo --against naive-ppo
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from bench.step_child import STAGES, StepRecord, read
from bench.timing import environment, quantiles
from bench.workload import ALGORITHMS, DTYPES, REWARDS, Workload, model_folder, write_questions


@dataclass(frozen=True)
class Provider:
    """A module with a `child`, further arguments of it, what must be installed, and what to say beside its numbers."""

    module: str
    arguments: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    note: str = ""
    algorithm: str = "grpo"


PROVIDERS = {
    "fastrl": Provider("bench.step_fastrl"),
    "trl": Provider("bench.step_trl", needs=("trl", "datasets")),
    "trl-bf16": Provider("bench.step_trl", ("bfloat16",), ("trl", "datasets"), "bf16 weights: does not learn"),
    "trl+cpu": Provider("bench.step_trl", ("float32", "cpu"), ("trl", "datasets"), "fastrl.accelerate_cpu in TRL"),
    "trl-bf16+cpu": Provider("bench.step_trl", ("bfloat16", "cpu"), ("trl", "datasets"), "the same, bf16 weights"),
    "trl+fastrl": Provider(
        "bench.step_trl", ("float32", "logps"), ("trl", "datasets"), "fastrl.integrations.trl.accelerate"
    ),
    "trl+fastrl-loss": Provider("bench.step_trl", ("float32", "loss"), ("trl", "datasets"), "the same, loss=True"),
    "naive": Provider("bench.step_naive"),
    "naive-ppo": Provider("bench.step_naive_ppo", algorithm="ppo"),
}
DEFAULT = {"grpo": "trl,naive", "ppo": "naive-ppo"}
LENGTHS_APART = 0.25  # completions whose mean length differs by more are not the same work


@dataclass
class Measured:
    """One provider over all rounds; `status`: ok, OOM, failed or absent."""

    provider: str
    status: str = "ok"
    detail: str = ""
    steps: list[StepRecord] = field(default_factory=list)  # without warm-up, all rounds
    peak_bytes: list[int] = field(default_factory=list)  # one a round

    def typical(self, of: Callable[[StepRecord], float]) -> float:
        """Median over steps."""
        return median(map(of, self.steps))

    def mean(self, of: Callable[[StepRecord], float]) -> float:
        """Mean over steps."""
        return fmean(map(of, self.steps))

    @property
    def peak(self) -> float:
        """Median over rounds."""
        return median(self.peak_bytes)


def main(arguments: list[str]) -> None:
    """Measures, prints the table, and appends one line per provider to the results."""
    from bench.run import append, out_file, show_environment

    args = _parser().parse_args(arguments)
    against = DEFAULT[args.algorithm] if args.against is None else args.against
    names = ["fastrl", *(name for name in against.split(",") if name)]
    unknown = [name for name in names if name not in PROVIDERS]
    if unknown:
        raise ValueError(f"--against: expected some of {', '.join(PROVIDERS)}, got {', '.join(unknown)}.")
    other = [name for name in names[1:] if PROVIDERS[name].algorithm != args.algorithm]
    if other:
        raise ValueError(f"--against: expected providers of {args.algorithm}, got {', '.join(other)}.")
    threads = args.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    device, console = torch.device(args.device), Console(width=None if sys.stdout.isatty() else 120)
    about = environment(device)
    show_environment(console, about)
    workload = Workload(**{name: value for name, value in vars(args).items() if name in Workload.__annotations__})
    results = run(workload, names, args.rounds, threads, args.timeout, console)
    console.print(table(workload, results))
    for line in warnings(results):
        console.print(line)
    fields = {"op": "step", "workload": asdict(workload)}
    append(out_file(args.out, device), [fields | asdict(result) | {"environment": about} for result in results])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.run step", description=__doc__.splitlines()[0])
    parser.add_argument("--against", help=f"comma-separated: {', '.join(list(PROVIDERS)[1:])}")
    parser.add_argument("--rounds", type=int, default=1, help="processes per provider")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 is one per core")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds per process")
    parser.add_argument("--out", default="", help="JSON lines; default results/<machine>/<date>.jsonl")
    for name, default in asdict(Workload()).items():
        if name != "folder":
            named = {"reward": tuple(REWARDS), "algorithm": ALGORITHMS, "dtype": DTYPES, "trl_dtype": DTYPES}
            choices = named.get(name)
            parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default, choices=choices)
    return parser


def run(
    workload: Workload, names: list[str], rounds: int, threads: int, timeout: float, console: Console
) -> list[Measured]:
    """`rounds` times each provider in turn, the first one rotating."""
    results = {name: Measured(name) for name in names}
    for name, result in results.items():
        missing = [package for package in PROVIDERS[name].needs if importlib.util.find_spec(package) is None]
        if missing:
            result.status, result.detail = "absent", f"not installed: {', '.join(missing)}"
    chat = _has_chat_template(workload.model)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if results[name].status != "ok":
                continue
            console.print(f"round {turn + 1} of {rounds}: {name}", style="dim")
            with tempfile.TemporaryDirectory(prefix="fastrl-bench-") as folder:
                placed = replace(workload, folder=folder)
                write_questions(placed, chat=chat)
                measure_once(placed, PROVIDERS[name], results[name], threads, timeout)
    return list(results.values())


def _has_chat_template(model: str) -> bool:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder(model)).chat_template is not None


def measure_once(workload: Any, provider: Provider, result: Measured, threads: int, timeout: float) -> None:
    """One process; what it printed is shown only when it fails."""
    output = Path(workload.folder) / "result.json"
    command = [sys.executable, "-m", provider.module, workload.encode(), str(output), *provider.arguments]
    # Every provider gets the same threads, and no one waits for a hub.
    settings = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command,
            cwd=Path(__file__).parents[1],
            env=os.environ | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        result.status, result.detail = "failed", f"no result after {timeout:g} s"
        return
    if done.returncode != 0 or not output.exists():
        last = (done.stdout.strip().splitlines() or ["no output"])[-1]
        memory = done.returncode == -9 or "OutOfMemory" in done.stdout or "can't allocate memory" in done.stdout
        result.status, result.detail = "OOM" if memory else "failed", last[:200]
        return
    steps, peak = read(output)
    result.steps += steps[workload.warm_up :]
    result.peak_bytes.append(peak["gpu"] or peak["host"])


def table(workload: Workload, results: list[Measured]) -> Table:
    """Markdown: one column per provider, fastrl first; in brackets the ratio to fastrl."""
    title = (
        f"{workload.algorithm}, {workload.model}, {workload.prompts} prompts x {workload.samples} completions, up to "
        f"{workload.max_new_tokens} tokens{_dtypes(workload)}; median of {workload.steps} steps a process"
    )
    shown = Table(title=title, box=MARKDOWN, title_justify="left")
    shown.add_column("")
    for result in results:
        shown.add_column(result.provider, justify="right")
    ok = [result if result.status == "ok" and result.steps else None for result in results]
    for heading, cell in _rows(ok[0]):
        shown.add_row(heading, *(cell(result) if result else "" for result in ok))
    notes = [result.detail or PROVIDERS[result.provider].note for result in results]
    states = [result.status for result in results]
    shown.add_row("status", *(": ".join(filter(None, pair)) for pair in zip(states, notes, strict=True)))
    return shown


def _dtypes(workload: Workload) -> str:
    named = {"dtype": workload.dtype, "TRL's": workload.trl_dtype}
    return "".join(f", {name} {dtype}" for name, dtype in named.items() if dtype)


Number = Callable[[Measured], float]


def _rows(ours: Measured | None) -> list[tuple[str, Callable[[Measured], str]]]:
    def against(of: Number, scale: float = 1.0, digits: int = 2, least: float = 0.0) -> Callable[[Measured], str]:
        """The number, and its ratio to fastrl's where that is more than `least`."""

        def cell(result: Measured) -> str:
            comparable = ours is not None and result is not ours and of(ours) > least
            return f"{of(result) / scale:.{digits}f}" + (f" ({of(result) / of(ours):.2f}x)" if comparable else "")

        return cell

    def span(result: Measured) -> str:
        low, _, high = quantiles([step.seconds for step in result.steps])
        return f"{low:.2f}-{high:.2f}"

    stages = [
        (f"  {name} s", against(lambda r, name=name: r.typical(lambda s: s.stages[name]), least=0.02))
        for name in STAGES
    ]
    return [
        ("step s", against(lambda r: r.typical(lambda s: s.seconds))),
        ("  20-80 %", span),
        *stages,
        ("  other s", lambda r: f"{r.typical(lambda s: s.seconds - sum(s.stages.values())):.2f}"),
        ("prompt and completion tokens/s", against(lambda r: r.mean(lambda s: s.tokens / s.seconds), digits=0)),
        ("peak memory MiB", against(lambda r: r.peak, 2**20, 0)),
        ("mean reward", lambda r: f"{r.mean(lambda s: s.reward):.3f}"),
        ("mean completion length", lambda r: f"{r.mean(lambda s: s.length):.1f}"),
        ("prompts with equal rewards", lambda r: f"{r.mean(lambda s: s.equal_rewards):.2f}"),
    ]


def warnings(results: list[Measured]) -> list[str]:
    """What makes a comparison unfair."""
    ours, *others = results
    if not ours.steps:
        return []
    length = ours.mean(lambda s: s.length)
    return [
        f"{other.provider}: its completions are {other.mean(lambda s: s.length):.1f} tokens long against {length:.1f}; "
        "compare tokens/s rather than seconds."
        for other in others
        if other.steps and abs(other.mean(lambda s: s.length) / length - 1) > LENGTHS_APART
    ]
