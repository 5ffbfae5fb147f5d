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

# Signs that an answer is part of a text: delimited mathematics, or GSM8K's last line.
DELIMITED = re.compile(r"(?<!\\)\$.+?(?<!\\)\$|\\\(|\\\[|\\boxed", re.DOTALL)
LAST_LINE = re.compile(r"####\s*(.+?)\s*$")
SCIENTIFIC = re.compile(r"(?<![\w.])([-+]?\d*\.?\d+)[eE]([-+]?\d{1,3})(?![\w.])")
MIXED = re.compile(r"(?<![\d.])(\d+) (\d+)/(\d+)")
WORDS = re.compile(r"(?!infinity)(?:[a-z]{4,}|[A-Z][a-z]{2,})(?: [A-Za-z]+)*")
SCRIPT = re.compile(r"[_^]\{?-?\w+\}?")
# Matches answers such as 4\text{ hours and }30\text{ minutes} or 1, 2, \ldots, 10, of which math-verify would compare
# only one number.
APART = re.compile(r"\d\D*(\\text|\\mbox|\\mathrm|\\l?dots|'|[A-Za-z]{3})\D*\d")


def latex(gold: str) -> str:
    """Converts a gold answer to LaTeX, including names and forms such as 1e-3, 7 1/2 and 2*pi."""
    if WORDS.fullmatch(gold):
        return rf"\text{{{gold}}}"  # otherwise a product of letters in any order
    gold = MIXED.sub(r"\1\\frac{\2}{\3}", SCIENTIFIC.sub(r"\1\\times 10^{\2}", gold))
    gold = re.sub(r"√(\w+|\([^()]*\))", r"\\sqrt{\1}", gold.replace("**", "^"))
    return re.sub(r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi ", gold)


@lru_cache(maxsize=4096)
def gold_expressions(gold: str) -> list:
    """The expression of a gold answer in bare LaTeX, as data sets write it; never just a number that occurs in it.

    If the answer is marked as part of a text, the expression is extracted from the text.
    """
    last = LAST_LINE.search(gold)
    if last:
        return gold_expressions(last[1])
    if DELIMITED.search(gold):
        return parse(gold, parsing_timeout=None)  # ty: ignore[invalid-argument-type]  None: no alarm
    found = parse(f"${latex(gold)}$", parsing_timeout=None)  # ty: ignore[invalid-argument-type]  None: no alarm
    one_number = found and isinstance(found[0], (Integer, Float))
    if not found or (one_number and APART.search(SCRIPT.sub("", gold))):
        return []
    return [*found, gold.strip()]  # an identical answer is right, however it is parsed


def answer_expressions(text: str, expected: list) -> list:
    """The expressions in a completion that may be compared with the expected ones.

    math-verify compares an equation with a bare value by its right side. That is right for x = 5, but would accept 1
    for x + y = 1.
    """
    found = parse(text, parsing_timeout=None)  # ty: ignore[invalid-argument-type]  None: no alarm
    first = expected[0]
    if isinstance(first, Equality) and not isinstance(first.lhs, (Symbol, AppliedUndef)):
        return [value for value in found if not isinstance(value, Expr)]
    return found


def score(gold: str, text: str) -> float | None:
    """1 or 0, or None if `gold` has no expression."""
    expected = gold_expressions(gold)
    if not expected:
        return None
    return float(verify(expected, answer_expressions(text, expected), timeout_seconds=None))


def main() -> None:
    """Serves requests until the input ends."""
    logging.disable(logging.WARNING)  # math-verify warns that there is no timeout; the parent process has one
    replies = sys.stdout
    sys.stdout = sys.stderr  # other prints must not be taken for replies
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps({"score": score(request["gold"], request["text"])}), file=replies, flush=True)


if __name__ == "__main__":
    main()
