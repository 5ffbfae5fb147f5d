"""Several processes train the model that one would: every algorithm, every source, whatever fails in one of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from rollout.test_turns import config_for as conversation_config
from trainer.ranks import environment, finish, start, train_together, write
from trainer.test_rounds import rounds_config
from trainer.test_stages import write_recipe
from trainer.tiny import offline_config, tiny_config, write_answers

from fastrl.algorithms.masks import TokenMasks
from fastrl.distributed import ALONE, World
from fastrl.trainer.build import build_algorithm
from fastrl.trainer.config import (
    AheadConfig,
    DataConfig,
    EnvironmentConfig,
    InterruptionConfig,
    OptimizerConfig,
    PPOConfig,
    RewardConfig,
    RolloutConfig,
)
from fastrl.trainer.setup import require_splits, train
from fastrl.types import MicroBatch

# Which product a layer takes is measured by each run, and would change the last digits.
SAME = {"linear": "torch", "threads": 1, "show_every": 0}
TWICE = OptimizerConfig(lr=1e-2, steps_per_rollout=2, epochs_per_rollout=2)
UNTIMED = ("time", "seconds", "tokens_per_second")


def runs(folder):
    """One small run of each kind, by name."""
    pretraining = DataConfig(source=str(write_answers(folder / "written.jsonl", "completions")), held_out=4, chat=False)
    ppo = {"algorithm": "ppo", "max_tokens_per_microbatch": 96}
    talk = folder / "talk"
    talk.mkdir()
    environment = EnvironmentConfig("rollout.test_turns:Twice", turn_tokens=12)
    return {
        "grpo": tiny_config(folder, optimizer=TWICE, loss={"kl": {"coef": 0.1}}, **SAME),
        "scale_rl": tiny_config(folder, algorithm="scale_rl", **SAME),
        "dapo": tiny_config(folder, algorithm="dapo", rollout=RolloutConfig(3, 4, 6, dynamic_sampling=2), **SAME),
        "remax": tiny_config(folder, algorithm="remax", **SAME),
        "interrupted": tiny_config(
            folder, interruption=InterruptionConfig((2, 3), "w7 w6", ""), rollout=RolloutConfig(4, 4, 9), **SAME
        ),
        "ppo": tiny_config(folder, **ppo, ppo=PPOConfig(critic_lr=1e-2, kl_coef=0.05), optimizer=TWICE, **SAME),
        "ppo_shared": tiny_config(
            folder, **ppo, ppo=PPOConfig(critic="shared", ptx_coef=0.5), data=pretraining, **SAME
        ),
        "conversation": conversation_config(talk, environment=environment, steps=3, **SAME),
        "dpo": offline_config(folder, "dpo", **SAME),
        "kto": offline_config(folder, "kto", **SAME),
        "sft": offline_config(folder, "sft", **SAME),
        "reward_model": offline_config(folder, "reward_model", **SAME),
        "online_dpo": tiny_config(folder, algorithm="dpo", source="rollouts", **SAME),
        "self_rewarding": rounds_config(folder, **SAME),
    }


def in_folder(config, folder):
    return replace(config, run_dir=str(folder))


def logged(folder, name="metrics"):
    lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not any(word in k for word in UNTIMED)} for line in lines]


def assert_alike(found, wanted, name):
    """Equal but for rounding: the order in which gradients and metrics are added up."""
    assert len(found) == len(wanted), name
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys(), name
        for key, value in other.items():
            if isinstance(value, float):
                assert one[key] == pytest.approx(value, rel=2e-4, abs=2e-6), f"{name}: {key}"
            else:
                assert one[key] == value, f"{name}: {key}"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Each run with one process: (recipes, folder)."""
    folder = tmp_path_factory.mktemp("alone")
    recipes = runs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastrl.monitor.report.charts", lambda run: [])
        for name, config in recipes.items():
            assert train(in_folder(config, folder / "runs" / name)).status == "finished", name
    return recipes, folder


FEW = ("grpo", "ppo", "conversation", "dpo")  # with three processes, some have fewer prompts or micro-batches, or none


