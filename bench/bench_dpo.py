"""Whole DPO steps on pairs of a fixed length: fastrl and TRL, each in a process of its own, in turns.

python -m bench.run dpo --against trl
python -m bench.run dpo --against trl,trl+fastrl
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import asdict, replace

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from bench.bench_step import Measured, Provider, measure_once
from bench.pairs import PairsWorkload, write_pairs
from bench.timing import environment

PROVIDERS = {
    "fastrl": Provider("bench.dpo_fastrl"),
    "trl": Provider("bench.dpo_trl"),
    "trl+fastrl": Provider("bench.dpo_trl", ("float32", "logps"), note="fastrl.integrations.trl.accelerate"),
    "trl-bf16": Provider("bench.dpo_trl", ("bfloat16",), note="bf16 weights: small updates are lost"),
}


def main(arguments: list[str]) -> None:
    """Measures, prints the table, and appends one line per provider to the results."""
    from bench.run import append, out_file, show_environment

    args = _parser().parse_args(arguments)
    names = ["fastrl", *(name for name in args.against.split(",") if name)]
    unknown = [name for name in names if name not in PROVIDERS]
    if unknown:
        raise ValueError(f"--against: expected some of {', '.join(PROVIDERS)}, got {', '.join(unknown)}.")
    threads = args.threads or len(os.sched_getaffinity(0))
    device, console = torch.device(args.device), Console(width=None if sys.stdout.isatty() else 120)
    about = environment(device)
    show_environment(console, about)
    workload = PairsWorkload(**{name: value for name, value in vars(args).items() if name in asdict(PairsWorkload())})
    results = {name: Measured(name) for name in names}
    for turn in range(args.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if results[name].status == "ok":
                console.print(f"round {turn + 1} of {args.rounds}: {name}", style="dim")
                with tempfile.TemporaryDirectory(prefix="fastrl-bench-") as folder:
                    placed = replace(workload, folder=folder)
                    write_pairs(placed)
                    measure_once(placed, PROVIDERS[name], results[name], threads, args.timeout)
    console.print(table(workload, list(results.values())))
    fields = {"op": "dpo", "workload": asdict(workload)}
    append(
        out_file(args.out, device), [fields | asdict(result) | {"environment": about} for result in results.values()]
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.run dpo", description=__doc__.splitlines()[0])
    parser.add_argument("--against", default="trl", help=f"comma-separated: {', '.join(list(PROVIDERS)[1:])}")
    parser.add_argument("--rounds", type=int, default=1, help="processes per provider")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 is one per core")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds per process")
    parser.add_argument("--out", default="", help="JSON lines; default results/<machine>/<date>.jsonl")
    for name, default in asdict(PairsWorkload()).items():
        if name != "folder":
            parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default)
    return parser


def table(workload: PairsWorkload, results: list[Measured]) -> Table:
    """Markdown: one column per provider, fastrl first; in brackets the ratio to fastrl."""
    title = f"{workload.model}, DPO on {workload.pairs} pairs of {workload.tokens} tokens a side"
    shown = Table(title=title, box=MARKDOWN, title_justify="left")
    shown.add_column("")
    for result in results:
        shown.add_column(result.provider, justify="right")
    done = [result if result.status == "ok" and result.steps else None for result in results]
    rows = {
        "step s": lambda result: result.typical(lambda step: step.seconds),
        "tokens/s": lambda result: result.mean(lambda step: step.tokens / step.seconds),
        "peak memory MiB": lambda result: result.peak / 2**20,
    }
    for heading, of in rows.items():
        cells = []
        for result in done:
            ratio = f" ({of(result) / of(done[0]):.2f}x)" if result and done[0] and result is not done[0] else ""
            cells.append(f"{of(result):,.{2 if heading == 'step s' else 0}f}{ratio}" if result else "")
        shown.add_row(heading, *cells)
    losses = (f"{result.steps[0].reward:.4f}" if result else "" for result in done)
    shown.add_row(f"loss of step {workload.warm_up + 1}", *losses)  # the first that is measured
    notes = [result.detail or PROVIDERS[result.provider].note for result in results]
    states = [result.status for result in results]
    shown.add_row("status", *(": ".join(filter(None, pair)) for pair in zip(states, notes, strict=True)))
    return shown
