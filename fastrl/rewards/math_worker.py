"""The process of `fastrl.rewards.math_answer`: one JSON request per line in, one JSON reply per line out."""

from __future__ import annotations

import json
import logging
import re
import sys
from functools import lru_cache

from math_verify import parse, verify
from sympy import Expr, Float, Integer, Symbol
from sympy.core.function import AppliedUndef
from sympy.core.relational import Equality

# Marks of an answer that stands in a text: mathematics between delimiters, or GSM8K's last line.
DELIMITED = re.compile(r"(?<!\\)\$.+?(?<!\\)\$|\\\(|\\\[|\\boxed", re.DOTALL)
LAST_LINE = re.compile(r"####\s*(.+?)\s*$")
SCIENTIFIC = re.compile(r"(?<![\w.])([-+]?\d*\.?\d+)[eE]([-+]?\d{1,3})(?![\w.])")
MIXED = re.compile(r"(?<![\d.])(\d+) (\d+)/(\d+)")
WORDS = re.compile(r"(?!infinity)(?:[a-z]{4,}|[A-Z][a-z]{2,})(?: [A-Za-z]+)*")
SCRIPT = re.compile(r"[_^]\{?-?\w+\}?")
# Of 4\text{ hours and }30\text{ minutes} or 1, 2, \ldots, 10 only one of the numbers would be compared.
APART = re.compile(r"\d\D*(\\text|\\mbox|\\mathrm|\\l?dots|'|[A-Za-z]{3})\D*\d")


def latex(gold: str) -> str:
    """A gold answer as the LaTeX that it stands for: names and what programs write, 1e-3, 7 1/2, 2*pi, are no LaTeX."""
    if WORDS.fullmatch(gold):
        return rf"\text{{{gold}}}"  # not a product of letters, which their order does not change
    gold = MIXED.sub(r"\1\\frac{\2}{\3}", SCIENTIFIC.sub(r"\1\\times 10^{\2}", gold))
    gold = re.sub(r"√(\w+|\([^()]*\))", r"\\sqrt{\1}", gold.replace("**", "^"))
    return re.sub(r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi ", gold)


@lru_cache(maxsize=4096)
def gold_expressions(gold: str) -> list:
    """The expression that a gold answer is, bare LaTeX as data sets write it; never a number that merely stands in it.

    Only where it is marked as a part of a text is it looked for there.
    """
    last = LAST_LINE.search(gold)
    if last:
        return gold_expressions(last[1])
    if DELIMITED.search(gold):
        return parse(gold, parsing_timeout=None)
    found = parse(f"${latex(gold)}$", parsing_timeout=None)
    one_number = found and isinstance(found[0], (Integer, Float))
    if not found or (one_number and APART.search(SCRIPT.sub("", gold))):
        return []
    return [*found, gold.strip()]  # an answer that is written in the same way is right, whatever it is read as


def answer_expressions(text: str, expected: list) -> list:
    """The expressions in a completion that may be compared with those expected.

    math-verify compares an equation with a bare value by its right side, which is right for x = 5, and lets 1 pass for
    x + y = 1.
    """
    found = parse(text, parsing_timeout=None)
    first = expected[0]
    if isinstance(first, Equality) and not isinstance(first.lhs, (Symbol, AppliedUndef)):
        return [value for value in found if not isinstance(value, Expr)]
    return found


def score(gold: str, text: str) -> float | None:
    """1 or 0, or None when there is no expression in `gold`."""
    expected = gold_expressions(gold)
    if not expected:
        return None
    return float(verify(expected, answer_expressions(text, expected), timeout_seconds=None))


def main() -> None:
    """Serve until the input ends."""
    logging.disable(logging.WARNING)  # math-verify's warning that there is no timeout: there is one, outside
    replies = sys.stdout
    sys.stdout = sys.stderr  # whatever else prints must not be taken for a reply
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps({"score": score(request["gold"], request["text"])}), file=replies, flush=True)


if __name__ == "__main__":
    main()
