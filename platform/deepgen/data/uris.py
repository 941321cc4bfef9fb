"""Bytes of an image that a record names instead of holding: a path, file://, s3://, gs:// or http(s)://.

s3 and gs are pyarrow's own file systems, with their usual credentials (environment, ~/.aws, instance role).
"""

from __future__ import annotations

import http.client
import re
import urllib.request
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow as pa
from pyarrow import fs

MAX_BYTES = 256 << 20  # of one encoded image
HTTP_DEADLINE_S = 30.0
_REMOTE = ("s3", "gs", "gcs")
_CREDENTIALS = re.compile(r"//[^/@]*@")  # s3://key:secret@bucket: not for messages and files
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
            with urllib.request.urlopen(uri, timeout=HTTP_DEADLINE_S) as answer:
                data: bytes = answer.read(MAX_BYTES + 1)
        elif scheme in _REMOTE:
            system, path = fs.FileSystem.from_uri(uri)
            with system.open_input_file(path) as remote:
                data = remote.read(MAX_BYTES + 1)
        elif scheme in ("", "file"):
            with Path(unquote(urlsplit(uri).path) if scheme else uri).open("rb") as local:
                data = local.read(MAX_BYTES + 1)
        else:
            allowed = ", ".join(f"{name}://" for name in SCHEMES)
            raise UriError(shown, f"unknown scheme {scheme}://; allowed: a path, {allowed}")
    except (OSError, pa.ArrowException, http.client.HTTPException) as error:
        why = " ".join(str(getattr(error, "strerror", None) or error).split())[:160]
        raise UriError(shown, why) from error
    if len(data) > MAX_BYTES:
        raise UriError(shown, f"more than {MAX_BYTES >> 20} MiB")
    return data


def version_of(uri: str) -> bytes | None:
    """What becomes another when the image behind a URI does: of a file also its size and time of change.

    None when there is no such file. Of s3, gs and http only the URI itself, so that nothing has to be fetched.
    """
    scheme = _scheme(uri)
    if scheme not in ("", "file"):
        return uri.encode()
    path = Path(unquote(urlsplit(uri).path) if scheme else uri)
    if not path.is_file():
        return None
    found = path.stat()
    return f"{uri}:{found.st_size}:{found.st_mtime_ns}".encode()


def _scheme(uri: str) -> str:
    scheme, separator, _ = uri.partition("://")
    return scheme.lower() if separator else ""
