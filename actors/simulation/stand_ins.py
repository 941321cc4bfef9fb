"""Rollout actors and reward replicas that only take time, as the fleet and the pools call them, and nodes that die.

An actor works on its calls one after the other, as a Ray actor does. A node's death ends the calls of all that is on
it, and the pictures and trajectories that lie there are lost; the actors answer again after `Phases.revive_s`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from actors.experience.scoring.replica import Replica
from actors.messages import BatchReply, Group, PolicyWeights
from deepgen.config import PoolSettings
from deepgen.config.schema.reward_weights import weight_at
from deepgen.config.schema.sections import RewardSettings
from deepgen.planning.scale.phases import CallTime, Phases

_ROUNDING_S = 1e-6  # timers may be early by the rounding of the time
_CALL_S = 1e-3  # until a caller knows that an actor is gone


@dataclass(eq=False)
class Node:
    """A machine. `lives` counts how often it has died; `back` is when what was on it answers again."""

    name: str
    lives: int = 0
    back: float = -math.inf
    dying: list[Callable[[], None]] = field(default_factory=list)  # what its death does to those on it

    def wait_s(self) -> float:
        """Seconds until what is on it answers; 0 while it lives."""
        wait = self.back - _now()
        return wait if wait > _ROUNDING_S else 0.0

    def die(self, revive_s: float) -> None:
        """End everything on it, now; it is back after `revive_s`."""
        self.lives += 1
        self.back = _now() + revive_s
        for end in self.dying:
            end()


@dataclass(frozen=True)
class StoredObject:
    """Stands for a reference to an object on a node."""

    node: Node
    life: int
    name: str

    @property
    def lost(self) -> bool:
        return self.node.lives != self.life

    def hex(self) -> str:
        """What tells it from others, as of Ray's references."""
        return self.name


class Control:
    """The stream's process: it works on one group after the other, `control_s` on each."""

    def __init__(self, control_s: float) -> None:
        self._control_s, self._free = control_s, 0.0

    def after(self, moment: float) -> float:
        """When it is done with what reaches it at `moment`; calls come in the order of their moments."""
        self._free = max(self._free, moment) + self._control_s
        return self._free


class Asked:
    """Which rewards a prompt of a task is scored by, whatever it says."""

    def __init__(self, rewards: RewardSettings) -> None:
        self._rewards = rewards
        self._names, self._held_out = rewards.used(), rewards.held_out()
        self._known: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def weights(self, task: str) -> tuple[np.ndarray, np.ndarray]:
        """Weights of the used rewards, float32 [K]: of those that train, and of those that are held out."""
        if task not in self._known:
            row = self._rewards.weights_of(task, "")
            trained = [weight_at(row.get(name, 0.0), None) for name in self._names]
            watched = [self._held_out.get(name, 0.0) for name in self._names]
            self._known[task] = np.array(trained, dtype=np.float32), np.array(watched, dtype=np.float32)
        return self._known[task]

    def shares(self, tasks: Sequence[str]) -> dict[str, float]:
        """Share of the prompts that each reward scores, by pool. tasks: of the prompts."""
        asked = np.stack([sum(self.weights(task)) > 0 for task in tasks]).mean(axis=0)
        return dict(zip(self._names, map(float, asked), strict=True))


