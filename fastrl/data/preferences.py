"""Pre-written answers (preferences, rankings, labels and demonstrations) as groups to pack.

| kind          | columns                         | a group                                    | trains       |
|---------------|---------------------------------|--------------------------------------------|--------------|
| `pairs`       | (prompt), chosen, rejected      | [chosen, rejected], advantages 1 and -1    | DPO etc.     |
| `ranked`      | prompt, responses, ranking      | responses, advantages minus their ranks    | reward model |
| `labelled`    | prompt, completion, label       | [completion], advantage 1 if true, else -1 | KTO etc.     |
| `completions` | prompt, completion; or messages | [completion], advantage 1                  | SFT          |
|               | or text                         | [text], advantage 1                        |              |

A whole `text` is trained on: from its first token if the tokenizer adds a beginning-of-text token, else from its
second.

`ranking` has a number for each of the `responses`, 1 for the best; equal numbers are ties. Reward models learn from
pairs too.

Answers have no sampler: their `sampling_logps` are NaN, so a loss that reads them becomes NaN.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from fastrl import check
from fastrl.chat import (
    complete,
    content_text,
    end_of_turn,
    is_unicode,
    messages_of,
    render,
    template_arguments,
    text_ids,
)
from fastrl.data.prompts import by_question, question
from fastrl.data.sources import GYM, Row, gym_answers, read_rows
from fastrl.types import Group, Messages, Prompt, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OP = "load_preferences"
Kind = Literal["rewarded", "pairs", "ranked", "labelled", "completions"]
ANSWERS = {
    "rewarded": ("responses",),
    "pairs": ("chosen", "rejected"),
    "ranked": ("responses",),
    "labelled": ("completion",),
    "completions": ("completion",),
}


class BadRow(ValueError):
    """What is wrong with a row; rows with the same message are counted and reported together."""


class Limits(NamedTuple):
    """Maximum length of a row, in tokens; None is no limit."""

    prompt: int | None
    all: int | None


class Writer(NamedTuple):
    """Turns messages into tokens."""

    tokenizer: PreTrainedTokenizerBase
    end_of_turn: int | None  # of its chat template
    options: Mapping[str, Any]  # of its chat template

    def render(self, row: Mapping[str, Any], messages: Messages, **options: Any) -> str:
        """The messages of a row as the chat template writes them."""
        try:
            arguments = template_arguments(row, self.options)
        except ValueError as error:
            raise BadRow(f"whose {error}") from error
        try:
            return render(self.tokenizer, messages, **arguments, **options)
        except ValueError as error:
            raise BadRow(f"that the chat template refuses: {error}") from error


class PairColumns(NamedTuple):
    """Optional columns of a pair; empty is none."""

    margin: str = ""
    soft_label: str = ""


def load_preferences(
    source: str | Path | Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    kind: Kind = "pairs",
    size: int = 1000,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    chat: bool = True,
    system: str = "",
    max_prompt_tokens: int | None = None,
    max_tokens: int | None = None,
    template_options: Mapping[str, Any] | None = None,
    margin_column: str = "",
    soft_label_column: str = "",
) -> list[Group]:
    """The rows of a source, tokenised, one group each: TRL's preference, unpaired and prompt-completion formats.

    A side is text, a list with one assistant message, or a whole conversation that ends in one; the prompt is text or
    chat messages. With `chat` and a chat template, a text prompt becomes a user message and a text side an assistant
    message. Without a prompt column, a pair's prompt is what both sides share: all messages but the last, or the text
    up to its last shared white space, in which case it stays plain text. Other text is tokenised as it is, plus the
    end-of-text token.

    Prompt and answer are split where the prompt alone ends, so generation sees the same prompt tokens as training. The
    answer's tokens come from the whole text if its tokens begin with the prompt's, else from the answer alone. A chat
    answer ends with the token that ends turns in the template; nothing after it is trained on. Nothing is truncated.
    Messages keep all fields, such as tool calls, and a row's columns `tools`, `documents` and `chat_template_kwargs`
    reach the template.

    Args:
        source: as in `fastrl.data.sources.read_rows`, with its `options`; for `reasoning_gym:TASK`,
            `fastrl.data.sources.gym_answers` makes the answers.
        kind: what a row is; see the table in `fastrl.data.preferences`.
        size, seed: how many questions reasoning-gym generates, and their seed.
        system: a system message for chat prompts that have none.
        max_prompt_tokens, max_tokens: limits for the prompt, and for the prompt with its answer.
        template_options: extra arguments for the chat template, such as `enable_thinking`.
        margin_column: for pairs: by how much the chosen answer is better, a finite number of at least 0; sets
            `Group.margin`.
        soft_label_column: for pairs: the probability that the chosen answer is better; sets `Group.soft_label`.

    Returns:
        One group per good row, in order; `Prompt.index` is the row's number. Bad rows (an empty side, two identical
        sides, a prompt over its limit, a missing value, a number out of range) are dropped, and a warning counts them
        by reason.

    Raises:
        ValueError: no rows, a column that no row has, or no good row.
    """
    check.choice(OP, "kind", kind, get_args(Kind))
    columns = PairColumns(margin_column, soft_label_column)
    for name, column in columns._asdict().items():
        check.require(kind == "pairs" or not column, OP, f"{name}_column", f"none for kind={kind!r}", repr(column))
    if isinstance(source, str) and source.startswith(GYM):
        rows = gym_answers(source.removeprefix(GYM), kind, size=size, seed=seed, options=dict(options or {}))
    else:
        rows = read_rows(source, size=size, seed=seed, options=dict(options or {}))
    if kind == "rewarded":
        rows = _by_prompt(rows)
    require_columns(rows, kind, columns)
    has_template = getattr(tokenizer, "chat_template", None) is not None
    options = template_options or {}
    writer = Writer(tokenizer, end_of_turn(tokenizer, **options), options)
    limits = Limits(max_prompt_tokens, max_tokens)
    groups, bad = [], {}
    for index, row in enumerate(rows):
        try:
            prompt, answers = _parts(row.values, kind, chat and has_template)
            group = _group(index, row.values, kind, _complete(prompt, system), answers, writer, limits)
            group.margin = _number(row.values, columns.margin, "a finite number of at least 0", math.inf)
            group.soft_label = _number(row.values, columns.soft_label, "a number from 0 to 1", 1.0)
            groups.append(group)
        except BadRow as reason:
            bad.setdefault(str(reason), []).append(row.where)
    _report(len(rows), bad)
    _report_endless(groups, tokenizer, writer)
    return groups


def answered(prompt: str | Messages, answer: str, tokenizer: PreTrainedTokenizerBase) -> Group:
    """One answer to one prompt, tokenised as in `load_preferences`; an empty answer is only its end token.

    Raises:
        ValueError: the prompt is chat messages and the tokenizer has no chat template, or renders the prompt
            differently once it is answered.
    """
    content = answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}]
    try:
        return _group(
            0, {}, "completions", prompt, [content], Writer(tokenizer, end_of_turn(tokenizer), {}), Limits(None, None)
        )
    except BadRow as reason:
        raise ValueError(f"answered: got a prompt {reason}.") from reason


def split_groups(groups: Sequence[Group], held_out: int, seed: int) -> tuple[list[Group], list[Group]]:
    """A random split of the groups into (train, held out), as in `fastrl.data.prompts.by_question`.

    Raises:
        ValueError: `held_out` leaves nothing to train on.
    """
    return by_question(groups, held_out, seed, lambda group: question(group.prompt) or group.samples[0].text)


def with_end(groups: Sequence[Group], token_id: int) -> list[Group]:
    """The groups with one more target after each answer, so that the state before it has seen the whole answer.

    A sequence's last token is not an input; `ScalarModel.scores` reads the state before the last target.
    """

    def longer(sample: Sample) -> Sample:
        token_ids, nothing = [*sample.token_ids, token_id], [*sample.sampling_logps, math.nan]
        return replace(sample, token_ids=token_ids, sampling_logps=nothing)

    return [replace(group, samples=list(map(longer, group.samples))) for group in groups]


def unpair(pairs: Sequence[Group]) -> list[Group]:
    """Splits each pair into two labelled answers, chosen before rejected."""
    return [Group(pair.prompt, [sample]) for pair in pairs for sample in pair.samples]


def mismatched(groups: Sequence[Group]) -> list[Group]:
    """Each prompt with the answer to a different one, the nearest before it in the batch, wrapping around at the start.

    KTO's KL is estimated from these answers (`fastrl.losses.unpaired.mismatched_kl`). TRL takes the previous answer
    whatever its prompt, which is the same if neighbours have different prompts.

    Raises:
        ValueError: all prompts are the same.
    """
    check.require(
        len({group.prompt.token_ids for group in groups}) > 1,
        "mismatched",
        "groups",
        "answers to two prompts or more",
        f"{len(groups)} to one",
        "Take larger batches, or shuffle them.",
    )
    others = []
    for place, group in enumerate(groups):
        before = (groups[(place - back) % len(groups)] for back in range(1, len(groups)))
        other = next(other for other in before if other.prompt.token_ids != group.prompt.token_ids)
        others.append(Group(group.prompt, other.samples))
    return others


def _by_prompt(rows: list[Row]) -> list[Row]:
    """Groups rows of one completion and its `reward`, as in a run's completions.jsonl, by prompt and, if present,
    `step`; returns other rows unchanged."""
    if not all(row.values.keys() >= {"prompt", "completion", "reward"} for row in rows):
        return rows
    together: dict[str, Row] = {}
    for row in rows:
        if row.values["reward"] is None or not row.values["completion"]:
            continue  # without a reward, or empty
        key = repr((row.values.get("step"), row.values["prompt"]))
        values = {"prompt": row.values["prompt"], "responses": [], "rewards": []}
        group = together.setdefault(key, Row(row.where, values))
        group.values["responses"].append(row.values["completion"])
        group.values["rewards"].append(row.values["reward"])
    return [row for row in together.values() if len(row.values["responses"]) > 1]


def require_columns(rows: list[Row], kind: Kind, columns: PairColumns) -> None:
    """Refuses rows none of which has the columns of their kind.

    Raises:
        ValueError: a column is missing.
    """
    present = {name for row in rows for name, value in row.values.items() if value is not None}
    beside = {
        "rewarded": ("prompt", "rewards"),
        "ranked": ("prompt", "ranking"),
        "labelled": ("prompt", "label"),
        "completions": ("prompt",),
    }
    needed = beside.get(kind, ()) + ANSWERS[kind] + tuple(filter(None, columns))
    if kind == "completions" and "completion" not in present:
        needed = next(((name,) for name in ("messages", "text") if name in present), needed)
    missing = [name for name in needed if name not in present]
    expected = ", ".join(map(repr, needed)) + (" (or 'messages', or 'text')" if kind == "completions" else "")
    check.require(
        not missing, OP, f"columns of kind={kind!r}", expected, ", ".join(map(repr, sorted(present))) or "none"
    )


def _parts(values: Mapping[str, Any], kind: Kind, chat: bool) -> tuple[str | Messages, list[str | Messages]]:
    """The prompt, and its answers, each as text or as one assistant message."""
    if kind == "completions" and values.get("messages") is not None:
        values = {"completion": values["messages"]}
    if kind == "completions" and values.get("completion") is None and values.get("text") is not None:
        text = _content(values, "text")
        if not isinstance(text, str):
            raise BadRow("whose 'text' is not text")
        return "", [text]
    names = ANSWERS[kind]
    if kind in ("ranked", "rewarded"):
        names, values = _responses(values)
    answers = [_content(values, name) for name in names]
    if kind != "rewarded" and any(one == other for one, other in combinations(answers, 2)):
        raise BadRow("with identical sides")
    conversations = [isinstance(answer, list) for answer in answers]
    if any(conversations) != all(conversations):
        raise BadRow("with one side text and the other messages")
    if conversations[0] and len(answers[0]) > 1:  # each holds its prompt
        prompts = [answer[:-1] for answer in answers]
        if any(prompt != prompts[0] for prompt in prompts):
            raise BadRow("whose sides differ before their last messages")
        prompt, answers = prompts[0], [answer[-1:] for answer in answers]
    elif values.get("prompt") is None:
        if kind != "pairs" or conversations[0]:
            raise BadRow("without a 'prompt'")
        return _shared_text(*answers)
    else:
        prompt = _content(values, "prompt")
    for name, answer in zip(names, answers, strict=True):
        if isinstance(answer, list) and answer[-1]["role"] != "assistant":
            raise BadRow(f"whose {name!r} does not end with the assistant")
        if _is_empty(answer):
            raise BadRow(f"with an empty {name!r}")
    if not (chat or isinstance(prompt, list) or isinstance(answers[0], list)):
        return prompt, answers
    prompt = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    return prompt, [a if isinstance(a, list) else [{"role": "assistant", "content": a}] for a in answers]


def _responses(values: Mapping[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The names of a row's responses, `responses[0]` and so on, and the row with an entry for each."""
    responses = values.get("responses")
    if not (isinstance(responses, list) and len(responses) > 1):
        raise BadRow("whose 'responses' are not a list of two or more")
    named = {f"responses[{place}]": response for place, response in enumerate(responses)}
    return tuple(named), {**values, **named}


