"""The event loop whose time jumps."""

from __future__ import annotations

import asyncio

import pytest

from actors.simulation.virtual_clock import StuckError, run_virtual


def test_time_passes_only_in_waits_and_in_their_order() -> None:
    seen: list[tuple[float, str]] = []

    async def waiter(name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        seen.append((asyncio.get_running_loop().time(), name))

    async def body() -> float:
        await asyncio.gather(waiter("late", 1e6), waiter("soon", 0.5), waiter("later", 1e6))
        return asyncio.get_running_loop().time()

    assert run_virtual(body()) == 1e6
    assert seen == [(0.5, "soon"), (1e6, "late"), (1e6, "later")]


def test_deadlines_are_virtual_and_threads_take_no_time() -> None:
    async def body() -> tuple[float, int]:
        result = await asyncio.to_thread(len, "four")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 3600)
        return asyncio.get_running_loop().time(), result

    assert run_virtual(body()) == (3600.0, 4)


def test_who_waits_for_nothing_is_told() -> None:
    async def body() -> None:
        await asyncio.sleep(2)
        await asyncio.Event().wait()

    with pytest.raises(StuckError, match="after 2 s every task waits"):
        run_virtual(body())
