"""Which language a text is in, by its letters and its commonest words."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fastrl import check
from fastrl.rewards.extract import completion_text

# Per language: its scripts, as Unicode names characters, and common words that tell it from others with its script.
COMMON = {
    "en": "the of and to in is that it was for on are with as his they be at this have from or by not but what we when "
    "your can there an which their if will how then so would than first",
    "de": "der und das ist nicht ich sie mit es ein eine zu auf für von dem den auch wird sind wir wie aber dann oder "
    "als aus bei nach im zum durch wenn in an so was will",
    "fr": "le les et est des une dans que qui pas sur nous vous avec ce il elle sont du au mais ou donc être cette par "
    "alors on or",
    "es": "el los es una que en por con para las del se su al lo como más pero sus está entonces porque cuando",
    "it": "il gli una che di non con del della sono si da nel anche come più alla questo quindi allora in per",
    "pt": "os uma que em por com para não da dos das se na mais como mas ao são então você porque as",
    "nl": "de het een en van dat niet op te zijn voor met aan er maar om ook als dan bij nog wordt deze wij in is of "
    "we was will",
}
ENGLISH_TOO = frozenset(("come", "per", "met", "as"))  # say nothing against a text in English
SCRIPTS = {name: {"LATIN"} for name in COMMON} | {
    "zh": {"CJK"},
    "ja": {"HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "CJK"},
    "ko": {"HANGUL"},
    "ru": {"CYRILLIC"},
    "ar": {"ARABIC"},
    "he": {"HEBREW"},
    "el": {"GREEK"},
    "hi": {"DEVANAGARI"},
    "th": {"THAI"},
}
WORDS = {name: frozenset(words.split()) for name, words in COMMON.items()}
# Not language: code, mathematics, tags, links.
APART = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\\[.*?\\\]|\\[A-Za-z]+|</?\w+>|https?://\S+", re.S
)
UNSPACED = {"CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "THAI"}  # each letter counts as a word


@dataclass(frozen=True)
class LanguageConsistencyReward:
    """The share of a completion's words that are in the language: DeepSeek-R1's reward against mixing languages
    (arXiv:2501.12948, section 2.3.2).

        reward = words in the target language / words

    A word is in the language if its letters are of the language's script, unless it is a common word of other languages
    with that script and not of this one. So it tells English from Chinese word by word, but French from English only by
    their commonest words. A word is a run of letters of one script, or one character where writing has no spaces. Code,
    mathematics, tags and single Latin letters, which name variables, are not counted; a text without words gets 0.

    Args:
        language: its ISO 639-1 code.
    """

    language: str = "en"

    __name__ = "language_consistency"

    def __post_init__(self) -> None:
        check.choice("language_consistency", "language", self.language, SCRIPTS)

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float]:
        """One score per completion."""
        return [share(completion_text(completion), self.language) for completion in completions]


def share(text: str, language: str) -> float:
    """The share of words that are in the language; 0 without words."""
    found = words(text)
    others = frozenset().union(*WORDS.values()) - WORDS.get(language, frozenset())
    others -= ENGLISH_TOO if language == "en" else frozenset()
    good = sum(script in SCRIPTS[language] and word not in others for word, script in found)
    return good / max(1, len(found))


def dominant(text: str) -> str | None:
    """The language of most words, among those with a table; None if no word decides."""
    votes: Counter[str] = Counter()
    scripts = Counter(script for _, script in words(text))
    for language, own in SCRIPTS.items():
        if language not in WORDS:
            votes[language] = sum(scripts[script] for script in own)
    if scripts["HIRAGANA"] + scripts["KATAKANA"] == 0:
        votes["ja"] = 0
    latin = Counter({name: sum(word in own for word, _ in words(text)) for name, own in WORDS.items()})
    best, count = latin.most_common(1)[0]
    if count:
        votes[best] = scripts["LATIN"]
    language, count = votes.most_common(1)[0]
    return language if count else None


def words(text: str) -> list[tuple[str, str]]:
    """(word in lower case, script) of each word."""
    found: list[tuple[str, str]] = []
    word, script = "", ""
    for letter in [*unicodedata.normalize("NFC", APART.sub(" ", text)), " "]:
        if word and unicodedata.category(letter) in ("Mn", "Mc"):
            continue  # a mark on the letter before
        now = _script(letter)
        if word and (now != script or now in UNSPACED):
            found.append((word.lower(), script))
            word = ""
        word, script = (word + letter, now) if now else ("", "")
    return [(one, of) for one, of in found if len(one) > 1 or of != "LATIN"]


@lru_cache(maxsize=65536)
def _script(letter: str) -> str:
    """The script of a letter, as its Unicode name begins; empty for what is no letter."""
    return unicodedata.name(letter, "").split(" ")[0] if letter.isalpha() else ""
