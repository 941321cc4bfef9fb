"""Tells files on disk apart: by samples of them, or by all of their bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

_SAMPLE, _STRIDE = 1 << 16, 1 << 22  # `fingerprint` reads _SAMPLE bytes of every _STRIDE


def fingerprint(path: Path) -> str:
    """Fingerprint of a weights folder or file, 12 hex digits: names, sizes and samples from all over every file.

    File times do not count, so a copy of the folder has the same fingerprint. Links are followed.
    """
    digest = hashlib.blake2b(digest_size=6)
    for file in sorted(file for file in (path, *_below(path)) if file.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)}:{size}".encode())
        with file.open("rb") as stream:
            for start in (*range(0, size, _STRIDE), max(0, size - _SAMPLE)):
                stream.seek(start)
                digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()


def _below(path: Path) -> Iterator[Path]:
    """All files below a folder; `rglob` would leave out those in linked folders."""
    for folder, _, names in os.walk(path, followlinks=True):
        yield from (Path(folder, name) for name in names)


def file_checksum(file: Path) -> str:
    """Checksum of all bytes of a file, 128 hex digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, hashlib.blake2b).hexdigest()
