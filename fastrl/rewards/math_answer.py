"""Checks mathematical answers with math-verify, in a process that can be stopped."""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastrl import check
from fastrl.rewards.extract import completion_text

WORKER = Path(__file__).with_name("math_worker.py")
STARTING_S = 120.0  # importing math-verify on a busy machine


@dataclass(frozen=True)
class MathAnswerReward:
    """1 if the mathematical expression in the completion equals the gold answer, else 0, as extracted and compared by
    math-verify (https://github.com/huggingface/Math-Verify).

    The gold answer is in the column `answer` or `solution`, as text or LaTeX; if it is None or has no expression, the
    reward does not apply. A comparison that takes longer than `timeout_s` counts as wrong.
    """

    timeout_s: float = 10.0

    __name__ = "math_answer"

    def __post_init__(self) -> None:
        check.require(self.timeout_s > 0, "math_answer", "timeout_s", "a positive number of seconds", self.timeout_s)
        if find_spec("math_verify") is None:
            raise ModuleNotFoundError("math_answer: math-verify is not installed. Run `pip install math-verify`.")

    def __call__(
        self,
        completions: Sequence[Any],
        *,
        answer: Sequence[Any] | None = None,
        solution: Sequence[Any] | None = None,
        **_: Any,
    ) -> list[float | None]:
        """One score per completion."""
        golds = answer if answer is not None else solution
        if golds is None:
            raise ValueError("math_answer: expected the gold answers in a column answer or solution, got neither.")
        return [
            None if gold is None else _verifier().compare(str(gold), completion_text(completion), self.timeout_s)
            for gold, completion in zip(golds, completions, strict=True)
        ]


class Verifier:
    """A process that runs math-verify, restarted after a comparison that had to be stopped.

    math-verify's own timeouts use signals, which work only on the main thread and do not interrupt a big integer power;
    stopping its process always works.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        atexit.register(self.stop)

    def compare(self, gold: str, text: str, timeout_s: float) -> float | None:
        """1 if the two are equal, 0 if not or not in time, None if `gold` has no expression."""
        with self._lock:
            if self._process is None:
                self._start()
            reply = self._ask({"gold": gold, "text": text}, timeout_s)
            return 0.0 if reply is None else reply["score"]

    def stop(self) -> None:
        """Stops the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> None:
        # Not `python math_worker.py`, which would put this folder, with its format.py, first on sys.path.
        run = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
        self._process = subprocess.Popen(
            [sys.executable, "-c", run, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # otherwise Ctrl-C would end it during a call and give a wrong score
        )
        if self._ask({"gold": "1", "text": "1"}, STARTING_S) is None:
            raise RuntimeError("math_answer: math-verify could not be started; its error is above.")

    def _ask(self, request: dict[str, str], timeout_s: float) -> dict[str, Any] | None:
        """The process's reply, or None if it was stopped or had ended."""
        process = self._process
        late = threading.Event()
        timer = threading.Timer(timeout_s, lambda: (late.set(), process.kill()))
        timer.start()
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        finally:
            timer.cancel()
            timer.join()
        if late.is_set() or not line:
            self.stop()
        return json.loads(line) if line else None


@lru_cache(maxsize=1)
def _verifier() -> Verifier:
    return Verifier()
