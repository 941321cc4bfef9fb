"""One deadline around a whole request, one limit of bytes, and no way to an address that is not allowed."""

from __future__ import annotations

import base64
import http.client
import socket
import time
from typing import Any

import pytest

from deepgen.reading.deadline import Deadline
from deepgen.reading.http_reader import MAX_REDIRECTS, read_http
from deepgen.reading.reach import Reach
from tests.helpers.servers import Answer, endless, redirect, reply, server

LOCAL = Reach.of((), ["127.0.0.1"])
OK = b"HTTP/1.1 200 OK\r\n"
BODY = b"a picture"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def read(url: str, reach: Reach = LOCAL, seconds: float = 10.0, limit: int = 1000) -> bytes:
    return read_http(url, reach, Deadline(seconds), limit)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(endless(b"", b""), id="says nothing"),
        pytest.param(endless(b"H", b"T"), id="drips its first line"),
        pytest.param(endless(OK + b"X-A: ", b"a"), id="drips one header"),
        pytest.param(endless(OK + b"Content-Length: 900\r\n\r\n", b"x"), id="drips its body"),
        pytest.param(endless(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"), id="drips chunks"),
        pytest.param(endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), id="100 Continue for ever"),
        pytest.param(endless(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"), id="early hints for ever"),
    ],
)
def test_a_server_that_never_ends_is_given_up(answer: Answer) -> None:
    begun = time.monotonic()
    with server({"/": answer}) as port, pytest.raises((OSError, http.client.HTTPException)) as caught:
        read(f"http://127.0.0.1:{port}/a.png", seconds=0.5)
    assert time.monotonic() - begun < 5
    assert "not read within 0.5 s" in str(caught.value) or "103" in str(caught.value)


def test_redirects_share_the_deadline_and_have_an_end() -> None:
    def slow(connection: socket.socket, head: str) -> None:
        time.sleep(0.2)
        redirect("/again")(connection, head)

    with server({"/": slow}) as port:
        with pytest.raises(TimeoutError, match=r"not read within 0\.5 s"):
            read(f"http://127.0.0.1:{port}/", seconds=0.5)
        heads: list[str] = []
    with server({"/": redirect("/again")}, heads) as port:
        with pytest.raises(OSError, match=f"more than {MAX_REDIRECTS} redirects"):
            read(f"http://127.0.0.1:{port}/")
        assert len(heads) == MAX_REDIRECTS + 1


def test_a_name_that_takes_for_ever_to_resolve_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(3))
    with pytest.raises(TimeoutError, match=r"not read within 0\.2 s"):
        read("http://example.org/a.png", seconds=0.2)


@pytest.mark.parametrize("length", ["Content-Length: 5000", "X-None: 1"])
def test_too_many_bytes_are_not_read(length: str) -> None:
    head = OK + length.encode() + b"\r\n\r\n"
    with server({"/": endless(head, bytes(1 << 16), 0)}) as port, pytest.raises(OSError, match="more than 1,000 bytes"):
        read(f"http://127.0.0.1:{port}/")


def test_bodies_of_all_kinds_are_whole() -> None:
    chunks = OK + b"Transfer-Encoding: chunked\r\n\r\n4\r\na pi\r\n5\r\ncture\r\n0\r\n\r\n"
    answers: dict[str, Answer] = {
        "/chunks": lambda connection, _: connection.sendall(chunks),
        "/until-closed": lambda connection, _: connection.sendall(OK + b"\r\n" + BODY),
        "/continue": lambda connection, _: connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"\r\n" + BODY),
        "/cut": lambda connection, _: connection.sendall(chunks[:-12]),
        "/": reply(BODY),
    }
    with server(answers) as port:
        for path in ("chunks", "until-closed", "continue", "plain"):
            assert read(f"http://127.0.0.1:{port}/{path}") == BODY
        with pytest.raises((OSError, http.client.HTTPException)):
            read(f"http://127.0.0.1:{port}/cut")


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "127.1", "0x7f.0.0.1", "0177.0.0.1", "2130706433", "0", "[::1]", "[::ffff:127.0.0.1]"],
)
def test_this_machine_is_not_asked_unless_allowed(host: str) -> None:
    heads: list[str] = []
    with server({"/": reply(BODY)}, heads) as port:
        with pytest.raises(PermissionError, match=r"no public address; allowed: .*data\.allow"):
            read(f"http://{host}:{port}/", Reach())
        assert not heads
        if "." in host:
            assert read(f"http://{host}:{port}/", LOCAL) == BODY


