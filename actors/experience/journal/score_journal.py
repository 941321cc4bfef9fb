"""Scores on disk: what a reward pool's cache holds outlives the process of the stream, and other runs find it.

    <run folder>/journal/scores-<pool>-<hash>.bin     records of 32 bytes: key, score, checksum

The hash covers all that decides a score (`scorer_hash`), so another judge never answers with the scores of this one.
A record is written when the score is there. One that is damaged, or was cut off by a death, counts as none.

Each run writes its own file, and reads those of others with the same hash, which may be growing meanwhile: so there are
no locks.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

from actors.experience.journal.origin import JOURNAL, scorer_hash
from deepgen.config import PoolSettings

_KEY, _CHECKSUM = 16, 8  # bytes
_RECORD = struct.Struct(f"<{_KEY}sd{_CHECKSUM}s")


class ScoreJournal:
    """The scores of one pool, at most 2 x `limit` records. Raises OSError if it cannot be opened.

    Attributes:
        read: what was there, key -> score.
        damaged: how many damaged records were met, by file.
    """

    def __init__(self, folder: Path, settings: PoolSettings, limit: int) -> None:
        self._scorer, self._limit = scorer_hash(settings), limit
        self._file = folder / f"scores-{settings.pool_name}-{self._scorer}.bin"
        folder.mkdir(parents=True, exist_ok=True)
        for other in folder.glob(f"scores-{settings.pool_name}-{'[0-9a-f]' * len(self._scorer)}.bin"):
            if other != self._file:
                other.unlink()
        self.damaged: dict[Path, int] = {}
        self._descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o644)
        self._size, self.read = self._read(self._file, limit)  # a cut record is written over

    def read_others(self, runs: Path, limit: int) -> dict[bytes, float]:
        """Scores that other runs below the folder `runs` have kept, at most `limit`, from the files written last.

        Files that vanish meanwhile, or that cannot be read, are left out.
        """
        files = list[tuple[float, Path]]()
        for file in runs.glob(f"*/{JOURNAL}/scores-*-{self._scorer}.bin"):
            with contextlib.suppress(OSError):
                if not file.samefile(self._file):
                    files.append((file.stat().st_mtime, file))
        found: dict[bytes, float] = {}
        for _, file in sorted(files, reverse=True):
            if len(found) >= limit:
                break
            with contextlib.suppress(OSError):
                found |= self._read(file, limit - len(found))[1]
        return found

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

    def _read(self, file: Path, limit: int) -> tuple[int, dict[bytes, float]]:
        """Bytes of a file's whole records, and the last `limit` of its scores; no more than a journal can have."""
        with file.open("rb") as stream:
            content = stream.read(2 * self._limit * _RECORD.size)
        size = len(content) // _RECORD.size * _RECORD.size
        valid = list(self._valid(content[:size]))
        if damaged := size // _RECORD.size - len(valid):
            self.damaged[file] = damaged
        return size, dict(valid[-limit:] if limit > 0 else [])

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
