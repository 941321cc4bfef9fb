"""The watch of a run: calls of fleet and pool become spans, idle shares, a status, and a word after long silence."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors.experience.reward_requests import request_key
from actors.experience.rollout_fleet import RolloutFleet
from actors.experience.scoring.reward_pool import RewardPool
from actors.experience.watch import Watch
from actors.messages import Canary, Group, PolicyWeights
from deepgen.config import load_settings
from deepgen.config.schema.pools import make_pool
from deepgen.data.records import Record
from deepgen.tracking.status import Rank, read_status
from deepgen.tracking.timeline import Recorder, read_spans
from rewards import RewardRequest
from tests.helpers.frail_actors import Quick


class Clock:
    """A clock that is set by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


REWARDS: Any = SimpleNamespace(
    names=("clip",),
    counters=lambda: {"pool/clip/missing": 2.0, "pool/clip/restarts": 1.0},
    open_requests=lambda: {"clip": 5},
)


def make_watch(folder: Path, clock: Clock, *more: str) -> tuple[Watch, Recorder]:
    settings = load_settings(None, [f"run.dir={folder}", "run.name=a", "rollout.prompts_per_step=4", *more])
    recorder = Recorder(clock=clock)
    fleet: Any = SimpleNamespace(working=2, restarts=3)
    return Watch(settings, recorder, fleet, REWARDS), recorder


# -- idle shares -----------------------------------------------------------------------------------------------------


def test_idle_is_measured_from_batch_to_batch(tmp_path: Path) -> None:
    clock = Clock()
    watch, recorder = make_watch(tmp_path, clock)

    def at(second: float) -> None:
        clock.now = 100 + second

    watch.asked(0, 0)
    old = recorder.begin("rollout-1", "rollout", "sample")
    at(2)
    assert watch.handed_out(0, 0) == {}  # there was no batch before
    at(4)
    recorder.end(old)
    sampling = recorder.begin("rollout-0", "rollout", "sample")
    at(9)
    watch.asked(1, 0)
    recorder.end(sampling)
    scoring = recorder.begin("clip reward #0", "clip", "score")
    at(12)
    idle = watch.handed_out(1, 0)
    assert idle == pytest.approx({"idle/rollout": 1 - (2 + 5) / 20, "idle/clip": 0.7, "idle/learner": 0.3})
    recorder.end(scoring)
    watch.asked(1, 0)  # the learner's process has started again
    at(20)
    assert watch.handed_out(1, 0) == {}


def test_idle_of_two_ranks_is_their_mean(tmp_path: Path) -> None:
    clock = Clock()
    watch, _ = make_watch(tmp_path, clock)
    for rank in (0, 1):
        watch.asked(0, rank)
    assert watch.handed_out(0, 1) == watch.handed_out(0, 0) == {}
    clock.now += 6
    watch.asked(1, 1)
    clock.now += 2
    watch.asked(1, 0)
    clock.now += 2
    assert watch.handed_out(1, 0)["idle/learner"] == pytest.approx((2 + 4) / 20)  # rank 1 still waits
    assert watch.handed_out(1, 1) == {}  # rank 0 reports


# -- status and silence ----------------------------------------------------------------------------------------------


async def until(condition: Callable[[], bool], what: str) -> None:
    for _ in range(400):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise TimeoutError(what)


def test_a_watched_run_writes_its_status(tmp_path: Path) -> None:
    watch, recorder = make_watch(tmp_path, Clock())
    folder = tmp_path / "a"

    async def body() -> None:
        watch.start(lambda: 7)
        await until(lambda: read_status(folder) is not None, "the first status")
        clock = watch.step(3)
        clock.begun()
        clock.sampled()
        recorder.begin("rollout-0", "rollout", "sample", call="sample_group of group 13")
        watch.asked(3, 0)
        await until(lambda: bool((status := read_status(folder)) and status.learner), "a status of the step")

    asyncio.run(body())
    status = read_status(folder)
    assert status is not None and not status.ended
    assert (status.version, status.actors) == (7, {"rollout": 2, "clip": 1})
    assert status.learner == (Rank(0, 3, True, 100.0),)
    assert [(step.step, step.groups, step.sampled, step.scored) for step in status.under_way] == [(3, 4, 1, 0)]
    assert [(call.actor, call.what) for call in status.calls] == [("rollout-0", "sample_group of group 13")]
    assert (status.open_requests, status.missing) == ({"clip": 5}, {"clip": 2})
    assert status.restarts == {"rollout": 3, "clip": 1}


