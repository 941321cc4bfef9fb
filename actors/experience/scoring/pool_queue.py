"""The requests that wait in a reward pool, and in which batches they are tried."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from actors.experience.scoring.pool_parts import Part


@dataclass(frozen=True)
class Batch:
    """What one call of a replica tries. `suspect`: a part of a batch that failed. `probe`: of an open breaker."""

    parts: list[Part]
    suspect: bool = False
    probe: bool = False

    @property
    def new(self) -> bool:
        """Whether it is more than another attempt at the same requests, of which one alone may be at fault."""
        return (self.suspect and can_split(self.parts)) or any(not part.failures for part in self.parts)


class PoolQueue:
    """Parts in the order of their arrival; before them, batches of suspects that are tried just as they are.

    batch_size: images in one batch. A part that is never split may be larger.
    """

    def __init__(self, batch_size: int) -> None:
        self.filled = asyncio.Event()  # set while something waits
        self._batch_size = batch_size
        self._parts: deque[Part] = deque()
        self._suspects: deque[list[Part]] = deque()

    @property
    def images(self) -> int:
        return size_of(self._all())

    def add(self, parts: Iterable[Part]) -> None:
        self._parts.extend(parts)
        self._note()

    def add_suspects(self, parts: list[Part], *, first: bool = False) -> None:
        """Parts of a batch that failed: they are tried together, without others. first: before all other suspects."""
        (self._suspects.appendleft if first else self._suspects.append)(parts)
        self._note()

    def take(self, replicas: int, *, probe: bool = False) -> Batch | None:
        """The next batch, if any: a fair share for one of the replicas, or for a probe the least possible."""
        self.remove(lambda part: part.call.done.done())  # their callers are gone
        if probe:
            self._parts.extend(part for parts in self._suspects for part in parts)
            self._suspects.clear()
        if self._suspects:
            batch = Batch(self._suspects.popleft(), suspect=True)
        else:
            share = 1 if probe else math.ceil(size_of(self._parts) / replicas)
            batch = Batch(self._fill(min(share, self._batch_size)), probe=probe)
        self._note()
        return batch if batch.parts else None

    def remove(self, which: Callable[[Part], bool]) -> list[Part]:
        """Take out the parts for which `which` is true."""
        gone = {part for part in self._all() if which(part)}
        if gone:
            self._parts = deque(part for part in self._parts if part not in gone)
            left = ([part for part in parts if part not in gone] for parts in self._suspects)
            self._suspects = deque(parts for parts in left if parts)
            self._note()
        return list(gone)

    def _fill(self, left: int) -> list[Part]:
        batch: list[Part] = []
        while left > 0 and self._parts:
            first = self._parts[0]
            if len(first.indices) <= left or (first.whole and not batch):
                batch.append(self._parts.popleft())
            elif first.whole:
                break
            else:
                batch.append(first.split(left))
            left -= len(batch[-1].indices)
        return batch

    def _all(self) -> list[Part]:
        return [*self._parts, *(part for parts in self._suspects for part in parts)]

    def _note(self) -> None:
        if self._parts or self._suspects:
            self.filled.set()
        else:
            self.filled.clear()


def size_of(parts: Iterable[Part]) -> int:
    """Images in these parts."""
    return sum(len(part.indices) for part in parts)


def can_split(parts: list[Part]) -> bool:
    return len(parts) > 1 or (not parts[0].whole and len(parts[0].indices) > 1)


def halves(parts: list[Part]) -> list[list[Part]]:
    """The two halves of a batch, by images; the batch alone if it cannot be split."""
    if parts[0].whole:
        middle = math.ceil(len(parts) / 2)
        first, second = parts[:middle], parts[middle:]
    else:
        first, second, left = [], [], math.ceil(size_of(parts) / 2)
        for part in parts:
            if 0 < left < len(part.indices):
                first.append(part.split(left))
                left = 0
                second.append(part)
            else:
                (first if left else second).append(part)
                left = max(0, left - len(part.indices))
    return [half for half in (first, second) if half]
