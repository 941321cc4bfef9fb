"""The scores that a reward pool has had: in memory, and on disk if the journal is on, where other runs find them."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

from actors.experience.journal.score_journal import ScoreJournal
from deepgen.config import PoolSettings

log = logging.getLogger(__name__)


class ScoreCache:
    """Scores by key and by the version of the reward that gave them; the least recently used are dropped first.

    Args:
        settings: of the pool.
        size: number of scores; 0 = no cache.
        folder: where they outlive this process (`ScoreJournal`); None for nowhere.
        runs: folder of other runs, whose journals are read as well; None for none.

    `version`: the reward's, which the pool sets whenever it is told; `rewards.base.Reward` says what it is. Scores of
    a version that nobody knows are this run's alone.
    """

    def __init__(self, settings: PoolSettings, size: int, folder: Path | None, runs: Path | None = None) -> None:
        self._settings, self._size, self._folder, self._runs = settings, size, folder, runs
        self._scores: OrderedDict[bytes, float] = OrderedDict()
        self._journal: ScoreJournal | None = None
        self._warned = False
        self.version: str | None = None

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
            self._tell_damage(self._journal)

    async def read_others(self) -> None:
        """Add what other runs have kept. The version has to be known by now."""
        if self._journal is None or self._runs is None or self.version == "":
            return
        try:
            found = await asyncio.to_thread(self._journal.read_others, self._runs, self._size - len(self._scores))
        except OSError as error:
            log.warning("reward pool %s: cannot look for scores in %s: %s", self._settings.pool_name, self._runs, error)
            return
        if found:
            log.info("reward pool %s: %d scores of other runs in %s", self._settings.pool_name, len(found), self._runs)
        self._scores = OrderedDict(found | self._scores)
        self._tell_damage(self._journal)

    def close(self) -> None:
        if self._journal:
            self._journal.close()
        self._journal = None

    def recall(self, key: bytes) -> float | None:
        key = _of_version(key, self.version)
        if key not in self._scores:
            return None
        self._scores.move_to_end(key)
        return self._scores[key]

    def remember(self, scores: Mapping[int, tuple[bytes, float]], versions: Mapping[int, str | None]) -> int:
        """Keep scores, (key, score) by index, each with the version of the reward that gave it.

        Returns how many of them could not be written to the disk, though they should be.
        """
        kept = {_of_version(key, versions.get(index)): score for index, (key, score) in scores.items()}
        self._scores.update(kept)
        while len(self._scores) > self._size:
            self._scores.popitem(last=False)
        if self._journal:
            try:
                self._journal.add(kept, self._scores)
            except OSError as error:
                self._warn(error)
                return len(kept)
        return 0

    def _tell_damage(self, journal: ScoreJournal) -> None:
        for file, count in journal.damaged.items():
            text = "reward pool %s: damaged scores in %s: %d; they are left out and asked for again"
            log.warning(text, self._settings.pool_name, file, count)
        journal.damaged.clear()

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            what = f"{self._settings.pool_name}: cannot keep scores in {self._folder}: {error.strerror or error}"
            log.warning("reward pool %s; after a death of the run they would be asked for again", what)
        self._warned = True


def _of_version(key: bytes, version: str | None) -> bytes:
    """The key under which a reward of this version has its score."""
    return hashlib.blake2b(key + version.encode(), digest_size=16).digest() if version else key
