"""One command for every benchmark.

fastrl bench                                              every op
fastrl bench linear_logprob --against torch,trl,liger
fastrl bench linear_policy_loss --dtype float32 bfloat16 --against all
fastrl bench step --against trl,naive
fastrl bench dpo --against trl
fastrl bench rollout
fastrl bench --quick                                      the loss of the demo in under a minute, with a picture
fastrl bench --page                                       docs/benchmarks.md from the results, without measuring
fastrl bench --tune                                       tiles of the Triton kernels, on a GPU

`python -m bench.run` is the same.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from bench.peers import PEERS, build
from bench.shapes import find
from bench.timing import Case, Provider, Result, environment, machine, matmul_rate, measure

HEAD_OPS = ("linear_logprob", "linear_policy_loss", "logprob", "linear")  # the others work in float32 whatever --dtype
DTYPES = ("bfloat16", "float16", "float32", "float64")
RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> None:
    """Runs one benchmark and exits."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["step"]:
        from bench.bench_step import main as step

        return step(arguments[1:])
    if arguments[:1] == ["dpo"]:
        from bench.bench_dpo import main as dpo

        return dpo(arguments[1:])
    if arguments[:1] == ["rollout"]:
        return _rollout(arguments[1:])
    if "--quick" in arguments:
        from bench.quick import main as quick

        return quick([argument for argument in arguments if argument != "--quick"])
    if "--page" in arguments:
        from bench.page import main as page

        return page()
    if "--tune" in arguments:
        from bench.tune import main as tune

        return tune([argument for argument in arguments if argument != "--tune"])
    return _micro(arguments)


def _micro(arguments: list[str]) -> None:
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        prog="fastrl bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("op", nargs="?", choices=(*PEERS, "step", "dpo", "rollout"), help="all ops by default")
    parser.add_argument("--against", default="all", help="comma-separated peers, all, or none")
    parser.add_argument("--backends", default="auto", help="comma-separated fastrl backends, or an op's VARIANTS")
    parser.add_argument("--shapes", default="", help="comma-separated names from bench/shapes.py")
    parser.add_argument("--device", default=here, help="a GPU where torch sees one, by default")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], help="one or more, each with a table of its own")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 keeps torch's choice")
    parser.add_argument("--out", default="", help=f"JSON lines; default {RESULTS.name}/<machine>/<date>.jsonl")
    args = parser.parse_args(arguments)
    dtypes = names(",".join(args.dtype))
    unknown = [name for name in dtypes if name not in DTYPES]
    if unknown or not dtypes:
        raise ValueError(f"--dtype: expected some of {', '.join(DTYPES)}, got {', '.join(unknown) or 'none'}.")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    console = Console(width=None if sys.stdout.isatty() else 120)
    about = environment(device)
    show_environment(console, about)
    for op in [args.op] if args.op else PEERS:
        for case in _cases(op, args, dtypes, device):
            results = measure(case, args.rounds, device)
            rate = matmul_rate(case.dtype, device) if case.flops else 0.0
            console.print(table(case, results, rate))
            rows = [record(op, case, result, about) | {"matmul_rate": rate, "flops": case.flops} for result in results]
            append(out_file(args.out, device), rows)


def _cases(op: str, args: argparse.Namespace, dtypes: list[str], device: torch.device) -> Iterator[Case]:
    module = import_module(f"bench.bench_{op}")
    against = [] if args.against == "all" else names(args.against)
    shapes = find(module.SHAPES, names(args.shapes) or module.DEFAULT)
    kinds = [getattr(torch, name) for name in dtypes] if op in HEAD_OPS else [torch.float32]
    for dtype, (name, shape) in product(kinds, shapes.items()):
        for mode, tensors in module.tensors(shape, dtype, device).items():
            ours = {
                "fastrl" if backend == "auto" else f"fastrl/{backend}": ours_on(module, backend, *tensors)
                for backend in names(args.backends)
            }
            peers, absent = build(op, against, *tensors)
            label = label_of(op, name, shape, mode, dtype)
            flops = module.matmul_flops(*tensors) if hasattr(module, "matmul_flops") else 0.0
            yield Case(label, dtype, lambda t=tensors: module.truth(*t), ours | peers, absent, flops)


