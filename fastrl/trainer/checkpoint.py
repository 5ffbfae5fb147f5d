"""Checkpoints on disk: safetensors and JSON, complete or absent, and verified against their hashes before use.

    runs/grpo/checkpoints/
      latest                      name of the newest checkpoint
      step_000020/                step_000020_update_2 if the run stopped inside a rollout batch
        manifest.json             step, versions, model, recipe; size and SHA-256 of every other file
        model/                    what transformers loads: the model, or the adapter alone
        optimizer/                see `MasterOptimizer.tensors`; a critic and its optimizer are in critic/
        state.json                everything else the next step depends on, such as the groups of the current batch

`resume.py` decides what goes into a checkpoint; this file writes, finds and deletes them.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import fastrl
from fastrl.check import sentence
from fastrl.files import clear_leftovers, complete_or_absent, remove, replace_text, sync
from fastrl.model.load import quiet_progress

FORMAT = 4  # of the folder; other formats are refused
CHECKPOINTS, LATEST, MANIFEST = "checkpoints", "latest", "manifest.json"
T = TypeVar("T")
_NAME = re.compile(r"step_(\d{6,})(?:_update_(\d+))?")
Writers = Mapping[str, Callable[[Path], None]]  # each writes the file, or fills the folder, of its name


class Damaged(ValueError):
    """A checkpoint differs from what was written; the message says how."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: every file is as it was written."""

    folder: Path
    manifest: dict[str, Any]
    skipped: tuple[str, ...] = ()  # why newer checkpoints were skipped, one sentence each

    @property
    def run_dir(self) -> Path:
        """The folder of its run."""
        return self.folder.parent.parent

    def json(self, name: str) -> Any:
        """The contents of a JSON file."""
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors in a folder of safetensors files, on the CPU."""
        inside = [file for file in self.manifest["files"] if file.startswith(f"{name}/")]
        return {key: tensor for file in inside for key, tensor in load_file(self.folder / file).items()}


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """Writes model and tokenizer to `folder`, which appears complete or not at all, and returns it.

    An existing folder of that name is replaced. `AutoModelForCausalLM.from_pretrained(folder)` loads the model.
    """
    with complete_or_absent(folder) as aside:
        write_model(model, tokenizer, aside)
    return folder


def copy_model(checkpoint: Path, folder: Path) -> Path:
    """Writes a checkpoint's model to `folder` as `save_model` would. Files are hard links where the file system has
    them, so nothing is written twice."""
    with complete_or_absent(folder) as aside:
        for path in (checkpoint / "model").iterdir():
            try:
                os.link(path, aside / path.name)
            except OSError:  # no hard links here
                shutil.copy2(path, aside / path.name)
    return folder


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes model and tokenizer into `folder`, file by file."""
    with quiet_progress():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Writes a safetensors file."""
    save_file(tensors, path)


def write_json(values: Any, path: Path) -> None:
    """Writes a JSON file. Floats are read back bit for bit; values that JSON cannot hold are written as text."""
    path.write_text(json.dumps(values, default=str) + "\n", encoding="utf-8")


def name_of(step: int, update: int | None = None) -> str:
    """Name of the checkpoint after `step` steps and, if given, `update` optimizer steps of the next one."""
    return f"step_{step:06d}" + ("" if update is None else f"_update_{update}")


def write_checkpoint(run_dir: Path, name: str, writers: Writers, about: dict[str, Any]) -> Path:
    """Writes a checkpoint and, once it is complete, makes it the latest. `writers` run in two threads, so the largest
    come first.

    Raises:
        OSError: it cannot be written, for example for lack of space. Nothing of it is left; the others are untouched.
    """
    parent = run_dir / CHECKPOINTS
    parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(parent)
    try:
        with complete_or_absent(parent / name) as aside:
            files = _in_threads(partial(_written, aside, writers), writers)
            write_json(_sealed(about | {"files": dict(chain.from_iterable(files))}), aside / MANIFEST)
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from error
    point_to(parent / name)
    return parent / name


def point_to(folder: Path) -> None:
    """Makes `folder` the latest checkpoint of its run."""
    replace_text(folder.parent / LATEST, folder.name + "\n")


def keep(run_dir: Path, *, last: int, every: int) -> None:
    """Deletes all checkpoints up to the latest but the `last` newest and those of every `every`-th step (0: none).

    Checkpoints after the latest stay: the run resumed from before them and replaces them as it gets there.
    """
    found = _up_to_latest(run_dir / CHECKPOINTS)
    for folder in found[last:]:
        step, update = _order(folder)
        if not (every and step % every == 0 and update < 0):
            remove(folder)


def find(where: Path) -> Checkpoint:
    """The checkpoint in folder `where` or, if `where` is a run directory, its newest undamaged checkpoint.

    Raises:
        ValueError: there is none, or the given one is damaged.
    """
    if _NAME.fullmatch(where.name) and where.parent.name == CHECKPOINTS:
        return Checkpoint(where, _verified(where))
    skipped: list[str] = []
    for folder in _up_to_latest(where / CHECKPOINTS):
        try:
            return Checkpoint(folder, _verified(folder), tuple(skipped))
        except Damaged as error:
            skipped.append(f"{error} Skipped for the one before it.")
    got = "none that is undamaged: " + " ".join(skipped).removesuffix(".") if skipped else "none"
    do = "Leave resume out to start over. A run writes checkpoints with save_every, and when a signal stops it."
    raise ValueError(sentence("resume", str(where), "a run directory with a checkpoint, or a checkpoint", got, do))


def model_of(name: str) -> str:
    """The model's folder inside a run or a checkpoint; any other name is returned as it is."""
    folder = Path(name).expanduser()
    inside = folder / "model"
    ours = (folder / MANIFEST).is_file() or (folder / "config.yaml").is_file()
    return str(inside) if ours and inside.is_dir() else (str(folder) if name.startswith("~") else name)


