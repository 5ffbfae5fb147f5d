"""The backends that tests run on: the torch ones, and the native one under each instruction set of this processor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastrl.kernels import native

_extension = native.load()[0]
NATIVE = tuple(f"native-{isa}" for isa in _extension.isas()) if _extension else ()
FASTER = ("chunked", *NATIVE)
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
