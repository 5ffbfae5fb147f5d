"""A language model behind an OpenAI-compatible server, over `urllib` alone."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, Request, build_opener

from fastrl import check, env
from fastrl.types import Messages

OP = "judge"
BUSY = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # statuses after which the same request may succeed
LONGEST_WAIT = 30.0  # seconds between two attempts
TOP = 20  # the most alternatives per token that the interface allows
Answer = TypeVar("Answer")


class Unanswered(RuntimeError):
    """The server did not answer a request; the message says why."""


class ChatServer:
    """POST `url`/chat/completions: https://platform.openai.com/docs/api-reference/chat/create, as vLLM, SGLang,
    llama.cpp and others serve it.

    A request that the server is too busy for, or whose connection breaks, is repeated after 0.5, 1, 2, ... seconds, or
    when the server says so. Any other refusal is final. Redirects are not followed, because they would carry the key
    to another server.

    Args:
        url: the interface's base, such as http://localhost:8000/v1.
        model: the model's name on the server.
        key_variable: the environment variable that holds the key; empty sends none.
        timeout: seconds for one attempt.
        deadline: seconds for all requests of one call together; what is unanswered then stays so.
        retries: attempts after the first.
        workers: requests at a time.

    Raises:
        ValueError: the address is not one of http, or the variable is not set.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_variable: str = "",
        timeout: float = 60.0,
        deadline: float = 600.0,
        retries: int = 5,
        workers: int = 8,
    ) -> None:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname)
        check.require(good, OP, "server", "an address such as http://localhost:8000/v1", repr(url))
        check.require(bool(model), OP, "model", "the model's name on the server", repr(model))
        for name, value in (("timeout", timeout), ("deadline", deadline)):
            check.require(0 < value < math.inf, OP, name, "seconds above 0", value)
        check.require(retries >= 0, OP, "retries", "0 or more", retries)
        check.require(workers >= 1, OP, "workers", "at least 1", workers)
        key = env.secret(key_variable) if key_variable else None
        set_ = not key_variable or bool(key)
        check.require(set_, OP, "key_variable", "an environment variable that holds the key", f"{key_variable}, unset")
        base = url.rstrip("/").removesuffix("/chat/completions")
        self.url, self.model, self.timeout, self.deadline = f"{base}/chat/completions", model, timeout, deadline
        self.retries, self.workers = retries, workers
        self.limit_name = "max_tokens"
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._opener = build_opener(_NoRedirect)

    def __str__(self) -> str:
        return f"{self.model} at {self.url}"

    def replies(
        self,
        conversations: Sequence[Messages],
        samples: int,
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
    ) -> list[list[str | Unanswered]]:
        """`samples` replies to each conversation. Replies differ by their seed, so a server that ignores seeds only
        loses reproducibility."""
        asked = [(messages, seed + number) for messages in conversations for number in range(samples)]
        sampling = {"temperature": temperature, "top_p": top_p}

        def ask(one: tuple[Messages, int], until: float) -> str:
            body = {"messages": one[0], "seed": one[1] % 2**31, **sampling}
            return _text(self._choice(body, max_new_tokens, until))

        found = self._each(asked, ask)
        return [found[start : start + samples] for start in range(0, len(found), samples)]

    def option_probabilities(
        self, conversations: Sequence[Messages], options: Sequence[str]
    ) -> list[list[float] | Unanswered | None]:
        """The probability of each option as the whole of the reply, relative to the others; None where they cannot be
        told apart or none is among the `TOP` most probable first tokens.

        An option that is no token, such as 10 where digits are tokens, is read from the second token if the reply
        begins with its first.
        """

        def ask(messages: Messages, until: float) -> list[float] | None:
            body = {"messages": messages, "temperature": 0.0, "logprobs": True, "top_logprobs": TOP}
            content = (self._choice(body, 2, until).get("logprobs") or {}).get("content")
            if not content:
                raise Unanswered(
                    f"{self}: expected logprobs, got none. Ask a server that has them, or set how: points."
                )
            return _shares(content, options)

        return self._each(list(conversations), ask)

    def _each(self, items: Sequence[Any], ask: Callable[[Any, float], Answer]) -> list[Answer | Unanswered]:
        """What `ask` returns for each item before the deadline, or why it did not."""
        until = time.monotonic() + self.deadline

        def attempt(item: Any) -> Answer | Unanswered:
            try:
                return ask(item, until)
            except Unanswered as error:
                return error

        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(attempt, items))

    def _choice(self, body: Mapping[str, Any], limit: int, until: float) -> dict[str, Any]:
        """The first choice of the server's answer."""
        answer = self._post({"model": self.model, self.limit_name: limit, **body}, until)
        try:
            choice = answer["choices"][0]
            choice["message"]
        except (TypeError, LookupError):
            raise Unanswered(f"{self}: expected a chat completion, got {json.dumps(answer)[:200]}") from None
        return choice

    def _post(self, body: dict[str, Any], until: float) -> Any:
        """The answer to a request, after as many attempts as it takes and time allows."""
        attempt, refusal = 0, ""
        while True:
            left = until - time.monotonic()
            if left <= 0:
                raise Unanswered(f"{self}: no answer within deadline = {self.deadline:g} s{refusal}")
            try:
                return _send(self._opener, Request(self.url, _encode(body), self._headers), min(self.timeout, left))
            except HTTPError as error:
                told, wait = _told(error), _retry_after(error)
                if error.code == 400 and "max_completion_tokens" in told and "max_tokens" in body:
                    # OpenAI's newer models refuse the old name, and most other servers do not know the new one.
                    self.limit_name = "max_completion_tokens"
                    body = {("max_completion_tokens" if name == "max_tokens" else name): v for name, v in body.items()}
                    continue
                if error.code not in BUSY:
                    raise Unanswered(f"{self}: {told}") from None
            except (URLError, OSError, HTTPException, ValueError) as error:  # ValueError: an answer that is not JSON
                told, wait = f"{type(error).__name__}: {error}", None
            refusal = f"; the last attempt: {told}"
            if attempt == self.retries:
                raise Unanswered(f"{self}: no answer in {attempt + 1} attempts{refusal}")
            pause = min(LONGEST_WAIT, 0.5 * 2**attempt) if wait is None else wait
            time.sleep(max(0.0, min(pause, until - time.monotonic())))
            attempt += 1


