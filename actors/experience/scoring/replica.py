"""One replica of a reward pool: an actor that hosts the reward, calls of it with a deadline, and its replacement."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from typing import Any

import numpy as np
import ray

from actors.messages import BatchReply
from deepgen.cluster.own_environment import OwnEnvironment, own_environment
from deepgen.cluster.resources import Placement
from deepgen.config import PoolSettings
from deepgen.errors import UserError
from deepgen.monitoring.log_lines import Speaker, set_up_logs
from rewards import Missing, RewardBroken, RewardRequest, RewardUnavailable, Score, build_reward, is_groupwise, is_truth

log = logging.getLogger(__name__)

_DETAIL = 1000  # letters of why a score is missing, which may be what a service or a judge wrote
_LARGEST = float(np.finfo(np.float32).max)
_NODES = 8  # tries to have a process in a reward's own environment
_GRACE_S = 10.0  # for an actor to say that its node could not make one in time


class CallTimeout(TimeoutError):
    """A remote call passed its deadline; the message names actor, call and age."""


class FirstCallTimeout(CallTimeout):
    """The reward is loaded, but its first call passed its deadline."""


class RewardActor:
    """Hosts one reward in its own Ray process. `start` builds the reward, so its errors reach the caller unchanged."""

    def __init__(self, settings: PoolSettings, label: str) -> None:
        set_up_logs(Speaker("reward", label))
        self._settings = settings
        self._reward: Any = None

    def enter(self, environment: OwnEnvironment, deadline_s: float) -> bool:
        """Make the reward's environment on this node. Returns whether this process runs in it."""
        if environment.is_here():
            return True
        environment.make(deadline_s)
        return False

    def start(self) -> None:
        """Load the reward. Called again, it does nothing."""
        self._reward = self._reward or build_reward(self._settings)

    def first(self, check: list[RewardRequest]) -> BatchReply:
        """Score the images of `check`, which are one prompt's.

        So no real request pays the extra time of a first call, and a reward that cannot score is found now.
        """
        return self._reply([check] if check else [])

    def score(self, picks: list[list[int]], *lists: list[RewardRequest]) -> BatchReply:
        """Score the requests of each list that the same place of `picks` names. Ray has read the lists already."""
        try:
            return self._reply(
                [[listed[index] for index in picked] for picked, listed in zip(picks, lists, strict=True)]
            )
        except RewardBroken as error:
            log.exception("%s is broken; its process is replaced", self._settings.pool_name)
            return BatchReply([], broken=str(error) or "broken")

    def _reply(self, parts: list[list[RewardRequest]]) -> BatchReply:
        try:
            values = self._scores(parts) if parts else []
        except RewardUnavailable as error:
            return BatchReply([], str(error) or "unavailable", error.after_s)
        return BatchReply([_finite(value) for value in values], version=getattr(self._reward, "version", None))

    def _scores(self, parts: list[list[RewardRequest]]) -> list[Score]:
        """The scores of all requests in a row. For a reward that compares images, each part is one prompt's images."""
        asked = [request for part in parts for request in part]
        if not is_groupwise(self._settings):
            values = list(self._reward.score(asked))
        else:
            groups = self._reward.score_groups(parts)
            sizes, wanted = [len(group) for group in groups], [len(part) for part in parts]
            if sizes != wanted:
                raise ValueError(f"{self._settings.class_} returned {sizes} scores for groups of {wanted} requests")
            values = [value for group in groups for value in group]
        if len(values) != len(asked):
            raise ValueError(f"{self._settings.class_} returned {len(values)} scores for {len(asked)} requests")
        return values


class Replica:
    """An actor of a pool, and the one that takes its place."""

    def __init__(self, label: str, settings: PoolSettings, placement: Placement) -> None:
        self.label = label
        self.failures = 0  # restarts since the last successful call
        self._settings, self._placement = settings, placement
        self._environment = own_environment(settings)
        self.actor = self._create()

    def _create(self) -> Any:
        runtime = {"runtime_env": self._environment.runtime_env()} if self._environment else {}
        return (
            ray.remote(RewardActor).options(**self._placement.options(), **runtime).remote(self._settings, self.label)
        )

    async def start(self, check: list[RewardRequest], end: float, first_s: float) -> BatchReply:
        """Load the reward and have it score a first time; before that, make its own environment, if it has one.

        end: of all this, by the event loop's clock. first_s: for the first score; a reward may load for far longer.
        Raises CallTimeout; FirstCallTimeout if the reward was loaded.
        """
        if self._environment is not None:
            await self._enter(self._environment, _left(end))
        await self._answer(self.actor.start.remote(), "start", _left(end))
        try:
            reply: BatchReply = await self._answer(
                self.actor.first.remote(check), "first score", min(first_s, _left(end))
            )
        except CallTimeout as late:
            raise FirstCallTimeout(str(late)) from late
        return reply

    async def score(self, picks: list[list[int]], lists: list[ray.ObjectRef], deadline_s: float) -> BatchReply:
        reply: BatchReply = await self._answer(self.actor.score.remote(picks, *lists), "score", deadline_s)
        return reply

    def kill(self) -> None:
        ray.kill(self.actor)

    def replace(self) -> None:
        """Kill the actor, as one that hangs still holds memory, and put a new one, not yet started, in its place."""
        self.kill()
        self.actor = self._create()

    async def _enter(self, environment: OwnEnvironment, deadline_s: float) -> None:
        """Have a process in the reward's environment. One of a node without it makes it, and a new one takes its place.

        That may be on another node, without it again. Raises UserError if it cannot be made or is never used.
        """
        for _ in range(_NODES):
            asked = self.actor.enter.remote(environment, deadline_s)
            if await self._answer(asked, "environment", deadline_s + _GRACE_S):
                return
            self.replace()
        raise UserError(f"{environment.key}: Ray starts no process in {environment.folder}; after {_NODES} tries")

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


def _left(end: float) -> float:
    return max(0.0, end - asyncio.get_running_loop().time())


def _finite(value: Score) -> float | Missing:
    """A score as it is; `Missing`, with a bounded text, for none and for one that fp32, as scores travel, cannot hold.

    NaN or infinity must not reach the cache or the mean of a group.
    """
    if isinstance(value, Missing):
        return replace(value, detail=str(value.detail)[:_DETAIL])
    if is_truth(value):
        return Missing("parse", f"the reward gave {value}, which is no number")
    if value is None or not abs(value) <= _LARGEST:
        return Missing("parse", "the reward gave no finite score")
    return float(value)
