"""Which actor gets the next call. Without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError, RayActorError

from actors.experience import rollout_fleet
from actors.experience.rollout_fleet import RolloutError, RolloutFleet
from actors.experience.rollout_turns import Turn, Turns

Body = Callable[[Turns], Awaitable[None]]


def with_turns(body: Body, *names: str) -> None:
    """Run `body` on the turns of these actors. Nothing in it may wait for long."""

    async def whole() -> None:
        turns = Turns(len(names))
        for name in names:
            turns.admit(name)
        async with asyncio.timeout(5):
            await body(turns)

    asyncio.run(whole())


async def ask(turns: Turns, count: int) -> list[asyncio.Task[Turn]]:
    """`count` calls that want an actor."""
    tasks = [asyncio.create_task(turns.take()) for _ in range(count)]
    await settle()
    return tasks


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def who(tasks: list[asyncio.Task[Turn]]) -> list[str]:
    """The actors of those that have one, in order."""
    return [task.result().name for task in tasks if task.done()]


def test_few_calls_wait_for_whoever_is_free_first() -> None:
    async def body(turns: Turns) -> None:
        tasks = await ask(turns, 4)
        assert who(tasks) == ["a", "b"]
        turns.end(tasks[1].result())
        await settle()
        assert who(tasks) == ["a", "b", "b"]
        assert await tasks[2].result().begin()

    with_turns(body, "a", "b")


def test_many_calls_find_their_next_one_waiting() -> None:
    """Each actor has one more while more wait than there are actors; the one that began first gets the first."""

    async def body(turns: Turns) -> None:
        tasks = await ask(turns, 7)
        assert who(tasks) == ["a", "b", "a", "b"]
        early = asyncio.create_task(tasks[2].result().begin())
        await settle()
        assert not early.done()  # not before a's first call has ended
        turns.end(tasks[0].result())
        assert await early
        more = await ask(turns, 1)  # 4 wait, and a has one call
        assert who([*tasks, *more]) == ["a", "b", "a", "b", "a"]

    with_turns(body, "a", "b")


def test_what_was_given_to_a_dead_actor_begins_nowhere() -> None:
    async def body(turns: Turns) -> None:
        tasks = await ask(turns, 7)
        first, ahead = tasks[0].result(), tasks[2].result()
        turns.end(first, well=False)
        assert not await ahead.begin()
        turns.end(ahead, well=False)
        turns.end(tasks[1].result())
        turns.end(tasks[3].result())
        await settle()
        assert who(tasks) == ["a", "b", "a", "b", "b"]  # nobody waits for a
        turns.admit("a")
        await settle()
        assert who(tasks)[-1] == "a"

    with_turns(body, "a", "b")


def test_a_turn_of_an_earlier_life_changes_nothing() -> None:
    async def body(turns: Turns) -> None:
        tasks = await ask(turns, 3)
        turns.end(tasks[0].result(), well=False)
        turns.admit("a")
        turns.end(tasks[1].result(), well=False)  # the late end of what was given to a before its death
        again = (await ask(turns, 1))[0]
        assert tasks[2].result().before is None
        turns.end(tasks[2].result())
        await settle()
        assert who([again]) == ["a"]

    with_turns(body, "a")


def test_a_cancelled_call_gives_its_turn_back() -> None:
    async def body(turns: Turns) -> None:
        (working,) = await ask(turns, 1)
        (waiting,) = await ask(turns, 1)
        turns.end(working.result())
        waiting.cancel()  # at the moment when it gets the actor
        await settle()
        assert waiting.cancelled()
        assert who(await ask(turns, 1)) == ["a"]

    with_turns(body, "a")


def test_when_all_are_gone_everybody_hears_it() -> None:
    async def body(turns: Turns) -> None:
        await ask(turns, 1)
        (waiting,) = await ask(turns, 1)
        turns.close(RuntimeError("no actor is left"))
        for call in (waiting, turns.take()):
            with pytest.raises(RuntimeError, match="no actor is left"):
                await call

    with_turns(body, "a")


def test_a_call_whose_actor_the_memory_monitor_kills_moves_on() -> None:
    """Ray tells of that death with an error of another kind."""
    calls: list[str] = []

    class Method:
        def options(self, num_returns: int) -> Method:
            return self

        async def remote(self, *arguments: object) -> str:
            calls.append("sampled")
            if len(calls) == 1:
                raise OutOfMemoryError("killed by the memory monitor")
            return "a group"

    class Ready:
        async def remote(self) -> str:
            return "a node"

    async def body() -> tuple[tuple[str, ...], int]:
        actor = SimpleNamespace(ready=Ready(), sample_group=Method())
        fleet = RolloutFleet({"only": actor}, call_deadline_s=60, start_deadline_s=60)
        await fleet.start()
        return await fleet.call("sample_group", "group 5", lambda: None), fleet.restarts

    assert asyncio.run(body()) == (("a group",), 1)


# -- actors that come and leave --------------------------------------------------------------------------------------


def test_an_actor_that_leaves_begins_nothing_more() -> None:
    async def body(turns: Turns) -> None:
        first, second, third, *waiting = await ask(turns, 5)
        assert who([first, second, third, *waiting]) == ["a", "b", "a"]  # the last one follows on a
        left = turns.leave("a")
        assert turns.working == 1 and not left.done()
        follows = asyncio.create_task(third.result().begin())
        turns.end(first.result())
        assert await left is True and await follows is False
        turns.end(third.result(), well=False)
        await settle()
        assert who(waiting) == []
        turns.end(second.result())
        await settle()
        assert who(waiting) == ["b"]
        turns.admit("a")
        await settle()
        assert who(waiting) == ["b", "a"]

    with_turns(body, "a", "b")


def test_an_idle_actor_leaves_at_once_and_a_death_on_the_way_is_told() -> None:
    async def body(turns: Turns) -> None:
        (task,) = await ask(turns, 1)
        assert who([task]) == ["a"]
        assert await turns.leave("b") is True
        left = turns.leave("a")
        turns.end(task.result(), well=False)
        assert await left is False and turns.working == 0
        turns.admit("a")
        assert who(await ask(turns, 1)) == ["a"]

    with_turns(body, "a", "b")


class FakeActor:
    """Looks like a handle of a rollout actor on a node. room: set once there is room for it."""

    def __init__(self, node: str, room: asyncio.Event | None = None) -> None:
        self.node, self.room, self.sampled = node, room, list[str]()
        self.hold = asyncio.Event()
        self.hold.set()
        self.ready = SimpleNamespace(remote=self._ready)
        self.sample_group = SimpleNamespace(options=lambda num_returns: SimpleNamespace(remote=self._sample))

    async def _ready(self) -> str:
        if self.room is not None:
            await self.room.wait()
        return self.node

    async def _sample(self, request: str, policy: None) -> str:
        self.sampled.append(request)
        await self.hold.wait()
        return self.node


def fleet_of(actors: dict[str, FakeActor], **options: Any) -> RolloutFleet:
    given: dict[str, Any] = {"call_deadline_s": 60, "start_deadline_s": 60} | options
    return RolloutFleet(actors, **given)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


async def sample(fleet: RolloutFleet, request: str) -> str:
    node: str = (await fleet.call("sample_group", request, lambda: None))[0]
    return node


def test_a_fleet_begins_with_the_least_and_others_join_it() -> None:
    async def body() -> None:
        room = asyncio.Event()
        fleet = fleet_of({"a": FakeActor("here"), "b": FakeActor("later", room)}, least=1, start_deadline_s=0.05)
        await fleet.start()
        assert fleet.working == 1
        await asyncio.sleep(0.2)  # beyond the deadline: others work, so it may wait
        assert await sample(fleet, "g0") == "here"
        room.set()
        await until(lambda: fleet.working == 2)
        found = await asyncio.gather(sample(fleet, "g1"), sample(fleet, "g2"))
        assert sorted(found) == ["here", "later"]

    asyncio.run(body())


def test_a_fleet_without_its_least_does_not_begin() -> None:
    async def body() -> None:
        actors = {"a": FakeActor("here"), "b": FakeActor("never", asyncio.Event())}
        await fleet_of(actors, least=2, start_deadline_s=0.05).start()

    with pytest.raises(RolloutError, match="actor b, call ready, after 0 s: no answer within the deadline"):
        asyncio.run(body())


def test_a_call_that_meets_all_actors_of_a_dead_node_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(FakeActor):
        async def _sample(self, request: str, policy: None) -> str:
            raise RayActorError(error_msg="The actor died because its node has died. Node Id: 1")

    async def body() -> None:
        actors = {f"gone-{n}": Gone("old") for n in range(5)} | {"z": FakeActor("here")}
        fleet = fleet_of(actors)
        await fleet.start()
        assert await sample(fleet, "g0") == "here"
        assert fleet.restarts == 5

    asyncio.run(body())


def test_on_a_node_that_drains_no_group_begins_and_its_actor_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    draining, killed = set[str](), list[FakeActor]()
    monkeypatch.setattr(rollout_fleet, "_LOOK_S", 0.01)

    async def body() -> None:
        a, b = FakeActor("old"), FakeActor("here")

        def kill(actor: FakeActor, no_restart: bool) -> None:
            assert not no_restart and actor.hold.is_set()  # what it did is done
            killed.append(actor)
            actor.node = "new"

        monkeypatch.setattr(rollout_fleet.ray, "kill", kill)
        fleet = fleet_of({"a": a, "b": b}, draining=lambda: draining)
        await fleet.start()
        a.hold.clear()
        last = asyncio.create_task(sample(fleet, "g0"))
        await settle()
        assert a.sampled == ["g0"]
        draining.add("old")
        await until(lambda: fleet.working == 1)
        assert not killed
        assert [await sample(fleet, f"g{n}") for n in (1, 2)] == ["here", "here"]
        a.hold.set()
        assert await last == "old"  # nothing is lost
        await until(lambda: bool(killed) and fleet.working == 2)
        assert killed == [a] and fleet.restarts == 1
        found = await asyncio.gather(sample(fleet, "g3"), sample(fleet, "g4"))
        assert sorted(found) == ["here", "new"]

    asyncio.run(body())
