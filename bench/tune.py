"""Writes a table of `fastrl.kernels.tuning`: for each entry, the fastest of some candidates on the GPU at hand.

Shapes are fixed, and one parameter is varied at a time, twice through; where warps can be specialized, once more from
there. A candidate is faster only where its outputs are right; it is kept only where it gains more than noise, spills no
register and fits into shared memory.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch

from bench import aot
from bench.timing import Case, Outputs, Provider, Result, environment, measure
from fastrl.kernels import tuning

GAIN = 0.97  # of the time before: what is less than that is noise
ROUNDS = 7


@dataclass(frozen=True)
class Work:
    """What an entry is timed on: an op of `bench`, one of its shapes and modes, and what the entry may become."""

    op: str
    shape: str
    choices: dict[str, tuple[int, ...]]
    mode: str = ""
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)


WARPS = (4, 8, 16)
TILES = {"BLOCK_N": (64, 128), "BLOCK_V": (64, 128, 256), "BLOCK_H": (32, 64, 128), "PARTS": (16, 32, 64)}


def _fused(choices: dict[str, tuple[int, ...]] | None = None, **options: Any) -> Work:
    choices = choices or TILES | {"num_warps": (4, 8), "num_stages": (2, 3, 4)}
    return Work("linear_logprob", "qwen3-0.6b-8k", choices, "no gradient", torch.bfloat16, options)


WORK = {
    "gae": Work("gae", "16 x 128k", {"BLOCK": (256, 512, 1024, 2048), "num_warps": (2, *WARPS)}),
    "gae carries": Work("gae", "16 x 128k", {"BLOCK": (256, 512, 1024, 2048), "num_warps": (2, *WARPS)}),
    "group_advantages": Work("group_advantages", "wide", {"BLOCK": (32, 64, 128, 256), "num_warps": (1, 2, 4)}),
    "group_advantages batch": Work(
        "group_advantages", "wide", {"BLOCK": (512, 1024, 2048), "num_warps": WARPS}, options={"scale": "batch"}
    ),
    "policy_loss": Work("policy_loss", "wide", {"BLOCK": (128, 256, 512, 1024), "num_warps": (2, *WARPS)}),
    "policy_loss total": Work("policy_loss", "wide", {"PARTS": (32, 64, 128), "num_warps": WARPS}),
    "softmax_row": Work(
        "logprob", "qwen3-8b-8k", {"BLOCK": (1024, 2048, 4096, 8192), "num_warps": WARPS}, dtype=torch.bfloat16
    ),
    "softmax_row float64": Work(
        "logprob", "smollm2", {"BLOCK": (1024, 2048, 4096), "num_warps": WARPS}, dtype=torch.float64
    ),
    "linear_logprob fused": _fused(),
    "linear_logprob fused narrow": _fused(softcap=30.0),
    "linear_logprob merge": _fused(choices={"BLOCK": (64, 128, 256, 512), "num_warps": (2, *WARPS)}),
}


def main(arguments: list[str]) -> None:
    """Tunes entries for one GPU and writes its architecture's table."""
    parser = argparse.ArgumentParser(prog="fastrl bench --tune", description=__doc__.splitlines()[0])
    parser.add_argument("entries", nargs="*", help="names from fastrl/kernels/tuning.py; all by default")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    if device.type == "cuda" and torch.cuda.is_available() and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    unknown = [entry for entry in args.entries if entry not in WORK]
    if unknown:
        raise ValueError(f"fastrl bench --tune: expected some of {', '.join(WORK)}, got {', '.join(unknown)}.")
    if device.type != "cuda" or not torch.cuda.is_available() or tuning.architecture(device) is None:
        raise ValueError(f"fastrl bench --tune: expected an NVIDIA GPU, got {device}: there is nothing to tune.")
    tune(device, args.entries or list(WORK))


