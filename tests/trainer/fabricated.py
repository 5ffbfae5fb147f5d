"""A fabricated run: plausible numbers, hostile completions, and a clock that moves only when told to."""

from __future__ import annotations

import io
import math
import random
from pathlib import Path

from rich.console import Console

from fastrl.monitor.log import RunLog
from fastrl.types import Group, Prompt, Sample

HOSTILE = "<script>alert('x')</script> [bold red]markup[/] \x1b[31mred\x1b[0m \x1b]0;title\x07\x9b2J \u202edesrever"
STAGES = {"rollout": 1.9, "reward": 0.1, "pack": 0.02, "score": 0.3, "train": 2.1}
CONFIG = {
    "model": "smollm2-135m-instruct",
    "algorithm": "grpo",
    "steps": 40,
    "dtype": "bfloat16",
    "device": "auto",
    "layout": "auto",
    "max_tokens_per_microbatch": 2048,
    "task": {"source": "reasoning_gym:chain_sum", "held_out": 24, "options": {"max_terms": 3}},
    "rewards": ({"name": "reasoning_gym", "weight": 1.0},),
    "rollout": {"prompts_per_step": 8, "group_size": 8, "max_new_tokens": 32, "temperature": 1.0},
    "optimizer": {"lr": 5e-6, "betas": (0.9, 0.999)},
}
ENVIRONMENT = {
    "fastrl": "0.1.0",
    "packages": {"torch": "2.13.0", "transformers": "5.23.0"},
    "machine": {"system": "Linux", "cpu": "EPYC", "cores": 2, "cpu_capability": "AVX512"},
    "threads": {"torch": 2, "cores": 2},
    "gpus": [],
    "data": {"source": "reasoning_gym:chain_sum", "held_out": "24 prompts", "step": "8 prompts x 8 completions"},
    "git": {"commit": "0123456789abcdef", "modified": False},
}


class FakeClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def recording_console(**options) -> Console:
    return Console(file=io.StringIO(), width=options.pop("width", 110), **options)


def groups(rng: random.Random, skill: float, prompts: int = 8, samples: int = 8, hostile: bool = False) -> list[Group]:
    made, numbers = [], random.Random(rng.random())
    for index in range(prompts):
        a, b, c = numbers.randint(2, 99), numbers.randint(2, 99), numbers.randint(2, 99)
        content = [{"role": "user", "content": f"State the final answer to the following problem: {a} + {b} - {c} ="}]
        drawn = []
        for _ in range(samples):
            right = rng.random() < skill
            answer = a + b - c + (0 if right else rng.choice([-10, -1, 1, 9]))
            text = f"{a} + {b} is {a + b}.\nSo the answer is {answer}." if rng.random() < 0.4 else f"{answer}"
            drawn.append(Sample([1] * rng.randint(3, 24), [], rng.random() < 0.95, text, {"r": right}, float(right)))
        mean = sum(s.reward for s in drawn) / samples
        std = math.sqrt(sum((s.reward - mean) ** 2 for s in drawn) / samples)
        for sample in drawn:
            sample.advantage = (sample.reward - mean) / (std + 1e-6)
        made.append(Group(Prompt(index, content, (1, 2, 3)), drawn))
    if hostile:
        for sample in made[0].samples:
            sample.text = HOSTILE
    return made


def metrics(step: int, rng: random.Random, total: int) -> dict[str, float]:
    progress = 1 - math.exp(-3 * step / total)
    return {
        "reward": 0.25 + 0.45 * progress + rng.gauss(0, 0.05),
        "reward_std": 0.31 - 0.1 * progress,
        "frac_reward_zero_std": min(1.0, max(0.0, 0.3 + 0.2 * progress + rng.gauss(0, 0.08))),
        "completions/mean_length": 14 - 6 * progress + rng.gauss(0, 0.6),
        "completions/min_length": 3.0,
        "completions/max_length": 32.0,
        "completions/clipped_ratio": max(0.0, 0.08 * (1 - progress) + rng.gauss(0, 0.01)),
        "num_tokens": 3000 + rng.gauss(0, 150),
        "loss": rng.gauss(0, 0.004),
        "grad_norm": 0.8 + abs(rng.gauss(0, 0.2)),
        "learning_rate": 5e-6 * min(1.0, step / 5),
        "clip_ratio/low_mean": abs(rng.gauss(0, 0.004)),
        "clip_ratio/high_mean": abs(rng.gauss(0, 0.006)),
        "entropy": 1.3 - 0.7 * progress + rng.gauss(0, 0.03),
        "sampling/entropy": 1.25 - 0.7 * progress + rng.gauss(0, 0.05),
        "kl": 0.02 * progress,
        "sampling/outside_share": 0.01 + abs(rng.gauss(0, 0.002)),
        "sampling/sampling_logp_difference/mean": 0.004 + abs(rng.gauss(0, 0.001)),
        "gradient_fraction": 0.6,
    }


def evaluate(
    log: RunLog, clock: FakeClock, step: int, skill: float, seed: int = 5, prompts: int = 24
) -> dict[str, float]:
    results = {}
    for name, samples, shift in (("greedy", 1, 0.08), ("sampled", 4, 0.0)):
        with log.stage("eval"):
            clock.now += 6.0
        # The same prompts at every evaluation: a generator of its own draws the answers.
        drawn = groups(random.Random(seed), skill + shift, prompts, samples)
        rewards = [s.reward for g in drawn for s in g.samples]
        results[name] = sum(rewards) / len(rewards)
        log.evaluation(step, name, {"reward": results[name], "prompts": float(prompts)}, drawn)
    return results


def run_steps(log: RunLog, clock: FakeClock, steps: int, total: int, seed: int = 0) -> None:
    rng = random.Random(seed)
    for step in range(1, steps + 1):
        for name, seconds in STAGES.items():
            with log.stage(name):
                clock.now += seconds
        clock.now += 0.08  # time that no stage claims
        log.step(step, metrics(step, rng, total))
        log.completions(step, groups(rng, 0.25 + 0.5 * step / total, hostile=step == 1))


def fabricate(run_dir: Path, *, steps: int = 40, total: int = 40, console: Console | None = None) -> RunLog:
    clock = FakeClock()
    log = RunLog(run_dir, total_steps=total, console=console or recording_console(), clock=clock)
    log.start({**CONFIG, "steps": total}, ENVIRONMENT)
    before = evaluate(log, clock, 0, 0.25)
    run_steps(log, clock, steps, total)
    after = evaluate(log, clock, steps, 0.7) if steps == total else {}
    status = "finished" if steps == total else "interrupted"
    log.close(status, {"before": before, "after": after, "steps": steps, "report": run_dir / "report.html"})
    return log
