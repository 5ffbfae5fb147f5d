"""The process of `fastrl.rewards.math_answer`: one JSON request per line in, one JSON reply per line out."""

from __future__ import annotations

import json
import logging
import sys
from functools import lru_cache

from math_verify import parse, verify


@lru_cache(maxsize=4096)
def gold_expressions(gold: str) -> list:
    """The expressions in a gold answer, which may be LaTeX without its dollar signs."""
    return parse(gold, parsing_timeout=None) or parse(f"${gold}$", parsing_timeout=None)


def score(gold: str, text: str) -> float | None:
    """1 or 0, or None when there is no expression in `gold`."""
    expected = gold_expressions(gold)
    if not expected:
        return None
    return float(verify(expected, parse(text, parsing_timeout=None), timeout_seconds=None))


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
