"""Conversations of several turns between the policy and an environment.

Token ids go into the sampler and come out of it; what the policy wrote is never decoded and tokenised again, because
another tokenisation of the same text has other log-probabilities. Only what the environment says is rendered, by the
chat template, and its tokens are appended with `Sample.own` False.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TooLate
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from fastrl.chat import content_text, messages_of, render
from fastrl.check import require, sentence
from fastrl.progress import Progress, unseen
from fastrl.rollout.base import SECOND_SEED, Sampler, SamplingParams, extend, insert, places_of
from fastrl.types import Group, Messages, Prompt, Sample

OP = "environment"
_ANSWER = "the answer of this turn"  # placeholder, rendered to see what follows an answer


class Environment(Protocol):
    """The other side of one conversation. Both functions may be `async`, and those of a turn then run concurrently.

    An optional attribute `metrics` maps names to numbers, which are averaged over conversations and logged. An optional
    function `close()` is called once the conversation has ended, by whatever.
    """

    def reset(self, row: Mapping[str, Any]) -> None:
        """Begins a conversation about a prompt; `row` has its columns, and the prompt itself as `prompt`."""
        ...

    def step(self, completion: str) -> tuple[Messages, float | None, bool]:
        """Answers a turn of the policy: (messages to append, reward of the turn or None, whether this is the end)."""
        ...


@dataclass(frozen=True)
class Turns:
    """How conversations run.

    Args:
        factory: makes a new environment for each sample.
        max_turns: turns of the policy after which a conversation ends, whether the environment is done or not.
        turn_tokens: the policy's tokens in one turn. `SamplingParams.max_new_tokens` bounds the whole conversation, the
            environment's tokens included.
        timeout: seconds that a call of an environment may take; 0 is no limit. With a limit, functions that are not
            async run in a thread, which a late answer leaves behind.
        template_options: extra arguments for the chat template, as for the prompts.
    """

    factory: Callable[[], Environment]
    max_turns: int = 4
    turn_tokens: int = 256
    timeout: float = 10.0
    template_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(callable(self.factory), OP, "name", "a function or class that makes an environment", self.factory)
        require(self.max_turns >= 1, OP, "max_turns", "at least 1", self.max_turns)
        require(self.turn_tokens >= 1, OP, "turn_tokens", "at least 1", self.turn_tokens)
        require(0 <= self.timeout < math.inf, OP, "timeout", "seconds, or 0 (no limit)", self.timeout)


class EnvironmentFault(Exception):
    """An environment returned something that is not as `Environment` says, or did not answer in time."""


@dataclass
class _Talk:
    """One conversation on its way."""

    place: int  # number of its stream of random numbers, after the first turn
    prompt: Prompt
    sample: Sample
    environment: Environment | None = None
    messages: Messages = field(default_factory=list)
    rewards: list[float | None] = field(default_factory=list)
    live: bool = True
    error: str = ""

    @property
    def ids(self) -> list[int]:
        return [*self.prompt.token_ids, *self.sample.token_ids]

    def fail(self, error: BaseException) -> None:
        """Ends it without a result: its sample gets no reward and is not trained on."""
        self.live, self.error = False, f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]

    def add(self, turn: Sample, room: int) -> bool:
        """Appends what the policy wrote, cut to `room` tokens; returns whether the turn has its end."""
        extend(self.sample, turn, room)
        self.sample.turn_ends.append(len(self.sample.token_ids))
        return turn.finished and len(turn.token_ids) <= room


def play(
    prompts: Sequence[Prompt],
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int,
    params: SamplingParams,
    turns: Turns,
    progress: Progress = unseen,
) -> list[Group]:
    """`num_samples` conversations about each prompt; one turn of all that go on is sampled at a time.

    A sample ends with a token of the policy. `own` marks its tokens; the environment's have `sampling_logps` 0. It is
    `finished` if the environment ended it, and not if a limit on tokens or turns did: a turn that was cut off is not
    shown to the environment, so half a tool call is never run, and messages that leave the policy no room for a token
    are not appended. `extra` has the `messages`, the `turn_rewards` and the environment's `metrics`. A conversation
    whose environment failed has an `environment_error` there instead.

    Raises:
        ValueError: the chat template does not render what the environment says.
    """
    if params.vocab_size is None:
        params = replace(params, vocab_size=1 + max(*tokenizer.get_vocab().values(), *params.stop_token_ids))
    places = [place * num_samples + number for place in places_of(prompts, params) for number in range(num_samples)]
    asked = [prompt for prompt in prompts for _ in range(num_samples)]
    new = [Sample([], [], False, own=[], turn_ends=[]) for _ in asked]
    talks = [_Talk(*one) for one in zip(places, asked, new, strict=True)]
    for talk, made in zip(talks, _each([turns.factory] * len(talks), [()] * len(talks), 0.0), strict=True):
        talk.fail(made) if isinstance(made, BaseException) else setattr(talk, "environment", made)
    _reset([talk for talk in talks if talk.live], turns)
    for turn in range(turns.max_turns):
        live = [talk for talk in talks if talk.live]
        if not live:
            break
        rooms = [params.max_new_tokens - len(talk.sample.token_ids) for talk in live]
        longest = min(max(rooms), turns.turn_tokens)
        seed = (params.seed + turn * SECOND_SEED) % 2**64
        own = replace(params, seed=seed, max_new_tokens=longest, min_new_tokens=min(params.min_new_tokens, longest))
        if turn == 0 and len(live) == len(talks):  # each prompt is prefilled once
            sampled = sampler.sample([prompt.token_ids for prompt in prompts], num_samples, own, progress)
            said = [sample for group in sampled for sample in group]
        else:
            own = replace(own, places=tuple(talk.place for talk in live))
            said = [group[0] for group in sampler.sample([talk.ids for talk in live], 1, own, progress)]
        ended = [talk.add(one, room) for talk, one, room in zip(live, said, rooms, strict=True)]
        for talk, one, room in zip(live, said, rooms, strict=True):
            ids = one.token_ids[:room]
            ids = ids[:-1] if ids[-1] in params.stop_token_ids else ids
            talk.messages.append({"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=False)})
        for talk, whole in zip(live, ended, strict=True):
            talk.live = whole
        _step([talk for talk in live if talk.live], tokenizer, params, turns, turn + 1 == turns.max_turns)
    _close(talks, turns)
    for talk in talks:
        _note(talk, tokenizer)
    samples = [talk.sample for talk in talks]
    starts = range(0, len(samples), num_samples)
    return [Group(prompt, samples[at : at + num_samples]) for prompt, at in zip(prompts, starts, strict=True)]


def continuation(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, options: Mapping[str, Any] | None = None
) -> list[int]:
    """The tokens that the chat template puts after an answer, when `messages` follow and the next answer begins.

    The template renders a placeholder conversation, and what stands behind the placeholder's answer is tokenised alone.
    So a template that changes earlier turns, such as one that drops their reasoning, changes nothing here.

    Raises:
        ValueError: the template refuses the messages, or leaves one of them out.
    """
    talk = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": _ANSWER}, *messages]
    try:
        text = render(tokenizer, talk, **{**(options or {}), "add_generation_prompt": True})
    except ValueError as error:
        roles = ", ".join(sorted({message["role"] for message in messages}))
        raise ValueError(sentence(OP, "messages", f"roles that the chat template takes after an answer, not {roles}",
                                  str(error))) from error  # fmt: skip
    _, found, behind = text.rpartition(_ANSWER)
    lost = [message for message in messages if content_text(message).strip() not in behind]
    do = "Use a chat template that shows them, or another role."
    require(bool(found), OP, "messages", "a chat template that shows an earlier answer", "one that does not", do)
    got = f"{lost[0]['role']!r} messages, which it leaves out" if lost else ""
    require(not lost, OP, "messages", "messages that the chat template shows", got, do)
    return tokenizer(behind, add_special_tokens=False)["input_ids"]


def _reset(talks: Sequence[_Talk], turns: Turns) -> None:
    rows = [(talk.prompt.columns | {"prompt": talk.prompt.content},) for talk in talks]
    results = _each([talk.environment.reset for talk in talks], rows, turns.timeout)
    for talk, result in zip(talks, results, strict=True):
        if isinstance(result, BaseException):
            talk.fail(result)
        elif result is not None:
            talk.fail(EnvironmentFault("reset returned something; the prompt is the row's, and reset returns None"))


def _close(talks: Sequence[_Talk], turns: Turns) -> None:
    open_ = [talk for talk in talks if hasattr(talk.environment, "close")]
    results = _each([talk.environment.close for talk in open_], [()] * len(open_), turns.timeout)
    for talk, result in zip(open_, results, strict=True):
        if isinstance(result, BaseException):
            talk.fail(result)


def _step(
    talks: Sequence[_Talk], tokenizer: PreTrainedTokenizerBase, params: SamplingParams, turns: Turns, last: bool
) -> None:
    """Lets the environments answer; ends conversations that are over, or have no room for another turn."""
    calls = [talk.environment.step for talk in talks]
    results = _each(calls, [(talk.messages[-1]["content"],) for talk in talks], turns.timeout)
    for talk, result in zip(talks, results, strict=True):
        try:
            if isinstance(result, BaseException):
                raise result
            messages, reward, done = _checked(result)
        except (Exception, SystemExit) as error:
            talk.fail(error)
            continue
        talk.rewards.append(reward)
        if done or last:
            talk.live, talk.sample.finished = False, done
            talk.messages += messages
            continue
        ids = continuation(tokenizer, messages, turns.template_options)
        if ids[:1] == talk.sample.token_ids[-1:]:  # the end of the turn, which the policy wrote itself
            ids = ids[1:]
        if len(talk.sample.token_ids) + len(ids) >= params.max_new_tokens:
            talk.live = False
            continue
        talk.messages += messages
        insert(talk.sample, ids)


def _checked(result: Any) -> tuple[Messages, float | None, bool]:
    if not (isinstance(result, tuple) and len(result) == 3 and isinstance(result[2], bool)):
        raise EnvironmentFault(f"step: expected (messages, reward or None, done), got {result!r:.80}")
    messages, reward, done = messages_of(result[0] or []), result[1], result[2]
    if messages is None or any(message["role"] == "assistant" for message in messages):
        raise EnvironmentFault(f"step: expected chat messages of others than the assistant, got {result[0]!r:.80}")
    if not messages and not done:
        raise EnvironmentFault("step: expected a message, or done = True, got neither")
    number = isinstance(reward, (int, float)) and math.isfinite(reward)
    if reward is not None and not number:
        raise EnvironmentFault(f"step: expected a finite number as reward, or None, got {reward!r:.80}")
    return messages, None if reward is None else float(reward), done


def _note(talk: _Talk, tokenizer: PreTrainedTokenizerBase) -> None:
    """Fills in the sample's text and `extra`."""
    sample = talk.sample
    if not sample.token_ids:  # its environment did not even begin
        sample.token_ids, sample.sampling_logps, sample.own = [talk.prompt.token_ids[-1]], [0.0], [False]
    sample.text = tokenizer.decode(sample.token_ids, skip_special_tokens=True)
    metrics = {name: float(value) for name, value in (getattr(talk.environment, "metrics", None) or {}).items()}
    metrics |= {"turns": float(len(sample.turn_ends)), "own_fraction": sum(sample.own) / len(sample.own)}
    sample.extra |= {"messages": talk.messages, "turn_rewards": talk.rewards, "metrics": metrics}
    if talk.error:
        sample.finished = False
        sample.extra["environment_error"] = talk.error


