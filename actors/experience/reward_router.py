"""Chooses the rewards for each image by task and prompt, and calls them all at once.

A reward is never called for a prompt if its weight there is 0 or if it does not apply (OCR without quoted words). A
missing score is NaN. `actors.experience.reward_pool` handles retries, deadlines and caches.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence

import numpy as np

from actors.experience.reward_pool import RewardPool
from deepgen.config import Settings
from deepgen.data.images import decode_image
from deepgen.data.records import Record
from deepgen.tracking.timeline import Recorder
from rewards import RewardRequest, applies


class RewardRouter:
    """The reward pools of a run. `names`: the K rewards, in the order of the score columns.

    Calls of the pools' replicas are spans in `recorder`.
    """

    def __init__(self, settings: Settings, *, gpus: bool, recorder: Recorder | None = None) -> None:
        self.names = settings.rewards.used()
        self._weights = settings.rewards.weights
        self._settings = settings.rewards.pools
        deadline = settings.cluster.start_deadline_s
        self._pools = {
            name: RewardPool(self._settings[name], gpus=gpus, start_deadline_s=deadline, recorder=recorder)
            for name in self.names
        }

    async def start(self) -> None:
        """Start all pools at once. Returns when every pool can score."""
        await asyncio.gather(*(pool.start() for pool in self._pools.values()))

    def stop(self) -> None:
        """Stop all pools."""
        for pool in self._pools.values():
            pool.stop()

    def weights(self, record: Record) -> np.ndarray:
        """Weight of each reward for a prompt, float32 [K]; 0 = never called."""
        return np.array([self._weight(name, record) for name in self.names], dtype=np.float32)

    async def score(self, items: Sequence[tuple[Record, np.ndarray]]) -> np.ndarray:
        """Scores, float32 [N, K], of N pairs (prompt, uint8 [H, W, 3] image); NaN if missing or not asked for."""
        requests = [_request(record, image) for record, image in items]
        scores = np.full((len(items), len(self.names)), np.nan, dtype=np.float32)
        weights = np.stack([self.weights(record) for record, _ in items])  # [N, K]

        async def one(k: int, name: str) -> None:
            rows = np.flatnonzero(weights[:, k])
            if rows.size:
                result = await self._pools[name].score([requests[row] for row in rows])
                scores[rows, k] = [np.nan if value is None else value for value in result.values]

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

    def _weight(self, name: str, record: Record) -> float:
        weight = self._weights.get(record.task, {}).get(name, 0.0)
        return weight if weight and applies(self._settings[name], _request(record, _NO_IMAGE)) else 0.0


_NO_IMAGE = np.zeros((1, 1, 3), dtype=np.uint8)  # `applies` is asked before any image exists


def _request(record: Record, image: np.ndarray) -> RewardRequest:
    references = tuple(_decoded(data) for data in record.references)
    return RewardRequest(record.prompt, record.answer, record.task, image, references)


@functools.lru_cache(maxsize=256)
def _decoded(data: bytes) -> np.ndarray:
    return decode_image(data)
