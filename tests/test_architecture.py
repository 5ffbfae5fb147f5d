"""The floor plan: who may import whom, where an op's files are, and what the package must not touch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastrl
from fastrl.kernels.registry import OPS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fastrl"
# Imports go from a higher floor to a lower one, never up and never sideways between the names of one floor.
FLOOR = {
    "spec": 0, "types": 0, "check": 0, "env": 0, "typed": 0, "progress": 0, "files": 0, "hub": 0, "shipped": 0,
    "preference_spec": 1, "kernels": 1, "chat": 1,
    "ops": 2,
    "losses": 3, "advantages": 3,
    "model": 4, "data": 4, "distributed": 4,
    "rollout": 5, "integrations": 5,
    "rewards": 6, "algorithms": 6,
    "environments": 7, "sources": 7, "monitor": 7, "doctor": 7, "menu": 7,
    "trainer": 8, "scaling": 8, "analyze": 8, "plan": 8,
    "cli": 9, "__main__": 10,
}  # fmt: skip
SEALED = "integrations"  # a side wing that nothing imports
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"torch.load", "torch.save", "pandas.read_pickle", "pd.read_pickle", "yaml.load", "yaml.unsafe_load"}


def sources(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(module: ast.Module) -> set[str]:
    """Dotted names that a module imports, with what it imports from them: `from a import b` gives a.b."""
    names = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain, or an empty string."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def floor_violations(here: str, names: set[str]) -> list[str]:
    """What a file of the top-level name `here` must not import."""
    tops = {name.split(".")[1] for name in names if name.startswith("fastrl.")} - {here}
    return sorted(top for top in tops if FLOOR.get(top, 99) >= FLOOR[here] or top == SEALED)


@pytest.mark.parametrize("path", sources(PACKAGE), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down_the_floors(path):
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if here == "__init__":
        return  # the front door, which imports on demand
    assert here in FLOOR, f"{here} has no floor: give it one in FLOOR"
    assert floor_violations(here, imported(tree(path))) == []


@pytest.mark.parametrize(
    ("here", "line", "caught"),
    [
        ("kernels", "from fastrl.ops.logprob import logprob", ["ops"]),
        ("losses", "from fastrl import advantages", ["advantages"]),
        ("data", "import fastrl.model.load", ["model"]),
        ("trainer", "from fastrl.integrations import trl", ["integrations"]),
        ("ops", "from fastrl import linear_logprob", ["linear_logprob"]),
        ("ops", "from fastrl.kernels import registry\nfrom fastrl import check\nimport torch", []),
    ],
)
def test_the_floor_test_catches_what_it_should(here, line, caught):
    assert floor_violations(here, imported(ast.parse(line))) == caught


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_one_stem_everywhere(op):
    for path in (f"fastrl/kernels/{op}/reference.py", f"fastrl/ops/{op}.py", f"tests/ops/test_{op}.py"):
        assert (ROOT / path).is_file(), path


def test_every_kernel_folder_is_of_a_registered_op():
    folders = {path.name for path in (PACKAGE / "kernels").iterdir() if (path / "__init__.py").exists()}
    assert folders == set(OPS)


def test_only_env_reads_the_environment():
    readers = set()
    for path in sources(PACKAGE):
        module = tree(path)
        reads = {dotted(node) for node in ast.walk(module)} | imported(module)
        if reads & {"os.environ", "os.getenv", "os.environb", "os.putenv"}:
            readers.add(path.relative_to(PACKAGE).as_posix())
    assert readers == {"env.py"}


@pytest.mark.parametrize("folder", ["fastrl", "bench"])
def test_nothing_unpickles(folder):
    """A checkpoint or a data file must never be able to run code: CVE-2025-32434 and its kin."""
    for path in sources(ROOT / folder):
        module = tree(path)
        modules = {name.split(".")[0] for name in imported(module)}
        calls = {dotted(node.func) for node in ast.walk(module) if isinstance(node, ast.Call)}
        assert not modules & UNSAFE_MODULES, path
        assert not calls & UNSAFE_CALLS, path
        assert not any(isinstance(node, ast.keyword) and node.arg == "allow_pickle" for node in ast.walk(module)), path


def test_importing_fastrl_imports_nothing_heavy():
    heavy = ("torch", "transformers", "numpy", "triton", "datasets", "yaml")
    code = f"import sys, fastrl; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"


def test_the_ops_and_losses_need_nothing_but_torch():
    """A library user has no transformers, no datasets and no yaml; the trainer is an extra."""
    code = (
        "import sys\n"
        "for name in ('transformers', 'datasets', 'yaml', 'triton', 'safetensors', 'rich', 'tyro', 'jinja2'):\n"
        "    sys.modules[name] = None\n"
        "import fastrl\n"
        "for name in fastrl.__all__:\n"
        "    name == 'Trainer' or getattr(fastrl, name)\n"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)


def test_every_public_name_is_what_its_module_defines():
    for name in fastrl.__all__:
        assert getattr(fastrl, name).__name__.split(".")[-1] == name
    assert set(fastrl.__all__) <= set(dir(fastrl))
    with pytest.raises(AttributeError, match="no attribute 'linear_logprobs'"):
        fastrl.linear_logprobs  # noqa: B018
