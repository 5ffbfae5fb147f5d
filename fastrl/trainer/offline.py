"""The loop for answers that were written before training, which is the picture of the data flow:

next groups -> pack (the reference scored all of them once, before training) -> forward -> loss -> backward -> step
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace

from fastrl import env
from fastrl.check import require
from fastrl.losses.metrics import finish, merge
from fastrl.progress import tracked
from fastrl.trainer.doctor import environment
from fastrl.trainer.interrupt import Interrupted
from fastrl.trainer.lock import only_writer
from fastrl.trainer.log import RunLog
from fastrl.trainer.loop import Optimizers, Outcome, conclude, evaluates, save_or_warn
from fastrl.trainer.offline_config import OfflineConfig, build_objective
from fastrl.trainer.offline_setup import OfflineRun, prepare
from fastrl.trainer.optimizer import POLICY, MasterOptimizer, whole_step
from fastrl.trainer.reference import fill_in
from fastrl.trainer.resume import back_to, position, reached, restore, resume_log
from fastrl.trainer.screen import Column
from fastrl.trainer.step import NonFiniteLoss
from fastrl.types import Group

COLUMNS = {  # by the kind of rows and, for a reward model, its metrics' names
    "pairs": (Column("accuracy", "rewards/accuracies", 9), Column("margin", "rewards/margins", 9)),
    "labelled": (Column("desired", "rewards/chosen", 9), Column("other", "rewards/rejected", 9)),
    "completions": (Column("entropy", "entropy", 9),),
    "reward_model": (Column("accuracy", "accuracy", 9), Column("margin", "margin", 9)),
}
EVERY_RUN = (
    Column("loss", "loss", 9),
    Column("grad", "grad_norm", 8),
    Column("tok/s", "tokens_per_second", 7),
    Column("step s", "step_time", 8),
    Column("left", "eta", 8),
)
SHOWN_ROWS = 6  # held-out rows that the report shows, each judged by itself at every evaluation


def train(config: OfflineConfig) -> Outcome:
    """Trains as `config` says and returns how it ended. Nothing is written until models and data are ready.

    With `config.resume` it goes on in that run's directory, and what follows is what would have followed.

    Raises:
        ValueError: something in the configuration cannot work; the message says what.
    """
    run = prepare(config)
    config = run.config  # with what `auto` stands for
    with only_writer(run.directory, config) as directory:
        run = replace(run, directory=directory)
        columns = COLUMNS.get(config.algorithm, COLUMNS[run.objective.kind]) + EVERY_RUN
        log = RunLog(directory, total_steps=config.steps, columns=columns)
        about = environment() | {"speed": run.speed.about()}
        log.start(asdict(replace(config, resume="")), about, trackers=config.log_to, done=_steps_done(run))
        with log.interrupt.listening():
            if run.reference:
                # An interrupt is met again before the first step, where there is something to go on from.
                with suppress(Interrupted), log.stage("reference", "answers") as progress:
                    fill_in(run, [*run.to_be_drawn(), *run.held_out], progress=progress)
                run = replace(run, reference=None)  # gives its memory back where it is a model of its own
            with log.stage("setup"):
                optimizers = {POLICY: MasterOptimizer(run.policy.model.parameters(), config.optimizer, config.steps)}
                env.return_freed_memory()  # its buffers took the weights' place; what is left has no use in a step
            done = 0
            if run.resumed:
                done, _ = restore(run, optimizers)
                resume_log(run, log, done, None)
            else:
                for message in (*run.speed.warnings(), *run.skipped):
                    log.warn(message)
            status, steps = _steps(run, log, optimizers, done)
        return conclude(run, log, status, steps)


def evaluate_model(config: OfflineConfig, model: str) -> dict[str, float]:
    """What `model` measures on the rows that the recipe holds out, printed; writes nothing.

    The held-out rows are those of a training run with the same data, seed and size; a loss that compares with a
    reference compares with the recipe's, which is the model that the recipe trains where it names no other.

    Raises:
        ValueError: the recipe holds nothing out.
    """
    require(config.data.held_out > 0, "evaluate_model", "data.held_out", "at least 1", config.data.held_out)
    reference = config.reference or config.model
    reference = reference if build_objective(config).needs_ref else ""
    run = prepare(replace(config, resume="", model=model, reference=reference), trains=False)
    run.speed.show()
    for message in run.skipped:
        print(message)
    if run.reference:
        fill_in(run, run.held_out, keep=False)
    values = run.objective.measure(run.policy, run.answers(run.held_out))
    print(f"held out: {', '.join(f'{name} {value:.3f}' for name, value in values.items())}, {len(run.held_out)} rows")
    return values


def _steps(run: OfflineRun, log: RunLog, optimizers: Optimizers, done: int) -> tuple[str, int]:
    """Every step after the first `done`. Returns (status, completed steps)."""
    config = run.config
    while True:
        start = position(run, log)
        try:
            log.interrupt.check()
            if evaluates(config, done) and not log.evaluated(done):
                _evaluate(run, log, done)
            log.interrupt.check()
            if done == config.steps:
                return "finished", done
            start = position(run, log)
            _step(run, log, optimizers, done + 1)
        except Interrupted as signal:
            back_to(run, log, start)
            log.warn(f"Stopped by {signal} after {reached(done, None)}; saving.")
            save_or_warn(run, log, optimizers, done)
            return "interrupted", done
        except NonFiniteLoss as error:
            path = error.save(run.directory)
            log.warn(f"Step {done + 1}: {error}. Nothing was updated; the batch is in {path}.")
            return "diverged", done
        done += 1
        if config.save_every and (done % config.save_every == 0 or done == config.steps):
            save_or_warn(run, log, optimizers, done)


def _step(run: OfflineRun, log: RunLog, optimizers: Optimizers, step: int) -> None:
    """One batch of groups, from text to updated weights."""
    groups = run.prompts.next(run.config.batch)
    with log.stage("pack"):
        answers = run.answers(groups)
    with log.stage("train", "micro-batches") as progress:
        with whole_step(optimizers.values()):
            loss, metrics = run.objective.accumulate(run.policy, answers, progress)
            metrics += run.policy.router.metrics() if run.policy.router else []
        loss = float(loss)
        if not math.isfinite(loss):
            raise NonFiniteLoss("the loss", loss, answers.batches)
        optimizer = optimizers[POLICY]
        learning_rate = optimizer.learning_rate()
        norm = optimizer.step()
        if not math.isfinite(norm):
            raise NonFiniteLoss("the gradient norm", norm, answers.batches)
    values = {"loss": loss, "grad_norm": norm, "learning_rate": learning_rate, **finish(merge(metrics))}
    log.step(step, values | {"epoch": float(run.prompts.epoch), "num_tokens": float(_tokens(groups))})


def _steps_done(run: OfflineRun) -> int:
    return run.resumed.manifest["step"] if run.resumed else 0


def _tokens(groups: Sequence[Group]) -> int:
    """Of all sequences, each with its prompt."""
    return sum(len(group.prompt.token_ids) + len(sample.token_ids) for group in groups for sample in group.samples)


def _evaluate(run: OfflineRun, log: RunLog, step: int) -> None:
    """What the objective measures on the held-out rows; nothing where there are none."""
    if run.held_out:
        with log.stage("eval", "micro-batches") as progress:
            env.return_freed_memory()
            values = run.objective.measure(run.policy, run.answers(run.held_out), progress)
        with log.stage("eval", "rows by themselves") as progress:
            shown = [_judged(run, group) for group in tracked(run.held_out[:SHOWN_ROWS], progress)]
        kind = "ranked" if run.config.data.ranked else run.objective.kind
        log.evaluation(step, kind, values | {"rows": float(len(run.held_out))}, shown)


def _judged(run: OfflineRun, group: Group) -> Group:
    """The group with what the objective measures on it alone, in the place of its rewards.

    Of one pair the accuracy is the sign of the margin, before training that of a rounding error; and a labelled answer
    alone has no margin.
    """
    values = run.objective.measure(run.policy, run.answers([group]))
    kept = {name: value for name, value in values.items() if name != "accuracy" and math.isfinite(value)}
    return replace(group, samples=[replace(sample, rewards=kept) for sample in group.samples])
