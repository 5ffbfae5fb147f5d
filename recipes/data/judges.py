"""Rewards that only measure, in recipes of stages: a rule for helpful answers, and the share of German in an answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fastrl.rewards.extract import completion_text

_WORDS = re.compile(r"[a-zäöüß]+")
GERMAN = frozenset(
    _WORDS.findall(
        "der die das den dem des ein eine einen einem einer ist sind war und oder nicht mit von zu auf für im in es "
        "ich du er sie wir ihr kann hat haben wird werden nach vor als auch aber wie was welche welcher heißt "
        "gegenteil hauptstadt wort deutsch kommt tag farbe"
    )
)
ENGLISH = frozenset(
    _WORDS.findall(
        "the a an is are was and or not with of to for on it i you he she we they can has have will be as also but how "
        "what which that this there your my from by at day word capital opposite means"
    )
)


def helpful(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """1 for the right answer in one sentence of 3 to 20 words, 0.5 for it in another form, 0 without it."""
    return [_helpful(completion_text(one), right) for one, right in zip(completions, answer, strict=True)]


def _helpful(text: str, answer: str) -> float:
    if not re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE):
        return 0.0
    sentence = 3 <= len(text.split()) <= 20 and text.strip().endswith((".", "!"))
    return 1.0 if sentence else 0.5


def german(completions: Sequence[Any], **_: Any) -> list[float]:
    """The German share of the words that only one of the two languages has; umlauts and ß count as German words."""
    return [_german(completion_text(one)) for one in completions]


def _german(text: str) -> float:
    words = _WORDS.findall(text.lower())
    ours = sum((word in GERMAN and word not in ENGLISH) or bool(re.search("[äöüß]", word)) for word in words)
    other = sum(word in ENGLISH and word not in GERMAN for word in words)
    return ours / (ours + other) if ours + other else 0.0


def right(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """1 if the last word of the wanted sentence is in the answer, else 0."""
    wanted = [sentence.strip(' ."').split()[-1].strip('"') for sentence in answer]
    return [
        float(bool(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", completion_text(one), re.IGNORECASE)))
        for one, word in zip(completions, wanted, strict=True)
    ]
