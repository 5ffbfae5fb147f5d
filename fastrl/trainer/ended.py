"""How a run ended, for people and for scripts that wait for it."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import NamedTuple

from fastrl.files import replace_text

STATUS = "status.json"


class Ended(NamedTuple):
    """How a run ended: finished, interrupted, diverged, rewards failed or failed; and the signal, if interrupted."""

    status: str
    signal: int | None = None


def write_status(run_dir: Path, ended: Ended, steps: int, total_steps: int, go_on: str) -> None:
    """Writes status.json: `status`, `steps`, `total_steps`, `signal` if any, and `resume`, the command to continue."""
    values = {"status": ended.status, "steps": steps, "total_steps": total_steps}
    if ended.signal is not None:
        values["signal"] = int(ended.signal)
    text = json.dumps(values | ({"resume": go_on} if go_on else {}), indent=2)
    replace_text(run_dir / STATUS, text + "\n")


def spot(error: BaseException) -> str:
    """An exception's type, message and location."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    text = str(error)
    return f"{type(error).__name__}{': ' if text else ''}{text}{where}"


def advice(error: BaseException) -> str:
    """What may help; empty if nothing is known."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return "Out of memory: lower max_tokens_per_microbatch, or set gradient_checkpointing."
    return ""
