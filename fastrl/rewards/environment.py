"""What an environment rewarded, as one of the rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastrl.types import Sample


def environment(
    completions: Sequence[Any], *, turn_rewards: Sequence[Sequence[float | None]], **_: Any
) -> list[float | None]:
    """The sum of the rewards of a conversation's turns; None if the environment saw turns and rewarded none of them.

    A conversation that a limit cut in its first turn has earned 0: with None it would not be trained on, and nothing
    would keep the policy from writing ever longer turns.
    """
    given = [[reward for reward in rewards if reward is not None] for rewards in turn_rewards]
    return [
        float(sum(rewards)) if rewards or not turns else None
        for rewards, turns in zip(given, turn_rewards, strict=True)
    ]


def split_by_turn(sample: Sample, weight: float) -> list[float]:
    """A scored conversation's reward by turn: what the environment gave, times `weight`, and with the last turn's all
    that no turn got, such as the other rewards."""
    given = [weight * (reward or 0.0) for reward in sample.extra["turn_rewards"]]
    # A turn that a limit cut was not shown to the environment.
    given += [0.0] * (len(sample.turn_ends or ()) - len(given))
    return [*given[:-1], (sample.reward or 0.0) - sum(given[:-1])]
