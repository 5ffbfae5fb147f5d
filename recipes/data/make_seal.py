"""Pairs of answers with features labelled by rule, for `fastrl analyze rewards`: docs/recipes/seal.md.

Whoever prefers here likes right answers, is taken in by politeness, and errs at random. Which answer is right, polite,
long or a refusal is known, and so is how much each of these weighed.
"""

import json
import math
import random
import re
from pathlib import Path

WEIGHTS = {"correct": 3.0, "polite": 1.5, "refusal": -1.5, "long": 0.0}  # of the preference; the rest is chance
FORMS = {
    "terse": "{0}",
    "plain": "It is {0}.",
    "polite": "Sure! The answer is {0}. Happy to help.",
    "long": "If you work it out step by step, the number that you get in the end is {0}.",
    "refusal": "I am sorry, but I cannot answer that.",
}
REWRITTEN = {"terse": "plain", "plain": "terse", "long": "plain", "polite": "long", "refusal": "refusal"}


def label(answer: str, right: int) -> dict[str, bool]:
    """The features of an answer."""
    numbers = re.findall(r"-?\d+", answer)
    return {
        "correct": numbers[-1:] == [str(right)],
        "polite": answer.startswith("Sure!"),
        "refusal": "cannot" in answer,
        "long": len(answer.split()) > 6,
        "number": bool(numbers),  # of any answer but a refusal: the two cannot be told apart
    }


def pair(number: int, a: int, b: int) -> dict[str, object]:
    """One question with two answers, and the same two rewritten."""
    right, options = a + b, []
    for form in random.sample(list(FORMS), 2):
        said = right if random.random() < 0.5 else right + random.choice([-3, -2, 2, 3, 5])
        features = label(FORMS[form].format(said), right)
        chance = -math.log(-math.log(random.random()))  # Gumbel noise: the Bradley-Terry model
        options.append((sum(WEIGHTS[name] * features[name] for name in WEIGHTS) + chance, form, said))
    row = {"id": number, "prompt": f"What is {a} + {b}?"}
    for side, (_, form, said) in zip(("rejected", "chosen"), sorted(options), strict=True):
        other = REWRITTEN[form] if random.random() < 0.8 else form
        for prefix, answer in (("", FORMS[form].format(said)), ("rewritten_", FORMS[other].format(said))):
            row[f"{prefix}{side}"] = answer
            row |= {f"{prefix}{side}_{name}": value for name, value in label(answer, right).items()}
    return row


random.seed(0)
questions = [(a, b) for a in range(10) for b in range(10)]
random.shuffle(questions)
for name, known, rows in (("train", questions[:70], 1000), ("analyze", questions[70:], 400)):
    lines = [json.dumps(pair(number, *random.choice(known))) for number in range(rows)]
    Path(f"seal_{name}.jsonl").write_text("\n".join(lines) + "\n")
