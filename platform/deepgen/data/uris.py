"""Reads images that records give by path or URI instead of as bytes: file://, s3://, gs://, http(s):// or data:.

What a name may lead to is decided where records are read, by the folder of their files and `data.allow`, and checked
where it is opened (`deepgen.reading.reach`). All reads have one limit of bytes and one deadline.
"""

from __future__ import annotations

import http.client
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from deepgen.masking import masked
from deepgen.reading.bucket_reader import read_bucket
from deepgen.reading.deadline import Deadline
from deepgen.reading.file_reader import read_file
from deepgen.reading.http_reader import read_http
from deepgen.reading.inline_images import inline_uri, is_inline, read_inline
from deepgen.reading.reach import Reach

MAX_BYTES = 256 << 20  # limit for one encoded image
DEADLINE_S = 30.0  # limit for a whole image: names, connections, redirects, headers and body together
_REMOTE = ("s3", "gs", "gcs")
SCHEMES = ("file", *_REMOTE, "http", "https")
_SHOWN = 200  # letters of a name in messages: it may be a whole picture in base64


class UriError(ValueError):
    """The path or URI ``name`` is unreadable; ``why`` is the reason. Both without secrets, in printable letters.

    ``missing``: there is no such file or object.
    """

    def __init__(self, name: str, why: str, *, missing: bool = False) -> None:
        self.name, self.why, self.missing = _shown(name, _SHOWN), _shown(why, 400), missing
        super().__init__(self.name, self.why)

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _uri_error, (self.name, self.why, self.missing)


def _uri_error(name: str, why: str, missing: bool) -> UriError:
    return UriError(name, why, missing=missing)


def _shown(text: str, most: int) -> str:
    text = " ".join(masked(text[: 10 * most]).split())
    text = "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
    return text if len(text) <= most else f"{text[:most]}..."


class DataUri(str):
    """A path or URI from a data set, which knows what the data set may read."""

    reach: Reach

    def __new__(cls, uri: str, reach: Reach) -> DataUri:
        made = super().__new__(cls, uri)
        made.reach = reach
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return DataUri, (str(self), self.reach)


def reach_of(path: Path, allow: Sequence[str] = (), *more: Path) -> Reach:
    """What a data set at `path`, a file or a folder, may read: its folder and `more` folders, and what `allow` adds."""
    folder = path if path.is_dir() else path.parent
    return Reach.of([folder, *_blobs(folder.absolute()), *more], allow)


def _blobs(folder: Path) -> list[Path]:
    """Where the files of a Hugging Face download are: those in .../snapshots/REVISION are links to .../blobs."""
    revisions = [one for one in (folder, *folder.parents) if one.parent.name == "snapshots"]
    return [found for one in revisions if (found := one.parent.parent / "blobs").is_dir()]


def absolute(uri: str, folder: Path, reach: Reach | None = None) -> DataUri:
    """`uri` in a form that works from any folder: a relative path becomes absolute, starting at `folder`, ~/ at home.

    An image in base64 becomes a data: URI.

    reach: of its data set; None: of files in `folder`, with no permissions of the user.
    """
    given = inline_uri(uri) or (uri if _scheme(uri) else str((folder / _at_home(uri)).absolute()))
    return DataUri(given, Reach.of([folder]) if reach is None else reach)


def _at_home(path: str) -> str:
    return os.path.expanduser(path) if path.startswith("~/") else path


def read_uri(uri: str, limit: int | None = None) -> bytes:
    """All bytes at a `DataUri`. Raises UriError with a short reason if it is unreadable.

    limit: of bytes; None: MAX_BYTES.

    A plain `str` is read only from public addresses, as no folder is known that a file may lie in.
    """
    deadline, scheme, reach = Deadline(DEADLINE_S), _scheme(uri), _reach(uri)
    limit = MAX_BYTES if limit is None else limit
    try:
        if scheme in ("http", "https"):
            return read_http(uri, reach, deadline, limit)
        if scheme in _REMOTE:
            return read_bucket(uri, reach, deadline, limit)
        if scheme in ("", "file"):
            return read_file(reach.file(_local(uri)), limit)
        if scheme == "data":  # it leads nowhere
            return read_inline(uri, limit)
        allowed = ", ".join(f"{name}://" for name in SCHEMES)
        raise ValueError(f"unknown scheme {scheme}://; allowed: a path, {allowed}, data:")
    # ValueError: an invalid URI or path, for example with an unclosed bracket in the host or with a zero byte
    except (OSError, OverflowError, ValueError, pa.ArrowException, http.client.HTTPException) as error:
        why = str(getattr(error, "strerror", None) or error) or type(error).__name__
        raise UriError(uri, why, missing=isinstance(error, FileNotFoundError)) from error


def version_of(uri: str) -> bytes | None:
    """Version token that changes when the image does. For files it includes size and modification time.

    None if the file is missing, or must not be read. For s3, gs and http it is only the URI, so that nothing has to be
    fetched.
    """
    if _scheme(uri) not in ("", "file"):
        return uri.encode()
    try:
        path = _reach(uri).file(_local(uri))
        if not os.path.isfile(path):
            return None
        found = os.stat(path)
    except (OSError, ValueError):  # not allowed, or not a valid path; `read_uri` will report it
        return None
    return f"{uri}:{found.st_size}:{found.st_mtime_ns}".encode()


def _reach(uri: str) -> Reach:
    return uri.reach if isinstance(uri, DataUri) else Reach()


def _local(uri: str) -> str:
    """The path that a path or file:// URI names. "%20" in a URI is a space, unless a file has that very name."""
    if not _scheme(uri):
        return str(uri)
    host, slash, path = uri.partition("://")[2].partition("/")
    if host not in ("", "localhost"):
        raise ValueError(f"names the host {host!r}; allowed: file:///PATH, on this machine")
    plain = unquote(path, errors="surrogateescape")
    return slash + (path if path != plain and os.path.lexists(slash + path) else plain)


def _scheme(uri: str) -> str:
    if is_inline(uri):
        return "data"
    scheme, separator, _ = uri.partition("://")
    return scheme.lower() if separator else ""
