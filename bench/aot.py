"""Every Triton and CUDA kernel compiled ahead of time, without a GPU, and what it takes on one.

python -m bench.aot            the tables, next to the recorded ones
python -m bench.aot --check    fails on a spill, on too much shared memory, and where a kernel grew
python -m bench.aot --write    records the tables of this Triton and this nvcc

The record is `bench/results/aot.json`: compiler and version -> build -> architecture -> counts. Another version counts
differently, so where there is no record of the installed one only the limits are checked.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from fastrl.kernels import tuning

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "bench" / "results" / "aot.json"
CUDA = ROOT / "csrc" / "cuda"
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a block may use, by compute capability
OTHER_LIMITS = {86: 99 << 10, 87: 163 << 10, 89: 99 << 10, 103: 227 << 10, 120: 99 << 10}  # checked where tuned for
COUNTS = ("registers", "spills", "shared", "instructions")  # spills and shared in bytes: per thread, per block
# How Hopper's warps give registers to each other, load a tile and multiply it.
SPECIALIZED = ("setmaxnreg", "cp.async.bulk.tensor", "wgmma.mma_async")

Counts = dict[str, int]
Table = dict[str, dict[str, Counts]]  # build -> sm_90 -> counts


def modules() -> list[ModuleType]:
    """The modules of fastrl.kernels that hold Triton kernels, and their `BUILDS`."""
    paths = sorted((ROOT / "fastrl" / "kernels").rglob("*triton*.py"))
    return [import_module(".".join(path.relative_to(ROOT).with_suffix("").parts)) for path in paths]


def builds() -> dict[str, Any]:
    """Every `fastrl.kernels.triton_jit.Build` by its module's and its own name."""
    found: dict[str, Any] = {}
    for module in modules():
        for build in getattr(module, "BUILDS", ()):
            if any(build is other for other in found.values()):
                continue  # an op that launches another's kernels may list them too
            name = f"{module.__name__.removeprefix('fastrl.kernels.')}: {build.name}"
            if name in found:
                raise ValueError(f"bench.aot: two builds are named {name!r}. Give each its own name.")
            found[name] = build
    return found


def capabilities() -> list[int]:
    """What is compiled for: the architectures that fastrl names, and those that have a table of their own."""
    return sorted({*SHARED_LIMIT, *(int(name.removeprefix("sm_")) for name in tuning.tables())})


def compile_and_count(name: str, capability: int, **changes: int) -> Counts:
    """One build for one architecture with what its table says, and with other `changes` of its entry; pointers are
    taken to be aligned to 16 bytes, as torch's are.

    Raises:
        ValueError: where Triton was asked to specialize warps and has not.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    build = builds()[name]
    with tuning.trying(build.entry, **changes) if changes else nullcontext():
        constants, options = build.on(f"sm_{capability}")
    arguments = build.kernel.arg_names
    signature = {a: "constexpr" if a in constants else build.signature[a] for a in arguments}
    multiples = {a for a in arguments if signature[a].startswith("*") or a in build.multiples}
    attributes = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(arguments) if a in multiples}
    source = ASTSource(fn=build.kernel, signature=signature, constexprs=constants, attrs=attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    if constants.get("WARP_SPECIALIZE"):
        check_specialized(name, kernel.asm["ptx"])
    return count(kernel.asm["cubin"]) | {"shared": kernel.metadata.shared}


def check_specialized(name: str, ptx: str) -> None:
    """Refuse code that Triton, without a word, has compiled for warps that all do the same.

    Raises:
        ValueError: one sentence, with the instruction that is missing.
    """
    for instruction in SPECIALIZED:
        if instruction not in ptx:
            raise ValueError(f"bench.aot: {name}: expected specialized warps, found no {instruction}.")


def count(cubin: bytes) -> Counts:
    """Registers and bytes of local memory of a thread, and machine instructions, without padding."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        (counts,) = functions(Path(file.name)).values()
    return counts


