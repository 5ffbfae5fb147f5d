import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from fastrl.rewards import resolve_reward
from fastrl.rewards.extract import answer_tag, boxed, last_number
from fastrl.rewards.reasoning_gym import EVALUATING


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is -3.", "-3"),
        ("10 + 2 = 12", "12"),
        ("It costs $1,234,567.89 in all", "1234567.89"),
        ("1, 2, 3", "3"),
        ("1,2,3", "3"),
        ("10-3", "3"),
        ("2 - -6", "-6"),
        ("x=-3", "-3"),
        ("(-3)", "-3"),
        ("**-12**", "-12"),
        ("\N{MINUS SIGN}7", "-7"),
        ("+7", "+7"),
        (".5", ".5"),
        ("5cm", "5"),
        ("1e5", "1e5"),
        ("\\boxed{-4}", "-4"),
        ("none", None),
        ("", None),
    ],
)
def test_last_number(text, expected):
    assert last_number(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer> 4 </answer>", "4"),
        ("<answer>3</answer> no, <answer>4\n5</answer>", "4\n5"),
        ("<answer>3<answer>4</answer>", "4"),
        ("<answer>4", None),
    ],
)
def test_answer_tag(text, expected):
    assert answer_tag(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1} or \boxed{2}", "2"),
        (r"\boxed{1} or \boxed{2", "1"),
        (r"\boxed{", None),
        ("4", None),
    ],
)
def test_boxed(text, expected):
    assert boxed(text) == expected


def scored(task, text, *, entry=None, options=None, **settings):
    options = options or {}
    entry = entry or reasoning_gym.create_dataset(task, size=1, seed=0, **options)[0]
    columns = {"entry": [entry], "task": [task], "task_options": [options]}
    return resolve_reward("reasoning_gym", **settings)(completions=[text], **columns)[0]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("extract", "form"),
    [
        ("answer_tag", "<answer>{}</answer>"),
        ("boxed", r"\boxed{{{}}}"),
        ("full", " {}\n"),
        ("last_number", "It is {}."),
    ],
)
def test_the_right_answer_scores_one_in_every_form(extract, form, strict):
    entry = {"answer": "-1234", "metadata": {}}
    settings = {"entry": entry, "extract": extract, "strict": strict}
    assert scored("chain_sum", form.format("-1234"), **settings) == 1.0
    assert scored("chain_sum", form.format("-1,234"), **settings) == 1.0
    assert scored("chain_sum", form.format("1235"), **settings) == 0.0
    assert scored("chain_sum", "", **settings) == 0.0


def test_a_chat_completion_is_read_as_its_text():
    columns = {"entry": [{"answer": "4"}], "task": ["chain_sum"], "task_options": [{}]}
    completion = [{"role": "assistant", "content": "4"}]
    assert resolve_reward("reasoning_gym", extract="full")(completions=[completion], **columns) == [1.0]


def test_strict_takes_partial_scores_away():
    settings = {"entry": {"answer": "4"}, "extract": "full"}
    assert scored("chain_sum", "42", **settings) == 0.5, "the task pays for an answer that contains the right digit"
    assert scored("chain_sum", "42", strict=True, **settings) == 0.0


def test_the_scorer_has_the_tasks_own_options():
    entry = {"answer": "3.1", "metadata": {}}
    answer = "3.14"
    loose = {"min_num_decimal_places": 1, "max_num_decimal_places": 1}  # right within 0.1
    tight = {"min_num_decimal_places": 4, "max_num_decimal_places": 4}
    assert scored("decimal_arithmetic", answer, entry=entry, options=loose, extract="full", strict=True) == 1.0
    assert scored("decimal_arithmetic", answer, entry=entry, options=tight, extract="full", strict=True) == 0.0


@pytest.mark.parametrize("task", ["letter_counting", "gcd", "base_conversion", "calendar_arithmetic", "sudoku"])
def test_the_oracle_answer_of_a_task_scores_one(task):
    entry = reasoning_gym.create_dataset(task, size=1, seed=0)[0]
    assert scored(task, f"<answer>{entry['answer']}</answer>", entry=entry, strict=True) == 1.0


def test_a_task_that_runs_the_answer_as_code_is_refused_unless_allowed():
    with pytest.raises(ValueError, match="got countdown, whose scorer runs it as Python code"):
        scored("countdown", "<answer>1</answer>")
    entry = reasoning_gym.create_dataset("countdown", size=1, seed=0)[0]
    assert scored("countdown", f"<answer>{entry['answer']}</answer>", entry=entry, allow_eval=True) == 1.0


def test_the_list_of_tasks_that_run_the_answer_as_code_is_complete():
    import inspect
    import re

    runs = re.compile(r"\beval\(answer|(?<!def )parse_expr\(answer|sympify\(answer|\bexec\(")
    found = {name for name, (task, _) in DATASETS.items() if runs.search(inspect.getsource(task.score_answer))}
    assert found - {"propositional_logic"} == EVALUATING, "propositional_logic has a parser of its own"
