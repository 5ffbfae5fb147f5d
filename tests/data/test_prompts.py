import json
import warnings
from collections import Counter
from dataclasses import replace

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fastrl.data import PromptSampler, load_prompts, split
from fastrl.data.prompts import question
from fastrl.data.sources import read_rows
from fastrl.rewards.reasoning_gym import ReasoningGymReward

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{% if shout %}!{% endif %}"
)
QUESTIONS = [{"prompt": f"{a} + {b} =", "answer": a + b} for a in range(6) for b in range(6)]


def tokenizer(template=None):
    """One token per byte, and a beginning-of-sequence token before plain text."""
    alphabet = {"<bos>": 0} | {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), start=1)}
    byte = Tokenizer(models.BPE(alphabet, []))
    byte.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte.decoder = decoders.ByteLevel()
    byte.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=byte, bos_token="<bos>", chat_template=template)


PLAIN, CHAT = tokenizer(), tokenizer(TEMPLATE)


def seen(prompt):
    """The text of the tokens the model is given."""
    return CHAT.decode(prompt.token_ids)


def jsonl(folder, *lines):
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
    return path


def test_jsonl_rows_become_prompts_with_their_other_columns(tmp_path):
    path = jsonl(tmp_path, {"prompt": "Größe?", "answer": "3"}, "", {"prompt": "two", "tags": ["a"]})
    first, second = load_prompts(path, PLAIN)
    assert (first.index, first.content, first.columns) == (0, "Größe?", {"answer": "3"})
    assert (second.index, second.columns) == (1, {"tags": ["a"]})
    assert seen(first) == "<bos>Größe?"


@pytest.mark.parametrize(
    ("template", "chat", "expected"),
    [
        (None, True, "<bos>1 + 1 = Go."),
        (TEMPLATE, False, "<bos>1 + 1 = Go."),
        (TEMPLATE, True, "<system>Be brief.<user>1 + 1 = Go.<assistant>"),
    ],
)
def test_text_is_rendered_by_the_chat_template_when_asked_and_there_is_one(template, chat, expected):
    rows = [{"prompt": "1 + 1 ="}]
    (prompt,) = load_prompts(rows, tokenizer(template), chat=chat, suffix=" Go.", system="Be brief.")
    assert seen(prompt) == expected
    assert isinstance(prompt.content, list) == expected.startswith("<system>")


