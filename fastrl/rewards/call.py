"""Calls reward functions, sync and async. An exception costs only the completions it is about."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from fastrl.progress import Progress, tracked, unseen


def call_rewards(
    funcs: Sequence[Callable[..., Any]],
    names: Sequence[str],
    columns: Mapping[str, list[Any]],
    extras: Mapping[str, Any],
    progress: Progress = unseen,
    *,
    timeout: float = math.inf,
) -> list[list[Any]]:
    """One list per function: each completion's value, or the exception that the function raised on it.

    Async functions start first and run on a separate thread, concurrently with each other and with the sync ones, which
    run here in order. A function that raises is called again for each completion alone.

    With a timeout, each sync call runs in its own thread. A call that takes too long is abandoned, because a thread
    cannot be stopped, and is not repeated.

    Args:
        columns: keyword arguments with one value per completion; each function gets its own copy.
        extras: other keyword arguments; `log_extra` and `log_metric` are silenced in repeated calls.
        progress: called before waiting for each function; an exception in it ends the call.
        timeout: seconds that a function may take, and again for all its repeated calls together.
    """
    began = time.monotonic()
    started = [_start(func, columns, extras) for func in funcs]
    calls = list(zip(funcs, names, started, strict=True))
    results = []
    for func, name, answer in tracked(calls, progress):
        until = (began if is_async(func) else time.monotonic()) + timeout
        results.append(_finish(func, name, answer, columns, extras, timeout, until))
    return results


def is_async(func: Callable[..., Any]) -> bool:
    """True for an `async def` function, and for an object whose `__call__` is one."""
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(getattr(func, "__call__", None))  # noqa: B004


class BadReturn(Exception):
    """A function did not return one value per completion."""


class Ended(Exception):
    """A function tried to end the process or its thread."""


class TimedOut(Exception):
    """A function did not answer in time."""


def told(error: BaseException, func: Callable[..., Any]) -> str:
    """An exception's type, text and location: the innermost line in the function's own file, else the innermost."""
    home, _ = defined(func)
    frames = [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]
    own = [place for place in frames if place[0] == home] or [place for place in frames if place[0] != __file__]
    what = str(error) if isinstance(error, (BadReturn, Ended, TimedOut)) else f"{type(error).__name__}: {error}"
    return f"{what} ({spot(*(own[-1] if own else defined(func)))})"


def defined(func: Callable[..., Any]) -> tuple[str | None, int]:
    """The file and line that define a function or a callable object's `__call__`; None for built-in ones."""
    while isinstance(func, functools.partial):
        func = func.func
    func = inspect.unwrap(func)
    code = getattr(func, "__code__", None) or getattr(getattr(type(func), "__call__", None), "__code__", None)  # noqa: B004
    return (code.co_filename, code.co_firstlineno) if code else (None, 0)


def spot(file: str | None, line: int) -> str:
    """A location in a program, for messages."""
    return f"{Path(file).name}, line {line}" if file else "not written in Python"


def shown(value: Any) -> str:
    """The start of a value's `repr`, which is user code and may fail."""
    try:
        return f"{value!r:.80}"
    except Exception as error:
        return f"a {type(value).__name__} that cannot be printed ({type(error).__name__})"


def silent(*_: Any) -> None:
    """A `log_extra` or `log_metric` that does nothing."""


def _start(
    func: Callable[..., Any], columns: Mapping[str, list[Any]], extras: Mapping[str, Any]
) -> Callable[[float], Any]:
    """A callable that takes a deadline and returns the function's result; async functions start right away."""
    arguments = {name: list(values) for name, values in columns.items()} | dict(extras)
    if is_async(func):
        future = asyncio.run_coroutine_threadsafe(_awaited(func, arguments), _loop())
        return lambda until: _result(future, until)
    call = functools.partial(func, **arguments)
    return lambda until: call() if until == math.inf else _result(_in_thread(call, until), until)


def _in_thread(call: Callable[[], Any], until: float) -> Future[Any]:
    """Runs `call` in a thread and returns its future; does not start once the deadline has passed."""
    future: Future[Any] = Future()

    def run() -> None:
        future.set_running_or_notify_cancel()
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    if time.monotonic() < until:
        threading.Thread(target=run, name="fastrl-reward", daemon=True).start()
    return future


def _result(future: Future[Any], until: float) -> Any:
    """The future's result.

    Raises:
        TimedOut: the deadline has passed.
    """
    left = None if until == math.inf else max(0.0, until - time.monotonic())
    if not wait([future], left).done:
        future.cancel()
        raise TimedOut
    return future.result()


def _finish(
    func: Callable[..., Any],
    name: str,
    answer: Callable[[float], Any],
    columns: Mapping[str, list[Any]],
    extras: Mapping[str, Any],
    timeout: float,
    until: float,
) -> list[Any]:
    total = len(columns["completions"])
    try:
        return _as_list(answer(until), total)
    except BadReturn as error:  # about the function, not about a completion
        return [error] * total
    except TimedOut:  # not repeated per completion: it might time out each time
        left = "" if is_async(func) else "; its thread was abandoned, and may still run"
        return [TimedOut(f"no answer within {timeout:g} s{left}")] * total
    # Whatever a user's function raises is reported with its completions, even sys.exit, which would otherwise end the
    # run as if it had finished.
    except (Exception, SystemExit) as error:
        failure = Ended(f"{type(error).__name__}({error})") if isinstance(error, SystemExit) else error
        if total == 1:
            return [failure.with_traceback(error.__traceback__)]
        quiet = dict(extras) | {"log_extra": silent, "log_metric": silent}
        singles = [{key: values[place : place + 1] for key, values in columns.items()} for place in range(total)]
        until = time.monotonic() + timeout
        started = [_start(func, single, quiet) for single in singles]
        return [
            value
            for single, again in zip(singles, started, strict=True)
            for value in _finish(func, name, again, single, quiet, timeout, until)
        ]


def _as_list(values: Any, total: int) -> list[Any]:
    """A function's return value (list, tuple, or one-dimensional array, tensor or series) as a list of `total`."""
    got = None
    if hasattr(values, "tolist") and len(getattr(values, "shape", ())) == 1:
        values = values.tolist()
    if isinstance(values, Sequence) and not isinstance(values, (str, bytes)):
        if len(values) == total:
            return list(values)
        got = f"{len(values)} values"
    raise BadReturn(
        f"return value: expected a list of {total}, one per completion, got {got or shown(values)}. Return None for a "
        "completion that it does not apply to."
    )


async def _awaited(func: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    try:
        return await func(**arguments)
    except (SystemExit, KeyboardInterrupt, asyncio.CancelledError) as error:
        # These would end the loop's thread, and everything that waits for it would wait forever.
        raise Ended(f"{type(error).__name__}({error})").with_traceback(error.__traceback__) from None


@functools.lru_cache(maxsize=1)
def _loop() -> asyncio.AbstractEventLoop:
    # One loop for the life of the process, because clients kept by async rewards belong to the loop they were made on.
    # It has its own thread, because a notebook already runs a loop on this one.
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="fastrl-rewards", daemon=True).start()
    return loop
