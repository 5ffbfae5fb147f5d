"""The data of the recipes of stages: what the scripts write, and what the rules measure."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from fastrl.rewards.instructions import InstructionsReward
from fastrl.rewards.json_schema import JsonSchemaReward
from fastrl.rewards.judge import LLMJudge, parsed
from fastrl.types import Prompt

DATA = Path(__file__).resolve().parents[1] / "recipes" / "data"


def script(name):
    spec = importlib.util.spec_from_file_location(name, DATA / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(name):
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", ["helpful", "german"])
def test_the_scripts_write_the_files_again_bit_for_bit(tmp_path, name):
    script(f"make_{name}").main(tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == sorted(path.name for path in DATA.glob(f"{name}_*.jsonl"))
    for file in files:
        assert (tmp_path / file).read_bytes() == (DATA / file).read_bytes()


def test_the_gradings_of_the_seed_order_the_ranked_answers_and_the_rest_are_the_demonstrations():
    seed, ranked = rows("helpful_seed"), rows("helpful_ranked")
    demonstrations = [row for row in seed if parsed(row["completion"]) is None]
    assert sorted(row["prompt"] for row in demonstrations) == sorted(row["prompt"] for row in rows("helpful_sft"))
    points, judge = {row["prompt"]: parsed(row["completion"]) for row in seed}, LLMJudge(None)
    for row in ranked[:60]:
        given = [points[judge.points_question(row["prompt"], answer)] for answer in row["responses"]]
        assert [rank for _, rank in sorted(zip(given, row["ranking"], strict=True), reverse=True)] == [1, 2, 3, 4, 5]
    held_out = [judge.points_question(row["prompt"], answer) for row in ranked[60:] for answer in row["responses"]]
    assert len(held_out) == 75
    assert not set(held_out) & set(points)


def test_the_structured_tasks_are_those_of_their_script_and_each_reward_judges_its_own(capsys):
    script("make_structured_tasks").main()
    assert capsys.readouterr().out == (DATA / "structured_tasks.jsonl").read_text()
    tasks = rows("structured_tasks")
    prompts = [Prompt(place, row["prompt"], (1,), row) for place, row in enumerate(tasks)]
    schema, instructions = JsonSchemaReward(), InstructionsReward()
    schema.check_prompts(prompts)
    instructions.check_prompts(prompts)
    answers = [json.dumps(row.get("expected")) for row in tasks]
    columns = {
        name: [row.get(name) for row in tasks] for name in ("schema", "expected", "instruction_id_list", "kwargs")
    }
    scores = list(zip(schema(answers, **columns), instructions(answers, **columns), strict=True))
    assert sum(one == 1.0 and other is None for one, other in scores) == 90
    assert sum(one is None and other is not None for one, other in scores) == 90


def test_no_question_is_in_two_files_and_the_page_counts_the_rows():
    page = (DATA / "README.md").read_text(encoding="utf-8")
    for kinds in (("helpful_sft", "helpful_ranked", "helpful_prompts"), ("german_sft", "german_pairs", "german_test")):
        asked = [{row["prompt"] for row in rows(kind)} for kind in kinds]
        assert len(set.union(*asked)) == sum(map(len, asked))
        for kind in kinds:
            assert f"| `{kind}.jsonl` | {len(rows(kind))} |" in page


def test_the_rules_know_the_answers_that_the_data_prefer():
    judges = script("judges")
    pairs = rows("german_pairs")
    chosen = judges.german([row["chosen"] for row in pairs])
    assert min(chosen) > 0.5
    english = [
        row["rejected"]
        for row in pairs
        if re.match(r"(The|A|An|Coal|Milk|Chocolate|Spinach|\w+ plus \w+ is) ", row["rejected"])
    ]
    assert max(judges.german(english)) < 0.5
    test = rows("german_test")
    assert judges.right([row["answer"] for row in test], [row["answer"] for row in test]) == [1.0] * len(test)
    assert judges.right(["Ja."], [test[0]["answer"]]) == [0.0]
    answers = ["Paris is the capital of France.", "paris", "London is the capital.", "Parisian life is good."]
    assert judges.helpful(answers, ["Paris"] * 4) == [1.0, 0.5, 0.0, 0.0]
