from __future__ import annotations

import copy
import json
import math
import re

import datasets
import pytest
import reasoning_gym
import torch
from test_prompts import AGENT, CONVERSATION, TOOLS, tokenizer
from tokenizers import processors
from transformers import LlamaConfig, LlamaForCausalLM
from trl.data_utils import apply_chat_template, extract_prompt

from fastrl.data import PromptSampler, load_preferences, sources
from fastrl.data.pack import pack
from fastrl.data.preferences import answered, mismatched, split_groups, unpair, with_end
from fastrl.data.sources import gym_answers
from fastrl.losses.answer_rows import split_pairs
from fastrl.model.load import stop_token_ids
from fastrl.types import Group, Prompt, Sample

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<bos>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{% if shout %}!{% endif %}"
)
PLAIN, CHAT = tokenizer(), tokenizer(TEMPLATE)
for _tokenizer in (PLAIN, CHAT):
    _tokenizer.eos_token = "<bos>"  # the one special token that it has
GOOD = {"prompt": "Sky?", "chosen": "blue", "rejected": "red"}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def seen(group):
    return [CHAT.decode(ids) for ids in (group.prompt.token_ids, *(sample.token_ids for sample in group.samples))]


def test_text_pairs_without_a_template_are_tokenised_as_they_are_and_ended(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(GOOD | {"prompt": "Sky? ", "source": "a"}), "utf-8")
    (group,) = load_preferences(path, PLAIN)
    assert seen(group) == ["<bos>Sky? ", "blue<bos>", "red<bos>"]
    assert (group.prompt.index, group.prompt.content, group.prompt.columns) == (0, "Sky? ", {"source": "a"})
    assert [(s.text, s.advantage, s.reward, s.finished) for s in group.samples] == [
        ("blue", 1.0, 1.0, True),
        ("red", -1.0, 0.0, True),
    ]
    assert all(math.isnan(logp) for sample in group.samples for logp in sample.sampling_logps)


RENDERED = ["<user>Sky?<assistant>", "blue<bos>", "red<bos>"]


@pytest.mark.parametrize(
    "row",
    [
        GOOD,
        {"prompt": [user("Sky?")], "chosen": [assistant("blue")], "rejected": [assistant("red")]},
        {"prompt": "Sky?", "chosen": [assistant("blue")], "rejected": [assistant("red")]},
        {"prompt": [user("Sky?")], "chosen": "blue", "rejected": "red"},
        {"chosen": [user("Sky?"), assistant("blue")], "rejected": [user("Sky?"), assistant("red")]},
        {"prompt": "Sky?", "chosen": [user("Sky?"), assistant("blue")], "rejected": [user("Sky?"), assistant("red")]},
    ],
    ids=["text", "messages", "text-and-messages", "messages-and-text", "implicit", "both"],
)
def test_every_format_of_a_chat_pair_gives_the_same_tokens(row):
    (group,) = load_preferences([row], CHAT)
    assert seen(group) == RENDERED  # the template's newline behind the end of the turn is not trained on
    assert group.prompt.content == [user("Sky?")]


def chat_tokenizer(behind, eos="<eos>"):
    """One whose template puts `behind` after every turn; <turn> and <eos> are special."""
    template = TEMPLATE.replace("<bos>\n", behind).replace("{% if m.role == 'assistant' %}", "{% if true %}")
    it = tokenizer(template)
    it.add_special_tokens({"additional_special_tokens": ["<turn>", "<eos>"]})
    it.eos_token = eos
    return it


@pytest.mark.parametrize(
    ("behind", "ends", "stops"),
    [
        ("<turn>\n", "<turn>", {"<eos>", "<turn>"}),  # Qwen's base models, SmolLM: eos is another token
        ("<turn>", "<turn>", {"<eos>", "<turn>"}),  # Llama 3
        ("<turn>\n<eos>", "<turn>", {"<eos>", "<turn>"}),  # Phi 3
        ("#<turn>\n", "#<turn>", {"<eos>", "<turn>"}),
        ("<eos>", "<eos>", {"<eos>"}),  # Mistral
    ],
)
def test_the_last_token_of_a_chat_answer_is_the_end_of_turn_which_also_stops_a_rollout(behind, ends, stops):
    it = chat_tokenizer(behind)
    (group,) = load_preferences([{"messages": [user("Sky?"), assistant("blue")]}], it, kind="completions")
    assert it.decode(group.samples[0].token_ids) == "blue" + ends
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(vocab_size=260, eos_token_id=it.convert_tokens_to_ids("<eos>"), **sizes)
    assert set(map(it.decode, stop_token_ids(LlamaForCausalLM(config), it))) == stops
    assert it.decode(answered([user("Sky?")], "blue", it).samples[0].token_ids) == "blue" + ends


