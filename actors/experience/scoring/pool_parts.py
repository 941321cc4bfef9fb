"""What waits in a reward pool: calls of `RewardPool.score`, parts of them, and what comes of a call."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import ray

COUNTERS = ("calls", "retries", "timeouts", "missing", "cache_hits", "restarts", "unwritten", "seconds")
NOT_APPLICABLE = "the reward does not apply to this prompt, or there is no picture"


@dataclass(frozen=True)
class RewardScores:
    """Scores of one call of `RewardPool.score`, in the order of its keys.

    Attributes:
        values: the scores; None if a score is missing.
        reasons: why a score is missing; None if it is not.
        counters: counts for this call, keys as in COUNTERS. `calls` counts replica calls with at least one of its
            requests; `missing` excludes requests without a key; `unwritten` scores are not in the journal, though it
            is on; `seconds` is wall time.
    """

    values: list[float | None]
    reasons: list[str | None]
    counters: dict[str, float]


@dataclass(eq=False)
class PoolCall:
    """One call of `RewardPool.score`."""

    requests: ray.ObjectRef  # of a list[RewardRequest]
    values: list[float | None]
    reasons: list[str | None]
    counters: dict[str, float]
    waiting: int  # requests without an outcome
    done: asyncio.Future[None]

    def fail(self, error: BaseException) -> None:
        if not self.done.done():
            self.done.set_exception(error)


@dataclass(eq=False)
class Part:
    """Requests of one call, by their index, that are tried together."""

    call: PoolCall
    indices: list[int]
    failures: int = 0

    def settle(self, values: Sequence[float | None], reason: str) -> None:
        """Enter the outcomes; `reason` is that of the missing ones."""
        for index, value in zip(self.indices, values, strict=True):
            self.call.values[index] = value
            self.call.reasons[index] = reason if value is None else None
        self.call.waiting -= len(self.indices)
        if not self.call.waiting and not self.call.done.done():
            self.call.done.set_result(None)

    def split(self, count: int) -> Part:
        """Take the first `count` requests out of this part."""
        taken, self.indices = self.indices[:count], self.indices[count:]
        return Part(self.call, taken, self.failures)
