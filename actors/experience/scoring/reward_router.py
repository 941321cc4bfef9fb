"""Calls all rewards of each image at once: those that have a weight for its prompt.

A missing score is NaN. `actors.experience.scoring.reward_pool` handles retries, deadlines and caches,
`actors.experience.reward_requests` says which rewards a prompt has.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import numpy as np
import ray

from actors.experience.journal.origin import JOURNAL
from actors.experience.scoring.replica import Replica
from actors.experience.scoring.reward_pool import RewardPool
from deepgen.cluster.resources import pool_placement
from deepgen.config import Settings
from deepgen.config.settings import TASKS
from deepgen.tracking.timeline import Recorder


class RewardRouter:
    """The reward pools of a run. `names`: the K rewards, in the order of the score columns.

    Calls of the pools' replicas are spans in `recorder`. `replica` makes them.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        gpus: bool,
        recorder: Recorder | None = None,
        replica: Callable[..., Replica] = Replica,
    ) -> None:
        self.names = settings.rewards.used()
        journal = settings.run.folder / JOURNAL if settings.experience.journal else None
        self._pools = {
            name: RewardPool(
                settings.rewards.pools[name],
                placement=pool_placement(settings.cluster, settings.rewards.pools[name], gpus=gpus),
                start_deadline_s=settings.cluster.start_deadline_s,
                recorder=recorder,
                journal=journal,
                runs=settings.run.dir,
                replica=replica,
                tasks=settings.rewards.tasks_of(name) or TASKS,  # held out: of all
            )
            for name in self.names
        }

    async def start(self) -> None:
        """Start all pools at once. Returns when every pool can score. Raises UserError that names one that cannot."""
        try:
            await asyncio.gather(*(pool.start() for pool in self._pools.values()))
        except BaseException:
            self.stop()  # the others as well, whatever they have started by then
            raise

    def stop(self) -> None:
        """Stop all pools."""
        for pool in self._pools.values():
            pool.stop()

    async def score(
        self, requests: ray.ObjectRef, keys: Sequence[bytes | None], weights: np.ndarray, group: int | None = None
    ) -> np.ndarray:
        """Scores, float32 [N, K], of the N requests behind a reference; NaN if missing or not asked for.

        keys, weights [N, K]: of the requests (`actors.experience.reward_requests`), here those of training and of
        holding out together. One without a key or a weight is not asked.
        group: images of one prompt, side by side; None: all N.
        """
        scores = np.full(weights.shape, np.nan, dtype=np.float32)

        async def one(k: int, name: str) -> None:
            asked = [key if weight else None for key, weight in zip(keys, weights[:, k].tolist(), strict=True)]
            result = await self._pools[name].score(requests, asked, group)
            scores[:, k] = [np.nan if value is None else value for value in result.values]

        await asyncio.gather(*(one(k, name) for k, name in enumerate(self.names)))
        return scores

    def counters(self) -> dict[str, float]:
        """The pools' counters, as metrics."""
        return {
            f"pool/{name}/{key}": float(value)
            for name, pool in self._pools.items()
            for key, value in pool.counters().items()
        }

    def open_requests(self) -> dict[str, int]:
        """Images that each pool has still to score."""
        return {name: pool.open_requests() for name, pool in self._pools.items()}
