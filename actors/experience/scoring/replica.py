"""One replica of a reward pool: an actor that hosts the reward, calls of it with a deadline, and its replacement."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
import ray

from actors.messages import BatchReply
from deepgen.config import PoolSettings
from rewards import Missing, RewardRequest, RewardUnavailable, Score, build_reward, is_groupwise

_DETAIL = 1000  # letters of why a score is missing, which may be what a service or a judge wrote
_LARGEST = float(np.finfo(np.float32).max)


class CallTimeout(TimeoutError):
    """A remote call passed its deadline; the message names actor, call and age."""


class RewardActor:
    """Hosts one reward in its own Ray process. `start` builds the reward, so its errors reach the caller unchanged."""

    def __init__(self, settings: PoolSettings) -> None:
        self._settings = settings

    def start(self, check: list[RewardRequest]) -> Missing | None:
        """Load the reward and score the images of `check`, which are one prompt's. Returns why a score is missing.

        So no real request pays the extra time of a first call, and a reward that cannot score is found now.
        """
        self._reward = build_reward(self._settings)
        try:
            values = self._scores([check]) if check else []
        except RewardUnavailable as error:
            return Missing("transport", str(error) or "unavailable")
        return next((found for found in map(_finite, values) if isinstance(found, Missing)), None)

    def score(self, picks: list[list[int]], *lists: list[RewardRequest]) -> BatchReply:
        """Score the requests of each list that the same place of `picks` names. Ray has read the lists already."""
        parts = [[listed[index] for index in picked] for picked, listed in zip(picks, lists, strict=True)]
        try:
            values = self._scores(parts)
        except RewardUnavailable as error:
            return BatchReply([], str(error) or "unavailable", error.after_s)
        return BatchReply([_finite(value) for value in values])

    def _scores(self, parts: list[list[RewardRequest]]) -> list[Score]:
        """The scores of all requests in a row. For a reward that compares images, each part is one prompt's images."""
        asked = [request for part in parts for request in part]
        if not is_groupwise(self._settings):
            values = list(self._reward.score(asked))
        else:
            groups = self._reward.score_groups(parts)  # type: ignore[attr-defined]
            sizes, wanted = [len(group) for group in groups], [len(part) for part in parts]
            if sizes != wanted:
                raise ValueError(f"{self._settings.class_} returned {sizes} scores for groups of {wanted} requests")
            values = [value for group in groups for value in group]
        if len(values) != len(asked):
            raise ValueError(f"{self._settings.class_} returned {len(values)} scores for {len(asked)} requests")
        return values


class Replica:
    """An actor of a pool, and the one that takes its place. `resources`: what Ray reserves for it."""

    def __init__(self, label: str, settings: PoolSettings, resources: dict[str, float]) -> None:
        self.label = label
        self.failures = 0  # restarts since the last successful call
        self._settings, self._resources = settings, resources
        self.actor = self._create()

    def _create(self) -> Any:
        return ray.remote(RewardActor).options(**self._resources).remote(self._settings)

    async def start(self, check: list[RewardRequest], deadline_s: float) -> Missing | None:
        missing: Missing | None = await self._answer(self.actor.start.remote(check), "start", deadline_s)
        return missing

    async def score(self, picks: list[list[int]], lists: list[ray.ObjectRef], deadline_s: float) -> BatchReply:
        reply: BatchReply = await self._answer(self.actor.score.remote(picks, *lists), "score", deadline_s)
        return reply

    def kill(self) -> None:
        ray.kill(self.actor)

    def replace(self) -> None:
        """Kill the actor, as one that hangs still holds memory, and put a new one, not yet started, in its place."""
        self.kill()
        self.actor = self._create()

    async def _answer(self, reference: ray.ObjectRef, call: str, deadline_s: float) -> Any:
        """The result of a remote call. Raises `CallTimeout` if it is late."""
        future = asyncio.wrap_future(reference.future())
        # After a timeout nothing awaits the future. asyncio would then log its exception unless this callback reads it.
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        began = time.monotonic()
        finished, _ = await asyncio.wait({future}, timeout=deadline_s)
        if not finished:
            age = time.monotonic() - began
            late = f"call {call!r} has not answered after {age:.1f} s (deadline {deadline_s:g} s)"
            raise CallTimeout(f"{self.label}: {late}")
        return future.result()


def _finite(value: Score) -> float | Missing:
    """A score as it is; `Missing`, with a bounded text, for none and for one that fp32, as scores travel, cannot hold.

    NaN or infinity must not reach the cache or the mean of a group.
    """
    if isinstance(value, Missing):
        return Missing(value.reason, str(value.detail)[:_DETAIL])
    if value is None or not abs(value) <= _LARGEST:
        return Missing("parse", "the reward gave no finite score")
    return float(value)
