"""Writes docs/benchmarks.md and its picture from bench/results: `python -m bench.page`, some seconds, no measurement.

Of every case the newest run of each machine and instruction set counts; each row names its commit and date. Broken
lines are named and skipped. Printed besides: cases whose time as a share of the best peer's, both of one run, has grown
by more than 5 % since the run before on the same machine.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE, PICTURE = ROOT / "bench" / "results", ROOT / "docs" / "benchmarks.md", "step.svg"
RENAMED = {"groups silent": "groups zero-advantage", "x 49152 x 32)": "x 49152, sequences of 32)",
           "x 262144 x 32)": "x 262144, sequences of 32)"}  # in labels of older lines  # fmt: skip
WORSE = 1.05
WHOLE = ("step", "dpo")  # seconds of whole training steps; the rest are calls of an op
NAMES = {
    "trl": "TRL",
    "trl+fastrl": "TRL + fastrl",
    "trl+fastrl-loss": "TRL + fastrl, loss=True",
    "naive": "plain loop",
}
COLOURS = {"fastrl": "#1f6feb", "trl+fastrl": "#7aa7f0", "trl+fastrl-loss": "#7aa7f0", "other": "#b0b7c3"}
ABOUT = """# Benchmarks

Every number here is a line of the results in the source tree, with the device, its instruction sets, versions and the
commit; `fastrl bench --page` makes this page of them. `fastrl bench --quick` measures the loss of the demo in a minute,
`fastrl bench` every op on your machine, against what you have installed. [The protocol](../bench/README.md) says how.

Times are medians; providers of a case run in turns in one process, and their outputs are compared with float64 first. A
whole step is a process of its own. `of best peer` below 1 is faster than anything else measured.
"""


@dataclass(frozen=True)
class Line:
    """One provider on one case, in one run."""

    op: str
    case: str
    provider: str
    status: str
    seconds: float | None
    peak: float | None  # bytes
    error: float | None
    about: Mapping[str, Any]

    @property
    def place(self) -> tuple[str, str]:
        """Machine and instruction sets."""
        return self.about["machine"], self.about["native"]

    @property
    def run(self) -> str:
        """The run that it is of."""
        return self.about["date"]


def read(folder: Path) -> tuple[list[Line], list[str]]:
    """All lines, the oldest first, and what is wrong with those that cannot be read."""
    found, wrong = [], []
    for path in sorted(folder.glob("*/*.jsonl")):
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                found.append(_line(json.loads(text)))
            except (ValueError, KeyError, TypeError) as error:
                wrong.append(f"{path.name}, line {number}: {type(error).__name__}: {error}")
    return sorted(found, key=lambda line: line.run), wrong


def _line(values: Mapping[str, Any]) -> Line:
    whole = values["op"] in WHOLE
    steps = [step["seconds"] for step in values["steps"]] if whole else []
    seconds = (median(steps) if steps else None) if whole else values["median"]
    peak = values["peak_bytes"]
    peak = (median(peak) if peak else None) if isinstance(peak, list) else peak
    case = _workload(values["op"], values["workload"]) if whole else values["case"]
    for old, new in RENAMED.items():
        case = case.replace(old, new)
    errors = values.get("errors") or {}
    about = values["environment"]
    about["machine"], about["date"], about["commit"], about["native"]  # a line without them says nothing
    return Line(
        values["op"],
        case,
        values["provider"],
        values["status"],
        seconds,
        peak,
        max(errors.values(), default=None),
        about,
    )


def _workload(op: str, asked: Mapping[str, Any]) -> str:
    if op == "dpo":
        return f"DPO, {asked['model']}, {asked.get('pairs', asked.get('rows', '?'))} pairs a step"
    size = f"{asked['prompts']} prompts x {asked['samples']} completions of up to {asked['max_new_tokens']} tokens"
    dtype = f", {asked['dtype']}" if asked.get("dtype") else ""
    return (
        f"{asked.get('algorithm', 'grpo').upper()}, {asked['model']}, {size}, reward {asked.get('reward', '')}{dtype}"
    )


def newest(lines: Sequence[Line]) -> dict[tuple[str, str], dict[str, dict[str, Line]]]:
    """Place -> case -> provider -> its line, all of the newest run of the case that has a time of fastrl's."""
    last: dict[tuple[tuple[str, str], str], str] = {}
    for line in lines:
        if line.provider == "fastrl" and line.seconds is not None:
            last[line.place, line.case] = line.run
    found: dict[tuple[str, str], dict[str, dict[str, Line]]] = {}
    for line in lines:
        if last.get((line.place, line.case)) == line.run:
            found.setdefault(line.place, {}).setdefault(line.case, {})[line.provider] = line
    return found


def share(of: Mapping[str, Line]) -> float | None:
    """fastrl's time as a share of the best peer's; None without a peer."""
    ours = of["fastrl"].seconds if "fastrl" in of else None
    peers = [line.seconds for name, line in of.items() if not name.startswith("fastrl") and line.seconds]
    return ours / min(peers) if ours and peers else None


def slower(lines: Sequence[Line]) -> Iterator[str]:
    """Cases whose share has grown since the run before."""
    runs: dict[tuple[tuple[str, str], str], dict[str, dict[str, Line]]] = {}
    for line in lines:
        runs.setdefault((line.place, line.case), {}).setdefault(line.run, {})[line.provider] = line
    for (place, case), by_run in runs.items():
        shares = [one for of in by_run.values() if (one := share(of)) is not None]
        if len(shares) > 1 and shares[-1] > WORSE * shares[-2]:
            yield f"{', '.join(place)}: {case}: {shares[-2]:.2f} -> {shares[-1]:.2f} of the best peer"