def _ranking(values: Mapping[str, Any], answers: int) -> list[float]:
    ranking = values.get("ranking")
    if not (isinstance(ranking, list) and len(ranking) == answers and all(map(_is_finite, ranking))):
        raise BadRow("whose 'ranking' is not a list of one number per response")
    if len(set(ranking)) < 2:
        raise BadRow("whose 'ranking' has ties only")
    return [float(rank) for rank in ranking]


def _rewards(values: Mapping[str, Any], answers: int) -> list[float]:
    rewards = values.get("rewards")
    if not (isinstance(rewards, list) and len(rewards) == answers and all(map(_is_finite, rewards))):
        raise BadRow("whose 'rewards' are not a list of one number per response")
    return [float(reward) for reward in rewards]


def _number(values: Mapping[str, Any], name: str, expected: str, highest: float) -> float | None:
    """The column's value, from 0 to `highest`; None without a column."""
    if not name:
        return None
    value = values.get(name)
    if not (_is_finite(value) and 0 <= value <= highest):
        raise BadRow(f"whose {name!r} is not {expected}")
    return float(value)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _content(values: Mapping[str, Any], name: str) -> str | Messages:
    content = values.get(name)
    if content is None:
        raise BadRow(f"without a {name!r}")
    if isinstance(content, str):
        if not content.strip():
            raise BadRow(f"with an empty {name!r}")
        if not is_unicode(content):
            raise BadRow(f"whose {name!r} is not Unicode text")
        return content
    messages = messages_of(content)
    if not messages:
        raise BadRow(f"whose {name!r} is neither text nor chat messages")
    return messages


