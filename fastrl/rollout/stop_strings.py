"""Where the text of a completion first contains a stop string, found while its tokens are drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

_PART = "\ufffd"  # how the first bytes of a character are decoded until the others follow


@dataclass
class _Text:
    """What is known of a completion's text."""

    ids: list[int] = field(default_factory=list)
    known: str = ""  # of the first `read` tokens, which end with a whole character
    read: int = 0
    context: int = 0  # what follows `known` is decoded together with the tokens from here on


class StopStrings:
    """Reads completions token by token, and keeps in `ends` how many tokens each had when it first contained a string.

    A string may span tokens, begin or end inside one, and be part of a character's bytes away from its end: what is
    searched is text, special tokens included. It does not count where it is whole among the first `ignored` tokens.

    Args:
        completions: how many there are; they are told apart by number.
    """

    def __init__(
        self, strings: Sequence[str], tokenizer: PreTrainedTokenizerBase, completions: int, ignored: int = 0
    ) -> None:
        self.strings, self.ignored = strings, ignored
        self.ends: dict[int, int] = {}
        self._tokenizer = tokenizer
        self._texts = [_Text() for _ in range(completions)]

    def read(self, completion: int, tokens: Iterable[int]) -> bool:
        """Reads the next tokens of a completion; whether it has ended."""
        text = self._texts[completion]
        for token in tokens:
            if completion in self.ends:
                break
            if self._completes(text, token):
                self.ends[completion] = len(text.ids)
        return completion in self.ends

    def _completes(self, text: _Text, token: int) -> bool:
        """Adds a token; whether what it adds to the text completes a stop string."""
        text.ids.append(token)
        # A token's text depends on its neighbours: on bytes of the same character, and on whether a word comes before.
        # So it is what the tokens since `context` read as with it more than without it.
        before = self._decode(text.ids[text.context : text.read])
        new = self._decode(text.ids[text.context :])[len(before) :]
        whole, length = text.known + new, len(text.known)
        if new and not new.endswith(_PART):
            text.known, text.context, text.read = whole, text.read, len(text.ids)
        if len(text.ids) <= self.ignored:
            return False
        return any(whole.find(stop, max(0, length + 1 - len(stop))) >= 0 for stop in self.strings)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
