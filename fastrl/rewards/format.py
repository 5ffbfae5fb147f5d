"""A reward for the format of a completion, whatever its content."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastrl.rewards.extract import completion_text

_INSIDE = r"(?:(?!</?(?:think|answer)>).)*"
THINK_ANSWER = rf"\s*<think>{_INSIDE}</think>\s*<answer>{_INSIDE}</answer>\s*"


@dataclass(frozen=True)
class FormatReward:
    """1 if the pattern matches the whole completion, else 0.

    Args:
        pattern: a regular expression whose dot also matches newlines. By default <think>...</think> followed by
            <answer>...</answer>, each once, and nothing else.
        prefix: what the prompt ends with and the completion goes on from, such as <think>; matched as part of it.
    """

    pattern: str = THINK_ANSWER
    prefix: str = ""

    __name__ = "format"

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"format: pattern: expected a regular expression, got {self.pattern!r} ({error})."
            ) from error

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float]:
        """One score per completion."""
        matches = re.compile(self.pattern, re.DOTALL).fullmatch
        return [float(matches(self.prefix + completion_text(completion)) is not None) for completion in completions]
