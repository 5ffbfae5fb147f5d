"""Recipes of several stages, each a recipe of its own that may name the results of those before it.

    run_dir: runs/rlhf                  default: runs/ and the file's name
    optimizer: {betas: [0.9, 0.99]}     keys beside `stages` are defaults of every stage
    stages:
      sft: {algorithm: sft, ...}
      ppo: {algorithm: ppo, model: "${sft}", ...}

`${sft}` is the model that stage sft saves and `${sft/FILE}` another file of its run, such as completions.jsonl. Stages
run in order, each in its own folder below run_dir: 1-sft, 2-ppo. All are checked before the first one begins.

    runs/rlhf/stages.yaml       every stage in full; trains the same
    runs/rlhf/stages.json       how the stages ended, and their held-out numbers before and after
    runs/rlhf/1-sft/            a run as any other
"""

from __future__ import annotations

import gc
import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from fastrl.algorithms import ALGORITHMS
from fastrl.check import choice, require, sentence
from fastrl.data.preferences import PairColumns, require_columns
from fastrl.data.sources import read_rows
from fastrl.distributed import World, join
from fastrl.files import replace_text
from fastrl.monitor.trackers import require_installed
from fastrl.monitor.units import number
from fastrl.rewards import resolve_reward
from fastrl.shipped import located, recipe_file
from fastrl.trainer.build import build_algorithm
from fastrl.trainer.checkpoint import has_checkpoint
from fastrl.trainer.config import RESUME_MAY_CHANGE, TrainConfig
from fastrl.trainer.ended import STATUS
from fastrl.trainer.lock import free_directory, hold
from fastrl.trainer.recipe import from_dict, load_yaml, plain, with_flags
from fastrl.typed import ConfigError

OP, ALL, RECORD = "stages", "stages.yaml", "stages.json"
OWN = ("run_dir", "resume")  # of the whole recipe, not of a stage
REFERENCE = re.compile(r"\$\{([^{}/]*)(?:/([^{}]*))?\}")
ENDED_BADLY = {
    "diverged": "Lower its optimizer.lr",
    "rewards failed": "Repair the reward",
    "failed": "See its warnings",
}


@dataclass(frozen=True)
class Stages:
    """The stages in order, as configurations that may still contain references, and where and from where they run."""

    each: Mapping[str, TrainConfig]
    run_dir: str
    resume: str = ""
    source: str = ""  # the recipe's file
    start: str = ""  # the stage to run anew with all that follow; empty resumes the first unfinished one

    def folder(self, run_dir: Path, name: str) -> Path:
        """The folder of a stage's run."""
        return run_dir / f"{list(self.each).index(name) + 1}-{name}"


@dataclass(frozen=True)
class Ended:
    """How the last stage that ran ended."""

    status: str
    run_dir: Path
    signal: int | None = None
    problems: tuple[str, ...] = ()


def is_staged(recipe: str | Path) -> bool:
    """Whether a file is a recipe of stages; False for one that cannot be read."""
    try:
        data = load_yaml(recipe_file(recipe))
    except ConfigError:
        return False
    return isinstance(data, dict) and "stages" in data


