"""A scorer on 127.0.0.1 that fails in every way that services do, by a script or by chance with a seed.

The faults know nothing of what is asked: `answer` turns a request's path and body into the JSON value of the right
answer, and a fault sends something else, or nothing, in its place. So one server tests all protocols of JSON over HTTP.
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from weakref import WeakSet

FAULTS = (
    "refuse",  # hangs up, with a reset
    "hang",  # never answers
    "500",
    "429",  # with Retry-After
    "half",  # hangs up in the middle of the answer
    "wrong_json",
    "nan",  # in the place of every number
    "10mb",  # of text
    "wrong_count",  # one item too few
    "trickle",  # the right answer, but a byte now and then
    "trickle_head",  # the same, from the first byte of the head on
    "late",  # the right answer, after `late_s`
)
Answer = Callable[[str, bytes], Any]


class FaultServer(ThreadingHTTPServer):
    """Answers POST requests.

    Args:
        answer: the JSON value that answers a path and a body.
        script: what happens to the first requests: one of FAULTS, "" for the right answer, or "twice" for two answers
            at once, the second of which is nobody's.
        rate, seed, faults: afterwards each request fails with this chance, in one of these ways.
        late_s, pause_s: seconds before a late answer, and between the bytes of a trickle.
        port: 0 takes a free one.

    Attributes:
        fates: how many requests there were of each fault; "" counts right answers.
        heads: the headers of all requests.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(
        self,
        answer: Answer,
        *,
        script: Sequence[str] = (),
        rate: float = 0.0,
        seed: int = 0,
        faults: Sequence[str] = FAULTS,
        late_s: float = 1.0,
        pause_s: float = 0.05,
        retry_after: str = "1",
        port: int = 0,
    ) -> None:
        self._connections = WeakSet[socket.socket]()
        super().__init__(("127.0.0.1", port), _Handler)
        self.answer, self.late_s, self.pause_s, self.retry_after = answer, late_s, pause_s, retry_after
        self.fates, self.heads, self.closed = Counter[str](), list[dict[str, str]](), threading.Event()
        self._script, self.rate, self._faults = list(script), rate, list(faults)
        self._chance, self._lock = random.Random(seed), threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def next_fault(self, headers: dict[str, str]) -> str:
        with self._lock:
            if self._script:
                fault = self._script.pop(0)
            else:
                fault = self._chance.choice(self._faults) if self._chance.random() < self.rate else ""
            self.fates[fault] += 1
            self.heads.append(headers)
            return fault

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._connections.add(connection)
        return connection, address

    def unplug(self) -> None:
        """Close the port and all connections. Callers keep theirs open, and would still be answered."""
        self.closed.set()
        self.shutdown()
        self.server_close()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: callers that hang up are what this server is for."""


@contextmanager
def fault_server(answer: Answer, **options: Any) -> Iterator[FaultServer]:
    """A running `FaultServer`, which ends with the context. What still hangs is released."""
    with FaultServer(answer, **options) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.unplug()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        fault = self.server.next_fault(dict(self.headers))
        act = getattr(self, f"_{fault}", None)
        if act is not None:
            act(body)
        else:
            self._send(self._right(body))

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""

    def _right(self, body: bytes) -> bytes:
        return json.dumps(self.server.answer(self.path, body)).encode()

    def _head(self, length: int, status: str = "200 OK", *more: str) -> bytes:
        lines = [f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {length}", *more, "", ""]
        return "\r\n".join(lines).encode()

    def _send(self, content: bytes, status: str = "200 OK", *more: str) -> None:
        self.wfile.write(self._head(len(content), status, *more) + content)

    def _hang_up(self, *, reset: bool = False) -> None:
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.close() if reset else self.connection.shutdown(socket.SHUT_RDWR)

    def _slowly(self, content: bytes) -> None:
        for byte in content:
            if self.server.closed.wait(self.server.pause_s):
                break
            self.wfile.write(bytes([byte]))
        self.close_connection = True

    # ---- faults, by name ----

    def _refuse(self, body: bytes) -> None:
        self.wfile.close()
        self.rfile.close()  # the socket's files keep it open
        self._hang_up(reset=True)

    def _hang(self, body: bytes) -> None:
        self.server.closed.wait()
        self.close_connection = True

    def _500(self, body: bytes) -> None:
        self._send(b"<html>Internal Server Error</html>", "500 Internal Server Error")

    def _429(self, body: bytes) -> None:
        self._send(b"slow down", "429 Too Many Requests", f"Retry-After: {self.server.retry_after}")

    def _half(self, body: bytes) -> None:
        content = self._right(body)
        self.wfile.write(self._head(len(content)) + content[: len(content) // 2])
        self._hang_up()

    def _wrong_json(self, body: bytes) -> None:
        self._send(b'{"score": 0.5,')

    def _nan(self, body: bytes) -> None:
        self._send(json.dumps(_without_numbers(self.server.answer(self.path, body))).encode())

    def _10mb(self, body: bytes) -> None:
        self._send(b"0.5 is a good score. " * 500_000)

    def _wrong_count(self, body: bytes) -> None:
        self._send(json.dumps(_one_less(self.server.answer(self.path, body))).encode())

    def _trickle(self, body: bytes) -> None:
        content = self._right(body)
        self.wfile.write(self._head(len(content)))
        self._slowly(content)

    def _trickle_head(self, body: bytes) -> None:
        content = self._right(body)
        self._slowly(self._head(len(content)) + content)

    def _twice(self, body: bytes) -> None:
        right, other = self._right(body), json.dumps(_doubled(self.server.answer(self.path, body))).encode()
        self.wfile.write(self._head(len(right)) + right + self._head(len(other)) + other)

    def _late(self, body: bytes) -> None:
        content = self._right(body)
        self.server.closed.wait(self.server.late_s)
        self._send(content)


def _without_numbers(value: Any) -> Any:
    return _each_number(value, lambda number: float("nan"))


def _doubled(value: Any) -> Any:
    return _each_number(value, lambda number: 2 * number)


def _each_number(value: Any, change: Callable[[float], float]) -> Any:
    if isinstance(value, dict):
        return {key: _each_number(inner, change) for key, inner in value.items()}
    if isinstance(value, list):
        return [_each_number(inner, change) for inner in value]
    return change(value) if isinstance(value, float) else value


def _one_less(value: Any) -> Any:
    """A JSON object whose lists lack their last item."""
    return {key: inner[:-1] if isinstance(inner, list) else inner for key, inner in value.items()}
