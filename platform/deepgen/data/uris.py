"""Bytes of an image that a record names instead of holding: a path, file://, s3://, gs:// or http(s)://.

s3 and gs are pyarrow's own file systems, with their usual credentials (environment, ~/.aws, instance role).
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

MAX_BYTES = 256 << 20  # of one encoded image
HTTP_DEADLINE_S = 30.0  # for the whole image, and for each silence of the server
_PIECE = 1 << 20
_REMOTE = ("s3", "gs", "gcs")
_CREDENTIALS = re.compile(r"//[^/@]*@")  # s3://key:secret@bucket: not for messages and files
_LEGAL = "!#$%&'()*+,/:;=?@[]~"  # in a URL beside letters, digits and "-._"; what is quoted already stays
SCHEMES = ("file", *_REMOTE, "http", "https")


class UriError(ValueError):
    """What lies at ``name`` cannot be read; ``why`` in the words of whoever tried."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(name, why)
        self.name, self.why = name, why

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"


def absolute(uri: str, folder: Path) -> str:
    """`uri` as it is found from anywhere: a relative path starts from `folder`."""
    return uri if _scheme(uri) else str((folder / uri).absolute())


def read_uri(uri: str) -> bytes:
    """All bytes behind a URI or an absolute path. Raises UriError, in a few words, when it cannot be read."""
    scheme = _scheme(uri)
    shown = _CREDENTIALS.sub("//", uri)
    try:
        if scheme in ("http", "https"):
            data = _read_http(uri)
        elif scheme in _REMOTE:
            system, path = fs.FileSystem.from_uri(uri)
            with system.open_input_file(path) as remote:
                data = remote.read(MAX_BYTES + 1)
        elif scheme in ("", "file"):
            with _local(uri).open("rb") as local:
                data = local.read(MAX_BYTES + 1)
        else:
            allowed = ", ".join(f"{name}://" for name in SCHEMES)
            raise ValueError(f"unknown scheme {scheme}://; allowed: a path, {allowed}")
    # ValueError: a URI or path that cannot be one, as of a host in half a bracket or with a zero byte
    except (OSError, OverflowError, ValueError, pa.ArrowException, http.client.HTTPException) as error:
        why = " ".join(str(getattr(error, "strerror", None) or error).split())[:160]
        raise UriError(shown, why) from error
    if len(data) > MAX_BYTES:
        raise UriError(shown, f"more than {MAX_BYTES >> 20} MiB")
    return data


def _read_http(url: str) -> bytes:
    """The body, up to one byte more than is allowed. Raises OSError when it does not come whole, or not in time."""
    deadline = time.monotonic() + HTTP_DEADLINE_S
    with urllib.request.urlopen(_quoted(url), timeout=HTTP_DEADLINE_S) as answer:
        if not isinstance(answer, http.client.HTTPResponse):
            raise OSError(f"leads to {urlsplit(answer.url).scheme}://; allowed: http:// and https://")
        expected, data = answer.length, bytearray()
        while len(data) <= MAX_BYTES and (piece := answer.read1(_PIECE)):  # read() would wait until it is full
            data += piece
            if time.monotonic() > deadline:
                raise TimeoutError(f"not read within {HTTP_DEADLINE_S:g} s ({len(data):,} bytes were)")
    if expected is not None and len(data) < min(expected, MAX_BYTES):
        raise OSError(f"ends after {len(data):,} of {expected:,} bytes")
    return bytes(data)


def _quoted(url: str) -> str:
    """`url` with what a path may not hold as it stands, like letters beyond ASCII, in percent signs."""
    parts = urlsplit(url)
    if not parts.netloc:
        raise ValueError("names no host")
    path, query = (quote(part, safe=_LEGAL) for part in (parts.path, parts.query))
    return urlunsplit(parts._replace(path=path, query=query))


def _local(uri: str) -> Path:
    return Path(unquote(urlsplit(uri).path) if _scheme(uri) else uri)


def version_of(uri: str) -> bytes | None:
    """Version token that changes when the image behind a URI does: for files also with size and time of change.

    None when there is no such file. For s3, gs and http it is the URI alone, so that nothing has to be fetched.
    """
    scheme = _scheme(uri)
    if scheme not in ("", "file"):
        return uri.encode()
    try:
        path = _local(uri)
        if not path.is_file():
            return None
        found = path.stat()
    except ValueError:  # no path at all, as `read_uri` will say
        return None
    return f"{uri}:{found.st_size}:{found.st_mtime_ns}".encode()


def _scheme(uri: str) -> str:
    scheme, separator, _ = uri.partition("://")
    return scheme.lower() if separator else ""
