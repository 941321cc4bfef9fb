"""Turns what a row gives as an image into encoded bytes: bytes, a struct of bytes and path, a file name or a URI."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepgen.data.uris import UriError, absolute, read_uri


def record_image(value: Any, folder: Path) -> bytes | UriError | None:
    """Image bytes, given as they are, by path or URI, or in a struct as in `hf`; or the error from reading them."""
    value = unpacked(value)
    if not isinstance(value, str):
        return image_bytes(value, folder)
    try:
        return read_uri(absolute(value, folder))
    except UriError as error:
        return error


def unpacked(value: Any) -> Any:
    """The bytes or path in an image struct {bytes, path}; any other value unchanged."""
    return value.get("bytes") or value.get("path") if isinstance(value, Mapping) else value


def image_bytes(value: Any, folder: Path) -> bytes | UriError | None:
    """Image bytes, given as they are or by file name; None if there is no name or no such file."""
    if value is None or isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        return UriError("image", f"{type(value).__name__}; allowed: bytes, a name or a struct of bytes and path")
    return _file_bytes(folder, value)


def _file_bytes(root: Path, name: str) -> bytes | UriError | None:
    """A file's content, or None if the file is missing: the tally counts it, and the conversion continues."""
    path = root / name
    try:
        return path.read_bytes() if name and path.is_file() else None
    except OSError as error:  # for example, no permission or a name of over 255 bytes
        return UriError(str(path), str(error.strerror))