def has_checkpoint(run_dir: Path) -> bool:
    """Whether the run has written a checkpoint."""
    return bool(_up_to_latest(run_dir / CHECKPOINTS))


def about(**more: Any) -> dict[str, Any]:
    """The manifest's first fields: format and versions."""
    versions = {
        "fastrl": fastrl.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
    return {"format": FORMAT, "versions": versions, **more}


def _order(folder: Path) -> tuple[int, int]:
    """(steps done, optimizer steps of the next step or -1)."""
    step, update = _NAME.fullmatch(folder.name).groups()
    return int(step), -1 if update is None else int(update)


def _up_to_latest(parent: Path) -> list[Path]:
    """Checkpoint folders, newest first, starting at the one that `latest` names; all of them if it names none."""
    found = [path for path in parent.glob("step_*") if _NAME.fullmatch(path.name) and path.is_dir()]
    found.sort(key=_order, reverse=True)
    pointer = parent / LATEST
    name = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else ""
    return found[found.index(parent / name) :] if parent / name in found else found


def _in_threads(function: Callable[[str], T], names: Iterable[str]) -> list[T]:
    """The results in order. Writing, syncing and hashing release the GIL; after an error nothing more is begun."""
    pool = ThreadPoolExecutor(2)
    try:
        return list(pool.map(function, names))
    finally:
        pool.shutdown(cancel_futures=True)


def _written(folder: Path, writers: Writers, name: str) -> list[tuple[str, dict[str, Any]]]:
    """Writes one entry of a checkpoint; (path in `folder`, size and hash) of its files, all of them on disk."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    writers[name](path)
    files = [file for file in (path, *path.rglob("*")) if file.is_file()]
    for file in files:
        sync(file)
    return [
        (file.relative_to(folder).as_posix(), {"bytes": file.stat().st_size, "sha256": _sha256(file)}) for file in files
    ]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with a hash of itself."""
    text = json.dumps(manifest, sort_keys=True)
    return manifest | {"sha256": hashlib.sha256(text.encode()).hexdigest()}


def _verified(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, after checking every file against it.

    Raises:
        Damaged: something is missing, truncated or changed, or lies outside the folder.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise Damaged(f"Checkpoint {folder} has no {MANIFEST}.")
    try:
        manifest = json.loads(path.read_bytes())
        intact = manifest == _sealed({key: value for key, value in manifest.items() if key != "sha256"})
    except (ValueError, AttributeError):  # not JSON, or not a mapping
        intact = False
    if not intact:
        raise Damaged(f"Checkpoint {folder} is damaged: {MANIFEST} is not what was written.")
    if manifest.get("format") != FORMAT:
        got = manifest.get("format", "none")
        raise Damaged(f"Checkpoint {folder} has format {got}; this fastrl reads format {FORMAT}. Start over.")
    if not manifest.get("files"):
        raise Damaged(f"Checkpoint {folder} is damaged: {MANIFEST} lists no files.")
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise Damaged(f"Checkpoint {folder} is damaged: {name} is outside it.")
        size = path.stat().st_size if path.is_file() else None
        if size != expected["bytes"]:
            got = "is missing" if size is None else f"has {size} bytes instead of {expected['bytes']}"
            raise Damaged(f"Checkpoint {folder} is damaged: {name} {got}.")
    files = manifest["files"]
    for name, digest in zip(files, _in_threads(lambda name: _sha256(folder / name), files), strict=True):
        if digest != files[name]["sha256"]:
            raise Damaged(f"Checkpoint {folder} is damaged: {name} is not what was written.")
    return manifest
