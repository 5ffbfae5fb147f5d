"""Runs a Python program that nobody has read, as a model writes them, so that it can do no harm.

The program sees the system's programs read-only, an empty folder in memory, and itself: no network, no other process,
no home, no environment, no file of the run. `fastrl.rewards.jail` says how. It is no virtual machine: a hole in the
Linux kernel is a hole in it.
"""

from __future__ import annotations

import atexit
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from fastrl import check

JAIL = Path(__file__).with_name("jail.py")
BOX = "/box"  # the program's folder
STARTING_S = 60.0  # setting up the namespaces, and a program's end, on a busy machine
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
ENVIRONMENT |= {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}


class SandboxError(RuntimeError):
    """The program could not be run, through no fault of its own."""


@dataclass(frozen=True)
class Limits:
    """What a program may use. A program that wants more fails or is ended; the machine does not notice."""

    seconds: float = 10.0
    """From the program's start to its end."""
    memory_mb: int = 256
    """Address space of each process, in MiB; so all together have at most `processes` times as much."""
    processes: int = 4
    """Processes and threads at a time."""
    files_mb: int = 16
    """Size of all files together, in MiB; they are kept in memory."""
    open_files: int = 64
    """Open files of each process."""
    output_kb: int = 256
    """Standard output and standard error together, in KiB."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check.require(0 < value < 1e6, "sandbox", name, "a positive number below a million", value)


@dataclass(frozen=True)
class Outcome:
    """How a program ended, and what it printed."""

    ended: Literal["exit", "signal", "time", "output"]  # time, output: it used more than allowed
    code: int | None = None  # exit status or number of the signal
    stdout: str = ""
    stderr: str = ""


@dataclass
class _Seen:
    """What has been read from a program so far."""

    parts: dict[str, bytearray] = field(default_factory=lambda: {"stdout": bytearray(), "stderr": bytearray()})
    report: bytearray = field(default_factory=bytearray)


def run_sandboxed(
    program: str,
    *,
    stdin: str = "",
    files: Mapping[str, str] | None = None,
    limits: Limits | None = None,
    visible: tuple[str, ...] = (),
    unsandboxed: bool = False,
) -> Outcome:
    """Runs a Python program of the standard library in a sandbox and returns how it ended.

    Args:
        program: source text, run as `main.py` in a folder of its own.
        stdin: its standard input.
        files: other files of that folder: name -> text.
        limits: what it may use; by default as `Limits`.
        visible: folders that it may read, besides the system's and this Python's.
        unsandboxed: run it as this user, who can do all that it wants to do, with limits of time, output and memory
            only.

    Raises:
        SandboxError: the machine grants no isolation, or the program could not be started.
    """
    limits = limits or Limits()
    if not unsandboxed:
        require_isolation()
    if unsandboxed:
        with tempfile.TemporaryDirectory(prefix="fastrl-", ignore_cleanup_errors=True) as folder:
            return _run(_request(program, stdin, files or {}, limits, visible, folder), limits)
    return _run(_request(program, stdin, files or {}, limits, visible, ""), limits)


def require_isolation() -> None:
    """Refuses a machine on which programs cannot be isolated.

    Raises:
        SandboxError: with what is missing, and what to do.
    """
    lacking = _lacking()
    check.require(
        lacking is None,
        "sandbox",
        "isolation",
        "namespaces of its own for users, processes, files and network",
        f"a machine that refuses: {lacking}",
        "Allow unprivileged user namespaces (sysctl kernel.apparmor_restrict_unprivileged_userns=0; in a container, "
        "--security-opt seccomp=unconfined), or set unsandboxed where completions can do no harm.",
        SandboxError,
    )


@cache
def _lacking() -> str | None:
    """What keeps this machine from isolating programs; None if a program that starts another one ran in a sandbox."""
    if not sys.platform.startswith("linux"):
        return f"{sys.platform} has no namespaces"
    probe = "import os, sys\npid = os.fork()\nif pid == 0: os._exit(7)\nprint(os.waitpid(pid, 0)[1], os.getpid())"
    try:
        outcome = _run(_request(probe, "", {}, Limits(), (), ""), Limits())
    except SandboxError as error:
        return str(error)
    return None if outcome.stdout == f"{7 << 8} 2\n" else f"a test program that failed: {outcome}"


def _request(
    program: str, stdin: str, files: Mapping[str, str], limits: Limits, visible: tuple[str, ...], folder: str
) -> dict[str, Any]:
    python = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    mib, seconds = 1 << 20, int(limits.seconds) + 1
    counted = {
        "RLIMIT_AS": limits.memory_mb * mib,
        "RLIMIT_CPU": seconds,
        "RLIMIT_FSIZE": limits.files_mb * mib,
        "RLIMIT_NOFILE": limits.open_files,
        "RLIMIT_CORE": 0,
    }
    if not folder:  # in a new user namespace only its own processes count: these, and the two that started them
        counted["RLIMIT_NPROC"] = limits.processes + 2
    return {
        "isolated": not folder,
        "root": None if folder else _empty_folder(),
        "folder": folder or BOX,
        "visible": [*dict.fromkeys((sys.base_prefix, sys.base_exec_prefix, *visible))],
        "files": {**files, "main.py": program, "stdin": stdin},
        "files_mb": limits.files_mb,
        "limits": counted,
        "seconds": limits.seconds,
        "argv": [python, "-I", "-S", "-B", "main.py"],
        "environment": ENVIRONMENT | {"HOME": folder or BOX, "TMPDIR": folder or BOX},
    }


@cache
def _empty_folder() -> str:
    """Where each sandbox mounts its own root, seen by itself alone."""
    folder = tempfile.mkdtemp(prefix="fastrl-root-")
    atexit.register(lambda: Path(folder).exists() and Path(folder).rmdir())
    return folder


def _run(request: dict[str, Any], limits: Limits) -> Outcome:
    reading, writing = os.pipe()
    try:
        jail = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(JAIL), str(writing)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={},
            pass_fds=(writing,),
            start_new_session=True,
        )
    except OSError as error:
        os.close(reading)
        raise SandboxError(f"{JAIL.name} cannot be started: {error}") from error
    finally:
        os.close(writing)
    with jail, os.fdopen(reading, "rb") as report:
        try:
            ended = _watch(jail, report, request, limits, seen := _Seen())
        finally:
            # The processes that set up the sandbox are of this group; those inside end with them.
            os.killpg(jail.pid, signal.SIGKILL)
    reply = json.loads(seen.report.partition(b"\n")[0] or "{}")
    out, err = (bytes(part).decode("utf-8", "replace") for part in seen.parts.values())
    if ended is None and "ended" not in reply:
        raise SandboxError(reply.get("refused") or f"no report, and at the end of standard error {err[-300:]!r}")
    return Outcome(ended or reply["ended"], reply.get("code"), out, err)


def _watch(
    jail: subprocess.Popen[bytes], report: Any, request: dict[str, Any], limits: Limits, seen: _Seen
) -> Literal["output"] | None:
    """Reads all that the program prints; returns why it must be ended, if it must."""
    try:
        jail.stdin.write(json.dumps(request).encode())  # ty: ignore[missing-union-attribute]  a pipe
        jail.stdin.close()  # ty: ignore[missing-union-attribute]
    except BrokenPipeError:
        pass  # it has ended, and says why
    until = time.monotonic() + limits.seconds + STARTING_S
    room = limits.output_kb << 10
    with selectors.DefaultSelector() as selector:
        for name, file in (("stdout", jail.stdout), ("stderr", jail.stderr), ("report", report)):
            selector.register(file, selectors.EVENT_READ, name)
        while selector.get_map():
            left = until - time.monotonic()
            if left <= 0:
                raise SandboxError(f"no end within {limits.seconds:g} s and {STARTING_S:g} s for its start")
            for key, _ in selector.select(left):
                data = os.read(key.fd, 65536)
                if not data:
                    selector.unregister(key.fileobj)
                elif key.data == "report":
                    seen.report += data
                else:
                    room -= len(data)
                    if room < 0:
                        return "output"
                    seen.parts[key.data] += data
    return None
