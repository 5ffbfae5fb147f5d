"""Environments of Prime Intellect's `verifiers`, as packages that are installed: found, loaded, and their rows.

`fastrl.environments.verifiers` runs them.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

OP = "verifiers"


def classic() -> Any:
    """The module with `load_environment` and `MultiTurnEnv`.

    Raises:
        ValueError: `verifiers` is not installed, or has another API.
    """
    do = "Install it: pip install verifiers==0.1.14."
    for name in ("verifiers", "verifiers.legacy"):
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        if hasattr(found, "MultiTurnEnv") and find_spec(f"{name}.clients"):
            return found
        do = "This version has another interface to models. " + do
    raise ValueError(f"{OP}: expected the package verifiers, with environments in Python, got none. {do}")


@functools.lru_cache(maxsize=4)
def loaded(name: str, options: str = "{}") -> Any:
    """The environment, loaded once: each conversation is a rollout of it."""
    try:
        return classic().load_environment(name, **json.loads(options))
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{OP}: name: {name!r} cannot be loaded: {error}") from error


def rows(name: str, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of an environment's dataset, with messages as `prompt`."""
    return [dict(row) for row in loaded(name, json.dumps(dict(options), sort_keys=True)).get_dataset()]
