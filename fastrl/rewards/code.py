"""Whether the code in a completion passes tests, in a sandbox."""

from __future__ import annotations

import ast
import asyncio
import builtins
import contextlib
import json
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import chain
from math import ceil
from pathlib import Path
from typing import Any, Literal

from fastrl import check
from fastrl.rewards.code_harness import COUNT
from fastrl.rewards.extract import completion_text
from fastrl.rewards.sandbox import Limits, Outcome, SandboxError, require_isolation, run_sandboxed
from fastrl.types import Prompt

HARNESS = Path(__file__).with_name("code_harness.py")
TOGETHER = 16  # solutions that are no model's, in one sandbox
BLOCK = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)
PYTHON = ("", "py", "python", "python3")
Take = Literal["last_block", "first_block", "full"]


@dataclass(frozen=True)
class Tests:
    """The tests of one prompt."""

    names: tuple[str, ...] = ()  # what the tests take from the solution
    setup: str = ""
    scripts: tuple[str, ...] = ()
    cases: tuple[dict[str, str], ...] = ()  # of programs: input and output

    def __len__(self) -> int:
        return len(self.scripts) + len(self.cases)


@dataclass(frozen=True)
class CodeReward:
    """1 if the code passes all tests of its prompt, else 0: the verifiable reward of code (arXiv:2411.15124, section 6;
    arXiv:2501.12948, section 2.2.2). None without tests.

    A prompt's tests are a list of Python scripts such as `assert f(2) == 4`, one script, or a list of
    `{"input": ..., "output": ...}` for programs that read standard input; also as JSON text. Scripts run in a process
    of their own: what they compare never reaches the solution, whose functions take and return plain data there. A name
    that scripts use without defining it is the solution's. Outputs are equal if all lines are, but for white space at
    their ends.

    A completion without a block of code, with an error or over a limit scores 0. If the sandbox itself fails, the
    reward raises, so that the completion counts as not scored.

    Args:
        extract: the last or the first closed ``` block of Python after any </think>, or the whole completion.
        partial: the share of passed tests instead.
        limits: fields of `fastrl.rewards.sandbox.Limits` for all tests of a completion; two of the processes run the
            tests.
        packages: let tests and solutions import what this Python has installed, read-only.
        workers: completions at a time; 0 is one per core.
        tests, test_setup, reference: columns of the tests, of code that runs before them, and of a solution.
        prefix: column of text that the completion continues, such as an opened block with the head of a function.
        entry_point: column of the function's name for tests that define `check(candidate)`, as HumanEval's do.
        verify: at the start, refuse prompts whose reference fails, or whose tests an empty solution passes.
        unsandboxed: run code as this user, without isolation.
    """

    extract: Take = "last_block"
    partial: bool = False
    limits: Mapping[str, Any] = field(default_factory=dict)
    packages: bool = False
    workers: int = 0
    tests: str = "tests"
    test_setup: str = "test_setup"
    reference: str = "reference"
    prefix: str = "prefix"
    entry_point: str = "entry_point"
    verify: bool = True
    unsandboxed: bool = False

    __name__ = "code"

    def __post_init__(self) -> None:
        check.choice("code", "extract", self.extract, Take.__args__)
        check.require(self.workers >= 0, "code", "workers", "at least 0", self.workers)
        for name in self.limits:
            check.choice("code", "limits", name, [one.name for one in fields(Limits)])
        Limits(**self.limits)
        if not self.unsandboxed:
            require_isolation()

    async def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """One score per completion."""
        check.require(
            self.tests in columns,
            "code",
            "columns",
            f"tests in a column {self.tests!r}",
            ", ".join(columns) or "none",
            "Name it with the option tests.",
        )
        return await asyncio.gather(
            *(
                self._score((row.get(self.prefix) or "") + completion_text(completion), self._tests(row))
                for completion, row in zip(completions, self._rows(columns, len(completions)), strict=True)
            )
        )

    def check_prompts(self, prompts: Iterable[Prompt]) -> None:
        """Refuses prompts whose tests cannot judge.

        Raises:
            ValueError: tests cannot be read, or they fail the reference or pass an empty solution.
            SandboxError: tests cannot be run.
        """
        judged = [(prompt, tests) for prompt in prompts if (tests := self._tests(prompt.columns))]
        if not self.verify:
            return
        do = "Correct the tests, or drop the row."
        for prompt, _, passed in self._checked(judged, lambda prompt: ""):
            expected = "tests that an empty solution fails"
            check.require(not all(passed), f"code: prompt {prompt.index}", self.tests, expected, "none", do)
        given = [(prompt, tests) for prompt, tests in judged if prompt.columns.get(self.reference)]
        for prompt, tests, passed in self._checked(given, lambda prompt: str(prompt.columns[self.reference])):
            got = "" if all(passed) else f"one that fails test {passed.index(False) + 1} of {len(tests)}"
            expected = "a solution that passes the tests"
            check.require(not got, f"code: prompt {prompt.index}", self.reference, expected, got, do)

    def _checked(
        self, judged: Sequence[tuple[Prompt, Tests]], solution: Callable[[Prompt], str]
    ) -> Iterator[tuple[Prompt, Tests, list[bool]]]:
        """Each prompt and its tests with which of them its solution passes."""
        several = [judged[start : start + TOGETHER] for start in range(0, len(judged), TOGETHER)]
        passed = self._pool.map(
            lambda part: self._passed_together([(solution(prompt), tests) for prompt, tests in part]), several
        )
        return ((*one, results) for one, results in zip(judged, chain.from_iterable(passed), strict=True))

    async def _score(self, text: str, tests: Tests | None) -> float | None:
        if tests is None:
            return None
        code = code_of(text, self.extract)
        if code is None:
            return 0.0
        loop = asyncio.get_running_loop()
        passed = await loop.run_in_executor(self._pool, self._passed, code, tests)
        return sum(passed) / len(passed) if self.partial else float(all(passed))

    def _passed(self, code: str, tests: Tests) -> list[bool]:
        """Which tests a solution passes.

        Raises:
            SandboxError: they could not be run.
        """
        outcome = self._run([(code, tests)], Limits(**self.limits))
        verdicts = [json.loads(line) for line in outcome.stdout.splitlines()] if outcome.ended != "output" else []
        for verdict in verdicts:
            if isinstance(verdict, dict):
                raise SandboxError(f"the tests cannot run: {verdict['unfit']}")
        crashed = outcome.ended == "exit" and len(verdicts) < len(tests) and "MemoryError" not in outcome.stderr
        if crashed:
            raise SandboxError(f"the tests did not end: exit {outcome.code} {outcome.stderr[-300:]}")
        # Ended by the solution, or over a limit: the tests that it kept from running have failed.
        return [*verdicts, *[False] * (len(tests) - len(verdicts))]

    def _passed_together(self, pairs: Sequence[tuple[str, Tests]]) -> list[list[bool]]:
        """As `_passed` for each of several solutions that need not be kept from their tests and from each other.

        They share a sandbox, whose start takes most of the time of a check. Those that gave no verdict on every test
        are checked again alone, which says why.
        """
        if len(pairs) == 1:
            return [self._passed(*pairs[0])]
        limits = Limits(**self.limits)
        room = {"seconds": limits.seconds * (len(pairs) + 1), "processes": limits.processes + 1}
        outcome = self._run(pairs, replace(limits, output_kb=limits.output_kb * len(pairs), **room))
        jobs, verdicts = [], []
        for line in outcome.stdout.splitlines() if outcome.ended != "output" else []:
            verdict = json.loads(line)
            verdicts.append(verdict)
            if verdict is None:
                jobs.append(verdicts[:-1])
                verdicts = []
        jobs += [[]] * (len(pairs) - len(jobs))
        return [
            found
            if len(found) == len(tests) and not any(isinstance(one, dict) for one in found)
            else self._passed(code, tests)
            for (code, tests), found in zip(pairs, jobs, strict=True)
        ]

    def _run(self, pairs: Sequence[tuple[str, Tests]], limits: Limits) -> Outcome:
        """Runs the harness on solutions and their tests."""
        paths = sysconfig.get_paths()
        path = [*dict.fromkeys((paths["purelib"], paths["platlib"]))] if self.packages else []
        seconds = ceil(Limits(**self.limits).seconds)
        jobs = [
            {"solution": code, "setup": tests.setup, "tests": tests.scripts, "cases": tests.cases, "names": tests.names}
            | {"path": path, "seconds": seconds}
            for code, tests in pairs
        ]
        return run_sandboxed(
            HARNESS.read_text(encoding="utf-8"),
            stdin="\n".join([str(len(jobs)).zfill(COUNT - 1), *map(json.dumps, jobs)]),
            limits=limits,
            visible=tuple(path),
            unsandboxed=self.unsandboxed,
        )

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.workers or os.cpu_count() or 1, "fastrl-code")

    def _rows(self, columns: Mapping[str, Any], total: int) -> list[dict[str, Any]]:
        names = (self.tests, self.test_setup, self.entry_point, self.prefix)
        kept = {name: columns[name] for name in names if name in columns}
        return [{name: values[place] for name, values in kept.items()} for place in range(total)]

    def _tests(self, row: Mapping[str, Any]) -> Tests | None:
        """The tests in a row's columns; None if it has none.

        Raises:
            ValueError: they are no tests.
        """
        given, setup, entry = row.get(self.tests), row.get(self.test_setup) or "", row.get(self.entry_point)
        if given is None:
            return None
        if isinstance(given, str) and given.lstrip()[:1] in ("[", "{"):
            with contextlib.suppress(json.JSONDecodeError):  # a script that begins with a list
                given = json.loads(given)
        if isinstance(given, Mapping):
            inputs, outputs = given.get("inputs", given.get("input")), given.get("outputs", given.get("output"))
            paired = isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs)
            expected = "as many inputs as outputs"
            check.require(paired, "code", self.tests, expected, f"{given!r:.80}")
            given = [{"input": one, "output": other} for one, other in zip(inputs, outputs, strict=True)]
        tests = [given] if isinstance(given, str) else given
        expected = "a script, or a list of scripts or of mappings with input and output, all text"
        fine = isinstance(tests, list) and tests and len({type(test) for test in tests}) == 1
        check.require(fine, "code", self.tests, expected, f"{given!r:.80}")
        if isinstance(tests[0], str):
            return _scripts(tests, str(setup), entry, self.tests)
        cases = [dict(test) if isinstance(test, Mapping) else {} for test in tests]
        fine = all(isinstance(case.get(name), str) for case in cases for name in ("input", "output"))
        check.require(fine, "code", self.tests, expected, f"{given!r:.80}")
        return Tests(cases=tuple({"input": case["input"], "output": case["output"]} for case in cases))


