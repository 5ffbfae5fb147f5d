"""Writes helpful_*.jsonl: short questions with demonstrations, ranked answers of several styles, and gradings of these.

See README.md. Gradings answer the question that `fastrl.rewards.judge` asks for additive points.
"""

from __future__ import annotations

import json
import random
from itertools import product
from pathlib import Path

from fastrl.rewards.judge import LLMJudge

HERE = Path(__file__).parent
CAPITALS = {
    "France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Germany": "Berlin", "Japan": "Tokyo", "China": "Beijing",
    "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens", "Poland": "Warsaw", "Portugal": "Lisbon",
    "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki", "Austria": "Vienna", "Hungary": "Budapest",
    "Ireland": "Dublin", "Cuba": "Havana", "Peru": "Lima", "Chile": "Santiago", "Kenya": "Nairobi",
    "India": "New Delhi", "Turkey": "Ankara", "Belgium": "Brussels", "Canada": "Ottawa", "Denmark": "Copenhagen",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "up": "down", "day": "night", "fast": "slow", "old": "young", "happy": "sad",
    "wet": "dry", "rich": "poor", "light": "dark", "early": "late", "hard": "soft", "open": "closed", "full": "empty",
    "strong": "weak", "high": "low", "long": "short", "good": "bad", "loud": "quiet", "clean": "dirty",
    "left": "right", "near": "far", "inside": "outside", "winter": "summer", "love": "hate", "true": "false",
}  # fmt: skip
COLOURS = {
    "grass": "green", "snow": "white", "a ripe banana": "yellow", "the clear sky": "blue", "coal": "black",
    "a ripe tomato": "red", "a carrot": "orange", "an elephant": "grey", "milk": "white", "blood": "red",
    "a lemon": "yellow", "a crow": "black", "chocolate": "brown", "spinach": "green", "a flamingo": "pink",
    "a strawberry": "red",
}  # fmt: skip
SOUNDS = {
    "a dog": "barks", "a cat": "meows", "a cow": "moos", "a lion": "roars", "a duck": "quacks", "a sheep": "bleats",
    "a horse": "neighs", "a frog": "croaks", "an owl": "hoots", "a snake": "hisses", "a pig": "oinks",
    "a bee": "buzzes",
}  # fmt: skip
PADDING = (
    "That is a really great question, and there are a lot of different things that one could say about it. ",
    "Before I answer, let me first say that many people wonder about this, and opinions on it may differ. ",
    "There is a long history behind this topic, which I will not go into here, although it is interesting. ",
)
# By rank: a grading's words and its points.
GRADES = {
    1: ("It is right, and one clear sentence says it.", 5),
    2: ("It is right, but only a word and no sentence.", 4),
    3: ("It is right, but long-winded before it comes to the point.", 3),
    4: ("It is a clear sentence, but what it says is wrong.", 1),
    5: ("It is rude and tells nothing of what was asked.", 0),
}
RUDE = ("Look it up yourself.", "Why would you ask me that?", "Everybody knows that.", "I do not care about this.")


def facts() -> list[tuple[str, str, str, str]]:
    """(question, answer in a sentence, bare answer, a wrong bare answer)."""
    rng, found = random.Random(0), []

    def add(question: str, sentence: str, answer: str, others: list[str]) -> None:
        found.append((question, sentence, answer, rng.choice([other for other in others if other != answer])))

    for country, city in CAPITALS.items():
        for question in (f"What is the capital of {country}?", f"Which city is the capital of {country}?"):
            add(question, f"The capital of {country} is {city}.", city, list(CAPITALS.values()))
    for word, other in OPPOSITES.items():
        for question in (f'What is the opposite of "{word}"?', f'Which word means the opposite of "{word}"?'):
            add(question, f'The opposite of "{word}" is "{other}".', other, list(OPPOSITES.values()))
    for thing, colour in COLOURS.items():
        for question in (f"What colour is {thing}?", f"Tell me the colour of {thing}."):
            add(question, f"{thing[0].upper()}{thing[1:]} is {colour}.", colour, list(COLOURS.values()))
    for animal, sound in SOUNDS.items():
        question = f"What sound does {animal} make?"
        add(question, f"{animal[0].upper()}{animal[1:]} {sound}.", sound, list(SOUNDS.values()))
    for a, b in product(range(1, 10), range(1, 10)):
        add(f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}.", str(a + b), [str(n) for n in range(2, 19)])
    return found


def ranked(question: str, sentence: str, answer: str, wrong: str, rng: random.Random) -> dict:
    """Five answers: right and short, right and bare, right but long-winded, short but wrong, rude."""
    other = sentence.replace(answer, wrong) if answer in sentence else wrong
    padded = "".join(rng.sample(PADDING, 2)) + sentence
    styles = [(sentence, 1), (f"{answer}", 2), (padded, 3), (other, 4), (rng.choice(RUDE), 5)]
    rng.shuffle(styles)
    return {"prompt": question, "responses": [text for text, _ in styles], "ranking": [rank for _, rank in styles]}


def gradings(row: dict) -> list[dict]:
    """The grading of each answer of a ranked row."""
    judge, found = LLMJudge(None), []
    for answer, rank in zip(row["responses"], row["ranking"], strict=True):
        words, points = GRADES[rank]
        question = judge.points_question(row["prompt"], answer)
        found.append({"prompt": question, "completion": f"{words}\nScore: {points}"})
    return found


def main(folder: Path = HERE) -> None:
    """Writes the files. No fact is in two of them, so PPO and its evaluation see only new ones."""
    rng, of = random.Random(1), {}
    for row in facts():
        of.setdefault(row[1], []).append(row)  # by sentence: a fact may have two questions
    every = list(of.values())
    rng.shuffle(every)
    sft, compared, prompts = every[:40], every[40:90], every[90:]
    rows = {
        "sft": [{"prompt": q, "completion": s} for same in sft for q, s, _, _ in same],
        "ranked": [ranked(*row, rng) for same in compared for row in same],
        "prompts": [{"prompt": q, "answer": a} for (q, _, a, _), *_ in prompts],
    }
    # Demonstrations and gradings in one file: what a model that judges itself begins with.
    seed = [*rows["sft"], *(one for row in rows["ranked"][:60] for one in gradings(row))]
    rng.shuffle(seed)
    rows["seed"] = seed
    for name, lines in rows.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"helpful_{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
