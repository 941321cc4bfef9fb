"""Before the first step each reward scores a request like the run's, and says by name what is wrong."""

from __future__ import annotations

import asyncio
import logging
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
from ray.exceptions import RayTaskError, UnserializableException

from actors.experience.scoring.pool_parts import RewardPoolError, RewardScores
from actors.experience.scoring.replica import CallTimeout
from actors.experience.scoring.reward_pool import RewardPool
from actors.experience.scoring.start_check import check_requests
from deepgen.config.schema.pools import make_pool
from deepgen.config.schema.sections import TASKS
from deepgen.errors import UserError
from rewards import Missing, RewardRequest, RewardUnavailable, Score
from tests.helpers.local_replicas import Death, Hang, Script, ask, in_pool, script
from tests.helpers.servers import reply, server

__all__ = ["script"]

HERE = "tests.experience.scoring.test_start_check"


class EditsOnly:
    @staticmethod
    def applies(request: RewardRequest) -> bool:
        return bool(request.references)

    def score_groups(self, groups: Any) -> Any: ...


def raising(error: BaseException) -> Callable[[list[str]], list[Score]]:
    def check(names: list[str]) -> list[Score]:
        raise error

    return check


async def nothing(pool: RewardPool) -> None: ...


@pytest.mark.parametrize(
    ("check", "said"),
    [
        (
            raising(RewardUnavailable("no route to judge")),
            "no route to judge; see to what it asks for scores",
        ),
        (lambda names: [Missing("transport", "HTTP 502")], "HTTP 502; see to what it asks for scores"),
        (raising(ValueError("shapes\nof two")), "ValueError: shapes; see the traceback above"),
        (raising(UnserializableException("its own")), "UnserializableException: "),  # an error that cannot be pickled
        (lambda names: [], "ValueError: tests.helpers.local_replicas:Scripted returned 0 scores for 1 requests; see"),
    ],
)
def test_a_reward_that_cannot_score_is_named_before_the_first_step(script: Script, check: Any, said: str) -> None:
    script.check = script.score = check  # a second attempt goes no better
    with pytest.raises(UserError) as caught:
        in_pool(nothing)
    line = str(caught.value)
    assert line.startswith(f"rewards.mine: the reward cannot score a first request: {said}") and "\n" not in line
    assert line.endswith("its options rewards.mine.*, or give it no weight")


