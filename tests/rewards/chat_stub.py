"""A rule in the place of a model behind an OpenAI-compatible server, and in the place of one in this process."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class Busy(Exception):
    """Answered with this status, these headers and this body."""

    def __init__(self, status, headers=(), body="{}"):
        super().__init__(status)
        self.status, self.headers, self.body = status, dict(headers), body


def reply(text, tokens=()):
    """A chat completion; `tokens` are (drawn token, {alternative: probability})."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if tokens:
        content = [
            {
                "token": drawn,
                "logprob": math.log(others.get(drawn, 1.0)),
                "top_logprobs": [{"token": t, "logprob": math.log(p)} for t, p in others.items()],
            }
            for drawn, others in tokens
        ]
        choice["logprobs"] = {"content": content}
    return {"id": "x", "object": "chat.completion", "choices": [choice]}


@contextmanager
def server(rule):
    """Yields (base address, list of (body, headers) asked); `rule` takes a body and returns a completion or raises
    `Busy`."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((body, dict(self.headers), self.path))
            try:
                status, headers, text = 200, {}, json.dumps(rule(body))
            except Busy as busy:
                status, headers, text = busy.status, busy.headers, busy.body
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/v1", asked
    finally:
        http.shutdown()
        http.server_close()


class Rule:
    """A `ChatModel` by two functions of the question's text."""

    def __init__(self, says=None, prefers=None):
        self.says, self.prefers, self.asked = says, prefers, []

    def __str__(self):
        return "a rule"

    def replies(self, conversations, samples, **sampling):
        self.asked += conversations
        return [[self.says(one[-1]["content"], number) for number in range(samples)] for one in conversations]

    def option_probabilities(self, conversations, options):
        self.asked += conversations
        return [self.prefers(one[-1]["content"], options) for one in conversations]
