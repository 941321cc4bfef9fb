"""A pool of actors that all run one reward: batches, deadlines, retries, restarts and a cache around a plain class.

    score(requests, keys) ─▶ cache ─▶ queue ─▶ replica 0 ┐  each takes waiting requests, at most batch_size at a time,
                                          └──▶ replica 1 ┘  so requests of several groups share a call

A reward that compares the images of a prompt (`score_groups`) gets them all in one call.

The pool never sees an image. It gets a reference to a list of requests, which replicas read, and the requests' keys.

A call fails if its deadline passes, its actor dies or the reward raises `RewardUnavailable`. The pool tries it again on
any free replica, after a pause; if the process died, hung, broke or raised another exception, in halves, until the
request that did it is alone. After the last attempt the scores are missing: None, a reason and a counter, never 0. The
pool replaces a replica that died, broke or did not answer. If all calls fail, the breaker opens (`Breaker`): then
requests wait for at most `deadline_s`, while single ones probe whether the reward answers again; with `required` the
run ends after that.

Exceptions with one prompt after the other are a bug in the reward, and `score` raises them. Requests lost with their
node cannot be read by another attempt either: `score` raises `RequestsLostError`.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayError, RayTaskError

from actors.experience.scoring.breaker import MAX_PAUSE_S, Breaker
from actors.experience.scoring.pool_parts import (
    COUNTERS,
    NOT_APPLICABLE,
    FailureLines,
    Part,
    PoolCall,
    RequestsLostError,
    RewardPoolError,
    RewardScores,
    asked_groups,
    first_line,
    keys_of_cache,
)
from actors.experience.scoring.pool_queue import Batch, PoolQueue, can_split, halves, size_of
from actors.experience.scoring.replica import CallTimeout, Replica
from actors.experience.scoring.score_cache import ScoreCache
from actors.experience.scoring.start_check import check_requests, first_score, remedy_for
from actors.gone import GONE
from actors.messages import BatchReply
from deepgen.cluster.resources import Placement, pool_placement
from deepgen.config import PoolSettings
from deepgen.config.schema.sections import TASKS, ClusterSettings
from deepgen.errors import UserError
from deepgen.tracking.timeline import Recorder
from rewards import Missing, is_groupwise

log = logging.getLogger(__name__)

MAX_BACKOFF_S = 10.0
BUGS_IN_A_ROW = 3  # prompts with which a reward raises an exception, without a score in between: then it is a bug
GROW_AFTER_S, IDLE_S = 10.0, 60.0  # before a replica is added, and before one that idles goes
_LOOK_S = 0.25  # how often a replica looks whether the breaker lets a call go on


class RewardPool:
    """The replicas of one reward. A pool belongs to one asyncio event loop: call `start` first and `stop` at the end.

    Args:
        settings: `rewards.<name>`: the pool's keys and its reward's options.
        placement: what a replica asks of its node; default: a share of a CPU.
        start_deadline_s: time limit for placing, loading and warming up one replica, all attempts together.
        max_restarts: restarts of one replica without a successful call in between; then the pool drops the replica.
        backoff_s: longest pause before the first retry; doubles with each retry, up to 10 s.
        cache_size: number of cached scores; the least recently used are dropped first; 0 = no cache.
        recorder: gets a span for every call of a replica; its clock is the pool's.
        journal: folder in which the cache outlives this process (`ScoreJournal`); None for none.
        runs: folder of other runs, whose journals are read as well.
        tasks: those whose prompts the reward scores; `start` checks it with a request of one of them.
        replica: makes a replica of its label, settings and resources.
    """

    def __init__(
        self,
        settings: PoolSettings,
        *,
        placement: Placement | None = None,
        start_deadline_s: float = 300.0,
        max_restarts: int = 3,
        backoff_s: float = 0.5,
        cache_size: int = 1 << 16,
        recorder: Recorder | None = None,
        journal: Path | None = None,
        runs: Path | None = None,
        tasks: Sequence[str] = TASKS,
        replica: Callable[..., Replica] = Replica,
    ) -> None:
        self.name, self._settings, self._groupwise = settings.pool_name, settings, is_groupwise(settings)
        self._grows = settings.most_replicas > settings.least_replicas
        self._placement = placement or pool_placement(ClusterSettings(), settings, gpus=False)
        self._start_deadline_s, self._max_restarts, self._backoff_s = start_deadline_s, max_restarts, backoff_s
        self._cache, self._recorder = ScoreCache(settings, cache_size, journal, runs), recorder or Recorder()
        self._clock = self._recorder.clock
        self._make_replica, self._replicas = replica, list[Replica]()
        self._starters: list[asyncio.Task[None]] = []
        self._workers: list[asyncio.Task[None]] = []
        self._queue = PoolQueue(settings.batch_size)
        self._jitter = random.Random(self.name)  # moves pauses, never a score
        self._breaker = Breaker(backoff_s, self._jitter, clock=self._clock)
        self._not_before = 0.0  # when a service wants to be asked again, by the clock
        self._check = check_requests(settings, tasks)
        self._raised = set[PoolCall]()  # with whose requests the reward raised exceptions, since its last score
        self._numbered = 0  # replicas so far
        self._growing: asyncio.TimerHandle | None = None
        self._open: set[PoolCall] = set()
        self._broken: BaseException | None = None
        self._totals = dict.fromkeys(COUNTERS, 0.0)
        self._lines = FailureLines(self.name)

    async def start(self) -> None:
        """Create and warm up all replicas. Returns when every replica can score. One that dies meanwhile is replaced.

        Raises:
            UserError: the reward rejects its settings, or cannot score a first request, or hangs in it.
            CallTimeout: a replica has not loaded its reward within start_deadline_s.
            RewardPoolError: every replica died again and again, or the pool was stopped.
        """
        if self._broken is not None:
            raise self._broken
        if self._workers or self._starters:
            raise RuntimeError(f"reward pool {self.name}: started twice")
        self._replicas = [self._new_replica() for _ in range(self._settings.least_replicas)]
        first = (self._cache.open(), *(self._first_start(replica) for replica in self._replicas))
        self._starters = [asyncio.ensure_future(work) for work in first]
        try:
            await asyncio.gather(*self._starters)
            await self._cache.read_others()
        except asyncio.CancelledError:
            stopped = self._broken  # by `stop`; else the caller was cancelled
            self.stop()
            if stopped is None:
                raise
            raise stopped from None
        except BaseException:
            self.stop()  # the other replicas as well: one that dies now is not replaced
            raise
        self._starters = []
        for replica in self._replicas:
            self._employ(self._serve(replica), replica.label)

    def stop(self) -> None:
        """Stop all replicas. Requests that are still open fail with `RewardPoolError`."""
        for task in (*self._starters, *self._workers):
            task.cancel()
        self._break(RewardPoolError(f"reward pool {self.name} was stopped"))
        for replica in self._replicas:
            replica.kill()
        if self._growing is not None:
            self._growing.cancel()
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
            RewardPoolError: the reward is required and does not answer, or the pool is not running.
            Exception: the reward raised it with BUGS_IN_A_ROW prompts in a row.
        """
        began = self._clock()
        if self._broken is not None or not self._workers:
            raise self._broken or RewardPoolError(f"reward pool {self.name}: start() comes first")
        counters = dict.fromkeys(COUNTERS, 0.0)
        groups = asked_groups(keys, (group or len(keys)) if self._groupwise else None) if keys else []
        cache_keys = keys_of_cache(keys, groups, compared=self._groupwise)
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
            call = PoolCall(requests, values, reasons, counters, len(new), began, _future())
            try:
                await self._outcome(call, groups if self._groupwise else [new])
            finally:  # of a call that is cancelled, too: whoever asks again has these scores
                found = {index: (cache_keys[index], value) for index in new if (value := values[index]) is not None}
                self._count("unwritten", by=self._cache.remember(found, call.versions))
            for why in filter(None, (reasons[index] for index in new)):
                self._count("missing", counters)
                self._count(f"missing/{why.reason}", counters)
        self._count("asked", counters, by=len(keys) - keys.count(None))
        self._count("scored", counters, by=len(values) - values.count(None))
        counters["seconds"] = self._clock() - began
        return RewardScores(values, reasons, counters)

    # ---- requests ----------------------------------------------------------------------------------------------------

    async def _outcome(self, call: PoolCall, parts: list[list[int]]) -> None:
        """Fill in the scores of these requests, or why they are missing."""
        self._open.add(call)
        try:
            self._wait([Part(call, indices, self._groupwise) for indices in parts])
            self._grow_soon()
            await call.done
        finally:
            self._open.discard(call)

    def _count(self, key: str, *calls: dict[str, float], by: int = 1) -> None:
        """Count events in the totals and in the counters of their `score` calls."""
        for counters in (self._totals, *calls):
            counters[key] += by

    # ---- replicas ----------------------------------------------------------------------------------------------------

    async def _warm_up(self, replica: Replica, end: float | None = None) -> Missing | None:
        """Load the reward and have it score a request like the run's. Returns why that has no score.

        end: when both must be done, by the event loop's clock; default: start_deadline_s from now.
        """
        end = asyncio.get_running_loop().time() + self._start_deadline_s if end is None else end
        span = self._recorder.begin(replica.label, self.name, "start", call="start of the reward")
        try:
            reply = await replica.start(self._check, end, self._settings.deadline_s)
        except RayTaskError as error:
            if isinstance(error.cause, UserError):  # not a bug, so leave out the remote traceback
                raise error.cause from None
            raise
        finally:
            self._recorder.end(span)
        if reply.unavailable is not None:
            return Missing("transport", reply.unavailable)
        missing = next((value for value in reply.values if isinstance(value, Missing)), None)
        if missing is None or self._cache.version is None:
            self._cache.version = reply.version
        return missing

    async def _first_start(self, replica: Replica) -> None:
        """Start a replica before the first step. Raises UserError if its reward cannot score then."""
        try:
            start = partial(self._warm_up, replica)
            await first_score(replica, start, self._settings, self._pause_s, self._start_deadline_s)
        except GONE as error:
            await self._replace(replica, f"{replica.label}: died during start: {first_line(error)}")

    async def _serve(self, replica: Replica) -> None:
        """Score batches on one replica until the pool drops the replica."""
        while (batch := await self._take()) is not None:
            failure = await self._attempt(replica, batch)
            if failure is None:
                continue
            why, lost = failure
            self._no_answer(batch, why)
            self._fail(batch.parts, why)
            if lost and not await self._replace(replica, why.detail):
                return
        self._replicas.remove(replica)
        replica.kill()
        log.info("%s: idle, so the pool goes back to %d replicas", replica.label, len(self._replicas))

    async def _take(self) -> Batch | None:
        """Wait for a batch to try. None: this replica is not needed."""
        while True:
            if not await self._filled() and len(self._replicas) > self._settings.least_replicas:
                return None
            pause = self._breaker.wait_s()
            if pause is not None:
                pause = max(pause, self._not_before - self._clock())
            if pause is None or pause > 0:
                await asyncio.sleep(min(pause or _LOOK_S, _LOOK_S))
                continue
            probe = self._breaker.opened is not None
            if batch := self._queue.take(len(self._replicas), probe=probe):
                self._breaker.probing = probe
                return batch

    async def _filled(self) -> bool:
        """Wait until something waits for a score. Returns False after a long time, in a pool that may shrink."""
        if not self._grows:
            return await self._queue.filled.wait()
        waiter = asyncio.ensure_future(self._queue.filled.wait())
        try:
            return bool((await asyncio.wait({waiter}, timeout=IDLE_S))[0])
        finally:
            waiter.cancel()

    async def _attempt(self, replica: Replica, batch: Batch) -> tuple[Missing, bool] | None:
        """Call a replica once. Returns None on success, else why the call failed and whether the replica is lost."""
        parts = batch.parts
        self._count_batch(parts, "calls")
        began = self._clock()
        span = self._recorder.begin(replica.label, self.name, "score", call=f"score of {size_of(parts)} images")
        try:
            picks, lists = [part.indices for part in parts], [part.call.requests for part in parts]
            reply = await replica.score(picks, lists, self._settings.deadline_s)
        except CallTimeout as error:
            self._count_batch(parts, "timeouts")
            return Missing("deadline", str(error)), True
        except GONE as error:
            age = self._clock() - began
            what = f"{replica.label}: died during score, {age:.1f} s after the call: {first_line(error)}"
            return Missing("died", what), True
        except RayError as error:
            self._breaker.probing = self._breaker.probing and not batch.probe  # it answers, though with an error
            self._meet(replica, parts, error)
            return None
        finally:
            self._totals["seconds"] += self._clock() - began
            self._recorder.end(span)
        if reply.broken is not None:
            return Missing("died", f"{replica.label}: {reply.broken}"), True
        if reply.unavailable is not None:
            after_s = min(reply.after_s, self._settings.deadline_s)
            self._not_before = max(self._not_before, self._clock() + after_s)
            return Missing("transport", f"{replica.label}: {reply.unavailable}"), False
        self._settle(replica, batch, reply)
        return None

    def _settle(self, replica: Replica, batch: Batch, reply: BatchReply) -> None:
        outcomes = [self._lines.named(value, replica.label) for value in reply.values]
        if not all(isinstance(outcome, Missing) for outcome in outcomes):
            self._cache.version = reply.version
        replica.failures = 0
        self._raised.clear()
        down = [why for why in outcomes if isinstance(why, Missing) and remedy_for(why)]
        if len(down) == len(outcomes):  # the reward itself has tried a service in vain
            self._no_answer(batch, down[0])
            if self._settings.required and self._breaker.opened is not None:
                self._wait(batch.parts)  # for scores, or for the end of the run
                return
        elif self._breaker.succeeded():
            log.warning("reward pool %s: answers again", self.name)
        rest = iter(outcomes)
        for part in batch.parts:
            part.settle([next(rest) for _ in part.indices], reply.version)

    # ---- failures ----------------------------------------------------------------------------------------------------

    def _meet(self, replica: Replica, batch: list[Part], error: RayError) -> None:
        """An exception in the replica. Another attempt would meet it again: so find the request that causes it.

        Its score is missing. All images of an odd prompt may fail like this, but if several prompts do and no score
        comes in between, it is a bug in the reward, and the `score` calls raise it.
        """
        cause = error.cause if isinstance(error, RayTaskError) else error
        lost = cause.object_ref_hex if isinstance(cause, ObjectLostError) else None
        if any(part.call.requests.hex() == lost for part in batch):
            for part in batch:
                if part.call.requests.hex() == lost:
                    part.call.fail(RequestsLostError(f"reward pool {self.name}: {first_line(cause)}"))
            self._queue.add(batch)  # for the others; those that have failed are dropped
            return
        if can_split(batch):
            self._lines.raised(error, replica.label, size_of(batch))
            self._count_batch(batch, "retries")
            for half in reversed(halves(batch)):  # the first half first and down to its end: a bug is soon told so
                self._queue.add_suspects(half, first=True)
            return
        self._raised.update(part.call for part in batch)
        if len(self._raised) >= BUGS_IN_A_ROW:
            for part in batch:
                part.call.fail(error)
            return
        what = f"{replica.label}: the reward raised {type(cause).__name__}: {first_line(cause)}"
        log.warning("%s; its score is missing; as the replica saw it: %s", what, error)
        self._give_up(batch, Missing("refused", what))

    def _fail(self, batch: list[Part], why: Missing) -> None:
        """Try the requests of a failed call again after a pause. Those with no attempts left are missing.

        Where one request may have made the process die or hang, the batch is tried again in halves. After a death that
        goes on until the request is alone, whatever the attempts: each takes minutes at most, and there are few.
        """
        if self._breaker.opened is not None:  # no attempt counts, but there is a limit to waiting
            self._wait(batch)
            return
        for part in batch:
            part.failures += 1
        split = why.reason == "died" and can_split(batch)
        over = [part for part in batch if part.failures > self._settings.retries and not split]
        for part in over:
            self._give_up([part], Missing(why.reason, f"{why.detail} (attempt {part.failures}, the last)"))
        left = [part for part in batch if part not in over]
        self._lines.tell(why, f"{size_of(left)} requests are tried again, {size_of(over)} are missing")
        if left:
            alone = why.reason in ("deadline", "died")
            self._again(halves(left) if alone else [left], alone=alone)

    def _again(self, batches: list[list[Part]], *, alone: bool) -> None:
        """Try batches again after a pause: each alone, or together with what else waits then."""
        every = [part for batch in batches for part in batch]
        self._count_batch(every, "retries")
        pause = self._pause_s(max(1, *(part.failures for part in every)))
        for batch in batches:
            asyncio.get_running_loop().call_later(pause, self._wait, batch, alone)

    def _pause_s(self, attempt: int, limit: float = MAX_BACKOFF_S) -> float:
        """The pause before another attempt. Shortened at random, so that not all ask again at the same moment."""
        return min(self._backoff_s * 2.0 ** min(attempt - 1, 30), limit) * self._jitter.uniform(0.5, 1)

    def _give_up(self, parts: Iterable[Part], why: Missing) -> None:
        for part in parts:
            part.settle([why] * len(part.indices))

    # ---- the open breaker --------------------------------------------------------------------------------------------

    def _no_answer(self, batch: Batch, why: Missing) -> None:
        if self._breaker.failed(why.detail, new=batch.new, probe=batch.probe):
            self._has_opened()

    def _has_opened(self) -> None:
        """The reward does not answer any more. What waits now, waits for its deadline at most."""
        limit = self._settings.deadline_s
        text = "reward pool %s does not answer; it gets a single request now and then, and %s; last: %s"
        end = "the run ends" if self._settings.required else "scores are missing"
        log.error(text, self.name, f"{end} if that lasts longer than {limit:g} s", self._breaker.last)
        asyncio.get_running_loop().call_later(limit, self._expire)

    def _wait(self, parts: list[Part], alone: bool = False) -> None:
        """Queue parts; while the breaker is open there is a limit to their waiting. alone: try them without others."""
        if self._breaker.opened is None:
            (self._queue.add_suspects if alone else self._queue.add)(parts)
            return
        self._queue.add(parts)
        ends = max(self._ends(part) for part in parts)
        asyncio.get_running_loop().call_later(max(0.0, ends - self._clock()), self._expire)

    def _ends(self, part: Part) -> float:
        """When a part that waits for the open breaker is missing."""
        return max(part.call.began, self._breaker.opened or 0.0) + self._settings.deadline_s

    def _expire(self) -> None:
        """Give up what has waited too long for an open breaker. If the reward is required, that ends the run.

        What nobody waits for ends nothing: without requests there are no probes, and the reward may be well again.
        """
        if self._breaker.opened is None:
            return
        now = self._clock() + 0.01  # timers may be early by the clock's resolution
        late = self._queue.remove(lambda part: part.call.done.done() or self._ends(part) <= now)
        late = [part for part in late if not part.call.done.done()]
        limit, last = f"{self._settings.deadline_s:g} s", f"last: {self._breaker.last}"
        if not self._settings.required:
            what = f"reward pool {self.name}: does not answer, waited for {limit}; {last}"
            self._give_up(late, Missing("transport", what))
        elif late:
            what = f"the reward has not answered for {limit}, and it is required"
            self._break(RewardPoolError(f"{self._settings.dotted('required')}: {what}; {last}"))

    # ---- how many replicas -------------------------------------------------------------------------------------------

    async def _replace(self, replica: Replica, reason: str) -> bool:
        """Replace a lost replica's actor with a new one. Returns False if the pool drops the replica instead.

        The last one is not dropped: without it the breaker is open, and the pool goes on trying, ever more rarely.
        """
        starting = not self._workers
        while True:
            if replica.failures >= self._max_restarts:
                if starting or (self._breaker.opened is None and (self._settings.required or len(self._replicas) > 1)):
                    break
                if self._breaker.open(reason):
                    self._has_opened()
            replica.failures += 1
            self._count("restarts")
            replica.replace()
            if replica.failures > 1:
                await asyncio.sleep(self._pause_s(replica.failures - 1, MAX_PAUSE_S))
            try:
                await self._warm_up(replica)
            except (CallTimeout, RayError, UserError) as error:
                if starting and not isinstance(error, (CallTimeout, *GONE)):
                    raise
                reason = f"{replica.label}: {first_line(error)}"
                log.warning("restart %d failed: %s", replica.failures, reason)
                continue
            return True
        replica.kill()
        self._replicas.remove(replica)
        log.error("%s is given up after %d restarts in a row; last: %s", replica.label, replica.failures, reason)
        if not self._replicas:
            raise RewardPoolError(f"reward pool {self.name} has no replica left; last: {reason}")
        return False

    def _grow_soon(self) -> None:
        """Add a replica if more waits than one call of each takes, and still does in a while."""
        if self._growing is None and self._crowded():
            self._growing = asyncio.get_running_loop().call_later(GROW_AFTER_S, self._grow)

    def _crowded(self) -> bool:
        count = len(self._replicas)
        may = self._grows and count < self._settings.most_replicas
        return may and self._queue.images > count * self._settings.batch_size

    def _grow(self) -> None:
        if self._crowded() and self._breaker.opened is None and self._broken is None:
            self._employ(self._add_replica(), "a new replica")
        else:
            self._growing = None

    async def _add_replica(self) -> None:
        replica = self._new_replica()
        try:
            await self._warm_up(replica)
        except (CallTimeout, RayError, UserError) as error:
            log.warning("%s could not be added while requests wait: %s", replica.label, first_line(error))
            replica.kill()
            return
        except asyncio.CancelledError:
            replica.kill()
            raise
        finally:
            self._growing = None
        self._replicas.append(replica)
        log.info("%s: added, because requests wait; the pool has %d replicas", replica.label, len(self._replicas))
        self._grow_soon()
        await self._serve(replica)

    def _new_replica(self) -> Replica:
        self._numbered += 1
        return self._make_replica(f"{self.name} reward #{self._numbered - 1}", self._settings, self._placement)

    def _employ(self, work: Coroutine[Any, Any, None], name: str) -> None:
        worker = asyncio.get_running_loop().create_task(work, name=name)
        worker.add_done_callback(self._worker_ended)
        self._workers.append(worker)

    def _count_batch(self, batch: list[Part], key: str) -> None:
        self._count(key, *{id(part.call): part.call.counters for part in batch}.values())

    def _worker_ended(self, worker: asyncio.Task[None]) -> None:
        if not worker.cancelled() and (error := worker.exception()) is not None:
            self._break(error)

    def _break(self, error: BaseException) -> None:
        """Mark the pool as broken: all open requests and all later `score` calls raise the error."""
        self._broken = self._broken or error
        for call in list(self._open):
            call.fail(error)


def _future() -> asyncio.Future[None]:
    return asyncio.get_running_loop().create_future()
