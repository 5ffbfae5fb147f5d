"""A program that asks a model, such as an agent, as an environment: the policy is the model that it asks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from fastrl.chat import content_text
from fastrl.rollout.turns import EnvironmentFault
from fastrl.types import Messages

Ask = Callable[[Messages], Awaitable[str]]
Program = Callable[[Mapping[str, Any], Ask], Awaitable[float | None]]


class AgentEnvironment:
    """Runs `program(row, ask)`: `await ask(messages)` is the policy's answer to a conversation, and what the program
    returns is the reward of its end.

    The conversation's tokens are kept and never rendered again, so the first question is the row's prompt and every
    later one what was said before and then new messages; anything else fails the conversation. A turn that the program
    goes on from has the reward 0, so that a conversation that a limit cuts has earned nothing. A program that a limit
    leaves without an answer is cancelled.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._said: Messages = []
        self._events: asyncio.Queue[tuple[str, Any]] | None = None
        self._task: asyncio.Task[None] | None = None
        self._waits: asyncio.Future[str] | None = None

    async def reset(self, row: Mapping[str, Any]) -> None:
        """Starts the program and takes its first question."""
        prompt = row["prompt"]
        self._said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        self._events = asyncio.Queue()
        self._task = asyncio.ensure_future(self._run(row))
        kind, asked = await self._next()
        if kind == "ended":
            raise EnvironmentFault("the program ended without a question")
        if not _same(asked, self._said):
            raise EnvironmentFault(f"the first question is not the row's prompt: {asked!r:.120}")

    async def step(self, completion: str) -> tuple[Messages, float | None, bool]:
        """Gives the program its answer, and returns what it asks next, or its reward."""
        self._said.append({"role": "assistant", "content": completion})
        self._waits.set_result(completion)
        kind, what = await self._next()
        if kind == "ended":
            return [], what, True
        known = len(self._said)
        if not _same(what[:known], self._said):
            raise EnvironmentFault("a question changes what was said before it, which the policy has already read")
        self._said = list(what)
        return what[known:], 0.0, False

    async def close(self) -> None:
        """Cancels a program that still waits."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _next(self) -> tuple[str, Any]:
        """What the program does next: it has asked, or ended."""
        kind, what = await self._events.get()
        if kind == "failed":
            raise what
        return kind, what

    async def _run(self, row: Mapping[str, Any]) -> None:
        try:
            ended = ("ended", await self._program(row, self._ask))
        except Exception as error:
            ended = ("failed", error)
        await self._events.put(ended)

    async def _ask(self, messages: Messages) -> str:
        if self._waits is not None and not self._waits.done():
            raise EnvironmentFault(
                "the program asks again before it has its answer; a conversation is one after another"
            )
        self._waits = asyncio.get_running_loop().create_future()
        await self._events.put(("asked", messages))
        return await self._waits


def _same(asked: Sequence[Mapping[str, Any]], said: Messages) -> bool:
    """Whether roles and texts are equal, but for white space around them."""

    def seen(message: Mapping[str, Any]) -> tuple[str, str]:
        return message["role"], content_text(message).strip()

    return [*map(seen, asked)] == [*map(seen, said)]
