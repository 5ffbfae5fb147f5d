"""The data of the recipes of stages: what the scripts write, and what the rules measure."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

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
