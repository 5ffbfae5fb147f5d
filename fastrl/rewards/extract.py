"""Extracts the answer from a completion."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

Extract = Literal["last_number", "answer_tag", "boxed", "full"]

# A sign belongs to the number unless an operand stands right before it.
SIGN = r"(?:(?<![\w.)\]}])[-+])?"
WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?![,\d])|\d+)"
NUMBER = re.compile(rf"{SIGN}(?:{WHOLE}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
BOXED = "\\boxed{"


def completion_text(completion: Any) -> str:
    """The text of a completion as rewards get it: plain, or chat messages.

    Of a conversation it is the assistant's last turn: what tools said is not the policy's answer.
    """
    if isinstance(completion, str):
        return completion
    if len(completion) > 1 and completion[0]["role"] == "assistant":
        completion = [message for message in completion if message["role"] == "assistant"][-1:]
    return "".join(message["content"] for message in completion)


def last_number(text: str) -> str | None:
    """The last number, without thousands separators: `-3` of "it is -3.", `1234` of "= 1,234", `3` of "10-3"."""
    numbers = NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return numbers[-1].replace(",", "") if numbers else None


def answer_tag(text: str) -> str | None:
    """The text in the last <answer>...</answer>."""
    found = ANSWER.findall(text)
    return found[-1].strip() if found else None


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} with balanced braces."""
    start = text.rfind(BOXED)
    while start >= 0:
        depth, begin = 1, start + len(BOXED)
        for place in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[begin:place].strip()
        start = text.rfind(BOXED, 0, start)
    return None


EXTRACT: dict[str, Callable[[str], str | None]] = {
    "last_number": last_number,
    "answer_tag": answer_tag,
    "boxed": boxed,
    "full": str.strip,
}
