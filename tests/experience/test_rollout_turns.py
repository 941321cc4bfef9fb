"""Which actor gets the next call. Without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import pytest
from ray.exceptions import OutOfMemoryError

from actors.experience.rollout_fleet import RolloutFleet
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
