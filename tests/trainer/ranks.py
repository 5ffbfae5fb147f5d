"""Starts the processes of a run as torchrun does, without its own start-up time."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import yaml

TESTS = Path(__file__).resolve().parents[1]
TRAIN_ALL = """
import json, sys
from pathlib import Path
from fastrl.cli import main
from fastrl.distributed import leave
codes = [main(["train", recipe]) for recipe in sys.argv[1:]]
leave()
threads = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
print(json.dumps([*codes, *(name for name in threads if "gloo" in name)]))
"""


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def environment(rank, size, port):
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return (
        os.environ | {name: str(value) for name, value in ranks.items()} | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    )


def start(size, command, **changes):
    """The processes, each with its output in a pipe; `changes` are by rank further variables of its environment."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=environment(rank, size, port) | changes.get(f"rank{rank}", {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]


def finish(processes, timeout=240):
    """(exit status, output) of each."""
    try:
        return [
            (process.returncode, said) for process in processes for said in [process.communicate(timeout=timeout)[0]]
        ]
    finally:
        for process in processes:
            process.kill()


def write(config, path):
    path.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(config), default=str)), sort_keys=False))
    return str(path)


def train_together(configs, size, folder):
    """Trains the recipes one after the other in `size` processes."""
    recipes = [write(config, folder / f"recipe_{place}.yaml") for place, config in enumerate(configs)]
    ended = finish(start(size, ["-c", TRAIN_ALL, *recipes]))
    for code, said in ended:
        assert code == 0, said
        failed = [place for place, one in enumerate(json.loads(said.splitlines()[-1])) if one]  # or a thread of gloo
        assert not failed, f"recipes {failed}: {said}"
    return [said for _, said in ended]


def fails_on_rank_1(completions, **_):
    """A reward."""
    if os.environ.get("RANK") == "1":
        raise RuntimeError("no judge here")
    return [float(len(text)) for text in completions]
