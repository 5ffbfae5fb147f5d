"""Whether a completion follows instructions that a program can check: the 25 kinds of IFEval (arXiv:2311.07911)."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastrl import check
from fastrl.rewards.extract import completion_text
from fastrl.rewards.json_schema import strict_json
from fastrl.rewards.language import WORDS, dominant
from fastrl.types import Prompt

RELATIONS: dict[str, Callable[[int, int], bool]] = {"at least": int.__ge__, "less than": int.__lt__}
CHOICES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
FENCE = re.compile(r"\A```[ \t]*(?:json)?[ \t]*\n(.*)```\Z", re.DOTALL | re.IGNORECASE)
TWO = "******"


def _compared(count: int, relation: str, number: int) -> bool:
    check.choice("instructions", "relation", relation, RELATIONS)
    return RELATIONS[relation](count, number)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+(?:['’-]\w+)*", text)


def _occurrences(text: str, phrase: str) -> int:
    """How often a phrase occurs as whole words, in any case."""
    return len(re.findall(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE))


def _paragraphs(text: str, separator: str) -> list[str]:
    return [part for part in re.split(separator, text.strip()) if part.strip()]


def _nth_paragraph(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = _paragraphs(text, r"\n\s*\n")
    if len(parts) != num_paragraphs or not 1 <= nth_paragraph <= num_paragraphs:
        return False
    first = _words(parts[nth_paragraph - 1])[:1]
    return [word.lower() for word in first] == [first_word.lower()]


def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"^[^\w\n]*{re.escape(section_spliter)}[ \t]+\d+", text, re.MULTILINE)) >= num_sections


def _postscript(text: str, postscript_marker: str) -> bool:
    letters = r"\.? ?".join(map(re.escape, postscript_marker.replace(".", "").replace(" ", "")))
    return re.search(rf"^[ \t]*{letters}\b\W*\w", text, re.MULTILINE | re.IGNORECASE) is not None


def _is_json(text: str) -> bool:
    fenced = FENCE.match(text.strip())
    try:
        strict_json(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    return True


def _in_language(text: str, language: str) -> bool:
    known = [*WORDS, "zh", "ja", "ko", "ru", "ar", "he", "el", "hi", "th"]
    check.choice("instructions", "language", language, known)
    return dominant(text) == language


def _all_case(text: str, upper: bool) -> bool:
    return (text.isupper() if upper else text.islower()) and dominant(text) in ("en", None)


def _capitals(text: str, capital_frequency: int, capital_relation: str) -> bool:
    words = [word for word in _words(text) if word.isupper() and len(word) > 1]
    return _compared(len(words), capital_relation, capital_frequency)


def _two_responses(text: str) -> bool:
    parts = [part.strip() for part in text.split(TWO)]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def _sentences(text: str) -> int:
    return len([part for part in re.split(r"(?<=[.!?])[\"')\]]*\s+", text.strip()) if re.search(r"\w", part)])


# Name -> whether a text follows it. The arguments are IFEval's own.
KINDS: dict[str, Callable[..., bool]] = {
    "keywords:existence": lambda text, keywords: all(_occurrences(text, word) for word in keywords),
    "keywords:frequency": lambda text, keyword, frequency, relation: _compared(
        _occurrences(text, keyword), relation, frequency
    ),
    "keywords:forbidden_words": lambda text, forbidden_words: not any(_occurrences(text, w) for w in forbidden_words),
    "keywords:letter_frequency": lambda text, letter, let_frequency, let_relation: _compared(
        text.lower().count(letter.lower()), let_relation, let_frequency
    ),
    "language:response_language": _in_language,
    "length_constraints:number_sentences": lambda text, num_sentences, relation: _compared(
        _sentences(text), relation, num_sentences
    ),
    "length_constraints:number_paragraphs": lambda text, num_paragraphs: (
        len(_paragraphs(text, r"\n?\s*\*\*\*\s*\n?")) == num_paragraphs
    ),
    "length_constraints:number_words": lambda text, num_words, relation: _compared(
        len(_words(text)), relation, num_words
    ),
    "length_constraints:nth_paragraph_first_word": _nth_paragraph,
    "detectable_content:number_placeholders": lambda text, num_placeholders: (
        len(re.findall(r"\[[^\[\]\n]+\]", text)) >= num_placeholders
    ),
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": lambda text, num_bullets: (
        len(re.findall(r"^[ \t]*(?:\*(?!\*)|-)[ \t]+\S", text, re.MULTILINE)) == num_bullets
    ),
    "detectable_format:constrained_response": lambda text: text.strip() in CHOICES,
    "detectable_format:number_highlighted_sections": lambda text, num_highlights: (
        len(re.findall(r"\*\*[^\n*]*[^\s*][^\n*]*\*\*|(?<!\*)\*[^\s*][^\n*]*\*(?!\*)", text)) >= num_highlights
    ),
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _is_json,
    "detectable_format:title": lambda text: re.search(r"<<[^<>\n]*[^<>\s][^<>\n]*>>", text) is not None,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": lambda text, prompt_to_repeat: (
        text.strip().lower().startswith(prompt_to_repeat.strip().lower())
    ),
    "startend:end_checker": lambda text, end_phrase: (
        text.strip().strip('"').lower().endswith(end_phrase.strip().lower())
    ),
    "startend:quotation": lambda text: len(text.strip()) > 2 and text.strip()[0] == text.strip()[-1] == '"',
    "change_case:capital_word_frequency": _capitals,
    "change_case:english_capital": lambda text: _all_case(text, upper=True),
    "change_case:english_lowercase": lambda text: _all_case(text, upper=False),
    "punctuation:no_comma": lambda text: "," not in text,
}


@dataclass(frozen=True)
class InstructionsReward:
    """1 if the completion follows all instructions of its prompt, else 0: IFEval's strict accuracy of a prompt
    (arXiv:2311.07911, section 2.2), the verifier of Tulu 3 (arXiv:2411.15124, section 6). None without instructions.

    Reads IFEval's columns: `instruction_id_list`, names such as `punctuation:no_comma`, and `kwargs`, one mapping for
    each, whose None values are left out. Words and sentences are counted by simple rules, not by NLTK's; languages are
    told by `fastrl.rewards.language`. A completion without text follows nothing.

    Args:
        partial: the share of followed instructions instead.
    """

    partial: bool = False

    __name__ = "instructions"

    def __call__(
        self, completions: Sequence[Any], *, instruction_id_list: Sequence[Any], kwargs: Sequence[Any], **_: Any
    ) -> list[float | None]:
        """One score per completion."""
        rows = zip(completions, instruction_id_list, kwargs, strict=True)
        return [self._score(completion_text(one), names, given) for one, names, given in rows]

    def check_prompts(self, prompts: Iterable[Prompt]) -> None:
        """Refuses prompts with instructions that are unknown or lack an argument.

        Raises:
            ValueError: with the prompt's index.
        """
        for prompt in prompts:
            try:
                self._score("word", prompt.columns.get("instruction_id_list"), prompt.columns.get("kwargs"))
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"instructions: prompt {prompt.index}: {error}") from error

    def _score(self, text: str, names: Any, given: Any) -> float | None:
        if names is None:
            return None
        names, given = (json.loads(value) if isinstance(value, str) else value for value in (names, given))
        fine = isinstance(names, list) and isinstance(given, list) and len(names) == len(given) > 0
        expected = "a list of names and a list of as many mappings"
        check.require(fine, "instructions", "instruction_id_list, kwargs", expected, f"{names!r:.60} and {given!r:.60}")
        followed = [_follows(text, name, arguments or {}) for name, arguments in zip(names, given, strict=True)]
        return sum(followed) / len(followed) if self.partial else float(all(followed))


def _follows(text: str, name: str, given: Mapping[str, Any]) -> bool:
    check.choice("instructions", "instruction_id_list", name, KINDS)
    arguments = {key: value for key, value in given.items() if value is not None}
    try:
        inspect.signature(KINDS[name]).bind(text, **arguments)
    except TypeError as error:
        known = ", ".join(list(inspect.signature(KINDS[name]).parameters)[1:]) or "none"
        raise ValueError(check.sentence("instructions", f"kwargs of {name}", known, f"{error}")) from error
    return bool(text.strip()) and KINDS[name](text, **arguments)
