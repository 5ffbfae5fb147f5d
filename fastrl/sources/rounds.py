"""Rounds of sampling, judging, choosing and training, each kept on disk: Self-Rewarding, ReST, ReST-EM.

A round samples completions of the next prompts with the current weights, scores them with the rewards, and then trains
on what a chooser takes from them: pairs for a preference loss, or completions over rising thresholds for SFT, one
threshold after the other ("improves"). Then the next round begins.

    RUN/rounds/
      round_1/part_0001.jsonl     groups as they were sampled and judged, one a line, a few prompts per file
      round_1/chosen_1.jsonl      what the first improve trains on, with the reference's log-probabilities if it has one

Files appear complete or not at all, and what is on disk is never sampled again: not after an interrupt, and not after
a judge failed.

Not covered: new prompts by self-instruction (arXiv:2401.10020), mixing in the original data, and improves that go on
while a held-out reward rises (arXiv:2308.08998).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar

from fastrl.algorithms.base import Kind, Learner
from fastrl.check import require
from fastrl.data.groups import group_from_json, group_to_json
from fastrl.data.pack import spread
from fastrl.data.sampler import PromptSampler
from fastrl.files import replace_text
from fastrl.progress import Watch
from fastrl.rewards import RewardFailure, RewardSuite
from fastrl.sources.choose import above, best_and_worst, quantile
from fastrl.sources.collect import Judge, Sampling, judged, mean_reward
from fastrl.types import Batch, Group, MicroBatch, Prompt

if TYPE_CHECKING:
    import torch

FOLDER = "rounds"
PATIENCE = 3  # rounds in a row that give nothing to learn from before a run stops
OP = "Rounds"


@dataclass
class Rounds:
    """Batches of what was chosen from the current round.

    Args:
        kind: pairs or completions: what the algorithm learns from.
        number: prompts per round. at_once: prompts per part, and so per file.
        samples: completions per prompt.
        rows: rows per training step; a step never has a row twice.
        thresholds: of the improves of a round, for completions. Pairs have one improve and no threshold.
        quantiles: thresholds are quantiles of the round's scores, which must be reached.
        most: completions kept per prompt; 0 keeps all.
        steps: training steps per improve; 0: `epochs` over the chosen rows.
        asks_reference: the loss reads `ref_logps`. The reference is the policy at the start of the round, as in
            arXiv:2401.10020 section 2.4.
        restart: called before a round's first training step: puts the policy back to its first weights, which ReST-EM
            trains from in every round.
        folder: where the rounds are kept; called when first needed.
    """

    prompts: PromptSampler[Prompt]
    sampling: Sampling
    rewards: RewardSuite
    kind: Kind
    number: int = 64
    at_once: int = 8
    samples: int = 4
    rows: int = 16
    thresholds: Sequence[float] = (0.0,)
    quantiles: bool = False
    most: int = 0
    steps: int = 0
    epochs: int = 1
    asks_reference: bool = False
    restart: Callable[[Learner], None] | None = None
    seed: int = 0
    total_steps: int = 0
    folder: Callable[[], Path] | None = None
    replays: ClassVar[bool] = True  # what is on disk is drawn again for free

    _round: int = field(default=0, init=False)  # the current one, from 1
    _improve: int = field(default=0, init=False)  # of this round, from 1
    _done: int = field(default=0, init=False)  # steps of this improve
    _barren: int = field(default=0, init=False)  # rounds in a row, up to this one, without a row
    _state: Mapping[str, Any] | None = field(default=None, init=False)  # of the rows, until they are read again
    _chosen: PromptSampler[Group] | None = field(default=None, init=False)
    _about: dict[str, float] = field(default_factory=dict, init=False)  # numbers of the round

    def next(self, learner: Learner, watch: Watch) -> Batch:
        """As `Source`.

        Raises:
            RewardFailure: rewards failed on too many completions, or `PATIENCE` rounds gave nothing to learn from.
        """
        if self._chosen is None and self._round:
            self._read()
        while self._chosen is None or self._over():
            self._advance(learner, watch)
        batch = Batch([], seed=self.seed + learner.steps + 1, kind=self.kind)
        batch.groups = self._chosen.next(min(self.rows, len(self._chosen.prompts)))
        self._done += 1
        batch.numbers = {"round": float(self._round), "improve": float(self._improve), **self._about}
        batch.numbers |= {"epoch": float(self._chosen.epoch), "round/rows": float(len(self._chosen.prompts))}
        return batch

    def publish(self, learner: Learner) -> None:
        """Does nothing: the sampler shares the weights that were just updated."""

    def state_dict(self) -> dict[str, Any]:
        """The position in the prompts, the rounds and the rows."""
        rows = self._state if self._chosen is None else self._chosen.state_dict()
        return {
            "prompts": self.prompts.state_dict(),
            "round": self._round,
            "improve": self._improve,
            "done": self._done,
            "barren": self._barren,
            "rows": rows,
            "about": dict(self._about),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As `Source`; rows are read from disk when they are needed."""
        self.prompts.load_state_dict(state["prompts"])
        same = self._chosen is not None and (self._round, self._improve) == (state["round"], state["improve"])
        self._round, self._improve, self._done = state["round"], state["improve"], state["done"]
        self._barren, self._about, self._state = state["barren"], dict(state["about"]), state["rows"]
        if same:
            self._chosen.load_state_dict(state["rows"])
        else:
            self._chosen = None

    def _over(self) -> bool:
        """Whether the current improve is done."""
        if self.steps:
            return self._done >= self.steps
        drawn = self._done * min(self.rows, len(self._chosen.prompts))
        return drawn >= self.epochs * len(self._chosen.prompts)

    @property
    def _improves(self) -> int:
        return 1 if self.kind == "pairs" else len(self.thresholds)

    def _advance(self, learner: Learner, watch: Watch) -> None:
        """Goes to the next improve, in this round or a new one. `_chosen` is None if it has no rows."""
        if self._round == 0 or self._improve == self._improves:
            groups = self._sample(self._round + 1, learner, watch)
            self._round, self._improve, self._about = self._round + 1, 0, _numbers(groups)
        else:
            groups = self._groups()
        self._improve, self._done, self._state, self._chosen = self._improve + 1, 0, None, None
        rows, why = self._choose(groups)
        for sample in (sample for row in rows for sample in row.samples):  # copies
            sample.versions = None  # they are as old as the round, by design: not the staleness of a sampler
        if not rows:
            watch.warn(f"Round {self._round}: {why}")
            self._barren += self._improve == 1
            if self._barren >= PATIENCE:
                do = "Lower rounds.thresholds, or raise rounds.prompts or rollout.group_size."
                raise RewardFailure(f"{self._barren} rounds in a row gave nothing to learn from: {why} {do}")
            self._improve = self._improves  # higher thresholds pass nothing either
            return
        self._barren = 0
        path = self._path(f"chosen_{self._improve}")
        if path.is_file():
            rows = _read(path)
        else:
            if self.asks_reference:
                self._ask_reference(rows, learner, watch)
            self._keep(path, rows)
        self._chosen = self._sampler(rows)
        if self.restart and self._improve == 1:
            self.restart(learner)

    def _choose(self, groups: Sequence[Group]) -> tuple[list[Group], str]:
        """The rows of the current improve, and what to say if there are none."""
        if self.kind == "pairs":
            return best_and_worst(groups), f"no group of {len(groups)} has two completions with different scores."
        threshold = self.thresholds[self._improve - 1]
        if self.quantiles:
            threshold = quantile(groups, threshold)
        scores = [one.reward for group in groups for one in group.samples if one.reward is not None]
        best = f"the best of {len(scores)} is {max(scores):g}" if scores else "none has a score"
        rows = above(groups, threshold, reaches=self.quantiles, most=self.most)
        return rows, f"no completion scores more than {threshold:g}; {best}."

    def _sample(self, number: int, learner: Learner, watch: Watch) -> list[Group]:
        """The judged groups of a round, part by part; parts on disk are read."""
        judge, groups = Judge(self.rewards, learner.steps + 1, self.total_steps, {}), []
        for part, start in enumerate(range(0, self.number, self.at_once), start=1):
            prompts = self.prompts.next(min(self.at_once, self.number - start))
            path = self._path(f"part_{part:04d}", number)
            if path.is_file():
                found = _read(path)
                same = [group.prompt.token_ids for group in found] == [prompt.token_ids for prompt in prompts]
                do = "Move it away, or start another run."
                require(same, OP, str(path), "the prompts of this round", "others", do)
            else:
                seed = self.seed + (number << 40) + (part << 20)
                units = (f"tokens of round {number}, part {part}", "rewards")
                about = f"Round {number}"
                found = judged(prompts, self.samples, seed, self.sampling, judge, watch, units=units, about=about)
                for sample in (sample for group in found for sample in group.samples):
                    sample.versions = [learner.updates] * len(sample.token_ids)
                self._keep(path, found)
            groups += found
        return groups

    def _keep(self, path: Path, groups: Sequence[Group]) -> None:
        """Writes a file, once, and waits until it is there for all processes."""
        world = self.sampling.world
        with world.together(f"writing {path.name}"):
            if world.first:
                _write(path, groups)

    def _groups(self) -> list[Group]:
        """The groups of the current round."""
        paths = sorted(self._path("").parent.glob("part_*.jsonl"))
        return [group for path in paths for group in _read(path)]

    def _ask_reference(self, rows: Sequence[Group], learner: Learner, watch: Watch) -> None:
        """Gives the rows' samples their log-probabilities under the current weights."""
        with watch.stage("reference", "micro-batches") as progress:
            batches = learner.pack(rows, whole_groups=True)

            def score(batch: MicroBatch) -> dict[str, torch.Tensor]:
                return {"ref_logps": learner.policy.score(batch, temperature=learner.temperature)}

            for batch, found in zip(batches, learner.world.map(batches, score, progress), strict=True):
                spread(batch, found)

    def _read(self) -> None:
        """Goes on with the rows that the state was in, if the improve had any."""
        if self._state is not None:
            self._chosen = self._sampler(_read(self._path(f"chosen_{self._improve}")))
            self._chosen.load_state_dict(self._state)

    def _sampler(self, rows: Sequence[Group]) -> PromptSampler[Group]:
        return PromptSampler(rows, seed=self.seed + 1009 * self._round + self._improve)

    def _path(self, name: str, number: int | None = None) -> Path:
        require(self.folder is not None, OP, "folder", "a function that says where rounds are kept", None)
        return self.folder() / f"round_{self._round if number is None else number}" / f"{name}.jsonl"


