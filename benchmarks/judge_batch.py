"""The cost of judge scores that do not depend on the batch (`rewards.judge.batch_size=1`).

Ours: the tiny world's judge with that setting. Floor: the same judge with the default batch size. Both score the
same images, in reward pools as in a run. The table also says by how much the floor's scores move when the same images
come in another batch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import ray

from actors.experience.reward_requests import request_key
from actors.experience.scoring.reward_pool import RewardPool
from benchmarks.timing import Result, compare, recipe
from deepgen.cluster.private import start_private
from deepgen.config.schema.pools import make_pool
from deepgen.data.images import decode_image
from deepgen.data.parquet import read_records
from rewards import RewardRequest

IMAGES = 64


def run(weights: Path, repeats: int, threads: int) -> list[Result]:
    """One result. Starts a local Ray for its two pools; vLLM uses one thread whatever `threads` says."""
    start_private(2, log_to_driver=False)
    try:
        return [asyncio.run(_measure(weights, repeats))]
    finally:
        ray.shutdown()


async def _measure(weights: Path, repeats: int) -> Result:
    settings = recipe("tiny-rl", weights)
    records = [record for record in read_records(settings.data.heldout) if isinstance(record.image, bytes)][:IMAGES]
    requests = [RewardRequest(r.prompt, r.answer, r.task, decode_image(r.image or b"")) for r in records]
    options = settings.rewards.pools["judge"].model_dump()
    batched, single = (
        RewardPool(make_pool("judge", options | {"batch_size": size}), cache_size=0) for size in (IMAGES, 1)
    )
    await asyncio.gather(batched.start(), single.start())
    moved = np.abs(await _scores(batched, requests, IMAGES) - await _scores(batched, requests, 5)).max()
    loop = asyncio.get_running_loop()

    def scored_by(pool: RewardPool) -> None:
        asyncio.run_coroutine_threadsafe(_scores(pool, requests, IMAGES), loop).result()

    # In a thread: the pools need this one's event loop meanwhile.
    result = await asyncio.to_thread(
        compare,
        "judge, batch_size 1",
        f"{len(requests)} images; batches of 5 instead of {IMAGES} move the floor's scores by up to {moved:.0e}",
        len(requests),
        lambda: scored_by(single),
        lambda: scored_by(batched),
        repeats,
    )
    batched.stop()
    single.stop()
    return result


async def _scores(pool: RewardPool, requests: Sequence[RewardRequest], size: int) -> np.ndarray:
    """Scores [N], asked for `size` at a time."""
    parts = [list(requests[i : i + size]) for i in range(0, len(requests), size)]
    scored = [await pool.score(ray.put(part), [request_key(request) for request in part]) for part in parts]
    return np.array([value for scores in scored for value in scores.values], dtype=np.float64)