@pytest.mark.parametrize(("size", "names"), [(2, ()), (3, FEW)])
def test_a_run_of_several_processes_is_that_of_one_but_for_rounding(alone, tmp_path, size, names):
    recipes, folder = alone
    recipes = {name: config for name, config in recipes.items() if not names or name in names}
    said = train_together([in_folder(config, tmp_path / name) for name, config in recipes.items()], size, tmp_path)
    assert "held-out" in said[0]
    assert not any("held-out" in one or "warning" in one for one in said[1:]), said[1]  # one screen
    for name in recipes:
        for file in ("metrics", "evaluations"):
            assert_alike(logged(tmp_path / name, file), logged(folder / "runs" / name, file), f"{name}, {file}")


def wait_for(path, lines, processes, seconds=120):
    until = time.monotonic() + seconds
    while not (path.is_file() and path.read_text().count("\n") >= lines):
        assert all(process.poll() is None for process in processes), [one.communicate()[0] for one in processes]
        assert time.monotonic() < until, "the run does not begin"
        time.sleep(0.05)


LONG = {"steps": 60, "save_every": 0, **SAME}
COMMAND = ("-m", "fastrl", "train")


@pytest.mark.parametrize("size", [1, 3])
def test_a_signal_to_one_process_saves_and_another_number_of_them_goes_on_alike(tmp_path, size):
    whole, stopped = (tiny_config(tmp_path, run_dir=str(tmp_path / name), **LONG) for name in ("whole", "stopped"))
    recipe = write(stopped, tmp_path / "recipe.yaml")
    processes = start(2, [*COMMAND, recipe])
    wait_for(tmp_path / "stopped" / "metrics.jsonl", 3, processes)
    processes[1].send_signal(signal.SIGTERM)
    ended = finish(processes)
    assert [code for code, _ in ended] == [128 + signal.SIGTERM] * 2, ended[0][1]
    done = len(logged(tmp_path / "stopped"))
    assert 3 <= done < 60
    steps = {"steps": min(60, done + 4)}
    again = write(replace(stopped, resume=stopped.run_dir, **steps), tmp_path / "again.yaml")
    assert [code for code, _ in finish(start(size, [*COMMAND, again]))] == [0] * size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastrl.monitor.report.charts", lambda run: [])
        train(replace(whole, **steps))
    assert_alike(logged(tmp_path / "stopped"), logged(tmp_path / "whole"), "resumed")


def test_when_a_process_is_killed_the_others_stop_within_seconds_and_what_was_trained_is_saved(tmp_path):
    config = tiny_config(tmp_path, **LONG | {"steps": 100_000})
    processes = start(2, [*COMMAND, write(config, tmp_path / "recipe.yaml")])
    wait_for(tmp_path / "run" / "metrics.jsonl", 3, processes)
    processes[1].kill()
    began = time.monotonic()
    (code, said), _ = finish(processes)
    assert time.monotonic() - began < 30
    assert code == 1
    assert "rank 0 lost the others" in " ".join(said.split())
    assert "To resume:" in said
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")]


