"""A server with OpenAI's chat form on 127.0.0.1, whose answers come from a function, and an engine that is one."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from deepgen.data.images import decode_image
from rewards import Missing
from rewards.judging.questions import Answer, Question


class FakeEngine:
    """Answers with a function of the question; keeps what it was asked."""

    def __init__(self, answer: Callable[[Question], Answer | Missing], reserved: Sequence[str] = ()) -> None:
        self.answer, self.reserved, self.asked = answer, reserved, list[Question]()

    def ask(self, questions: Sequence[Question]) -> list[Answer | Missing]:
        self.asked += questions
        return [self.answer(question) for question in questions]


def reply_of(answer: Answer) -> dict[str, Any]:
    """An answer in OpenAI's form."""
    tokens = [{"token": token, "logprob": logprob} for token, logprob in answer.first]
    logprobs = {"content": [{**tokens[0], "top_logprobs": tokens}]} if tokens else None
    return {"choices": [{"message": {"role": "assistant", "content": answer.text}, "logprobs": logprobs}]}


def question_of(body: dict[str, Any]) -> Question:
    """The question that a request asks, with its images decoded."""
    turns = {turn["role"]: turn["content"] for turn in body["messages"]}
    *images, text = turns["user"]
    decoded = [base64.b64decode(part["image_url"]["url"].partition(",")[2]) for part in images]
    return Question(
        text["text"],
        tuple(np.asarray(decode_image(data)) for data in decoded),
        turns.get("system", ""),
        body["max_tokens"],
        body["temperature"],
        bool(body.get("logprobs")),
    )


@contextmanager
def chat_server(
    answer: Callable[[dict[str, Any]], tuple[int, bytes]], **headers: str
) -> Iterator[tuple[str, list[Any]]]:
    """The server's base address, and the list of (headers, body) of its requests.

    answer: from a request's body to status and body of the reply. headers: of every reply, with _ for -.
    """
    requests: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((dict(self.headers), body))
            status, content = answer(body)
            self.send_response(status if self.path == "/v1/chat/completions" else 404)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None: ...

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.server_port}/v1", requests
    finally:
        listener.shutdown()
        listener.server_close()
