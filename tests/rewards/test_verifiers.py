"""The rewards json_schema, language_consistency, instructions and format."""

import json
import socket
import time

import pytest

from fastrl.rewards import RewardSuite, resolve_reward
from fastrl.rewards.instructions import KINDS, InstructionsReward
from fastrl.rewards.json_schema import JsonSchemaReward
from fastrl.rewards.language import SCRIPTS, LanguageConsistencyReward, dominant, share
from fastrl.types import Prompt

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def of_schema(texts, schema=PERSON, **columns):
    columns = {name: [value] * len(texts) for name, value in columns.items()}
    return JsonSchemaReward()(texts, schema=[schema] * len(texts), **columns)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"name": "Ada", "age": 36}', 1),
        ('```json\n{"name": "Ada", "age": 36}\n```', 1),
        ('<think>{"name": 1}</think>\n<answer>{"name": "Ada", "age": 36.0}</answer>', 1),
        ('{"name": "Ada", "age": 36} That is it.', 0),
        ('{"name": "Ada"}', 0),
        ('{"name": "Ada", "age": -1}', 0),
        ('{"name": "Ada", "age": true}', 0),
        ('{"name": "Ada", "age": 1, "more": 1}', 0),
        ('{"name": "Ada", "age": 1, "age": 2}', 0),
        ("{'name': 'Ada', 'age': 1}", 0),
        ("", 0),
        ("```json\n```", 0),
    ],
)
def test_json_scores_if_it_fits_the_schema(text, score):
    assert of_schema([text]) == [score]
    assert of_schema([text], json.dumps(PERSON)) == [score]


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", "[" * 5000, "[" * 200 + "]" * 200, "9" * 5000, "\ud800", "\0"])
def test_what_is_no_json_or_too_deep_scores_0_even_where_everything_fits(text):
    assert of_schema([text], True) == [0.0]


def test_an_expected_value_is_compared_as_json():
    texts = ['{"a": 1.0, "b": [1]}', '{"b": [1], "a": 1}', '{"a": true, "b": [1]}', '{"a": 1, "b": [1, 2]}']
    assert of_schema(texts, {"type": "object"}, expected='{"a": 1, "b": [1]}') == [1.0, 1.0, 0.0, 0.0]
    assert JsonSchemaReward()(["1", "x"], schema=[None, {"type": "integer"}]) == [None, 0.0]


def test_a_schema_elsewhere_is_not_fetched(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(Exception, match=r"example\.com"):
        of_schema(["1"], {"$ref": "https://example.com/schema.json"})


@pytest.mark.parametrize("schema", [{"type": "strin"}, "{", "[]", {"pattern": "("}, 3])
def test_a_broken_schema_is_refused_at_the_start_with_its_prompt(schema):
    suite = RewardSuite([JsonSchemaReward()])
    with pytest.raises(ValueError, match=r"json_schema: prompt 7: .*expected a JSON schema"):
        suite.check_prompts([Prompt(7, "q", (1,), {"schema": schema})])


def test_an_expected_value_that_does_not_fit_its_schema_is_refused_at_the_start():
    prompt = Prompt(7, "q", (1,), {"schema": PERSON, "expected": {"name": "Ada"}})
    with pytest.raises(ValueError, match="prompt 7: expected: expected a value that fits the schema"):
        JsonSchemaReward().check_prompts([prompt])


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("The sum of two and three is five.", "en", 1.0),
        ("The sum 等于 five", "en", 3 / 5),
        ("等于五", "zh", 1.0),
        ("The answer is 等于五", "zh", 3 / 6),
        ("Сумма равна пяти", "ru", 1.0),
        ("Die Summe ist fünf und das ist gut", "de", 1.0),
        ("das ist the sum", "de", 3 / 4),
        ("das ist the sum", "en", 2 / 4),
        ("これは五です", "ja", 1.0),
        ("We have `über x` and $x = α$ and \\frac{1}{2} so </think>", "en", 1.0),
        ("1 + 2 = 3", "en", 0.0),
        ("", "en", 0.0),
        ("cafe\u0301 is good", "en", 1.0),
    ],
)
def test_the_share_of_words_in_the_language(text, language, expected):
    assert share(text, language) == pytest.approx(expected)
    assert LanguageConsistencyReward(language)([text]) == [share(text, language)]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("It is not what you think, and that was all there is.", "en"),
        ("Das ist nicht das, was ich mir für diesen Tag gewünscht habe.", "de"),
        ("Ce n'est pas ce que nous avons dans la maison, mais elle est belle.", "fr"),
        ("No es lo que los niños quieren, pero está bien porque son las cinco.", "es"),
        ("Non è quello che gli amici della scuola sono soliti dire.", "it"),
        ("Isso não é o que você quer, mas são as regras.", "pt"),
        ("Dit is niet wat het kind van de buren wordt, maar het is goed.", "nl"),
        ("我们今天去学校", "zh"),
        ("私は学校に行きます", "ja"),
        ("나는 학교에 간다", "ko"),
        ("Я иду в школу", "ru"),
        ("12 + 3", None),
    ],
)
def test_a_text_has_the_language_of_most_of_its_words(text, language):
    assert dominant(text) == language


def test_a_language_without_a_table_is_refused():
    with pytest.raises(ValueError, match="language_consistency: language: expected one of en, de"):
        resolve_reward("language_consistency", language="tlh")
    assert {"en", "zh"} <= SCRIPTS.keys()


