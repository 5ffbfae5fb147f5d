"""Planted bugs: each is put into a copy of the project, and the tests beside it must fail.

    python tests/mutants.py                  # those in Python and Triton, two at a time: minutes
    python tests/mutants.py clip             # those whose line, file or name has this text
    python tests/mutants.py --native         # those in C++ too, with a build for each

The exit status is 1 if one was not caught.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("bench", "docs", "examples", "fastrl", "recipes", "tests", "csrc", "pyproject.toml", "setup.py", "README.md")
WORKERS = 2
LOSS, LOGPROB, GAE = "tests/ops/test_policy_loss.py", "tests/ops/test_logprob.py", "tests/ops/test_gae.py"
GROUPS, ADVANTAGES = "tests/ops/test_group_advantages.py", "tests/test_advantages.py"
PAIRS, SAMPLER, PACK = "tests/losses/test_preference.py", "tests/rollout/test_sampler.py", "tests/data/test_pack.py"
OPTIMIZER, TURNS = "tests/trainer/test_optimizer.py", "tests/rollout/test_turns.py"
REFERENCE, TOKEN = "fastrl/kernels/policy_loss/reference.py", "fastrl/kernels/policy_loss/triton_token.py"
ESTIMATORS, LINKS = "fastrl/advantages.py", "fastrl/losses/preference_links.py"
DRAW, MASTERS = "fastrl/rollout/draw.py", "fastrl/trainer/optimizer.py"


class Mutant(NamedTuple):
    """In `file`, `good` becomes `bad`; `tests` are the ones that must notice."""

    bug: str
    file: str
    good: str
    bad: str
    tests: str


MUTANTS = [
    Mutant("clip's bounds swapped", REFERENCE, "ratio.clamp(1 - low, 1 + high)", "ratio.clamp(1 - high, 1 + low)",
           LOSS),
    Mutant("clip's gradient has the wrong sign", REFERENCE, "(clipped, 0, -ratio * advantages)",
           "(clipped, 0, ratio * advantages)", LOSS),
    Mutant("dual clip where A > 0", REFERENCE, "(advantages < 0) & (loss > ceiling)",
           "(advantages > 0) & (loss > ceiling)", LOSS),
    Mutant("CISPO without its clamp", REFERENCE, "-ratio.clamp(low, high) * advantages", "-ratio * advantages", LOSS),
    Mutant("SAPO's temperatures swapped", REFERENCE, "tau_neg).masked_fill(advantages > 0, tau_pos)",
           "tau_pos).masked_fill(advantages > 0, tau_neg)", LOSS),
    Mutant("DPPO's trust region swapped", REFERENCE, "(moved < -low), (advantages > 0) & (moved > high)",
           "(moved < -high), (advantages > 0) & (moved > low)", LOSS),
    Mutant("k1 has the wrong sign", REFERENCE, "TokenTerm(-d, zeros, torch.ones_like(d))",
           "TokenTerm(d, zeros, -torch.ones_like(d))", LOSS),
    Mutant("k3 without -d", REFERENCE, "growth - held, torch", "growth, torch", LOSS),
    Mutant("truncation from below", REFERENCE, "weight.clamp(max=correction.high)", "weight.clamp(min=correction.high)",
           LOSS),
    Mutant("a sequence's sum for its mean", REFERENCE, "(total / count.clamp(min=1))[seq_ids]", "total[seq_ids]", LOSS),
    Mutant("an entropy penalty", REFERENCE, "loss - spec.entropy_coef", "loss + spec.entropy_coef", LOSS),
    Mutant("masked NaN gets through", REFERENCE, "else torch.where(mask, x, 0) for x in given", "else x for x in given",
           LOSS),
    Mutant("Triton: clip's bounds swapped", TOKEN, "clamp(ratio, first, second)\n        clipped",
           "clamp(ratio, second, first)\n        clipped", LOSS),
    Mutant("Triton: CISPO's sign", TOKEN, "dlogp = -clamp(ratio, first, second)", "dlogp = clamp(ratio, first, second)",
           LOSS),
    Mutant("Triton: SAPO's gradient", TOKEN, "-4.0 * gate * (1.0 - gate)", "-4.0 * gate", LOSS),
    Mutant("token mean for sequence mean", "fastrl/losses/aggregate.py", "counts.clamp(min=1)",
           "counts.clamp(min=1).pow(0)", "tests/losses/test_aggregate.py"),
    Mutant("empty sequences count", "fastrl/losses/aggregate.py", "(counts > 0).sum()", "(counts >= 0).sum()",
           "tests/losses/test_aggregate.py"),
    Mutant("leave-one-out divides by n", "fastrl/kernels/group_advantages/reference.py", "(len(rewards) - 1)",
           "len(rewards)", GROUPS),
    Mutant("standard deviation of a population", "fastrl/kernels/group_advantages/reference.py", ".std()",
           ".std(correction=0)", GROUPS),
    Mutant("GAE without lambda", "fastrl/kernels/gae/reference.py", "gamma * lam * next", "gamma * next", GAE),
    Mutant("returns without values", "fastrl/kernels/gae/reference.py", "advantages[t] + value[t]", "advantages[t]",
           GAE),
    Mutant("OPO without lengths", ESTIMATORS, "torch.where(valid, lengths, 0)", "torch.where(valid, 1, 0)", ADVANTAGES),
    Mutant("MaxRL without its scale", ESTIMATORS, "centred / mean", "centred", ADVANTAGES),
    Mutant("the KL is rewarded", ESTIMATORS, "(valid, -penalty, 0.0)", "(valid, penalty, 0.0)", ADVANTAGES),
    Mutant("whitened by n", ESTIMATORS, "(count - 1).clamp(min=1)", "count.clamp(min=1)", ADVANTAGES),
    Mutant("temperature multiplies", "fastrl/kernels/logprob/reference.py", "    z.div_(", "    z.mul_(", LOGPROB),
    Mutant("no 1/T in the gradient", "fastrl/kernels/logprob/reference.py", "dz.div_(", "dz.mul_(", LOGPROB),
    Mutant("the rejected answer is preferred", LINKS, "return -logsigmoid(margin)\n", "return -logsigmoid(-margin)\n",
           PAIRS),
    Mutant("IPO's target doubled", LINKS, "((margin - 0.5)", "((margin - 1.0)", PAIRS),
    Mutant("label smoothing swapped", LINKS, "(1 - flip) * link(margin, spec), flip *",
           "flip * link(margin, spec), (1 - flip) *", PAIRS),
    Mutant("KTO's baseline without beta", "fastrl/losses/unpaired.py", "rewards - spec.beta * baseline",
           "rewards - baseline", "tests/losses/test_preference.py tests/losses/test_preference_trl.py"),
    Mutant("the off-policy mask inverted", "fastrl/losses/token_masks.py", "<= threshold)", ">= threshold)",
           "tests/losses/test_token_masks.py"),
    Mutant("top-p before top-k", DRAW, "top_p * weights.sum(-1, keepdim=True, dtype=torch.float64)",
           "weights.new_full((len(weights), 1), top_p, dtype=torch.float64)", SAMPLER),
    Mutant("log-probability not renormalised", DRAW, "[:, 0] / total)", "[:, 0])", SAMPLER),
    Mutant("min-p absolute", DRAW, "min_p * weights.amax(-1, keepdim=True)", "min_p", SAMPLER),
    Mutant("repetition rewarded", DRAW, "z / penalty, z * penalty", "z * penalty, z / penalty", SAMPLER),
    Mutant("every part of a rollout draws alike", "fastrl/rollout/transformers_sampler.py", "streams[part]",
           "streams[: part.stop - part.start]", SAMPLER),
    Mutant("every part's support is the first's", DRAW, "rows.cpu() + self.first", "rows.cpu()", SAMPLER),
    Mutant("unfinished answers are dropped", "fastrl/data/pack.py", "(sample.finished or not mask_truncated)",
           "sample.finished", PACK),
    Mutant("a tool's tokens are trained on", "fastrl/rollout/base.py", "sample.own += [False] * len(ids)",
           "sample.own += [True] * len(ids)", TURNS),
    Mutant("every epoch in the same order", "fastrl/data/sampler.py", "{self.seed}/{self.epoch}", "{self.seed}",
           "tests/data/test_prompts.py"),
    Mutant("warm-up from zero", MASTERS, "min(1.0, (self.steps + 1)", "min(1.0, self.steps", OPTIMIZER),
    Mutant("clipped to a multiple of the norm", MASTERS, "mul_(self.config.max_grad_norm / norm)",
           "mul_(self.config.max_grad_norm)", OPTIMIZER),
    Mutant("masters lose their low bits", MASTERS, ".add_(low_bits)", "", OPTIMIZER),
    Mutant("random numbers not restored", "fastrl/trainer/resume.py", '    _set_random_state(where["random"])\n',
           "    pass\n", "tests/trainer/test_resume.py"),
    Mutant("dynamic sampling keeps equal rewards", "fastrl/sources/rollouts.py", "key=rewards_differ, reverse=True",
           "key=rewards_differ", "tests/trainer/test_sources.py tests/trainer/test_loop.py"),
    Mutant("a late answer is right", "fastrl/rewards/math_answer.py", "0.0 if reply is None", "1.0 if reply is None",
           "tests/rewards/test_rewards.py"),
    Mutant("C++: clip's gradient", "csrc/math/surrogate.h", "clipped ? zero : -ratio * advantage, zero, down, up",
           "clipped ? zero : ratio * advantage, zero, down, up", LOSS),
    Mutant("C++: returns without values", "csrc/cpu/gae.h", "T(state.advantage + state.value)", "T(state.advantage)",
           GAE),
]  # fmt: skip


def main() -> int:
    """Prints one line per planted bug, and returns how the process is to end."""
    parser = argparse.ArgumentParser(description="Puts bugs into a copy of the project, which its tests must catch.")
    parser.add_argument("only", nargs="?", default="", help="text in the bug's name, its file or its line")
    parser.add_argument("--native", action="store_true", help="those in C++ too, with a build for each")
    args = parser.parse_args()
    chosen = [one for one in MUTANTS if args.only.lower() in " ".join(one).lower()]
    chosen = [one for one in chosen if args.native or not one.file.startswith("csrc")]
    for one in chosen:
        times = (ROOT / one.file).read_text(encoding="utf-8").count(one.good)
        if times != 1:
            sys.exit(f"{one.bug}: expected its line once in {one.file}, found it {times} times")
    with tempfile.TemporaryDirectory() as folder:
        trees: Queue[Path] = Queue()
        for number in range(WORKERS):
            trees.put(_copy(Path(folder) / str(number)))
        with ThreadPoolExecutor(WORKERS) as pool:
            results = list(pool.map(lambda one: _try(one, trees), chosen))
    missed = results.count(False)
    print(f"{len(results) - missed} of {len(results)} planted bugs were caught")
    return int(missed > 0)


def _copy(folder: Path) -> Path:
    folder.mkdir()
    for name in COPIED:
        source = ROOT / name
        shutil.copytree(source, folder / name) if source.is_dir() else shutil.copy(source, folder / name)
    return folder


def _try(one: Mutant, trees: Queue[Path]) -> bool:
    """Whether the tests fail with the bug in a tree, which is as before afterwards."""
    tree, began = trees.get(), time.monotonic()
    path = tree / one.file
    text = path.read_text(encoding="utf-8")
    native = one.file.startswith("csrc")
    try:
        path.write_text(text.replace(one.good, one.bad), encoding="utf-8")
        if native:
            _build(tree)
        run = _python(tree, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *one.tests.split())
    finally:
        path.write_text(text, encoding="utf-8")
        if native:
            _build(tree)
        trees.put(tree)
    caught = run.returncode == 1  # 0: passed; more: the tests did not run
    by = next(
        (line for line in run.stdout.splitlines() if line.startswith("FAILED")), run.stdout[-500:] + run.stderr[-500:]
    )
    print(f"{'caught' if caught else 'MISSED'} {time.monotonic() - began:4.0f} s  {one.bug}: {by[:110]}", flush=True)
    return caught


def _build(tree: Path) -> None:
    _python(tree, "setup.py", "--quiet", "build_ext", "--inplace", FASTRL_CUDA="0").check_returncode()


def _python(tree: Path, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
    paths = f"{tree}{os.pathsep}{tree / 'tests'}"
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"} | more
    return subprocess.run([sys.executable, *command], cwd=tree, env=environment, capture_output=True, text=True)


if __name__ == "__main__":
    sys.exit(main())