def test_messages_keep_their_own_system_message_and_the_suffix_goes_to_the_last_user_message():
    turns = [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    rows = [{"prompt": [{"role": role, "content": content} for role, content in turns]}]
    (prompt,) = load_prompts(rows, CHAT, chat=False, suffix="?", system="other")
    assert seen(prompt) == "<system>S<user>a<assistant>b<user>c?<assistant>d"
    assert rows[0]["prompt"][3]["content"] == "c", "the source's rows were changed"


def test_template_options_reach_the_chat_template():
    (prompt,) = load_prompts([{"prompt": "a"}], CHAT, template_options={"shout": True})
    assert seen(prompt) == "<user>a<assistant>!"


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
AGENT = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}<{{ m.role }}"
    "{% if m.name is defined %} {{ m.name }}{% endif %}>{% if m.reasoning_content is defined %}({{ m.reasoning_content "
    "}}){% endif %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{{ m.content[0].text if m.content else 'NONE' }}{% endif %}"
    "{% if m.tool_calls is defined %}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}{% if shout %}!{% endif %}"
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
CONVERSATION = [
    {"role": "user", "content": [{"type": "text", "text": "Rome?"}]},
    {"role": "assistant", "content": None, "reasoning_content": "ask", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": "21 C"},
]
RENDERED = (
    '[weather]<user>Rome?<assistant>(ask)NONE{"name": "weather", "arguments": {"city": "Rome"}}<tool weather>21 C'
    "<assistant>!"
)


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
@pytest.mark.parametrize("as_dataset", [False, True])
def test_every_field_of_a_message_and_a_rows_own_tools_and_options_reach_the_template(tools, as_dataset):
    rows = [{"prompt": CONVERSATION, "tools": tools, "chat_template_kwargs": {"shout": True}}]
    if as_dataset:  # which fills every message with the fields of all others
        rows[0]["prompt"] = [{**CONVERSATION[0], "content": "Rome?"}, *CONVERSATION[1:]]
        rows = datasets.Dataset.from_list([*rows, {"prompt": [{"role": "user", "content": "?", "mood": "x"}]}])
    prompt = load_prompts(rows, tokenizer(AGENT))[0]
    assert seen(prompt) == RENDERED
    assert prompt.content[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome"}


@pytest.mark.parametrize(
    "arguments", [{"city": "Röm", "n": None}, '{"city": "Röm", "n": null}'], ids=["mapping", "text"]
)
@pytest.mark.parametrize(
    "wants",
    [
        "c.function.arguments | tojson",  # Qwen: text would be quoted once more
        "'' + c.function.arguments",  # DeepSeek: raises on a mapping
        "c.function.arguments",  # a mapping would be in Python's spelling
        "c.function.arguments if c.function.arguments is string else c.function.arguments | tojson",
        "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}",  # raises on text
    ],
    ids=["tojson", "concatenated", "as it is", "either", "items"],
)
def test_arguments_of_tool_calls_are_written_as_the_template_wants_them_whichever_form_the_row_has(arguments, wants):
    """https://github.com/huggingface/transformers/issues/45419 lists what templates of different models do."""
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages = [CONVERSATION[0], CONVERSATION[1] | {"tool_calls": [call]}, CONVERSATION[2]]
    wanted = wants if wants.startswith("{%") else "{{ " + wants + " }}"
    template = AGENT.replace("{{ c.function | tojson }}", wanted)
    (prompt,) = load_prompts([{"prompt": messages}], tokenizer(template))
    written = "city=Röm;n=None;" if "items" in wants else '{"city": "Röm", "n": null}'
    assert seen(prompt) == f"<user>Rome?<assistant>(ask)NONE{written}<tool weather>21 C<assistant>"
    assert prompt.content[1]["tool_calls"][0]["function"]["arguments"] == arguments  # what rewards see is the row's


def test_a_template_that_takes_no_tool_calls_is_refused_by_row():
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    messages = [CONVERSATION[0], CONVERSATION[1] | {"tool_calls": [call]}]
    template = AGENT.replace("{{ c.function | tojson }}", "{{ raise_exception('no tools') }}")
    with pytest.raises(ValueError, match=r"list row 0: prompt: .* got no tools\."):
        load_prompts([{"prompt": messages}], tokenizer(template))


@pytest.mark.parametrize(
    ("message", "extra"),
    [
        ({"role": "user", "content": [{"type": "image"}]}, {}),
        ({"role": "user", "content": None}, {}),
        ({"role": "assistant", "tool_calls": None}, {}),
        ({"role": "user", "content": "a", "name": "\ud800"}, {}),
        ({"role": "user", "content": 3}, {}),
    ],
)
def test_a_message_that_says_nothing_or_no_text_is_refused(message, extra):
    rows = [{"prompt": [{"role": "user", "content": "a"}, message], **extra}]
    with pytest.raises(ValueError, match="list row 0: prompt: expected text, or chat messages"):
        load_prompts(rows, CHAT)


@pytest.mark.parametrize(
    ("extra", "error"),
    [
        ({"tools": "weather"}, "'tools' is not JSON"),
        ({"tools": {"a": 1}}, "'tools' is not a list"),
        ({"chat_template_kwargs": ["a"]}, "'chat_template_kwargs' is not a dict"),
    ],
)
def test_tools_that_are_no_list_are_refused_by_row(extra, error):
    with pytest.raises(ValueError, match=f"list row 0: prompt: .* got {error}"):
        load_prompts([{"prompt": "a", **extra}], CHAT)


def with_special(single, template=None):
    """The tokenizer with another way to frame texts, <bos> being 0 and <eos> 257."""
    it = tokenizer(template)
    it.add_special_tokens({"eos_token": "<eos>"})
    ids = [(name, it.convert_tokens_to_ids(name)) for name in ("<bos>", "<eos>")]
    it.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return it


@pytest.mark.parametrize("single", ["<bos> $A <eos>", "$A <eos>", "<bos> $A", "$A"])
@pytest.mark.parametrize("text", ["hi", "<bos>hi", "a<eos>", "<eos>"])
def test_bos_stands_once_before_a_prompt_and_no_eos_behind_it(single, text):
    it = with_special(single)
    (prompt,) = load_prompts([{"prompt": text}], it)
    expected = "<bos>" * ("<bos>" in single and not text.startswith("<bos>")) + text
    assert it.decode(prompt.token_ids) == expected


def test_a_rendered_chat_gets_no_special_tokens_beside_its_own():
    it = with_special("<bos> $A <eos>", "<bos>" + TEMPLATE)
    (chat,) = load_prompts([{"prompt": "hi"}], it)
    (text,) = load_prompts([{"prompt": "<bos><user>hi<assistant>"}], it, chat=False)
    assert chat.token_ids == text.token_ids
    assert it.decode(chat.token_ids) == "<bos><user>hi<assistant>"


def test_messages_without_a_chat_template_are_refused():
    rows = [{"prompt": "plain"}, {"prompt": [{"role": "user", "content": "a"}]}]
    with pytest.raises(ValueError, match=r"^list row 1: prompt: .* This tokenizer has no chat template\.$"):
        load_prompts(rows, PLAIN)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', r"prompts\.jsonl:2: expected one JSON object on the line, got .* at column \d+\.$"),
        ('["a"]', r"prompts\.jsonl:2: expected one JSON object on the line, got a list\.$"),
        ({"question": "a", "answer": 1}, r"prompts\.jsonl:2: columns: expected 'prompt', got 'question', 'answer'\. N"),
        ({"prompt": "  "}, r"prompts\.jsonl:2: prompt: expected some text, got '  '\.$"),
        ({"prompt": None}, r"prompts\.jsonl:2: prompt: expected text, or chat messages .* got None\.$"),
        ({"prompt": [{"role": "user"}]}, r"prompts\.jsonl:2: prompt: expected text, or chat messages"),
        ({"prompt": [{"role": "system", "content": "a"}]}, r"one of them the user's, got \[\{'role': 'system'"),
        ({"prompt": "\ud800"}, r"prompts\.jsonl:2: prompt: expected text in Unicode, got half of a surrogate pair\.$"),
        ({"prompt": [{"role": "user", "content": "\ud800"}]}, r"prompts\.jsonl:2: prompt: expected text, or chat"),
        ('{"prompt": ' + "9" * 5000 + "}", r"prompts\.jsonl:2: expected one JSON object in UTF-8 .* limit .4300"),
        ("[" * 100_000, r"prompts\.jsonl:2: expected one JSON object in UTF-8 .* maximum recursion depth"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        load_prompts(jsonl(tmp_path, {"prompt": "fine"}, line), CHAT)


def test_a_line_in_another_encoding_is_named_by_file_and_number(tmp_path):
    path = jsonl(tmp_path, {"prompt": "fine"}, '{"prompt": "\u00e9"}')
    path.write_bytes(path.read_text("utf-8").encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"prompts\.jsonl:2: expected one JSON object in UTF-8 on the line, got 'utf-8'"
    ):
        load_prompts(path, CHAT)


def test_a_prompt_that_the_chat_template_refuses_is_named_with_its_reason(tmp_path):
    picky = tokenizer("{% if messages[0].role != 'user' %}{{ raise_exception('the user begins') }}{% endif %}a")
    rows = [{"prompt": "fine"}, {"prompt": [{"role": r, "content": "a"} for r in ("tool", "user")]}]
    message = r"prompts\.jsonl:2: prompt: expected messages that the chat template takes, got the user begins\.$"
    with pytest.raises(ValueError, match=message):
        load_prompts(jsonl(tmp_path, *rows), picky)


def test_an_empty_source_is_refused(tmp_path):
    for source in (jsonl(tmp_path, "", ""), [], datasets.Dataset.from_list([])):
        with pytest.raises(ValueError, match="load_prompts: source: expected at least one row"):
            load_prompts(source, PLAIN)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a file that exists, got .*none\.jsonl\."):
        load_prompts(tmp_path / "none.jsonl", PLAIN)


def test_long_prompts_are_counted_and_dropped_and_the_others_keep_their_row_numbers():
    rows = [{"prompt": "a" * length} for length in (3, 9, 4, 8)]
    with pytest.warns(UserWarning, match=r"dropped 2 of 4 prompts longer than 5 tokens, up to 10\."):
        kept = load_prompts(rows, PLAIN, max_prompt_tokens=5)
    assert [(prompt.index, len(prompt.token_ids)) for prompt in kept] == [(0, 4), (2, 5)]
    with pytest.raises(ValueError, match=r"room for at least one prompt, of 4 tokens or more, got 3\. Raise it\."):
        load_prompts(rows, PLAIN, max_prompt_tokens=3)


def test_a_dataset_and_its_saved_folder_give_the_same_prompts(tmp_path):
    rows = [{"question": [{"role": "user", "content": "a"}], "answer": "1"}]
    dataset = datasets.Dataset.from_list(rows)
    dataset.save_to_disk(tmp_path / "one")
    other = datasets.Dataset.from_list([{"question": [{"role": "user", "content": "b"}], "answer": "2"}])
    datasets.DatasetDict({"train": dataset, "test": other}).save_to_disk(tmp_path / "two")
    options = {"prompt_column": "question"}
    (expected,) = load_prompts(dataset, CHAT, options=options)
    assert (seen(expected), expected.columns) == ("<user>a<assistant>", {"answer": "1"})
    assert load_prompts(tmp_path / "one", CHAT, options=options) == [expected]
    assert load_prompts(str(tmp_path / "two"), CHAT, options=options) == [expected]
    (test,) = load_prompts(tmp_path / "two", CHAT, options=options | {"split": "test"})
    assert seen(test) == "<user>b<assistant>"
    with pytest.raises(ValueError, match=r"options\.split: expected one of train, test, got 'dev'\."):
        load_prompts(tmp_path / "two", CHAT, options=options | {"split": "dev"})


def test_a_mixture_has_as_many_rows_of_every_level_of_every_task_and_each_is_scored_by_its_own_task():
    sums = [{"min_terms": 2, "max_terms": 2, "max_digits": 1}, {"min_terms": 4, "max_terms": 4, "max_digits": 1}]
    options = {"tasks": {"chain_sum": sums, "count_bits": [{"min_n": 1, "max_n": 255}]}}
    prompts = load_prompts("reasoning_gym:mixture", CHAT, size=11, seed=3, options=options)
    buckets = [(prompt.columns["task"], prompt.columns["level"]) for prompt in prompts]
    assert buckets == [("chain_sum", 1)] * 4 + [("chain_sum", 2)] * 4 + [("count_bits", 1)] * 3
    assert prompts[:4] == [
        replace(prompt, columns=prompt.columns | {"level": 1})
        for prompt in load_prompts("reasoning_gym:chain_sum", CHAT, size=4, seed=3, options=sums[0])
    ]
    assert [len(prompt.columns["entry"]["metadata"]["expression"].split()) for prompt in prompts[4:8]] == [7] * 4
    names = ("entry", "task", "task_options")
    columns = {name: [prompt.columns[name] for prompt in prompts] for name in names}
    right = [str(prompt.columns["answer"]) for prompt in prompts]
    reward = ReasoningGymReward(extract="last_number", strict=True)
    assert reward(right, **columns) == [1.0] * 11
    assert reward(["1234567"] * 11, **columns) == [0.0] * 11


@pytest.mark.parametrize(
    ("options", "size", "message"),
    [
        ({}, 9, "options.tasks: expected a mapping from a reasoning-gym task to a list of levels"),
        ({"tasks": {"chain_sum": {"min_terms": 2}}}, 9, "options.tasks.chain_sum: expected a list of levels, each"),
        ({"tasks": {"chain_sum": []}}, 9, "options.tasks.chain_sum: expected a list of levels"),
        ({"tasks": {"chain_sums": [{}]}}, 9, r"got 'chain_sums'\. Did you mean 'chain_sum'\?"),
        ({"tasks": {"chain_sum": [{"max_digit": 2}]}}, 9, r"got 'max_digit'\. Did you mean 'max_digits'\?"),
        ({"tasks": {"chain_sum": [{}, {}, {}]}}, 2, "size: expected a row for each of 3 levels or more, got 2"),
        ({"task": {}}, 9, r"options: expected tasks for reasoning_gym:mixture, got 'task'\. Did you mean 'tasks'\?"),
    ],
)
def test_a_mixture_that_names_no_levels_is_refused(options, size, message):
    with pytest.raises(ValueError, match=message):
        load_prompts("reasoning_gym:mixture", CHAT, size=size, options=options)


def test_reasoning_gym_tasks_carry_what_their_scorer_needs_and_depend_only_on_the_seed():
    options = {"min_terms": 2, "max_terms": 2, "max_digits": 1}
    prompts = load_prompts("reasoning_gym:chain_sum", CHAT, size=5, seed=3, options=options)
    again = load_prompts("reasoning_gym:chain_sum", CHAT, size=9, seed=3, options=options)
    assert len(prompts) == 5
    assert again[:5] == prompts != load_prompts("reasoning_gym:chain_sum", CHAT, size=5, seed=4, options=options)
    for prompt in prompts:
        expression = prompt.columns["entry"]["metadata"]["expression"]
        assert f"{expression} =" in prompt.content[0]["content"]
        assert int(prompt.columns["answer"]) == eval(expression)
        assert (prompt.columns["task"], prompt.columns["task_options"]) == ("chain_sum", options)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("reasoning_gym:chain_sums", {}, r"got 'chain_sums'\. Did you mean 'chain_sum'\?"),
        ("reasoning_gym:chain_sum", {"max_digit": 2}, r"got 'max_digit'\. Did you mean 'max_digits'\?"),
        (
            "reasoning_gym:chain_sum",
            {"min_terms": 9},
            r"chain_sum refuses its options: max_terms must be >= min_terms\.",
        ),
        ("prompts.jsonl", {"split": "train"}, r"options: expected none for prompts\.jsonl, got 'split'\."),
    ],
)
def test_unknown_tasks_and_options_are_refused_with_the_nearest_name(source, options, message):
    with pytest.raises(ValueError, match=message):
        load_prompts(source, PLAIN, options=options)


def test_no_held_out_question_is_in_train_and_no_task_is_lost():
    """Rows that ask the same, white space apart, and have another answer are other tasks of the same question."""
    doubled = [*QUESTIONS, *({"prompt": f" {row['prompt']}\n", "answer": -1} for row in QUESTIONS)]
    prompts = load_prompts(doubled, PLAIN)
    train, held_out = split(prompts, 10, seed=0)
    assert (len(train), len(held_out)) == (62, 10)
    assert sorted(prompt.index for prompt in (*train, *held_out)) == list(range(72))
    assert not set(map(question, train)) & set(map(question, held_out))


@pytest.mark.parametrize(
    ("rows", "kept"),
    [
        ([{"prompt": "Play.", "seed": 1}, {"prompt": "Play.", "seed": 2}], 2),
        ([{"prompt": "Solve.", "tests": [1]}, {"prompt": "Solve.", "tests": [1, 2]}], 2),
        ([{"prompt": "if a:\n    b\nc"}, {"prompt": "if a:\n    b\n    c"}], 2),
        ([{"prompt": "x", "answer": 1, "level": 2}, {"level": 2, "prompt": "x", "answer": 1}], 1),
        ([{"prompt": "x", "answer": {1: "a", "b": 2}}] * 2, 1),
        ([{"prompt": [{"role": "user", "content": "x", "name": name}]} for name in "ab"], 2),
        ([{"prompt": "x", "answer": "1"}, {"prompt": "x", "answer": 1}], 2),
    ],
)
def test_rows_are_the_same_task_only_when_all_their_columns_are_equal_and_those_left_out_are_counted(rows, kept):
    prompts = load_prompts([*rows, {"prompt": "another"}], CHAT)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train, _ = split(prompts, 0, seed=0)
    assert sorted(prompt.index for prompt in train) == [*range(kept), len(rows)]
    counted = [f"{len(rows) - kept} of {len(rows) + 1} prompts repeat an earlier row in every column; left out."]
    assert [str(warning.message) for warning in said] == counted * (kept < len(rows))


@pytest.mark.parametrize(("held_out", "expected"), [(2, {2}), (5, {5}), (6, {6, 7}), (7, {7})])
def test_a_question_of_many_rows_is_held_out_whole_and_only_where_smaller_ones_do_not_suffice(held_out, expected):
    rows = [{"prompt": "Play.", "seed": seed} for seed in range(45)] + [{"prompt": f"q{n}"} for n in range(5)]
    prompts = load_prompts([*rows, {"prompt": "Swim.", "a": 1}, {"prompt": "Swim.", "a": 2}], PLAIN)
    for seed in range(20):
        train, held = split(prompts, held_out, seed=seed)
        assert len(held) in expected
        assert not {prompt.content for prompt in held} & {prompt.content for prompt in train}
        assert len(train) + len(held) == len(prompts)


def test_a_single_question_cannot_be_held_out_and_trained_on():
    prompts = load_prompts([{"prompt": "Play.", "seed": seed} for seed in range(45)], PLAIN)
    with pytest.raises(ValueError, match=r"fewer than the 45 distinct rows, with 1 questions, got 5\."):
        split(prompts, 5, seed=0)


def test_split_is_random_and_repeatable():
    prompts = load_prompts(QUESTIONS, PLAIN)
    assert split(prompts, 10, seed=0) == split(prompts, 10, seed=0)
    assert split(prompts, 10, seed=0) != split(prompts, 10, seed=1)
    assert split(prompts, 0, seed=0)[1] == []


def test_one_digit_sums_leave_a_hundred_prompts_to_hold_out_and_a_hundred_to_train_on():
    options = {"min_terms": 2, "max_terms": 2, "max_digits": 1}
    prompts = load_prompts("reasoning_gym:chain_sum", PLAIN, size=2000, options=options)
    with pytest.warns(UserWarning, match=r"^1800 of 2000 prompts repeat an earlier row in every column; left out\.$"):
        train, held_out = split(prompts, 100, seed=0)
    assert len(held_out) == 100
    assert len(train) == 100, "ten digits, two signs, ten digits"
    with pytest.raises(ValueError, match=r"fewer than the 200 distinct rows, with 200 questions, got 200\."):
        split([*train, *held_out], 200, seed=0)


def test_every_epoch_draws_every_prompt_once_in_another_order():
    prompts = load_prompts(QUESTIONS, PLAIN)
    sampler = PromptSampler(prompts, seed=5)
    drawn = [prompt.index for _ in range(9) for prompt in sampler.next(8)]
    first, second = drawn[:36], drawn[36:]
    assert sorted(first) == sorted(second) == list(range(36))
    assert first != second
    assert first != sorted(first)
    again = PromptSampler(prompts, seed=5)
    assert [prompt.index for prompt in again.next(72)] == drawn
    assert [prompt.index for prompt in PromptSampler(prompts, seed=6).next(36)] != first


@pytest.mark.parametrize("before", [0, 5, 36, 50])
def test_a_resumed_sampler_draws_what_it_would_have_drawn(before):
    prompts = load_prompts(QUESTIONS, PLAIN)
    sampler = PromptSampler(prompts, seed=5)
    sampler.next(before)
    state = json.loads(json.dumps(sampler.state_dict()))
    expected = sampler.next(80)
    resumed = PromptSampler(prompts, seed=0)
    resumed.load_state_dict(state)
    assert resumed.next(80) == expected
    assert max(Counter(prompt.index for prompt in expected).values()) <= 4


def test_the_state_of_other_prompts_is_refused():
    prompts = load_prompts(QUESTIONS, PLAIN)
    state = PromptSampler(prompts[:-1], seed=5).state_dict()
    with pytest.raises(ValueError, match="Resume with the prompts the run began with"):
        PromptSampler(prompts, seed=5).load_state_dict(state)


def test_no_prompts_are_refused():
    with pytest.raises(ValueError, match="PromptSampler: prompts: expected at least one prompt"):
        PromptSampler([], seed=0)


ROWS_OF_A_FILE = [{"prompt": "one", "answer": "1"}, {"prompt": 'two, and "more"', "answer": "2"}]


def write_rows(path):
    """The rows as the suffix says."""
    import csv
    import gzip

    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "answer"])
            writer.writeheader()
            writer.writerows(ROWS_OF_A_FILE)
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(ROWS_OF_A_FILE).to_parquet(str(path))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS_OF_A_FILE).encode()))
    else:
        path.write_text(json.dumps(ROWS_OF_A_FILE))
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.json", "a.jsonl.gz"])
def test_local_files_are_read_and_the_hub_is_not_asked(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = write_rows(tmp_path / name)
    rows = read_rows(str(path), size=0, seed=0, options={})
    assert [{"prompt": row.values["prompt"], "answer": str(row.values["answer"])} for row in rows] == ROWS_OF_A_FILE


def test_a_cloned_data_set_is_read_by_split(tmp_path):
    for name in ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test.parquet"):
        write_rows(tmp_path / "set" / name)
    (tmp_path / "set" / "README.md").write_text("about")
    assert len(read_rows(tmp_path / "set", size=0, seed=0, options={})) == 4
    assert len(read_rows(tmp_path / "set", size=0, seed=0, options={"split": "test"})) == 2
    with pytest.raises(ValueError, match=r"options\.split: expected one of test, train, got 'valid'"):
        read_rows(tmp_path / "set", size=0, seed=0, options={"split": "valid"})


def test_a_home_folder_is_a_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_rows(tmp_path / "a.jsonl.gz")
    assert len(read_rows("~/a.jsonl.gz", size=0, seed=0, options={})) == 2


@pytest.mark.parametrize("name", ["gone.csv", "empty"])
def test_a_file_that_is_not_there_is_said_at_once(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="a file that exists, or a folder with"):
        read_rows(str(tmp_path / name), size=0, seed=0, options={})
