"""Replicas of a reward pool inside the test's own process: no Ray, so a test of many faults takes milliseconds.

They run the real `RewardActor`. What the reward `Scripted` does is what the test's `Script` says.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayActorError, RayError, RayTaskError

from actors.experience.scoring.pool_parts import RewardScores
from actors.experience.scoring.replica import Replica, RewardActor
from actors.experience.scoring.reward_pool import RewardPool
from deepgen.config.schema.pools import make_pool
from deepgen.errors import UserError
from rewards import RewardBroken, RewardRequest, RewardUnavailable, Score

_ARGUMENTS = ("backoff_s", "max_restarts", "cache_size", "journal", "runs", "start_deadline_s")
PICTURE = np.zeros((2, 2, 3), dtype=np.uint8)


class Death(BaseException):
    """The reward's process dies."""


class Hang(BaseException):
    """The reward never answers."""


@dataclass
class Script:
    """score: of a batch of names, or what happens instead. starts: the same for the starts of processes, in turn."""

    score: Callable[[list[str]], list[Score]] = lambda names: [float(len(name)) for name in names]
    check: Callable[[list[str]], list[Score]] = lambda names: [0.0 for _ in names]  # a process's first call
    starts: list[BaseException | None] = field(default_factory=list)
    calls: list[list[str]] = field(default_factory=list)  # names in each call but the first of a process
    processes: int = 0

    def begin(self) -> None:
        self.processes += 1
        error = self.starts.pop(0) if self.starts else None
        if error is not None:
            raise error

    def answer(self, names: list[str]) -> list[Score]:
        self.calls.append(names)
        return self.score(names)


_scripts: list[Script] = []  # the one of the test that runs


class Scripted:
    """Scores by the script. An image is told by its prompt."""

    def __init__(self) -> None:
        self._warm = False
        _scripts[-1].begin()

    def score(self, requests: Sequence[RewardRequest]) -> list[Score]:
        if not self._warm:
            self._warm = True
            return _scripts[-1].check([request.prompt for request in requests])
        return _scripts[-1].answer([request.prompt for request in requests])


class ScriptedGroups:
    """The same for all images of a prompt together; a call's names are those of its groups, joined."""

    def __init__(self) -> None:
        self._warm = False
        _scripts[-1].begin()

    def score_groups(self, groups: Sequence[Sequence[RewardRequest]]) -> list[list[Score]]:
        if not self._warm:
            self._warm = True
            return [[0.0 for _ in group] for group in groups]
        names = ["+".join(request.prompt for request in group) for group in groups]
        return [[value] * len(group) for value, group in zip(_scripts[-1].answer(names), groups, strict=True)]


class LocalActor:
    """Looks like a Ray actor handle."""

    def __init__(self, replica: Any) -> None:
        host = RewardActor(replica._settings, replica.label)
        calls = (host.start, host.first, host.score)
        self.start, self.first, self.score = (SimpleNamespace(remote=self._remote(call)) for call in calls)

    def _remote(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def remote(*arguments: Any) -> Any:
            future: Future[Any] = Future()
            try:
                read = [found.content if isinstance(found, LocalRef) else found for found in arguments]
                future.set_result(call(*read))
            except Death:
                future.set_exception(RayActorError())
            except Hang:
                pass
            except RayError as error:
                future.set_exception(error)
            except (ArithmeticError, LookupError, RewardBroken, RewardUnavailable, UserError, ValueError) as error:
                text = "Traceback of the replica\n" + "".join(traceback.format_exception(error))
                future.set_exception(RayTaskError("score", text, error).as_instanceof_cause())
            return SimpleNamespace(future=lambda: future)

        return remote


@dataclass(frozen=True)
class LocalRef:
    """Looks like a reference to a list of requests."""

    content: list[RewardRequest]

    def hex(self) -> str:
        return str(id(self))


def _local_actor(replica: Replica) -> LocalActor:
    return LocalActor(replica)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script of a test's `Scripted` rewards."""
    monkeypatch.setattr(Replica, "_create", _local_actor)
    monkeypatch.setattr(Replica, "kill", lambda replica: None)
    _scripts.append(Script())
    yield _scripts[-1]
    _scripts.pop()


def in_pool(work: Callable[[RewardPool], Coroutine[Any, Any, Any]], **changes: Any) -> Any:
    """What `work` returns for a started pool; `changes`: its settings and arguments."""
    settings: dict[str, Any] = {"class": f"{__name__}:Scripted", "batch_size": 8, "deadline_s": 5.0}
    arguments: dict[str, Any] = {"backoff_s": 0.001}
    for key, value in changes.items():
        (arguments if key in _ARGUMENTS else settings)[key] = value

    async def body() -> Any:
        pool = RewardPool(make_pool("mine", settings), **arguments)
        await pool.start()
        try:
            return await work(pool)
        finally:
            pool.stop()
            await asyncio.sleep(0)

    return asyncio.run(body())


async def ask(pool: RewardPool, names: Sequence[str | None], group: int | None = None) -> RewardScores:
    """Scores of images with these names; None: one that the reward is not asked about."""
    requests = [RewardRequest(name or "", "", "t2i", PICTURE) for name in names]
    keys = [None if name is None else name.encode() for name in names]
    return await pool.score(LocalRef(requests), keys, group)
