"""Reads http:// and https:// addresses that a data set names.

Not by `urllib.request`: it follows redirects wherever they lead, resolves a name again after any check of it, and every
byte of a slow server gives it new time. Here every connection goes to an address that was checked, and all waits
together have one deadline.

Through a proxy (http_proxy, https_proxy, no_proxy) the proxy connects. A host is then refused if this machine resolves
it to an address that is not allowed; a name that only the proxy can resolve is left to it.
"""

from __future__ import annotations

import base64
import http.client
import io
import socket
import ssl
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit, urlunsplit

from deepgen.reading.deadline import Deadline
from deepgen.reading.file_reader import too_large
from deepgen.reading.reach import Reach

MAX_REDIRECTS = 5
_PIECE = 1 << 20
_REDIRECTS = (301, 302, 303, 307, 308)
_LEGAL = "!#$%&'()*+,/:;=?@[]~"  # stay in a URL, like letters, digits and "-._"; "%" keeps existing escapes
_PORTS = {"http": 80, "https": 443}
_Found = tuple[int, int, int, str, Any]  # of socket.getaddrinfo: family, type, protocol, name, (address, port, ...)


def read_http(url: str, reach: Reach, deadline: Deadline, limit: int) -> bytes:
    """The body at an address, at most `limit` bytes.

    Raises OSError, ValueError or HTTPException if it is incomplete, late, too long or not allowed.
    """
    data = bytearray()
    try:
        for _ in range(MAX_REDIRECTS + 1):
            leads_to = _read_once(_Target.of(url), data, reach, deadline, limit)
            if leads_to is None:
                return bytes(data)
            url = urljoin(url, leads_to)
    except TimeoutError as error:
        raise deadline.error(f" ({len(data):,} bytes were)") from error
    raise OSError(f"more than {MAX_REDIRECTS} redirects")


@dataclass(frozen=True)
class _Target:
    """An address in parts. `path` includes the query; `authorization` is "" without a user in the address."""

    scheme: str
    host: str
    port: int
    path: str
    authorization: str

    @classmethod
    def of(cls, url: str) -> _Target:
        parts = urlsplit(url)
        if parts.scheme not in _PORTS:
            raise OSError(f"leads to {parts.scheme}://; allowed: http:// and https://")
        if not parts.hostname:
            raise ValueError("names no host")
        try:
            port = parts.port or _PORTS[parts.scheme]
        except ValueError as error:  # its own message could show half of a password
            raise ValueError("nonnumeric port") from error
        path, query = (quote(part, safe=_LEGAL) for part in (parts.path or "/", parts.query))
        target = urlunsplit(("", "", path, query, ""))
        return cls(parts.scheme, parts.hostname, port, target, _basic(parts))

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}"


def _basic(parts: SplitResult) -> str:
    """The value of the header Authorization for the user and password in an address."""
    user, separator, _ = parts.netloc.rpartition("@")
    if not separator:
        return ""
    return "Basic " + base64.b64encode(unquote(user if ":" in user else f"{user}:").encode()).decode()


def _read_once(target: _Target, data: bytearray, reach: Reach, deadline: Deadline, limit: int) -> str | None:
    """Append the body to `data` and return None, or return where the answer redirects to."""
    proxy = _proxy(target)
    exchange = _Exchange(target, proxy, _connect(target, proxy, reach, deadline), deadline)
    try:
        answer = exchange.ask()
        if answer.status in _REDIRECTS:
            return answer.headers.get("Location") or _refuse(f"HTTP Error {answer.status} without a new address")
        if not 200 <= answer.status < 300:
            _refuse(f"HTTP Error {answer.status}: {answer.reason}")
        _read_body(answer, data, limit)
        return None
    finally:
        exchange.end()


def _refuse(why: str) -> str:
    raise OSError(why)


