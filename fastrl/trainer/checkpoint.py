"""Checkpoints on disk: safetensors and JSON, complete or absent, and checked against their hashes before use.

    runs/grpo/checkpoints/
      latest                      the name of the newest one
      step_000020/                step_000020_update_2 when stopped inside a rollout batch
        manifest.json             step, versions, model, recipe; size and SHA-256 of every other file
        model/                    what transformers loads; an adapter's own folder belongs beside it
        optimizer.safetensors     see `MasterOptimizer.tensors`; a critic's, with its weights, in critic.safetensors
        state.json                everything else that the next step depends on, the groups of a batch among it

What is in them is the business of `resume.py`; this file knows how they are written, found and kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import fastrl
from fastrl.check import sentence
from fastrl.files import clear_leftovers, complete_or_absent, remove, replace_text
from fastrl.model.load import quiet_progress

FORMAT = 3  # of the folder; a checkpoint of another format is not read
CHECKPOINTS, LATEST, MANIFEST = "checkpoints", "latest", "manifest.json"
_NAME = re.compile(r"step_(\d{6,})(?:_update_(\d+))?")
Contents = Callable[[Path], None]  # writes files into the folder it is given


class Damaged(ValueError):
    """A checkpoint that is not what was written, and why."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every file is what was written."""

    folder: Path
    manifest: dict[str, Any]
    skipped: tuple[str, ...] = ()  # why newer ones were passed over, one sentence each

    @property
    def run_dir(self) -> Path:
        """The run that it belongs to."""
        return self.folder.parent.parent

    def json(self, name: str) -> Any:
        """The contents of a JSON file."""
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The contents of a safetensors file, on the CPU."""
        return load_file(self.folder / name)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """Writes model and tokenizer to `folder`, which appears complete or not at all; returns it.

    `AutoModelForCausalLM.from_pretrained(folder)` loads it. An older folder of that name is replaced.
    """
    with complete_or_absent(folder) as aside:
        write_model(model, tokenizer, aside)
    return folder


def copy_model(checkpoint: Path, folder: Path) -> Path:
    """The model of a checkpoint, as `save_model` would write it: the same files under a second name where the file
    system can, so that nothing is written twice."""
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
    """Writes a JSON file; floats come back bit for bit, and what JSON has no form for as text."""
    path.write_text(json.dumps(values, default=str) + "\n", encoding="utf-8")


def name_of(step: int, update: int | None = None) -> str:
    """The folder of the checkpoint after `step` steps, and after `update` optimizer steps of the next one."""
    return f"step_{step:06d}" + ("" if update is None else f"_update_{update}")


def write_checkpoint(run_dir: Path, name: str, contents: Contents, about: dict[str, Any]) -> Path:
    """Writes a checkpoint and makes it the latest; until the last moment the one before it is.

    Raises:
        OSError: it cannot be written, for lack of space perhaps; nothing of it is left, the others are as they were.
    """
    parent = run_dir / CHECKPOINTS
    parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(parent)
    try:
        with complete_or_absent(parent / name) as aside:
            contents(aside)
            write_json(_sealed(about | {"files": _files(aside)}), aside / MANIFEST)
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from error
    point_to(parent / name)
    return parent / name


def point_to(folder: Path) -> None:
    """Makes `folder` the latest of its run."""
    replace_text(folder.parent / LATEST, folder.name + "\n")


def keep(run_dir: Path, *, last: int, every: int) -> None:
    """Deletes the checkpoints before the latest but for the `last` newest and those of each `every`-th step (0: none).

    Those after it are of a future that a resumed run has left, and are replaced as it gets there.
    """
    found = _up_to_latest(run_dir / CHECKPOINTS)
    for folder in found[last:]:
        step, update = _order(folder)
        if not (every and step % every == 0 and update < 0):
            remove(folder)


def find(where: Path) -> Checkpoint:
    """The newest undamaged checkpoint of a run directory, or the very one whose folder is given.

    Raises:
        ValueError: there is none, or the one given is damaged.
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
    do = "Leave resume out to start anew. A run writes checkpoints with save_every, and when a signal stops it."
    raise ValueError(sentence("resume", str(where), "a run directory with a checkpoint, or a checkpoint", got, do))


def model_of(name: str) -> str:
    """The folder of the model in a run's folder or in a checkpoint's; any other name as it is."""
    folder = Path(name).expanduser()
    inside = folder / "model"
    ours = (folder / MANIFEST).is_file() or (folder / "config.yaml").is_file()
    return str(inside) if ours and inside.is_dir() else (str(folder) if name.startswith("~") else name)


def has_checkpoint(run_dir: Path) -> bool:
    """Whether the run has written any."""
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
    """(step, optimizer steps of the next one or -1)."""
    step, update = _NAME.fullmatch(folder.name).groups()
    return int(step), -1 if update is None else int(update)


def _up_to_latest(parent: Path) -> list[Path]:
    """Checkpoint folders, newest first, from the one that `latest` names; all of them where it names none of them."""
    found = [path for path in parent.glob("step_*") if _NAME.fullmatch(path.name) and path.is_dir()]
    found.sort(key=_order, reverse=True)
    pointer = parent / LATEST
    name = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else ""
    return found[found.index(parent / name) :] if parent / name in found else found


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of every file below `folder`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(2) as pool:  # hashing leaves the interpreter's lock
        hashes = pool.map(_sha256, paths)
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, hashes, strict=True)
    }


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
    """The manifest of a checkpoint, every file of which has been read and is what was written.

    Raises:
        Damaged: something is missing, cut off or changed, or would be read from outside the folder.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise Damaged(f"Checkpoint {folder} has no {MANIFEST}.")
    try:
        manifest = json.loads(path.read_bytes())
        intact = manifest == _sealed({key: value for key, value in manifest.items() if key != "sha256"})
    except (ValueError, AttributeError):  # not JSON, or no mapping
        intact = False
    if not intact:
        raise Damaged(f"Checkpoint {folder} is damaged: {MANIFEST} is not what was written.")
    if manifest.get("format") != FORMAT:
        got = manifest.get("format", "none")
        raise Damaged(f"Checkpoint {folder} is of format {got}; this fastrl reads {FORMAT}. Start anew.")
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
        if _sha256(path) != expected["sha256"]:
            raise Damaged(f"Checkpoint {folder} is damaged: {name} is not what was written.")
    return manifest
