"""A pool of actors that all run one reward: batches, deadlines, retries, restarts and a cache around a plain class.

    score(requests, keys) ─▶ cache ─▶ queue ─▶ replica 0 ┐  each takes waiting requests, at most batch_size at a time,
                                          └──▶ replica 1 ┘  so requests of several groups share a call

A reward that compares the images of a prompt (`score_groups`) gets them all in one call.

The pool never sees an image. It gets a reference to a list of requests, which replicas read, and the requests' keys.

A call fails if its deadline passes, its actor dies or the reward raises `RewardUnavailable`. The pool retries it on any
free replica. After the last attempt the scores are missing: None, a reason and a counter, never 0. The pool replaces a
replica that died or did not answer. Any other exception from the reward is a bug, and `score` raises it. Requests lost
with their node cannot be read by another attempt either: `score` raises `RequestsLostError`.

Left out: splitting a batch to find the one request that crashes it, and autoscaling of replicas.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError

from actors.experience.scoring.pool_parts import (
    COUNTERS,
    NOT_APPLICABLE,
    Part,
    PoolCall,
    RewardScores,
    asked_groups,
    group_keys,
)
from actors.experience.scoring.replica import CallTimeout, Replica
from actors.experience.scoring.score_cache import ScoreCache
from deepgen.cluster.resources import pool_resources
from deepgen.config import PoolSettings
from deepgen.errors import UserError
from deepgen.tracking.timeline import Recorder
from rewards import Missing, is_groupwise

log = logging.getLogger(__name__)

MAX_BACKOFF_S = 10.0


class RequestsLostError(RuntimeError):
    """The list of requests is in no object store any more. Whoever made it can make it again."""


class RewardPoolError(RuntimeError):
    """The pool has no replica left and cannot create one."""


class RewardPool:
    """The replicas of one reward. A pool belongs to one asyncio event loop: call `start` first and `stop` at the end.

    Args:
        settings: `rewards.<name>`: the pool's keys and its reward's options.
        gpus: whether the cluster has GPUs; if not, the pool requests none.
        start_deadline_s: time limit for placing, loading and warming up one replica.
        max_restarts: restarts of one replica without a successful call in between; then the pool drops the replica.
        backoff_s: pause before the first retry; doubles with each retry, up to 10 s.
        cache_size: number of cached scores; the least recently used are dropped first; 0 = no cache.
        recorder: gets a span for every call of a replica.
        journal: folder in which the cache outlives this process (`ScoreJournal`); None for none.
    """

    def __init__(
        self,
        settings: PoolSettings,
        *,
        gpus: bool = False,
        start_deadline_s: float = 300.0,
        max_restarts: int = 3,
        backoff_s: float = 0.5,
        cache_size: int = 1 << 16,
        recorder: Recorder | None = None,
        journal: Path | None = None,
    ) -> None:
        self.name, self._settings, self._groupwise = settings.pool_name, settings, is_groupwise(settings)
        resources = pool_resources(settings, gpus=gpus)
        self._resources = {"num_cpus": resources["CPU"], "num_gpus": resources.get("GPU", 0.0)}
        self._start_deadline_s, self._max_restarts, self._backoff_s = start_deadline_s, max_restarts, backoff_s
        self._cache, self._recorder = ScoreCache(settings, cache_size, journal), recorder or Recorder()
        self._replicas: list[Replica] = []
        self._workers: list[asyncio.Task[None]] = []
        self._queue: deque[Part] = deque()
        self._filled = asyncio.Event()  # set while the queue is not empty
        self._open: set[PoolCall] = set()
        self._broken: BaseException | None = None
        self._totals = dict.fromkeys(COUNTERS, 0.0)
        self._told_reasons = set[str]()  # of missing scores, on the log

    async def start(self) -> None:
        """Create and warm up all replicas. Returns when every replica can score. One that dies meanwhile is replaced.

        Raises:
            UserError: the reward rejects its settings.
            CallTimeout: a replica was not ready within start_deadline_s.
            RewardPoolError: every replica died again and again.
        """
        if self._workers:
            raise RuntimeError(f"reward pool {self.name}: started twice")
        labels = [f"{self.name} reward #{index}" for index in range(self._settings.replicas)]
        self._replicas = [Replica(label, self._settings, self._resources) for label in labels]
        try:
            await asyncio.gather(self._cache.open(), *(self._first_start(replica) for replica in self._replicas))
        except BaseException:
            self.stop()
            raise
        for replica in self._replicas:
            worker = asyncio.get_running_loop().create_task(self._serve(replica), name=replica.label)
            worker.add_done_callback(self._worker_ended)
            self._workers.append(worker)

    def stop(self) -> None:
        """Stop all replicas. Requests that are still open fail with `RewardPoolError`."""
        for worker in self._workers:
            worker.cancel()
        self._break(RewardPoolError(f"reward pool {self.name} was stopped"))
        for replica in self._replicas:
            replica.kill()
        self._cache.close()
        self._workers, self._replicas = [], []

    def counters(self) -> dict[str, float]:
        """Totals since the start, keys as in COUNTERS. `seconds` is the time that replicas spent in calls."""
        return dict(self._totals)

    def open_requests(self) -> int:
        """Requests without an answer, queued or being scored."""
        return sum(call.waiting for call in self._open)

    def replica_actors(self) -> list[Any]:
        """Ray handles of the current replicas, for operations and tests."""
        return [replica.actor for replica in self._replicas]

    async def score(
        self, requests: ray.ObjectRef, keys: Sequence[bytes | None], group: int | None = None
    ) -> RewardScores:
        """Score the list of requests behind a reference.

        keys: what tells the requests apart (`request_key`), in their order; None where this reward is not asked.
        group: images of one prompt, side by side; None: all are. It matters to a reward that compares them: they are
        asked for together, from the cache or from the reward, and a score is kept for just these images.

        Raises:
            RequestsLostError: the node that held the requests died.
            RewardPoolError: no replica is left, or the pool is not running.
            Exception: any exception from the reward except `RewardUnavailable`.
        """
        began = time.monotonic()
        if self._broken is not None or not self._workers:
            raise self._broken or RewardPoolError(f"reward pool {self.name}: start() comes first")
        counters = dict.fromkeys(COUNTERS, 0.0)
        groups = asked_groups(keys, (group or len(keys)) if self._groupwise else None) if keys else []
        cache_keys = self._cache_keys(keys, groups)
        values: list[float | None] = [None] * len(keys)
        for members in groups:
            known = [self._cache.recall(cache_keys[index]) for index in members]
            if None not in known:
                for index, value in zip(members, known, strict=True):
                    values[index] = value
        reasons: list[Missing | None] = [NOT_APPLICABLE if key is None else None for key in keys]
        self._count("cache_hits", counters, by=len(values) - values.count(None))
        groups = [members for members in groups if values[members[0]] is None]
        new = [index for members in groups for index in members]
        if new:
            call = PoolCall(requests, values, reasons, counters, len(new), asyncio.get_running_loop().create_future())
            await self._outcome(call, groups if self._groupwise else [new])
            found = {cache_keys[index]: value for index in new if (value := values[index]) is not None}
            for why in filter(None, (reasons[index] for index in new)):
                self._count("missing", counters)
                self._count(f"missing/{why.reason}", counters)
            self._count("unwritten", by=self._cache.remember(found))
        counters["seconds"] = time.monotonic() - began
        return RewardScores(values, reasons, counters)

    # ---- requests ----------------------------------------------------------------------------------------------------

    def _cache_keys(self, keys: Sequence[bytes | None], groups: list[list[int]]) -> dict[int, bytes]:
        """Keys in the cache by index of the request."""
        found: dict[int, bytes] = {}
        for members in groups:
            own = [key for index in members if (key := keys[index]) is not None]
            found |= zip(members, group_keys(own) if self._groupwise else own, strict=True)
        return found

    async def _outcome(self, call: PoolCall, parts: list[list[int]]) -> None:
        """Fill in the scores of these requests, or why they are missing."""
        self._open.add(call)
        try:
            self._enqueue(Part(call, indices, self._groupwise) for indices in parts)
            await call.done
        finally:
            self._open.discard(call)

    def _enqueue(self, parts: Iterable[Part]) -> None:
        self._queue.extend(parts)
        self._filled.set()

    def _count(self, key: str, *calls: dict[str, float], by: int = 1) -> None:
        """Count events in the totals and in the counters of their `score` calls."""
        for counters in (self._totals, *calls):
            counters[key] += by

    # ---- replicas ----------------------------------------------------------------------------------------------------

    async def _warm_up(self, replica: Replica) -> None:
        span = self._recorder.begin(replica.label, self.name, "start", call="start of the reward")
        try:
            await replica.start(self._start_deadline_s)
        except RayTaskError as error:
            if isinstance(error.cause, UserError):  # not a bug, so leave out the remote traceback
                raise error.cause from None
            raise
        finally:
            self._recorder.end(span)

    async def _first_start(self, replica: Replica) -> None:
        try:
            await self._warm_up(replica)
        except RayActorError as error:
            await self._replace(replica, f"{replica.label}: died during start: {_first_line(error)}")

    async def _serve(self, replica: Replica) -> None:
        """Score batches on one replica until the pool drops the replica."""
        while True:
            batch = await self._take()
            failure = await self._attempt(replica, batch)
            if failure is None:
                continue
            why, lost = failure
            self._fail(batch, why)
            if lost and not await self._replace(replica, why.detail):
                return

    async def _take(self) -> list[Part]:
        """Wait for requests and take a fair share of them, so that other replicas get some too."""
        await self._filled.wait()
        self._queue = deque(part for part in self._queue if not part.call.done.done())  # the others' callers are gone
        share = math.ceil(sum(len(part.indices) for part in self._queue) / len(self._replicas))
        left, batch = min(share, self._settings.batch_size), list[Part]()
        while left > 0 and self._queue:
            first = self._queue[0]
            if len(first.indices) <= left or (first.whole and not batch):
                batch.append(self._queue.popleft())
            elif first.whole:
                break
            else:
                batch.append(first.split(left))
            left -= len(batch[-1].indices)
        if not self._queue:
            self._filled.clear()
        return batch

    async def _attempt(self, replica: Replica, batch: list[Part]) -> tuple[Missing, bool] | None:
        """Call a replica once. Returns None on success, else why the call failed and whether the replica is lost."""
        if not batch:
            return None
        self._count_batch(batch, "calls")
        began = time.monotonic()
        span = self._recorder.begin(replica.label, self.name, "score", call=f"score of {len(batch)} images")
        try:
            picks, lists = [part.indices for part in batch], [part.call.requests for part in batch]
            reply = await replica.score(picks, lists, self._settings.deadline_s)
        except CallTimeout as error:
            self._count_batch(batch, "timeouts")
            return Missing("deadline", str(error)), True
        except RayActorError as error:
            age = time.monotonic() - began
            what = f"{replica.label}: died during score, {age:.1f} s after the call: {_first_line(error)}"
            return Missing("died", what), True
        except RayError as error:
            self._raise(batch, error)
            return None
        finally:
            self._totals["seconds"] += time.monotonic() - began
            self._recorder.end(span)
        if reply.unavailable is not None:
            return Missing("transport", f"{replica.label}: {reply.unavailable}"), False
        replica.failures = 0
        outcomes = iter(reply.values)
        for part in batch:
            part.settle([self._told(next(outcomes), replica) for _ in part.indices])
        return None

    def _told(self, outcome: float | Missing, replica: Replica) -> float | Missing:
        """The outcome, with the replica's name where it is missing. The first for each reason is a line on the log."""
        if not isinstance(outcome, Missing):
            return outcome
        why = Missing(outcome.reason, f"{replica.label}: {outcome.detail or 'the reward does not say more'}")
        if why.reason not in self._told_reasons:
            self._told_reasons.add(why.reason)
            text = "%s: a score is missing (%s); more with this reason are only counted: pool/%s/missing/%s"
            log.warning(text, why.detail, why.reason, self.name, why.reason)
        return why

    def _raise(self, batch: list[Part], error: RayError) -> None:
        """Raise an error that another attempt would meet again in the `score` calls that it concerns."""
        cause = error.cause if isinstance(error, RayTaskError) else error
        lost = cause.object_ref_hex if isinstance(cause, ObjectLostError) else None
        if all(part.call.requests.hex() != lost for part in batch):  # a bug in the reward
            for part in batch:
                part.call.fail(error)
            return
        for part in batch:
            if part.call.requests.hex() == lost:
                part.call.fail(RequestsLostError(f"reward pool {self.name}: {_first_line(cause)}"))
        self._enqueue(batch)  # for the others; `_take` drops those that have failed

    def _count_batch(self, batch: list[Part], key: str) -> None:
        self._count(key, *{id(part.call): part.call.counters for part in batch}.values())

    def _fail(self, batch: list[Part], why: Missing) -> None:
        """Queue a failed batch again after a pause. Scores of requests with no attempts left are missing."""
        again: list[Part] = []
        for part in batch:
            part.failures += 1
            if part.failures > self._settings.retries:
                last = Missing(why.reason, f"{why.detail} (attempt {part.failures}, the last)")
                part.settle([last] * len(part.indices))
            else:
                again.append(part)
        retried, asked = (sum(len(part.indices) for part in parts) for parts in (again, batch))
        log.warning("%s; %d requests are tried again, %d are missing", why.detail, retried, asked - retried)
        if again:
            self._count_batch(again, "retries")
        for part in again:
            pause = min(self._backoff_s * 2 ** (part.failures - 1), MAX_BACKOFF_S)
            asyncio.get_running_loop().call_later(pause, self._enqueue, [part])

    async def _replace(self, replica: Replica, reason: str) -> bool:
        """Replace a lost replica's actor with a new one. Returns False if the pool drops the replica instead."""
        while replica.failures < self._max_restarts:
            replica.failures += 1
            self._count("restarts")
            replica.replace()
            try:
                await self._warm_up(replica)
            except (CallTimeout, RayActorError) as error:
                reason = f"{replica.label}: {_first_line(error)}"
                log.warning("restart %d failed: %s", replica.failures, reason)
                continue
            return True
        replica.kill()
        self._replicas.remove(replica)
        log.error("%s is given up after %d restarts in a row; last: %s", replica.label, replica.failures, reason)
        if not self._replicas:
            raise RewardPoolError(f"reward pool {self.name} has no replica left; last: {reason}")
        return False

    def _worker_ended(self, worker: asyncio.Task[None]) -> None:
        if not worker.cancelled() and (error := worker.exception()) is not None:
            self._break(error)

    def _break(self, error: BaseException) -> None:
        """Mark the pool as broken: all open requests and all later `score` calls raise the error."""
        self._broken = self._broken or error
        for call in list(self._open):
            call.fail(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
