"""What waits in a reward pool: calls of `RewardPool.score`, parts of them, and what comes of a call."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import ray

from rewards import REASONS, Missing

log = logging.getLogger(__name__)

_FRAME = re.compile(r'^ +File "(.+)", line (\d+), in (.+)\n(?: {4,}(.+))?', re.MULTILINE)
MOST_TOLD = 10  # failed calls of a pool for one reason that are lines on the log
COUNTERS = (
    *("asked", "scored", "calls", "retries", "timeouts", "missing", "cache_hits", "restarts", "unwritten", "seconds"),
    *(f"missing/{reason}" for reason in REASONS),
)
NOT_APPLICABLE = Missing("refused", "the reward does not apply to this prompt, or there is no picture")


class RequestsLostError(RuntimeError):
    """The list of requests is in no object store any more. Whoever made it can make it again."""


class RewardPoolError(RuntimeError):
    """The run needs this pool's reward, and it does not answer any more."""


class FailureLines:
    """Lines on the log about what fails in a pool: the first ones for each reason, as a bad day has thousands."""

    def __init__(self, pool: str) -> None:
        self._pool, self._told = pool, Counter[str]()
        self._reasons = set[str]()  # of missing scores
        self._raised = set[tuple[str, str]]()  # kinds of exceptions: type and where

    def tell(self, why: Missing, what_follows: str) -> None:
        """Say why a call failed, and what follows, if there is a line left for its reason."""
        self._told[why.reason] += 1
        if self._told[why.reason] < MOST_TOLD:
            log.warning("%s; %s", why.detail, what_follows)
        elif self._told[why.reason] == MOST_TOLD:
            text = "%s; %s; more calls that fail like this (%s) are only counted: pool/%s/retries"
            log.warning(text, why.detail, what_follows, why.reason, self._pool)

    def raised(self, error: BaseException, replica: str, images: int) -> None:
        """Say what a reward raised for so many images, and where, if it is the first of its kind.

        They are tried in halves, and if it goes away then, nothing else tells of it.
        """
        cause = getattr(error, "cause", None) or error  # what Ray has carried
        kind, where = type(cause).__name__, raised_at(str(error))
        if (kind, where) not in self._raised:
            self._raised.add((kind, where))
            text = (
                "%s: the reward raised %s for %d images: %s%s; they are tried in halves; more like it are only counted"
            )
            log.warning(text + ": pool/%s/retries", replica, kind, images, first_line(cause), where, self._pool)

    def named(self, outcome: float | Missing, replica: str) -> float | Missing:
        """The outcome, with the replica's name where it is missing. The first for each reason is a line."""
        if not isinstance(outcome, Missing):
            return outcome
        why = replace(outcome, detail=f"{replica}: {outcome.detail or 'the reward does not say more'}")
        if why.reason not in self._reasons:
            self._reasons.add(why.reason)
            text = "%s: a score is missing (%s); more with this reason are only counted: pool/%s/missing/%s"
            log.warning(text, why.detail, why.reason, self._pool, why.reason)
        return why


def raised_at(traceback: str) -> str:
    """Where a traceback ends, as " (FILE:LINE, in NAME: SOURCE)"; "" if it does not say."""
    frames = _FRAME.findall(traceback)
    if not frames:
        return ""
    file, line, name, source = frames[-1]
    return f" ({file}:{line}, in {name}{': ' if source else ''}{source.strip()})"


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@dataclass(frozen=True)
class RewardScores:
    """Scores of one call of `RewardPool.score`, in the order of its keys.

    Attributes:
        values: the scores; None if a score is missing.
        reasons: why a score is missing; None if it is not.
        counters: counts for this call, keys as in COUNTERS. `asked` requests have a key; each of them is `scored`, by
            the reward or the cache, or `missing`. `calls` counts replica calls with at least one of its
            requests; `missing`, also by reason, excludes requests without a key; `unwritten` scores are not in the
            journal, though it is on; `seconds` is wall time.
    """

    values: list[float | None]
    reasons: list[Missing | None]
    counters: dict[str, float]


@dataclass(eq=False)
class PoolCall:
    """One call of `RewardPool.score`."""

    requests: ray.ObjectRef  # of a list[RewardRequest]
    values: list[float | None]
    reasons: list[Missing | None]
    counters: dict[str, float]
    waiting: int  # requests without an outcome
    began: float  # by the clock of the pool
    done: asyncio.Future[None]
    versions: dict[int, str | None] = field(default_factory=dict)  # of the reward that gave a score, by index

    def fail(self, error: BaseException) -> None:
        if not self.done.done():
            self.done.set_exception(error)


@dataclass(eq=False)
class Part:
    """Requests of one call, by their index, that are tried together."""

    call: PoolCall
    indices: list[int]
    whole: bool = False  # all images of a prompt, for a reward that compares them: never split
    failures: int = 0

    def settle(self, outcomes: Sequence[float | Missing], version: str | None = None) -> None:
        """Enter a score, or why there is none, for each request. version: of the reward."""
        for index, outcome in zip(self.indices, outcomes, strict=True):
            self.call.values[index] = None if isinstance(outcome, Missing) else outcome
            self.call.reasons[index] = outcome if isinstance(outcome, Missing) else None
            self.call.versions[index] = version
        self.call.waiting -= len(self.indices)
        if not self.call.waiting and not self.call.done.done():
            self.call.done.set_result(None)

    def split(self, count: int) -> Part:
        """Take the first `count` requests out of this part."""
        taken, self.indices = self.indices[:count], self.indices[count:]
        return Part(self.call, taken, self.whole, self.failures)


def asked_groups(keys: Sequence[bytes | None], size: int | None) -> list[list[int]]:
    """The indices of the requests that have a key, by group; `size`: of a group, in a row, None for 1 request each.

    Groups without a key are left out.
    """
    if size is not None and (size < 1 or len(keys) % size):
        raise ValueError(f"{len(keys)} requests in groups of {size}")
    size = size or 1
    groups = [[i for i in range(start, start + size) if keys[i] is not None] for start in range(0, len(keys), size)]
    return [group for group in groups if group]


def group_keys(keys: Sequence[bytes]) -> list[bytes]:
    """Cache keys of a group's members: a score that comes of a comparison depends on all of them and their order."""
    whole = hashlib.blake2b(b"".join([b"%d:" % len(keys), *keys]), digest_size=16).digest()
    return [hashlib.blake2b(b"%d:" % place + whole, digest_size=16).digest() for place in range(len(keys))]


def keys_of_cache(keys: Sequence[bytes | None], groups: Sequence[list[int]], *, compared: bool) -> dict[int, bytes]:
    """Keys in the cache by index of the request. compared: the reward compares the images of a group."""
    found: dict[int, bytes] = {}
    for members in groups:
        own = [key for index in members if (key := keys[index]) is not None]
        found |= zip(members, group_keys(own) if compared else own, strict=True)
    return found
