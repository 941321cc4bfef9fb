"""What a failing reward costs: the one request that kills it, a dead service, a required reward, more replicas."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import Any

import numpy as np
import pytest
from ray.exceptions import OutOfMemoryError

from actors.experience.scoring import reward_pool
from actors.experience.scoring.pool_parts import MOST_TOLD, FailureLines, RewardPoolError, RewardScores
from actors.experience.scoring.reward_pool import RewardPool
from rewards import Missing, RewardBroken, RewardUnavailable, Score
from tests.helpers.local_replicas import Death, Hang, Script, ask, in_pool, script

__all__ = ["script"]

NAMES = [f"{n:04}" for n in range(64)]


def unless(bad: str | None, error: BaseException) -> Any:
    """Scores of a batch: each name's number, but the error if `bad` is among them; None: always."""

    def score(names: list[str]) -> list[Score]:
        if bad is None or bad in names:
            raise error
        return [float(name) for name in names]

    return score


def why(scores: RewardScores) -> dict[int, str]:
    return {n: reason.reason for n, reason in enumerate(scores.reasons) if reason is not None}


# -- the poisonous request -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "reason", "restarts"),
    [
        (Death(), "died", True),
        (OutOfMemoryError("killed by the memory monitor"), "died", True),
        (RewardBroken("the engine has failed"), "died", True),
        (ValueError("odd"), "refused", False),
    ],
)
@pytest.mark.parametrize("place", [0, 37, 63])
def test_only_the_request_that_breaks_a_batch_is_missing(
    script: Script, error: BaseException, reason: str, restarts: bool, place: int
) -> None:
    script.score = unless(NAMES[place], error)

    async def work(pool: RewardPool) -> tuple[RewardScores, dict[str, float]]:
        return await ask(pool, NAMES), pool.counters()

    scores, totals = in_pool(work, batch_size=64)
    assert why(scores) == {place: reason}
    assert [value for value in scores.values if value is not None] == [n for n in range(64) if n != place]
    broken = [call for call in script.calls if NAMES[place] in call]
    assert len(broken) == 1 + math.log2(64)  # bounded work
    assert totals["missing"] == totals[f"missing/{reason}"] == 1
    assert totals["restarts"] == (len(broken) if restarts else 0)
    asked = [name for call in script.calls if NAMES[place] not in call for name in call]
    assert len(asked) == len(set(asked)) == 63  # nobody else was scored twice


def test_a_death_that_comes_once_costs_no_score(script: Script) -> None:
    def score(names: list[str]) -> list[Score]:
        if len(script.calls) == 1:
            raise Death
        return [1.0 for _ in names]

    script.score = score
    assert in_pool(lambda pool: ask(pool, NAMES[:8])).values == [1.0] * 8


def test_a_broken_reward_gets_another_process_until_one_works(script: Script) -> None:
    """Its next process breaks in its first call, too."""
    lives: list[int] = []

    def fail_twice(names: list[str]) -> list[Score]:
        lives.append(script.processes)
        if len(lives) in (2, 3):
            raise RewardBroken("the engine has failed")
        return [1.0 for _ in names]

    script.score = script.check = fail_twice

    async def work(pool: RewardPool) -> tuple[RewardScores, dict[str, float]]:
        return await ask(pool, NAMES[:8]), pool.counters()

    scores, totals = in_pool(work)
    assert scores.values == [1.0] * 8 and totals["restarts"] == 2
    assert lives[:4] == [1, 1, 2, 3] and script.processes == 3


def test_a_request_that_hangs_costs_few_others_and_only_the_attempts_that_are_allowed(script: Script) -> None:
    script.score = unless(NAMES[5], Hang())
    scores = in_pool(lambda pool: ask(pool, NAMES[:16]), batch_size=16, deadline_s=0.1, retries=4)
    assert why(scores) == {5: "deadline"}
    script.calls.clear()
    scores = in_pool(lambda pool: ask(pool, NAMES[:16]), batch_size=16, deadline_s=0.1, retries=1)
    assert len(why(scores)) == 8 and len([call for call in script.calls if NAMES[5] in call]) == 2


def test_a_prompt_with_which_the_reward_always_fails_costs_its_own_scores(script: Script) -> None:
    def score(names: list[str]) -> list[Score]:
        if any(name.startswith("odd") for name in names):
            raise UnicodeDecodeError("ascii", b"x", 0, 1, "odd")
        return [1.0 for _ in names]

    script.score = score

    async def work(pool: RewardPool) -> list[RewardScores]:
        return await asyncio.gather(*(ask(pool, [f"{kind}{n}" for n in range(8)]) for kind in ("a", "odd", "b")))

    found = in_pool(work, batch_size=64)
    assert [scores.values for scores in found] == [[1.0] * 8, [None] * 8, [1.0] * 8]


