"""Completions sampled ahead of training by a second process, whose weights are renewed while it samples.

    trainer                                        generator (fastrl/trainer/generator.py)
    publish ----- weights_00000007.safetensors --> before every token: newer? load them and go on
    next <--------- batch_000012.json ------------ prompts -> completions -> rewards, at most k versions behind

Both files appear complete or not at all, so either process may die at any time.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastrl.algorithms.base import Kind, Learner
from fastrl.check import require
from fastrl.data.groups import batch_from_json
from fastrl.progress import Watch
from fastrl.rewards import RewardFailure
from fastrl.sources.base import Source
from fastrl.types import Batch

POLL = 0.01  # seconds between looks for a file
PATIENCE = 3  # times in a row that the generator may die without finishing a batch
ERRORS = {one.__name__: one for one in (RewardFailure, FloatingPointError)}  # what ends the run, as without a generator


class GeneratorDied(RuntimeError):
    """The generator process keeps dying."""


def _end(started: list[subprocess.Popen[str]], folder: Path | None = None) -> None:
    """Ends the generator, and removes what it and the trainer wrote."""
    while started:
        process = started.pop()
        process.kill()
        process.communicate()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Ahead:
    """PipelineRL-k: the next batches are sampled by another process, at most k versions ahead, while this one trains.

    The policy's weights are published after every step, and completions in flight go on under them with the keys and
    values they have (PipelineRL, arXiv:2509.19128; k = 8 in ScaleRL, arXiv:2510.13786 section 3.1). The generator waits
    rather than start a batch that could be trained on by weights more than `max_staleness` steps newer than its first
    token's; 0 samples and trains in turn. Which weights wrote which token depends on time, so two runs differ.

    Reports `ahead/lag_<n>`, the share of the policy's own tokens that are n steps old when they are trained on, and
    `ahead/wait`, the seconds that training waited for a batch.

    Args:
        inner: the source that the generator runs too. Here it only holds the position in the prompts.
        orders: what the generator reads from its input, besides its position: see `fastrl.trainer.generator`.
        command: starts the generator.
        max_staleness: k.
    """

    inner: Source
    orders: Mapping[str, Any]
    command: Sequence[str]
    max_staleness: int = 8
    kind: ClassVar[Kind] = "rewarded"
    replays: ClassVar[bool] = False
    _process: subprocess.Popen[str] | None = field(default=None, init=False, repr=False)
    _started: list[subprocess.Popen[str]] = field(default_factory=list, init=False, repr=False)
    _spool: Spool | None = field(default=None, init=False, repr=False)
    _step_of: dict[int, int] = field(default_factory=dict, init=False, repr=False)  # updates -> steps, when published
    _deaths: int = field(default=0, init=False, repr=False)  # since the last batch

    def next(self, learner: Learner, watch: Watch) -> Batch:
        """As `Source`.

        Raises:
            RewardFailure, FloatingPointError: as raised by the generator's source.
            GeneratorDied: it died again and again without finishing a batch.
        """
        if self._process is None:
            self.publish(learner, steps=learner.steps)
            self._start(learner.steps + 1)
        began = time.perf_counter()
        with watch.stage("wait", "of the next batch") as progress:
            while (answer := self._spool.take(learner.steps + 1)) is None:
                progress(0, 1)
                self._revive(learner, watch)
                time.sleep(POLL)
        for message in answer["warnings"]:
            watch.warn(message)
        if answer["error"]:
            raise ERRORS[answer["error"]["type"]](answer["error"]["message"])
        self._deaths = 0
        self.inner.load_state_dict(answer["source"])
        batch = batch_from_json(answer["batch"])
        batch.numbers |= self._lags(batch, learner.steps) | {"ahead/wait": time.perf_counter() - began}
        return batch

    def publish(self, learner: Learner, steps: int | None = None) -> None:
        """Hands the trained weights to the generator."""
        steps = learner.steps + 1 if steps is None else steps  # called before the loop counts the step
        trained = {name: one for name, one in learner.policy.model.named_parameters() if one.requires_grad}
        if self._spool is None:
            # The old weights and the new ones, and as much again for batches.
            self._spool = Spool.make(3 * sum(one.nbytes for one in trained.values()))
            weakref.finalize(self, _end, self._started, self._spool.folder)
        self._step_of[learner.updates] = steps
        self._spool.put_weights(trained, steps, learner.updates)

    def state_dict(self) -> dict[str, Any]:
        """The position in the prompts after the last batch that `next` returned; later ones are sampled again."""
        return self.inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As `Source`. Batches sampled ahead from another position are dropped."""
        if self._process is None or state != self.inner.state_dict():
            self._stop()
        self.inner.load_state_dict(state)

    def _start(self, step: int) -> None:
        """Starts the generator; its first batch is that of the first step from `step` on that has none yet."""
        source = self.inner.state_dict()
        while (done := self._spool.peek(step)) is not None:
            source, step = done["source"], step + 1
        where = {"folder": str(self._spool.folder), "step": step, "source": source, "max_staleness": self.max_staleness}
        with self._spool.log.open("a") as log:
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True, start_new_session=True
            )
        self._started[:] = [self._process]
        try:
            self._process.stdin.write(json.dumps({**self.orders, **where}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it is dead already, which is found where its batch is waited for

    def _revive(self, learner: Learner, watch: Watch) -> None:
        """Starts a dead generator again."""
        code = self._process.poll()
        if code is None or self._spool.peek(learner.steps + 1) is not None:
            return
        self._deaths += 1
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit status {code}"
        if self._deaths >= PATIENCE:
            raise GeneratorDied(
                f"the generator process ended {how}, the last of {PATIENCE} times without finishing a batch. Its last "
                f"words: {self._spool.last_words()}"
            )
        watch.warn(f"The generator process ended {how}. Started again; its unfinished completions are sampled again.")
        self._start(learner.steps + 1)

    def _stop(self) -> None:
        if self._process is not None:
            _end(self._started)
            self._process = None
            self._spool.clear()

    def _lags(self, batch: Batch, steps: int) -> dict[str, float]:
        """The share of the policy's own tokens by the number of steps their weights are behind."""
        lags = Counter(
            steps - self._step_of[version]
            for group in batch.groups
            for sample in group.samples
            for version, own in zip(sample.versions, sample.own or [True] * len(sample.versions), strict=True)
            if own
        )
        over = max(lags, default=0)
        require(over <= self.max_staleness, "Ahead", "max_staleness", f"lags up to {self.max_staleness}", over)
        return {f"ahead/lag_{lag}": lags[lag] / lags.total() for lag in range(over + 1)} if lags else {}


class Published(NamedTuple):
    """Weights, the steps and updates behind them, and how many were published before them."""

    tensors: dict[str, torch.Tensor]
    steps: int
    updates: int
    number: int


@dataclass(frozen=True)
class Spool:
    """The folder through which trainer and generator talk."""

    folder: Path

    @classmethod
    def make(cls, room: int) -> Spool:
        """A new folder with room for this many bytes, in memory if there is a file system for that. Removes those of
        processes that are gone.

        Raises:
            ValueError: no file system has the room.
        """
        places = [Path(place) for place in ("/dev/shm", tempfile.gettempdir()) if os.access(place, os.W_OK)]
        for old in (old for place in places for old in place.glob("fastrl-ahead-*-*")):
            if not Path(f"/proc/{old.name.split('-')[2]}").exists() and Path("/proc/self").exists():
                shutil.rmtree(old, ignore_errors=True)
        parent = next((place for place in places if shutil.disk_usage(place).free >= room), None)
        got, do = f"less in {' and in '.join(map(str, places))}", "Free some, or set TMPDIR."
        require(
            parent is not None, "Ahead", "weights", f"room for {room >> 20} MiB, in which they are handed on", got, do
        )
        return cls(Path(tempfile.mkdtemp(prefix=f"fastrl-ahead-{os.getpid()}-", dir=parent)))

    @property
    def log(self) -> Path:
        """Where the generator's output goes."""
        return self.folder / "generator.log"

    def put_weights(self, tensors: Mapping[str, torch.Tensor], steps: int, updates: int) -> None:
        """Replaces the published weights."""
        aside, last = self.folder / "weights.tmp", self._newest()
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(on_cpu, aside, metadata={"steps": str(steps), "updates": str(updates)})
        # A number in the name, because the clock of a file system may not tell two files of one step apart.
        os.replace(aside, self._weights(last + 1))
        self._weights(last).unlink(missing_ok=True)

    def weights_if_newer(self, than: int) -> Published | None:
        """The published weights; None if their number is `than`."""
        while (number := self._newest()) != than:
            with suppress(FileNotFoundError), safe_open(self._weights(number), "pt") as found:  # else replaced just now
                about = found.metadata()
                tensors = {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118
                return Published(tensors, int(about["steps"]), int(about["updates"]), number)
        return None

    def _newest(self) -> int:
        """The number of the newest weights; 0 if there are none."""
        names = [name for name in os.listdir(self.folder) if name.startswith("weights_")]
        return max((int(name[8:-12]) for name in names), default=0)

    def _weights(self, number: int) -> Path:
        return self.folder / f"weights_{number:08d}.safetensors"

    def put(self, step: int, answer: Mapping[str, Any]) -> None:
        """Writes what there is to say about a step's batch."""
        aside = self._batch(step).with_suffix(".tmp")
        aside.write_text(json.dumps(answer), encoding="utf-8")
        os.replace(aside, self._batch(step))

    def peek(self, step: int) -> dict[str, Any] | None:
        """What `put` wrote for a step; None if it has not yet."""
        try:
            return json.loads(self._batch(step).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def take(self, step: int) -> dict[str, Any] | None:
        """As `peek`, and removes it."""
        answer = self.peek(step)
        if answer is not None:  # else it may have come just now
            self._batch(step).unlink()
        return answer

    def clear(self) -> None:
        """Removes all batches."""
        for path in self.folder.glob("batch_*"):
            path.unlink(missing_ok=True)

    def last_words(self) -> str:
        """The last lines of the generator's output."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        return " / ".join(text.strip().splitlines()[-5:]) or "none"

    def _batch(self, step: int) -> Path:
        return self.folder / f"batch_{step:06d}.json"
