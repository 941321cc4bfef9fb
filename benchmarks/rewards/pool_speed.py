"""Reward pools beside each other, their cache, and what faults of a service cost.

- All rewards of the tiny world at once against the slowest of them alone. Where they share cores, the sum of their work
  counts; so the same with rewards that wait, as those on GPUs and behind services do.
- Scores that the cache has against as many look-ups in a dictionary.
- 10,000 scores of a service, a fifth of whose answers fail in the ways of tests/helpers/fault_server.py, against the
  same service without faults. Every one of them has a score or a reason.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.experience.reward_requests import request_key, reward_weights
from actors.experience.scoring.reward_pool import RewardPool
from actors.experience.scoring.reward_router import RewardRouter
from benchmarks.timing import Result, compare, recipe
from deepgen.config import Settings
from deepgen.config.schema.pools import make_pool
from deepgen.data.images import decode_image
from deepgen.data.parquet import read_records
from rewards import Missing, RewardRequest
from rewards.remote.protocol import read_question, write_answer
from tests.helpers.fault_server import FAULTS, fault_server

IMAGES, TRIES = 64, 4  # of the tiny world; to find the slowest reward
SLEEPS_S = (0.4, 0.3, 0.2, 0.1)
KEYS = 4000
SCORES, BATCH, REPLICAS = 10_000, 16, 12
CAPACITY, CALL_S = 4, 0.128  # calls that the service answers at once, and how long one takes
SHARE, TIMEOUT_S = 0.2, 2.0
FEW = 3  # repetitions of 10,000 scores
SLEEPING = "benchmarks.control_plane:SleepingReward"
PIXEL = np.zeros((8, 8, 3), dtype=np.uint8)


def results(weights: Path, repeats: int) -> Iterator[Result]:
    """One result for each question above."""
    yield asyncio.run(_tiny_rewards(recipe("tiny-rl", weights), repeats))
    yield asyncio.run(_waiting_rewards(repeats))
    yield asyncio.run(_cache_hits(repeats))
    yield asyncio.run(_faults(min(repeats, FEW)))


class _FromThread:
    """Calls coroutines of this loop from a thread, in which `compare` runs, because the pools need the loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()

    def call(self, work: Callable[[], Awaitable[Any]]) -> Callable[[], Any]:
        async def awaited() -> Any:
            return await work()

        return lambda: asyncio.run_coroutine_threadsafe(awaited(), self._loop).result()


async def _tiny_rewards(settings: Settings, repeats: int) -> Result:
    records = [r for r in read_records(settings.data.heldout) if isinstance(r.image, bytes)]
    by_task = {task: [r for r in records if r.task == task] for task in {r.task for r in records}}
    mixed = [r for rows in itertools.zip_longest(*by_task.values()) for r in rows if r is not None][:IMAGES]
    pictures = [RewardRequest(r.prompt, r.answer, r.task, decode_image(r.image or b"")) for r in mixed]
    asked = zip(mixed, pictures, strict=True)
    weighed = np.stack([reward_weights(settings.rewards, record, request, None) for record, request in asked])
    router, number = RewardRouter(settings, gpus=False), itertools.count()
    await router.start()

    async def score(only: int | None = None) -> None:
        pixel = next(number)  # another one in each picture's corner, so that the cache knows none of them
        requests = [replace(one, image=_marked(one.image, pixel)) for one in pictures]
        asked = weighed if only is None else weighed * (np.arange(len(router.names)) == only)
        await router.score(ray.put(requests), [request_key(one) for one in requests], asked, len(requests))

    try:
        alone = []
        for k in range(len(router.names)):
            alone.append(min([await _timed(score, k) for _ in range(TRIES)]))
        slowest, run = int(np.argmax(alone)), _FromThread()
        shapes = f"{len(pictures)} images; alone {_listed(router.names, alone)}"
        return await asyncio.to_thread(
            compare,
            f"{', '.join(router.names)} at once against {router.names[slowest]}",
            shapes,
            len(pictures),
            run.call(score),
            run.call(lambda: score(slowest)),
            repeats,
        )
    finally:
        router.stop()


async def _timed(work: Callable[..., Awaitable[Any]], *arguments: Any) -> float:
    begin = time.perf_counter()
    await work(*arguments)
    return time.perf_counter() - begin


def _marked(image: np.ndarray, number: int) -> np.ndarray:
    marked = image.copy()
    marked[0, 0] = number // 65536 % 256, number // 256 % 256, number % 256
    return marked


