"""The scores that a reward pool has had: in memory, and in the run's journal if that is on."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

from actors.experience.journal.score_journal import ScoreJournal
from deepgen.config import PoolSettings

log = logging.getLogger(__name__)


class ScoreCache:
    """Scores by key; the least recently used are dropped first.

    size: number of scores; 0 = no cache. folder: where they outlive this process (`ScoreJournal`); None for nowhere.
    """

    def __init__(self, settings: PoolSettings, size: int, folder: Path | None) -> None:
        self._settings, self._size, self._folder = settings, size, folder
        self._scores: OrderedDict[bytes, float] = OrderedDict()
        self._journal: ScoreJournal | None = None
        self._warned = False

    async def open(self) -> None:
        """Fill the cache with what was scored before this process. In a thread: it looks at the reward's weights."""
        if self._folder is None or not self._size:
            return
        try:
            self._journal = await asyncio.to_thread(ScoreJournal, self._folder, self._settings, self._size)
        except OSError as error:
            self._warn(error)
        else:
            self._scores.update(self._journal.read)

    def close(self) -> None:
        if self._journal:
            self._journal.close()
        self._journal = None

    def recall(self, key: bytes) -> float | None:
        if key not in self._scores:
            return None
        self._scores.move_to_end(key)
        return self._scores[key]

    def remember(self, scores: Mapping[bytes, float]) -> int:
        """Keep scores. Returns how many of them could not be written to the disk, though they should be."""
        self._scores.update(scores)
        while len(self._scores) > self._size:
            self._scores.popitem(last=False)
        if self._journal:
            try:
                self._journal.add(scores, self._scores)
            except OSError as error:
                self._warn(error)
                return len(scores)
        return 0

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            what = f"{self._settings.pool_name}: cannot keep scores in {self._folder}: {error.strerror or error}"
            log.warning("reward pool %s; after a death of the run they would be asked for again", what)
        self._warned = True
