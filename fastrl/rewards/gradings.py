"""Gradings that agree with a ranking, from which a model learns to judge: `fastrl judge --gradings`.

The evaluation data (EFT) of Self-Rewarding Language Models, arXiv:2401.10020 section 2.1: a judge grades ranked
answers, and its gradings are kept where their points order the answers as the ranking does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from fastrl.check import require
from fastrl.rewards.judge import LLMJudge, parsed

OP = "judge"


@dataclass(frozen=True)
class Gradings:
    """How a judge graded ranked answers."""

    answers: int
    missing: int  # answers without a grading that ends in a score
    agreement: float  # share of pairs of unlike rank whose points order them so; ties count half; NaN without pairs
    rows: int
    kept: int  # rows all of whose pairs are ordered as ranked

    def __str__(self) -> str:
        return (
            f"{self.answers} answers graded, {self.missing} without a readable score\n"
            f"pairs ordered as ranked: {self.agreement:.3f}\n"
            f"{self.kept} of {self.rows} rows kept, whose points order all answers as ranked"
        )


def write_gradings(rows: Sequence[Mapping[str, Any]], judge: LLMJudge, out: Path, *, seed: int = 0) -> Gradings:
    """Grades all answers and writes those of the rows that are ordered as ranked, for `algorithm: sft`.

    A line has `prompt`, the judge's question, and `completion`, of its gradings the one nearest to their mean; besides,
    `points` and the `row`'s number.

    Args:
        rows: `prompt`, `responses` and `ranking` (1 is best; equal ranks are not compared), or `chosen` and `rejected`.

    Raises:
        ValueError: a row lacks a column, the judge does not answer, or it agrees with no row.
    """
    ranked = [_ranked(number, row) for number, row in enumerate(rows)]
    asked = [(prompt, answer) for prompt, answers, _ in ranked for answer in answers]
    graded = judge.points(*zip(*asked, strict=True), seed=seed)
    failures = [points for points, _ in graded if isinstance(points, Exception)]
    require(not failures, OP, "model", "a grading of every answer", f"{failures[0]}" if failures else "")
    agreed, lines, kept = [], [], 0
    results = iter(graded)
    for number, (prompt, answers, ranks) in enumerate(ranked):
        points = [next(results) for _ in answers]
        scores = [score for score, _ in points]
        pairs = [(a, b) for a, b in combinations(range(len(answers)), 2) if ranks[a] != ranks[b]]
        read = [(a, b) for a, b in pairs if scores[a] is not None and scores[b] is not None]
        ordered = [_agrees(scores[a] - scores[b], ranks[b] - ranks[a]) for a, b in read]
        agreed += ordered
        if not pairs or ordered != [1.0] * len(pairs):
            continue
        kept += 1
        for answer, (score, gradings) in zip(answers, points, strict=True):
            told = {"prompt": judge.points_question(prompt, answer), "completion": _nearest(gradings, score)}
            lines.append(told | {"points": score, "row": number})
    missing = sum(points is None for points, _ in graded)
    found = Gradings(len(asked), missing, fmean(agreed) if agreed else float("nan"), len(rows), kept)
    do = "Take another judge, or teach this one with written gradings first."
    require(kept > 0, OP, "model", "a judge that orders the answers of some row as ranked", f"none.\n{found}", do)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return found


def _ranked(number: int, row: Mapping[str, Any]) -> tuple[Any, list[Any], list[float]]:
    """(prompt, answers, ranks) of a row."""
    paired = row.get("chosen") and row.get("rejected")
    answers = [row["chosen"], row["rejected"]] if paired else list(row.get("responses") or ())
    ranks = [1, 2] if paired else list(row.get("ranking") or ())
    good = bool(row.get("prompt")) and len(answers) > 1 and len(ranks) == len(answers)
    expected = "a prompt with responses and their ranking, or with chosen and rejected"
    require(good, OP, f"row {number}", expected, ", ".join(row) or "nothing")
    return row["prompt"], answers, ranks


def _agrees(points: float, rank: float) -> float:
    return 0.5 if points == 0 else float((points > 0) == (rank > 0))


def _nearest(gradings: Sequence[str], mean: float) -> str:
    read = {text: points for text in gradings if (points := parsed(text)) is not None}
    return min(read, key=lambda text: abs(read[text] - mean))