def test_a_reward_that_fails_in_one_process_ends_the_run_in_all_with_its_words(tmp_path):
    rewards = (RewardConfig("trainer.ranks:fails_on_rank_1"),)
    config = tiny_config(tmp_path, rewards=rewards, **SAME)
    ended = finish(start(2, [*COMMAND, write(config, tmp_path / "recipe.yaml")]))
    assert [code for code, _ in ended] == [1, 1], ended
    for _, said in ended:
        assert "no judge here" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed: expected the same on all 2 processes, '0' as on rank 0, got '1' on rank 1"),
        ({"task": "task"}, "data: expected the same on all 2 processes"),
        ({"model": "other"}, "model: expected the same on all 2 processes"),
    ],
)
def test_processes_that_differ_are_refused_in_all_of_them(tmp_path, changes, message):
    """Each reads its own files, of the same names, as on machines without a shared disk."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    configs = [tiny_config(folder, **SAME) for folder in folders]
    if changes == {"task": "task"}:
        lines = (folders[1] / "task.jsonl").read_text().splitlines()
        (folders[1] / "task.jsonl").write_text("\n".join(reversed(lines)))
    elif changes == {"model": "other"}:
        tensors = folders[1] / "model" / "model.safetensors"
        tensors.write_bytes(tensors.read_bytes()[:-4] + b"\0\0\0\0")
    else:
        configs[1] = replace(configs[1], **changes)
    for folder, config in zip(folders, configs, strict=True):
        local = {"model": "model", "run_dir": "run", "task": replace(config.task, source="task.jsonl")}
        write(replace(config, **local), folder / "recipe.yaml")
    command = ["-c", "import os, sys; os.chdir(os.environ['HERE']); from fastrl.cli import main; "
               "sys.exit(main(['train', 'recipe.yaml']))"]  # fmt: skip
    began = time.monotonic()
    ended = finish(start(2, command, rank0={"HERE": str(folders[0])}, rank1={"HERE": str(folders[1])}))
    assert time.monotonic() - began < 60
    for code, said in ended:
        assert code == 2
        assert message in said
    assert not (folders[0] / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"source": "ahead", "algorithm": "scale_rl", "ahead": AheadConfig(max_staleness=1)},
            "source: expected rollouts",
        ),
        ({"masks": TokenMasks(top_entropy=0.2)}, "masks: expected none with several processes"),
        ({"algorithm": "aot"}, "none that sorts the whole batch"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(tmp_path, changes, message):
    config = offline_config(tmp_path, "aot") if changes == {"algorithm": "aot"} else tiny_config(tmp_path, **changes)
    require_splits(config, build_algorithm(config), ALONE)
    with pytest.raises(ValueError, match=message):
        require_splits(config, build_algorithm(config), World(1, 2))


def test_a_recipe_of_stages_runs_and_goes_on_in_two_processes(tmp_path):
    recipe = write_recipe(tmp_path)
    first = finish(start(2, [*COMMAND, str(recipe), "--threads", "1"]))
    assert [code for code, _ in first] == [0, 0], first
    assert "All stages finished" in first[0][1]
    assert "Stage" not in first[1][1]
    record = (tmp_path / "run" / "stages.json").read_text()
    assert all(one["status"] == "finished" and one["after"] for one in json.loads(record).values())
    again = finish(start(2, [*COMMAND, str(recipe), "--threads", "1", "--resume", str(tmp_path / "run")]))
    assert [code for code, _ in again] == [0, 0], again
    assert again[0][1].count("finished before") == len(json.loads(record))
    assert (tmp_path / "run" / "stages.json").read_text() == record


def test_torchrun_trains_a_recipe(tmp_path):
    config = tiny_config(tmp_path, **SAME)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = environment(0, 2, 0)["PYTHONPATH"]
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [*launch, *COMMAND, write(config, tmp_path / "recipe.yaml")]
    done = subprocess.run(command, env=env | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert len(logged(tmp_path / "run")) == 3


def test_of_several_processes_that_evaluate_the_first_prints(tmp_path):
    config = tiny_config(tmp_path)
    recipe = write(config, tmp_path / "recipe.yaml")
    first, second = finish(start(2, ["-m", "fastrl", "eval", config.model, recipe]))
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert first[1].count("held-out greedy") == 1
    assert "held-out" not in second[1]


def batch_of(tokens):
    empty = torch.zeros(0)
    return MicroBatch(torch.zeros(1, tokens), *[empty] * 11)


def test_micro_batches_go_to_the_process_with_the_least_tokens_and_each_to_one():
    batches = [batch_of(tokens) for tokens in (3, 9, 2, 4, 8)]
    worlds = [World(rank, 2) for rank in range(2)]
    assert [world.owners(batches) for world in worlds] == [[0, 0, 0, 1, 1]] * 2  # 9 to 0, 8 and 4 to 1, 3 and 2 to 0
    shares = [world.share(batches) for world in worlds]
    assert sorted(map(id, shares[0] + shares[1])) == sorted(map(id, batches))
    loads = [sum(batch.num_tokens for batch in share) for share in shares]
    assert max(loads) - min(loads) <= 4
    assert World(2, 3).share(batches[:2]) == []
    assert ALONE.share(batches) == batches
    assert [World(rank, 3).places(7) for rank in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]
