"""Correctness gate, interleaved timing, peak memory, and where it all ran."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

from fastrl.kernels import cuda, native

Outputs = dict[str, torch.Tensor]
Provider = Callable[[], Outputs]

# Relative RMS error above which a provider is wrong rather than rounded: a few roundings of the dtype. Summation over
# a vocabulary costs float32 more of its digits than it costs 16 bits.
WRONG = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
SAMPLE_SECONDS = 5e-3  # a shorter call is repeated within one sample
SLOW_SECONDS = 20.0  # a first call that takes longer is the only one: a warm-up changes little of it


@dataclass(frozen=True)
class Case:
    """One op on one shape: `truth` in float64, and the providers that compute the same named outputs."""

    label: str
    dtype: torch.dtype
    truth: Provider
    providers: dict[str, Provider]
    absent: dict[str, str] = field(default_factory=dict)  # provider -> why it is not measured
    flops: float = 0.0  # of the matmuls that no provider can do without; 0 where there are none


@dataclass
class Result:
    """One provider on one case. `status`: ok, wrong, OOM, failed or absent; only ok has times."""

    provider: str
    status: str
    detail: str = ""
    errors: dict[str, float] = field(default_factory=dict)  # output -> relative RMS error against float64
    median: float | None = None  # seconds
    low: float | None = None  # 20 % quantile
    high: float | None = None  # 80 % quantile
    peak_bytes: int | None = None  # above what was in use before the call
    worst: dict[str, float] = field(default_factory=dict)  # output -> largest absolute error against float64
    device_seconds: float | None = None  # of all kernels and copies of a call, on a GPU
    samples: int = 0

    @property
    def error(self) -> float | None:
        """The worst of the outputs."""
        return max(self.errors.values()) if self.errors else None


def measure(case: Case, rounds: int, device: torch.device) -> list[Result]:
    """Gate, then memory, then `rounds` interleaved rounds; a different provider starts each round.

    Of a provider whose first call takes more than `SLOW_SECONDS`, that call is the measurement.
    """
    truth = case.truth()
    results = {name: _gate(name, run, truth, WRONG[case.dtype], device) for name, run in case.providers.items()}
    del truth
    right = [name for name, result in results.items() if result.status == "ok" and result.median is None]
    calls = {}
    for name in right:
        began = time.perf_counter()
        results[name].peak_bytes = peak_extra(case.providers[name], device)
        slow = time.perf_counter() - began > 1.0  # then one call is sample enough, and need not be timed to know it
        results[name].device_seconds = device_seconds(case.providers[name], device)
        calls[name] = 1 if slow else _calls(case.providers[name], device)
    seconds: dict[str, list[float]] = {name: [] for name in right}
    for turn in range(rounds):
        start = turn % max(len(right), 1)
        for name in right[start:] + right[:start]:
            seconds[name].append(_seconds(case.providers[name], calls[name], device))
    for name, times in seconds.items():
        result = results[name]
        result.low, result.median, result.high = quantiles(times)
        result.samples = rounds * calls[name]
    return [*results.values(), *(Result(name, "absent", why) for name, why in case.absent.items())]


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP per second of one large `torch.mm` in this dtype, the median of five; on a CPU at least that in float32.

    A CPU without instructions for a dtype multiplies it a hundred times slower, which says nothing of what it can do.
    """
    if (
        device.type == "cpu"
        and dtype.itemsize < 4
        and _rate(dtype, device, 256, 1) < _rate(torch.float32, device, 256, 1)
    ):
        dtype = torch.float32
    return _rate(dtype, device, 2048 if device.type == "cpu" else 8192, 5)


