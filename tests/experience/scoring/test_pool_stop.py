"""A pool that ends while it starts, and what one request or a pause may not do to a pool that goes on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors.experience.scoring.pool_parts import RewardPoolError
from actors.experience.scoring.replica import CallTimeout
from actors.experience.scoring.reward_pool import RewardPool
from actors.experience.scoring.reward_router import RewardRouter
from actors.experience.stream import ExperienceStream
from deepgen.config import load_settings
from deepgen.config.schema.pools import make_pool
from deepgen.errors import UserError
from rewards import Missing, RewardUnavailable, Score
from tests.helpers.local_replicas import Death, Hang, Script, Scripted, ask, in_pool, script

__all__ = ["script"]


def dying_pool(replicas: int) -> RewardPool:
    content = {"class": f"{Scripted.__module__}:Scripted", "replicas": replicas}
    return RewardPool(make_pool("mine", content), backoff_s=0.05, max_restarts=50, start_deadline_s=0.05)


@pytest.mark.parametrize("how", ["stop", "failure", "cancelled"])
def test_a_pool_that_ends_while_it_starts_makes_no_more_replicas(script: Script, how: str) -> None:
    script.starts = [Death(), Hang(), *(Death() for _ in range(50))]

    async def body() -> tuple[int, str]:
        pool = dying_pool(2 if how == "failure" else 1)
        if how != "failure":
            script.starts.pop(1)
        starting = asyncio.create_task(pool.start())
        if how != "failure":
            await asyncio.sleep(0.02)
            pool.stop() if how == "stop" else starting.cancel()
        (ended,) = await asyncio.gather(starting, return_exceptions=True)
        made = script.processes
        await asyncio.sleep(0.4)
        with pytest.raises(RewardPoolError):
            await pool.start()
        return script.processes - made, type(ended).__name__

    more, ended = asyncio.run(body())
    assert (more, ended) == (0, {"stop": "RewardPoolError", "cancelled": "CancelledError"}.get(how, "CallTimeout"))


def test_when_one_pool_cannot_start_the_others_stop() -> None:
    ended = []

    class Pool:
        def __init__(self, error: Exception | None) -> None:
            self.error = error

        async def start(self) -> None:
            if self.error:
                raise self.error

        def stop(self) -> None:
            ended.append(self)

    async def body() -> None:
        router = object.__new__(RewardRouter)
        router._pools = {"a": Pool(None), "b": Pool(UserError("rewards.b: no"))}  # type: ignore[dict-item]
        with pytest.raises(UserError, match=r"rewards\.b: no"):
            await router.start()

    asyncio.run(body())
    assert len(ended) == 2


def test_the_scores_of_a_call_that_is_cancelled_are_kept(script: Script) -> None:
    """A step that is drawn again asks for the same images."""

    def score(names: list[str]) -> list[Score]:
        if names == ["slow"] and len(script.calls) == 2:
            raise Hang
        return [1.0 for _ in names]

    script.score = score

    async def work(pool: RewardPool) -> Any:
        first = asyncio.create_task(ask(pool, ["quick", "slow", "later"]))
        async with asyncio.timeout(20):
            while len(script.calls) < 2:
                await asyncio.sleep(0.01)
        first.cancel()
        assert pool.open_requests() == 3 - 1
        await asyncio.sleep(0)
        assert pool.open_requests() == 0
        return await ask(pool, ["quick", "slow", "later"])

    found = in_pool(work, batch_size=1, deadline_s=0.5)
    assert found.values == [1.0] * 3 and found.counters["cache_hits"] == 1
    assert script.calls == [["quick"], ["slow"], ["slow"], ["later"]]


def test_one_request_that_kills_its_process_does_not_open_the_breaker(script: Script) -> None:
    """It is alone in its batch, and nothing else is asked between its attempts."""

    def score(names: list[str]) -> list[Score]:
        if names == ["bad"]:
            raise Death
        return [1.0 for _ in names]

    script.score = score

    async def work(pool: RewardPool) -> tuple[Any, bool]:
        found = await ask(pool, ["bad"])
        return found, pool._breaker.opened is None

    found, closed = in_pool(work, retries=4, max_restarts=9)
    assert closed and found.reasons[0].reason == "died" and len(script.calls) == 5


def test_a_required_reward_that_nobody_waits_for_does_not_end_the_run(script: Script) -> None:
    """The learner may take longer than deadline_s, and the service may be there again by then."""

    def down(names: list[str]) -> list[Score]:
        raise RewardUnavailable("away for a moment")

    async def work(pool: RewardPool) -> list[Any]:
        script.score = down
        calls = [asyncio.create_task(ask(pool, [f"{n}"])) for n in range(3)]
        async with asyncio.timeout(5):
            while pool._breaker.opened is None:
                await asyncio.sleep(0.01)
        for call in calls:
            call.cancel()
        await asyncio.sleep(0.3)
        script.score = lambda names: [1.0 for _ in names]
        return (await ask(pool, ["then"])).values

    assert in_pool(work, batch_size=1, deadline_s=0.2, required=True) == [1.0]


def test_probes_of_a_required_reward_cost_no_score(script: Script) -> None:
    """Whichever way the reward says that its service is away."""
    script.score = lambda names: [Missing("transport", "no route") for _ in names]

    async def work(pool: RewardPool) -> list[Any]:
        await asyncio.gather(*(ask(pool, [f"{n}"]) for n in range(2)))
        probed = asyncio.create_task(ask(pool, ["probe"]))
        await asyncio.sleep(0.1)
        assert pool._breaker.opened is not None and not probed.done()
        script.score = lambda names: [1.0 for _ in names]
        return (await probed).values

    assert in_pool(work, batch_size=1, deadline_s=5.0, backoff_s=0.02, required=True) == [1.0]


class Starting:
    """In the place of a stream's parts: a start that waits until it ends with an error."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def start(self, *_: Any) -> None:
        await self.ended

    def stop(self) -> None:
        self.ended.set_exception(RewardPoolError("reward pool mine was stopped"))