def _read_body(answer: http.client.HTTPResponse, data: bytearray, limit: int) -> None:
    expected = answer.length
    if expected is not None and expected > limit:
        raise too_large(limit)
    while len(data) <= limit and (piece := answer.read1(_PIECE)):  # read() would block until it has all bytes
        data += piece
    if len(data) > limit:
        raise too_large(limit)
    if expected is not None and len(data) < expected:
        raise OSError(f"ends after {len(data):,} of {expected:,} bytes")


# ---- Connections ----


def _proxy(target: _Target) -> _Target | None:
    given = urllib.request.getproxies().get(target.scheme)
    if not given or urllib.request.proxy_bypass(target.host):
        return None
    return _Target.of(given if "://" in given else f"http://{given}")


def _connect(target: _Target, proxy: _Target | None, reach: Reach, deadline: Deadline) -> socket.socket:
    """A connection to an allowed address of the target, or to the proxy. Raises OSError."""
    if proxy is None:
        return _dial(_resolve(target, deadline), target.host, reach, deadline)
    try:
        found = _resolve(target, deadline)
    except socket.gaierror:  # the proxy may know it
        found = ()
    for *_, address in found:
        reach.check_address(target.host, address[0])
    return _dial(_resolve(proxy, deadline), proxy.host, None, deadline)


def _resolve(target: _Target, deadline: Deadline) -> Sequence[_Found]:
    return deadline.call(lambda: socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM))


def _dial(found: Sequence[_Found], host: str, reach: Reach | None, deadline: Deadline) -> socket.socket:
    """A connection to the first address that is allowed and answers. reach: None allows all, for the user's proxy."""
    failure: OSError | None = None
    for family, kind, number, _, address in found:
        raw = socket.socket(family, kind, number)
        try:
            if reach is not None:
                reach.check_address(host, address[0])
            raw.settimeout(deadline.left())
            raw.connect(address)
        except OSError as error:
            raw.close()
            failure = failure or error
        else:
            return raw
    raise failure or OSError(f"no address for {host}")


@lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


class _Exchange(http.client.HTTPConnection):
    """One request over a connection that stands already, to a target or to the proxy before it."""

    def __init__(self, target: _Target, proxy: _Target | None, raw: socket.socket, deadline: Deadline) -> None:
        super().__init__(target.host, target.port)
        self.default_port = _PORTS[target.scheme]
        self._target, self._raw, self._deadline = target, raw, deadline
        self._secure = target.scheme == "https"
        self._through = proxy is not None and not self._secure  # a proxy reads plain requests, and tunnels others
        self._for_proxy = {"Proxy-Authorization": proxy.authorization} if proxy and proxy.authorization else {}
        if proxy is not None and self._secure:
            self.set_tunnel(target.host, target.port, self._for_proxy)

    def ask(self) -> http.client.HTTPResponse:
        headers = {"User-Agent": "deepgen", "Connection": "close"} | (self._for_proxy if self._through else {})
        if self._target.authorization:
            headers["Authorization"] = self._target.authorization
        self.request("GET", self._target.url if self._through else self._target.path, headers=headers)
        return self.getresponse()

    def connect(self) -> None:
        self.sock = _Timed(self._raw, self._deadline)
        if self._tunnel_host:  # type: ignore[attr-defined]
            self._tunnel()  # type: ignore[attr-defined]
        if self._secure:
            self._raw.settimeout(self._deadline.left())
            self._raw = _tls().wrap_socket(self._raw, server_hostname=self.host)
            self.sock = _Timed(self._raw, self._deadline)

    def end(self) -> None:
        """Close the socket. (http.client calls `close` before the body is read.)"""
        self._raw.close()


class _Timed(io.RawIOBase):
    """The part of a socket that http.client uses, with one deadline for all waits together."""

    def __init__(self, raw: socket.socket, deadline: Deadline) -> None:
        self._raw, self._deadline = raw, deadline

    def sendall(self, data: bytes) -> None:
        self._raw.settimeout(self._deadline.left())
        self._raw.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Timed(self._raw, self._deadline), 1 << 16)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._raw.settimeout(self._deadline.left())
        return self._raw.recv_into(buffer)