class TimedActor:
    """Looks like the handle of a `RolloutActor`. `name` tells its objects from others'."""

    def __init__(self, name: str, node: Node, phases: Phases, asked: Asked, images: int, control: Control) -> None:
        self._name, self._node, self._phases, self._images, self._control = name, node, phases, images, control
        self._asked = asked
        self._holds, self._free, self._drawn = 0, 0.0, 0  # version, when it has done its calls, objects so far
        self._open: set[asyncio.Future[Any]] = set()
        self._timers: set[asyncio.TimerHandle] = set()
        node.dying.append(self._die)
        self.ready = SimpleNamespace(remote=self._ready)
        self.prefetch = _Method(lambda published: self._answer(0.0, None))
        self.sample_group = _Method(self._sample_group)

    def _ready(self) -> asyncio.Future[str]:
        return self._answer(self._node.wait_s(), self._node.name)

    def _sample_group(self, group: Group, policy: PolicyWeights | None, *sources: Any) -> tuple[Any, ...]:
        loop, version = asyncio.get_running_loop(), policy.version if policy else 0
        answer: asyncio.Future[Group] = loop.create_future()
        requests, trajectory = self._object(), self._object()
        if self._node.wait_s():
            loop.call_later(_CALL_S, _fail, answer)
            return answer, requests, trajectory
        seconds = self._phases.sample_s + (self._phases.load_s if version != self._holds else 0.0)
        self._holds = version
        self._free = max(self._free, loop.time()) + seconds
        weights, held_out = self._asked.weights(group.record.task)
        drawn = replace(
            group,
            version=version,
            reward_weights=weights,
            held_out_weights=held_out,
            keys=tuple(f"{group.number}/{image}".encode() for image in range(self._images)),
        )
        self._open.add(answer)

        def finished() -> None:
            loop.call_at(self._control.after(loop.time()), _settle, answer, drawn)
            self._open.discard(answer)

        self._timers.add(loop.call_at(self._free, finished))
        self._timers = {timer for timer in self._timers if timer.when() > loop.time()}
        return answer, requests, trajectory

    def _object(self) -> StoredObject:
        self._drawn += 1
        return StoredObject(self._node, self._node.lives, f"{self._name}/{self._drawn}")

    def _answer(self, seconds: float, value: Any) -> asyncio.Future[Any]:
        loop = asyncio.get_running_loop()
        answer = loop.create_future()
        loop.call_later(seconds, _settle, answer, value)
        return answer

    def _die(self) -> None:
        for timer in self._timers:
            timer.cancel()
        for answer in self._open:
            _fail(answer)
        self._open, self._timers = set(), set()
        self._holds, self._free = -1, 0.0


class _Method:
    """A method of an actor handle."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.remote = call

    def options(self, **options: Any) -> _Method:
        return self


class TimedReplica(Replica):
    """A replica whose calls take the time of a `CallTime`. Scores are numbers that differ within a group."""

    def __init__(self, label: str, settings: PoolSettings, placement: Any, *, node: Node, time: CallTime) -> None:
        self._node, self._time = node, time
        self._open: set[Future[BatchReply]] = set()
        node.dying.append(self._die)
        super().__init__(label, settings, placement)

    def kill(self) -> None:
        """Nothing holds memory here."""

    def _create(self) -> Any:
        return SimpleNamespace(start=_Method(self._start), first=_Method(self._first), score=_Method(self._score))

    def _start(self) -> Any:
        return self._later(self._node.wait_s(), BatchReply([]))

    def _first(self, check: Sequence[Any]) -> Any:
        return self._later(0.0, BatchReply([0.0] * len(check)))

    def _score(self, picks: list[list[int]], *lists: StoredObject) -> Any:
        lost = next((listed for listed in lists if listed.lost), None)
        if lost is not None:
            gone = ObjectLostError(lost.hex(), b"", "")
            return _failed(RayTaskError("score", f"{lost.hex()} is lost", gone))
        if self._node.wait_s():
            return _failed(RayActorError())
        values: list[Any] = [float(index) for picked in picks for index in picked]
        return self._later(self._time.of(len(values)), BatchReply(values))

    def _later(self, seconds: float, reply: BatchReply) -> Any:
        future: Future[BatchReply] = Future()
        self._open.add(future)

        def finished() -> None:
            self._open.discard(future)
            if not future.done():
                future.set_result(reply)

        asyncio.get_running_loop().call_later(seconds, finished)
        return SimpleNamespace(future=lambda: future)

    def _die(self) -> None:
        for future in self._open:
            if not future.done():
                future.set_exception(RayActorError())
        self._open = set()


def _now() -> float:
    return asyncio.get_running_loop().time()


def _settle(answer: asyncio.Future[Any], value: Any) -> None:
    if not answer.done():
        answer.set_result(value)


def _fail(answer: asyncio.Future[Any]) -> None:
    if not answer.done():
        answer.set_exception(RayActorError())
        answer.exception()  # read: the fleet does not await a call that it takes back


def _failed(error: Exception) -> Any:
    future: Future[Any] = Future()
    future.set_exception(error)
    return SimpleNamespace(future=lambda: future)
