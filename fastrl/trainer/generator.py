"""The process that samples ahead of training: `python -m fastrl.trainer.generator`, started by `Ahead`.

Its first line of input says what to do; its input ends when the trainer does, and so does it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastrl.data.groups import batch_to_json
from fastrl.progress import Progress
from fastrl.rollout.transformers_sampler import TransformersSampler
from fastrl.sources import Rollouts
from fastrl.sources.ahead import ERRORS, POLL, Spool
from fastrl.trainer.config import TrainConfig
from fastrl.trainer.recipe import from_dict
from fastrl.trainer.setup import Given, prepare


@dataclass
class Generator:
    """A source, the weights that it samples with, and what its watcher is told.

    As the source's `learner` it says how far the weights are; as its `watch` it renews them wherever progress is
    reported, which is before every token.
    """

    source: Rollouts
    sampler: TransformersSampler
    spool: Spool
    steps: int = 0  # before the batch that is sampled
    published: int = 0  # steps behind the newest weights
    warnings: list[str] = field(default_factory=list)
    _number: int = 0

    @property
    def updates(self) -> int:
        """Optimizer steps behind the current weights."""
        return self.sampler.version

    def renew(self, done: int = 0, total: int = 0) -> None:
        """Loads newer weights, if there are any."""
        if new := self.spool.weights_if_newer(self._number):
            self.sampler.update_weights(new.tensors, new.updates)
            self.published, self._number = new.steps, new.number

    @contextmanager
    def stage(self, name: str, unit: str = "") -> Iterator[Progress]:
        """As `Watch`."""
        yield self.renew

    def warn(self, message: str) -> None:
        """As `Watch`; passed on to the trainer with the batch."""
        self.warnings.append(message)

    def run(self, first: int, last: int, max_staleness: int) -> None:
        """Samples the batches of steps `first` to `last`, each as soon as its tokens cannot become too old."""
        for step in range(first, last + 1):
            self.renew()
            while self.published < step - 1 - max_staleness:
                time.sleep(POLL)
                self.renew()
            self.steps, error, batch = step - 1, None, None
            try:
                batch = self.source.next(self, self)
            except tuple(ERRORS.values()) as raised:
                error = {"type": type(raised).__name__, "message": str(raised)}
            answer = {"batch": batch and batch_to_json(batch), "source": self.source.state_dict()}
            self.spool.put(step, answer | {"warnings": self.warnings, "error": error})
            self.warnings = []
            if error:
                return


def main() -> None:
    """Reads what to do from standard input and does it."""
    asked: dict[str, Any] = json.loads(sys.stdin.readline())
    spool = Spool(Path(asked["folder"]))
    threading.Thread(target=_end_with_trainer, args=(spool,), daemon=True).start()
    sys.path[:] = asked["path"]  # where the trainer finds the rewards that a recipe names
    config = from_dict(TrainConfig, asked["recipe"], "generator")
    # It learns nothing, so it needs no reference and no critic.
    algorithm = SimpleNamespace(kind="rewarded", needs_ref=False, needs_critic=False, needs_greedy=asked["greedy"])
    source = prepare(config, Given(algorithm=algorithm)).source
    source.load_state_dict(asked["source"])
    generator = Generator(source, source.sampling.engine, spool)
    generator.run(asked["step"], config.steps, asked["max_staleness"])
    threading.Event().wait()  # until the trainer ends, so that its end is the only one there is


def _end_with_trainer(spool: Spool) -> None:
    """Ends this process when the trainer's end of the pipe closes, however the trainer ended."""
    sys.stdin.read()
    shutil.rmtree(spool.folder, ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    main()
