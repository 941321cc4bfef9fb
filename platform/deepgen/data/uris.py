"""Reads images that records give by path or URI instead of as bytes: file://, s3://, gs:// or http(s)://.

pyarrow's file systems read s3 and gs, with the usual credentials (environment, ~/.aws, instance role).
"""

from __future__ import annotations

import http.client
import re
import time
import urllib.request
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import pyarrow as pa
from pyarrow import fs

from deepgen.reading.inline_images import inline_uri, is_inline, read_inline, shortened

MAX_BYTES = 256 << 20  # limit for one encoded image
HTTP_DEADLINE_S = 30.0  # limit for the whole image, and for each pause of the server
_PIECE = 1 << 20
_REMOTE = ("s3", "gs", "gcs")
_CREDENTIALS = re.compile(r"//[^/@]*@")  # s3://key:secret@bucket: keep secrets out of messages and files
_LEGAL = "!#$%&'()*+,/:;=?@[]~"  # stay in a URL, like letters, digits and "-._"; "%" keeps existing escapes
SCHEMES = ("file", *_REMOTE, "http", "https")


class UriError(ValueError):
    """The path or URI ``name`` is unreadable; ``why`` is the reader's error message."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(name, why)
        self.name, self.why = name, why

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"


def absolute(uri: str, folder: Path) -> str:
    """`uri` in a form that works from any folder: a relative path becomes absolute, starting at `folder`.

    An image in base64 becomes a data: URI.
    """
    return inline_uri(uri) or (uri if _scheme(uri) else str((folder / uri).absolute()))


def read_uri(uri: str) -> bytes:
    """All bytes at a URI or an absolute path. Raises UriError with a short reason if it is unreadable."""
    scheme = _scheme(uri)
    shown = shortened(_CREDENTIALS.sub("//", uri[:1000]) + uri[1000:])
    try:
        if scheme in ("http", "https"):
            data = _read_http(uri)
        elif scheme in _REMOTE:
            system, path = fs.FileSystem.from_uri(uri)
            with system.open_input_file(path) as remote:
                data = remote.read(MAX_BYTES + 1)
        elif scheme == "data":
            data = read_inline(uri)
        elif scheme in ("", "file"):
            with _local(uri).open("rb") as local:
                data = local.read(MAX_BYTES + 1)
        else:
            allowed = ", ".join(f"{name}://" for name in SCHEMES)
            raise ValueError(f"unknown scheme {scheme}://; allowed: a path, {allowed}")
    # ValueError: an invalid URI or path, for example with an unclosed bracket in the host or with a zero byte
    except (OSError, OverflowError, ValueError, pa.ArrowException, http.client.HTTPException) as error:
        why = " ".join(str(getattr(error, "strerror", None) or error).split())[:160]
        raise UriError(shown, why) from error
    if len(data) > MAX_BYTES:
        raise UriError(shown, f"more than {MAX_BYTES >> 20} MiB")
    return data


def _read_http(url: str) -> bytes:
    """The response body, up to a little over MAX_BYTES. Raises OSError if it is incomplete or late."""
    deadline = time.monotonic() + HTTP_DEADLINE_S
    with urllib.request.urlopen(_quoted(url), timeout=HTTP_DEADLINE_S) as answer:
        if not isinstance(answer, http.client.HTTPResponse):
            raise OSError(f"leads to {urlsplit(answer.url).scheme}://; allowed: http:// and https://")
        expected, data = answer.length, bytearray()
        while len(data) <= MAX_BYTES and (piece := answer.read1(_PIECE)):  # read() would block until it has all bytes
            data += piece
            if time.monotonic() > deadline:
                raise TimeoutError(f"not read within {HTTP_DEADLINE_S:g} s ({len(data):,} bytes were)")
    if expected is not None and len(data) < min(expected, MAX_BYTES):
        raise OSError(f"ends after {len(data):,} of {expected:,} bytes")
    return bytes(data)


def _quoted(url: str) -> str:
    """`url` with characters that a URL may not contain, such as non-ASCII letters, percent-encoded."""
    parts = urlsplit(url)
    if not parts.netloc:
        raise ValueError("names no host")
    path, query = (quote(part, safe=_LEGAL) for part in (parts.path, parts.query))
    return urlunsplit(parts._replace(path=path, query=query))


def _local(uri: str) -> Path:
    return Path(unquote(urlsplit(uri).path) if _scheme(uri) else uri)


def version_of(uri: str) -> bytes | None:
    """Version token that changes when the image does. For files it includes size and modification time.

    None if the file is missing. For s3, gs and http it is only the URI, so that nothing has to be fetched.
    """
    scheme = _scheme(uri)
    if scheme not in ("", "file"):
        return uri.encode()
    try:
        path = _local(uri)
        if not path.is_file():
            return None
        found = path.stat()
    except ValueError:  # not a valid path; `read_uri` will report it
        return None
    return f"{uri}:{found.st_size}:{found.st_mtime_ns}".encode()


def _scheme(uri: str) -> str:
    if is_inline(uri):
        return "data"
    scheme, separator, _ = uri.partition("://")
    return scheme.lower() if separator else ""
