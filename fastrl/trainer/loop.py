"""The trainer's loop. The data flow:

batch = source.next       prompts -> completions -> rewards, or pre-written rows: fastrl/sources
algorithm.updates         advantages or labels: fastrl/algorithms/group_policy_gradient.py, ppo.py, offline.py;
                          then drop what cannot contribute, split, pack, score
learner.step              forward -> loss, which is algorithm.accumulate -> backward -> optimizer step
source.publish            new weights for the sampler
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from fastrl import env
from fastrl.algorithms.base import Algorithm
from fastrl.check import require
from fastrl.distributed import ALONE, World
from fastrl.doctor import environment
from fastrl.model.adapter import merged
from fastrl.monitor.interrupt import Interrupted
from fastrl.monitor.log import Callback, RunLog, UnwrittenLog
from fastrl.monitor.report import write_report
from fastrl.monitor.screen import columns_for
from fastrl.monitor.summary import staleness, step_metrics
from fastrl.rewards import RewardFailure
from fastrl.sources.base import Source
from fastrl.trainer import resume
from fastrl.trainer.checkpoint import Checkpoint, copy_model, has_checkpoint, save_model
from fastrl.trainer.config import TrainConfig
from fastrl.trainer.ended import Ended, advice, spot, write_status
from fastrl.trainer.evaluate import Evaluation, Printed
from fastrl.trainer.learner import Learner, NonFiniteLoss
from fastrl.trainer.lock import only_writer
from fastrl.trainer.precision import Speed
from fastrl.trainer.reference import AskedOnce
from fastrl.types import Batch


@dataclass(frozen=True)
class Outcome:
    """How a run ended: status, steps done, held-out numbers before and after, and the report."""

    status: str  # finished, interrupted, diverged, rewards failed, failed
    steps: int
    before: dict[str, float]
    after: dict[str, float]
    report: Path
    signal: int | None = None  # the signal that interrupted it
    problems: tuple[str, ...] = ()  # what could not be written at the end


@dataclass(repr=False)
class Run:
    """A training run: where batches come from, what learns from them and how, and what is measured.

    `fastrl.trainer.setup.prepare` makes one from a recipe and the objects given to a `Trainer`.
    """

    config: TrainConfig
    directory: Path
    learner: Learner
    algorithm: Algorithm
    source: Source
    tokenizer: PreTrainedTokenizerBase
    evaluations: Sequence[Evaluation]
    fingerprint: str  # of the model's weights before training
    speed: Speed
    once: AskedOnce | None = None  # the reference model for pre-written rows
    resumed: Checkpoint | None = None  # the checkpoint to resume from
    said: tuple[str, ...] = ()  # notes to the user on model and data
    callbacks: Sequence[Callback] = ()
    world: World = ALONE
    batch: Batch | None = None  # the next step's batch, once the source has given it
    log: RunLog = field(init=False)
    rewind_to: dict[str, Any] = field(
        init=False
    )  # where source, log and random numbers were before the unfinished work
    saved: tuple[Path, dict[str, Any]] | None = field(default=None, init=False)  # last checkpoint, and its counters

    def train(self) -> Outcome:
        """Runs the remaining steps, writes to `directory` and returns how the run ended.

        Raises:
            ValueError: another process writes to the run's directory, or its checkpoint belongs to other prompts.
            Exception: whatever went wrong before the first update; later the run is saved and says how it ended.
        """
        with self._writing():
            self.log = self._open_log()
            with self.log.interrupt.listening():
                self._begin()
                ended = self._steps()
            return self._conclude(ended)

    def evaluate(self) -> dict[str, float]:
        """Evaluates the current weights, prints the numbers and returns them by name; writes nothing."""
        printed = Printed(aloud=self.world.first)
        for evaluation in self.evaluations:
            evaluation.run(self.learner, printed, self.learner.steps)
        return printed.results

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """The run's folder, which the first process locks and the others are told of."""
        writer = only_writer(self.directory, self.config) if self.world.first else nullcontext(self.directory)
        with ExitStack() as stack:
            with self.world.together("opening the run's folder"):
                self.directory = stack.enter_context(writer)
            self.directory = Path(self.world.from_first(str(self.directory)))
            yield

    def _open_log(self) -> RunLog:
        config, done = self.config, self.resumed.manifest["step"] if self.resumed else 0
        if not self.world.first:
            log = UnwrittenLog(total_steps=config.steps)
            log.interrupt.together = True
            return log
        show_every = config.show_every
        kind = self.algorithm.kind if self.source.kind != "rewarded" else "rewarded"
        columns = columns_for("reward_model" if config.algorithm == "reward_model" else kind)
        log = RunLog(self.directory, total_steps=config.steps, show_every=show_every, columns=columns)
        about = environment() | {"speed": self.speed.about(), "data": config.about_data()}
        log.start(asdict(replace(config, resume="")), about, trackers=config.log_to, done=done)
        log.call(self.callbacks)
        log.interrupt.together = self.world.size > 1
        return log

    def _begin(self) -> None:
        """Computes reference log-probabilities, makes the optimizers, and restores a resumed run."""
        if self.once:
            # An interrupt is raised again before the first step, where there is something to resume from.
            with suppress(Interrupted), self.log.stage("reference", "answers") as progress:
                self.once.fill_in(self.learner, self.directory, progress=progress)
            self.once = None  # frees the memory of a separate reference model
        with self.log.stage("setup"):
            self.learner.begin()
            env.return_freed_memory()  # the optimizers' buffers replaced the original weights
        if self.resumed:
            resume.restore(self)
            resume.resume_log(self)
        else:
            for message in (*self.speed.warnings(), *self.said):
                self.log.warn(message)

    def _steps(self) -> Ended:
        """Runs the remaining steps. Whatever ends them, the weights are those of the last whole update, unless an
        update was cut short while it was written: then `learner.intact` is False and nothing is saved."""
        learner, log, config = self.learner, self.log, self.config
        while True:
            in_step, at = False, f"Evaluation after step {learner.steps}"
            before = self.rewind_to = resume.position(self)
            try:
                log.interrupt.agree(self.world)
                self._evaluate_if_due()
                log.interrupt.agree(self.world)
                if learner.steps == config.steps:
                    return Ended("finished")
                in_step, at = True, f"Step {learner.steps + 1}"
                before = self.rewind_to = resume.position(self)
                self._step()
            except NonFiniteLoss as error:
                where = f"; the batch is in {error.save(self.directory)}" if self.world.first else ""
                log.warn(f"{at}: {error}. Nothing was updated{where}.")
                return Ended("diverged")
            except FloatingPointError as error:  # non-finite logits in the sampler, or a non-finite held-out loss
                log.warn(f"{at}: {error}")
                return Ended("diverged")
            except Interrupted as interruption:
                self._rewind(before)
                log.warn(f"Stopped by {interruption} after {self._reached()}; saving.")
                self._save()
                return Ended("interrupted", log.interrupt.signal)
            except RewardFailure as error:  # the weights are those of the last update, and the reward may be repaired
                if not in_step and not learner.steps:
                    raise  # the evaluation before training failed: nothing to go on with
                self._rewind(before)
                log.warn(f"{at}: {error}")
                self._save()
                return Ended("rewards failed")
            except (Exception, KeyboardInterrupt) as error:
                if not learner.updates:
                    raise  # nothing was trained yet
                self._rewind(before)
                log.warn(f"{at}: {spot(error)}. {advice(error)}".strip())
                if learner.intact:
                    self._save()
                pressed = isinstance(error, KeyboardInterrupt)
                return Ended("interrupted" if pressed else "failed", log.interrupt.signal if pressed else None)
            if config.save_every and (learner.steps % config.save_every == 0 or learner.steps == config.steps):
                self._save()

    def _step(self) -> None:
        """One step, or the rest of one that was interrupted."""
        source, learner, algorithm, log = self.source, self.learner, self.algorithm, self.log
        batch = self.batch or source.next(learner, log)
        require(bool(batch.groups), type(source).__name__, "next", "a batch with groups", "one without")
        self.batch = batch
        if not batch.updates:
            batch.numbers |= staleness(batch.groups, learner.updates)
        self.rewind_to = resume.position(self)
        for update in algorithm.updates(learner, batch, log):
            log.interrupt.agree(self.world)
            with log.stage("train", f"micro-batches{update.label}") as progress:
                batch.updates.append(learner.step(algorithm, update, progress))
            self.rewind_to = resume.position(self)
            learner.intact = True  # only now do weights, batch and position agree
        source.publish(learner)
        log.step(learner.steps + 1, step_metrics(batch))
        if batch.kind == "rewarded":
            log.completions(learner.steps + 1, batch.groups)
        learner.steps, self.batch = learner.steps + 1, None  # a step is done once it is logged

    def _evaluate_if_due(self) -> None:
        """Evaluates before and after training, and every `eval.every` steps between."""
        step, every = self.learner.steps, self.config.eval.every
        due = step in (0, self.config.steps) or bool(every and step % every == 0)
        if due and not self.world.from_first(bool(self.log.evaluated(step))):
            for evaluation in self.evaluations:
                evaluation.run(self.learner, self.log, step)

    def _rewind(self, before: dict[str, Any]) -> None:
        """Undoes what was drawn and logged since the last whole update, or since `before` if the batch is not kept."""
        if self.batch is not None and self.source.replays and not self.batch.updates:
            self.batch = None
        resume.back_to(self, before if self.batch is None else self.rewind_to)

    def _reached(self) -> str:
        return resume.reached(self.learner.steps, self.batch)

    def _save(self) -> None:
        """Writes a checkpoint. If that fails, the run goes on and earlier checkpoints stay."""
        if not self.world.first:
            return
        try:
            with self.log.stage("save"):
                env.return_freed_memory()
                self.saved = resume.save(self), self.learner.state_dict()
        except OSError as error:
            step = self.learner.steps
            self.log.warn(
                f"The checkpoint after step {step} could not be written to {self.directory}: {error}. Earlier ones are "
                "unchanged."
            )

    def _conclude(self, ended: Ended) -> Outcome:
        """Saves what was trained, writes the report, reports what could not be written, and closes the log."""
        log, steps, problems = self.log, self.learner.steps, []
        if not self.world.first:
            return Outcome(ended.status, steps, {}, {}, self.directory / "report.html", ended.signal)
        if self.learner.intact:
            try:
                with log.stage("save"):
                    env.return_freed_memory()
                    self._save_models(ended)
            except (OSError, SafetensorError) as error:
                problems.append(f"The model could not be written to {self.directory}: {error}.")
        else:
            problems.append("An update was cut short, so the model is not saved; checkpoints are unchanged.")
        before, after = log.evaluated(0), log.evaluated(steps) if ended.status == "finished" else {}
        report = self.directory / "report.html"
        go_on = resume.how_to(self.directory) if ended.status != "finished" and has_checkpoint(self.directory) else ""
        try:
            write_status(self.directory, ended, steps, self.config.steps, go_on)
            report = write_report(self.directory)
        except OSError as error:
            problems.append(f"The report could not be written to {self.directory}: {error}.")
        for message in problems:
            log.warn(message)
        again = {"resume": go_on} if go_on else {}
        log.close(ended.status, {"before": before, "after": after, "steps": steps, "report": str(report)} | again)
        return Outcome(ended.status, steps, before, after, report, ended.signal, tuple(problems))

    def _save_models(self, ended: Ended) -> None:
        """Writes the trained models; an adapter alone or merged, as configured. Non-finite weights go to a folder whose
        name ends in _not_finite."""
        for name, model in self.learner.models().items():
            as_merged = model is self.learner.adapted and self.config.adapter.save == "merged"
            finite = ended.status != "diverged" or all(bool(weight.isfinite().all()) for weight in model.parameters())
            folder = self.directory / (name if finite else f"{name}_not_finite")
            if self.saved and self.saved[1] == self.learner.state_dict() and name == "model" and not as_merged:
                copy_model(self.saved[0], folder)
            else:
                save_model(merged(self.learner.adapted) if as_merged else model, self.tokenizer, folder)
