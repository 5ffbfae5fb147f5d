"""What a checkpoint holds, and how a run resumes from it as if it had never stopped."""

from __future__ import annotations

import json
import random
import shlex
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastrl.check import require, sentence
from fastrl.data.groups import batch_from_json, batch_to_json
from fastrl.files import clear_leftovers
from fastrl.model.race import to_json
from fastrl.trainer import checkpoint
from fastrl.trainer.checkpoint import Checkpoint
from fastrl.trainer.config import RESUME_MAY_CHANGE, TrainConfig
from fastrl.trainer.recipe import from_dict
from fastrl.types import Batch

if TYPE_CHECKING:
    from fastrl.trainer.loop import Run


def position(run: Run) -> dict[str, Any]:
    """The run's state besides weights and optimizer: source, algorithm, random numbers and log.

    Sampling and training order are seeded by the step's number. The global generators are saved for other code that
    draws from them, rewards above all.
    """
    where = {"source": run.source.state_dict(), "algorithm": run.algorithm.state_dict(), "random": _random_state()}
    return where | {"log": run.log.position()}


def back_to(run: Run, where: dict[str, Any]) -> None:
    """Undoes what was drawn and logged since `position` returned `where`, because that work will be repeated."""
    _go_to(run, where)
    run.log.rewind(where["log"])


def save(run: Run) -> Path:
    """Writes a checkpoint, deletes those no longer kept, and returns its folder.

    Raises:
        OSError: it cannot be written. Nothing of it is left, and earlier checkpoints are untouched.
    """
    learner, batch = run.learner, run.batch
    state = {
        "learner": learner.state_dict(),
        **position(run),
        "log": run.log.state(),
        "batch": batch_to_json(batch) if batch else None,
        "linear": to_json(run.speed.choices),
    }

    writers: dict[str, Callable[[Path], None]] = {
        f"{name}/{part}.safetensors": partial(checkpoint.write_tensors, {part: tensor})
        for name, optimizer in learner.optimizers.items()
        for part, tensor in optimizer.tensors().items()
    }
    writers["model"] = partial(checkpoint.write_model, learner.models()["model"], run.tokenizer)
    writers["state.json"] = partial(checkpoint.write_json, state)
    about = checkpoint.about(
        step=learner.steps,
        update=len(batch.updates) if batch else None,
        model={"name": run.config.model, "fingerprint": run.fingerprint},
        recipe=_plain(run.config),
    )
    name = checkpoint.name_of(learner.steps, about["update"])
    folder = checkpoint.write_checkpoint(run.directory, name, writers, about)
    checkpoint.keep(run.directory, last=run.config.keep_last, every=run.config.keep_every)
    return folder


def restore(run: Run) -> None:
    """Restores weights, optimizers, source and random numbers from `run.resumed`, and the current batch if the run
    stopped inside a step.

    Raises:
        ValueError: the prompts or the model's shape differ from those the run began with.
    """
    found = run.resumed
    state = found.json("state.json")
    run.learner.load(state["learner"], found.tensors)
    run.batch = batch_from_json(state["batch"], run.learner.device) if state["batch"] else None
    _go_to(run, state)


def resume_log(run: Run) -> None:
    """Removes what the run logged after `run.resumed`, and reports where it resumes."""
    if run.world.first:
        clear_leftovers(run.directory)
        checkpoint.point_to(run.resumed.folder)  # newer checkpoints are abandoned
    where = reached(run.learner.steps, run.batch)
    run.log.resume(run.resumed.json("state.json")["log"], _where_from(run, where))
    for message in (*run.resumed.skipped, *_differences(run)):
        run.log.warn(message)


def reached(step: int, batch: Batch | None) -> str:
    """How far a run is, in words."""
    if batch is None:
        return f"step {step}"
    begun = f"{len(batch.updates)} optimizer steps" if batch.updates else "the rollout"
    return f"step {step} and {begun} of the next"


