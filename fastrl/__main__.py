"""The command line as a process of its own: `fastrl`, and `python -m fastrl`, as torchrun starts it."""

import sys

from fastrl.cli import EXIT_OK, main


def run() -> int:
    """The exit status of `main`."""
    code = main()
    distributed = sys.modules.get("fastrl.distributed")
    if code == EXIT_OK and distributed is not None:
        distributed.leave()
    return code


if __name__ == "__main__":
    sys.exit(run())
