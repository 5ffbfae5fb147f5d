"""Draws prompts, or groups of answers, in shuffled epochs."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

from fastrl import check
from fastrl.types import Group, Prompt

Drawn = TypeVar("Drawn", Prompt, Group)


class PromptSampler(Generic[Drawn]):
    """Epochs over all prompts. The order depends only on (seed, epoch), so a resumed run draws the same prompts.

    Args:
        prompts: prompts, or pre-written groups, to draw from; kept, not copied.
        seed: seeds the order of every epoch.
    """

    def __init__(self, prompts: Sequence[Drawn], seed: int) -> None:
        check.require(len(prompts) > 0, "PromptSampler", "prompts", "at least one prompt", "none")
        self.prompts = prompts
        self.seed = seed
        self.epoch = 0
        self._drawn = 0  # of this epoch
        self._order = self._shuffled()
        self._fingerprint = ""  # made when first asked for

    def next(self, n: int) -> list[Drawn]:
        """The next `n` prompts; a batch may span two epochs."""
        batch = []
        while len(batch) < n:
            if self._drawn == len(self._order):
                self.epoch, self._drawn = self.epoch + 1, 0
                self._order = self._shuffled()
            place = self._order[self._drawn]
            self._drawn += 1
            batch.append(self.prompts[place])
        return batch

    def observe(self, groups: Sequence[Group]) -> dict[str, float]:
        """Told of every group that was sampled, with its rewards, before the next call of `next`; here it does nothing.

        Returns:
            Numbers to report.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The sampler's position, in a form that JSON can hold."""
        return {"seed": self.seed, "epoch": self.epoch, "drawn": self._drawn, "prompts": self.fingerprint()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a `state_dict`.

        Raises:
            ValueError: the state belongs to other prompts.
        """
        check.require(
            state["prompts"] == self.fingerprint(),
            "PromptSampler",
            "state",
            "the state of the same prompts in the same order",
            "the state of others",
            "Resume with the prompts the run began with.",
        )
        self.seed = state["seed"]
        self.go_to(state["epoch"], state["drawn"])

    @property
    def drawn(self) -> int:
        """How many were drawn of this epoch."""
        return self._drawn

    def go_to(self, epoch: int, drawn: int) -> None:
        """Continues after the first `drawn` of an epoch."""
        self.epoch, self._drawn = epoch, drawn
        self._order = self._shuffled()

    def _shuffled(self) -> list[int]:
        order = list(range(len(self.prompts)))
        random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        return order

    def fingerprint(self) -> str:
        """`fingerprint` of the prompts."""
        if not self._fingerprint:
            self._fingerprint = fingerprint(self.prompts)
        return self._fingerprint


def fingerprint(drawn: Sequence[Prompt | Group]) -> str:
    """SHA-256 over prompts, or groups with their answers, labels and margins, in order."""
    digest = hashlib.sha256()
    for item in drawn:
        prompt, samples = (item.prompt, item.samples) if isinstance(item, Group) else (item, ())
        digest.update(repr((prompt.index, prompt.token_ids)).encode())
        for sample in samples:
            digest.update(repr((sample.token_ids, sample.advantage)).encode())
        if isinstance(item, Group) and (item.margin, item.soft_label) != (None, None):
            digest.update(repr((item.margin, item.soft_label)).encode())
    return digest.hexdigest()
