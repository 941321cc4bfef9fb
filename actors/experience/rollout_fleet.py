"""The rollout actors as one: whoever is idle takes the next call, and a dead actor's call goes to another.

Ray restarts a dead actor (`max_restarts`); until it answers again it gets no calls. A call that is late counts as a
dead actor. Errors of the sampling code itself are not tried again: they would only come back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError

from actors.messages import PolicyWeights

ATTEMPTS = 3
RESTARTS = 8  # of one actor in a run; more than that is not bad luck
WEIGHTS_GROUP = "weights"  # calls that may overlap sampling
_PAUSE_S = 0.2  # before an actor that is being restarted is asked again
_NOBODY = ""  # in the queue of idle actors: there is none left


class RolloutError(RuntimeError):
    """A call that no rollout actor could finish; names actor, call and age."""


class NoRolloutLeftError(RolloutError):
    """All rollout actors are gone for good."""


class RolloutFleet:
    """Used inside one asyncio loop. `actors` maps names to Ray handles of `RolloutActor`."""

    def __init__(self, actors: Mapping[str, Any], *, call_deadline_s: float, start_deadline_s: float) -> None:
        self._actors = dict(actors)
        self._call_deadline_s, self._start_deadline_s = call_deadline_s, start_deadline_s
        self._idle: asyncio.Queue[str] = asyncio.Queue()
        self._busy: dict[str, tuple[str, float]] = {}  # actor -> what it does, since when
        self._recovering: set[asyncio.Task[None]] = set()
        self._lost: dict[str, str] = {}  # actors that did not come back
        self.restarts = 0

    async def start(self) -> None:
        """Wait until every actor has loaded its model. Raises RolloutError after the deadline."""
        await asyncio.gather(*(self._admit(name) for name in self._actors))

    async def call(
        self, method: str, request: Any, weights: Callable[[], PolicyWeights | None], outputs: int = 1
    ) -> tuple[Any, ...]:
        """Run `method(request, weights())` on an idle actor; waits for its first output.

        Returns that output and the references of the others, which stay in the object store. `weights` is asked when an
        actor is free, so that a call that waited uses the newest policy. Raises RolloutError after ATTEMPTS failures.
        """
        failures: list[str] = []
        while len(failures) < ATTEMPTS:
            name = await self._next_idle()
            begin = time.monotonic()
            self._busy[name] = (f"{method} of {request}", begin)
            reusable = True
            try:
                handle = getattr(self._actors[name], method).options(num_returns=outputs)
                returned = handle.remote(request, weights())
                first, *others = [returned] if outputs == 1 else returned
                return (await asyncio.wait_for(first, self._call_deadline_s), *others)
            except (RayActorError, TimeoutError) as error:
                reusable = False
                failures.append(_failure(name, method, begin, error))
                self._replace(name, failures[-1], kill=isinstance(error, TimeoutError))
            finally:
                self._busy.pop(name, None)
                if reusable:
                    self._idle.put_nowait(name)
        raise RolloutError(f"{request} failed {ATTEMPTS} times; " + "; ".join(failures))

    async def prefetch(self, published: PolicyWeights) -> None:
        """Bring a policy version to every actor. One that is down fetches it when it is asked to sample with it."""

        async def one(name: str) -> None:
            begin = time.monotonic()
            call = self._actors[name].prefetch.options(concurrency_group=WEIGHTS_GROUP)
            try:
                await asyncio.wait_for(call.remote(published), self._call_deadline_s)
            except RayActorError:
                return
            except TimeoutError as error:
                raise RolloutError(_failure(name, "prefetch", begin, error)) from error

        await asyncio.gather(*(one(name) for name in self._actors))

    def oldest_call(self) -> str:
        """The call that has been running longest, for the error of somebody who waits for it."""
        if not self._busy:
            return f"no call is running; {len(self._recovering)} of {len(self._actors)} rollout actors are restarting"
        name, (what, since) = min(self._busy.items(), key=lambda item: item[1][1])
        return f"actor {name}, call {what}, running for {time.monotonic() - since:.0f} s"

    # -- internals --------------------------------------------------------------------------------------------------

    async def _next_idle(self) -> str:
        name = await self._idle.get()
        if name == _NOBODY:
            self._idle.put_nowait(_NOBODY)  # whoever waits too shall know
            raise NoRolloutLeftError("no rollout actor is left; " + "; ".join(self._lost.values()))
        return name

    async def _admit(self, name: str) -> None:
        """Wait until the actor answers, then let it have calls."""
        begin = time.monotonic()
        left = self._start_deadline_s
        try:
            while not await self._answers(name, left):
                await asyncio.sleep(_PAUSE_S)
                left = self._start_deadline_s - (time.monotonic() - begin)
        except (RayActorError, TimeoutError) as error:
            raise RolloutError(_failure(name, "ready", begin, error)) from error
        self._idle.put_nowait(name)

    async def _answers(self, name: str, deadline_s: float) -> bool:
        """Whether the actor is ready, False while Ray is restarting it."""
        try:
            await asyncio.wait_for(self._actors[name].ready.remote(), deadline_s)
        except ActorUnavailableError:
            return False
        return True

    def _replace(self, name: str, failure: str, *, kill: bool) -> None:
        self.restarts += 1
        if kill:
            ray.kill(self._actors[name], no_restart=False)
        task = asyncio.ensure_future(self._recover(name, failure))
        self._recovering.add(task)
        task.add_done_callback(self._recovering.discard)

    async def _recover(self, name: str, failure: str) -> None:
        try:
            await self._admit(name)
        except RolloutError as error:
            self._lost[name] = f"{failure}; {error}"
            if len(self._lost) == len(self._actors):
                self._idle.put_nowait(_NOBODY)


def _failure(name: str, call: str, begin: float, error: BaseException) -> str:
    return f"actor {name}, call {call}, after {time.monotonic() - begin:.0f} s: {_reason(error)}"


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "no answer within the deadline"
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
