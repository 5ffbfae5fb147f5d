"""Runs the tests of solutions, inside the sandbox. Standard library only.

Tests and solution are two processes, so that a solution can neither read the tests nor change what they compare: it
gets a call's arguments and answers with plain data. Standard input is the number of jobs, then a job per line; every
line of standard output is the verdict on one test, or null at a job's end, and a solution has neither.
"""

from __future__ import annotations

import builtins
import collections.abc
import io
import itertools
import json
import os
import signal
import sys
from typing import Any, NoReturn, TextIO

COUNT = 8  # bytes of the number of jobs
MOST_ITEMS = 100_000  # of an iterator that a solution returns
SCALARS = (bool, int, float, str)
SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
STREAMS = (
    collections.abc.Iterator,
    collections.abc.KeysView,
    collections.abc.ValuesView,
    collections.abc.ItemsView,
    range,
)
# What a test does to an object of the solution; comparisons are not among them, as the solution would decide them.
SPECIAL = ("__len__", "__getitem__", "__setitem__", "__delitem__", "__contains__", "__iter__", "__next__", "__str__")


class Unfit(BaseException):
    """The tests ask for something that cannot be asked of another process."""


class Ended(BaseException):
    """The solution's process has ended."""


def main() -> None:
    """Judges the jobs on standard input."""
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)
    if int(os.read(0, COUNT)) == 1:  # not a byte more: the solution's memory has none of the tests
        channel = fork_solution()
        judge(json.loads(sys.stdin.readline()), channel)
    else:  # of solutions that may know their tests, such as references
        for number, line in enumerate(sys.stdin):
            judge_apart(number, json.loads(line))


def judge_apart(number: int, job: dict[str, Any]) -> None:
    """Judges a job in a process and a folder of its own, and ends all that it started."""
    process = os.fork()
    if process == 0:
        os.setsid()
        os.mkdir(str(number))
        os.chdir(str(number))
        signal.alarm(job["seconds"])
        judge(job, fork_solution())
        os._exit(0)
    os.waitpid(process, 0)
    try:  # noqa: SIM105 - without contextlib the harness starts faster
        os.killpg(process, signal.SIGKILL)
    except ProcessLookupError:
        pass
    verdict(None)


def judge(job: dict[str, Any], channel: tuple[TextIO, TextIO]) -> None:
    """Judges a job by the solution's process, which is at the other end of `channel`."""
    try:
        if job["cases"]:
            for end in channel:  # it ends too
                end.close()
            judge_cases(job)
        else:
            judge_tests(job, Solution(job["solution"], job["path"], *channel))
    except Unfit as error:
        verdict({"unfit": str(error)})


def fork_solution() -> tuple[TextIO, TextIO]:
    """Starts the solution's process, which waits for its source; returns where to write to it and read from it."""
    (requests_out, requests_in), (replies_out, replies_in) = os.pipe(), os.pipe()
    if os.fork() == 0:
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):  # the tests, the verdicts, and what is said of them
            os.dup2(nothing, number)
        for number in (nothing, requests_in, replies_out):
            os.close(number)
        serve(os.fdopen(requests_out), os.fdopen(replies_in, "w"))
    for number in (requests_out, replies_in):
        os.close(number)
    return os.fdopen(requests_in, "w"), os.fdopen(replies_out)


def verdict(what: Any) -> None:
    """One line of the verdict."""
    print(json.dumps(what), file=sys.__stdout__, flush=True)


def judge_cases(job: dict[str, Any]) -> None:
    """Runs the solution as a program once per case and compares what it prints."""
    import subprocess  # the other kind of tests starts faster without it

    with open("solution.py", "w", encoding="utf-8", errors="surrogatepass") as file:
        file.write(f"import sys; sys.path += {job['path']!r}\n" if job["path"] else "")
        file.write(job["solution"])
    for case in job["cases"]:
        with open("in", "w+", encoding="utf-8") as given, open("out", "w+b") as printed:
            os.unlink("in"), os.unlink("out")
            given.write(case["input"])
            given.seek(0)
            command = [sys.executable, "-I", "-S", "-B", "solution.py"]
            done = subprocess.run(command, stdin=given, stdout=printed, stderr=subprocess.DEVNULL, close_fds=True)
            printed.seek(0)
            text = printed.read().decode("utf-8", "replace")
        verdict(done.returncode == 0 and lines(text) == lines(case["output"]))


