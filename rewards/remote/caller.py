"""Posts to an HTTP service, with one deadline for everything and a bound on the answer.

httpx does the HTTP. Its own time limits are for each wait, which a server that sends a byte a second never reaches, so
each call runs in an event loop and is cancelled at the deadline, wherever it waits: name lookup, connection, TLS, head
or body. Redirects are not followed: images and token go to the address that the user gave and nowhere else.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import ipaddress
import logging
import os
import threading
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from deepgen.errors import UserError
from deepgen.masking import masked
from rewards.base import RewardUnavailable
from rewards.remote.protocol import one_line

if TYPE_CHECKING:
    import httpx

MAX_RETRY_AFTER_S = 60.0  # a service that asks for more is asked again anyway
# A connection is for one question. What a server sends after its answer cannot be told from the answer to the next
# question: it may be in the buffer already, or arrive between any look at the socket and the next question. Without
# reuse there is no such moment. It costs a connection for each call: about 1 ms without TLS, where scores take more.
ONE_ANSWER = {"Connection": "close"}
_TOLD = 2048  # bytes of the answer to a refused call that are read for the log
_GRACE_S = 2.0  # for the event loop to cancel what is late
# What has to be set otherwise where a service always answers with a status: no path of it takes such questions.
_AT_FAULT = {401: ("token_env",), 403: ("token_env",), 404: ("url",), 405: ("url",), 410: ("url",)}


class NoAnswer(Exception):
    """A call that another attempt would not mend. Reason, detail and options as in `rewards.base.Missing`."""

    def __init__(self, reason: str, detail: str, options: tuple[str, ...] = ()) -> None:
        super().__init__(detail)
        self.reason, self.detail, self.options = reason, detail, options


class Caller:
    """One service.

    Args:
        url: its address, http or https, without a user or password.
        token_env: environment variable with a token, sent as `Authorization: Bearer`; "" for none.
        url_key, token_key: the settings that these came from, for error messages.
        longest_pause_s: for which the service is left alone, whatever it asks for.

    Raises UserError for an address or a token that cannot be used.
    """

    def __init__(
        self,
        url: str,
        token_env: str = "",
        *,
        url_key: str,
        token_key: str,
        longest_pause_s: float = MAX_RETRY_AFTER_S,
    ) -> None:
        import httpx

        check_url(url, url_key)
        self.where = masked(url.partition("?")[0])
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", "User-Agent": "deepgen"}
        headers |= ONE_ANSWER
        if token_env:
            headers["Authorization"] = f"Bearer {read_token(token_env, token_key)}"
        logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs addresses with their parameters
        self._url = url
        self._client = httpx.AsyncClient(
            headers=headers,
            timeout=None,
            follow_redirects=False,
            trust_env=not is_loopback(urlsplit(url).hostname or ""),  # a proxy reaches its own loopback, not ours
        )
        self._longest_pause_s = min(longest_pause_s, MAX_RETRY_AFTER_S)
        self._not_before = 0.0  # when the service wants to be asked again
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="remote", daemon=True).start()

    def post(self, body: bytes, *, within_s: float, limit: int) -> bytes:
        """The answer to a JSON body, at most `limit` bytes, within `within_s` seconds in all.

        Raises:
            RewardUnavailable: the service cannot be reached, breaks off, or answers 408, 429 or 5xx. After a
                Retry-After later calls wait for that long, or raise this at once where that would be too late.
            NoAnswer: it is late (deadline), answers too much (parse), or with another status (refused, too_long).
        """
        late = NoAnswer("deadline", f"{self.where} has not answered within {within_s:.3g} s")
        if within_s <= 0:
            raise late
        end = time.monotonic() + within_s
        wait = self._not_before - time.monotonic()
        if wait >= within_s:
            said = f"{self.where} wants to be asked again in {wait:.0f} s (Retry-After)"
            raise RewardUnavailable(said, after_s=wait)
        time.sleep(max(0.0, wait))
        call = asyncio.run_coroutine_threadsafe(self._timed(body, end - time.monotonic(), limit), self._loop)
        try:
            return call.result(end - time.monotonic() + _GRACE_S)
        except concurrent.futures.TimeoutError as error:  # also the TimeoutError of asyncio
            call.cancel()
            raise late from error

    async def _timed(self, body: bytes, seconds: float, limit: int) -> bytes:
        import httpx

        try:
            async with asyncio.timeout(seconds), self._client.stream("POST", self._url, content=body) as response:
                return await self._read(response, limit)
        except httpx.TransportError as error:
            why = one_line(str(error)) or type(error).__name__
            raise RewardUnavailable(f"{self.where} cannot be reached or broke off: {why}") from error

    async def _read(self, response: httpx.Response, limit: int) -> bytes:
        status = response.status_code
        if status == 200:
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise NoAnswer("parse", f"{self.where} answers in an encoding that was not asked for")
            body = await _at_most(response, limit)
            if len(body) > limit:
                raise NoAnswer("parse", f"{self.where} answers with more than {limit:,} bytes")
            return body
        told = one_line((await _at_most(response, _TOLD))[:_TOLD].decode("utf-8", errors="replace"))
        said = f"{self.where} answers with status {status}" + (f": {told}" if told else "")
        if status in (408, 429) or status >= 500:
            after_s = min(_retry_after_s(response.headers.get("Retry-After", "")), self._longest_pause_s)
            self._not_before = time.monotonic() + after_s
            raise RewardUnavailable(said, after_s=after_s)
        if 300 <= status < 400:
            what = f"{self.where} answers with status {status}, and redirects are not followed"
            raise NoAnswer("refused", what, ("url",))
        raise NoAnswer("too_long" if status == 413 else "refused", said, _AT_FAULT.get(status, ()))


async def _at_most(response: httpx.Response, limit: int) -> bytes:
    """The body, or its beginning, which is longer than `limit` then."""
    data = bytearray()
    async for piece in response.aiter_raw():
        data += piece
        if len(data) > limit:
            break
    return bytes(data)


def _retry_after_s(given: str) -> float:
    """Seconds of a header Retry-After: a number, or a date. 0 for anything else."""
    if given.isascii() and given.isdecimal():
        wanted = float(given[:9])
    else:
        try:
            date = parsedate_to_datetime(given)
        except (ValueError, OverflowError):
            return 0.0
        wanted = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return min(max(wanted, 0.0), MAX_RETRY_AFTER_S)


def check_url(url: str, key: str) -> None:
    """Raise UserError, naming the setting, for what is no address of a service."""
    import httpx

    allowed = "allowed: http://HOST:PORT/PATH or https://HOST/PATH"
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        usable = usable and bool(httpx.URL(url).host)  # names with letters of other scripts are decoded here
    except (ValueError, httpx.InvalidURL) as error:
        raise UserError(f"{key}: got {url!r}, which is no address; {allowed}") from error
    if parts.username is not None or parts.password is not None:
        raise UserError(
            f"{key}: holds a user or password, and settings are logged; allowed: a token in the environment"
        )
    if not usable:
        raise UserError(f"{key}: got {url!r}; {allowed}")


def read_token(variable: str, key: str) -> str:
    """The token in an environment variable. Raises UserError, which does not show it."""
    token = os.environ.get(variable, "").strip()
    if not token:
        raise UserError(f"{key}: the environment variable {variable!r} is not set here; it has to hold the token")
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise UserError(f"{key}: the token in {variable!r} has letters that no header can have; allowed: visible ASCII")
    return token


def is_loopback(host: str) -> bool:
    """Whether a host is this machine's loopback address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
