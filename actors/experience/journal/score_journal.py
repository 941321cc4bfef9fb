"""Scores on disk: what a reward pool's cache holds outlives the process of the stream.

    <run folder>/journal/scores-<pool>-<hash>.bin     records of 32 bytes: key, score, checksum

The hash covers all that decides a score (`scorer_hash`), so another judge never answers with the scores of this one.
A record is written when the score is there. One that is damaged, or was cut off by a death, counts as none.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

from actors.experience.journal.origin import scorer_hash
from deepgen.config import PoolSettings

_KEY, _CHECKSUM = 16, 8  # bytes
_RECORD = struct.Struct(f"<{_KEY}sd{_CHECKSUM}s")


class ScoreJournal:
    """The scores of one pool, at most 2 x `limit` records. Raises OSError if it cannot be opened."""

    def __init__(self, folder: Path, settings: PoolSettings, limit: int) -> None:
        self._scorer, self._limit = scorer_hash(settings), limit
        self._file = folder / f"scores-{settings.pool_name}-{self._scorer}.bin"
        folder.mkdir(parents=True, exist_ok=True)
        for other in folder.glob(f"scores-{settings.pool_name}-{'[0-9a-f]' * len(self._scorer)}.bin"):
            if other != self._file:
                other.unlink()
        self._descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o644)
        content = self._file.read_bytes()
        self._size = len(content) // _RECORD.size * _RECORD.size  # a cut record is written over
        self.read = dict(list(self._valid(content[: self._size]))[-limit:])  # what was there, key -> score

    def add(self, scores: Mapping[bytes, float], cache: Mapping[bytes, float]) -> None:
        """Append scores. When the file is full, it begins anew with the `cache`. Raises OSError if the disk is full."""
        if self._size // _RECORD.size + len(scores) > 2 * self._limit:
            self._begin_anew(cache)
            return
        packed = self._packed(scores.items())
        # At a place of our own, not at the end: after a write that failed in the middle the next one covers its rest.
        written = os.pwrite(self._descriptor, packed, self._size)
        if written < len(packed):
            raise OSError(f"{written} of {len(packed)} bytes written to {self._file}")
        self._size += len(packed)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _begin_anew(self, scores: Mapping[bytes, float]) -> None:
        packed = self._packed(scores.items())
        aside = self._file.with_suffix(".writing")
        aside.write_bytes(packed)
        descriptor = os.open(aside, os.O_RDWR)
        aside.replace(self._file)
        self.close()
        self._descriptor, self._size = descriptor, len(packed)

    def _packed(self, scores: Iterable[tuple[bytes, float]]) -> bytes:
        return b"".join(_RECORD.pack(key, value, self._checksum(key, value)) for key, value in scores)

    def _valid(self, content: bytes) -> Iterable[tuple[bytes, float]]:
        """The records that are as they were written. A damaged one does not hide the others."""
        for key, value, checksum in _RECORD.iter_unpack(content):
            if checksum == self._checksum(key, value):
                yield key, value

    def _checksum(self, key: bytes, value: float) -> bytes:
        content = self._scorer.encode() + key + struct.pack("<d", value)
        return hashlib.blake2b(content, digest_size=_CHECKSUM).digest()
