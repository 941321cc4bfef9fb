"""Which rewards judge which image: routing by task and prompt, all rewards of an image at once.

A reward without weight for a prompt, or one that can't say anything about it (OCR without quoted words), is never
called. A score that could not be had is NaN. Left out: retries, deadlines and caches (`actors.experience.reward_pool`).
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
from rewards import RewardRequest, applies


class RewardRouter:
    """The reward pools of a run. `names` are its rewards, in the order of all score columns (K of them)."""

    def __init__(self, settings: Settings, *, gpus: bool) -> None:
        self.names = settings.rewards.used()
        self._weights = settings.rewards.weights
        self._settings = settings.rewards.pools
        self._pools = {
            name: RewardPool(self._settings[name], gpus=gpus, start_deadline_s=settings.cluster.start_deadline_s)
            for name in self.names
        }

    async def start(self) -> None:
        """Start all pools at once; returns when every one can score."""
        await asyncio.gather(*(pool.start() for pool in self._pools.values()))

    def stop(self) -> None:
        """End all pools."""
        for pool in self._pools.values():
            pool.stop()

    def weights(self, record: Record) -> np.ndarray:
        """Weight of each reward for a prompt, float32 [K]; 0 = not called."""
        return np.array([self._weight(name, record) for name in self.names], dtype=np.float32)

    async def score(self, items: Sequence[tuple[Record, np.ndarray]]) -> np.ndarray:
        """Scores float32 [N, K] of N (prompt, uint8 [H, W, 3]) pairs; NaN where not asked or not to be had."""
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
        """What the pools count, as metrics."""
        return {
            f"pool/{name}/{key}": float(value)
            for name, pool in self._pools.items()
            for key, value in pool.counters().items()
        }

    def _weight(self, name: str, record: Record) -> float:
        weight = self._weights.get(record.task, {}).get(name, 0.0)
        return weight if weight and applies(self._settings[name], _request(record, _NO_IMAGE)) else 0.0


_NO_IMAGE = np.zeros((1, 1, 3), dtype=np.uint8)  # whether a reward applies is decided before anything is drawn


def _request(record: Record, image: np.ndarray) -> RewardRequest:
    references = tuple(_decoded(data) for data in record.references)
    return RewardRequest(record.prompt, record.answer, record.task, image, references)


@functools.lru_cache(maxsize=256)
def _decoded(data: bytes) -> np.ndarray:
    return decode_image(data)