def _rate(dtype: torch.dtype, device: torch.device, size: int, rounds: int) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    torch.mm(a, b)
    return 2 * size**3 / statistics.median(_seconds(lambda: {"": torch.mm(a, b)}, 1, device) for _ in range(rounds))


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """(20 %, median, 80 %)."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


def _gate(name: str, run: Provider, truth: Outputs, limit: float, device: torch.device) -> Result:
    """Runs a provider once, which also warms it up, and compares all its outputs."""
    got: Outputs = {}
    began = time.perf_counter()
    try:
        peak = peak_extra(lambda: got.update(run()), device)
        if not got:  # where nobody can tell the peak
            got = run()
    except Exception as error:  # a peer may raise whatever its compiler does; that is shown, and the next one measured
        first = str(error).strip().partition("\n")[0]
        return Result(name, "OOM" if out_of_memory(error) else "failed", first)
    seconds = time.perf_counter() - began
    errors = {output: relative_error(got[output], expected) for output, expected in truth.items()}
    worst = {output: (got[output].detach().to(x.dtype) - x).abs().max().item() for output, x in truth.items()}
    bad = [output for output, error in errors.items() if not error <= limit]
    if bad:
        return Result(name, "wrong", f"{', '.join(bad)} beyond {limit:g}", errors, worst=worst)
    if seconds < SLOW_SECONDS:
        return Result(name, "ok", "", errors, worst=worst)
    once = {"median": seconds, "low": seconds, "high": seconds, "peak_bytes": peak, "samples": 1}
    return Result(name, "ok", "one call, the first", errors, worst=worst, **once)


def relative_error(got: torch.Tensor, truth: torch.Tensor) -> float:
    """||got - truth|| / ||truth||; the plain norm of `got` where truth is zero."""
    difference = got.detach().to(truth.dtype) - truth
    scale = truth.norm().item()
    return difference.norm().item() / (scale or 1.0)


def out_of_memory(error: BaseException) -> bool:
    """True for an allocation that failed, on either kind of device."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    return "can't allocate memory" in str(error) or "not enough memory" in str(error)


def _calls(run: Provider, device: torch.device) -> int:
    return max(1, round(SAMPLE_SECONDS / max(_seconds(run, 1, device), 1e-7)))


def _seconds(run: Provider, calls: int, device: torch.device) -> float:
    """Seconds of one call, a mean over `calls`: on a GPU between two events on its stream, else by the clock."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls


def device_seconds(run: Provider, device: torch.device, calls: int = 5) -> float | None:
    """Seconds that a GPU works on one call: what is left of a short call when the host costs nothing. None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            run()
        torch.cuda.synchronize(device)
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6 / calls


def peak_extra(run: Provider, device: torch.device) -> int | None:
    """Bytes that a call needs at its peak, outputs included, above what was in use before it.

    On a GPU the allocator's own count. On Linux the process's resident high-water mark, which the kernel resets on
    request: free memory is given back first, so that reuse does not hide a need. None elsewhere.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    reset = Path("/proc/self/clear_refs")
    if platform.system() != "Linux" or not os.access(reset, os.W_OK):
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    reset.write_text("5")
    before = resident_bytes("VmRSS")
    run()
    return max(0, resident_bytes("VmHWM") - before)


def resident_bytes(which: str) -> int:
    """`VmRSS`, what is resident now, or `VmHWM`, the most that ever was, of this process."""
    found = re.search(rf"^{which}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def environment(device: torch.device) -> dict[str, str | int]:
    """What a number depends on besides the code: machine, threads, versions, commit."""
    about: dict[str, str | int] = {
        "machine": machine(device),
        "cpu": _cpu_name(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "native": native.load()[1],
        "cuda": f"{torch.version.cuda}, kernels {cuda.load()[1]}" if device.type == "cuda" else "not used",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    for package in ("torch", "transformers", "trl", "liger-kernel", "triton"):
        try:
            about[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            about[package] = "absent"
    return about


def machine(device: torch.device) -> str:
    """A folder name for results: the GPU, or the CPU and its number of cores."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_cpu_name()} {os.cpu_count()}c"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def commit() -> str:
    """The commit that was measured, marked where tracked files differ from it."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return head.stdout.strip() + ("-dirty" if dirty.stdout.strip() else "") if head.returncode == 0 else "unknown"