@pytest.mark.parametrize("behind", ["", "#", " ###"])
def test_answers_that_no_token_ends_are_told(behind):
    rows = [{"messages": [user("Sky?"), assistant("blue")]}] * 2
    with pytest.warns(UserWarning, match=r"2 answers end with .*, which ends neither a turn nor a text"):
        (group, _) = load_preferences(rows, chat_tokenizer(behind), kind="completions")
    assert chat_tokenizer(behind).decode(group.samples[0].token_ids) == "blue" + behind


def test_tool_calls_and_reasoning_are_trained_on_and_tools_are_in_the_prompt():
    row = {"messages": [*CONVERSATION[:2]], "tools": TOOLS}
    (group,) = load_preferences([row], agent_tokenizer(), kind="completions")
    call = '(ask)NONE{"name": "weather", "arguments": {"city": "Rome"}}<bos>'
    assert seen(group) == ["[weather]<user>Rome?<assistant>", call]
    row["messages"] = [*CONVERSATION, assistant("It is 21 C.")]
    (group,) = load_preferences([row], agent_tokenizer(), kind="completions")
    prompt = f"[weather]<user>Rome?<assistant>{call}<tool weather>21 C<assistant>"
    assert seen(group) == [prompt, "It is 21 C.<bos>"]
    assert group.prompt.columns == {"tools": TOOLS}  # for rewards


def agent_tokenizer():
    it = tokenizer(
        AGENT.replace("{% endfor %}{% if add", "{% if m.role == 'assistant' %}<bos>{% endif %}{% endfor %}{% if add")
    )
    it.eos_token = "<bos>"
    return it


def test_an_answer_that_only_calls_a_tool_is_no_empty_one():
    said = CONVERSATION[1] | {"content": ""}
    row = {"prompt": CONVERSATION[:1], "chosen": [said], "rejected": [assistant("I do not know.")]}
    (group,) = load_preferences([row], agent_tokenizer())
    assert "weather" in seen(group)[1]
    row["chosen"] = [assistant("")]
    with pytest.raises(ValueError, match="with an empty 'chosen'"):
        load_preferences([row], agent_tokenizer())


def test_chat_pairs_render_as_trl_renders_them():
    row = {"chosen": [user("a"), assistant("b"), user("c"), assistant("d")]}
    row["rejected"] = [*row["chosen"][:-1], assistant("e")]
    theirs = apply_chat_template(extract_prompt(row), CHAT)
    (group,) = load_preferences([row], CHAT)
    assert seen(group) == [theirs["prompt"], *(theirs[side].removesuffix("\n") for side in ("chosen", "rejected"))]


def test_system_and_template_options_reach_the_template():
    (group,) = load_preferences([GOOD], CHAT, system="Be brief.")
    assert seen(group)[0] == "<system>Be brief.<user>Sky?<assistant>"
    with pytest.raises(ValueError, match="whose prompt the chat template renders otherwise once it is answered"):
        load_preferences([GOOD], CHAT, template_options={"shout": True})


@pytest.mark.parametrize(
    ("chosen", "rejected", "parts"),
    [
        ("The sky is blue.", "The sky is green.", ["The sky is", " blue.", " green."]),
        ("The sky is blue", "The sky is bluish", ["The sky is", " blue", " bluish"]),
        ("Human: hi\n\nAssistant: yes", "Human: hi\n\nAssistant: no", ["Human: hi\n\nAssistant:", " yes", " no"]),
        ("A b", "A b c", ["A", " b", " b c"]),
    ],
)
def test_text_that_both_sides_begin_with_is_the_prompt_and_stays_as_it_is(chosen, rejected, parts):
    (group,) = load_preferences([{"chosen": chosen, "rejected": rejected}], CHAT)
    prompt, *answers = seen(group)
    assert [prompt.removeprefix("<bos>"), *(answer.removesuffix("<bos>") for answer in answers)] == parts


