"""Reads files that a data set names. Only regular files: a FIFO or a device would wait for ever, or never end."""

from __future__ import annotations

import os
import stat

_KINDS = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISCHR, "a device"),
)
# A clone of a repository without `git lfs pull` holds this in place of every large file.
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def is_lfs_pointer(start: bytes) -> bool:
    """Whether a file that begins so stands in for one that has not been fetched."""
    return start.startswith(LFS_POINTER)


def read_file(path: str, limit: int) -> bytes:
    """All bytes of a regular file, at most `limit`. Raises OSError."""
    check_regular(path)
    # Not blocking, and no link in the last place: it could have been replaced since.
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(number, "rb") as stream:
        found = os.fstat(stream.fileno())
        _check_kind(found.st_mode)
        if found.st_size > limit:
            raise too_large(limit)
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise too_large(limit)
    return data


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise OSError unless the path leads to a regular file."""
    _check_kind(os.stat(path).st_mode)


def too_large(limit: int) -> OSError:
    """The error for more than `limit` bytes. Without the size, so that equal faults can be counted."""
    return OSError(f"more than {limit:,} bytes")


def _check_kind(mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError("Is a directory")
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "no regular file")
        raise OSError(f"is {kind}; allowed: a regular file")