def functions(binary: Path) -> dict[tuple[str, str], Counts]:
    """(Architecture, or nothing in a cubin; mangled name) -> counts of each kernel in a cubin or an object file. Shared
    memory is what the compiler laid out; what a launch adds is not known here."""
    from triton import knobs

    def dump(flag: str) -> dict[tuple[str, str], str]:
        command = [knobs.nvidia.cuobjdump.path, flag, str(binary)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        architecture, found = "", {}
        for part in re.split(r"^(?=arch = |\s*Function\b)", text, flags=re.MULTILINE):
            if named := re.match(r"arch = (\w+)", part):
                architecture = named[1]
            elif named := re.match(r"\s*Function\s*:?\s*(\w+)", part):
                found[architecture, named[1]] = part
        return found

    usage, code, table = dump("--dump-resource-usage"), dump("--dump-sass"), {}
    for kernel, used in usage.items():
        ((registers, stack, shared, local),) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", used)
        instructions = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?!NOP)", code[kernel], re.MULTILINE)
        counts = int(registers), int(stack) + int(local), int(shared), len(instructions)
        table[kernel] = dict(zip(COUNTS, counts, strict=True))
    return table


def measure(names: list[str], processes: int) -> Table:
    """The table of some builds, or what the compiler says of the first that does not compile."""
    every = {f"sm_{capability}": capability for capability in capabilities()}
    tasks = [(name, every[of]) for name in names for of in builds()[name].architectures(every)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:  # a fork can inherit a lock that torch holds
        counts = pool.starmap(compile_and_count, tasks, chunksize=1)
    table: Table = {name: {} for name in names}
    for (name, capability), found in zip(tasks, counts, strict=True):
        table[name][f"sm_{capability}"] = {key: found[key] for key in COUNTS}
    return table


def compile_cuda(source: Path, setup: dict[str, Any]) -> Table:
    """One source of csrc/cuda for every architecture, as `setup` compiles it: `source: kernel` -> counts.

    Raises:
        ValueError: nvcc's own words, for a warning too.
    """
    compiler, flags = setup["nvcc"](), [flag for flag in setup["NVCC"] if flag not in ("-shared", "--threads=0")]
    flags += [f"-gencode=arch={virtual},code={real}" for real, virtual in setup["architectures"](compiler).items()]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kernels.o"
        command = [compiler, *flags, "-std=c++17", "-O3", "-Werror=all-warnings", "-c", "-o", str(out), str(source)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise ValueError(f"bench.aot: {source.name}: {result.stderr}")
        found = functions(out)
    # void cuda::(anonymous namespace)::walk<float>(Gae, ...) is walk<float>; what is mangled holds a hash of the path.
    mangled = "\n".join(name for _, name in found)
    names = subprocess.run(["c++filt"], input=mangled, capture_output=True, text=True, check=True).stdout.splitlines()
    table: Table = {}
    for ((architecture, _), counts), name in zip(found.items(), names, strict=True):
        unqualified = re.sub(r"(\w+|\(anonymous namespace\))::", "", name.removeprefix("void "))
        kernel = re.match(r"\w+(<.*?>)?(?=\()", unqualified)[0]
        table.setdefault(f"{source.name}: {kernel}", {})[architecture] = counts
    return table


def measure_cuda(processes: int) -> Table:
    """The table of csrc/cuda, or what nvcc says of the first source that does not compile."""
    setup = runpy.run_path(str(ROOT / "setup.py"))
    with ThreadPoolExecutor(processes) as pool:
        tables = list(pool.map(lambda source: compile_cuda(source, setup), sorted(CUDA.glob("*.cu"))))
    return {name: architectures for table in tables for name, architectures in table.items()}


def nvcc_version() -> str:
    """Such as `nvcc 13.0.88`.

    Raises:
        FileNotFoundError: without nvcc.
    """
    compiler = runpy.run_path(str(ROOT / "setup.py"))["nvcc"]()
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    return "nvcc " + re.search(r"V([\d.]+)", said)[1]


def over_limit(table: Table) -> list[str]:
    """What no GPU should see: spilled registers, and more shared memory than there is."""
    complaints = []
    for name, architectures in table.items():
        for architecture, counts in architectures.items():
            limit = (SHARED_LIMIT | OTHER_LIMITS)[int(architecture.removeprefix("sm_"))]
            if counts["spills"] > 0:
                complaints.append(f"{name} on {architecture}: {counts['spills']} bytes of spilled registers")
            if counts["shared"] > limit:
                complaints.append(f"{name} on {architecture}: {counts['shared']} bytes of shared memory, {limit} exist")
    return complaints


def grown(table: Table, record: Table) -> list[str]:
    """Where a build takes more than its record, or only one of the two has it."""
    complaints = [f"{name}: not in the record" for name in table if name not in record]
    complaints += [f"{name}: recorded, but no longer built" for name in record if name not in table]
    for name in table.keys() & record.keys():
        unmatched = table[name].keys() ^ record[name].keys()
        complaints += [
            f"{name} on {architecture}: in only one of the table and the record" for architecture in unmatched
        ]
        for architecture in table[name].keys() & record[name].keys():
            for key, now in table[name][architecture].items():
                before = record[name][architecture][key]
                if now > before:
                    complaints.append(f"{name} on {architecture}: {key} rose from {before} to {now}")
    return sorted(complaints)


def show(table: Table, record: Table | None) -> None:
    """One line per build: each architecture's counts, and in brackets the recorded ones where they differ."""
    print("registers / spills / shared / instructions")
    for name, architectures in table.items():
        cells = []
        for architecture, counts in architectures.items():
            cell = "/".join(str(counts[key]) for key in COUNTS)
            before = (record or {}).get(name, {}).get(architecture)
            if before is not None and before != counts:
                cell += f" (was {'/'.join(str(before[key]) for key in COUNTS)})"
            cells.append(f"{architecture} {cell}")
        print(f"{name:60s} {'   '.join(cells)}")


def main(arguments: list[str] | None = None) -> int:
    """The command's exit status."""
    parser = argparse.ArgumentParser(
        prog="bench.aot", description="Compile every Triton and CUDA kernel ahead of time."
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--check", action="store_true", help="fail where a kernel grew, spills or does not fit")
    choice.add_argument("--write", action="store_true", help="record the tables of the installed compilers")
    parser.add_argument("--kernels", choices=("triton", "cuda"), help="of one kind only")
    parser.add_argument("--only", default="", help="Triton builds whose name contains this, and no CUDA")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args(arguments)
    if args.only and (args.write or args.kernels == "cuda"):
        parser.error("--only is for looking at some of Triton's builds: leave --write and --kernels cuda out")
    records = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    complaints = []
    for compiler, table in tables(args):
        record = records.get(compiler)
        print(compiler)
        show(table, record)
        wrong = over_limit(table)
        if args.write and not wrong:
            RECORD.write_text(json.dumps(records := records | {compiler: table}, indent=1) + "\n")
        elif record is None:
            print(f"bench/results/aot.json has no record of {compiler}: only the limits are checked")
        elif args.check:
            wrong += grown(table, {name: counts for name, counts in record.items() if args.only in name})
        complaints += wrong
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    if complaints and args.check:
        print("If a rise is meant: python -m bench.aot --write, with the reason in the commit.", file=sys.stderr)
    return 1 if complaints and (args.check or args.write) else 0


def tables(args: argparse.Namespace) -> Iterator[tuple[str, Table]]:
    """(Compiler and version, its table) of what `args` ask for."""
    if args.kernels != "cuda":
        if os.environ.get("TRITON_INTERPRET") == "1":
            raise SystemExit("bench.aot: TRITON_INTERPRET=1 interprets kernels instead of compiling them: unset it")
        with tempfile.TemporaryDirectory() as cache:
            os.environ["TRITON_CACHE_DIR"] = cache  # every build is compiled, and nothing is left behind
            import triton

            names = [name for name in builds() if args.only in name]
            yield f"triton {triton.__version__}", measure(names, args.processes)
    if args.kernels != "triton" and not args.only:
        try:
            compiler = nvcc_version()
        except FileNotFoundError as error:
            if args.kernels == "cuda":
                raise SystemExit(f"bench.aot: {error}") from error
            print(f"csrc/cuda is not compiled: {error}")
        else:
            yield compiler, measure_cuda(args.processes)


if __name__ == "__main__":
    sys.exit(main())
