"""Turns what a row gives as an image into encoded bytes: bytes, a struct of bytes and path, base64, a path or a URI."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deepgen.data.conversion.readers.raw_sample import RawData
from deepgen.data.uris import DataUri, UriError, absolute, read_uri

MISSING = "file missing"
MAX_SAMPLE = 160 << 20  # bytes of the images of one sample: writing them to parquet takes 4 to 5 times as much memory
TOO_LARGE = f"more than {MAX_SAMPLE >> 20} MiB in one sample"


def image_bytes(value: Any, raw: RawData, file: Path, limit: int = MAX_SAMPLE) -> bytes | UriError | None:
    """The image that a row of `file` gives, None if it gives none, or why it cannot be read. limit: of bytes.

    This is the only place where a name in raw data is opened, so no name leads out of what the data may read.
    """
    if isinstance(value, Mapping) and not value.keys().isdisjoint(("bytes", "path")):
        value = value.get("bytes") or value.get("path")
    if value is None or isinstance(value, bytes | UriError):
        return value
    if not isinstance(value, str):
        return UriError("image", f"{type(value).__name__}; allowed: bytes, a name or a struct of bytes and path")
    if not value:
        return None
    first: UriError | None = None
    for uri in _places(value, raw, file):
        try:
            return read_uri(uri, limit)
        except UriError as error:
            if not error.missing:
                return error
            first = first or UriError(uri, MISSING, missing=True)
    return first


def _places(name: str, raw: RawData, file: Path) -> Iterator[DataUri]:
    """Where to look for an image, the usual place first. A path is also tried with / for Windows' separators."""
    reach = raw.reach(file)
    for folder in [raw.images] if raw.images else roots_of(raw, file):
        yield absolute(name, folder, reach)
        if "\\" in name and "://" not in name:
            yield absolute(name.replace("\\", "/"), folder, reach)
        if "://" in name or os.path.isabs(name):
            break


def images_bytes(values: Any, raw: RawData, file: Path) -> tuple[bytes | UriError | None, ...]:
    """All source images of a row: one value, a list of them, or none. What is beyond MAX_SAMPLE in sum is not read."""
    given = values if isinstance(values, list) else [] if values in (None, "", b"") else [values]
    found: list[bytes | UriError | None] = []
    room = MAX_SAMPLE
    for value in given:
        data = image_bytes(value, raw, file) if room > 0 else UriError("images", TOO_LARGE)
        room -= len(data) if isinstance(data, bytes) else 0
        found.append(data)
    return tuple(found)


def roots_of(raw: RawData, file: Path) -> tuple[Path, ...]:
    """Where relative paths in a file start, without --images: at its folder or at SOURCE.

    Those in lists start at SOURCE, as in the JSON forms of M2.6; if there is no such file, the other folder counts.
    """
    source = raw.path if raw.path.is_dir() else raw.path.parent
    at_source = raw.form in ("captions", "blip3o", "edits", "pairs") and not file.name.lower().startswith("metadata.")
    places = (source, file.parent) if at_source else (file.parent, source)
    return tuple(dict.fromkeys(places))
