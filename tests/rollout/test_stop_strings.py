"""Stop strings in the text of growing completions, with a byte-level tokenizer and one that falls back to bytes."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from fastrl.rollout.stop_strings import StopStrings

# The bytes of é are C3 A9, those of 🛑 F0 9F 9B 91; in a byte-level vocabulary they are written as these characters.
STOP_SIGN = ["ð", "Ł", "Ľ", "ĳ"]
BYTE_LEVEL = ["<eos>", "ST", "OP", "xSTO", "Py", "Pð", "STOP", "a", "ab", "Ġ", "Ċ", "Ã", "©", "xÃ", "©y", *STOP_SIGN]
FALLBACK = ["<eos>", "▁STOP", "STOP", "▁a", "b", "<0xC3>", "<0xA9>", "<0xF0>", "<0x9F>", "<0x9B>", "<0x91>"]


def tokenizer_of(pieces, decoder):
    words = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<eos>"))
    words.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")


def byte_level():
    return tokenizer_of(BYTE_LEVEL, decoders.ByteLevel())


def fallback():
    """As Llama's: a word begins with ▁, of which the text's first is left out, and unknown characters are bytes."""
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return tokenizer_of(FALLBACK, decoders.Sequence(parts))


def end(tokenizer, pieces, strings, ignored=0):
    """How many tokens there are when a stop string is found; None where none is."""
    reader = StopStrings(strings, tokenizer, 1, ignored)
    reader.read(0, tokenizer.convert_tokens_to_ids(pieces))
    return reader.ends.get(0)


@pytest.mark.parametrize(
    ("pieces", "string", "expected"),
    [
        (["a", "ST", "OP", "a"], "STOP", 3),
        (["a", "xSTO", "Py", "a"], "STOP", 3),  # begins and ends inside tokens
        (["a", "ab", "ab"], "b", 2),
        (["a", "a", "ab"], "aab", 3),  # after a beginning that led to nothing
        (["Ċ", "Ċ"], "\n\n", 2),
        (["a", "Ġ", "a"], "a a", 3),
        (["Ã", "©", "a"], "é", 2),
        (["xÃ", "©y"], "xéy", 2),
        (["a", *STOP_SIGN, "a"], "🛑", 5),
        (["xSTO", "Pð", "Ł"], "STOP", 2),  # the token goes on with part of a character
        (["©", "©", "ST", "OP"], "STOP", 4),  # after bytes that are no character
        (["a", "<eos>"], "<eos>", 2),
        (["ST", "a", "OP"], "STOP", None),
        (["Ã", "a", "©"], "é", None),
    ],
)
def test_a_stop_string_is_found_with_the_token_that_completes_it(pieces, string, expected):
    assert end(byte_level(), pieces, [string]) == expected


@pytest.mark.parametrize(
    ("pieces", "string", "expected"),
    [
        (["▁a", "▁STOP"], "a STOP", 2),
        (["▁a", "▁STOP"], " STOP", 2),
        (["▁STOP", "b"], " STOP", None),  # a text does not begin with its first word's space
        (["▁STOP", "b"], "STOP", 1),
        (["b", "<0xC3>", "<0xA9>"], "é", 3),
        (["<0xC3>", "<0xA9>", "<0xF0>", "<0x9F>", "<0x9B>", "<0x91>"], "é🛑", 6),
    ],
)
def test_a_stop_string_is_found_where_spaces_and_bytes_are_written_otherwise(pieces, string, expected):
    assert end(fallback(), pieces, [string]) == expected


def test_the_first_of_several_stop_strings_ends_a_completion():
    assert end(byte_level(), ["a", "ab", "ST", "OP"], ["STOP", "b"]) == 2
    assert end(byte_level(), ["a", "ST", "OP", "ab"], ["STOP", "b"]) == 3


@pytest.mark.parametrize(
    ("pieces", "ignored", "expected"),
    [
        (["STOP", "a", "STOP", "STOP"], 1, 3),
        (["STOP", "a", "STOP", "STOP"], 3, 4),
        (["STOP", "a", "a"], 1, None),
        (["ST", "OP", "a"], 1, 2),  # begins among the ignored ones
        (["a", "ST", "OP"], 3, None),
    ],
)
def test_a_stop_string_that_is_whole_among_the_ignored_tokens_does_not_count(pieces, ignored, expected):
    assert end(byte_level(), pieces, ["STOP"], ignored) == expected


@pytest.mark.parametrize("make", [byte_level, fallback])
def test_random_completions_end_where_their_whole_text_first_contains_a_stop_string(make):
    tokenizer, draws, found = make(), random.Random(0), 0
    strings = ["STOP", "é", "🛑", "a b", "ba", " STOPb"]
    for _ in range(300):
        ids = [draws.randrange(1, len(tokenizer)) for _ in range(12)]
        texts = [tokenizer.decode(ids[:length]) for length in range(1, 13)]
        expected = next((i for i, text in enumerate(texts, 1) if any(s in text for s in strings)), None)
        reader = StopStrings(strings, tokenizer, 1)
        reader.read(0, ids)
        assert reader.ends.get(0) == expected
        found += expected is not None
    assert 50 < found < 300


@pytest.mark.parametrize("size", [1, 3, 8])
def test_completions_are_told_apart_and_may_be_read_in_parts_of_any_size(size):
    tokenizer = byte_level()
    pieces = [["a", "ST", "OP", "a"] * 2, ["OP", "ST", "a", "Ã", "©", "a", "a", "a"], ["a"] * 8]
    reader = StopStrings(["STOP", "é"], tokenizer, 3)
    for start in range(0, 8, size):
        for completion, tokens in enumerate(pieces):
            ids = tokenizer.convert_tokens_to_ids(tokens[start : start + size])
            ended = reader.read(completion, ids)
            assert ended == (completion in reader.ends)
    assert reader.ends == {0: 3, 1: 5}