@pytest.mark.parametrize("turns", range(4))
def test_a_watch_ends_also_right_after_a_batch(tmp_path: Path, turns: int) -> None:
    """However many turns of the event loop lie between the two."""

    async def body() -> None:
        watch, _ = make_watch(tmp_path, Clock())
        watch.start(lambda: None)
        await until(lambda: read_status(tmp_path / "a") is not None, "the first status")
        await asyncio.sleep(0.1)  # it waits for a change
        watch.asked(0, 0)
        watch.handed_out(0, 0)
        for _ in range(turns):
            await asyncio.sleep(0)
        finished, _ = await asyncio.wait({asyncio.ensure_future(watch.stop(0))}, timeout=5)
        assert finished

    asyncio.run(body())
    status = read_status(tmp_path / "a")
    assert status is not None and status.ended


def test_silence_is_said_once_a_period_until_something_moves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    watch, recorder = make_watch(tmp_path, clock, "experience.silence_s=0.01")

    def said() -> int:
        return caplog.text.count("nothing has moved")

    async def body() -> None:
        watch.start(lambda: None)
        call = recorder.begin("rollout-0", "rollout", "sample", call="sample_group of group 13")
        await asyncio.sleep(0.1)
        assert said() == 0  # the clock has not moved either
        clock.now += 1
        await until(lambda: said() == 1, "the first word")
        await asyncio.sleep(0.1)
        assert said() == 1  # once a period
        clock.now += 1
        await until(lambda: said() == 2, "the second word")
        recorder.end(call)
        await asyncio.sleep(0.1)
        assert said() == 2
        await watch.stop(None)

    asyncio.run(body())
    assert "busy: rollout-0 for 0:01 (sample_group of group 13); open requests: clip 5" in caplog.text
    status = read_status(tmp_path / "a")
    assert status is not None and status.ended


# -- where spans come from -------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_calls_of_fleet_and_pool_are_spans(ray_local: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "mishaps").mkdir()
    (tmp_path / "mishaps" / "die-0").touch()
    recorder = Recorder(tmp_path, "stream")
    settings = {"class": "tests.helpers.fake_rewards:FakeReward", "path": str(tmp_path / "mishaps")}
    image = np.zeros((8, 8, 3), dtype=np.uint8)

    async def body() -> None:
        pool = RewardPool(make_pool("fake", settings), backoff_s=0.01, recorder=recorder)
        actor = ray_local.remote(num_cpus=0.1, concurrency_groups={"weights": 1})(Quick).remote()
        fleet = RolloutFleet({"rollout-0": actor}, call_deadline_s=60, start_deadline_s=200, recorder=recorder)
        await asyncio.gather(fleet.start(), pool.start())
        weights = PolicyWeights(2, "", (), (), Canary(0.0, None))
        await fleet.prefetch(weights)
        group = Group(5, 1, 0, Record("x", "t2i", "a cat", "a cat", None, (), "test"))
        await fleet.call("sample_group", group, lambda: weights)
        request = RewardRequest("die", "", "t2i", image)
        scores = await pool.score(ray_local.put([request]), [request_key(request)])
        assert scores.values == [0.0]
        pool.stop()
        ray_local.kill(actor)

    asyncio.run(body())
    assert recorder.open() == []
    recorder.flush()
    spans = read_spans(tmp_path)
    rollout = [(span.what, span.call, span.step, span.version) for span in spans if span.role == "rollout"]
    assert rollout == [
        ("start", "start of the actor", None, None),
        ("fetch weights", "prefetch of version 2", None, 2),
        ("sample", "sample_group of group 5 of step 1 (prompt 'x')", 1, 2),
    ]
    # The replica dies in its first call and is replaced.
    assert [span.what for span in spans if span.actor == "fake reward #0"] == ["start", "score", "start", "score"]
    assert all(span.begin <= span.end for span in spans)
