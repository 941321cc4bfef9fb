"""Small servers on 127.0.0.1 that answer as a test says: well, slowly, for ever, or with nonsense."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Answer = Callable[[socket.socket, str], None]  # gets the connection and the request's head


def reply(body: bytes, status: str = "200 OK", *headers: str) -> Answer:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return lambda connection, _: connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)


def redirect(address: str, status: str = "302 Found") -> Answer:
    return reply(b"", status, f"Location: {address}")


def endless(first: bytes, then: bytes, pause_s: float = 0.01) -> Answer:
    """`first`, then `then` again and again until the reader hangs up."""

    def answer(connection: socket.socket, _: str) -> None:
        connection.sendall(first)
        while True:
            threading.Event().wait(pause_s)
            connection.sendall(then)

    return answer


@contextmanager
def server(answers: dict[str, Answer], heads: list[str] | None = None, host: str = "127.0.0.1") -> Iterator[int]:
    """The port of a server with an answer for each path (the last for all others). `heads` gets what was asked."""
    last = list(answers.values())[-1]

    def handle(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head and (piece := connection.recv(4096)):
                head += piece
            text = head.decode("latin-1")
            if heads is not None:
                heads.append(text)
            answers.get(text.split(" ")[1] if " " in text else "", last)(connection, text)

    def accept(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # closed at the end
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=handle, args=(connection,), daemon=True).start()

    with socket.create_server((host, 0)) as listener:
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        try:
            yield listener.getsockname()[1]
        finally:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
