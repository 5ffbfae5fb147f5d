"""Model checkpoints that transformers loads back: safetensors, written aside and renamed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrl.model.load import quiet_progress


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """Writes model and tokenizer to `folder`, which appears complete or not at all; returns it.

    `AutoModelForCausalLM.from_pretrained(folder)` loads it. An older checkpoint of the same name is replaced.
    """
    aside = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    with quiet_progress():
        model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    for path in aside.rglob("*"):
        if path.is_file():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
    if folder.exists():
        shutil.rmtree(folder)
    aside.rename(folder)
    return folder
