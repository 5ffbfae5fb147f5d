"""What an environment rewarded, as one of the rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def environment(
    completions: Sequence[Any], *, turn_rewards: Sequence[Sequence[float | None]], **_: Any
) -> list[float | None]:
    """The sum of the rewards of a conversation's turns; None if the environment gave none."""
    given = [[reward for reward in rewards if reward is not None] for rewards in turn_rewards]
    return [float(sum(rewards)) if rewards else None for rewards in given]
