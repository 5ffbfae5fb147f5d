"""Argument checks and the grammar of error messages: `op: argument: expected X, got Y. Do Z.`"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def sentence(op: str, argument: str, expected: str, got: object, do: str = "") -> str:
    """The message: which argument, what was expected, what came, and what to do."""
    return f"{op}: {argument}: expected {expected}, got {got}." + (f" {do}" if do else "")


def require(
    condition: bool,
    op: str,
    argument: str,
    expected: str,
    got: object,
    do: str = "",
    error: type[Exception] = ValueError,
) -> None:
    """Raises `error` with the standard message unless `condition` holds."""
    if not condition:
        raise error(sentence(op, argument, expected, got, do))


def tensor(op: str, argument: str, value: object, expected: str = "a tensor") -> None:
    """Requires a tensor; of a module or a model's outputs, the message names the part that was meant."""
    import torch

    if not isinstance(value, torch.Tensor):
        parts = (argument, "logps", "last_hidden_state", "hidden_states", "weight")
        part = next((name for name in parts if getattr(value, name, None) is not None), None)
        do = "" if part is None else f"Pass its {part}{'[-1]' if part == 'hidden_states' else ''}."
        raise TypeError(sentence(op, argument, expected, f"a {type(value).__name__}", do))


def shape(op: str, argument: str, given: torch.Tensor, expected: Iterable[int], like: str, do: str = "") -> None:
    """Requires a tensor of a shape; `like` says where it comes from."""
    expected = tuple(expected)
    tensor(op, argument, given, f"a tensor of shape {expected} {like}")
    require(tuple(given.shape) == expected, op, argument, f"shape {expected} {like}", tuple(given.shape), do)


def floating(op: str, argument: str, given: torch.Tensor) -> None:
    """Requires a floating-point tensor of a dtype that kernels compute in: 8-bit types are for storage only."""
    tensor(op, argument, given)
    ok = given.is_floating_point() and given.element_size() > 1
    expected = "a floating-point tensor of 16, 32 or 64 bits"
    require(ok, op, argument, expected, given.dtype, "Cast it first.", TypeError)


def integer(op: str, argument: str, given: torch.Tensor) -> None:
    """Requires an int32 or int64 tensor."""
    import torch

    tensor(op, argument, given)
    require(
        given.dtype in (torch.int64, torch.int32),
        op,
        argument,
        "an int64 or int32 tensor",
        given.dtype,
        "Token ids are integers.",
        TypeError,
    )


def device(op: str, argument: str, tensor: torch.Tensor, expected: torch.device, like: str) -> None:
    """Requires a device; `like` names the tensor that determines it."""
    require(
        tensor.device == expected, op, argument, f"device {expected} as {like}", tensor.device, "Move it with .to()."
    )


def values(op: str, argument: str, tensor: torch.Tensor, good: torch.Tensor, expected: str) -> torch.Tensor:
    """Refuses a tensor with values that are not `good` (bool of its shape), else returns it.

    On a device that it would have to wait for, or in a graph, bad values become NaN instead, which shows in the loss.
    """
    import torch

    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.where(good, tensor, torch.nan)
    bad = tensor[~good]
    require(bad.numel() == 0, op, argument, expected, f"{bad.flatten()[0].item():g}" if bad.numel() else "")
    return tensor


def choice(op: str, argument: str, value: object, choices: Iterable[str]) -> None:
    """Requires one of a set of names; the message suggests the nearest."""
    choices = tuple(choices)
    if value not in choices:
        near = get_close_matches(str(value), choices, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else ""
        raise ValueError(sentence(op, argument, f"one of {', '.join(choices)}", repr(value), hint))
