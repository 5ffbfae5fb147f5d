"""In pieces of which size the Triton kernels work: defaults, and one table per GPU architecture that changes them.

Nothing is searched at run time. Which parameters a launch takes depends on the architecture, on dtypes and on which
arguments are present, never on the number of rows: no bit of a row depends on its batch. `fastrl bench --tune` writes
`tables/<architecture>.json`: {"about": where it was measured, "entries": {entry: {parameter: number}}}.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fastrl.check import choice, require

FOLDER = Path(__file__).parent / "tables"
MOST = {"num_warps": 32, "num_stages": 8}  # what Triton takes

# Entry -> parameter -> number. Capitals are compile-time arguments, or cut the work before the launch; the rest are
# options of the launch.
DEFAULTS: dict[str, dict[str, int]] = {
    "gae": {"BLOCK": 512, "num_warps": 4},  # tokens of a program
    "gae carries": {"BLOCK": 512, "num_warps": 4},  # programs of the above that are scanned at a time
    "group_advantages": {"BLOCK": 128, "num_warps": 1},  # members at a time: most groups are one block
    "group_advantages batch": {"BLOCK": 1024, "num_warps": 8},
    "policy_loss": {"BLOCK": 512, "num_warps": 8},  # tokens of a program, or of a sequence at a time
    "policy_loss total": {"PARTS": 64, "num_warps": 8},  # programs' sums that are added at a time
    # Columns at a time: 16 per thread are loads in flight for the memory's latency, and no spilled register.
    "softmax_row": {"BLOCK": 4096, "num_warps": 8},
    "softmax_row float64": {"BLOCK": 2048, "num_warps": 8},
    # The parts of the vocabulary are work for a whole GPU also where there are few rows.
    "linear_logprob fused": {  # with a BLOCK_H of 64 four stages would not fit into 99 KiB, as sm_89 has
        **{"BLOCK_N": 128, "BLOCK_V": 128, "BLOCK_H": 32, "PARTS": 32},
        **{"num_warps": 8, "num_stages": 4, "WARP_SPECIALIZE": False},
    },
    "linear_logprob fused narrow": {  # tanh, or a row's division, takes the registers of the other columns
        **{"BLOCK_N": 128, "BLOCK_V": 64, "BLOCK_H": 64, "PARTS": 32},
        **{"num_warps": 8, "num_stages": 4, "WARP_SPECIALIZE": False},
    },
    "linear_logprob merge": {"BLOCK": 256, "num_warps": 8},  # rows of a program
}

# One group of warps that loads tiles and two that multiply: off until somebody has measured it, which starts from here.
# Only Hopper's compiler pass divides this kernel: Blackwell's of Triton 3.6 does not compile it, that of 3.9 spills.
SPECIALIZES = ("sm_90",)
SPECIALIZED: dict[str, dict[str, int]] = {
    "linear_logprob fused": {"WARP_SPECIALIZE": True, "BLOCK_H": 64, "num_warps": 4},
    "linear_logprob fused narrow": {"WARP_SPECIALIZE": True, "num_warps": 4},
}


def architecture(device: torch.device) -> str | None:
    """Whose table a device reads, such as "sm_90"; None where there are only defaults."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def check_entries(source: str, entries: Any, of: str | None = None) -> None:
    """Refuse what is no table: an unknown entry or parameter, or a value that no kernel takes on architecture `of`.

    Raises:
        ValueError: one sentence, which starts with `source`.
    """
    require(isinstance(entries, dict), source, "entries", "entry -> parameter -> number", repr(entries))
    for entry, parameters in entries.items():
        choice(source, "entry", entry, DEFAULTS)
        require(isinstance(parameters, dict), source, entry, "parameter -> number", repr(parameters))
        for name, number in parameters.items():
            choice(source, entry, name, DEFAULTS[entry])
            if isinstance(DEFAULTS[entry][name], bool):
                require(isinstance(number, bool), source, f"{entry}.{name}", "true or false", repr(number))
                continue
            most = MOST.get(name)
            whole = type(number) is int and number > 0 and (most is None or number <= most)
            ok = whole and (name == "num_stages" or number & (number - 1) == 0)
            kind = "a whole number above 0" if name == "num_stages" else "a power of two"
            require(ok, source, f"{entry}.{name}", kind + (f" of at most {most}" if most else ""), repr(number))
        if parameters.get("WARP_SPECIALIZE"):
            here = of is None or of in SPECIALIZES
            require(here, source, f"{entry}.WARP_SPECIALIZE", f"false but on {', '.join(SPECIALIZES)}", "true")
            warps, rows = ((DEFAULTS[entry] | parameters)[name] for name in ("num_warps", "BLOCK_N"))
            ok, got = warps == 4 and rows >= 128, f"{warps} and {rows}"  # each of two groups multiplies 64 rows
            require(ok, source, f"{entry}.num_warps and BLOCK_N", "4 and 128 or more to specialize warps", got)


@lru_cache
def table(name: str) -> Mapping[str, dict[str, int]]:
    """The entries of an architecture's table; empty where it has none."""
    path = FOLDER / f"{name}.json"
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text())["entries"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path}: expected {{"about": ..., "entries": ...}} in JSON, got {error!r}.') from error
    check_entries(str(path), entries, name)
    return entries


def tables() -> list[str]:
    """The architectures that have a table."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def parameters(entry: str, name: str | None) -> dict[str, int]:
    """An entry's parameters on an architecture, by the name of its table or None."""
    return DEFAULTS[entry] | (table(name).get(entry, {}) if name else {}) | _tried.get(entry, {})


@lru_cache
def tuned(entry: str, device: torch.device) -> Mapping[str, int]:
    """An entry's parameters on a device."""
    return parameters(entry, architecture(device))


_tried: dict[str, dict[str, int]] = {}


@contextmanager
def trying(entry: str, **changes: int) -> Generator[None]:
    """Other parameters of an entry meanwhile: for measuring and for tests."""
    check_entries("trying", {entry: changes})
    before = _tried.get(entry)
    _tried[entry] = changes
    tuned.cache_clear()
    try:
        yield
    finally:
        if before is None:
            del _tried[entry]
        else:
            _tried[entry] = before
        tuned.cache_clear()
