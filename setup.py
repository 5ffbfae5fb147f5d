"""Metadata is static in pyproject.toml; this file builds the native kernels where there is a compiler for them.

fastrl._cpu            wherever there is a C++ compiler
fastrl._cuda           with nvcc: on `python setup.py build_ext --inplace`, or with FASTRL_CUDA=1;
                       never with FASTRL_CUDA=0. A plain `pip install` does not look for nvcc: it neither
                       waits for it nor fails with it.
fastrl._cuda_emulated  with FASTRL_EMULATE_CUDA=1: the CUDA kernels on the CPU, for tests
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

CSRC = Path("csrc")
# How a vector is passed without its instruction set (-Wpsabi) is no matter: it never leaves its object file.
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi"]
COMMON = ["-std=c++17", "-O3", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno", *WARNINGS]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"]
# gcc 12 takes the undefined operands inside its own AVX-512 intrinsics for uninitialised variables (gcc bug 105593).
AVX512 += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
ISAS = {"scalar": []}
if platform.machine() in ("x86_64", "AMD64"):
    AVX512_BF16 = [*AVX512, "-mavx512bf16"]
    ISAS |= {"avx2": ["-mavx2", "-mfma", "-mf16c"], "avx512": AVX512, "avx512_bf16": AVX512_BF16}
    ISAS |= {"amx": [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"]}
    # To test the AMX kernels where there is no AMX. With an extension that is already built: build_ext --force.
    if os.environ.get("FASTRL_EMULATE_TILES") == "1":
        ISAS |= {"amx_emulated": [*AVX512_BF16, "-DFASTRL_EMULATE_TILES"]}

# A product and a sum are rounded apart, as in the CPU kernels and in torch, unless the code says fma.
NVCC = ["-shared", "-Xcompiler=-fPIC,-fvisibility=hidden", "-fmad=false", "--threads=0"]
# longjmp between stacks is how the emulated threads switch, and what a fortified one takes for an attack.
EMULATED = ["-shared", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE", "-ffp-contract=off"]
EMULATED += ["-DFASTRL_EMULATE_CUDA", *WARNINGS, "-Wno-unknown-pragmas", "-x", "c++"]


def nvcc() -> str:
    """The compiler of CUDA_HOME, else of PATH, else of where CUDA is by default."""
    for folder in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), None, "/usr/local/cuda"):
        found = shutil.which("nvcc", path=os.path.join(folder, "bin") if folder else None)
        if found:
            return found
    raise FileNotFoundError("no nvcc under CUDA_HOME, on PATH or in /usr/local/cuda/bin")


def architectures(compiler: str) -> dict[str, str]:
    """What this nvcc compiles for, real and virtual: every sm_8x runs the code of sm_80, and a GPU newer than the last
    compiles its PTX when it first loads it."""
    known = subprocess.run([compiler, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    found = {f"sm_{number}": f"compute_{number}" for number in (80, 90, 100) if f"sm_{number}" in known}
    newest = list(found.values())[-1]
    return found | {newest: newest}


def flags(variable: str) -> list[str]:
    """Extra compiler flags. Who sets them wants to see what fails."""
    return os.environ.get(variable, "").split()


class BuildKernels(build_ext):
    """Without a working compiler the package installs without the extension, and `fastrl doctor` shows the reason that
    was left in `<extension>_build.txt`."""

    def build_extension(self, ext: Extension) -> None:
        """Builds, or leaves the reason why not."""
        build = {"_cpu": self.build_cpu, "_cuda": self.build_cuda, "_cuda_emulated": self.build_emulated}
        name = ext.name.rpartition(".")[2]
        module = Path(self.get_ext_fullpath(ext.name))
        # Into what is being installed, and into the tree, which is where an editable installation runs.
        reasons = [folder / f"{name}_build.txt" for folder in (module.parent, Path("fastrl"))]
        try:
            import pybind11

            ext.include_dirs = [pybind11.get_include()]
            module.parent.mkdir(parents=True, exist_ok=True)
            build[name](ext)
            for reason in reasons:
                reason.unlink(missing_ok=True)
        except Exception as error:
            for reason in reasons:
                reason.parent.mkdir(parents=True, exist_ok=True)
                reason.write_text(f"{type(error).__name__}: {error}\n")
            raise

    def build_cpu(self, ext: Extension) -> None:
        """Compiles csrc/cpu/isa.cpp once per instruction set, then the module."""
        extra = flags("FASTRL_CXXFLAGS")
        ext.extra_compile_args = [*COMMON, *extra]
        # OpenMP is not linked: the loader hands over the very copy that torch runs its own threads with.
        ext.extra_link_args = [flag for flag in extra if flag.startswith("-fsanitize")]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = {isa: pool.submit(self.compile_isa, ext, isa) for isa in ISAS}
        for isa, job in jobs.items():
            failure = job.exception()
            if failure is None:
                ext.extra_objects += job.result()
                ext.define_macros.append((f"FASTRL_HAS_{isa}", "1"))
            elif isa == "scalar" or extra:
                raise failure
            else:
                self.warn(f"no kernels for {isa}, which this compiler does not know: {failure}")
        super().build_extension(ext)

    def compile_isa(self, ext: Extension, isa: str) -> list[str]:
        """The object file of one instruction set."""
        return self.compiler.compile(
            [str(CSRC / "cpu" / "isa.cpp")],
            output_dir=str(Path(self.build_temp) / isa),
            macros=[("FASTRL_ISA", isa)],
            extra_postargs=[*ext.extra_compile_args, *ISAS[isa]],
            depends=ext.depends,
        )

    def build_cuda(self, ext: Extension) -> None:
        """One fat binary by one call of nvcc, which links its runtime statically."""
        compiler = nvcc()
        targets = architectures(compiler)
        generate = [f"-gencode=arch={virtual},code={real}" for real, virtual in targets.items()]
        self.build_at_once(ext, [compiler, *NVCC, *generate, *flags("FASTRL_NVCCFLAGS")], ", ".join(targets))

    def build_emulated(self, ext: Extension) -> None:
        """The same sources as plain C++."""
        compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
        self.build_at_once(ext, [compiler, *flags("FASTRL_CXXFLAGS"), *EMULATED], "emulated")

    def build_at_once(self, ext: Extension, command: list[str], targets: str) -> None:
        """Compiles and links all sources, unless the module is newer than they are."""
        module = Path(self.get_ext_fullpath(ext.name))
        newest = max(Path(path).stat().st_mtime for path in (*ext.sources, *ext.depends, __file__))
        if not self.force and module.exists() and module.stat().st_mtime > newest:
            return
        command += ["-std=c++17", "-O3", f"-DFASTRL_CUDA_MODULE={ext.name.rpartition('.')[2]}"]
        command += [f'-DFASTRL_CUDA_ARCHITECTURES="{targets}"']
        for folder in (*ext.include_dirs, sysconfig.get_path("include")):
            command += ["-isystem", folder]
        self.spawn([*command, *ext.sources, "-o", str(module)])


class WithRecipes(build_py):
    """A wheel has the recipes inside the package; a source tree has them at its root."""

    def run(self) -> None:
        """As the base class, and copies them."""
        super().run()
        if not self.editable_mode:
            inside = Path(self.build_lib) / "fastrl" / "recipes"
            shutil.copytree("recipes", inside, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))


def extension(name: str, sources: list[Path]) -> Extension:
    """A module that is built anew when a header changes; a failure is a warning, not a failure to install."""
    headers = [str(path) for path in sorted(CSRC.rglob("*.h"))]
    return Extension(f"fastrl.{name}", [str(path) for path in sources], depends=headers, optional=True)


def extensions() -> list[Extension]:
    """What this command and this environment ask for."""
    cuda = [CSRC / "bind_cuda.cu", *sorted((CSRC / "cuda").glob("*.cu"))]
    found = [extension("_cpu", [CSRC / "bind_cpu.cpp"])]
    if os.environ.get("FASTRL_CUDA", "1" if "build_ext" in sys.argv else "0") == "1":
        found.append(extension("_cuda", cuda))
    if os.environ.get("FASTRL_EMULATE_CUDA") == "1":
        found.append(extension("_cuda_emulated", cuda))
    return found


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels, "build_py": WithRecipes})