def _each(calls: Sequence[Callable[..., Any]], arguments: Sequence[tuple[Any, ...]], timeout: float) -> list[Any]:
    """Each call's result, or its exception. Async ones run concurrently; the others in order, so that their random
    numbers do not depend on timing."""
    begun = [
        asyncio.run_coroutine_threadsafe(call(*given), _loop()) if inspect.iscoroutinefunction(call) else None
        for call, given in zip(calls, arguments, strict=True)
    ]
    return [
        _result(future or _future(call, given, timeout), timeout)
        for future, call, given in zip(begun, calls, arguments, strict=True)
    ]


def _future(call: Callable[..., Any], arguments: tuple[Any, ...], timeout: float) -> Future[Any]:
    future: Future[Any] = Future()

    def run() -> None:
        future.set_running_or_notify_cancel()  # a late answer then goes nowhere
        try:
            future.set_result(call(*arguments))
        except (Exception, SystemExit) as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start() if timeout else run()
    return future


def _result(future: Future[Any], timeout: float) -> Any:
    try:
        return future.result(timeout or None)
    except TooLate as error:
        if future.done():  # the environment's own TimeoutError
            return error
        future.cancel()
        return EnvironmentFault(f"no answer within {timeout:g} s")
    except (Exception, SystemExit, asyncio.CancelledError) as error:
        return error


@functools.lru_cache(maxsize=1)
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()  # one for the process: clients belong to the loop that they were made on
    threading.Thread(target=loop.run_forever, name="fastrl-environments", daemon=True).start()
    return loop
