"""Calls of a reward pool with requests that the calling process has made."""

from __future__ import annotations

from collections.abc import Sequence

import ray

from actors.experience.reward_requests import request_key
from actors.experience.scoring.pool_parts import RewardScores
from actors.experience.scoring.reward_pool import RewardPool
from rewards import RewardRequest, applies


async def score(pool: RewardPool, requests: Sequence[RewardRequest]) -> RewardScores:
    """The scores of the requests, in their order."""
    keys = [request_key(request) if applies(pool._settings, request) else None for request in requests]
    return await pool.score(ray.put(list(requests)), keys)