def test_tokens_that_merge_across_the_boundary_are_cut_where_the_prompt_ends():
    merging = tokenizer()
    vocabulary = json.loads(merging.backend_tokenizer.to_str())
    size = len(vocabulary["model"]["vocab"])
    vocabulary["model"]["vocab"]["ab"] = size
    vocabulary["model"]["merges"] = [["a", "b"]]
    merging._tokenizer = type(merging.backend_tokenizer).from_str(json.dumps(vocabulary))
    assert merging("xab", add_special_tokens=False)["input_ids"][-1] == size
    (group,) = load_preferences([{"prompt": "xa", "chosen": "b", "rejected": "ab"}], merging, chat=False)
    alone = merging("xa")["input_ids"]
    assert list(group.prompt.token_ids) == alone
    assert group.samples[0].token_ids == merging("b", add_special_tokens=False)["input_ids"]


BAD = {
    "with identical sides": GOOD | {"rejected": "blue"},
    "with an empty 'chosen'": GOOD | {"chosen": " "},
    "with an empty 'rejected'": GOOD | {"rejected": [assistant("")], "chosen": [assistant("a")]},
    "without a 'rejected'": GOOD | {"rejected": None},
    "without a 'prompt', whose sides begin with no shared text": GOOD | {"prompt": None},
    "whose 'chosen' is neither text nor chat messages": GOOD | {"chosen": 3},
    "with one side text and the other messages": GOOD | {"rejected": [assistant("red")]},
    "whose 'chosen' does not end with the assistant": GOOD | {"chosen": [user("a")], "rejected": [user("b")]},
    "whose sides differ before their last messages": {
        "chosen": [user("a"), assistant("b")],
        "rejected": [user("c"), assistant("d")],
    },
    "with a prompt longer than 30 tokens": GOOD | {"prompt": "long" * 10},
    "longer than 60 tokens": GOOD | {"chosen": "long" * 20},
    "whose 'chosen' is not Unicode text": GOOD | {"chosen": "\ud800"},
    "whose prompt has no user message": GOOD | {"prompt": [assistant("a")]},
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_row_is_counted_named_and_left_out(reason):
    with pytest.warns(UserWarning, match="load_preferences: left out 1 of 3 rows") as caught:
        groups = load_preferences([GOOD, BAD[reason], GOOD], CHAT, max_prompt_tokens=30, max_tokens=60)
    assert str(caught[0].message) == f"load_preferences: left out 1 of 3 rows: 1 {reason} (list row 1)."
    assert [group.prompt.index for group in groups] == [0, 2]


def test_a_row_that_the_chat_template_refuses_is_counted_with_the_reason():
    picky = copy.deepcopy(CHAT)
    picky.chat_template = "{% if messages[0].role != 'user' %}{{ raise_exception('the user begins') }}{% endif %}" + (
        CHAT.chat_template
    )
    rows = [GOOD, GOOD | {"prompt": [assistant("a"), user("b")]}]
    with pytest.warns(UserWarning, match=r"1 that the chat template refuses: the user begins \(list row 1\)"):
        assert len(load_preferences(rows, picky)) == 1


def test_a_source_of_bad_rows_only_is_refused():
    message = (
        r"load_preferences: source: expected a good row among 1, got only rows 1 with identical sides \(list row 0\)\."
    )
    with pytest.raises(ValueError, match=message):
        load_preferences([BAD["with identical sides"]], CHAT)


def test_bad_rows_of_one_kind_are_counted_together():
    rows = [GOOD, *[GOOD | {"rejected": "blue"}] * 4, GOOD | {"chosen": ""}]
    with pytest.warns(
        UserWarning, match=r"left out 5 of 6 rows: 4 with identical sides \(list row 1, .*, \.\.\.\); 1 with"
    ):
        load_preferences(rows, PLAIN)


def test_chat_messages_without_a_template_are_refused():
    with pytest.raises(ValueError, match="of chat messages, for which the tokenizer has no chat template"):
        load_preferences([{"prompt": [user("a")], "chosen": "b", "rejected": "c"}], PLAIN)


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("pairs", {"prompt": "a", "completion": "b"}, r"columns of kind='pairs': expected 'chosen', 'rejected', got"),
        ("labelled", {"prompt": "a", "completion": "b"}, r"expected 'prompt', 'label', 'completion', got"),
        ("completions", GOOD, r"'completion' \(or 'messages', or 'text'\), got 'chosen', 'prompt', 'rejected'"),
        ("pair", GOOD, r"load_preferences: kind: expected one of .* Did you mean 'pairs'\?"),
    ],
)  # fmt: skip
def test_a_source_without_the_columns_is_refused(kind, row, message):
    with pytest.raises(ValueError, match=message):
        load_preferences([row], CHAT, kind=kind)


