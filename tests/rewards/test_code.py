"""The reward `code`: right solutions score, and no solution scores otherwise."""

import asyncio
import json
import runpy
import time
from pathlib import Path

import pytest

from fastrl.rewards import RewardSuite, resolve_reward, sandbox
from fastrl.rewards.code import CodeReward, code_of
from fastrl.types import Group, Prompt, Sample

ROOT = Path(__file__).resolve().parents[2]
LACKING = sandbox._lacking()
isolated = pytest.mark.skipif(LACKING is not None, reason=f"this machine isolates no program: {LACKING}")
TESTS = ["assert f(2) == 4", "assert f([1]) == [1, 1]"]
QUICK = {"seconds": 1.0}


def block(code):
    return f"Here it is:\n```python\n{code}\n```\nDone."


def scores(codes, tests, *, wrapped=True, setup=None, **options):
    reward = CodeReward(**({"limits": QUICK} | options))
    total = len(codes)
    columns = {"tests": [tests] * total, "test_setup": [setup] * total}
    return asyncio.run(reward([block(code) if wrapped else code for code in codes], **columns))


RIGHT = "def f(x): return x * 2"
FORGED = {
    "os._exit(0)": "def f(x):\n    import os\n    os._exit(0)",
    "os._exit(0) at once": "import os\nos._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "prints verdicts": "import os\nfor n in range(64):\n    try: os.write(n, b'true\\ntrue\\n')\n"
    "    except OSError: pass\nprint('true\\ntrue')\ndef f(x): return 0",
    "equals everything": "class A:\n    def __eq__(self, o): return True\ndef f(x): return A()",
    "a list that equals everything": "class A(list):\n    def __eq__(self, o): return True\ndef f(x): return A()",
    "an int that equals everything": "class A(int):\n    def __eq__(self, other): return True\ndef f(x): return A()",
    "patches builtins": "import builtins\nbuiltins.AssertionError = None\nbuiltins.all = bool\ndef f(x): return 0",
    "names of builtins": "all = any = len = isinstance = lambda *x: True\ndef f(x): return 0",
    "reads its frames": "import gc, sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n        for value in"
    " list(frame.f_locals.values()):\n            if isinstance(value, dict) and 'tests' in value: return 4\n"
    "        frame = frame.f_back\n    return [o for o in gc.get_objects() if isinstance(o, str) and 'assert f' in o]",
    "reads files": "import glob\ndef f(x):\n    for name in glob.glob('/box/*') + glob.glob('/proc/*/fd/*'):\n"
    "        if 'assert f(2)' in open(name).read(): return 4\n    return 0",
    "kills its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\ndef f(x): return x * 2",
    "raises": "def f(x): raise AssertionError",
    "syntax": "def f(x:",
    "another name": "def g(x): return x * 2",
    "endless": "def f(x):\n    while True: pass",
    "nothing": "",
}


@isolated
def test_only_a_right_solution_scores():
    codes = [RIGHT, *FORGED.values()]
    assert dict(zip(["right", *FORGED], scores(codes, TESTS), strict=True)) == {"right": 1.0} | dict.fromkeys(
        FORGED, 0.0
    )


@isolated
def test_a_test_that_an_exit_would_pass_fails():
    """A bare except around a call must not turn an ended process into a passed test."""
    tests = ["try:\n    f(1)\n    passed = False\nexcept BaseException:\n    passed = True\nassert passed"]
    assert scores(["def f(x): raise ValueError", "import os\ndef f(x): os._exit(0)", "def f(x): 1"], tests) == [1, 0, 0]


@isolated
@pytest.mark.parametrize(
    ("tests", "right", "wrong"),
    [
        (["assert f(3) == {'a': (1, .5, None)}"], "def f(x): return {'a': (1, .5, None)}", "def f(x): return {'a': 1}"),
        (["x = [3, 1, 2]\nf(x)\nassert x == [1, 2, 3]"], "def f(x): x.sort()", "def f(x): return sorted(x)"),
        (["import math\nassert math.isclose(f(4), 2.0)"], "def f(x): return x ** .5", "def f(x): return x"),
        (["try:\n    f(-1)\nexcept ValueError:\n    pass\nelse:\n    assert False"],
         "def f(x): raise ValueError('negative')", "def f(x): raise KeyError(x)"),
        (["assert list(f(3)) == [0, 1, 2]"], "def f(n): yield from range(n)", "def f(n): return 3"),
        (["assert f(b'x') == {1, 2}", "assert f(1j) == -1"],
         "def f(x): return {1, 2} if x == b'x' else -1", "def f(x): return 1"),
        (["assert f(2) > 10 ** 5000"], "def f(x): return 10 ** 6000", "def f(x): return 0"),
        (["s = Stack()\ns.push(4)\ns.push(5)\nassert s.pop() == 5 and len(s) == 1 and s.items == [4]"],
         "class Stack:\n    def __init__(self): self.items = []\n    def push(self, x): self.items.append(x)\n"
         "    def pop(self): return self.items.pop()\n    def __len__(self): return len(self.items)",
         "class Stack:\n    def __init__(self): self.items = []\n    def push(self, x): self.items = [x]\n"
         "    def pop(self): return self.items.pop()\n    def __len__(self): return 1"),
    ],
    ids=["plain data", "changes its argument", "modules", "exceptions", "generator", "set and bytes", "long", "class"],
)  # fmt: skip
def test_tests_see_what_the_solution_would_give_them(tests, right, wrong):
    assert scores([right, wrong], tests) == [1.0, 0.0]