def _numbers(groups: Iterable[Group]) -> dict[str, float]:
    """What a round's samples scored, in all and by each reward."""
    groups = list(groups)
    samples = [sample for group in groups for sample in group.samples]
    missing = [sample for sample in samples if sample.reward is None]
    numbers = {"round/reward": mean_reward(groups), "round/unscored": len(missing) / len(samples)}
    numbers["round/mean_length"] = fmean(len(sample.token_ids) for sample in samples)
    for name in dict.fromkeys(name for sample in samples for name in sample.rewards):
        values = [value for sample in samples if (value := sample.rewards.get(name)) is not None]
        numbers[f"round/rewards/{name}"] = fmean(values) if values else math.nan
    return numbers


def _write(path: Path, groups: Sequence[Group]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, "".join(json.dumps(group_to_json(group), default=str) + "\n" for group in groups))


def _read(path: Path) -> list[Group]:
    """The groups of a file.

    Raises:
        ValueError: it was cut or changed; the message names it.
    """
    groups = []
    try:
        with path.open(encoding="utf-8") as lines:
            groups = [group_from_json(json.loads(line)) for line in lines]
    except FileNotFoundError:
        got = "none"
    except (ValueError, TypeError, KeyError) as error:
        got = f"one that cannot be read: {error}"
    else:
        return groups
    require(False, OP, str(path), "a file of groups", got, "Start another run.")
    return groups
