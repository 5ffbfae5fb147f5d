"""Writes tasks whose answers a program can check by their form, one JSON object per line, for
recipes/rlvr_structured.yaml: facts to be given as JSON under a schema, and instructions of IFEval's kinds.

Run: python recipes/data/make_structured_tasks.py > recipes/data/structured_tasks.jsonl
"""

import json
import random

NAMES = [
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Hanna",
    "Ivan",
    "Julia",
    "Karl",
    "Lena",
    "Max",
    "Nora",
    "Otto",
]
CITIES = ["Rome", "Paris", "Oslo", "Madrid", "Vienna", "Lisbon", "Athens", "Dublin", "Prague", "Warsaw"]
JOBS = ["baker", "nurse", "pilot", "teacher", "painter", "farmer", "judge", "cook"]
TOPICS = [
    "the sea",
    "a cat",
    "the moon",
    "a train",
    "bread",
    "rain",
    "a garden",
    "music",
    "the city",
    "winter",
    "a dog",
    "tea",
]
TYPES = {"name": "string", "age": "integer", "city": "string", "job": "string"}
# The words of the instruction, IFEval's name for it, and its arguments.
INSTRUCTIONS = [
    ("in lowercase letters only", "change_case:english_lowercase", {}),
    ("in capital letters only", "change_case:english_capital", {}),
    ("without any comma, in at least 12 words", "punctuation:no_comma", {}),
    ("in less than 8 words", "length_constraints:number_words", {"num_words": 8, "relation": "less than"}),
    (
        "in exactly two bullet points, each beginning with *",
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
    ),
    ("with the whole answer in double quotation marks", "startend:quotation", {}),
    ("so that the answer ends with the words The End.", "startend:end_checker", {"end_phrase": "The End."}),
    ("with a title in double angular brackets, such as <<title>>", "detectable_format:title", {}),
]


def extraction(rng: random.Random) -> dict:
    """A sentence, and the keys under which its facts are to be given."""
    facts = {"name": rng.choice(NAMES), "age": rng.randint(18, 80), "city": rng.choice(CITIES), "job": rng.choice(JOBS)}
    keys = ["name", *rng.sample(["age", "city", "job"], 2)]
    told = {"age": "is {age} years old", "city": "lives in {city}", "job": "works as a {job}"}
    text = f"{facts['name']} " + " and ".join(told[key].format(**facts) for key in keys[1:]) + "."
    question = (
        f"{text} Answer with one JSON object that has the keys {keys[0]}, {keys[1]} and {keys[2]}, and nothing else."
    )
    schema = {
        "type": "object",
        "properties": {key: {"type": TYPES[key]} for key in keys},
        "required": keys,
        "additionalProperties": False,
    }
    return {"prompt": question, "schema": schema, "expected": {key: facts[key] for key in keys}}


def instruction(rng: random.Random) -> dict:
    """Something to write about, and how."""
    how, name, arguments = rng.choice(INSTRUCTIONS)
    names, given = [name], [arguments]
    if name == "punctuation:no_comma":  # an empty answer has none either
        names.append("length_constraints:number_words")
        given.append({"num_words": 12, "relation": "at least"})
    question = f"Write one or two sentences about {rng.choice(TOPICS)}, {how.removesuffix('.')}."
    return {"prompt": question, "instruction_id_list": names, "kwargs": given}


def main(number: int = 180) -> None:
    """Prints `number` tasks, as many of each kind as the words allow, with different prompts."""
    rng, rows = random.Random(0), {}
    kinds = (extraction, instruction)
    while len(rows) < number:
        row = kinds[len(rows) % 2](rng)
        rows.setdefault(row["prompt"], row)
    for row in rows.values():
        print(json.dumps(row))


if __name__ == "__main__":
    main()