@pytest.mark.parametrize("target", ["http://127.0.0.2:{port}/", "//127.0.0.2:{port}/", "http://[::1]:{port}/"])
@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_addresses_are_checked_after_a_redirect(target: str, status: str) -> None:
    heads: list[str] = []
    with server({"/": reply(b"secret")}, heads, host="127.0.0.2") as inner:
        answer = redirect(target.format(port=inner), status)
        with server({"/": answer}) as port, pytest.raises(PermissionError, match="no public address"):
            read(f"http://127.0.0.1:{port}/")
        assert not heads


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/", "gopher://127.0.0.1/"])
def test_a_redirect_to_another_scheme_is_not_followed(target: str) -> None:
    with server({"/": redirect(target)}) as port, pytest.raises(OSError, match="allowed: http:// and https://"):
        read(f"http://127.0.0.1:{port}/")


def test_the_address_that_was_checked_is_the_one_that_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that leads to a public address first and to this machine then (DNS rebinding) is resolved once."""
    asked: list[Any] = []
    real = socket.getaddrinfo

    def rebinding(host: str, port: int, **more: Any) -> list[Any]:
        asked.append(host)
        return real("192.0.2.1" if len(asked) % 2 else "127.0.0.1", port, **more)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    monkeypatch.setattr("deepgen.reading.reach.is_public", lambda address: str(address) == "192.0.2.1")
    connected: list[Any] = []

    def connect(_: socket.socket, address: Any) -> None:
        connected.append(address)
        raise OSError("unreachable")

    monkeypatch.setattr(socket.socket, "connect", connect)
    with pytest.raises(OSError, match="unreachable"):
        read("http://rebinding.test/", Reach())
    assert connected == [("192.0.2.1", 80)] and asked == ["rebinding.test"]


def test_a_password_in_the_address_is_sent_and_not_passed_on() -> None:
    first: list[str] = []
    second: list[str] = []
    with server({"/": reply(BODY)}, second) as other:
        moved = redirect(f"http://127.0.0.1:{other}/moved")
        with server({"/": moved}, first) as port:
            assert read(f"http://user:p%40ss@127.0.0.1:{port}/a.png?sig=x") == BODY
    sent = base64.b64encode(b"user:p@ss").decode()
    assert f"Authorization: Basic {sent}\r\n" in first[0] and first[0].startswith("GET /a.png?sig=x HTTP/1.1\r\n")
    assert f"Host: 127.0.0.1:{port}\r\n" in first[0]
    assert "Authorization" not in second[0]


def test_a_proxy_is_used_and_private_addresses_stay_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    heads: list[str] = []
    with server({"/": reply(BODY)}, heads) as proxy:
        monkeypatch.setenv("http_proxy", f"http://me:word@127.0.0.1:{proxy}")
        assert read("http://name-that-only-the-proxy-knows.invalid/a.png", Reach()) == BODY
        assert heads[0].startswith("GET http://name-that-only-the-proxy-knows.invalid:80/a.png HTTP/1.1\r\n")
        assert f"Proxy-Authorization: Basic {base64.b64encode(b'me:word').decode()}" in heads[0]
        for host in ("127.0.0.1", "2130706433", "[::1]"):
            with pytest.raises(PermissionError, match="no public address"):
                read(f"http://{host}/a.png", Reach())
        assert len(heads) == 1
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        with server({"/": reply(b"direct")}) as port:
            assert read(f"http://127.0.0.1:{port}/") == b"direct"


def test_a_tunnel_that_never_opens_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with server({"/": endless(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n")}) as proxy:
        monkeypatch.setenv("https_proxy", f"127.0.0.1:{proxy}")
        with pytest.raises(TimeoutError, match=r"not read within 0\.5 s"):
            read("https://name-that-only-the-proxy-knows.invalid/a.png", Reach(), seconds=0.5)


def test_a_handshake_that_never_ends_is_given_up() -> None:
    with server({"/": endless(b"\x16\x03\x03\x40\x00", b"x")}) as port, pytest.raises(OSError, match=r"0\.5 s"):
        read(f"https://127.0.0.1:{port}/", seconds=0.5)
