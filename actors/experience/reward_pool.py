"""A pool of actors that all run one reward: batches, deadlines, retries, restarts and a cache around a plain class.

    score(requests) ─▶ cache ─▶ queue ─▶ replica 0 ┐  each takes waiting requests, at most batch_size at a time,
                                    └──▶ replica 1 ┘  so requests of several groups share a call

A call fails if its deadline passes, its actor dies or the reward raises `RewardUnavailable`. The pool retries it on any
free replica. After the last attempt the scores are missing: None, a reason and a counter, never 0. The pool replaces a
replica that died or did not answer. Any other exception from the reward is a bug, and `score` raises it.

Left out: splitting a batch to find the one request that crashes it, and autoscaling of replicas.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from actors.messages import BatchReply
from deepgen.cluster.resources import pool_resources
from deepgen.config import PoolSettings
from deepgen.errors import UserError
from deepgen.tracking.timeline import Recorder
from rewards import RewardRequest, RewardUnavailable, applies, build_reward

log = logging.getLogger(__name__)

COUNTERS = ("calls", "retries", "timeouts", "missing", "cache_hits", "restarts", "seconds")
NOT_APPLICABLE = "the reward does not apply to this prompt"
MAX_BACKOFF_S = 10.0


class CallTimeout(TimeoutError):
    """A remote call passed its deadline; the message names actor, call and age."""


class RewardPoolError(RuntimeError):
    """The pool has no replica left and cannot create one."""


@dataclass(frozen=True)
class RewardScores:
    """Scores of one call of `RewardPool.score`, in the order of its requests.

    Attributes:
        values: the scores; None if a score is missing.
        reasons: why a score is missing; None if it is not.
        counters: counts for this call, keys as in COUNTERS. `calls` counts replica calls with at least one of its
            requests; `missing` excludes requests to which the reward does not apply; `seconds` is wall time.
    """

    values: list[float | None]
    reasons: list[str | None]
    counters: dict[str, float]


class RewardActor:
    """Hosts one reward in its own Ray process. `start` builds the reward, so its errors reach the caller unchanged."""

    def __init__(self, settings: PoolSettings) -> None:
        self._settings = settings

    def start(self) -> None:
        """Load the reward and score one grey image, so that no real request pays the extra time of a first call."""
        self._reward = build_reward(self._settings)
        grey = np.full((64, 64, 3), 128, dtype=np.uint8)
        self._reward.score([RewardRequest('a sign with the word "ok"', "a sign", "t2i", grey)])

    def score(self, picks: list[tuple[int, int]], *sources: list[RewardRequest]) -> BatchReply:
        """Score `sources[s][i]` for each (s, i) in `picks`."""
        requests = [sources[source][index] for source, index in picks]
        try:
            values = self._reward.score(requests)
        except RewardUnavailable as error:
            return BatchReply([], str(error) or "unavailable")
        if len(values) != len(requests):
            raise ValueError(f"{self._settings.class_} returned {len(values)} scores for {len(requests)} requests")
        # A score that is not finite counts as missing: it must not reach the cache or the mean of a group.
        return BatchReply([None if value is None or not math.isfinite(value) else float(value) for value in values])


@dataclass(eq=False)
class _Item:
    """A request on its way through the pool."""

    source: Any  # list[RewardRequest], or the ObjectRef of one
    index: int  # in source
    future: asyncio.Future[tuple[float | None, str | None]]  # score, or None and the reason
    counters: dict[str, float]  # counters of the request's `score` call
    failures: int = 0


@dataclass(eq=False)
class _Replica:
    label: str
    actor: Any
    failures: int = 0  # restarts since the last successful call


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
    ) -> None:
        self.name, self._settings = settings.pool_name, settings
        resources = pool_resources(settings, gpus=gpus)
        self._resources = {"num_cpus": resources["CPU"], "num_gpus": resources.get("GPU", 0.0)}
        self._start_deadline_s, self._max_restarts, self._backoff_s = start_deadline_s, max_restarts, backoff_s
        self._cache_size, self._recorder = cache_size, recorder or Recorder()
        self._cache: OrderedDict[bytes, float] = OrderedDict()
        self._replicas: list[_Replica] = []
        self._workers: list[asyncio.Task[None]] = []
        self._queue: asyncio.Queue[_Item] = asyncio.Queue()
        self._open: set[_Item] = set()  # all requests without an answer, queued or not
        self._broken: BaseException | None = None
        self._totals = dict.fromkeys(COUNTERS, 0.0)

    async def start(self) -> None:
        """Create and warm up all replicas. Returns when every replica can score.

        Raises:
            UserError: the reward rejects its settings.
            CallTimeout: a replica was not ready within start_deadline_s.
        """
        if self._workers:
            raise RuntimeError(f"reward pool {self.name}: started twice")
        labels = [f"{self.name} reward #{index}" for index in range(self._settings.replicas)]
        self._replicas = [_Replica(label, self._create()) for label in labels]
        try:
            await asyncio.gather(*(self._warm_up(replica) for replica in self._replicas))
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
            ray.kill(replica.actor)
        self._workers, self._replicas = [], []

    def counters(self) -> dict[str, float]:
        """Totals since the start, keys as in COUNTERS. `seconds` is the time that replicas spent in calls."""
        return dict(self._totals)

    def open_requests(self) -> int:
        """Requests without an answer, queued or being scored."""
        return len(self._open)

    def replica_actors(self) -> list[Any]:
        """Ray handles of the current replicas, for operations and tests."""
        return [replica.actor for replica in self._replicas]

    async def score(self, requests: Sequence[RewardRequest] | ray.ObjectRef) -> RewardScores:
        """Score a list of requests, given directly or as an ObjectRef of the list.

        With an ObjectRef, replicas read the images from the object store. This process reads them once, for the cache.

        Raises:
            CallTimeout: the ObjectRef was not readable within the deadline.
            RewardPoolError: no replica is left, or the pool is not running.
            Exception: any exception from the reward except `RewardUnavailable`.
        """
        began = time.monotonic()
        if self._broken is not None or not self._workers:
            raise self._broken or RewardPoolError(f"reward pool {self.name}: start() comes first")
        listed = await self._listed(requests)
        counters = dict.fromkeys(COUNTERS, 0.0)
        values: list[float | None] = [None] * len(listed)
        reasons: list[str | None] = [NOT_APPLICABLE] * len(listed)
        asked = [index for index, request in enumerate(listed) if applies(self._settings, request)]
        keys = {index: request_key(listed[index]) for index in asked} if self._cache_size else {}
        waiting: dict[int, _Item] = {}
        for index in asked:
            if (known := self._recall(keys.get(index))) is not None:
                values[index], reasons[index] = known, None
                self._count("cache_hits", counters)
            else:
                waiting[index] = self._submit(requests, index, counters)
        outcomes = await asyncio.gather(*(item.future for item in waiting.values()))
        for index, (value, reason) in zip(waiting, outcomes, strict=True):
            values[index], reasons[index] = value, reason
            if value is None:
                self._count("missing", counters)
            else:
                self._remember(keys.get(index), value)
        counters["seconds"] = time.monotonic() - began
        return RewardScores(values, reasons, counters)

    # ---- requests ----------------------------------------------------------------------------------------------------

    async def _listed(self, requests: Sequence[RewardRequest] | ray.ObjectRef) -> Sequence[RewardRequest]:
        if not isinstance(requests, ray.ObjectRef):
            return requests
        listed: Sequence[RewardRequest] = await _answer(
            requests, f"reward pool {self.name}", "read requests from the object store", self._settings.deadline_s
        )
        return listed

    def _submit(self, source: Any, index: int, counters: dict[str, float]) -> _Item:
        item = _Item(source, index, asyncio.get_running_loop().create_future(), counters)
        self._open.add(item)
        item.future.add_done_callback(lambda _: self._open.discard(item))
        self._queue.put_nowait(item)
        return item

    def _recall(self, key: bytes | None) -> float | None:
        if key is None or key not in self._cache:
            return None
        self._cache.move_to_end(key)
        return self._cache[key]

    def _remember(self, key: bytes | None, value: float) -> None:
        if key is None:
            return
        self._cache[key] = value
        if len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)

    def _count(self, key: str, *calls: dict[str, float]) -> None:
        """Count an event in the totals and in the counters of its `score` calls."""
        for counters in (self._totals, *calls):
            counters[key] += 1

    # ---- replicas ----------------------------------------------------------------------------------------------------

    def _create(self) -> Any:
        remote = ray.remote(RewardActor).options(**self._resources)
        return remote.remote(self._settings)

    async def _warm_up(self, replica: _Replica) -> None:
        span = self._recorder.begin(replica.label, self.name, "start", call="start of the reward")
        try:
            await _answer(replica.actor.start.remote(), replica.label, "start", self._start_deadline_s)
        except RayTaskError as error:
            if isinstance(error.cause, UserError):  # not a bug, so leave out the remote traceback
                raise error.cause from None
            raise
        finally:
            self._recorder.end(span)

    async def _serve(self, replica: _Replica) -> None:
        """Score batches on one replica until the pool drops the replica."""
        while True:
            batch = await self._take()
            failure = await self._attempt(replica, batch)
            if failure is None:
                continue
            reason, lost = failure
            self._fail(batch, reason)
            if lost and not await self._replace(replica, reason):
                return

    async def _take(self) -> list[_Item]:
        """Wait for requests and take a fair share of them, so that other replicas get some too."""
        batch = [await self._queue.get()]
        share = math.ceil((self._queue.qsize() + 1) / len(self._replicas))
        while len(batch) < min(share, self._settings.batch_size):
            batch.append(self._queue.get_nowait())
        return [item for item in batch if not item.future.done()]  # the caller may have given up

    async def _attempt(self, replica: _Replica, batch: list[_Item]) -> tuple[str, bool] | None:
        """Call a replica once. Returns None on success, else why the call failed and whether the replica is lost."""
        if not batch:
            return None
        self._count_batch(batch, "calls")
        began = time.monotonic()
        span = self._recorder.begin(replica.label, self.name, "score", call=f"score of {len(batch)} images")
        try:
            reply: BatchReply = await _answer(
                self._call(replica, batch), replica.label, "score", self._settings.deadline_s
            )
        except CallTimeout as error:
            self._count_batch(batch, "timeouts")
            return str(error), True
        except RayActorError as error:
            age = time.monotonic() - began
            return f"{replica.label}: died during score, {age:.1f} s after the call: {_first_line(error)}", True
        except RayError as error:  # a bug in the reward: raise it in the `score` calls of the batch
            for item in batch:
                _settle(item, error=error)
            return None
        finally:
            self._totals["seconds"] += time.monotonic() - began
            self._recorder.end(span)
        if reply.unavailable is not None:
            return f"{replica.label}: {reply.unavailable}", False
        replica.failures = 0
        for item, value in zip(batch, reply.values, strict=True):
            _settle(item, value, None if value is not None else f"{replica.label}: the reward gave no score")
        return None

    def _call(self, replica: _Replica, batch: list[_Item]) -> ray.ObjectRef:
        """Send a batch to a replica: ObjectRefs unchanged, all other requests in one list."""
        inline = [item.source[item.index] for item in batch if not isinstance(item.source, ray.ObjectRef)]
        references = list(dict.fromkeys(item.source for item in batch if isinstance(item.source, ray.ObjectRef)))
        picks, sent = [], 0
        for item in batch:
            if isinstance(item.source, ray.ObjectRef):
                picks.append((1 + references.index(item.source), item.index))
            else:
                picks.append((0, sent))
                sent += 1
        return replica.actor.score.remote(picks, inline, *references)

    def _count_batch(self, batch: list[_Item], key: str) -> None:
        self._count(key, *{id(item.counters): item.counters for item in batch}.values())

    def _fail(self, batch: list[_Item], reason: str) -> None:
        """Queue a failed batch again after a pause. Scores of requests with no attempts left are missing."""
        again: list[_Item] = []
        for item in batch:
            item.failures += 1
            if item.failures > self._settings.retries:
                _settle(item, None, f"{reason} (attempt {item.failures}, the last)")
            else:
                again.append(item)
        log.warning("%s; %d requests are tried again, %d are missing", reason, len(again), len(batch) - len(again))
        if again:
            self._count_batch(again, "retries")
        for item in again:
            pause = min(self._backoff_s * 2 ** (item.failures - 1), MAX_BACKOFF_S)
            asyncio.get_running_loop().call_later(pause, self._queue.put_nowait, item)

    async def _replace(self, replica: _Replica, reason: str) -> bool:
        """Replace a lost replica's actor with a new one. Returns False if the pool drops the replica instead."""
        while replica.failures < self._max_restarts:
            replica.failures += 1
            self._count("restarts")
            ray.kill(replica.actor)  # a hanging actor still holds memory
            replica.actor = self._create()
            try:
                await self._warm_up(replica)
            except (CallTimeout, RayActorError) as error:
                reason = f"{replica.label}: {_first_line(error)}"
                log.warning("restart %d failed: %s", replica.failures, reason)
                continue
            return True
        ray.kill(replica.actor)
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
        for item in list(self._open):
            _settle(item, error=error)