def lines(text: str) -> list[str]:
    """The lines of a text without white space at their ends, nor empty ones at the text's end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def judge_tests(job: dict[str, Any], solution: Solution) -> None:
    """Runs the tests, with stand-ins for the functions of the solution."""
    sys.path += job["path"]
    # Only the names that are tested: a solution may define others, such as `all`, that tests mean otherwise.
    namespace = {"__name__": "tests"} | {name: solution.names[name] for name in job["names"] if name in solution.names}
    sys.stdout = io.StringIO()  # what tests print is no verdict
    try:
        exec(compile(job["setup"], "setup", "exec"), namespace)
    except Exception as error:
        raise Unfit(f"test_setup fails with {type(error).__name__}: {error}") from None
    for test in job["tests"]:
        try:
            exec(compile(test, "test", "exec"), namespace)
            passed = not solution.ended
        except Unfit:
            raise
        except BaseException:
            passed = False
        finally:
            if solution.unfit:  # a test may have caught it
                raise Unfit(solution.unfit)
        verdict(passed)


class Solution:
    """The solution's process."""

    def __init__(self, source: str, path: list[str], requests: TextIO, replies: TextIO) -> None:
        self.ended, self.unfit, self.names = False, "", {}
        self._requests, self._replies = requests, replies
        try:
            names = self.ask({"source": source, "path": path})
        except (Ended, Exception):
            return
        self.names = {name: self.unpack(value) for name, value in names.items()}

    def ask(self, request: dict[str, Any]) -> Any:
        """The solution's answer, or the exception that it raised."""
        try:
            print(json.dumps(request), file=self._requests, flush=True)
            reply = json.loads(self._replies.readline())
        except (OSError, ValueError):
            self.ended = True
            raise Ended from None
        if "raised" in reply:
            kind = getattr(builtins, str(reply["raised"]), None)
            known = isinstance(kind, type) and issubclass(kind, Exception)
            raise (kind if known else RuntimeError)(reply["text"])
        return reply["value"]

    def call(self, handle: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls an object of the solution, or a method of it, and changes list arguments as the call did."""
        given = [self.pack(value) for value in args], {key: self.pack(value) for key, value in kwargs.items()}
        value, after = self.ask({"handle": handle, "name": name, "args": given[0], "kwargs": given[1]})
        for old, packed in zip(args, after, strict=True):
            if type(old) in (list, dict, set):
                new = self.unpack(packed)
                if type(new) is type(old):
                    old.clear()
                    (old.extend if type(old) is list else old.update)(new)
        return self.unpack(value)

    def pack(self, value: Any) -> Any:
        """A test's value as JSON."""
        return pack(value, self._other)

    def unpack(self, value: Any) -> Any:
        """A solution's value; its objects become stand-ins."""
        return unpack(value, lambda handle: Remote(self, int(handle)))

    def _other(self, value: Any) -> int:
        if isinstance(value, Remote):
            return value._handle
        self.unfit = f"a test passes the solution a {type(value).__name__}, and only plain data can be passed"
        raise Unfit(self.unfit)


class Remote:
    """An object or a function of the solution: what is done to it happens there. It equals nothing but itself."""

    def __init__(self, solution: Solution, handle: int) -> None:
        self._solution, self._handle = solution, handle

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._solution.call(self._handle, "", args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return self._solution.call(self._handle, "__getattribute__", (name,), {})

    def __bool__(self) -> bool:
        return True


def special(name: str) -> Any:
    """A special method that happens at the solution's."""
    return lambda self, *args: self._solution.call(self._handle, name, args, {})


for _name in SPECIAL:
    setattr(Remote, _name, special(_name))


def pack(value: Any, other: Any) -> Any:
    """A value as JSON: scalars as they are, others as {kind: ...}; `other` numbers what is no plain data."""
    if value is None or isinstance(value, SCALARS):
        kind = next((kind for kind in SCALARS if isinstance(value, kind)), None)
        return value if kind is None else kind(value)
    for name, kind in SEQUENCES.items():
        if isinstance(value, kind):
            return {name: [pack(item, other) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[pack(key, other), pack(item, other)] for key, item in value.items()]}
    if isinstance(value, (bytes, complex)):
        return {"literal": repr(value)}
    if isinstance(value, STREAMS):
        return {"stream": [pack(item, other) for item in itertools.islice(value, MOST_ITEMS)]}
    if hasattr(value, "tolist"):
        return pack(value.tolist(), other)
    return {"handle": other(value)}


def unpack(value: Any, handled: Any) -> Any:
    """The value that `pack` packed; `handled` is what a number stands for."""
    if not isinstance(value, dict):
        return value
    ((name, inside),) = value.items()
    if name == "handle":
        return handled(inside)
    if name == "literal":
        import ast

        return ast.literal_eval(inside)
    if name == "dict":
        return {unpack(key, handled): unpack(item, handled) for key, item in inside}
    items = [unpack(item, handled) for item in inside]
    return iter(items) if name == "stream" else SEQUENCES[name](items)


def serve(requests: TextIO, replies: TextIO) -> NoReturn:
    """The solution's process: runs its source, then what it is asked to call."""
    objects: list[Any] = []

    def other(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    def start(request: dict[str, Any]) -> Any:
        sys.path += request["path"]
        module = {"__name__": "solution"}
        exec(compile(request["source"], "solution.py", "exec"), module)
        public = {name: value for name, value in module.items() if name not in ("__name__", "__builtins__")}
        kept = {name: value for name, value in public.items() if callable(value) or isinstance(value, SCALARS)}
        return {name: pack(value, other) for name, value in kept.items()}

    def call(request: dict[str, Any]) -> Any:
        def here(packed: Any) -> Any:
            return unpack(packed, objects.__getitem__)

        args = [here(value) for value in request["args"]]
        kwargs = {name: here(value) for name, value in request["kwargs"].items()}
        target, name = objects[request["handle"]], request["name"]
        # A class has its attributes and methods from its own type.
        got = (
            (getattr(target, args[0]) if name == "__getattribute__" else getattr(target, name)(*args))
            if name
            else (target(*args, **kwargs))
        )
        return [pack(got, other), [pack(value, other) for value in args]]

    for line in requests:
        request = json.loads(line)
        try:
            reply = {"value": start(request) if "source" in request else call(request)}
            text = json.dumps(reply)
        except BaseException as error:
            text = json.dumps({"raised": type(error).__name__, "text": str(error)[:1000]})
        print(text, file=replies, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
