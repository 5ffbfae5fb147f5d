"""The command line: `fastrl train`, `eval`, `judge`, `recipes`, `scaling`, `plan`, `analyze`, `bench`, `doctor`."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrl import env

if TYPE_CHECKING:
    from fastrl.trainer.config import TrainConfig

USAGE = """fastrl: reinforcement learning of language models.

  fastrl train RECIPE [--field value ...]        train a recipe, by its name or file; --help lists its fields
  fastrl train RECIPE --print                    print the full recipe, which trains the same
  fastrl train STAGES.yaml [--stages.NAME.field value ...] [--stage NAME]
                                                 train a recipe of stages; --stage: NAME and those after it, again
  fastrl eval MODEL RECIPE [--field ...]         evaluate a run, checkpoint or model on a recipe's held-out set; --json
                                                 prints only the numbers
  fastrl judge PAIRS --out FILE --model MODEL    label pairs with a judge's preferences in both orders; see --help
  fastrl recipes [FOLDER] [--markdown]           list the recipes, of fastrl or in a folder, and every algorithm
  fastrl scaling fit RUN ... [--plot FILE]       fit the law of accuracy over compute to runs, extrapolate; --help
  fastrl plan MODEL [--gpus 8] [--memory 80]     what a run needs on each GPU, part by part, from formulas; see --help
  fastrl analyze rewards ROWS [--plot FILE]      what reward models learned of preferences, what they resisted; --help
  fastrl bench [OP] [--against PEERS ...]        time every op, or one, against torch and other projects; see --help
  fastrl bench --tune                            time the Triton kernels' tile sizes on this GPU and keep the fastest
  fastrl doctor [--json]                         show devices, backends and why one is missing, versions, threads
"""
EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_ENVIRONMENT, EXIT_DIVERGED = range(5)
EXIT_SIGNALLED = 128  # plus the signal's number, as in shells: 130 after Ctrl-C, 143 after SIGTERM


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns the exit status: 0 ok, 1 failed, 2 usage, 3 environment, 4 diverged, or 128 plus the
    number of the signal that stopped it."""
    env.wait_briefly()
    args = sys.argv[1:] if argv is None else argv
    commands = {
        "train": _train,
        "eval": _eval,
        "judge": _judge,
        "recipes": _recipes,
        "scaling": _scaling,
        "plan": _plan,
        "analyze": _analyze,
        "bench": _bench,
        "doctor": _doctor,
    }
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return EXIT_OK if args else EXIT_USAGE
    if args[0] not in commands:
        from fastrl.check import choice

        return _refuse(lambda: choice("fastrl", "command", args[0], commands))
    try:
        return commands[args[0]](args[1:])
    except ModuleNotFoundError as error:
        # Our own messages say what to install; Python's only name the module.
        do = f"fastrl: {error}. Install the training packages, in the source tree: pip install '.[train]'"
        print(error if error.name is None else do, file=sys.stderr)
        return EXIT_ENVIRONMENT
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("fastrl: interrupted; what was done since the last checkpoint is not saved.", file=sys.stderr)
        return EXIT_SIGNALLED + 2


def _train(args: list[str]) -> int:
    from fastrl.trainer.setup import train
    from fastrl.trainer.stages import is_staged, load_stages, train_stages
    from fastrl.trainer.stages import shown as shown_stages

    if args and is_staged(args[0]):
        if {"-h", "--help"} & set(args):
            print(USAGE, end="")
            return EXIT_OK
        stages = load_stages(args[0], [word for word in args[1:] if word != "--print"])
        if "--print" in args:
            print(shown_stages(stages), end="")
            return EXIT_OK
        return _exit_status(lambda: train_stages(stages))
    config = _configure("fastrl train", [word for word in args if word != "--print"])
    if "--print" in args:
        from fastrl.trainer.recipe import shown

        print(shown(config), end="")
        return EXIT_OK
    return _exit_status(lambda: train(config))