def test_labelled_answers_have_advantages_of_their_labels_sign(tmp_path):
    rows = [
        {"prompt": f"p{i}", "completion": "c", "label": label} for i, label in enumerate((True, False, 1, 0, "yes"))
    ]
    datasets.Dataset.from_list(rows[:2]).save_to_disk(tmp_path / "rows")
    groups = load_preferences(tmp_path / "rows", CHAT, kind="labelled")
    assert [[(s.text, s.advantage) for s in group.samples] for group in groups] == [[("c", 1.0)], [("c", -1.0)]]
    with pytest.warns(UserWarning, match="1 whose 'label' is neither true nor false"):
        groups = load_preferences(rows, CHAT, kind="labelled")
    assert [group.samples[0].advantage for group in groups] == [1.0, -1.0, 1.0, -1.0]


def test_margins_and_soft_labels_come_from_the_columns_that_are_named(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [GOOD | {"by": by, "judge": judge} for by, judge in [(0, 1), (2.5, 0.25)]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    groups = load_preferences(path, PLAIN, margin_column="by", soft_label_column="judge")
    assert [(group.margin, group.soft_label) for group in groups] == [(0.0, 1.0), (2.5, 0.25)]
    assert [(group.margin, group.soft_label) for group in load_preferences(path, PLAIN)] == [(None, None)] * 2


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), 10**400, "0.5", None, True, [1]])
@pytest.mark.parametrize(
    ("column", "expected"), [("margin", "a finite number of at least 0"), ("soft_label", "a number from 0 to 1")]
)
def test_a_margin_or_soft_label_that_is_none_is_counted_and_its_row_left_out(column, expected, value):
    rows = [GOOD | {"x": 0.5}, GOOD | {"x": value}, GOOD | {"x": 1}]
    with pytest.warns(UserWarning, match=f"left out 1 of 3 rows: 1 whose 'x' is not {expected} \\(list row 1\\)"):
        groups = load_preferences(rows, PLAIN, **{f"{column}_column": "x"})
    assert [getattr(group, column) for group in groups] == [0.5, 1.0]


def test_a_probability_above_one_is_no_soft_label_but_a_margin():
    rows = [GOOD | {"x": 0.5}, GOOD | {"x": 1.5}]
    assert len(load_preferences(rows, PLAIN, margin_column="x")) == 2
    with pytest.warns(UserWarning, match="1 whose 'x' is not a number from 0 to 1"):
        load_preferences(rows, PLAIN, soft_label_column="x")


def test_a_column_that_no_row_has_or_that_the_kind_cannot_have_is_refused():
    with pytest.raises(ValueError, match=r"columns of kind='pairs': expected 'chosen', 'rejected', 'gap', got"):
        load_preferences([GOOD], PLAIN, margin_column="gap")
    with pytest.raises(ValueError, match=r"soft_label_column: expected none for kind='labelled', got 'judge'"):
        load_preferences([GOOD], PLAIN, kind="labelled", soft_label_column="judge")


RANKED = {"prompt": "Sky?", "responses": ["green", "blue", "red"], "ranking": [2, 1, 2]}


def test_ranked_responses_are_one_group_whose_advantages_are_minus_their_ranks():
    for row in (RANKED, RANKED | {"responses": [[assistant(text)] for text in RANKED["responses"]]}):
        (group,) = load_preferences([row], CHAT, kind="ranked")
        assert seen(group) == ["<user>Sky?<assistant>", "green<bos>", "blue<bos>", "red<bos>"]
        assert [(s.text, s.advantage) for s in group.samples] == [("green", -2.0), ("blue", -1.0), ("red", -2.0)]