def resumable(config: TrainConfig) -> Checkpoint:
    """The checkpoint that `config.resume` names: a run directory, one of its checkpoints, or `latest`.

    Raises:
        ValueError: there is none, or its recipe differs; the message names the field.
    """
    found = checkpoint.find(_newest_run(config.directory()) if config.resume == "latest" else Path(config.resume))
    began = found.manifest["step"] + (found.manifest["update"] is not None)
    require(config.steps >= began, "resume", "steps", f"at least {began}, as far as {found.folder} is", config.steps)
    changed = [change for change in _changes(found, config) if change[0] not in RESUME_MAY_CHANGE]
    if changed:
        name, was, now = changed[0]
        others = f" So do {', '.join(name for name, *_ in changed[1:])}." if changed[1:] else ""
        do = f"It differs between recipe and run.{others} {found.run_dir / 'config.yaml'} is the run's recipe."
        raise ValueError(sentence("resume", name, f"{was!r} as in {found.folder}", repr(now), do))
    return found


def require_same_model(found: Checkpoint, name: str, fingerprint: str) -> None:
    """Refuses to resume with weights other than those the run began with, whatever their name.

    Raises:
        ValueError: the weights differ.
    """
    began = found.manifest["model"]
    got = "other weights under the same name" if name == began["name"] else repr(name)
    do = f"{found.folder} was trained from it."
    require(fingerprint == began["fingerprint"], "resume", "model", f"{began['name']!r}", got, do)


def how_to(run_dir: Path) -> str:
    """The command that resumes a run."""
    return shlex.join(["fastrl", "train", str(run_dir / "config.yaml"), "--resume", str(run_dir)])


def _newest_run(wanted: Path) -> Path:
    """The run directory among `wanted`, `wanted`-2, ... that wrote a checkpoint last; `wanted` if none did."""
    runs = [run for run in (wanted, *wanted.parent.glob(f"{wanted.name}-*")) if checkpoint.has_checkpoint(run)]
    return max(runs, key=lambda run: (run / checkpoint.CHECKPOINTS).stat().st_mtime, default=wanted)


def _changes(found: Checkpoint, config: TrainConfig) -> list[tuple[str, Any, Any]]:
    """(field, value in the checkpoint, value in `config`) of every field that differs."""
    saved = from_dict(TrainConfig, found.manifest["recipe"], f"resume: {found.folder}")  # fills in newer fields
    if config.dtype == "auto":
        config = replace(config, dtype=saved.dtype)  # as resolved then
    was, now = dict(_leaves(_plain(saved))), dict(_leaves(_plain(config)))
    return [(name, was.get(name), now.get(name)) for name in {**was, **now} if was.get(name) != now.get(name)]


def _where_from(run: Run, where: str) -> str:
    changes = [change for change in _changes(run.resumed, run.config) if change[0] not in ("resume", "run_dir")]
    listed = "".join(f"; {name} {was} -> {now}" for name, was, now in changes)
    return f"resumed after {where}, from {run.resumed.folder}{listed}"


def _differences(run: Run) -> Iterator[str]:
    """Warnings about a run that resumes under different conditions."""
    was = run.resumed.manifest["versions"]
    now = checkpoint.about()["versions"]
    changed = [f"{name} {was.get(name)} -> {now[name]}" for name in now if was.get(name) != now[name]]
    if changed:
        yield f"Resumed with other versions, whose rounding may differ: {', '.join(changed)}."
    steps = run.resumed.manifest["recipe"]["steps"]
    if run.config.optimizer.schedule == "cosine" and steps != run.config.steps:
        yield f"The cosine schedule now ends at step {run.config.steps} instead of {steps}: the learning rate jumps."


def _plain(config: TrainConfig) -> dict[str, Any]:
    """The recipe after a round trip through JSON."""
    return json.loads(json.dumps(asdict(config), default=str))


def _leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of each entry of a nested mapping; a list counts as one value."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from _leaves(value, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, values


def _go_to(run: Run, where: dict[str, Any]) -> None:
    run.source.load_state_dict(where["source"])
    run.algorithm.load_state_dict(where["algorithm"])
    _set_random_state(where["random"])


def _random_state() -> dict[str, Any]:
    """Generator states of python, numpy, torch and each CUDA device, in a form that JSON can hold."""
    _, keys, place, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [keys.tolist(), place, has_gauss, gauss],
        "torch": _hex(torch.get_rng_state()),
        "cuda": [_hex(state) for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    """CUDA devices that only one of the two machines has are left alone."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, place, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), place, has_gauss, cached))
    torch.set_rng_state(_bytes(state["torch"]))
    for device, cuda in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(_bytes(cuda), device)


def _hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
