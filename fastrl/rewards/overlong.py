"""A penalty for completions close to the length limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastrl import check


@dataclass(frozen=True)
class SoftOverlongReward:
    """Soft overlong punishment, added to a task's reward: DAPO, arXiv:2503.14476 eq. 13.

    With l the tokens of a completion: 0 for l <= max_tokens - cache; (max_tokens - cache - l) / cache from there to
    max_tokens; -1 beyond. TRL's get_soft_overlong_punishment.

    Args:
        max_tokens: the length from which the full penalty applies.
        cache: the number of tokens before it over which the penalty grows; 0 penalises only beyond max_tokens.
    """

    max_tokens: int
    cache: int

    __name__ = "soft_overlong"

    def __post_init__(self) -> None:
        check.require(self.max_tokens >= 1, "soft_overlong", "max_tokens", "at least 1", self.max_tokens)
        cache_fits = 0 <= self.cache <= self.max_tokens
        check.require(cache_fits, "soft_overlong", "cache", f"0 to max_tokens = {self.max_tokens}", self.cache)

    def __call__(self, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        """One score per completion."""
        return [self._score(len(ids)) for ids in completion_ids]

    def _score(self, length: int) -> float:
        over = length - (self.max_tokens - self.cache)
        if over <= 0:
            return 0.0
        return -1.0 if length > self.max_tokens else -over / self.cache
