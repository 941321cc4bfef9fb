"""What the journals of all rollout actors have done, added up in the stream."""

from __future__ import annotations

import logging
from collections import Counter

from actors.messages import JournalNews

log = logging.getLogger(__name__)


class JournalCounts:
    """Totals since the start. A warning that several actors have is said once."""

    def __init__(self) -> None:
        self._totals = Counter[str](groups_written=0, groups_read=0, bytes_written=0, skipped=0)
        self._on = False
        self._told: set[str] = set()

    def add(self, news: JournalNews | None) -> None:
        if news is None:
            return
        self._on = True
        self._totals.update(news.counts)
        for warning in news.warnings:
            if warning not in self._told:
                self._told.add(warning)
                log.warning("%s", warning)

    def metrics(self) -> dict[str, float]:
        """The totals, as metrics; none without a journal."""
        return {f"journal/{name}": float(count) for name, count in self._totals.items()} if self._on else {}
