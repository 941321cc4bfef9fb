"""The reward pool on a real local Ray, with a reward that hangs, dies and fails on request."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from actors.experience.journal import score_journal
from actors.experience.journal.score_journal import ScoreJournal
from actors.experience.reward_requests import request_key
from actors.experience.scoring.pool_parts import NOT_APPLICABLE, RequestsLostError, RewardPoolError, RewardScores
from actors.experience.scoring.replica import CallTimeout
from actors.experience.scoring.reward_pool import RewardPool
from deepgen.cluster.resources import Placement
from deepgen.config.schema.pools import make_pool as make_pool_settings
from deepgen.errors import UserError
from rewards.base import RewardRequest
from tests.helpers.fake_rewards import SPECIAL
from tests.helpers.lost_objects import lost_reference
from tests.helpers.pool_calls import score

pytestmark = pytest.mark.ray

FAKE = "tests.helpers.fake_rewards:FakeReward"


def request(level: int, prompt: str = "a cat", answer: str = "") -> RewardRequest:
    """A request that the fake reward scores with level / 255."""
    return RewardRequest(prompt, answer, "t2i", np.full((8, 8, 3), level, dtype=np.uint8))


def mishaps(folder: Path, kind: str, count: int) -> None:
    for index in range(count):
        (folder / f"{kind}-{index}").touch()


def batches(folder: Path) -> list[int]:
    """Sizes of the batches scored since the last call of this function."""
    calls = folder / "calls"
    sizes = [int(line) for line in calls.read_text().split()]
    calls.write_text("")
    return sizes


def make_pool(folder: Path, **changes: Any) -> RewardPool:
    """A pool of the fake reward. `changes`: its name, settings, or constructor arguments."""
    settings: dict[str, Any] = {"class": FAKE, "path": str(folder)}
    settings |= {"replicas": 1, "batch_size": 4, "deadline_s": 60.0, "retries": 2, "required": False}
    name = changes.pop("name", "FakeReward")
    arguments: dict[str, Any] = {"backoff_s": 0.01}
    for key, value in changes.items():
        (settings if key in settings else arguments)[key] = value
    return RewardPool(make_pool_settings(name, settings), **arguments)


def run(folder: Path, scenario: Callable[[RewardPool], Coroutine[Any, Any, Any]], **changes: Any) -> Any:
    """Run a scenario on a new pool."""

    async def body() -> Any:
        pool = make_pool(folder, **changes)
        await pool.start()
        try:
            return await scenario(pool)
        finally:
            pool.stop()

    return asyncio.run(body())


@dataclass
class Shared:
    """One pool shared by all tests that do not break it."""

    folder: Path
    pool: RewardPool
    runner: asyncio.Runner

    def run(self, scenario: Callable[[RewardPool], Coroutine[Any, Any, Any]]) -> Any:
        batches(self.folder)
        return self.runner.run(scenario(self.pool))


@pytest.fixture(scope="module")
def shared(ray_local: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    folder = tmp_path_factory.mktemp("shared")
    with asyncio.Runner() as runner:
        pool = make_pool(folder)
        runner.run(pool.start())
        yield Shared(folder, pool, runner)
        pool.stop()


def levels(scores: RewardScores) -> list[int | None]:
    return [None if value is None else round(value * 255) for value in scores.values]


def test_open_requests_are_images(ray_local: ModuleType, tmp_path: Path) -> None:
    """Of all calls together, until they have a score."""

    async def scenario(pool: RewardPool) -> list[int]:
        calls = [asyncio.create_task(score(pool, [request(level) for level in levels])) for levels in ((1, 2, 3), (4,))]
        await asyncio.sleep(0)
        begun = pool.open_requests()
        await asyncio.gather(*calls)
        return [begun, pool.open_requests()]

    assert run(tmp_path, scenario) == [4, 0]


def test_scores_in_order_in_batches_and_from_two_replicas(ray_local: ModuleType, tmp_path: Path) -> None:
    async def scenario(pool: RewardPool) -> list[RewardScores]:
        groups = [[request(10 * group + index) for index in range(5)] for group in range(5)]
        return await asyncio.gather(*(score(pool, group) for group in groups))

    groups = run(tmp_path, scenario, replicas=2)
    assert [levels(scores) for scores in groups] == [[10 * g + i for i in range(5)] for g in range(5)]
    assert all(scores.reasons == [None] * 5 for scores in groups)
    sizes = batches(tmp_path)
    assert sizes[:2] == [1, 1]  # warm-ups
    assert sum(sizes[2:]) == 25
    assert max(sizes) == 4  # batch_size, so groups share calls


def test_cache_answers_what_was_scored_before(shared: Shared) -> None:
    async def scenario(pool: RewardPool) -> tuple[RewardScores, RewardScores]:
        first = await score(pool, [request(1), request(2), request(3, "none")])
        again = await score(pool, [request(2), request(1, answer="a dog"), request(1), request(3, "none")])
        return first, again

    hits = shared.pool.counters()["cache_hits"]
    first, again = shared.run(scenario)
    assert (levels(first), levels(again)) == ([1, 2, None], [2, 1, 1, None])
    assert first.counters["cache_hits"] == 0
    # A different answer is a different request, and a missing score is requested again.
    assert again.counters["cache_hits"] == shared.pool.counters()["cache_hits"] - hits == 2
    assert batches(shared.folder) == [3, 2]


def test_cache_key_covers_all_that_a_reward_may_look_at() -> None:
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    changed = image.copy()
    changed[7, 7, 2] = 1
    requests = [
        RewardRequest("a", "b", "t2i", image),
        RewardRequest("ab", "", "t2i", image),
        RewardRequest("a", "b", "edit", image),
        RewardRequest("a", "b", "t2i", changed),
        RewardRequest("a", "b", "t2i", image.reshape(4, 16, 3)),
        RewardRequest("a", "b", "t2i", image, (image,)),
        RewardRequest("a", "b", "t2i", image, (changed,)),
    ]
    assert len({request_key(entry) for entry in requests}) == len(requests)
    assert request_key(requests[0]) == request_key(RewardRequest("a", "b", "t2i", image.copy()))


def test_unavailable_is_tried_again_and_then_succeeds(shared: Shared) -> None:
    mishaps(shared.folder, "unavailable", 2)

    async def scenario(pool: RewardPool) -> RewardScores:
        return await score(pool, [request(7, "unavailable"), request(8)])

    scores = shared.run(scenario)
    assert levels(scores) == [7, 8]
    assert [scores.counters[key] for key in ("calls", "retries", "missing", "restarts")] == [3, 2, 0, 0]


def test_missing_scores_are_none_with_reason_and_counter(shared: Shared) -> None:
    mishaps(shared.folder, "unavailable", 3)

    async def scenario(pool: RewardPool) -> tuple[RewardScores, RewardScores]:
        return (
            await score(pool, [request(21, "unavailable"), request(22, "unavailable")]),
            await score(pool, [request(23, "skip"), request(24), *(request(21, prompt) for prompt in SPECIAL)]),
        )

    down, odd = shared.run(scenario)
    assert down.values == [None, None]
    assert down.reasons[0] is not None
    assert down.reasons[0].reason == "transport"
    assert "the service is down (attempt 3, the last)" in down.reasons[0].detail
    assert [down.counters[key] for key in ("missing", "missing/transport", "calls")] == [2, 2, 3]
    assert levels(odd) == [None, 24, *[None] * len(SPECIAL)]
    assert odd.reasons[0] == NOT_APPLICABLE
    said = [reason for reason in odd.reasons[2:] if reason is not None]
    assert [(why.reason, why.detail.partition(": ")[2]) for why in said] == [
        *[("parse", "the reward gave no finite score")] * (len(SPECIAL) - 1),
        ("too_long", "more than it reads"),  # what the reward itself says
    ]
    assert odd.counters["missing"] == len(SPECIAL)  # a request that is never sent does not count
    assert odd.counters["missing/parse"] == len(SPECIAL) - 1 and odd.counters["missing/too_long"] == 1
    assert sum(value for key, value in odd.counters.items() if key.startswith("missing/")) == len(SPECIAL)


def test_hanging_replica_is_replaced_and_its_request_scored(ray_local: ModuleType, tmp_path: Path) -> None:
    mishaps(tmp_path, "hang", 1)

    async def scenario(pool: RewardPool) -> tuple[RewardScores, dict[str, float], bool]:
        before = pool.replica_actors()
        scores = await score(pool, [request(5, "hang"), request(6)])
        return scores, pool.counters(), before != pool.replica_actors()

    scores, totals, replaced = run(tmp_path, scenario, deadline_s=4.0, retries=5)
    assert levels(scores) == [5, 6]
    assert replaced
    # On a busy machine, other calls may be late too, not only the hanging one.
    assert min(totals["timeouts"], totals["retries"], totals["restarts"]) >= 1
    assert totals["missing"] == 0


def test_timeout_without_retries_is_missing_and_names_actor_call_and_age(ray_local: ModuleType, tmp_path: Path) -> None:
    mishaps(tmp_path, "hang", 1)

    async def scenario(pool: RewardPool) -> RewardScores:
        return await score(pool, [request(5, "hang")])

    scores = run(tmp_path, scenario, deadline_s=2.0, retries=0)
    assert scores.values == [None]
    assert scores.reasons[0] is not None
    assert scores.reasons[0].reason == "deadline"
    assert "FakeReward reward #0: call 'score' has not answered after 2.0 s (deadline 2 s)" in scores.reasons[0].detail
    assert [scores.counters[key] for key in ("timeouts", "missing", "missing/deadline")] == [1, 1, 1]


def ask_until_dead(ray_local: ModuleType, actor: Any) -> None:
    while True:
        ray_local.get(actor.__ray_ready__.remote(), timeout=30)


def test_killed_replica_is_replaced(ray_local: ModuleType, tmp_path: Path) -> None:
    mishaps(tmp_path, "die", 1)

    async def scenario(pool: RewardPool) -> tuple[RewardScores, RewardScores, dict[str, float]]:
        during = await score(pool, [request(1, "die"), request(2)])  # dies while it scores
        replica = pool.replica_actors()[0]
        ray_local.kill(replica)  # dies while it waits; the call returns before it is dead
        with pytest.raises(ray_local.exceptions.RayActorError):
            ask_until_dead(ray_local, replica)
        return during, await score(pool, [request(3), request(4)]), pool.counters()

    during, after, totals = run(tmp_path, scenario)
    assert (levels(during), levels(after)) == ([1, 2], [3, 4])
    assert totals["restarts"] == 2
    assert totals["missing"] == 0


def test_required_pool_without_replicas_fails_loud(ray_local: ModuleType, tmp_path: Path) -> None:
    mishaps(tmp_path, "die", 9)

    async def scenario(pool: RewardPool) -> None:
        with pytest.raises(RewardPoolError, match=r"has no replica left; last: .* died during score"):
            await asyncio.gather(score(pool, [request(1, "die")]), score(pool, [request(2, "die")]))
        with pytest.raises(RewardPoolError, match="has no replica left"):
            await score(pool, [request(3)])

    run(tmp_path, scenario, max_restarts=1, retries=5, required=True)


def test_replica_that_dies_in_its_start_is_replaced(ray_local: ModuleType, tmp_path: Path) -> None:
    mishaps(tmp_path, "die-in-start", 2)

    async def scenario(pool: RewardPool) -> tuple[RewardScores, dict[str, float]]:
        return await score(pool, [request(1)]), pool.counters()

    scores, totals = run(tmp_path, scenario)
    assert levels(scores) == [1]
    assert totals["restarts"] == 2


def test_pool_whose_replicas_always_die_in_their_start(ray_local: ModuleType, tmp_path: Path) -> None:
    mishaps(tmp_path, "die-in-start", 2)

    async def never(pool: RewardPool) -> None:
        raise AssertionError("the pool started")

    with pytest.raises(RewardPoolError, match=r"reward pool FakeReward has no replica left; last: .*#0"):
        run(tmp_path, never, max_restarts=1)


def test_scores_outlive_the_pool_but_a_full_disk_ends_nothing(
    ray_local: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def one(pool: RewardPool) -> RewardScores:
        return await score(pool, [request(1), request(2, "none")])

    async def two(pool: RewardPool) -> list[RewardScores]:
        before = await one(pool)
        monkeypatch.setattr(ScoreJournal, "add", full)
        return [before, await score(pool, [request(3), request(4)]), await score(pool, [request(5)])]

    # The fake reward writes into the folder of its "weights", which would make another reward of it.
    monkeypatch.setattr(score_journal, "scorer_hash", lambda _: "0" * 32)
    journal = tmp_path / "journal"
    assert levels(run(tmp_path, one, journal=journal)) == [1, None]
    before, *after = run(tmp_path, two, journal=journal)
    assert levels(before) == [1, None] and before.counters["cache_hits"] == 1  # a missing score is asked for again
    assert [levels(scores) for scores in after] == [[3, 4], [5]]
    (warning,) = [line.getMessage() for line in caplog.records if "cannot keep scores" in line.getMessage()]
    assert warning.startswith("reward pool FakeReward: cannot keep scores in ") and "No space left" in warning


def test_bugs_of_a_reward_are_raised_and_leave_the_pool_working(shared: Shared) -> None:
    async def scenario(pool: RewardPool) -> RewardScores:
        odd = await score(pool, [request(30, "bug"), request(31)])
        assert levels(odd) == [None, 31] and odd.counters["missing/refused"] == 1
        with pytest.raises(ZeroDivisionError, match="a bug in the reward"):
            await asyncio.gather(*(score(pool, [request(level, "bug")]) for level in range(3)))
        return await score(pool, [request(32)])

    assert levels(shared.run(scenario)) == [32]


def test_lost_requests_are_named_and_do_not_disturb_others(shared: Shared) -> None:
    lost = lost_reference()

    async def scenario(pool: RewardPool) -> Any:
        calls = pool.score(lost, [b"41"]), score(pool, [request(42)])
        return await asyncio.gather(*calls, return_exceptions=True)

    error, scores = shared.run(scenario)
    assert isinstance(error, RequestsLostError)
    assert "reward pool FakeReward: Failed to retrieve object" in str(error)
    assert isinstance(scores, RewardScores)
    assert levels(scores) == [42]


def test_start_reports_bad_settings_and_deadline(ray_local: ModuleType, tmp_path: Path) -> None:
    async def never(pool: RewardPool) -> None:
        raise AssertionError("the pool started")

    with pytest.raises(UserError, match=r"^rewards\.fake\.path: no such folder"):
        run(tmp_path / "nowhere", never, name="fake")
    with pytest.raises(CallTimeout, match="FakeReward reward #0: call 'start' has not answered"):
        run(tmp_path, never, placement=Placement({"CPU": 1000.0}), start_deadline_s=0.5)
    with pytest.raises(UserError, match="unknown reward 'nice'"):
        make_pool_settings("nice", {})
