"""Reads s3:// and gs:// addresses through pyarrow, with the usual credentials (environment, ~/.aws, instance role).

pyarrow takes an endpoint from the address and connects by itself, so such an endpoint has to be allowed by name
(`data.allow`). The user's own endpoint, in AWS_ENDPOINT_URL, needs no permission.
"""

from __future__ import annotations

import re
from functools import lru_cache
from urllib.parse import parse_qsl, quote, unquote, urlencode

import pyarrow as pa
from pyarrow import fs

from deepgen.reading.deadline import Deadline
from deepgen.reading.file_reader import too_large
from deepgen.reading.reach import Reach

# What may follow a "?": everything else is part of the key.
_OPTIONS = {"s3": {"region", "scheme", "endpoint_override"}, "gs": {"scheme", "endpoint_override"}}
_BUCKET, _REGION = re.compile(r"[\w.-]+", re.ASCII), re.compile(r"[\w-]+", re.ASCII)

_ENDPOINT = re.compile(r"(?:https?://)?(?P<host>[\w.-]+|\[[0-9a-f:.]+\])(?::\d+)?/?", re.ASCII | re.IGNORECASE)


def read_bucket(uri: str, reach: Reach, deadline: Deadline, limit: int) -> bytes:
    """The object at an address, at most `limit` bytes. Its key is written as it is, or percent-encoded.

    Raises OSError, ValueError or ArrowException if it is unreadable, late, too long or not allowed.
    """
    scheme, user, bucket, key, options = _parts(uri)
    _check(options, reach)
    if scheme == "gs":
        options["retry_limit_seconds"] = f"{0.8 * deadline.seconds:g}"  # so that its own error comes first
    base = f"{scheme}://{user}{bucket}/?{urlencode(options)}"
    keys = list(dict.fromkeys([unquote(key), key]))

    def read() -> bytes:
        for number, name in enumerate(keys, start=1):
            try:
                with _system(base).open_input_file(f"{bucket}/{name}") as stream:
                    return _read(stream, limit)
            except FileNotFoundError:
                if number == len(keys):
                    raise
        raise AssertionError("keys is never empty")

    return deadline.call(read)


def _read(stream: pa.NativeFile, limit: int) -> bytes:
    if stream.size() > limit:
        raise too_large(limit)
    data: bytes = stream.read(limit + 1)
    return data


def _parts(uri: str) -> tuple[str, str, str, str, dict[str, str]]:
    """Scheme (s3 or gs), "user:password@" or "", bucket, key, options. Raises ValueError."""
    scheme, _, rest = uri.partition("://")
    scheme = "s3" if scheme.lower() == "s3" else "gs"
    user, at, after = rest.partition("@")
    if at and (":" in user.partition("/")[0] or "/" not in user):  # secrets of AWS often have a "/"
        user, rest = quote(user, safe=":%") + "@", after
    else:
        user = ""
    bucket, _, key = rest.partition("/")
    path, mark, query = key.rpartition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if mark and options and options.keys() <= _OPTIONS[scheme]:
        key = path
    else:
        options = {}
    if not _BUCKET.fullmatch(bucket) or not key:
        raise ValueError(f"names no {'key' if _BUCKET.fullmatch(bucket) else 'bucket'}; allowed: {scheme}://BUCKET/KEY")
    return scheme, user, bucket, key, options


def _check(options: dict[str, str], reach: Reach) -> None:
    """Raise PermissionError or ValueError if the options could lead to another server than they say."""
    if options.get("scheme", "https") not in ("http", "https"):
        raise ValueError(f"scheme {options['scheme']}; allowed: http and https")
    if not _REGION.fullmatch(options.get("region", "x")):
        raise ValueError(f"region {options['region']!r}; allowed: letters, digits and dashes")
    endpoint = options.get("endpoint_override")
    if endpoint is None:
        return
    found = _ENDPOINT.fullmatch(endpoint)
    if found is None or not reach.allows_host(found["host"]):
        host = found["host"] if found else endpoint
        raise PermissionError(f"has the endpoint {host!r}; allowed: hosts and networks that data.allow lists")


@lru_cache(maxsize=16)
def _system(base: str) -> fs.FileSystem:
    return fs.FileSystem.from_uri(base)[0]