class _NoRedirect(HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Follows nothing; the redirect then counts as a refusal."""


def _encode(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body).encode()


def _send(opener: OpenerDirector, request: Request, timeout: float) -> Any:
    with opener.open(request, timeout=timeout) as answer:
        return json.loads(answer.read())


def _told(error: HTTPError) -> str:
    """Status and start of the body of a refusal."""
    try:
        body = error.read(2000).decode(errors="replace")
    except (OSError, HTTPException):
        body = ""
    return f"status {error.code} {error.reason}: {' '.join(body.split())[:300]}".removesuffix(": ")


def _retry_after(error: HTTPError) -> float | None:
    """Seconds that the server asks to wait; None if it does not say, or gives a date."""
    try:
        return max(0.0, float(error.headers.get("Retry-After", "")))
    except ValueError:
        return None


def _text(choice: Mapping[str, Any]) -> str:
    """The reply's text; empty if there is none, as in a refusal or where all tokens went into hidden reasoning."""
    content = choice["message"].get("content")
    if isinstance(content, list):  # in parts
        content = "".join(part.get("text") or "" for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else ""


def _shares(content: Sequence[Mapping[str, Any]], options: Sequence[str]) -> list[float] | None:
    """`ChatServer.option_probabilities` of one reply, given its tokens with their alternatives."""
    first, drawn = _listed(content[0]), str(content[0].get("token", "")).strip()
    shares = []
    for option in options:
        share = first.get(option, 0.0)
        parts = [part for part in options if part != option and option.startswith(part)]  # the 1 of 10
        if option not in first and any(part in first for part in parts):
            (part,) = parts
            if drawn != part or len(content) < 2:
                if first[part] > 0.01:  # some of it may be the option's
                    return None
            else:
                share = first[part] * _listed(content[1]).get(option.removeprefix(part), 0.0)
                shares[options.index(part)] -= share
        shares.append(share)
    total = math.fsum(shares)
    return [share / total for share in shares] if total > 0 else None


def _listed(token: Mapping[str, Any]) -> dict[str, float]:
    """Text without white space -> probability, over a token's alternatives."""
    found: dict[str, float] = {}
    for one in token.get("top_logprobs") or ():
        text = str(one["token"]).strip()
        found[text] = found.get(text, 0.0) + math.exp(one["logprob"])
    return found
