"""Registering an operator with torch: schema, kernel, fake, autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class Operator:
    """A function that `torch.library` knows under a name, called through the dispatcher.

    `torch.library.custom_op` offers the same and imports the compiler at the first call: 140 MB of resident memory, and
    a second or more, in every process that runs one op eagerly. These are the public functions it is made of.
    """

    def __init__(
        self, name: str, function: Callable[..., Any], mutates_args: Sequence[str] = (), schema: str | None = None
    ) -> None:
        self.name, self.__doc__ = name, function.__doc__
        torch.library.define(name, schema or torch.library.infer_schema(function, mutates_args=mutates_args))
        torch.library.impl(name, "CompositeExplicitAutograd", function)
        namespace, _, stem = name.partition("::")
        self.overload = getattr(getattr(torch.ops, namespace), stem).default

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.overload(*args, **kwargs)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """How the outputs look, for tracing."""
        return torch.library.register_fake(self.name, function)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """The derivative."""
        torch.library.register_autograd(self.name, backward, setup_context=setup_context)


def operator(
    name: str, *, mutates_args: Sequence[str] = (), schema: str | None = None
) -> Callable[[Callable[..., Any]], Operator]:
    """Decorates an operator's kernel, which runs below autograd on every device."""
    return lambda function: Operator(name, function, mutates_args, schema)
