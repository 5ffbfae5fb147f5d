"""The backends that tests run on: the torch ones, the C++ one under each instruction set of this processor, and
Triton in its interpreter, CUDA where it was built to be emulated. With FASTRL_TEST_DEVICE=cuda: those that run on a
GPU, compiled."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

DEVICE = os.environ.get("FASTRL_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of a kernel

from fastrl.kernels import cuda, native  # noqa: E402

_extension = native.load()[0] if DEVICE == "cpu" else None
NATIVE = tuple(f"cpu-{isa}" for isa in _extension.isas()) if _extension else ()
_cuda = cuda.load_emulated() if DEVICE == "cpu" else cuda.load()[0]
CUDA = ("cuda",) if _cuda else ()
FASTER = ("chunked", *NATIVE, *CUDA, "triton")
BACKENDS = ("reference", *FASTER)


@contextmanager
def using(backend: str) -> Iterator[str]:
    """The name to pass to an op; the instruction set behind a dash is switched on meanwhile."""
    name, _, isa = backend.partition("-")
    if not isa:
        yield name
        return
    extension = native.extension()
    before = extension.isa()
    extension.use(isa)
    try:
        yield name
    finally:
        extension.use(before)