def load_stages(recipe: str | Path, flags: Sequence[str] = ()) -> Stages:
    """Reads a recipe of stages. `--stages.NAME.steps 10` changes a stage and `--steps 10` all of them.

    Raises:
        ConfigError: a stage is no recipe, or names a result that no stage before it has.
    """
    path = recipe_file(recipe)
    data = load_yaml(path)
    stages, common = data.pop("stages"), data
    whole = {name: str(common.pop(name)) for name in OWN if common.get(name) is not None}
    one_or_more = isinstance(stages, dict) and len(stages) > 0
    require(one_or_more, str(path), "stages", "a mapping from names to recipes", repr(stages)[:80])
    each = {}
    for name, own in stages.items():
        where = f"{path}: stages.{name}"
        good = isinstance(name, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is not None
        require(good, str(path), "stages", "names of letters, digits and _", repr(name))
        require(isinstance(own, dict), where, "the stage", "a mapping of settings", repr(own)[:80])
        for key in OWN:
            require(key not in own, where, key, "nothing: it belongs beside stages", repr(own.get(key)))
        each[name] = from_dict(TrainConfig, _merged(common, own), where)
    whole, each, start = _flagged(whole, each, flags)
    default = path.parent if path.name == ALL else Path("runs") / path.stem
    found = Stages(each, whole.get("run_dir") or str(default), whole.get("resume", ""), str(path), start)
    check_stages(found)
    return found


def _merged(common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's settings over the common ones, key by key in sections such as optimizer; other values are replaced."""
    sections = {f.name for f in fields(TrainConfig) if is_dataclass(getattr(TrainConfig, f.name, None))} | {"masks"}
    both = {key for key in sections & common.keys() & own.keys() if isinstance(common[key], dict)}
    return {**common, **own} | {key: {**common[key], **own[key]} for key in both if isinstance(own[key], dict)}


def _flagged(
    whole: dict[str, str], each: dict[str, TrainConfig], flags: Sequence[str]
) -> tuple[dict[str, str], dict[str, TrainConfig], str]:
    """(settings of the whole, stages, the stage to start from) with flags applied."""
    of: dict[str, list[str]] = {name: [] for name in each}
    target: list[list[str]] = []
    start = ""
    words = iter(flags)
    for word in words:
        if not word.startswith("--"):
            require(bool(target), OP, word, "a flag first, as in --steps 10", repr(word))
            for taken in target:
                taken.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        key = name.replace("-", "_")
        if key in (*OWN, "stage"):
            value = value if equals else next(words, "")
            require(bool(value), OP, f"--{name}", "a value", "none")
            start, whole = (value, whole) if key == "stage" else (start, whole | {key: value})
            target = []
            continue
        target = list(of.values())
        if key.split(".")[0] == "stages":
            _, _, rest = name.partition(".")
            stage, _, field = rest.partition(".")
            choice(OP, f"--{name}", stage, each)
            target, word = [of[stage]], f"--{field}{equals}{value}"
        for taken in target:
            taken.append(word)
    if start:
        choice(OP, "--stage", start, each)
        first = start == next(iter(each))
        do = "It names the run whose earlier stages are used."
        require(first or bool(whole.get("resume")), OP, "--stage", "--resume with it", "none", do)
    return whole, {name: with_flags(config, of[name]) for name, config in each.items()}, start


def shown(stages: Stages) -> str:
    """Every stage in full as YAML, ready to run."""
    each = {name: _as_dict(config) for name, config in stages.each.items()}
    whole = {"run_dir": stages.run_dir} | ({"resume": stages.resume} if stages.resume else {})
    return yaml.safe_dump({**whole, "stages": each}, sort_keys=False, allow_unicode=True)


def check_stages(stages: Stages) -> None:
    """Refuses, before anything runs, what a later stage would refuse after hours.

    Raises:
        ValueError: a stage cannot work; the message names it.
    """
    names = list(stages.each)
    for place, (name, config) in enumerate(stages.each.items()):
        where = f"{stages.source}: stages.{name}"
        try:
            for key, (stage, file) in _references(_as_dict(config)):
                expected = ", ".join(names[:place]) or "none: it is the first stage"
                do = "A stage can name only those before it."
                require(stage in names[:place], "", key, f"a stage before it ({expected})", f"${{{stage}}}", do)
                _require_kind(key, stage, file, stages.each[stage], config)
            ready = _resolved(stages, Path("runs"), name)
            build_algorithm(ready)
            require_installed(config.log_to)
            for reward in config.rewards if not config.offline else ():
                if not list(_references(reward.options)) and reward.name != "model":
                    resolve_reward(reward.name, **reward.options)
            _require_files(config)
            _require_rows(config)
        except ValueError as error:
            raise ConfigError(f"{where}: {str(error).removeprefix(': ')}") from None


def _require_kind(key: str, stage: str, file: str, other: TrainConfig, config: TrainConfig) -> None:
    """Refuses a model of the wrong kind: a reward model where a policy is needed, or the other way round."""
    scalar = other.algorithm == "reward_model"
    if file or key.startswith("data.") or key.startswith("task."):
        require(bool(file), "", key, f"a file of {stage}, as in ${{{stage}/completions.jsonl}}", f"${{{stage}}}")
        return
    if key.startswith("rewards."):
        require(scalar, "", key, "a stage of algorithm reward_model", f"${{{stage}}}, of {other.algorithm}")
        return
    policy = key == "reference" or (key == "model" and config.algorithm != "reward_model")
    require(not (policy and scalar), "", key, "a stage that trains a policy", f"${{{stage}}}, a reward model")
    whole = other.adapter.rank == 0 or other.adapter.save == "merged"
    do = f"Set stages.{stage}.adapter.save to merged, or train its adapter further with the same adapter.rank."
    fits = whole or (key in ("model", "reference") and config.adapter.rank == other.adapter.rank)
    require(fits, "", key, "a whole model", f"${{{stage}}}, which saves an adapter", do)


def _require_files(config: TrainConfig) -> None:
    for key, source in (("task.source", config.task.source), ("data.source", config.data.source)):
        named = re.search(r"\.(jsonl|json|csv|parquet)$", source) and not REFERENCE.search(source)
        require(not named or Path(located(source)).expanduser().exists(), "", key, "a file that exists", repr(source))


def _require_rows(config: TrainConfig) -> None:
    """Refuses a file of rows that lacks the columns which the stage's algorithm reads."""
    data, kind = config.data, ALGORITHMS[config.algorithm].kind
    reads = config.offline or config.ppo.ptx_coef > 0
    if not reads or REFERENCE.search(data.source) or not Path(located(data.source)).expanduser().is_file():
        return
    kind = "completions" if not config.offline else "pairs" if data.unpair else "ranked" if data.ranked else kind
    rows = read_rows(data.source, size=data.size, seed=config.seed, options=data.options)
    if kind != "rewarded":  # whose rows may be those of another run
        require_columns(rows, kind, PairColumns(data.margin_column, data.soft_label_column))


def train_stages(stages: Stages) -> Ended:
    """Runs the stages that are not finished, in order, and stops after one that did not finish.

    With `resume`, a run directory or latest, finished stages are kept and an interrupted one resumes as any run does. A
    stage that was stopped before its first checkpoint begins again.

    Raises:
        ValueError: there is nothing to resume, or a stage that has begun differs from the recipe.
    """
    world = join()
    with ExitStack() as stack:
        with world.together("opening the folder of the stages"):
            root = _opened(stages, stack) if world.first else None
        return _run(stages, Path(world.from_first(str(root))), world)


def _opened(stages: Stages, stack: ExitStack) -> Path:
    """The folder, locked until `stack` closes, with the recipe in it."""
    root = _resumed(stages) if stages.resume else free_directory(Path(stages.run_dir).expanduser())
    root.mkdir(parents=True, exist_ok=bool(stages.resume))
    stack.enter_context(hold(root))
    if stages.resume:
        _require_unchanged(stages, root)
        _set_aside(stages, root)
    replace_text(root / ALL, shown(replace(stages, run_dir=str(root), resume="")))
    return root


def _run(stages: Stages, root: Path, world: World) -> Ended:
    """The stages; of several processes, the first decides what is left to do, and writes and says it."""
    # Late, because it loads transformers.
    from fastrl.trainer.setup import train

    record = _record(root) if world.first else {}
    for name in stages.each:
        config = _resolved(stages, root, name)
        with world.together(f"opening stage {name}"):
            begin = _begun(stages, root, name, config) if world.first else None
        begin = world.from_first(begin)
        if begin is None:
            continue
        outcome = train(replace(config, resume=begin))
        problems = tuple(world.from_first(outcome.problems))
        if world.first:
            record[name] = {
                "status": outcome.status,
                "steps": outcome.steps,
                "folder": stages.folder(root, name).name,
                "before": outcome.before,
                "after": outcome.after,
            }
            replace_text(root / RECORD, json.dumps(record, indent=2) + "\n")
        gc.collect()  # the stage's models, before the next one's are loaded
        if outcome.status != "finished" or problems:
            if world.first:
                _say_how_to_go_on(stages, root, name, outcome.status, problems)
            return Ended(outcome.status, root, outcome.signal, problems)
    if world.first:
        _print_summary(stages, record, root)
    return Ended("finished", root)


def _begun(stages: Stages, root: Path, name: str, config: TrainConfig) -> str | None:
    """What a stage resumes from, empty if it begins; None if it is finished. Says so, and makes room for it."""
    folder, place = stages.folder(root, name), list(stages.each).index(name) + 1
    title = f"Stage {place} of {len(stages.each)}: {name} ({config.algorithm})"
    if _finished(folder, config):
        print(f"{title}: finished before, in {folder}")
        return None
    if folder.exists() and not has_checkpoint(folder):
        aside = free_directory(folder.with_name(f"{folder.name}-stopped"))
        os.rename(folder, aside)
        print(f"{title}: it was stopped before its first checkpoint and begins again; what it wrote is in {aside}")
    print(title)
    return str(folder) if folder.exists() else ""


def _finished(folder: Path, config: TrainConfig) -> bool:
    """Whether the stage finished all its steps and its model is there."""
    if not ((folder / STATUS).is_file() and (folder / "model").is_dir()):
        return False
    status = json.loads((folder / STATUS).read_text(encoding="utf-8"))
    return status["status"] == "finished" and status["steps"] == config.steps


def _resumed(stages: Stages) -> Path:
    """The folder to resume in.

    Raises:
        ValueError: stages never ran there.
    """
    wanted = Path(stages.run_dir).expanduser()
    if stages.resume == "latest":
        runs = [run for run in (wanted, *wanted.parent.glob(f"{wanted.name}-*")) if (run / ALL).is_file()]
        root = max(runs, key=lambda run: max(path.stat().st_mtime for path in run.iterdir()), default=wanted)
    else:
        root = Path(stages.resume).expanduser()
    do = "Leave resume out to start over."
    require((root / ALL).is_file(), "resume", str(root), f"a folder with {ALL}", "none", do)
    return root


def _require_unchanged(stages: Stages, root: Path) -> None:
    """Refuses to mix the result of a finished stage with a recipe that would have made another one.

    Raises:
        ValueError: a stage that has begun is not the recipe's; the message names the setting.
    """
    was, names = load_yaml(root / ALL)["stages"], list(stages.each)
    redone = names[names.index(stages.start) :] if stages.start else []
    begun = [name for place, name in enumerate(was, 1) if (root / f"{place}-{name}").exists()]
    kept = [name for name in begun if name not in redone]
    require(names[: len(kept)] == kept, "resume", "stages", f"{', '.join(kept)} first, as in {root}", ", ".join(names))
    for place, name in enumerate(kept):
        # Of a stage whose result another one has used, the number of steps is part of the result.
        may = RESUME_MAY_CHANGE - {"model"} - ({"steps"} if place < len(kept) - 1 else set())
        old = dict(_leaves(_as_dict(from_dict(TrainConfig, was[name], ALL))))
        new = dict(_leaves(_as_dict(stages.each[name])))
        for key in {**old, **new}:
            if old.get(key) != new.get(key) and key not in may:
                field = f"stages.{name}.{key}"
                do = f"Put it back, or add --stage {name} to run {name} and all stages after it again."
                expected = f"{old.get(key)!r} as in {root}"
                raise ValueError(sentence("resume", field, expected, repr(new.get(key)), do))


def _set_aside(stages: Stages, root: Path) -> None:
    """Renames the folders of the stages that run again."""
    names = list(stages.each)
    for name in names[names.index(stages.start) :] if stages.start else ():
        folder, record = stages.folder(root, name), _record(root)
        if folder.exists():
            aside = free_directory(folder.with_name(f"{folder.name}-before"))
            os.rename(folder, aside)
            print(f"Stage {name} runs again; what it wrote before is in {aside}")
        record.pop(name, None)
        replace_text(root / RECORD, json.dumps(record, indent=2) + "\n")


def _record(root: Path) -> dict[str, Any]:
    path = root / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _resolved(stages: Stages, root: Path, name: str) -> TrainConfig:
    """A stage's configuration with paths in place of references."""

    def path(found: re.Match[str]) -> str:
        return str(stages.folder(root, found[1]) / (found[2] or "model"))

    def put_in(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: put_in(item) for key, item in value.items()}
        if isinstance(value, list):
            return [put_in(item) for item in value]
        return REFERENCE.sub(path, value) if isinstance(value, str) else value

    folder = str(stages.folder(root, name)).replace("{", "{{").replace("}", "}}")
    return replace(from_dict(TrainConfig, put_in(_as_dict(stages.each[name])), name), run_dir=folder)


def _as_dict(config: TrainConfig) -> dict[str, Any]:
    """A stage's settings as YAML has them, without those that belong to the whole."""
    return {name: value for name, value in plain(asdict(config)).items() if name not in OWN}


def _references(value: Any, where: str = "") -> Iterator[tuple[str, tuple[str, str]]]:
    """(dotted name of the setting, (stage, file in its run or "")) of every reference."""
    for key, leaf in _leaves(value, where, lists=True):
        if isinstance(leaf, str):
            yield from ((key, (found[1], found[2] or "")) for found in REFERENCE.finditer(leaf))


def _leaves(value: Any, where: str = "", *, lists: bool = False) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        items = list(value.items())
    elif lists and isinstance(value, list):
        items = list(enumerate(value))
    else:
        yield where, value
        return
    for key, item in items:
        yield from _leaves(item, f"{where}.{key}" if where else str(key), lists=lists)


def _say_how_to_go_on(stages: Stages, root: Path, name: str, status: str, problems: Sequence[str]) -> None:
    words = ["fastrl", "train", str(root / ALL), "--resume", str(root)]
    if status == "finished":
        print(f"Stage {name} finished, but not all could be written, so no later stage begins: {' '.join(problems)}")
        do = "Make room"
    else:
        print(f"Stage {name}: {status}; no later stage has begun.")
        do = ENDED_BADLY.get(status, "")
    if status == "diverged":  # as it is, it would diverge again
        words += ["--stage", name, f"--stages.{name}.optimizer.lr", f"{stages.each[name].optimizer.lr / 2:g}"]
    print(f"{do + ', then resume' if do else 'Resume'} with: {shlex.join(words)}")


def _print_summary(stages: Stages, record: Mapping[str, Any], root: Path) -> None:
    """The held-out numbers of every stage, before and after."""
    print(f"\nAll stages finished, in {root}")
    for name in stages.each:
        about = record.get(name, {})
        before, after = about.get("before", {}), about.get("after", {})
        numbers = [f"{key} {number(before[key])} -> {number(after[key])}" for key in before if key in after]
        print(f"  {name}: {', '.join(numbers) or 'nothing held out'}; model in {stages.folder(root, name) / 'model'}")
