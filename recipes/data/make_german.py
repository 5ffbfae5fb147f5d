"""Writes german_*.jsonl: German questions, demonstrations and preference pairs. See README.md."""

from __future__ import annotations

import json
import random
from pathlib import Path

HERE = Path(__file__).parent
LANDS = {
    "Frankreich": ("France", "Paris", "Paris"), "Spanien": ("Spain", "Madrid", "Madrid"),
    "Italien": ("Italy", "Rom", "Rome"), "Deutschland": ("Germany", "Berlin", "Berlin"),
    "Österreich": ("Austria", "Wien", "Vienna"), "Polen": ("Poland", "Warschau", "Warsaw"),
    "Griechenland": ("Greece", "Athen", "Athens"), "Russland": ("Russia", "Moskau", "Moscow"),
    "Ungarn": ("Hungary", "Budapest", "Budapest"), "Norwegen": ("Norway", "Oslo", "Oslo"),
    "Schweden": ("Sweden", "Stockholm", "Stockholm"), "Dänemark": ("Denmark", "Kopenhagen", "Copenhagen"),
    "Belgien": ("Belgium", "Brüssel", "Brussels"), "Portugal": ("Portugal", "Lissabon", "Lisbon"),
    "Ägypten": ("Egypt", "Kairo", "Cairo"), "Japan": ("Japan", "Tokio", "Tokyo"),
    "Irland": ("Ireland", "Dublin", "Dublin"), "Finnland": ("Finland", "Helsinki", "Helsinki"),
}  # fmt: skip
OPPOSITES = {
    "groß": ("klein", "big", "small"), "heiß": ("kalt", "hot", "cold"), "schnell": ("langsam", "fast", "slow"),
    "alt": ("jung", "old", "young"), "hell": ("dunkel", "light", "dark"), "nass": ("trocken", "wet", "dry"),
    "reich": ("arm", "rich", "poor"), "früh": ("spät", "early", "late"), "hart": ("weich", "hard", "soft"),
    "voll": ("leer", "full", "empty"), "stark": ("schwach", "strong", "weak"), "hoch": ("tief", "high", "low"),
    "lang": ("kurz", "long", "short"), "gut": ("schlecht", "good", "bad"), "laut": ("leise", "loud", "quiet"),
    "sauber": ("schmutzig", "clean", "dirty"), "schwer": ("leicht", "heavy", "light"),
    "süß": ("sauer", "sweet", "sour"), "neu": ("alt", "new", "old"), "breit": ("schmal", "wide", "narrow"),
}  # fmt: skip
COLOURS = {
    "das Gras": ("grün", "The grass", "green"), "der Schnee": ("weiß", "The snow", "white"),
    "eine reife Banane": ("gelb", "A ripe banana", "yellow"), "der klare Himmel": ("blau", "The clear sky", "blue"),
    "die Kohle": ("schwarz", "Coal", "black"), "eine reife Tomate": ("rot", "A ripe tomato", "red"),
    "eine Karotte": ("orange", "A carrot", "orange"), "ein Elefant": ("grau", "An elephant", "grey"),
    "die Milch": ("weiß", "Milk", "white"), "eine Zitrone": ("gelb", "A lemon", "yellow"),
    "die Schokolade": ("braun", "Chocolate", "brown"), "der Spinat": ("grün", "Spinach", "green"),
    "eine Erdbeere": ("rot", "A strawberry", "red"), "ein Rabe": ("schwarz", "A raven", "black"),
}  # fmt: skip
WORDS = {
    "house": "Haus", "tree": "Baum", "water": "Wasser", "bread": "Brot", "dog": "Hund", "cat": "Katze",
    "child": "Kind", "book": "Buch", "table": "Tisch", "door": "Tür", "window": "Fenster", "street": "Straße",
    "city": "Stadt", "school": "Schule", "friend": "Freund", "night": "Nacht", "summer": "Sommer", "apple": "Apfel",
    "moon": "Mond", "heart": "Herz", "bird": "Vogel", "fish": "Fisch", "flower": "Blume", "mountain": "Berg",
}  # fmt: skip
NUMBERS = [
    "null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn", "elf", "zwölf",
    "dreizehn", "vierzehn",
]  # fmt: skip
ENGLISH = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen",
]  # fmt: skip
DAYS = ["Montag", "Dienstag", "Mittwoch", "Donnerstag", "Freitag", "Samstag", "Sonntag"]
ENGLISH_DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def _large(text: str) -> str:
    return text[0].upper() + text[1:]


