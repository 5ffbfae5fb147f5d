"""Metadata is static in pyproject.toml; this file builds the native CPU kernels where there is a compiler."""

from __future__ import annotations

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

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


class BuildKernels(build_ext):
    """Compiles csrc/cpu/isa.cpp once per instruction set. Without a working compiler the package installs without the
    extension, and `fastrl doctor` shows the reason that was left in `_cpu_build.txt`."""

    def build_extension(self, ext: Extension) -> None:
        """One object per instruction set, then the module."""
        # Into what is being installed, and into the tree, which is where an editable installation runs.
        reasons = [
            folder / "_cpu_build.txt" for folder in (Path(self.get_ext_fullpath(ext.name)).parent, Path("fastrl"))
        ]
        try:
            import pybind11

            ext.include_dirs = [pybind11.get_include()]
            extra = os.environ.get("FASTRL_CXXFLAGS", "").split()
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
                elif isa == "scalar" or extra:  # who sets flags wants to see what fails
                    raise failure
                else:
                    self.warn(f"no kernels for {isa}, which this compiler does not know: {failure}")
            super().build_extension(ext)
            for reason in reasons:
                reason.unlink(missing_ok=True)
        except Exception as error:
            for reason in reasons:
                reason.parent.mkdir(parents=True, exist_ok=True)
                reason.write_text(f"{type(error).__name__}: {error}\n")
            raise

    def compile_isa(self, ext: Extension, isa: str) -> list[str]:
        """The object file of one instruction set."""
        return self.compiler.compile(
            [str(CSRC / "cpu" / "isa.cpp")],
            output_dir=str(Path(self.build_temp) / isa),
            macros=[("FASTRL_ISA", isa)],
            extra_postargs=[*ext.extra_compile_args, *ISAS[isa]],
            depends=ext.depends,
        )


setup(
    ext_modules=[
        Extension(
            "fastrl._cpu",
            [str(CSRC / "bind_cpu.cpp")],
            depends=[str(path) for path in sorted(CSRC.rglob("*.h"))],
            optional=True,  # a failure to build is a warning, not a failure to install
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
