"""Finds the first stop string in a completion's text while its tokens are drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

_PART = "\ufffd"  # how the first bytes of a character are decoded until the others follow


@dataclass
class _Text:
    """The text of a completion so far."""

    ids: list[int] = field(default_factory=list)
    known: str = ""  # text of the first `read` tokens, which end with a whole character
    read: int = 0
    context: int = 0  # text after `known` is decoded together with the tokens from here on


class StopStrings:
    """Reads completions token by token. `ends` has the number of tokens at which each first contained a stop string.

    A string may span tokens and begin or end inside one, because the text is searched, special tokens included. A
    string that is complete within the first `ignored` tokens does not count.

    Args:
        completions: the number of completions, which are identified by index.
    """

    def __init__(
        self, strings: Sequence[str], tokenizer: PreTrainedTokenizerBase, completions: int, ignored: int = 0
    ) -> None:
        self.strings, self.ignored = strings, ignored
        self.ends: dict[int, int] = {}
        self._tokenizer = tokenizer
        self._texts = [_Text() for _ in range(completions)]

    def read(self, completion: int, tokens: Iterable[int]) -> bool:
        """Reads the next tokens of a completion; returns whether it has ended."""
        text = self._texts[completion]
        for token in tokens:
            if completion in self.ends:
                break
            if self._completes(text, token):
                self.ends[completion] = len(text.ids)
        return completion in self.ends

    def _completes(self, text: _Text, token: int) -> bool:
        """Adds a token; returns whether its text completes a stop string."""
        text.ids.append(token)
        # A token's text depends on its neighbours (bytes of the same character, a word before it), so it is the
        # difference of decoding the tokens since `context` with and without it.
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
