"""The command line as a process of its own: `fastrl`, and `python -m fastrl`, as torchrun starts it."""

import atexit
import os
import sys
import threading
from typing import NoReturn

from fastrl.cli import EXIT_OK, main


def run() -> NoReturn:
    """Runs `main`, after which the process is no longer one of several, and ends it with the exit status."""
    code = main()
    distributed = sys.modules.get("fastrl.distributed")  # a command that did not load it joined nothing
    if distributed is not None:
        distributed.leave(well=code == EXIT_OK)
    # All that Python does at its end, except taking torch and transformers apart, which takes a second.
    threading._shutdown()  # ty: ignore[missing-attribute]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