BAD_RANKED = {
    "whose 'responses' are not a list of two or more": {"responses": ["blue"]},
    "whose 'ranking' is not a list of one number per response": {"ranking": [1, 2]},
    "whose 'ranking' has ties only": {"ranking": [1, 1, 1]},
    "with identical sides": {"responses": ["green", "blue", "green"]},
    "with an empty 'responses[1]'": {"responses": ["green", " ", "red"]},
}


@pytest.mark.parametrize("reason", [*BAD_RANKED, "whose 'ranking' is not"])
def test_a_bad_ranking_is_counted_and_left_out(reason):
    bad = RANKED | BAD_RANKED.get(reason, {"ranking": [1, "2", 3]})
    with pytest.warns(UserWarning, match=f"left out 1 of 2 rows: 1 {re.escape(reason)}"):
        (group,) = load_preferences([RANKED, bad], CHAT, kind="ranked")
    assert group.prompt.index == 0


def test_a_ranked_row_needs_a_prompt_and_other_labels_are_another_data_set():
    with pytest.raises(ValueError, match=r"expected 'prompt', 'ranking', 'responses', got 'chosen'"):
        load_preferences([GOOD], CHAT, kind="ranked")
    rows = [GOOD | {"x": 0.5}, GOOD | {"prompt": "Sea?", "x": 1}]
    state = PromptSampler(load_preferences(rows, CHAT, margin_column="x"), seed=0).state_dict()
    PromptSampler(load_preferences(rows, CHAT, margin_column="x"), seed=0).load_state_dict(state)
    for other in (load_preferences(rows, CHAT), load_preferences(rows, CHAT, soft_label_column="x")):
        with pytest.raises(ValueError, match="expected the state of the same prompts"):
            PromptSampler(other, seed=0).load_state_dict(state)


@pytest.mark.parametrize(
    "row", [{"prompt": "Sky?", "completion": "blue"}, {"messages": [user("Sky?"), assistant("blue")]}]
)
def test_demonstrations_train_their_last_message(row):
    (group,) = load_preferences([row], CHAT, kind="completions")
    assert seen(group) == RENDERED[:2]
    assert group.samples[0].advantage == 1.0


def test_a_text_is_learned_whole_and_its_first_token_only_given():
    rows = [{"text": "Sky is blue"}, {"text": " "}, {"text": "Sea is red", "x": 1}]
    with pytest.warns(UserWarning, match="left out 1 of 3 rows: 1 with an empty 'text'"):
        groups = load_preferences(rows, CHAT, kind="completions")
    assert [seen(group) for group in groups] == [["<bos>", "Sky is blue<bos>"], ["<bos>", "Sea is red<bos>"]]
    assert (groups[1].prompt.content, groups[1].prompt.columns, groups[1].samples[0].text) == (
        "",
        {"x": 1},
        "Sea is red",
    )
    bare = copy.deepcopy(PLAIN)
    bare.backend_tokenizer.post_processor = processors.Sequence([])  # which begins texts with nothing
    (group,) = load_preferences(rows[:1], bare, kind="completions")
    assert seen(group) == ["S", "ky is blue<bos>"]
    train, held_out = split_groups(groups, 1, seed=0)
    assert {group.samples[0].text for group in (*train, *held_out)} == {"Sky is blue", "Sea is red"}


def pair(index, prompt, chosen, rejected):
    answers = [(chosen, 1.0), (rejected, -1.0)]
    samples = [Sample([9] * n, [math.nan] * n, True, reward=1.0, advantage=sign) for n, sign in answers]
    return Group(Prompt(index, "", (index,) * prompt), samples)


def test_pairs_become_labelled_answers_and_meet_other_prompts():
    singles = unpair([pair(1, 2, 1, 2), pair(2, 2, 3, 4)])
    assert [(g.prompt.index, len(g.samples[0].token_ids)) for g in singles] == [(1, 1), (1, 2), (2, 3), (2, 4)]
    others = mismatched(singles)
    assert [g.prompt.index for g in others] == [1, 1, 2, 2]
    assert [len(g.samples[0].token_ids) for g in others] == [4, 4, 2, 2]
    distinct = [pair(i, 2, i, 1) for i in (1, 2, 3)]
    assert [len(g.samples[0].token_ids) for g in mismatched(distinct)] == [3, 1, 2]
    with pytest.raises(
        ValueError, match=r"mismatched: groups: expected answers to two prompts or more, got 2 to one\."
    ):
        mismatched(singles[:2])