# name -> (arguments, a text that follows, texts that do not)
CASES = {
    "keywords:existence": ({"keywords": ["cat", "dog"]}, "Cat and dog.", ["Category, dog.", "cat"]),
    "keywords:frequency": ({"keyword": "a b", "frequency": 2, "relation": "at least"}, "a b, A B", ["a b ab"]),
    "keywords:forbidden_words": ({"forbidden_words": ["cat"]}, "category", ["the Cat."]),
    "keywords:letter_frequency": (
        {"letter": "e", "let_frequency": 2, "let_relation": "less than"}, "One", ["Eerie"]),
    "language:response_language": ({"language": "de"}, "Das ist nicht gut.", ["This is not good.", "12"]),
    "length_constraints:number_sentences": (
        {"num_sentences": 2, "relation": "at least"}, "One is 1.5. Two!", ["Just 1.5 of it."]),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "a\n***\nb", ["a\n\nb", "a\n***\nb\n***\nc"]),
    "length_constraints:number_words": (
        {"num_words": 3, "relation": "less than"}, "it's well-known", ["one two three"]),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"}, "a b\n\nThen, c", ["then\n\na", "Then"]),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "[name], [age]", ["[name]", "[] []"]),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, "Hi\nP.S. bye", ["Hi", "Hi\nP.S.", "Hops."]),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* a\n- b", ["* a", "* a\n* b\n* c", "** a\n--- b"]),
    "detectable_format:constrained_response": ({}, "My answer is no.", ["No.", "My answer is no. Or yes."]),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 2}, "*a b* and **c**", ["*a*", "** ** * *"]),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Part", "num_sections": 2}, "Part 1\na\n**Part 2**\nb", ["Part 1", "Part X\nPart Y"]),
    "detectable_format:json_format": ({}, '```json\n{"a": 1}\n```', ["{'a': 1}", "Sure: {}", "NaN"]),
    "detectable_format:title": ({}, "<<A title>>\ntext", ["<< >>", "<title>"]),
    "combination:two_responses": ({}, "a\n******\nb", ["a", "a******a", "a******", "a******b******c"]),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say hi"}, "say hi Hi!", ["Hi!", "Hi! Say hi"]),
    "startend:end_checker": ({"end_phrase": "That is all."}, "So. that is all.", ["That is all. Bye."]),
    "startend:quotation": ({}, '"hi"', ['"hi', "hi", '""']),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"}, "GO and STOP", ["GO and A", "go"]),
    "change_case:english_capital": ({}, "THIS IS IT 1.", ["This Is It", "12"]),
    "change_case:english_lowercase": ({}, "this is it", ["This is it", "12"]),
    "punctuation:no_comma": ({}, "a; b", ["a, b"]),
}  # fmt: skip


def test_every_kind_has_a_case():
    assert CASES.keys() == KINDS.keys()
    assert len(KINDS) == 25  # as in arXiv:2311.07911, table 1


@pytest.mark.parametrize("name", KINDS)
def test_an_instruction_scores_the_texts_that_follow_it_alone(name):
    arguments, right, wrong = CASES[name]
    texts = [right, *wrong, "", " \n"]
    padded = arguments | {"not_an_argument_of_this_kind": None}  # as rows of `datasets` have them
    columns = {"instruction_id_list": [[name]] * len(texts), "kwargs": [[padded]] * len(texts)}
    assert InstructionsReward()(texts, **columns) == [1.0] + [0.0] * (len(texts) - 1)


def test_a_kind_named_twice_counts_twice_and_all_must_hold():
    name = "length_constraints:number_words"
    given = [{"num_words": 2, "relation": "at least"}, {"num_words": 4, "relation": "less than"}]
    columns = {"instruction_id_list": [[name] * 2] * 2, "kwargs": [given] * 2}
    assert InstructionsReward()(["one two", "one two three four"], **columns) == [1.0, 0.0]
    assert InstructionsReward(partial=True)(["one two", "one two three four"], **columns) == [1.0, 0.5]


@pytest.mark.parametrize(
    ("names", "given", "message"),
    [
        (["punctuation:no_coma"], [{}], "Did you mean 'punctuation:no_comma'"),
        (["keywords:existence"], [{}], "kwargs of keywords:existence: expected keywords, got missing"),
        (["keywords:existence"], [{"keyword": ["a"]}], "kwargs of keywords:existence"),
        (["length_constraints:number_words"], [{"num_words": 3, "relation": "around"}], "relation: expected one of"),
        (["language:response_language"], [{"language": "sw"}], "language: expected one of en"),
        (["punctuation:no_comma"], [], "a list of names and a list of as many mappings"),
        ([], [], "a list of names and a list of as many mappings"),
        ("punctuation", [{}], "Expecting value"),
    ],
)
def test_instructions_that_are_none_are_refused_at_the_start(names, given, message):
    suite = RewardSuite([InstructionsReward()])
    prompt = Prompt(4, "q", (1,), {"instruction_id_list": names, "kwargs": given})
    with pytest.raises(ValueError, match=rf"instructions: prompt 4: .*{message}"):
        suite.check_prompts([prompt])


@pytest.mark.parametrize("name", [name for name in KINDS if name != "language:response_language"])
def test_no_text_takes_long(name):
    arguments, _, _ = CASES[name]
    began = time.monotonic()
    for text in ("*" * 20_000, "[" * 20_000, "<" * 20_000, " " * 20_000, "a" * 20_000, "\n" * 20_000, "P" * 20_000):
        InstructionsReward()([text + "!"], instruction_id_list=[[name]], kwargs=[[arguments]])
    assert time.monotonic() - began < 5


def test_a_format_may_begin_in_the_prompt():
    text = "two and three</think> <answer>5</answer>"
    assert resolve_reward("format")([text, "<think>" + text]) == [0.0, 1.0]
    assert resolve_reward("format", prefix="<think>")([text, "<think>" + text, "no"]) == [1.0, 0.0, 0.0]