def test_a_first_request_without_a_score_is_told_but_ends_nothing(
    script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    script.check = lambda names: [Missing("parse", "no digit in 'hm'")]
    in_pool(nothing)
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert line == "rewards.mine: the first request has no score (parse: no digit in 'hm')"


@pytest.mark.parametrize(
    ("status", "url", "key"),
    [
        ("401 Unauthorized", "/clip", "token_env"),
        ("403 Forbidden", "/clip", "token_env"),
        ("404 Not Found", "/cilp", "url"),
        ("405 Method Not Allowed", "/", "url"),
        ("302 Found", "/", "url"),
    ],
)
def test_a_wrong_token_or_address_ends_the_start_with_what_to_set(
    script: Script, status: str, url: str, key: str
) -> None:
    with server({"/": reply(b"no", status)}) as port, pytest.raises(UserError) as caught:
        in_pool(nothing, timeout_s=4.0, **{"class": "remote", "url": f"http://127.0.0.1:{port}{url}"})
    line = str(caught.value)
    assert line.startswith(
        f"rewards.mine: the reward cannot score a first request: http://127.0.0.1:{port}{url} answers"
    )
    assert status[:3] in line and line.endswith(f"; set rewards.mine.{key}, or give it no weight") and "\n" not in line


@pytest.mark.parametrize("judge", ["vlm_judge", "vlm_duel"])
@pytest.mark.parametrize(("status", "keys"), [("401 No", ["token_env"]), ("404 Not Found", ["endpoint", "model"])])
def test_so_does_that_of_a_judge(script: Script, judge: str, status: str, keys: list[str]) -> None:
    options = {"class": judge, "model": "m", "gpus": 0.0}
    with server({"/": reply(b"no", status)}) as port, pytest.raises(UserError) as caught:
        in_pool(nothing, endpoint=f"http://127.0.0.1:{port}/v1", **options)
    wanted = " or ".join(f"rewards.mine.{key}" for key in keys)
    assert f"status {status[:3]}" in str(caught.value) and str(caught.value).endswith(
        f"; set {wanted}, or give it no weight"
    )


def test_a_service_that_is_busy_at_the_start_is_asked_again(script: Script) -> None:
    script.check = raising(RewardUnavailable("loading"))
    script.score = lambda names: [1.0 for _ in names]
    in_pool(nothing, retries=1)
    assert len(script.calls) == 1 and script.processes == 1
    script.score = raising(RewardUnavailable("still loading"))
    with pytest.raises(UserError, match="still loading"):
        in_pool(nothing, retries=3)
    assert len(script.calls) == 1 + 3


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_reward_that_hangs_in_its_first_request_gets_its_attempts_in_new_processes(
    script: Script, times: int
) -> None:
    def check(names: list[str]) -> list[Score]:
        if script.processes <= times:
            raise Hang
        return [0.0 for _ in names]

    script.check = check
    if times < 3:
        in_pool(nothing, deadline_s=0.05, retries=2)
        assert script.processes == times + 1
        return
    with pytest.raises(UserError) as caught:
        in_pool(nothing, deadline_s=0.05, retries=2)
    line, late = str(caught.value), r"mine reward #0: call 'first score' has not answered after 0\.\d s "
    assert script.processes == 3 and "\n" not in line
    assert re.match(rf"rewards\.mine: the reward cannot score a first request: {late}\(deadline 0\.05 s\); see", line)


def test_attempts_at_a_first_request_end_with_the_start(script: Script) -> None:
    script.check = raising(Hang())
    with pytest.raises(UserError, match=r"'first score' .*; cluster\.start_deadline_s is over; see to what it asks"):
        in_pool(nothing, deadline_s=0.05, retries=20, start_deadline_s=0.2)
    assert 1 < script.processes < 10
    script.starts = [None, Hang()]  # the second process does not even load
    with pytest.raises(UserError, match=r"'first score' .*; cluster\.start_deadline_s is over; see to what it asks"):
        in_pool(nothing, deadline_s=0.05, retries=20, start_deadline_s=0.2)


def test_a_reward_that_never_loads_is_named_too(script: Script) -> None:
    script.starts = [Hang()]
    with pytest.raises(CallTimeout, match=r"mine reward #0: call 'start' has not answered"):
        in_pool(nothing, deadline_s=0.05, retries=2, start_deadline_s=0.1)
    assert script.processes == 1


def test_the_traceback_of_a_first_request_travels_with_the_line_which_comes_last(script: Script) -> None:
    script.check = raising(ValueError("shapes of two"))
    with pytest.raises(UserError) as caught:
        in_pool(nothing)
    arrived = RayTaskError("start", "remote", pickle.loads(pickle.dumps(caught.value))).as_instanceof_cause()
    trace, line = arrived.words().rsplit("\n", 1)
    assert trace.startswith("mine reward #0 could not score a first request:\n")
    assert trace.endswith("ValueError: shapes of two")
    assert line == f"error: {caught.value}" and "traceback above" in line


def test_a_token_that_is_refused_during_the_run_is_told_as_a_dead_service(
    script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    script.score = lambda names: [Missing("refused", "status 401", ("token_env",)) for _ in names]

    async def work(pool: RewardPool) -> list[RewardScores]:
        return await asyncio.gather(*(ask(pool, [f"{n}"]) for n in range(40)))

    found = in_pool(work, batch_size=1, deadline_s=0.3, backoff_s=0.05)
    reasons = [scores.reasons[0].reason for scores in found if scores.reasons[0]]
    assert len(reasons) == 40 and set(reasons) == {"refused", "transport"} and len(script.calls) < 20
    assert "reward pool mine does not answer" in caplog.text and caplog.text.count("status 401") == 2


def test_a_process_that_dies_in_its_first_request_again_and_again(script: Script) -> None:
    script.check = raising(Death())
    with pytest.raises(RewardPoolError, match="reward pool mine has no replica left; last: mine reward #0"):
        in_pool(nothing, max_restarts=2)
    assert script.processes == 3


def test_a_service_that_is_down_when_a_replica_is_replaced_ends_nothing(script: Script) -> None:
    def once(names: list[str]) -> list[Score]:
        script.check = raising(RewardUnavailable("restarting"))
        script.score = lambda names: [2.0 for _ in names]
        raise Death

    script.score = once

    async def work(pool: RewardPool) -> RewardScores:
        return await ask(pool, ["a", "b"])

    assert in_pool(work).values == [2.0, 2.0] and script.processes == 2


def test_the_request_is_one_of_the_tasks_that_the_reward_scores() -> None:
    plain = make_pool("plain", {"class": "tests.helpers.local_replicas:Scripted"})
    edits = make_pool("edits", {"class": f"{HERE}:EditsOnly"})
    (request,) = check_requests(plain, ["reasoning", "edit"])
    assert request.task == "reasoning" and request.target != request.prompt and not request.references
    first, second = check_requests(edits, TASKS)  # two, because it compares them
    assert first.task == "edit" and (first.image != second.image).any()
    assert first.references[0].shape == first.image.shape == (64, 64, 3) and first.image.dtype == "uint8"
    assert check_requests(edits, ["t2i"]) == []
