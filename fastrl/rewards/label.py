"""Labels pairs of answers with a judge's preferences, for a reward model or DPO with soft labels: `fastrl judge`.

This is the labelling of RLAIF, arXiv:2309.00267 section 2.1. A reward model then learns from the cross-entropy to the
labels: `data.soft_label_column`.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from fastrl.check import require, sentence
from fastrl.data.sources import GYM, gym_answers, read_rows
from fastrl.rewards.chat_server import ChatServer
from fastrl.rewards.gradings import write_gradings
from fastrl.rewards.judge import CRITERIA, FOOLING, LLMJudge, Score

OP = "judge"
COLUMN = "soft_label"
AT_ONCE = 32  # pairs between two writes
CANARY_PAIRS = 2  # pairs whose chosen answers are compared with answers without content


@dataclass(frozen=True)
class Labels:
    """How a judge labelled pairs. Shares are of the pairs with a label; NaN if there are none."""

    labelled: int
    missing: int  # judged, but the judge said nothing that could be read
    accuracy: float  # the chosen answer is preferred, on the mean of both orders; ties count half
    first_order: float  # the same, with the chosen answer first
    second_order: float  # the same, with the chosen answer second
    consistent: float  # both orders prefer the same answer

    def __str__(self) -> str:
        return (
            f"{self.labelled} pairs labelled, {self.missing} without a readable judgement\n"
            f"agrees with the given order: {self.accuracy:.3f} (chosen first {self.first_order:.3f}, "
            f"second {self.second_order:.3f})\n"
            f"prefers the same answer in both orders: {self.consistent:.3f}"
        )


def label_pairs(
    rows: Sequence[Mapping[str, Any]],
    judge: LLMJudge,
    out: Path,
    *,
    reasons: bool = False,
    seed: int = 0,
    show: Callable[[str], None] = print,
) -> Labels:
    """Writes the rows to `out`, one JSON object a line, with the judge's preferences, and returns how they came out.

    `soft_label` is the probability that `chosen` is better, and null where the judgement cannot be read; `orders` are
    the probabilities with `chosen` first and second; `judge` is the judge's name and `row` the row's number. Lines that
    `out` already has are kept and not judged again.

    Args:
        rows: `prompt`, `chosen` and `rejected`: text or chat messages.

    Raises:
        ValueError: a row lacks a column, `out` is another judge's, or the judge does not answer. Lines written so far
            stay.
    """
    pairs = [_pair(number, row) for number, row in enumerate(rows)]
    done = _written(out, str(judge.model))
    left = [number for number in range(len(rows)) if number not in done]
    if done:
        show(f"{out} has {len(done)} of {len(rows)} pairs; {len(left)} to go.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as handle:
        for start in range(0, len(left), AT_ONCE):
            part = left[start : start + AT_ONCE]
            asked = list(zip(*(pairs[number] for number in part), strict=True))
            orders = judge.both_orders(*asked, reasons=reasons, seed=seed + start)
            lost = [one for pair in orders for one in pair if isinstance(one, Exception)]
            for number, pair in zip(part, orders, strict=True):
                if any(isinstance(one, Exception) for one in pair):
                    continue
                label = None if None in pair else fmean(pair)
                more = {COLUMN: label, "orders": list(pair), "judge": str(judge.model), "row": number}
                handle.write(json.dumps({**rows[number], **more}, default=str) + "\n")
                done[number] = pair
            handle.flush()
            do = f"{out} has {len(done)} of {len(rows)} pairs; the same command goes on from there."
            require(not lost, OP, "model", "an answer to every pair", f"none to some; {lost[0] if lost else ''}", do)
            show(f"{len(done)} of {len(rows)}")
    return _summary([done[number] for number in sorted(done)])


def fooled(judge: LLMJudge, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Answers without content that the judge prefers to the rows' chosen answers: text -> mean probability above 1/2.

    The strings are those of arXiv:2507.08794.
    """
    asked = [(text, *_pair(number, row)[:2]) for number, row in enumerate(rows) for text in FOOLING]
    texts, prompts, answers = zip(*asked, strict=True)
    preferred: dict[str, list[float]] = {}
    for text, score in zip(texts, judge.prefer(prompts, texts, answers), strict=True):
        if isinstance(score, float):
            preferred.setdefault(text, []).append(score)
    return {text: fmean(values) for text, values in preferred.items() if fmean(values) > 0.5}


