"""`fastrl analyze rewards ROWS`: the measures as tables, JSON and a picture."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

import fastrl.analyze
from fastrl.analyze.measures import TRANSITIONS, Analysis, analyze
from fastrl.analyze.pairs import OP, SIDES, read_pairs, scored, with_rewritten
from fastrl.check import require
from fastrl.data.sources import read_rows


def main(args: Sequence[str]) -> int:
    """`fastrl analyze rewards ROWS`: prints the three measures, and draws them."""
    options = _options(args)
    rows = read_rows(options.rows, size=0, seed=0, options={})
    if options.rewritten:
        rows = with_rewritten(rows, read_rows(options.rewritten, size=0, seed=0, options={}))
    for model, name in ((options.model, "reward"), (options.pre, "reward_pre")):
        if model:
            rows = scored(rows, model, name, dtype=options.dtype)
    pairs = read_pairs(rows, features=options.features, targets=options.targets, cluster=options.cluster)
    analysis = analyze(pairs, max_vif=options.max_vif)
    if options.json:
        from fastrl.monitor.log import encode

        print(encode(asdict(analysis)))
    else:
        show(analysis)
    if options.plot:
        plot(analysis, options.plot)
        if not options.json:
            print(f"\nplot: {options.plot}")
    return 0


def _options(args: Sequence[str]) -> Namespace:
    parser = ArgumentParser(
        prog="fastrl analyze", description=fastrl.analyze.__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["rewards"])
    parser.add_argument("rows", metavar="ROWS", help="a .jsonl, .json, .csv or .parquet file, or a folder of them")
    parser.add_argument("--model", default="", help="reward model after alignment: a run or a folder; scores the texts")
    parser.add_argument("--pre", default="", help="reward model before alignment, likewise")
    parser.add_argument(
        "--rewritten", default="", metavar="ROWS", help="the pairs rewritten, with the same ids and columns"
    )
    parser.add_argument("--features", nargs="+", default=[], help="features to take; by default every one")
    parser.add_argument("--targets", nargs="+", default=[], help="features that a judge goes by, the weightiest first")
    parser.add_argument("--cluster", default="", help="column that dependent pairs share, such as prompt")
    parser.add_argument("--max-vif", type=float, default=10.0, help="variance inflation factor to drop features above")
    parser.add_argument("--dtype", default="float32", help="of the models' weights")
    parser.add_argument("--plot", default="", metavar="FILE", help="a picture to write")
    parser.add_argument("--json", action="store_true", help="print only JSON")
    return parser.parse_args(args)


def show(analysis: Analysis) -> None:
    """Prints the measures as tables."""
    print(f"{analysis.pairs} pairs")
    for line in analysis.said:
        print(f"  {line}")
    for when, effects in analysis.imprint.items():
        print(f"\nfeature imprint, {WHEN[when]}")
        rows = [
            (e.feature, f"{e.beta:+.4f}", f"{e.error:.4f}", f"{e.low:+.3f} to {e.high:+.3f}", _p(e.p_adjusted),
             str(e.differing), f"{e.vif:.2f}")
            for e in sorted(effects, key=lambda e: -e.beta)
        ]  # fmt: skip
        _table(("feature", "beta", "error", "95 %", "p (Bonferroni)", "differ", "VIF"), rows)
    for name, why in analysis.dropped.items():
        print(f"  without an imprint: {name}, {why}")
    print("\nalignment with the humans")
    rows = [
        (name, str(one.pairs), f"{one.share:.3f}", f"{one.low:.3f} to {one.high:.3f}", f"{one.resistance:.3f}",
         str(one.ties))
        for name, one in analysis.agreement.items()
    ]  # fmt: skip
    _table(("reward", "pairs", "aligned", "95 %", "resistance", "ties"), rows)
    if analysis.transitions:
        print("\nfrom before to after alignment")
        _table(
            ("", "pairs", "share"), [(n, str(c), f"{c / analysis.pairs:.3f}") for n, c in analysis.transitions.items()]
        )
    if analysis.by_labeler:
        print("\nby what the judge prefers")
        names = [name for name in next(iter(analysis.by_labeler.values())) if name != "pairs"]
        rows = [
            (label, str(one["pairs"]), *(f"{one[n] / (one['pairs'] if n in TRANSITIONS else 1):.3f}" for n in names))
            for label, one in analysis.by_labeler.items()
        ]
        _table(("judge", "pairs", *(f"aligned {n}" if n in ("after", "before") else n for n in names)), rows)
    if analysis.flips:
        print("\npairs that ceased to be aligned when rewritten, by what the rewriting did to a feature")
        rows = [
            (f.feature, f"{f.text} {f.flip} it", str(f.pairs), f"{f.share:.3f}", f"{f.unchanged_share:.3f}",
             "-" if f.odds_ratio is None else f"{f.odds_ratio:.2f}",
             "-" if f.low is None else f"{f.low:.2f} to {f.high:.2f}", _p(f.p_adjusted))
            for f in analysis.flips
        ]  # fmt: skip
        _table(("feature", "flip", "pairs", "ceased", "if unchanged", "odds ratio", "95 %", "p (Bonferroni)"), rows)


WHEN = {"after": "after alignment", "before": "before alignment", "shift": "after less before"}


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [text.rjust(width) for text, width in zip(row, widths, strict=True)]
        print("  " + "  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())


def plot(analysis: Analysis, path: str) -> None:
    """Draws imprints, transitions and odds ratios, those that there are."""
    from matplotlib.figure import Figure

    drawings = [draw for there, draw in (
        (analysis.imprint, _draw_imprint),
        (analysis.transitions, _draw_transitions),
        (any(f.low is not None for f in analysis.flips), _draw_flips),
    ) if there]  # fmt: skip
    require(bool(drawings), OP, "plot", "features or rewards before alignment to draw", "neither")
    most = max(len(analysis.flips), *(len(effects) for effects in analysis.imprint.values()), 6)
    figure = Figure(figsize=(5.2 * len(drawings), 1.6 + 0.3 * most), layout="constrained")
    for axes, draw in zip(figure.subplots(1, len(drawings), squeeze=False)[0], drawings, strict=True):
        draw(axes, analysis)
    figure.savefig(path, dpi=150)


def _draw_imprint(axes: Any, analysis: Analysis) -> None:
    order = sorted(analysis.imprint["after"], key=lambda effect: effect.beta)
    height = {effect.feature: place for place, effect in enumerate(order)}
    for number, (when, effects) in enumerate(analysis.imprint.items()):
        y = [height[effect.feature] + 0.2 * (1 - number) for effect in effects]
        beta = np.array([effect.beta for effect in effects])
        spread = np.abs([[e.low for e in effects], [e.high for e in effects]] - beta)
        axes.errorbar(beta, y, xerr=spread, fmt="os^"[number], markersize=4, capsize=2, color=f"C{number}",
                      label=WHEN[when])  # fmt: skip
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(order)), [effect.feature for effect in order])
    axes.set_xlabel("reward")
    axes.set_title("Feature imprint, 95 %")
    axes.grid(axis="x", alpha=0.25)
    axes.legend(frameon=False, fontsize=8)


def _draw_transitions(axes: Any, analysis: Analysis) -> None:
    """A bar for all pairs, and one for each preference of the judge."""
    bars = {"all": {"pairs": analysis.pairs, **analysis.transitions}} | analysis.by_labeler
    labels = [name if name == "all" else f"judge: {name}" for name in bars]
    left = np.zeros(len(bars))
    for name, color in zip(TRANSITIONS, ("#4c9f70", "#a8d5ba", "#e8a33d", "#c8553d"), strict=True):
        share = np.array([bar[name] / bar["pairs"] for bar in bars.values()])
        axes.barh(range(len(bars)), share, left=left, color=color, label=name)
        for y, (start, width) in enumerate(zip(left, share, strict=True)):
            if width > 0.06:
                axes.text(start + width / 2, y, f"{100 * width:.1f}", ha="center", va="center", fontsize=8)
        left += share
    axes.set_yticks(
        range(len(bars)), [f"{label}\n{bar['pairs']}" for label, bar in zip(labels, bars.values(), strict=True)]
    )
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.set_title("From before to after alignment, % of pairs")
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))


def _draw_flips(axes: Any, analysis: Analysis) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    shown = [flip for flip in analysis.flips if flip.low is not None][::-1]
    for y, flip in enumerate(shown):
        bars = [[flip.odds_ratio - flip.low], [flip.high - flip.odds_ratio]]
        axes.errorbar([flip.odds_ratio], [y], xerr=bars, fmt="o", markersize=4, capsize=2,
                      color=f"C{SIDES.index(flip.text)}")  # fmt: skip
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(range(len(shown)), [f"{flip.text} {flip.flip} {flip.feature}" for flip in shown])
    axes.set_xlabel("odds ratio of ceasing to be aligned")
    axes.set_title("Robustness to rewriting, 95 %")
    axes.grid(axis="x", alpha=0.25)
