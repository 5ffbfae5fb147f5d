"""fastrl on the workload: its own trainer on the demo recipe, whose stages it times itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from bench.step_child import StepRecord, child
from bench.workload import REWARDS, Workload
from fastrl.trainer.config import RewardConfig, TaskConfig
from fastrl.trainer.recipe import load_recipe
from fastrl.trainer.setup import train

RECIPES = Path(__file__).parents[1] / "recipes"


def run(workload: Workload) -> list[StepRecord]:
    """Every step, warm-up included."""
    recipe = load_recipe(RECIPES / f"{workload.algorithm}.yaml")
    config = replace(
        recipe,
        model=workload.model,
        steps=workload.total_steps,
        seed=workload.seed,
        device=workload.device,
        dtype=workload.dtype or recipe.dtype,
        run_dir=f"{workload.folder}/fastrl",
        show_every=0,
        task=TaskConfig(source=str(workload.questions), held_out=0),
        rewards=(RewardConfig(f"bench.workload:{REWARDS[workload.reward].__name__}"),),
        rollout=replace(
            recipe.rollout,
            prompts_per_step=workload.prompts,
            group_size=workload.samples,
            max_new_tokens=workload.max_new_tokens,
        ),
        # The plain PPO loop has a critic of its own too.
        ppo=replace(recipe.ppo, critic="separate") if workload.algorithm == "ppo" else recipe.ppo,
    )
    metrics = train(config).report.parent / "metrics.jsonl"
    return [_record(json.loads(line), workload) for line in metrics.read_text().splitlines()]


def _record(step: dict[str, float], workload: Workload) -> StepRecord:
    stages = {name: step.get(f"time/{name}", 0.0) for name in ("rollout", "reward", "score", "train")}
    return StepRecord(
        seconds=step["step_time"],
        stages=stages,
        reward=step["reward"],
        length=step["completions/mean_length"],
        tokens=round(step["tokens_per_second"] * step["step_time"]),
        equal_rewards=step["frac_reward_zero_std"],
    )


if __name__ == "__main__":
    child(run)