def tune(device: torch.device, entries: Iterable[str]) -> None:
    """Writes the table anew after each entry, so that what is done is kept."""
    architecture = tuning.architecture(device)
    table = {entry: dict(changes) for entry, changes in tuning.table(architecture).items()}
    for entry in entries:
        best = faster(entry, device)
        changes = {name: number for name, number in best.items() if number != tuning.DEFAULTS[entry][name]}
        table.pop(entry, None)
        if changes:
            table[entry] = changes
        print(f"{entry}: {changes or 'the defaults'}", flush=True)
        write(architecture, table, environment(device))
    print(f"Written: {tuning.FOLDER / architecture}.json. Record it: python -m bench.aot --write, with the reason.")


def faster(entry: str, device: torch.device) -> dict[str, int]:
    """The parameters with which the op of an entry takes the least time, from those of today on."""
    work = WORK[entry]
    module = import_module(f"bench.bench_{work.op}")
    tensors = module.tensors(module.SHAPES[work.shape], work.dtype, device)[work.mode]
    run = module.fastrl_provider("triton", *tensors, **work.options)
    truth = module.fastrl_provider("chunked", *tensors, **work.options)()
    wide = {name: x.double() for name, x in truth.items()}
    today = tuning.parameters(entry, tuning.architecture(device))
    starts = [today]
    if entry in tuning.SPECIALIZED:  # several parameters at once, where no change of a single one leads
        plain, specialized = tuning.DEFAULTS[entry], tuning.DEFAULTS[entry] | tuning.SPECIALIZED[entry]
        starts.append(plain if today["WARP_SPECIALIZE"] else specialized)
    found = []
    for best in starts:
        if not _legal(entry, best, device):
            continue
        for _ in range(2):
            before = best
            for name, choices in work.choices.items():
                others = [best | {name: x} for x in choices if x != best[name]]
                others = [other for other in others if _legal(entry, other, device)]
                best = _best_of(entry, [best, *others], run, wide, device)
            if best == before:
                break
        found.append(best)
    return _best_of(entry, found, run, wide, device)


def _best_of(
    entry: str, candidates: list[dict[str, int]], run: Provider, truth: Outputs, device: torch.device
) -> dict[str, int]:
    """The fastest of some candidates, of which the first is today's."""
    if len(candidates) == 1:
        return candidates[0]
    by_name = {json.dumps(parameters): parameters for parameters in candidates}
    providers = {name: _with(entry, parameters, run) for name, parameters in by_name.items()}
    dtype = WORK[entry].dtype
    results = {r.provider: r for r in measure(Case(entry, dtype, lambda: truth, providers), ROUNDS, device)}
    today = next(iter(by_name))
    limit = GAIN * seconds(results[today])
    for name in sorted(results, key=lambda name: seconds(results[name])):
        if seconds(results[name]) < limit and not _refused(entry, by_name[name], device):
            return by_name[name]
    return candidates[0]


def _legal(entry: str, parameters: dict[str, int], device: torch.device) -> bool:
    """Whether a table of the device may say so."""
    try:
        tuning.check_entries("candidate", {entry: parameters}, tuning.architecture(device))
    except ValueError:
        return False
    return True


def seconds(result: Result) -> float:
    """Of the device alone where that is known: a short launch is hidden behind the host's work."""
    return result.device_seconds or result.median or float("inf")


def _with(entry: str, parameters: dict[str, int], run: Provider) -> Provider:
    def provider() -> Outputs:
        with tuning.trying(entry, **parameters):
            return run()

    return provider


def _refused(entry: str, parameters: dict[str, int], device: torch.device) -> list[str]:
    """What `bench.aot` would complain about."""
    architecture = tuning.architecture(device)
    found: aot.Table = {}
    for name, build in aot.builds().items():
        if build.entry == entry and not build.changes:
            capability = int(architecture.removeprefix("sm_"))
            found[name] = {architecture: aot.compile_and_count(name, capability, **parameters)}
    return aot.over_limit(found)


def write(architecture: str, entries: dict[str, dict[str, int]], about: dict[str, Any]) -> None:
    """Replaces an architecture's table at once: who reads it meanwhile reads the old one or the new one."""
    path = tuning.FOLDER / f"{architecture}.json"
    tuning.check_entries(path.name, entries, architecture)
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_text(json.dumps({"about": about, "entries": entries}, indent=1, sort_keys=True) + "\n")
    unfinished.replace(path)
    tuning.table.cache_clear()
    tuning.tuned.cache_clear()
