"""Writes small Python tasks with their tests and solutions, one JSON object per line, for recipes/rlvr_code.yaml.

Run: python recipes/data/make_code_tasks.py > recipes/data/code_tasks.jsonl
"""

import json
import random

# What the function returns, an expression of its arguments, and the arguments.
KINDS = [
    ("the sum of {a} and {b}", "{a} + {b}", 2),
    ("the product of {a} and {b}", "{a} * {b}", 2),
    ("{a} minus {b}", "{a} - {b}", 2),
    ("the larger of {a} and {b}", "max({a}, {b})", 2),
    ("the smaller of {a} and {b}", "min({a}, {b})", 2),
    ("the square of {a}", "{a} ** 2", 1),
    ("the cube of {a}", "{a} ** 3", 1),
    ("{a} plus {n}", "{a} + {n}", 1),
    ("{n} times {a}", "{n} * {a}", 1),
    ("{a} minus {n}", "{a} - {n}", 1),
    ("the remainder of {a} divided by {n}", "{a} % {n}", 1),
    ("True if {a} is greater than {n}, else False", "{a} > {n}", 1),
    ("True if {a} is even, else False", "{a} % 2 == 0", 1),
    ("True if {a} is divisible by {n}, else False", "{a} % {n} == 0", 1),
    ("the absolute value of {a}", "abs({a})", 1),
    ("the sum of {a} and {b}, times {n}", "({a} + {b}) * {n}", 2),
    ("the square of {a} plus {b}", "{a} ** 2 + {b}", 2),
    ("the average of {a} and {b}", "({a} + {b}) / 2", 2),
]
NAMES = ["f", "g", "calc", "compute", "solve", "result", "func", "value"]
ARGUMENTS = ["ab", "xy", "mn", "pq", "uv"]


def task(rng: random.Random) -> dict:
    """One task."""
    words, expression, count = rng.choice(KINDS)
    name, letters, number = rng.choice(NAMES), rng.choice(ARGUMENTS), rng.randint(2, 9)
    filled = {"a": letters[0], "b": letters[1], "n": number}
    arguments = ", ".join(letters[:count])
    solution = f"def {name}({arguments}):\n    return {expression.format(**filled)}"
    scope: dict = {}
    exec(solution, scope)
    inputs = [[rng.randint(-20, 20) for _ in range(count)] for _ in range(4)]
    tests = [f"assert {name}({', '.join(map(str, one))}) == {scope[name](*one)!r}" for one in inputs]
    question = f"Write a Python function {name}({arguments}) that returns {words.format(**filled)}."
    prefix = f"```python\ndef {name}({arguments}):\n    return"  # the model continues it
    prompt = [{"role": "user", "content": question}, {"role": "assistant", "content": prefix}]
    return {"prompt": prompt, "prefix": prefix, "tests": tests, "reference": solution}


def main(number: int = 600) -> None:
    """Prints tasks with different prompts."""
    rng, seen = random.Random(0), set()
    while len(seen) < number:
        row = task(rng)
        question = row["prompt"][0]["content"]
        if question not in seen:
            seen.add(question)
            print(json.dumps(row))


if __name__ == "__main__":
    main()