def request_key(request: RewardRequest) -> bytes:
    """Cache key: a hash of everything that a reward may use."""
    key = hashlib.blake2b(digest_size=16)
    for text in (request.prompt, request.answer, request.task):
        key.update(f"{len(text)}:{text}".encode())
    for image in (request.image, *request.references):
        key.update(repr(image.shape).encode())
        key.update(np.ascontiguousarray(image).data)
    return key.digest()


async def _answer(reference: ray.ObjectRef, actor: str, call: str, deadline_s: float) -> Any:
    """The result of a remote call. Raises `CallTimeout` if it is late."""
    future = asyncio.wrap_future(reference.future())
    # After a timeout nothing awaits the future. asyncio would then log its exception unless this callback reads it.
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    began = time.monotonic()
    finished, _ = await asyncio.wait({future}, timeout=deadline_s)
    if not finished:
        age = time.monotonic() - began
        raise CallTimeout(f"{actor}: call {call!r} has not answered after {age:.1f} s (deadline {deadline_s:g} s)")
    return future.result()


def _settle(
    item: _Item, value: float | None = None, reason: str | None = None, *, error: BaseException | None = None
) -> None:
    if item.future.done():
        return
    if error is not None:
        item.future.set_exception(error)
    else:
        item.future.set_result((value, reason))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
