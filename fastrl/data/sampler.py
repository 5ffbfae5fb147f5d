"""The order in which prompts, or groups of answers, are drawn."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from fastrl import check
from fastrl.types import Group, Prompt

Drawn = TypeVar("Drawn", Prompt, Group)


class PromptSampler(Generic[Drawn]):
    """Epochs of all prompts, each shuffled by (seed, epoch) alone: a resumed run draws what it would have drawn.

    Args:
        prompts: what to draw from, or groups of answers written before training; kept, not copied.
        seed: of every epoch's order.
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
        """The next `n` prompts; an epoch's last and the following epoch's first may share a batch."""
        batch = []
        while len(batch) < n:
            if self._drawn == len(self._order):
                self.epoch, self._drawn = self.epoch + 1, 0
                self._order = self._shuffled()
            place = self._order[self._drawn]
            self._drawn += 1
            batch.append(self.prompts[place])
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the sampler is, as JSON can hold it."""
        return {"seed": self.seed, "epoch": self.epoch, "drawn": self._drawn, "prompts": self.fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken.

        Raises:
            ValueError: the state is of other prompts, whose order would not be continued.
        """
        check.require(
            state["prompts"] == self.fingerprint(),
            "PromptSampler",
            "state",
            "the state of the same prompts in the same order",
            "that of others",
            "Resume with the prompts the run began with.",
        )
        self.seed, self.epoch, self._drawn = state["seed"], state["epoch"], state["drawn"]
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
    """SHA-256 of prompts, or of groups with their answers, labels and margins, and of their order."""
    digest = hashlib.sha256()
    for item in drawn:
        prompt, samples = (item.prompt, item.samples) if isinstance(item, Group) else (item, ())
        digest.update(repr((prompt.index, prompt.token_ids)).encode())
        for sample in samples:
            digest.update(repr((sample.token_ids, sample.advantage)).encode())
        if isinstance(item, Group) and (item.margin, item.soft_label) != (None, None):
            digest.update(repr((item.margin, item.soft_label)).encode())
    return digest.hexdigest()