class Ready(Starting):
    async def start(self, *_: Any) -> None: ...


class Looking:
    clock = staticmethod(time.monotonic)

    def __init__(self, *_: Any) -> None: ...

    def start(self, *_: Any) -> None: ...

    async def stop(self, *_: Any) -> None: ...


@pytest.fixture
def starting(root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[ExperienceStream, Starting]]:
    """Makes a stream whose rewards do not get ready, and these."""
    for name, part in (("RewardRouter", Starting), ("RolloutFleet", Ready), ("Watch", Looking), ("Recorder", Looking)):
        monkeypatch.setattr(f"actors.experience.stream.{name}", part)

    settings = load_settings(root / "stages" / "recipes" / "tiny-rl.yaml")

    def make() -> tuple[ExperienceStream, Starting]:
        made = ExperienceStream(settings, [], {}, resume=True)
        return made, made._rewards  # type: ignore[return-value]

    return make


def test_a_stream_that_is_stopped_while_it_starts_says_nothing(starting: Any) -> None:
    """Its caller has gone, so Ray would print the error."""

    async def body() -> None:
        stream, _ = starting()
        start = asyncio.create_task(stream.start())
        await asyncio.sleep(0)
        await stream.stop()
        await start

    asyncio.run(body())


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (CallTimeout("mine reward #0: call 'start' is late"), "cluster.start_deadline_s: mine reward #0: call 'start'"),
        (RewardPoolError("reward pool mine has no replica left"), "rewards: reward pool mine has no replica left"),
    ],
)
def test_a_reward_that_does_not_get_ready_ends_the_start_with_its_name(
    starting: Any, error: Exception, line: str
) -> None:
    async def body() -> None:
        stream, rewards = starting()
        rewards.ended.set_exception(error)
        await stream.start()

    with pytest.raises(UserError) as caught:
        asyncio.run(body())
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)