@isolated
def test_programs_are_judged_by_what_they_print():
    cases = [{"input": "2 3\n", "output": "5\n"}, {"input": "1 1", "output": "2"}]
    codes = [
        "print(sum(map(int, input().split())))",
        "print(str(sum(map(int, input().split()))) + '  \\n')",
        "print(5)",
        "print('5'); import os; os._exit(0)",
        "import os; os._exit(0)",
        "print(sum(map(int, input().split()))); raise SystemExit(1)",
        "while True: print('5')",
    ]
    assert scores(codes, cases) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert scores(codes[:1], json.dumps({"inputs": ["2 3"], "outputs": ["5"]})) == [1.0]
    assert scores(codes[2:3], cases, partial=True) == [0.5]


@isolated
def test_humanevals_check_is_called_on_the_entry_point():
    test = "def check(candidate):\n    assert candidate(2) == 4\n"
    reward = CodeReward(limits=QUICK)
    codes = [block(RIGHT), block("def f(x): return 0\ndef check(x): pass")]
    assert asyncio.run(reward(codes, tests=[test] * 2, entry_point=["f"] * 2)) == [1.0, 0.0]


@isolated
def test_the_share_of_passed_tests_counts_those_that_never_ran_as_failed():
    code = "def f(x):\n    while x == 2: pass\n    return x * 2"
    tests = ["assert f(1) == 2", "assert f(2) == 4", "assert f(3) == 6"]
    assert scores([code, RIGHT], tests, partial=True) == [pytest.approx(1 / 3), 1.0]


@pytest.mark.parametrize(
    ("text", "last", "first"),
    [
        ("```python\na\n```\n```py\nb\n```", "b\n", "a\n"),
        ("<think>```python\na\n```</think>\n```\nb\n```", "b\n", "b\n"),
        ("```python\na\n```\n```bash\nls\n```", "a\n", "a\n"),
        ("```python\ns = '```'\n```", "s = '```'\n", "s = '```'\n"),
        ("```python\na", None, None),
        ("def f(): 1", None, None),
    ],
)
def test_code_is_taken_from_closed_blocks_of_python_after_the_thoughts(text, last, first):
    assert code_of(text, "last_block") == last
    assert code_of(text, "first_block") == first
    assert code_of(text, "full") == text


@isolated
def test_a_completion_may_continue_a_prefix_and_without_a_block_it_scores_0():
    reward = CodeReward(limits=QUICK)
    prefix = "```python\ndef f(x):\n    return"
    completions = [" x * 2\n```", " x * 2"]
    assert asyncio.run(reward(completions, tests=[TESTS] * 2, prefix=[prefix] * 2)) == [1.0, 0.0]
    assert asyncio.run(reward([RIGHT, block(RIGHT)], tests=[TESTS, None])) == [0.0, None]


@isolated
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"tests": []}, "tests: expected a script, or a list"),
        ({"tests": [1]}, "tests: expected a script, or a list"),
        ({"tests": [{"input": "1"}]}, "tests: expected a script, or a list"),
        ({"tests": {"inputs": ["1"], "outputs": []}}, "expected as many inputs as outputs"),
        ({"tests": "assert f(1 =="}, "expected tests in Python"),
        ({"tests": "assert True"}, "expected tests that use a function of the solution"),
        ({"tests": "assert math.isclose(f(1), 2)"}, "Write import math in test_setup"),
        ({"tests": "f"}, "prompt 3: tests: expected tests that an empty solution fails"),
        (
            {"tests": "try: f(1)\nexcept Exception: pass"},
            "prompt 3: tests: expected tests that an empty solution fails",
        ),
        ({"tests": TESTS, "reference": "def f(x): return 4"}, "prompt 3: reference.*got one that fails test 2 of 2"),
        ({"tests": ["assert f(lambda: 1)"], "reference": RIGHT}, "passes the solution a function, and only plain data"),
        ({"tests": TESTS, "test_setup": "import nothing_like_it"}, "test_setup fails with ModuleNotFoundError"),
    ],
)
def test_tests_that_cannot_judge_are_refused_at_the_start(columns, message):
    if columns["tests"] == "f":  # a name alone: nothing is asserted, but an empty solution has no such name
        columns = {"tests": "g = [f for _ in ()]"}
    suite = RewardSuite([CodeReward(limits=QUICK)])
    with pytest.raises((ValueError, sandbox.SandboxError), match=message):
        suite.check_prompts([Prompt(3, "q", (1,), columns)])