def test_errors_with_one_prompt_after_the_other_are_a_bug(script: Script) -> None:
    script.score = unless(None, ZeroDivisionError("a bug"))

    async def work(pool: RewardPool) -> RewardScores:
        with pytest.raises(ZeroDivisionError, match="a bug"):
            await asyncio.gather(*(ask(pool, NAMES[n : n + 4]) for n in range(0, 64, 4)))
        assert len(script.calls) <= 4 + 2 * 7 + 5  # down to the first prompt, all of two prompts, a few more
        script.score = unless("none of these", Death())
        return await ask(pool, NAMES[:2])

    assert in_pool(work, batch_size=64).values == [0, 1]


def test_an_exception_that_goes_away_in_halves_is_told_once_with_its_line(
    script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    def score(names: list[str]) -> list[Score]:
        if len(names) > 4:
            raise ValueError(f"only 4\nnot {len(names)}")
        return [1.0] * (len(names) - (len(names) == 3))

    async def work(pool: RewardPool) -> list[RewardScores]:
        return [await ask(pool, NAMES[n : n + size]) for n, size in ((0, 8), (8, 8), (16, 3), (19, 3))]

    script.score = score
    found = in_pool(work)
    assert [scores.values for scores in found] == [[1.0] * size for size in (8, 8, 3, 3)]
    lines = [record.getMessage() for record in caplog.records if "the reward raised" in record.getMessage()]
    assert len(lines) == 2  # one for each kind
    assert lines[0].startswith("mine reward #0: the reward raised ValueError for 8 images: only 4 (")
    assert "test_pool_limits.py:" in lines[0] and 'in score: raise ValueError(f"only 4' in lines[0]
    assert lines[1].startswith(
        "mine reward #0: the reward raised ValueError for 3 images: tests.helpers.local_replicas"
    )
    assert "returned 2 scores for 3 requests (" in lines[1]
    assert all(line.endswith("more like it are only counted: pool/mine/retries") for line in lines)


def test_what_is_true_or_false_is_no_score(script: Script) -> None:
    """It is a comparison, most likely, and the reward's author has not seen it yet."""
    given: list[Any] = [True, np.False_, 1, np.float32(0.5)]
    script.score = lambda names: given
    scores = in_pool(lambda pool: ask(pool, NAMES[:4]))
    assert scores.values == [None, None, 1.0, 0.5] and why(scores) == {0: "parse", 1: "parse"}
    assert (scores.reasons[0] or Missing("died")).detail == "mine reward #0: the reward gave True, which is no number"


def test_a_wrong_number_of_scores_is_no_score_of_anybody(script: Script) -> None:
    script.score = lambda names: [1.0] * (len(names) + (NAMES[3] in names))
    scores = in_pool(lambda pool: ask(pool, NAMES[:8]))
    assert why(scores) == {3: "refused"} and scores.values.count(1.0) == 7


# -- the breaker -----------------------------------------------------------------------------------------------------


def down(names: list[str]) -> list[Score]:
    raise RewardUnavailable("nobody listens")


def test_a_dead_service_is_told_once_and_costs_a_deadline_not_attempts(
    script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    script.score = down

    async def work(pool: RewardPool) -> tuple[list[RewardScores], float, RewardScores]:
        began = time.monotonic()
        calls = await asyncio.gather(*(ask(pool, [f"{n}"]) for n in range(40)))
        took = time.monotonic() - began
        script.score = lambda names: [3.0 for _ in names]
        return calls, took, await ask(pool, ["then"])

    calls, took, then = in_pool(work, batch_size=1, deadline_s=0.5, backoff_s=0.05)
    assert all(scores.values == [None] and why(scores) == {0: "transport"} for scores in calls)
    assert 0.5 <= took < 10
    assert len(script.calls) < 20  # 40 requests with 3 attempts each would be 120
    assert "nobody listens" in (calls[-1].reasons[0] or Missing("died")).detail
    assert then.values == [3.0]
    lines = [line.getMessage() for line in caplog.records]
    assert sum("does not answer; it gets a single request now and then" in line for line in lines) == 1
    assert sum("answers again" in line for line in lines) == 1


def test_a_short_outage_costs_no_score(script: Script) -> None:
    script.score = down

    async def work(pool: RewardPool) -> list[RewardScores]:
        calls = [asyncio.create_task(ask(pool, [f"{n}"])) for n in range(20)]
        await asyncio.sleep(0.2)
        script.score = lambda names: [float(name) for name in names]
        return await asyncio.gather(*calls)

    found = in_pool(work, batch_size=1, deadline_s=5.0, backoff_s=0.1)
    assert [scores.values for scores in found] == [[float(n)] for n in range(20)]


def test_a_service_that_wants_to_be_left_alone_costs_one_attempt(script: Script) -> None:
    """The other attempts would be refused before that as well, and then the scores were missing."""
    asked: list[float] = []

    def score(names: list[str]) -> list[Score]:
        asked.append(time.monotonic())
        if len(asked) == 1:
            raise RewardUnavailable("429", after_s=0.4)
        return [1.0 for _ in names]

    script.score = score

    async def work(pool: RewardPool) -> list[RewardScores]:
        first = asyncio.create_task(ask(pool, ["a"]))
        await asyncio.sleep(0.1)
        return [await ask(pool, ["b"]), await first]

    assert [scores.values for scores in in_pool(work, retries=1)] == [[1.0], [1.0]]
    assert asked[1] - asked[0] >= 0.4


def test_a_client_that_says_transport_itself_opens_the_breaker_too(script: Script) -> None:
    script.score = lambda names: [Missing("transport", "no route") for _ in names]

    async def work(pool: RewardPool) -> list[RewardScores]:
        return await asyncio.gather(*(ask(pool, [f"{n}"]) for n in range(40)))

    found = in_pool(work, batch_size=1, deadline_s=0.3, backoff_s=0.05)
    assert {tuple(why(scores).values()) for scores in found} == {("transport",)} and len(script.calls) < 20


def test_without_a_required_reward_the_run_ends_with_one_line(script: Script) -> None:
    script.score = down

    async def work(pool: RewardPool) -> str:
        began = time.monotonic()
        with pytest.raises(RewardPoolError) as caught:
            await asyncio.gather(*(ask(pool, [f"{n}"]) for n in range(10)))
        assert time.monotonic() - began < 10
        with pytest.raises(RewardPoolError):
            await ask(pool, ["later"])
        return str(caught.value)

    said = in_pool(work, batch_size=1, deadline_s=0.3, required=True)
    assert said.startswith("rewards.mine.required: the reward has not answered for 0.3 s, and it is required; last: ")
    assert "nobody listens" in said and "\n" not in said


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_pool_whose_processes_all_die_comes_back(script: Script, replicas: int) -> None:
    script.score = unless(None, Death())

    async def work(pool: RewardPool) -> tuple[list[RewardScores], RewardScores]:
        lost = await asyncio.gather(*(ask(pool, [f"{n}"]) for n in range(6)))
        script.score = lambda names: [1.0 for _ in names]
        return lost, await ask(pool, ["then"])

    lost, then = in_pool(work, batch_size=1, deadline_s=0.4, backoff_s=0.01, max_restarts=2, replicas=replicas)
    assert {scores.values[0] for scores in lost} == {None} and then.values == [1.0]


# -- replicas --------------------------------------------------------------------------------------------------------


def test_a_pool_grows_while_requests_wait_and_shrinks_when_idle(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_pool, "GROW_AFTER_S", 0.02)
    monkeypatch.setattr(reward_pool, "IDLE_S", 0.3)
    script.score = unless("0001", Hang())  # keeps the first replica from taking the rest

    async def until(pool: RewardPool, replicas: int) -> None:
        async with asyncio.timeout(20):
            while len(pool.replica_actors()) != replicas:
                await asyncio.sleep(0.01)

    async def work(pool: RewardPool) -> list[RewardScores]:
        await until(pool, 1)
        calls = [asyncio.create_task(ask(pool, [name])) for name in ("0001", *NAMES[2:40])]
        await until(pool, 2)
        found = await asyncio.gather(*calls)
        await until(pool, 1)
        return [*found, await ask(pool, ["0063"])]

    found = in_pool(work, batch_size=4, deadline_s=1.0, retries=0, replicas="1..3")
    assert [scores.values[0] for scores in found[4:]] == [*range(5, 40), 63]  # those before were asked with the one


def test_pauses_change_no_score_and_are_the_same_in_two_runs(
    script: Script, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pauses: list[list[float]] = []
    plain = RewardPool._pause_s

    def noted(pool: RewardPool, *arguments: Any) -> float:
        pauses[-1].append(plain(pool, *arguments))
        return pauses[-1][-1]

    monkeypatch.setattr(RewardPool, "_pause_s", noted)
    caplog.set_level(logging.CRITICAL)
    found = []
    for _ in range(2):
        pauses.append([])
        script.score = unless(NAMES[3], Death())
        found.append(in_pool(lambda pool: ask(pool, NAMES[:8])).values)
    assert found[0] == found[1] and pauses[0] == pauses[1]
    assert len(set(pauses[0])) == len(pauses[0]) > 2


def test_a_bad_day_of_a_service_does_not_flood_the_console(caplog: pytest.LogCaptureFixture) -> None:
    lines = FailureLines("far")
    for number in range(50):
        lines.tell(Missing("transport", f"call {number}: status 500"), "16 requests are tried again, 0 are missing")
    lines.tell(Missing("deadline", "no answer"), "0 requests are tried again, 1 are missing")
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == MOST_TOLD + 1 and told[0] == "call 0: status 500; 16 requests are tried again, 0 are missing"
    assert told[-2].endswith("more calls that fail like this (transport) are only counted: pool/far/retries")
    assert told[-1].startswith("no answer")