PAIRS = [pair(1, 3, 5, 2), pair(2, 6, 1, 1), pair(3, 2, 9, 12), pair(4, 4, 7, 7), pair(5, 1, 2, 11)]


@pytest.mark.parametrize("layout", ["auto", "padded", "shared", "varlen"])
@pytest.mark.parametrize("max_tokens", [28, 40, 400])
def test_whole_groups_keep_each_pair_in_one_micro_batch_chosen_before_rejected(layout, max_tokens):
    batches = pack(PAIRS, layout=layout, max_tokens=max_tokens, whole_groups=True)
    found = []
    for batch in batches:
        assert batch.num_tokens <= max_tokens
        assert batch.advantages.tolist() == [1.0, -1.0] * (len(batch.group_ids) // 2)
        assert (batch.group_ids[::2] == batch.group_ids[1::2]).all()
        sides = split_pairs(batch.cu_seqlens, logps=batch.targets.float(), mask=batch.mask)
        lengths = [sides[f"{side}_cu_seqlens"].diff().tolist() for side in ("chosen", "rejected")]
        found += list(zip(batch.group_ids[::2].tolist(), *lengths, strict=True))
    assert sorted(found) == [(i, *(len(s.token_ids) for s in group.samples)) for i, group in enumerate(PAIRS)]


@pytest.mark.parametrize("layout", ["auto", "padded", "shared", "varlen"])
def test_a_pair_that_does_not_fit_is_refused(layout):
    with pytest.raises(ValueError, match=r"pack: max_tokens: expected .* whole group.* Raise max_tokens, or leave out"):
        pack(PAIRS, layout=layout, max_tokens=15, whole_groups=True)


def test_a_demonstration_packs_like_a_rollout():
    groups = load_preferences([{"prompt": "Sky?", "completion": "blue"}], CHAT, kind="completions")
    (batch,) = pack(groups, layout="padded", max_tokens=64)
    assert CHAT.decode(batch.targets) == "blue<bos>"
    assert torch.isnan(batch.sampling_logps).all()
    assert batch.advantages.tolist() == [1.0]


SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def test_reasoning_gym_gives_pairs_whose_rejected_answer_scores_less_and_the_same_ones_every_time():
    rows = gym_answers("chain_sum", "pairs", size=40, seed=3, options=SUMS)
    assert rows == gym_answers("chain_sum", "pairs", size=40, seed=3, options=SUMS)
    entries = list(reasoning_gym.create_dataset("chain_sum", size=40, seed=3, **SUMS))
    answers = {entry["answer"] for entry in entries}
    for (_, values), entry in zip(rows, entries, strict=True):
        assert (values["prompt"], values["chosen"]) == (entry["question"], entry["answer"])
        assert values["rejected"] in answers - {entry["answer"]}


def test_reasoning_gym_gives_right_and_wrong_labelled_answers_and_demonstrations():
    pairs = gym_answers("chain_sum", "pairs", size=40, seed=3, options=SUMS)
    labelled = [row.values for row in gym_answers("chain_sum", "labelled", size=40, seed=3, options=SUMS)]
    right = [values["label"] for values in labelled]
    assert 10 < sum(right) < 30
    for pair_row, values in zip(pairs, labelled, strict=True):
        assert values["completion"] == pair_row.values["chosen" if values["label"] else "rejected"]
    groups = load_preferences("reasoning_gym:chain_sum", CHAT, kind="completions", size=5, seed=3, options=SUMS)
    assert [group.samples[0].text for group in groups] == [row.values["chosen"] for row in pairs[:5]]


def test_a_question_without_a_wrong_answer_is_left_out_and_counted(monkeypatch):
    dataset = [{"question": "Sky?", "answer": "blue"}] * 2 + [{"question": "Grass?", "answer": "green"}]

    class Task(list):
        def score_answer(self, answer, entry):
            return float(entry["question"] == "Sky?" or answer == entry["answer"])

    monkeypatch.setattr(sources, "_gym_dataset", lambda *_: Task(dataset))
    with pytest.warns(UserWarning, match="left out 2 of 3 rows: 2 without a 'rejected'"):
        (group,) = load_preferences("reasoning_gym:colours", CHAT)
    assert seen(group) == ["<user>Grass?<assistant>", "green<bos>", "blue<bos>"]


@pytest.mark.parametrize("held_out", [0, 1, 4, 5])
def test_no_question_is_both_trained_on_and_held_out(held_out):
    rows = [{"prompt": f"{place % 5}? ", "completion": str(place)} for place in range(14)]
    groups = load_preferences(rows, CHAT, kind="completions")
    train, held = split_groups(groups, held_out, seed=1)
    assert sorted(group.prompt.index for group in train + held) == list(range(14))
    assert held_out <= len(held) <= held_out + 2  # whole questions, of three answers at most
    assert not {group.prompt.token_ids for group in train} & {group.prompt.token_ids for group in held}
    assert split_groups(groups, held_out, seed=1) == (train, held)


@pytest.mark.parametrize("held_out", [-1, 2, 3])
def test_holding_everything_out_is_refused(held_out):
    groups = load_preferences([GOOD, GOOD | {"prompt": "Sea?"}], CHAT)
    with pytest.raises(
        ValueError, match="held_out: expected at least 0, and fewer than the 2 distinct rows, with 2 questions"
    ):
        split_groups(groups, held_out, seed=0)


def test_an_end_behind_each_answer_makes_its_last_token_an_input():
    groups = load_preferences([GOOD], CHAT)
    (plain,), (ended,) = (pack(g, layout="padded", max_tokens=99) for g in (groups, with_end(groups, 0)))
    read = [batch.input_ids.view(-1)[batch.hidden_index[batch.cu_seqlens[1:] - 1]] for batch in (plain, ended)]
    assert (read[0] != CHAT.eos_token_id).all()
    assert (read[1] == CHAT.eos_token_id).all()
    assert ended.targets[ended.cu_seqlens[1:] - 1].tolist() == [0, 0]


def test_an_answer_by_itself_is_tokenised_as_a_row_is():
    (group,) = load_preferences([{"prompt": "Sky?", "completion": "blue"}], CHAT, kind="completions")
    alone = answered([user("Sky?")], "blue", CHAT)
    assert (alone.prompt.token_ids, alone.samples[0].token_ids) == (group.prompt.token_ids, group.samples[0].token_ids)
    assert CHAT.decode(answered([user("Sky?")], "", CHAT).samples[0].token_ids) == "<bos>"
    assert seen(answered("Sky? ", "blue", PLAIN)) == ["<bos>Sky? ", "blue<bos>"]
    with pytest.raises(ValueError, match="a prompt of chat messages, for which the tokenizer has no chat template"):
        answered([user("Sky?")], "blue", PLAIN)


def test_a_group_sampler_goes_on_only_with_the_same_answers():
    groups = load_preferences([GOOD, GOOD | {"prompt": "Sea?"}], CHAT)
    others = load_preferences([GOOD, GOOD | {"prompt": "Sea?", "rejected": "grey"}], CHAT)
    state = PromptSampler(groups, seed=0).state_dict()
    PromptSampler(load_preferences([GOOD, GOOD | {"prompt": "Sea?"}], CHAT), seed=0).load_state_dict(state)
    with pytest.raises(ValueError, match="expected the state of the same prompts"):
        PromptSampler(others, seed=0).load_state_dict(state)


def test_samples_with_reference_log_probabilities_bring_them_into_the_micro_batch():
    groups = load_preferences([GOOD], CHAT)
    for sign, sample in enumerate(groups[0].samples):
        sample.ref_logps = [-float(place + 10 * sign) for place in range(len(sample.token_ids))]
    (batch,) = pack(groups, layout="padded", max_tokens=99, whole_groups=True)
    assert batch.ref_logps.tolist() == [logp for sample in groups[0].samples for logp in sample.ref_logps]
    groups[0].samples[1].ref_logps = None
    assert pack(groups, layout="padded", max_tokens=99, whole_groups=True)[0].ref_logps is None