def main(args: Sequence[str]) -> int:
    """`fastrl judge`: returns the exit status.

    Raises:
        ValueError: there are no such rows or judge, or the judge does not answer.
    """
    parser = ArgumentParser("fastrl judge", description="Label pairs with a judge's preferences in both orders.")
    parser.add_argument("rows", help="pairs: a file, a hub id or reasoning_gym:TASK, as data.source of a recipe")
    parser.add_argument("--out", required=True, type=Path, help="the file of labelled pairs, .jsonl")
    parser.add_argument("--model", required=True, help="a model as in a recipe, or its name on the server")
    parser.add_argument("--server", default="", help="base address of an OpenAI-compatible server")
    parser.add_argument("--key-variable", default="", help="environment variable that holds the server's key")
    parser.add_argument("--criteria", default=CRITERIA, help="what makes an answer good")
    parser.add_argument("--reasons", action="store_true", help="let the judge compare in words first")
    parser.add_argument(
        "--gradings", action="store_true", help="instead, of ranked rows: additive points that agree with the ranking"
    )
    parser.add_argument("--canary", choices=("warn", "refuse", "off"), default="warn")
    parser.add_argument("--size", type=int, default=200, help="number of questions, for reasoning_gym")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--options", type=json.loads, default={}, help="data.options of a recipe, as JSON")
    found = parser.parse_args(args)
    rows = _rows(found.rows, found.size, found.seed, found.options)
    if found.server:
        model: Any = ChatServer(found.server, found.model, key_variable=found.key_variable)
    else:
        from fastrl.rewards.chat_local import local_chat

        require(not found.key_variable, OP, "key_variable", "none without a server", found.key_variable)
        model = local_chat(found.model)
    judge = LLMJudge(model, found.criteria)
    if found.gradings:
        require(not found.reasons, OP, "reasons", "none with gradings, which have theirs", "--reasons")
        print(write_gradings(rows, judge, found.out, seed=found.seed))
        return 0
    if found.canary != "off":
        over = fooled(judge, rows[:CANARY_PAIRS])
        listed = ", ".join(f"{text!r} {mean:.2f}" for text, mean in over.items())
        expected, got = (
            "a judge that prefers the chosen answers to answers without content",
            f"one that does not: {listed}",
        )
        require(not over or found.canary == "warn", OP, "canary", expected, got, "Take another judge.")
        if over:
            print(f"warning: {sentence(OP, 'canary', expected, got)}")
    print(label_pairs(rows, judge, found.out, reasons=found.reasons, seed=found.seed))
    return 0


def _rows(source: str, size: int, seed: int, options: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if source.startswith(GYM):
        rows = gym_answers(source.removeprefix(GYM), "pairs", size=size, seed=seed, options=options)
    else:
        rows = read_rows(source, size=size, seed=seed, options=dict(options))
    return [row.values for row in rows]


def _pair(number: int, row: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """(prompt, chosen, rejected) of a row."""
    lacking = [name for name in ("chosen", "rejected") if not row.get(name)]
    prompt, sides = row.get("prompt"), [row.get("chosen"), row.get("rejected")]
    if not prompt and not lacking and isinstance(sides[0], list) and len(sides[0]) > 1:
        prompt = sides[0][:-1]
    lacking += [] if prompt else ["prompt"]
    require(not lacking, OP, f"row {number}", "a prompt, a chosen and a rejected answer", f"no {', '.join(lacking)}")
    return (prompt, *(side[-1:] if isinstance(side, list) else side for side in sides))


def _written(out: Path, judge: str) -> dict[int, tuple[Score, Score]]:
    """The rows that `out` has, and their probabilities in both orders."""
    done = {}
    if not out.is_file():
        return done
    text = out.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):  # cut short by the machine
        text = text[: text.rfind("\n") + 1]
        out.write_text(text, encoding="utf-8")
    for line in text.splitlines():
        values = json.loads(line)
        ours = {"row", "orders", "judge"} <= values.keys()
        require(ours, OP, "out", "a file that this command began, or none", str(out), "Give another name.")
        same = values["judge"] == judge
        require(same, OP, "out", f"a file of the judge {judge}", f"one of {values['judge']}", "Give another name.")
        done[values["row"]] = tuple(values["orders"])
    return done


def _summary(orders: Sequence[tuple[Score, Score]]) -> Labels:
    read = [pair for pair in orders if None not in pair]

    def agrees(values: Sequence[float]) -> float:
        return (
            fmean([1.0 if value > 0.5 else 0.5 if value == 0.5 else 0.0 for value in values])
            if values
            else float("nan")
        )

    return Labels(
        labelled=len(read),
        missing=len(orders) - len(read),
        accuracy=agrees([fmean(pair) for pair in read]),
        first_order=agrees([first for first, _ in read]),
        second_order=agrees([second for _, second in read]),
        consistent=fmean([float((a > 0.5) == (b > 0.5)) for a, b in read]) if read else float("nan"),
    )