def _is_empty(answer: str | Messages) -> bool:
    """Whether an answer has no text, and no tool call or other field that a template may render."""
    if isinstance(answer, str):
        return not answer.strip()
    return not content_text(answer[-1]).strip() and set(answer[-1]) <= {"role", "content", "name"}


def _shared_text(chosen: str, rejected: str) -> tuple[str, list[str]]:
    differ = (place for place, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    shared = chosen[: next(differ, min(len(chosen), len(rejected)))]
    cut = max(shared.rfind(space) for space in (" ", "\n", "\t"))
    prompt, answers = shared[: max(cut, 0)], [chosen[max(cut, 0) :], rejected[max(cut, 0) :]]
    if not prompt.strip():
        raise BadRow("without a 'prompt', whose sides begin with no shared text")
    for name, answer in zip(ANSWERS["pairs"], answers, strict=True):
        if not answer.strip():
            raise BadRow(f"with an empty {name!r}")
    return prompt, answers


def _complete(prompt: str | Messages, system: str) -> str | Messages:
    if isinstance(prompt, str):
        return prompt
    if not any(message["role"] == "user" for message in prompt):
        raise BadRow("whose prompt has no user message")
    return complete(prompt, system, "")


def _group(
    index: int,
    values: Mapping[str, Any],
    kind: Kind,
    prompt: str | Messages,
    answers: list[str | Messages],
    writer: Writer,
    limits: Limits,
) -> Group:
    chat, tokenizer = isinstance(prompt, list), writer.tokenizer
    if chat and getattr(tokenizer, "chat_template", None) is None:
        raise BadRow("of chat messages, for which the tokenizer has no chat template")
    prompt_text = writer.render(values, prompt, add_generation_prompt=True) if chat else prompt
    prompt_ids = tokenizer(prompt_text, add_special_tokens=False)["input_ids"] if chat else text_ids(tokenizer, prompt)
    if limits.prompt is not None and len(prompt_ids) > limits.prompt:
        raise BadRow(f"with a prompt longer than {limits.prompt} tokens")
    signs = _advantages(values, kind, len(answers))
    samples = []
    for answer, sign in zip(answers, signs, strict=True):
        text = answer if isinstance(answer, str) else content_text(answer[-1])
        whole = writer.render(values, [*prompt, *answer]) if chat else prompt + answer
        ids = _answer_ids(writer, prompt_text, prompt_ids, whole, chat)
        if not prompt_ids:  # nothing precedes a text's first token, so it cannot be a target
            prompt_ids, ids = ids[:1], ids[1:]
        if not ids:
            raise BadRow("of one token")
        if limits.all is not None and len(prompt_ids) + len(ids) > limits.all:
            raise BadRow(f"longer than {limits.all} tokens")
        reward = sign if kind in ("ranked", "rewarded") else float(sign > 0)
        samples.append(Sample(ids, [math.nan] * len(ids), True, text, reward=reward, advantage=sign))
    if kind != "rewarded" and any(one.token_ids == other.token_ids for one, other in combinations(samples, 2)):
        raise BadRow("with identical sides")
    if kind == "rewarded":
        for sample in samples:
            sample.rewards, sample.advantage = {"reward": sample.reward}, 0.0
    used = {"prompt", "messages", "text", "label", "ranking", "rewards", *ANSWERS[kind]}
    columns = {name: value for name, value in values.items() if name not in used}
    return Group(Prompt(index, prompt, tuple(prompt_ids), columns), samples)


def _answer_ids(writer: Writer, prompt_text: str, prompt_ids: list[int], whole: str, chat: bool) -> list[int]:
    """The tokens after `prompt_ids`, up to and including the one that ends the answer."""
    if not whole.startswith(prompt_text):
        raise BadRow("whose prompt the chat template renders otherwise once it is answered")
    tokenizer = writer.tokenizer
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"] if chat else text_ids(tokenizer, whole)
    if ids[: len(prompt_ids)] == prompt_ids:
        ids = ids[len(prompt_ids) :]
    else:
        ids = tokenizer(whole[len(prompt_text) :], add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    if not chat:
        return ids if end is None or ids[-1:] == [end] else [*ids, end]
    for token in (writer.end_of_turn, end):
        last = max((place for place, one in enumerate(ids) if one == token), default=len(ids))
        if last < len(ids) and not tokenizer.decode(ids[last + 1 :], skip_special_tokens=True).strip():
            return ids[: last + 1]
    return ids


def _advantages(values: Mapping[str, Any], kind: Kind, answers: int) -> list[float]:
    if kind == "labelled":
        return [1.0 if _label(values) else -1.0]
    if kind == "ranked":
        return [-rank for rank in _ranking(values, answers)]
    if kind == "rewarded":
        return _rewards(values, answers)
    return [1.0, -1.0][:answers]


def _label(values: Mapping[str, Any]) -> bool:
    label = values.get("label")
    if label not in (True, False):
        raise BadRow("whose 'label' is neither true nor false")
    return bool(label)


def _report_endless(groups: Sequence[Group], tokenizer: PreTrainedTokenizerBase, writer: Writer) -> None:
    """Warns if trained answers do not end with a token that stops generation."""
    ends = {tokenizer.eos_token_id, writer.end_of_turn}
    endless = [s for group in groups for s in group.samples if s.token_ids[-1] not in ends]
    if endless:
        warnings.warn(
            f"{OP}: {len(endless)} answers end with {tokenizer.decode(endless[0].token_ids[-1:])!r}, which ends "
            "neither a turn nor a text: a model trained on them never learns to stop.",
            stacklevel=3,
        )


def _report(total: int, bad: Mapping[str, Sequence[str]]) -> None:
    """Reports how many rows were dropped and why; refuses a source with no row left."""
    skipped = sum(map(len, bad.values()))
    reasons = "; ".join(
        f"{len(places)} {reason} ({', '.join(places[:3])}{', ...' if len(places) > 3 else ''})"
        for reason, places in bad.items()
    )
    check.require(skipped < total, OP, "source", f"a good row among {total}", f"only rows {reasons}")
    if skipped:
        warnings.warn(f"{OP}: left out {skipped} of {total} rows: {reasons}.", stacklevel=3)