def label_of(op: str, name: str, shape: Any, mode: str, dtype: torch.dtype) -> str:
    """The title of a case, and how `bench.goals` finds it."""
    size = " x ".join(map(str, shape)) if isinstance(shape, tuple) else str(shape)
    return ", ".join(filter(None, (op, f"{name} ({size})", mode, str(dtype).removeprefix("torch."))))


def ours_on(module: Any, backend: str, *tensors: Any) -> Provider:
    """The op on a backend, or one of the op's other ways to be called."""
    variants = getattr(module, "VARIANTS", {})
    return variants[backend](*tensors) if backend in variants else module.fastrl_provider(backend, *tensors)


def _rollout(arguments: list[str]) -> None:
    from bench import bench_rollout

    sys.argv = ["bench.run rollout", *arguments]
    bench_rollout.main()


def names(text: str) -> list[str]:
    """Comma-separated words."""
    return [word for word in text.split(",") if word]


def show_environment(console: Console, about: dict[str, Any]) -> None:
    """One line that says where the numbers are from."""
    console.print(", ".join(f"{key} {value}" for key, value in about.items() if key != "machine"), style="dim")


def table(case: Case, results: list[Result], rate: float) -> Table:
    """Markdown: the fastest first, then those that have no time, each with its reason."""
    title = f"{case.label}; torch.mm: {rate / 1e12:.2f} TFLOP/s" if case.flops else case.label
    shown = Table(title=title, box=MARKDOWN, title_justify="left")
    floor = case.flops / rate if case.flops else None
    for heading in (
        "provider",
        "median ms",
        "20-80 %",
        "of best peer",
        "of mm",
        "device ms",
        "extra MiB",
        "error",
        "note",
    ):
        shown.add_column(heading, justify="left" if heading in ("provider", "note") else "right")
    peers = [r.median for r in results if r.median is not None and not r.provider.startswith("fastrl")]
    best = min(peers, default=None)
    for result in sorted(results, key=lambda r: r.median if r.median is not None else float("inf")):
        shown.add_row(result.provider, *_cells(result, best, floor))
    return shown


def _cells(result: Result, best: float | None, floor: float | None) -> list[str]:
    """`floor`: seconds that the matmuls alone would take at the rate of a large `torch.mm`."""
    error = f"{result.error:.1e}" if result.error is not None else ""
    if result.median is None:
        return [result.status, "", "", "", "", "", error, result.detail]
    peak = "" if result.peak_bytes is None else f"{result.peak_bytes / 2**20:.1f}"
    span = f"{result.low * 1e3:.3f}-{result.high * 1e3:.3f}"
    ratio = f"{result.median / best:.2f}" if best else ""
    share = f"{floor / result.median:.0%}" if floor else ""
    device = f"{result.device_seconds * 1e3:.4f}" if result.device_seconds else ""
    return [f"{result.median * 1e3:.3f}", span, ratio, share, device, peak, error, result.detail]


def record(op: str, case: Case, result: Result, about: dict[str, Any]) -> dict[str, Any]:
    """One line of the results file."""
    return {"op": op, "case": case.label} | asdict(result) | {"environment": about}


def out_file(given: str, device: torch.device) -> Path:
    """`--out`, or today's file of this machine."""
    return Path(given) if given else RESULTS / machine(device) / time.strftime("%Y-%m-%d.jsonl")


def append(path: Path, records: list[dict[str, Any]]) -> None:
    """Adds lines to a results file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as handle:
        handle.write("".join(json.dumps(line) + "\n" for line in records))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(str(error))
