"""Reads prompts and answers: rows of a file, of a `datasets` dataset, or of a reasoning-gym task."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from fastrl import check
from fastrl.hub import or_cache
from fastrl.shipped import located

READERS = {".csv": "csv", ".parquet": "parquet", ".json": "json"}  # suffix -> the reader of `datasets`
GYM = "reasoning_gym:"
VERIFIERS = "verifiers:"
MIXTURE = "mixture"  # reasoning-gym tasks at several levels, named in the options
MOST_DRAWS = 100  # other rows' answers to try as a question's wrong answer


class Row(NamedTuple):
    """One row of a source, and its location for messages."""

    where: str
    values: Mapping[str, Any]


def read_rows(source: Any, *, size: int, seed: int, options: Mapping[str, Any]) -> list[Row]:
    """The rows of `source`, in order.

    Args:
        source: `reasoning_gym:TASK`, or `reasoning_gym:mixture` of several; `verifiers:NAME`, the rows of an
            environment; a `.jsonl`, `.jsonl.gz`, `.json`, `.csv` or `.parquet` file; a folder written by
            `save_to_disk`, or a folder of such files (a cloned data set); a hub id; a `datasets` dataset, or any
            iterable of mappings. A file of `recipes/` that is not here is the one that comes with fastrl.
        size, seed: how many tasks reasoning-gym generates, and their seed.
        options: the task's settings for reasoning-gym; for a mixture `tasks`, from each task's name to its levels, a
            list of settings from the easiest on, whose rows have the columns `task` and `level`, from 1; the arguments
            of a `verifiers` environment; `split` and `name` for datasets.
    """
    if isinstance(source, str | Path) and not str(source).startswith((GYM, VERIFIERS)):
        source = Path(source).expanduser() if str(source).startswith("~") else located(source)
    if isinstance(source, str) and source.startswith(GYM):
        task = source.removeprefix(GYM)
        rows = _gym_mixture(size, seed, options) if task == MIXTURE else _gym_rows(task, size, seed, options)
    elif isinstance(source, str) and source.startswith(VERIFIERS):
        from fastrl.data.verifiers import rows as environment_rows

        name = source.removeprefix(VERIFIERS)
        rows = [
            Row(f"{source} row {at}", _without_filling(row)) for at, row in enumerate(environment_rows(name, options))
        ]
    elif isinstance(source, str | Path) and str(source).endswith((".jsonl", ".jsonl.gz")):
        _no_options(source, options, ())
        rows = _jsonl_rows(Path(source))
    else:
        dataset = _open_dataset(source, options) if isinstance(source, str | Path) else source
        if isinstance(dataset, Mapping):
            dataset = _one_split(source, dataset, options)
        name = str(source) if isinstance(source, str | Path) else type(source).__name__
        filled = hasattr(dataset, "features")  # of `datasets`
        rows = [
            Row(f"{name} row {index}", _without_filling(values) if filled else values)
            for index, values in enumerate(dataset)
        ]
    check.require(len(rows) > 0, "load_prompts", "source", "at least one row", f"none in {source}")
    return rows


def gym_answers(task: str, kind: str, *, size: int, seed: int, options: Mapping[str, Any]) -> list[Row]:
    """Questions of a reasoning-gym task with answers, in the columns of a kind of `fastrl.data.preferences`.

    `completions`: the task's answer. `pairs`: the task's answer is chosen; rejected is another question's answer that
    the task's scorer rates lower. `labelled`: one of the two, at random. `rewarded`: the right answer and three other
    questions' answers, with their scores. Equal arguments give equal rows. If no other answer scores lower, the wrong
    answer is None.
    """
    dataset = _gym_dataset(task, size, seed, options)
    entries = list(dataset)
    rows = []
    for index, entry in enumerate(entries):
        rng = random.Random(f"{seed}/{index}")
        prompt, right = entry["question"], str(entry["answer"])
        wrong = _gym_wrong_answer(dataset, entries, entry, rng) if kind in ("pairs", "labelled") else None
        values: dict[str, Any] = {"prompt": prompt, "completion": right}
        if kind == "pairs":
            values = {"prompt": prompt, "chosen": right, "rejected": wrong}
        elif kind == "rewarded":
            draws = [str(rng.choice(entries)["answer"]) for _ in range(3)]
            values = {"prompt": prompt, "responses": [right, *draws]}
            values["rewards"] = [float(dataset.score_answer(answer, entry)) for answer in values["responses"]]
        elif kind == "labelled":
            label = rng.random() < 0.5
            values = {"prompt": prompt, "completion": right if label else wrong, "label": label}
        rows.append(Row(f"{GYM}{task} row {index}", values))
    return rows


def _gym_wrong_answer(dataset: Any, entries: list[Any], entry: Any, rng: random.Random) -> str | None:
    """Another entry's answer that scores lower than the entry's own; None if none was found."""
    full = dataset.score_answer(entry["answer"], entry)
    for _ in range(MOST_DRAWS):
        answer = str(rng.choice(entries)["answer"])
        if answer != str(entry["answer"]) and dataset.score_answer(answer, entry) < full:
            return answer
    return None


def _without_filling(value: Any, inside: bool = False) -> Any:
    """Drops fields that are None only because another row has them: in `datasets`, all rows of a column have the same
    fields at every depth. A message's content and a row's own columns may be None."""
    if isinstance(value, Mapping):
        kept = {k: v for k, v in value.items() if v is not None or not inside or k == "content"}
        return {name: _without_filling(one, True) for name, one in kept.items()}
    return [_without_filling(one, inside) for one in value] if isinstance(value, list) else value


def _gym_rows(task: str, size: int, seed: int, options: Mapping[str, Any]) -> list[Row]:
    dataset = _gym_dataset(task, size, seed, options)
    return [
        Row(
            f"{GYM}{task} row {index}",
            {
                "prompt": entry["question"],
                "answer": entry["answer"],
                "entry": entry | {"metadata": _without_number(entry["metadata"])},
                "task": task,
                "task_options": dict(options),
            },
        )
        for index, entry in enumerate(dataset)
    ]


def _gym_mixture(size: int, seed: int, options: Mapping[str, Any]) -> list[Row]:
    """The rows of every level of every task, in equal numbers."""
    where = f"{GYM}{MIXTURE}"
    _no_options(where, options, ("tasks",))
    tasks = options.get("tasks")
    expected = "a mapping from a reasoning-gym task to a list of levels, each the task's settings"
    check.require(isinstance(tasks, Mapping) and bool(tasks), "load_prompts", "options.tasks", expected, repr(tasks))
    cells = []
    for task, levels in tasks.items():
        plain = isinstance(levels, list) and bool(levels) and all(isinstance(level, Mapping) for level in levels)
        check.require(plain, "load_prompts", f"options.tasks.{task}", "a list of levels, each settings", repr(levels))
        cells += [(task, number, level) for number, level in enumerate(levels, start=1)]
    check.require(size >= len(cells), "load_prompts", "size", f"a row for each of {len(cells)} levels or more", size)
    rows = []
    for place, (task, number, level) in enumerate(cells):
        share = size // len(cells) + (place < size % len(cells))
        rows += [
            Row(f"{row.where}, level {number}", {**row.values, "level": number})
            for row in _gym_rows(task, share, seed, level)
        ]
    return rows


def _without_number(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Drops the number of the draw, which would make two tasks of one that was drawn twice."""
    return {name: value for name, value in metadata.items() if name != "source_index"}