def page(lines: Sequence[Line]) -> str:
    """The text of docs/benchmarks.md."""
    parts = [ABOUT, f"![Seconds of a GRPO step](assets/{PICTURE})\n" if for_picture(lines) else ""]
    for place, cases in newest(lines).items():
        machine, isa = place
        some = next(iter(next(iter(cases.values())).values())).about
        parts.append(f"\n## {machine}, {isa}\n\n{some['cpu']}, {some['threads']} threads, torch {some['torch']}.\n")
        whole = {case: of for case, of in cases.items() if next(iter(of.values())).op in WHOLE}
        parts += [_whole(case, of) for case, of in whole.items()]
        ops = {case: of for case, of in cases.items() if case not in whole}
        if ops:
            parts.append(_ops(ops))
    return "".join(parts)


def _whole(case: str, of: Mapping[str, Line]) -> str:
    ours = of["fastrl"].seconds
    rows = ["", f"**{case}**", "", "| | s a step | of fastrl's | peak MiB |", "|---|---|---|---|"]
    for name, line in sorted(of.items(), key=lambda item: item[1].seconds or 1e9):
        time = f"{line.seconds:.1f} | {line.seconds / ours:.2f}" if line.seconds else f"{line.status} | "
        rows.append(f"| {name} | {time} | {_mib(line.peak)} |")
    return "\n".join([*rows, "", _of_commit(of), ""])


def _ops(cases: Mapping[str, Mapping[str, Line]]) -> str:
    rows = ["", "| op | fastrl ms | best peer | its ms | of best peer | fastrl MiB | its MiB | error, its | commit |"]
    rows.append("|" + "---|" * 9)
    for case, of in sorted(cases.items()):
        ours, peers = (
            of["fastrl"],
            [line for name, line in of.items() if not name.startswith("fastrl") and line.seconds],
        )
        best = min(peers, key=lambda line: line.seconds, default=None)
        its = (best.provider, f"{best.seconds * 1e3:.1f}", f"{share(of):.2f}") if best else ("none", "", "")
        errors = ", ".join(f"{one.error:.0e}" for one in (ours, best) if one and one.error is not None)
        memory = (_mib(ours.peak), _mib(best.peak) if best else "")
        commit = f"{ours.about['commit']}, {ours.run[:10]}"
        rows.append("| " + " | ".join([case, f"{ours.seconds * 1e3:.1f}", *its, *memory, errors, commit]) + " |")
    return "\n".join([*rows, ""])


def _mib(size: float | None) -> str:
    return "" if size is None else f"{size / 2**20:.0f}"


def _of_commit(of: Mapping[str, Line]) -> str:
    about = of["fastrl"].about
    versions = ", ".join(f"{name} {about[name]}" for name in ("trl", "transformers") if about.get(name))
    return f"Commit {about['commit']}, {about['date'][:10]}, {versions}."


def for_picture(lines: Sequence[Line]) -> list[tuple[tuple[str, str], str, Mapping[str, Line]]]:
    """Each place's newest GRPO step of the widest comparison."""
    found = []
    for place, cases in newest(lines).items():
        steps = [(case, of) for case, of in cases.items() if case.startswith("GRPO") and "trl" in of]
        if steps:
            case, of = max(steps, key=lambda one: (len(one[1]), one[1]["fastrl"].run))
            found.append((place, case, {name: line for name, line in of.items() if line.seconds}))
    return found


def draw(lines: Sequence[Line], path: Path) -> None:
    """Bars of seconds a step, one panel per place."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = for_picture(lines)
    heights = [len(of) for *_, of in panels]
    with pyplot.rc_context({"svg.hashsalt": "fastrl", "font.size": 10, "svg.fonttype": "none"}):
        figure, every = pyplot.subplots(
            len(panels), 1, figsize=(7.5, 0.36 * sum(heights) + 0.75 * len(panels)), squeeze=False,
            height_ratios=heights, layout="constrained",
        )  # fmt: skip
        for axes, (place, case, of) in zip(every[:, 0], panels, strict=True):
            slowest_first = sorted(of.items(), key=lambda item: item[1].seconds, reverse=True)
            bars(axes, [(name, line.seconds, f"{line.seconds:.1f} s") for name, line in slowest_first])
            axes.set_title(f"{case.split(', reward')[0]}\n{', '.join(place)}", loc="left", fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)


def bars(axes: Any, rows: Sequence[tuple[str, float, str]]) -> None:
    """A bar for each (provider, length, label), the last one on top."""
    names, lengths, labels = zip(*rows, strict=True)
    colours = [
        COLOURS["fastrl" if name.startswith("fastrl") else name if name in COLOURS else "other"] for name in names
    ]
    axes.bar_label(
        axes.barh([NAMES.get(name, name) for name in names], lengths, color=colours, height=0.72), labels, padding=4
    )
    axes.set_xlim(0, 1.15 * max(lengths))
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.xaxis.set_visible(False)
    axes.tick_params(left=False)


def main() -> None:
    """Writes page and picture, and prints what is slower or broken."""
    lines, wrong = read(RESULTS)
    draw(lines, PAGE.parent / "assets" / PICTURE)
    PAGE.write_text(page(lines), encoding="utf-8")
    for message in (*wrong, *slower(lines)):
        print(message)
    print(f"{PAGE.relative_to(ROOT)}: {len(lines)} lines of {len({line.run for line in lines})} runs", file=sys.stderr)


if __name__ == "__main__":
    main()