@isolated
def test_solutions_that_are_checked_together_get_the_verdicts_that_they_get_alone():
    """Those that forge, end or hang the checks among them too: each ends nothing but its own. Only one that looks for
    its tests finds them, as a reference may."""
    reward = CodeReward(limits=QUICK)
    tests = reward._tests({"tests": TESTS})
    programs = reward._tests({"tests": [{"input": "2", "output": "4"}, {"input": "3", "output": "6"}]})
    writes = "open('left', 'w').write('4')\n" + RIGHT
    reads = "def f(x): return int(open('left').read()) if x == 2 else [1, 1]"
    pairs = [(RIGHT, tests), (writes, tests), (reads, tests)]
    pairs += [(code, tests) for name, code in FORGED.items() if name != "reads its frames"]
    pairs += [("print(2 * int(input()))", programs), ("print(4)", programs), ("while True: pass", programs)]
    together = reward._passed_together(pairs)
    assert together == [reward._passed(*pair) for pair in pairs]
    assert [all(one) for one in together[:3]] == [True, True, False]
    assert [all(one) for one in together[-3:]] == [True, False, False]


@isolated
def test_the_check_of_many_prompts_starts_few_sandboxes_and_names_the_row(monkeypatch):
    started, run = [], sandbox.run_sandboxed
    monkeypatch.setattr("fastrl.rewards.code.run_sandboxed", lambda *a, **o: started.append(1) or run(*a, **o))
    rows = [{"tests": TESTS, "reference": RIGHT}] * 40
    prompts = [Prompt(place, "q", (1,), row) for place, row in enumerate(rows)]
    CodeReward(limits=QUICK).check_prompts(prompts)
    assert len(started) == 6  # of 16, without and with the reference
    prompts[33] = Prompt(33, "q", (1,), {"tests": TESTS, "reference": "def f(x): return 4"})
    with pytest.raises(ValueError, match=r"prompt 33: reference.*got one that fails test 2 of 2"):
        CodeReward(limits=QUICK).check_prompts(prompts)


@isolated
def test_a_sandbox_that_fails_leaves_a_completion_without_a_score(monkeypatch):
    groups = [
        Group(Prompt(0, "q", (1,), {"tests": TESTS}), [Sample([1], [0.0], True, block(c)) for c in (RIGHT, "boom")])
    ]
    reward = CodeReward(limits=QUICK)
    passed = CodeReward._passed

    def failing(self, code, tests):
        if "boom" in code:
            raise sandbox.SandboxError("no room")
        return passed(self, code, tests)

    monkeypatch.setattr(CodeReward, "_passed", failing)
    failures = RewardSuite([reward]).score(groups)
    assert [sample.reward for sample in groups[0].samples] == [1.0, None]
    assert "SandboxError: no room" in str(failures[0])


def test_without_isolation_the_reward_is_refused_at_the_start_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr(sandbox, "_lacking", lambda: "no")
    with pytest.raises(sandbox.SandboxError, match="set unsandboxed"):
        resolve_reward("code")
    assert scores([RIGHT, "def f(x): return 0"], TESTS, unsandboxed=True) == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"code: limits: expected one of seconds, .*'second'"):
        resolve_reward("code", limits={"second": 1}, unsandboxed=True)


@isolated
def test_completions_are_checked_at_the_same_time():
    code = "import time\ntime.sleep(0.5)\n" + RIGHT
    began = time.monotonic()
    assert scores([code] * 6, TESTS, workers=6, limits={"seconds": 10.0}) == [1.0] * 6
    assert time.monotonic() - began < 2.5  # 3 s one after the other


def test_the_recipes_tasks_are_those_of_its_script_and_right():
    made = runpy.run_path(str(ROOT / "recipes" / "data" / "make_code_tasks.py"))
    rows = [json.loads(line) for line in (ROOT / "recipes" / "data" / "code_tasks.jsonl").read_text().splitlines()]
    again = made["task"](made["random"].Random(0))
    assert rows[0] == again
    for row in rows[::20]:
        scope = {}
        exec("\n".join([row["reference"], *row["tests"]]), scope)
        assert row["prefix"] == "```python\n" + row["reference"].partition("return")[0] + "return"
