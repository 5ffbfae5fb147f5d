"""Pairs of texts with rewards and features, from rows, and from reward models that score the texts."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastrl.check import choice, require, sentence
from fastrl.data.sources import Row

OP = "analyze"
SIDES = ("chosen", "rejected")
REWARDS = ("reward", "reward_pre")  # after alignment, before it
LABELS = ("chosen", "indifferent", "rejected")
REWRITTEN = "rewritten_"
FLAGS = "true, false, 1, 0 or nothing"


@dataclass(frozen=True)
class Texts:
    """The chosen and the rejected text of n pairs. NaN is what is not there."""

    features: np.ndarray  # (n, 2, k): 1, 0 or NaN
    rewards: dict[str, np.ndarray]  # of `REWARDS`, those that are there: (n, 2)

    def at(self, places: np.ndarray) -> Texts:
        """Those of some pairs."""
        return Texts(self.features[places], {name: values[places] for name, values in self.rewards.items()})


@dataclass(frozen=True)
class Pairs:
    """n pairs, of which no reward is missing."""

    names: tuple[str, ...]  # of the k features
    original: Texts
    clusters: np.ndarray  # (n,) int: pairs of one cluster depend on each other
    labeler: np.ndarray | None = None  # (n,) of `LABELS`, empty where there is none
    rewritten: Texts | None = None  # NaN where a pair was not rewritten
    said: tuple[str, ...] = ()  # what was left out, and what looks odd


def read_pairs(
    rows: Sequence[Row | Mapping[str, Any]],
    *,
    features: Sequence[str] = (),
    targets: Sequence[str] = (),
    cluster: str = "",
) -> Pairs:
    """The pairs of rows with the columns that `fastrl.analyze` lists.

    Pairs without a finite reward are left out and counted, and so are repeated ones: by their `id`, else their texts.

    Args:
        features: names of features; empty takes every column pair of true and false.
        targets: features by which a judge prefers, if there is no column `labeler`; see `preferred`.
        cluster: the column that pairs which depend on each other share, such as `prompt`; empty: none depend.

    Raises:
        ValueError: no such column, a value that is no number, or neither true nor false, or no pair left.
    """
    rows = [row if isinstance(row, Row) else Row(f"row {index}", row) for index, row in enumerate(rows)]
    columns = dict.fromkeys(name for row in rows for name in row.values)
    got = ", ".join(columns) or "none"
    needed = [f"{side}_reward" for side in SIDES]
    do = "Or score the texts with --model."
    require(columns.keys() >= set(needed), OP, "columns", " and ".join(needed), got, do)
    require(not cluster or cluster in columns, OP, "cluster", f"one of {got}", repr(cluster))
    rows, said = _distinct(rows, columns)
    there = [name for name in _both_sides(columns) if name not in REWARDS]
    for argument, names in (("features", features), ("targets", targets)):
        for name in names:
            choice(OP, argument, name, there)
    chosen = {*features, *targets} if features else {*targets, *(name for name in there if _has_flag(rows, name))}
    found = {name: _flags(rows, name) for name in there if name in chosen}
    kept = {name: flags for name, flags in found.items() if not features or name in features}
    flags = np.stack(list(kept.values()), axis=2) if kept else np.empty((len(rows), 2, 0))
    original = Texts(flags, _rewards(rows, columns, ""))
    labeler = _labeler(rows) if "labeler" in columns else None
    if labeler is None and targets:
        labeler = preferred(np.stack([found[name] for name in targets], axis=2))
    clusters, more = _clusters(rows, columns, cluster)
    said += more
    known = {"id", "labeler", cluster, "prompt", *SIDES, *(REWRITTEN + side for side in SIDES)}
    known |= {f"{prefix}{side}_{name}" for prefix in ("", REWRITTEN) for side in SIDES for name in (*kept, *REWARDS)}
    left = ", ".join(name for name in columns if name not in known)
    said += [f"columns not used: {left}"] * bool(left)
    complete = np.isfinite(np.concatenate(list(original.rewards.values()), axis=1)).all(1)
    missing = int((~complete).sum())
    require(missing < len(rows), OP, "rewards", "at least one pair with all rewards", f"none among {len(rows)}")
    said += [f"left out {missing} pairs without a finite reward"] * bool(missing)
    rewritten, more = _rewritten(rows, columns, list(kept), complete)
    labels = None if labeler is None else labeler[complete]
    return Pairs(tuple(kept), original.at(complete), clusters[complete], labels, rewritten, (*said, *more))


def preferred(targets: np.ndarray) -> np.ndarray:
    """What a judge prefers that goes by target features: the first of them that one text alone has decides.

    If none does, it is indifferent. The authors' analysis does this with harmless, helpful.

    Args:
        targets: (n, 2, k) of chosen and rejected texts: 1, 0 or NaN.

    Returns:
        (n,) of `LABELS`; empty where a target is NaN.
    """
    difference = targets[:, 0] - targets[:, 1]  # (n, k)
    decides = np.argmax(difference != 0, axis=1)
    sign = np.take_along_axis(difference, decides[:, None], axis=1)[:, 0]
    found = np.select([sign > 0, sign < 0], ["chosen", "rejected"], "indifferent")
    return np.where(np.isnan(difference).any(1), "", found)


def with_rewritten(rows: Sequence[Row], others: Sequence[Row]) -> list[Row]:
    """The rows with the columns of `others`, which are the same pairs rewritten, under `rewritten_` and their names.

    Raises:
        ValueError: a row without an `id`, two rewritten pairs of one, or one that no row has.
    """
    for row in (*rows, *others):
        require(row.values.get("id") is not None, row.where, "id", "a value, to find rewritten pairs by", "none")
    ids = [_key(row.values["id"]) for row in others]
    known = {_key(row.values["id"]) for row in rows}
    for name, row in zip(ids, others, strict=True):
        require(name in known, row.where, "id", "that of a row to be rewritten", name)
    twice = next((name for name, times in Counter(ids).items() if times > 1), None)
    require(twice is None, OP, "rewritten", "each id once", f"{twice} again")
    found = dict(zip(ids, others, strict=True))
    nothing = Row("", {})
    return [
        Row(row.where, {**row.values, **_renamed(found.get(_key(row.values["id"]), nothing).values)}) for row in rows
    ]


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {REWRITTEN + name: value for name, value in values.items() if name not in ("id", "prompt")}


def _distinct(rows: list[Row], columns: Mapping[str, Any]) -> tuple[list[Row], list[str]]:
    """(rows without repeated pairs, what to say). Rows with neither id nor texts cannot be told apart."""
    by = ("id",) if "id" in columns else tuple(name for name in ("prompt", *SIDES) if name in columns)
    if by != ("id",) and not set(SIDES) <= set(by):
        return rows, []
    needed = ("id",) if by == ("id",) else SIDES
    first: dict[str, Row] = {}
    for place, row in enumerate(rows):
        whole = all(row.values.get(name) is not None for name in needed)
        first.setdefault(_key([row.values.get(name) for name in by]) if whole else str(place), row)
    repeated = len(rows) - len(first)
    what = "id" if by == ("id",) else "texts"
    return list(first.values()), [f"left out {repeated} pairs whose {what} an earlier row has"] * bool(repeated)


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=repr)


def _both_sides(columns: Mapping[str, Any]) -> list[str]:
    """The names after `chosen_` that are after `rejected_` too."""
    names = (column.removeprefix("chosen_") for column in columns if column.startswith("chosen_"))
    return [name for name in names if f"rejected_{name}" in columns]


def _has_flag(rows: Sequence[Row], name: str) -> bool:
    return any(_is_flag(row.values.get(f"{side}_{name}")) for side in SIDES for row in rows)


def _flags(rows: Sequence[Row], name: str, prefix: str = "") -> np.ndarray:
    """(n, 2) of a feature: 1, 0 or NaN."""
    do = "Or name the features with --features, without this one."
    return np.stack([_numbers(rows, f"{prefix}{side}_{name}", _is_flag, FLAGS, do) for side in SIDES], axis=1)


def _rewards(rows: Sequence[Row], columns: Mapping[str, Any], prefix: str) -> dict[str, np.ndarray]:
    """The rewards of the columns with a prefix."""
    found = {}
    for name in REWARDS:
        pair = [f"{prefix}{side}_{name}" for side in SIDES]
        there = [column for column in pair if column in columns]
        require(len(there) != 1, OP, "columns", " and ".join(pair), f"only {''.join(there)}")
        if there:
            found[name] = np.stack([_numbers(rows, column, _is_number, "a number") for column in pair], axis=1)
    return found


def _rewritten(
    rows: Sequence[Row], columns: Mapping[str, Any], names: Sequence[str], kept: np.ndarray
) -> tuple[Texts | None, list[str]]:
    """(the rewritten texts of the kept pairs, what to say)."""
    if not any(name.startswith(REWRITTEN) for name in columns):
        return None, []
    rewards = _rewards(rows, columns, REWRITTEN)
    if "reward" not in rewards:
        return None, ["the rewritten texts have no rewards, so there is no robustness"]
    flags = np.full((len(rows), 2, len(names)), np.nan)
    without = []
    for place, name in enumerate(names):
        if {f"{REWRITTEN}{side}_{name}" for side in SIDES} <= columns.keys():
            flags[:, :, place] = _flags(rows, name, REWRITTEN)
        else:
            without.append(name)
    texts = Texts(flags, rewards).at(kept)
    values = np.concatenate(list(texts.rewards.values()), axis=1)
    whole = np.isfinite(values).all(1)
    half = int((~whole & ~np.isnan(values).all(1)).sum())
    blank = {name: np.where(whole[:, None], given, np.nan) for name, given in texts.rewards.items()}
    said = [f"left out {half} rewritten pairs without a finite reward"] * bool(half)
    said += [f"features without labels of the rewritten texts: {', '.join(without)}"] * bool(without)
    return Texts(texts.features, blank), said


def _labeler(rows: Sequence[Row]) -> np.ndarray:
    for row in rows:
        if row.values.get("labeler") is not None:
            choice(row.where, "labeler", row.values["labeler"], LABELS)
    return np.array([row.values.get("labeler") or "" for row in rows])


def _clusters(rows: Sequence[Row], columns: Mapping[str, Any], name: str) -> tuple[np.ndarray, list[str]]:
    """((n,) int, what to say)."""
    if name:
        for row in rows:
            require(row.values.get(name) is not None, row.where, name, "a value, to cluster by", "none")
        return np.unique([_key(row.values[name]) for row in rows], return_inverse=True)[1], []
    prompts = Counter(_key(row.values["prompt"]) for row in rows if row.values.get("prompt") is not None)
    shared = sum(times for times in prompts.values() if times > 1)
    said = [f"{shared} pairs share their prompt with others, which --cluster prompt allows for"] * bool(shared)
    return np.arange(len(rows)), said


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool | int | float | np.bool_ | np.number) and bool(value in (0, 1))


def _is_number(value: Any) -> bool:
    return isinstance(value, float | np.number) or (type(value) is int and abs(value) < 2**1000)  # as float has


def _numbers(rows: Sequence[Row], column: str, good: Callable[[Any], bool], expected: str, do: str = "") -> np.ndarray:
    """(n,) float, NaN where there is no value."""
    values = [row.values.get(column) for row in rows]
    try:
        distinct = set(values)  # of flags a few, so that many rows are read fast
    except TypeError:  # lists
        distinct = values

    def bad(value: Any) -> bool:
        return not (value is None or good(value) or (isinstance(value, float) and value != value))

    if any(map(bad, distinct)):
        place = next(place for place, value in enumerate(values) if bad(value))
        raise ValueError(sentence(rows[place].where, column, expected, repr(values[place])[:80], do))
    return np.array(values, dtype=float)


def scored(rows: Sequence[Row], model: str, name: str, *, dtype: str = "float32") -> list[Row]:
    """The rows with a reward model's rewards in the columns of `name`, one of `REWARDS`.

    Texts are rendered and tokenised as `load_preferences` does, with the settings of the run's `data` if `model` is a
    run. Equal texts have one score. A pair whose texts cannot be read has no rewards; a warning says why.

    Args:
        model: a run of `algorithm: reward_model`, or what `fastrl.rewards.model.ModelReward` takes.
        dtype: of the weights. In 16 bits near scores become equal, and then the pair is not aligned.

    Raises:
        ValueError: there are no texts, or no such reward model.
    """
    from fastrl.data.preferences import load_preferences, unpair
    from fastrl.rewards.model import ModelReward

    prefixes = [prefix for prefix in ("", REWRITTEN) if any(row.values.get(f"{prefix}chosen") for row in rows)]
    require("" in prefixes, OP, "columns", "chosen and rejected, the texts to score", "none")
    path, options = _of_run(model)
    reward = ModelReward(path, dtype=dtype)
    places, groups = [], []
    for prefix in prefixes:
        there = [place for place, row in enumerate(rows) if not prefix or row.values.get(f"{prefix}chosen") is not None]
        texts = [{**rows[at].values, **{side: rows[at].values.get(prefix + side) for side in SIDES}} for at in there]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = load_preferences(texts, reward.tokenizer, kind="pairs", **options)
        read = {pair.prompt.index for pair in found}
        unread = [rows[at].where for index, at in enumerate(there) if index not in read]
        for warning in caught:  # which numbers the texts, not the rows
            where = f" of {', '.join(unread[:3])}{', ...' * (len(unread) > 3)}" * bool(unread)
            kind = "rewritten texts" if prefix else "texts"
            warnings.warn(f"{OP}: {kind}{where}: {warning.message}", stacklevel=2)
        places += [(there[pair.prompt.index], f"{prefix}{side}_{name}") for pair in found for side in SIDES]
        groups += unpair(found)
    keys = [(group.prompt.token_ids, tuple(group.samples[0].token_ids)) for group in groups]
    distinct = dict(zip(keys, groups, strict=True))
    scores = dict(zip(distinct, reward.scores(list(distinct.values())), strict=True))
    values = [{**row.values, **{f"{one}{side}_{name}": None for one in prefixes for side in SIDES}} for row in rows]
    for (place, column), key in zip(places, keys, strict=True):
        values[place][column] = scores[key]
    return [Row(row.where, new) for row, new in zip(rows, values, strict=True)]


def _of_run(model: str) -> tuple[str, dict[str, Any]]:
    """(folder of the model, how its run rendered rows), or (model, nothing)."""
    from fastrl.monitor.records import read_run

    path = Path(model).expanduser().resolve()
    if not path.is_dir():
        return model, {}
    runs = (read_run(folder).config for folder in (path, *path.parents[:3]) if (folder / "config.yaml").is_file())
    data = next((run.get("data") or {} for run in runs if run.get("algorithm") == "reward_model"), {})
    options = {name: data[name] for name in ("chat", "system", "template_options") if name in data}
    return str(path / "model" if (path / "model").is_dir() else path), options
