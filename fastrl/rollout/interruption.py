"""Forced length interruption, as in ScaleRL: a completion that thinks for too long is told to answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from fastrl.check import require
from fastrl.progress import Progress, unseen
from fastrl.rollout.base import SECOND_SEED, Sampler, SamplingParams, extend, insert, places_of
from fastrl.types import Sample

OP = "interruption"


@dataclass(frozen=True)
class Interruption:
    """When a completion is interrupted, and by which words.

    Args:
        token_ids: the words.
        after: the budget of each completion is drawn uniformly from this range, both ends included, in tokens.
        unless: a completion that has this text before its budget ends goes on without the words; empty: none does.
    """

    token_ids: tuple[int, ...]
    after: tuple[int, int]
    unless: str = ""

    def __post_init__(self) -> None:
        low, high = self.after
        require(len(self.token_ids) > 0, OP, "text", "words that are at least one token", "none")
        require(1 <= low <= high, OP, "after", "two numbers of tokens from 1, the larger one last", self.after)

    def room(self, max_new_tokens: int) -> int:
        """Tokens for the answer: what the latest interruption leaves of `max_new_tokens`.

        Raises:
            ValueError: there is none.
        """
        left, used = max_new_tokens - self.after[1] - len(self.token_ids), self.after[1] + len(self.token_ids)
        expected = f"more than {used}, the longest budget and the words of the interruption"
        require(left >= 1, "SamplingParams", "max_new_tokens", expected, max_new_tokens)
        return left


@dataclass(frozen=True)
class Interrupting:
    """A sampler whose completions are interrupted.

    A completion that has no end after its budget gets the words appended, which are not the policy's (`Sample.own` is
    False, `sampling_logps` 0), and then goes on to an end of its own or for `Interruption.room` tokens.
    `Sample.extra["interrupted"]` says whether it got them.
    """

    sampler: Sampler
    tokenizer: PreTrainedTokenizerBase
    interruption: Interruption

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        num_samples: int,
        params: SamplingParams,
        progress: Progress = unseen,
    ) -> list[list[Sample]]:
        """As `Sampler`.

        Raises:
            ValueError: `params.max_new_tokens` leaves no room for an answer.
        """
        asked, (low, high) = self.interruption, self.interruption.after
        room, least = asked.room(params.max_new_tokens), params.min_new_tokens
        first = replace(params, max_new_tokens=high, min_new_tokens=min(least, high))
        groups = self.sampler.sample(prompts, num_samples, first, progress)
        places, drawn, late = places_of(prompts, params), random.Random(params.seed), []
        budgets = [[drawn.randint(low, high) for _ in range(num_samples)] for _ in range(1 + max(places))]
        for place, prompt, group in zip(places, prompts, groups, strict=True):
            for at, sample in enumerate(group):
                budget = budgets[place][at]
                sample.extra["interrupted"] = False
                if sample.finished and len(sample.token_ids) <= budget:
                    continue
                group[at] = cut = extend(Sample([], [], False, own=[]), sample, budget)
                text = self.tokenizer.decode(cut.token_ids, skip_special_tokens=False) if asked.unless else ""
                cut.extra["interrupted"] = not asked.unless or asked.unless not in text
                if cut.extra["interrupted"]:
                    insert(cut, asked.token_ids)
                late.append((place * num_samples + at, [*prompt, *cut.token_ids], cut))
        if late:
            seed, least = (params.seed + SECOND_SEED) % 2**64, min(max(least - low, 0), room)
            streams, told, cuts = zip(*late, strict=True)
            then = replace(params, seed=seed, max_new_tokens=room, min_new_tokens=least, places=streams)
            answers = self.sampler.sample(told, 1, then, progress)
            for cut, (answer,) in zip(cuts, answers, strict=True):
                extend(cut, answer, room).finished = answer.finished
        return groups