def _listed(names: Sequence[str], times: Sequence[float]) -> str:
    return ", ".join(f"{name} {1000 * took:.0f} ms" for name, took in zip(names, times, strict=True))


async def _waiting_rewards(repeats: int) -> Result:
    pools = [_pool(f"waits-{n}", {"class": SLEEPING, "batch_s": s}, cache=0) for n, s in enumerate(SLEEPS_S)]
    await asyncio.gather(*(pool.start() for pool in pools))
    requests, keys = ray.put(_pixels(IMAGES)), _keys(IMAGES)

    async def score(which: Sequence[RewardPool]) -> None:
        await asyncio.gather(*(pool.score(requests, keys) for pool in which))

    run = _FromThread()
    try:
        return await asyncio.to_thread(
            compare,
            "four rewards that wait against the slowest",
            f"{IMAGES} images; {', '.join(f'{s:g} s' for s in SLEEPS_S)}",
            IMAGES,
            run.call(lambda: score(pools)),
            run.call(lambda: score(pools[:1])),
            repeats,
        )
    finally:
        for pool in pools:
            pool.stop()


async def _cache_hits(repeats: int) -> Result:
    pool = _pool("known", {"class": SLEEPING, "batch_s": 0.0}, cache=KEYS)
    await pool.start()
    requests, keys = ray.put(_pixels(KEYS)), _keys(KEYS)
    first = await pool.score(requests, keys)
    known = {key: value for key, value in zip(keys, first.values, strict=True) if key is not None}
    run = _FromThread()
    try:
        return await asyncio.to_thread(
            compare,
            "scores that the cache has against a dictionary",
            f"{KEYS} keys; a sample is 1000 of them",
            KEYS // 1000,
            run.call(lambda: pool.score(requests, keys)),
            lambda: [known[key] for key in keys if key is not None],
            repeats,
        )
    finally:
        pool.stop()


class FaultyService:
    """A service in a process of its own. It answers CAPACITY calls at once; a share of its answers fails."""

    def __init__(self) -> None:
        self._turns = threading.Semaphore(CAPACITY)
        self._running = fault_server(self._answer, faults=FAULTS, retry_after="0", late_s=10.0, pause_s=1.0)
        self._server = self._running.__enter__()

    def _answer(self, path: str, body: bytes) -> Any:
        requests = [one for one in read_question(body) if not isinstance(one, Missing)]
        with self._turns:
            time.sleep(CALL_S * len(requests) / BATCH)
        return json.loads(write_answer([float(one.image[0, 0, 0]) for one in requests]))

    def url(self) -> str:
        return self._server.url

    def fail(self, rate: float) -> None:
        """From now on a request fails with this chance."""
        self._server.rate = rate


async def _faults(repeats: int) -> Result:
    service = ray.remote(num_cpus=0.05)(FaultyService).remote()
    options = {"class": "remote", "url": await service.url.remote(), "timeout_s": TIMEOUT_S, "deadline_s": 30.0}
    pool = _pool("far", options | {"batch_size": BATCH, "replicas": REPLICAS}, cache=0)
    await pool.start()
    size = 8  # a group
    requests, keys, lost = ray.put(_pixels(size)), _keys(size), dict[float, float]()

    async def score(rate: float) -> None:
        await service.fail.remote(rate)
        found = await asyncio.gather(*(pool.score(requests, keys) for _ in range(SCORES // size)))
        asked, scored, missing = (sum(one.counters[key] for one in found) for key in ("asked", "scored", "missing"))
        assert asked == SCORES == scored + missing, (asked, scored, missing)
        lost[rate] = missing / asked

    run = _FromThread()
    try:
        result = await asyncio.to_thread(
            compare,
            f"a service with {SHARE:.0%} faults against itself without",
            f"{SCORES:,} scores, {BATCH} a call of {1000 * CALL_S:.0f} ms, {CAPACITY} at once, {REPLICAS} replicas",
            SCORES,
            run.call(lambda: score(SHARE)),
            run.call(lambda: score(0.0)),
            repeats,
        )
        told = f"missing {lost[SHARE]:.1%} with, {lost[0.0]:.1%} without"
        return replace(result, shapes=f"{result.shapes}; {told}")
    finally:
        pool.stop()
        ray.kill(service)


def _pool(name: str, content: dict[str, Any], *, cache: int) -> RewardPool:
    return RewardPool(make_pool(name, content), cache_size=cache)


def _pixels(count: int) -> list[RewardRequest]:
    return [RewardRequest("a cat", "", "t2i", PIXEL)] * count


def _keys(count: int) -> list[bytes | None]:
    return [number.to_bytes(16, "big") for number in range(count)]