def _exit_status(train: Callable[[], Any]) -> int:
    """The exit status that tells how training ended."""
    from fastrl.distributed import PeerFailed
    from fastrl.rewards import RewardFailure

    try:
        outcome = train()
    except (RewardFailure, PeerFailed) as error:  # before the first step, so nothing is lost
        print(error, file=sys.stderr)
        return EXIT_FAILED
    if outcome.status == "interrupted":
        return EXIT_SIGNALLED + (outcome.signal or 2)
    if outcome.status == "diverged":
        return EXIT_DIVERGED
    return EXIT_OK if outcome.status == "finished" and not outcome.problems else EXIT_FAILED


def _eval(args: list[str]) -> int:
    if not args or args[0].startswith("-"):
        raise ValueError("fastrl eval: MODEL: expected a folder, hub id or model name first. See fastrl --help.")
    from fastrl.monitor.log import encode
    from fastrl.rewards import RewardFailure
    from fastrl.trainer.setup import evaluate_model

    as_json = "--json" in args
    config = _configure("fastrl eval MODEL", [word for word in args[1:] if word != "--json"])
    try:
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            results = evaluate_model(config, args[0])
    except (RewardFailure, FloatingPointError) as error:
        print(error, file=sys.stderr)
        return EXIT_FAILED
    if as_json:
        print(encode(results))
    return EXIT_OK


def _bench(args: list[str]) -> int:
    """The benchmarks live beside the package, not in it: they measure a source tree and record its commit."""
    tree = Path(__file__).resolve().parents[1]
    if not (tree / "bench" / "run.py").is_file():
        print(
            f"fastrl bench: expected a source tree with the folder bench, got only the package, in {tree}. Clone the "
            "repository and install it from there: pip install --editable '.[train,models,bench]'.",
            file=sys.stderr,
        )
        return EXIT_ENVIRONMENT
    if str(tree) not in sys.path:
        sys.path.insert(0, str(tree))
    import_module("bench.run").main(args)
    return EXIT_OK


def _doctor(args: list[str]) -> int:
    from rich.console import Console

    from fastrl.doctor import print_doctor

    parser = ArgumentParser("fastrl doctor", description="Show what this machine has.")  # works without tyro
    parser.add_argument("--json", action="store_true", help="print JSON")
    return print_doctor(Console(), as_json=parser.parse_args(args).json)


def _judge(args: list[str]) -> int:
    from fastrl.rewards.label import main

    return main(args)


def _scaling(args: list[str]) -> int:
    from fastrl.scaling import main

    return main(args)


def _plan(args: list[str]) -> int:
    from fastrl.plan import main

    return main(args)


def _analyze(args: list[str]) -> int:
    from fastrl.analyze.command import main

    return main(args)


def _recipes(args: list[str]) -> int:
    from rich.console import Console

    from fastrl.menu import page, print_menu
    from fastrl.shipped import recipes_folder

    parser = ArgumentParser("fastrl recipes", description="List the recipes in a folder and every algorithm.")
    parser.add_argument("folder", nargs="?", default=recipes_folder(), type=Path)
    parser.add_argument("--markdown", action="store_true", help="print the table of algorithms as docs/algorithms.md")
    found = parser.parse_args(args)
    print(page(), end="") if found.markdown else print_menu(Console(), found.folder)
    return EXIT_OK


def _configure(prog: str, args: list[str]) -> TrainConfig:
    """The configuration from a recipe and the flags that follow it."""
    from fastrl.trainer.build import build_algorithm
    from fastrl.trainer.config import TrainConfig
    from fastrl.trainer.recipe import load_recipe, with_flags

    recipe, flags = (args[0], args[1:]) if args and not args[0].startswith("-") else (None, args)
    if recipe is None and not {"-h", "--help"} & set(flags):
        raise ValueError(f"{prog}: RECIPE: expected a recipe's name or YAML file first, as in {prog} grpo.")
    base = load_recipe(recipe) if recipe else TrainConfig()
    if {"-h", "--help"} & set(flags):
        import tyro

        tyro.cli(TrainConfig, default=base, args=["--help"], prog=f"{prog} {recipe or 'RECIPE.yaml'}")
    config = with_flags(base, flags)
    build_algorithm(config)  # refuses what the algorithm does not have
    return config


def _refuse(check: Callable[[], object]) -> int:
    try:
        check()
    except ValueError as error:
        print(f"{error}\n\n{USAGE}", file=sys.stderr, end="")
    return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
