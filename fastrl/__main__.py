"""The command line as a process of its own: `fastrl`, and `python -m fastrl`, as torchrun starts it."""

import sys

from fastrl.cli import EXIT_OK, main


def run() -> int:
    """The exit status of `main`, after which the process is no longer one of several."""
    code = main()
    distributed = sys.modules.get("fastrl.distributed")  # a command that did not load it joined nothing
    if distributed is not None:
        distributed.leave(well=code == EXIT_OK)
    return code


if __name__ == "__main__":
    sys.exit(run())
