"""Runs calls on the rollout actors: `Turns` says which one takes the next; a dead actor's call moves to another actor.

Ray restarts a dead actor (`max_restarts`), which gets no calls until it answers again. An actor that misses the
deadline of a call counts as dead. Errors raised by the sampling code are not retried, because they would occur again.

The fleet grows and shrinks with the cluster: more actors than the least may wait for a node for as long as there are
others that work. On a node that the cluster is about to take away (it drains) no call begins; its actors move.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError

from actors.experience.rollout_turns import Turns
from actors.gone import GONE
from actors.messages import OBJECT_STORE, Group, PolicyWeights
from deepgen.tracking.timeline import ROLLOUT, Recorder

log = logging.getLogger(__name__)

ATTEMPTS = 3
RESTARTS = -1  # of an actor: no limit. What fails again and again ends with ATTEMPTS, or with the start deadline.
WEIGHTS_GROUP = "weights"  # calls that may overlap sampling
_PAUSE_S = 0.2  # pause before a restarting actor is asked again
_NODE_DIED = "its node has died"  # Ray's words
_LOOK_S = 1.0  # between looks at which nodes drain


class RolloutError(RuntimeError):
    """No rollout actor could finish a call. The message names actor, call and age."""


class NoRolloutLeftError(RolloutError):
    """All rollout actors have failed for good."""


class RolloutFleet:
    """Distributes calls over the actors, inside one asyncio loop. `actors` maps names to handles of `RolloutActor`.

    Every call is a span in `recorder`, whose clock tells how long calls take.
    """

    def __init__(
        self,
        actors: Mapping[str, Any],
        *,
        call_deadline_s: float,
        start_deadline_s: float,
        least: int | None = None,
        draining: Callable[[], set[str]] | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """least: actors without which no work begins; None: all. draining: tells the nodes where nothing may begin."""
        self._actors = dict(actors)
        self._recorder = recorder or Recorder()
        self._clock = self._recorder.clock
        self._call_deadline_s, self._start_deadline_s = call_deadline_s, start_deadline_s
        self._turns = Turns(len(self._actors))
        self._draining = draining
        self._least = len(self._actors) if least is None else least
        self._nodes: dict[str, Any] = {}  # actor that answers -> its node
        self._tasks: set[asyncio.Task[None]] = set()
        self._lost: dict[str, str] = {}  # actor that did not come back -> why
        self.restarts = 0

    async def start(self) -> None:
        """Wait until the least number of actors have loaded their model. Raises RolloutError after the deadline."""
        coming = {name: asyncio.ensure_future(self._admit(name)) for name in self._actors}
        try:
            while self.working < self._least:
                waiting = [one for one in coming.values() if not one.done()]
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for one in done:
                    one.result()
        except BaseException:
            for one in coming.values():
                one.cancel()
            raise
        for name, one in coming.items():
            if not one.done():
                self._later(self._recover(name, "no node has had room for it", one))
        if self._draining is not None:
            self._later(self._heed_drains(self._draining))

    def stop(self) -> None:
        """Look after the actors no more. They keep running."""
        for task in self._tasks:
            task.cancel()

    @property
    def working(self) -> int:
        """Actors that get calls now."""
        return self._turns.working

    async def call(
        self, method: str, request: Any, known: Callable[[], PolicyWeights | None], *more: Any, outputs: int = 1
    ) -> tuple[Any, ...]:
        """Run `method(request, known(), *more)` on an actor and wait for its first output.

        `known` says what is known of the policy when the call is sent: an actor that has started again after the
        learner published version 0 has to compare its weights with that.

        Returns that output, and references to the others, which stay in the object store. Raises RolloutError after
        ATTEMPTS failures.
        """
        failures: list[str] = []
        while len(failures) < ATTEMPTS:
            turn, begin = await self._turns.take(), self._clock()
            span, reusable = None, True  # stays True when the sampling code itself raises: the actor is fine
            try:
                policy = known()
                handle = getattr(self._actors[turn.name], method).options(num_returns=outputs)
                returned = handle.remote(request, policy, *more)
                first, *others = [returned] if outputs == 1 else returned
                if not await turn.begin():  # the actor has died before it came to this
                    reusable = False
                    continue
                begin = self._clock()
                span = self._recorder.begin(turn.name, ROLLOUT, **_about(method, request, policy))
                async with asyncio.timeout(self._call_deadline_s):  # `wait_for` would cost a task for each group
                    return (await first, *others)
            except (*GONE, TimeoutError) as error:
                reusable = False
                failure = _failure(turn.name, method, self._clock() - begin, error)
                self._replace(turn.name, failure, kill=isinstance(error, TimeoutError))
                if _NODE_DIED not in str(error):  # else it is not the call's fault, and its other actors are gone, too
                    failures.append(failure)
            finally:
                if span:
                    self._recorder.end(span)
                self._turns.end(turn, well=reusable)
        raise RolloutError(f"{request} failed {ATTEMPTS} times; " + "; ".join(failures))

    async def prefetch(self, published: PolicyWeights) -> None:
        """Send a policy version to one actor a node, which brings it to that node; others find it there.

        To every actor if each has to fetch its own, and for version 0, which they compare with the weights folder that
        they draw with already. An actor that is down fetches a version later, when it samples with it. So does one that
        misses the deadline, after it has been started again.
        """
        first = {node: name for name, node in reversed(self._nodes.items())}
        each = published.version == 0 or published.transport != OBJECT_STORE

        async def one(name: str) -> None:
            begin = self._clock()
            call = self._actors[name].prefetch.options(concurrency_group=WEIGHTS_GROUP)
            version = published.version
            span = self._recorder.begin(
                name, ROLLOUT, "fetch weights", call=f"prefetch of version {version}", version=version
            )
            try:
                await asyncio.wait_for(call.remote(published), self._call_deadline_s)
            except GONE:
                return
            except TimeoutError as error:
                failure = _failure(name, "prefetch", self._clock() - begin, error)
                log.warning("%s; it is started again", failure)
                self._dismiss(name, failure)
            finally:
                self._recorder.end(span)

        await asyncio.gather(*(one(name) for name in (self._actors if each else first.values())))

    def oldest_call(self) -> str:
        """Describes the longest-running call, for the error message of a caller that waited too long."""
        if not (busy := self._recorder.open(ROLLOUT)):
            return f"no call is running on the {self.working} rollout actors that are there, of {len(self._actors)}"
        age = self._recorder.clock() - busy[0].begin
        return f"actor {busy[0].actor}, call {busy[0].call}, running for {age:.0f} s"

    # -- internals --------------------------------------------------------------------------------------------------

    async def _admit(self, name: str) -> None:
        """Wait until the actor answers; from then on it gets calls."""
        begin = self._clock()
        left = self._start_deadline_s
        span = self._recorder.begin(name, ROLLOUT, "start", call="start of the actor")
        try:
            while not await self._answers(name, left):
                await asyncio.sleep(_PAUSE_S)
                left = self._start_deadline_s - (self._clock() - begin)
        except (*GONE, TimeoutError) as error:
            raise RolloutError(_failure(name, "ready", self._clock() - begin, error)) from error
        finally:
            self._recorder.end(span)
        self._turns.admit(name)

    async def _answers(self, name: str, deadline_s: float) -> bool:
        """True once the actor is ready, False while Ray is restarting it. Raises what Ray says if it will not."""
        try:
            self._nodes[name] = await asyncio.wait_for(self._actors[name].ready.remote(), deadline_s)
        except ActorUnavailableError:
            return False
        except GONE:  # perhaps it was asked in the moment in which it was killed
            if await asyncio.to_thread(is_dead, self._actors[name]):
                raise
            return False
        return True

    def _replace(self, name: str, failure: str, *, kill: bool) -> None:
        self.restarts += 1
        self._nodes.pop(name, None)
        if kill:
            ray.kill(self._actors[name], no_restart=False)
        self._later(self._recover(name, failure))

    async def _recover(self, name: str, failure: str, coming: Awaitable[None] | None = None) -> None:
        """Admit the actor once it answers. It may wait for a node for as long as others work."""
        while True:
            try:
                await (coming or self._admit(name))
            except RolloutError as error:
                coming = None
                if isinstance(error.__cause__, TimeoutError) and self.working:
                    continue
                self._lost[name] = f"{failure}; {error}"
                if len(self._lost) == len(self._actors):
                    self._turns.close(NoRolloutLeftError("no rollout actor is left; " + "; ".join(self._lost.values())))
            return

    async def _heed_drains(self, nodes: Callable[[], set[str]]) -> None:
        """Look for nodes that the cluster takes away, and have their actors move when they have done what they do."""
        while True:
            await asyncio.sleep(_LOOK_S)
            draining = await asyncio.to_thread(nodes)
            for name in [name for name, node in self._nodes.items() if node in draining]:
                log.warning("the cluster takes node %s away: %s moves", self._nodes[name], name)
                self._dismiss(name, "its node was taken away")

    def _dismiss(self, name: str, why: str) -> None:
        """Let no call begin on the actor any more, and when it has done what it does, start it again."""

        async def start_again(left: asyncio.Future[bool]) -> None:
            if await left:  # else its death has been met already
                self._replace(name, why, kill=True)

        if name in self._nodes:  # else it is on its way
            del self._nodes[name]
            self._later(start_again(self._turns.leave(name)))

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            assert isinstance(error, Exception)
            self._turns.close(error)  # a bug: whoever waits for an actor hears of it


def draining_nodes() -> set[str]:
    """The nodes of the connected cluster on which nothing new should begin."""
    from ray._private.state import state

    return set(state.get_draining_nodes())


def is_dead(actor: Any) -> bool:
    """Whether Ray will not start an actor any more."""
    from ray._private.state import state

    return isinstance(actor, ray.actor.ActorHandle) and bool(
        state.actor_table(actor._actor_id.hex()).get("State") == "DEAD"
    )


def _about(method: str, request: Any, policy: PolicyWeights | None) -> dict[str, Any]:
    """What the timeline says of a call."""
    about = {"what": method, "call": f"{method} of {request}"}
    if not isinstance(request, Group):
        return about
    return about | {"what": "sample", "step": request.step, "version": policy.version if policy else 0}


def _failure(name: str, call: str, age: float, error: BaseException) -> str:
    return f"actor {name}, call {call}, after {age:.0f} s: {_reason(error)}"


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "no answer within the deadline"
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
