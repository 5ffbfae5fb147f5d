"""A minute's benchmark: the demo's loss, forward and backward, against every installed peer; a table and a picture.

The dtype is that which a run would take here. Nothing is written to the results: three rounds are too few for a record.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from bench import bench_linear_policy_loss as op
from bench.page import bars
from bench.peers import build
from bench.run import label_of, show_environment
from bench.shapes import HEADS
from bench.timing import Case, Result, environment, matmul_rate, measure

NAME = "smollm2"
SLOW = ("lce", "compile")  # of the peers, those whose first call alone takes too long here
ROUNDS = 3


def main(arguments: list[str]) -> None:
    """Measures, prints the table and writes the picture."""
    parser = argparse.ArgumentParser(prog="fastrl bench --quick", description=__doc__.splitlines()[0])
    parser.add_argument("--plot", default="bench.svg", type=Path, help="the picture to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    began, device, console = time.monotonic(), torch.device(args.device), Console()
    dtype = dtype_of(device)
    show_environment(console, environment(device))
    mode, tensors = next(iter(op.tensors(HEADS[NAME], dtype, device).items()))
    peers, absent = build(op.OP, [], *tensors)
    skipped = {name: "left out of --quick" for name in SLOW if name in peers}
    ours = {"fastrl": op.fastrl_provider("auto", *tensors)}
    others = {name: call for name, call in peers.items() if name not in SLOW}
    flops = op.matmul_flops(*tensors)
    label = label_of(op.OP, NAME, HEADS[NAME], mode, dtype)
    case = Case(label, dtype, lambda: op.truth(*tensors), ours | others, absent | skipped, flops)
    results = measure(case, ROUNDS, device)
    console.print(short(case, results, matmul_rate(dtype, device)))
    rest = [one for one in results if one.median is None]
    console.print("; ".join(f"{one.provider}: {one.status}, {one.detail}" for one in rest), style="dim")
    draw(label, results, args.plot)
    console.print(f"{args.plot}, after {time.monotonic() - began:.0f} s")


def short(case: Case, results: list[Result], rate: float) -> Table:
    """The timed providers, the fastest first, in a table for 80 columns."""
    shown = Table(title=case.label, title_justify="left", box=SIMPLE)
    timed = sorted((one for one in results if one.median is not None), key=lambda one: one.median)
    best = min((one.median for one in timed if not one.provider.startswith("fastrl")), default=None)
    for heading in ("", "ms", "of best peer", "of matmuls' rate", "extra MiB", "error"):
        shown.add_column(heading, justify="right" if heading else "left")
    for one in timed:
        ratio = f"{one.median / best:.2f}" if best else ""
        memory = "" if one.peak_bytes is None else f"{one.peak_bytes / 2**20:.0f}"
        share = f"{case.flops / rate / one.median:.0%}" if rate else ""
        shown.add_row(one.provider, f"{one.median * 1e3:.0f}", ratio, share, memory, f"{one.error:.0e}")
    return shown


def dtype_of(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, and on a CPU where a run would take it."""
    if device.type == "cpu":
        from fastrl.model.attention import slow_bfloat16

        return torch.float32 if slow_bfloat16() else torch.bfloat16
    return torch.bfloat16


def draw(title: str, results: list[Result], path: Path) -> None:
    """Bars of the median times, with what was wrong or absent named below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = sorted((one for one in results if one.median is not None), key=lambda one: -one.median)
    rest = ", ".join(f"{one.provider} {one.status}" for one in results if one.median is None)
    with pyplot.rc_context({"font.size": 10, "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(figsize=(7.5, 0.9 + 0.42 * len(timed)), layout="constrained")
        bars(axes, [(one.provider, one.median, f"{one.median * 1e3:.0f} ms") for one in timed])
        axes.set_title(title, loc="left", fontsize=9)
        axes.text(0, -0.02, rest, transform=axes.transAxes, va="top", fontsize=7.5, color="#57606a")
        figure.savefig(path)
        pyplot.close(figure)
