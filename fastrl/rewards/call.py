"""Calling reward functions, sync and async, so that an exception costs no more than the completions it is about."""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastrl import check
from fastrl.progress import Progress, tracked, unseen


def call_rewards(
    funcs: Sequence[Callable[..., Any]],
    names: Sequence[str],
    columns: Mapping[str, list[Any]],
    extras: Mapping[str, Any],
    progress: Progress = unseen,
) -> list[list[Any]]:
    """One list per function, with each completion's value, or the exception that the function raised on it.

    The async functions are started first; they run on a thread of their own, concurrently with one another and with the
    sync ones, which run here in order. A function that raises is called again for each completion by itself.

    Args:
        columns: keyword arguments that are lists with one value per completion; each function gets its own copy.
        extras: further keyword arguments; `log_extra` and `log_metric` are silenced in repeated calls.
        progress: told of the functions, before each is waited for; what it raises ends the call.

    Raises:
        ValueError: a function returned another number of values than there are completions.
    """
    started = [_start(func, columns, extras) for func in funcs]
    calls = list(zip(funcs, names, started, strict=True))
    return [_finish(func, name, wait, columns, extras) for func, name, wait in tracked(calls, progress)]


def is_async(func: Callable[..., Any]) -> bool:
    """True for an `async def` function, and for an object whose `__call__` is one."""
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(getattr(func, "__call__", None))  # noqa: B004


def silent(*_: Any) -> None:
    """A `log_extra` or `log_metric` that keeps nothing."""


def _start(func: Callable[..., Any], columns: Mapping[str, list[Any]], extras: Mapping[str, Any]) -> Callable[[], Any]:
    """What gives the function's result when called; an async function is running by then."""
    arguments = {name: list(values) for name, values in columns.items()} | dict(extras)
    if is_async(func):
        return asyncio.run_coroutine_threadsafe(_awaited(func, arguments), _loop()).result
    return functools.partial(func, **arguments)


def _finish(
    func: Callable[..., Any],
    name: str,
    wait: Callable[[], Any],
    columns: Mapping[str, list[Any]],
    extras: Mapping[str, Any],
) -> list[Any]:
    total = len(columns["completions"])
    try:
        values = wait()
    # Whatever a user's function raises is about its completions, and is reported with them.
    except Exception as error:
        if total == 1:
            return [error]
        quiet = dict(extras) | {"log_extra": silent, "log_metric": silent}
        singles = [{key: values[place : place + 1] for key, values in columns.items()} for place in range(total)]
        started = [_start(func, single, quiet) for single in singles]
        return [
            value
            for single, again in zip(singles, started, strict=True)
            for value in _finish(func, name, again, single, quiet)
        ]
    check.require(
        hasattr(values, "__len__") and len(values) == total,
        f"reward {name!r}",
        "return value",
        f"a list of {total}, one per completion",
        f"{len(values)} values" if hasattr(values, "__len__") else repr(values),
        "Return None in the place of a completion that it does not apply to.",
    )
    return list(values)


async def _awaited(func: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    return await func(**arguments)


@functools.lru_cache(maxsize=1)
def _loop() -> asyncio.AbstractEventLoop:
    # One loop for the life of the process, since clients that async rewards keep belong to the loop they were made on;
    # and on its own thread, since a notebook already runs one on this.
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="fastrl-rewards", daemon=True).start()
    return loop