def facts() -> list[tuple[str, list[str], str, str, str]]:
    """(topic, German questions, right German answer, wrong German answer, English answer)."""
    rng, found = random.Random(0), []

    def wrong(right: str, every: list[str]) -> str:
        return rng.choice([one for one in every if one != right])

    for land, (country, stadt, city) in LANDS.items():
        asks = [f"Was ist die Hauptstadt von {land}?", f"Wie heißt die Hauptstadt von {land}?"]
        asks += [f"Welche Stadt ist die Hauptstadt von {land}?"]
        say, other = f"Die Hauptstadt von {land} ist ", wrong(stadt, [one[1] for one in LANDS.values()])
        found.append((land, asks, f"{say}{stadt}.", f"{say}{other}.", f"The capital of {country} is {city}."))
    for word, (opposite, english, english_opposite) in OPPOSITES.items():
        asks = [f'Was ist das Gegenteil von "{word}"?', f'Welches Wort bedeutet das Gegenteil von "{word}"?']
        say, other = f'Das Gegenteil von "{word}" ist "', wrong(opposite, [one[0] for one in OPPOSITES.values()])
        in_english = f'The opposite of "{english}" is "{english_opposite}".'
        found.append((word, asks, f'{say}{opposite}".', f'{say}{other}".', in_english))
    for thing, (colour, english, english_colour) in COLOURS.items():
        asks = [f"Welche Farbe hat {thing}?", f"Sag mir bitte, welche Farbe {thing} hat."]
        say, other = f"{_large(thing)} ist ", wrong(colour, [one[0] for one in COLOURS.values()])
        found.append((thing, asks, f"{say}{colour}.", f"{say}{other}.", f"{english} is {english_colour}."))
    for english, word in WORDS.items():
        asks = [f'Was heißt "{english}" auf Deutsch?', f'Wie sagt man "{english}" auf Deutsch?']
        say, other = f'Das englische Wort "{english}" heißt auf Deutsch "', wrong(word, list(WORDS.values()))
        in_english = f'The word "{english}" is "{word}" in German.'
        found.append((english, asks, f'{say}{word}".', f'{say}{other}".', in_english))
    for a in range(1, 8):
        for b in range(1, 8):
            asks = [f"Wie viel ist {NUMBERS[a]} plus {NUMBERS[b]}?"]
            say, other = f"{_large(NUMBERS[a])} plus {NUMBERS[b]} ist ", wrong(NUMBERS[a + b], NUMBERS[2:])
            in_english = f"{_large(ENGLISH[a])} plus {ENGLISH[b]} is {ENGLISH[a + b]}."
            found.append((f"{a}+{b}", asks, f"{say}{NUMBERS[a + b]}.", f"{say}{other}.", in_english))
    for place, day in enumerate(DAYS):
        after, before = (place + 1) % 7, (place - 1) % 7
        for ask, what, to in (("kommt nach", "Nach dem", after), ("kommt vor", "Vor dem", before)):
            asks, english = [f"Welcher Tag {ask} {day}?"], "after" if to == after else "before"
            say, other = f"{what} {day} kommt der ", wrong(DAYS[to], DAYS)
            in_english = f"The day {english} {ENGLISH_DAYS[place]} is {ENGLISH_DAYS[to]}."
            found.append((f"{ask} {day}", asks, f"{say}{DAYS[to]}.", f"{say}{other}.", in_english))
    return found


def main(folder: Path = HERE) -> None:
    """Writes the files; no fact of german_test.jsonl is in the others, and no fact is in both sft and pairs."""
    rng = random.Random(1)
    every = facts()
    rng.shuffle(every)
    test, sft, pairs = every[:32], every[32:76], every[76:]
    rows: dict[str, list[dict]] = {"sft": [], "pairs": [], "test": []}
    for _, asks, right, _, _ in sft:
        rows["sft"] += [{"prompt": ask, "completion": right} for ask in asks]
    for _, asks, right, wrong, english in pairs:
        for ask in asks:  # against English, and against a German answer that is wrong
            rows["pairs"] += [{"prompt": ask, "chosen": right, "rejected": bad} for bad in (english, wrong)]
    rows["test"] = [{"prompt": asks[0], "answer": right} for _, asks, right, _, _ in test]
    for name in ("sft", "pairs"):
        rng.shuffle(rows[name])
    for name, lines in rows.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"german_{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