def _gym_dataset(task: str, size: int, seed: int, options: Mapping[str, Any]) -> Any:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    near = get_close_matches(task, DATASETS, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else "reasoning_gym.factory.DATASETS lists them."
    check.require(task in DATASETS, "load_prompts", "source", "a reasoning-gym task", repr(task), hint)
    known = [field.name for field in fields(DATASETS[task][1]) if field.name not in ("seed", "size")]
    _no_options(f"{GYM}{task}", options, known)
    try:
        return reasoning_gym.create_dataset(task, size=size, seed=seed, **options)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"load_prompts: reasoning-gym task {task} refuses its options: {error}.") from error


def _jsonl_rows(path: Path) -> list[Row]:
    check.require(path.is_file(), "load_prompts", "source", "a file that exists", path, error=FileNotFoundError)
    rows = []
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                values = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{where}: expected one JSON object on the line, got {error.msg} at column {error.colno}."
                ) from error
            except (ValueError, RecursionError) as error:  # not UTF-8, or thousands of digits or brackets
                raise ValueError(f"{where}: expected one JSON object in UTF-8 on the line, got {error}.") from error
            if not isinstance(values, dict):
                raise ValueError(f"{where}: expected one JSON object on the line, got a {type(values).__name__}.")
            rows.append(Row(where, values))
    return rows


def _open_dataset(source: str | Path, options: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    import datasets

    _no_options(source, options, ("split", "name"))
    path = Path(source)
    if path.suffix in READERS or (path.is_dir() and not _saved_to_disk(path)):
        return _open_files(path, options)
    if path.is_dir():
        dataset = datasets.load_from_disk(str(source))
        if not isinstance(dataset, Mapping):
            _no_options(source, options, ())
        return dataset
    try:
        with or_cache(str(source)):
            return datasets.load_dataset(str(source), options.get("name"), split=options.get("split"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"load_prompts: source: expected {GYM}TASK, a .jsonl file, a folder written by save_to_disk or a dataset "
            f"that can be reached on the hub, got {str(source)!r} ({error})."
        ) from error


def _saved_to_disk(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json"))


def _open_files(path: Path, options: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """The rows of a local file, or of a folder's files: `train-00000-of-00002.parquet`, `data/test.csv`, ..."""
    import datasets

    if path.is_file():
        files = {"train": [str(path)]}
    else:
        files = {}
        found = (file for file in sorted(path.rglob("*")) if file.suffix in READERS and ".git" not in file.parts)
        for file in found:
            files.setdefault(re.split(r"[-_.0-9]", file.name)[0] or "train", []).append(str(file))
    expected = f"a file that exists, or a folder with {', '.join(READERS)} files"
    check.require(bool(files), "load_prompts", "source", expected, path, error=FileNotFoundError)
    _no_options(path, options, ("split",))
    split = options.get("split", "train" if "train" in files else next(iter(files)))
    known = ", ".join(files)
    check.require(split in files, "load_prompts", "options.split", f"one of {known}", repr(split), f"See {path}.")
    reader = READERS[Path(files[split][0]).suffix]
    try:
        return datasets.load_dataset(reader, data_files=files[split], split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(f"load_prompts: source: {path} cannot be read as {reader}: {error}.") from error


def _one_split(source: object, splits: Mapping[str, Any], options: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    split = options.get("split", "train")
    check.require(
        split in splits, "load_prompts", "options.split", f"one of {', '.join(splits)}", repr(split), f"See {source}."
    )
    return splits[split]


def _no_options(source: object, options: Mapping[str, Any], known: Iterable[str]) -> None:
    known = list(known)
    for name in options:
        near = get_close_matches(name, known, n=1)
        check.require(
            name in known,
            "load_prompts",
            "options",
            f"{', '.join(known) or 'none'} for {source}",
            repr(name),
            f"Did you mean {near[0]!r}?" if near else "",
        )