def code_of(text: str, extract: Take) -> str | None:
    """The code in a completion; None if it has none."""
    if extract == "full":
        return text
    blocks = [code for name, code in BLOCK.findall(text.rpartition("</think>")[2]) if name.lower() in PYTHON]
    if not blocks:
        return None
    return blocks[-1] if extract == "last_block" else blocks[0]


def _scripts(scripts: Sequence[str], setup: str, entry: str | None, column: str) -> Tests:
    """Tests in Python, with the names that they leave to the solution."""
    if entry and any(re.search(r"^def check\(", script, re.MULTILINE) for script in scripts):
        scripts = [f"{script}\n\ncheck({entry})\n" for script in scripts]
    try:
        trees = [ast.parse(source) for source in (setup, *scripts)]
    except (SyntaxError, ValueError) as error:
        raise ValueError(check.sentence("code", column, "tests in Python", f"{error}")) from error
    nodes = [node for tree in trees for node in ast.walk(tree)]
    read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    made = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    made |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    made |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler))}
    imports = [alias for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names]
    made |= {(alias.asname or alias.name).partition(".")[0] for alias in imports}
    names = read - made - set(dir(builtins))
    modules = sorted(names & sys.stdlib_module_names)
    do = f"Write import {modules[0]} in test_setup." if modules else ""
    check.require(not modules, "code", column, "tests that import their modules", ", ".join(modules), do)
    names = {entry} & names if entry else names
    check.require(bool(names), "code", column, "tests that use a function of the solution", f"{scripts[0]!r:.80}")
    return Tests(tuple(sorted(names)), setup, tuple(scripts))
