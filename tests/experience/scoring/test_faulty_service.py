"""A reward pool that asks a faulty service: every image's fate is counted, and the pool outlives the service's absence.

`tests/soak/test_faulty_services.py` does the same in a whole run.
"""

from __future__ import annotations

import asyncio
import logging
import time

import numpy as np
import pytest

from actors.experience.scoring.pool_parts import RewardScores
from actors.experience.scoring.reward_pool import RewardPool
from rewards import RewardRequest
from tests.helpers.fault_server import FAULTS, fault_server
from tests.helpers.local_replicas import LocalRef, Script, in_pool, script
from tests.rewards.remote.test_client import WANTED, brightness

__all__ = ["script"]

TIMEOUT_S, DEADLINE_S, SLACK_S = 0.8, 1.5, 30.0  # slack: the machine may be busy


async def ask(pool: RewardPool, *levels: int) -> RewardScores:
    """Scores of grey images."""
    requests = [RewardRequest(f"{level}", "", "t2i", np.full((8, 8, 3), level, np.uint8)) for level in levels]
    return await pool.score(LocalRef(requests), [b"%d" % level for level in levels])


def settings(url: str) -> dict[str, object]:
    return {
        "class": "remote",
        "url": url,
        "timeout_s": TIMEOUT_S,
        "deadline_s": DEADLINE_S,
        "retries": 1,
        "batch_size": 2,
    }


def check_counts(totals: dict[str, float], asked: int) -> None:
    by_reason = sum(count for key, count in totals.items() if key.startswith("missing/"))
    assert totals["asked"] == asked == totals["scored"] + totals["missing"] and totals["missing"] == by_reason


def test_every_image_has_a_score_or_a_reason(script: Script) -> None:
    """All faults in turn, a right answer after each."""
    turns = [fault for name in FAULTS for fault in (name, "")]
    levels = range(0, 240, 5)

    async def work(pool: RewardPool) -> tuple[RewardScores, dict[str, float]]:
        return await ask(pool, *levels), pool.counters()

    slow = {"retry_after": "0", "late_s": 30.0, "pause_s": 0.5}
    with fault_server(brightness, script=["", *turns], **slow) as scorer:
        scores, totals = in_pool(work, **settings(scorer.url))
    assert all(scorer.fates[fault] == 1 for fault in FAULTS)
    check_counts(totals, len(levels))
    # A call that failed on the way was tried again. On a busy machine more may be late than the service wants.
    lost = [2 for fault in FAULTS if WANTED[fault] in ("parse", "deadline")]
    assert totals["missing/parse"] + totals["missing/deadline"] == totals["missing"] >= sum(lost)
    assert totals["missing/deadline"] >= 2 * sum(WANTED[fault] == "deadline" for fault in FAULTS)
    for level, value in zip(levels, scores.values, strict=True):
        assert value is None or value == pytest.approx(level / 255)


def test_a_service_that_goes_and_comes_back(script: Script, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)

    async def until(pool: RewardPool, scored: bool, level: int) -> tuple[int, float]:
        """Ask until the outcome is this. Returns the next level, and the seconds of the longest call."""
        longest = 0.0
        async with asyncio.timeout(SLACK_S):
            while True:
                began = time.monotonic()
                scores = await ask(pool, level)
                longest, level = max(longest, time.monotonic() - began), level + 1
                if (scores.values[0] is not None) == scored:
                    return level, longest

    async def work(pool: RewardPool) -> None:
        level, _ = await until(pool, True, 0)
        first.unplug()
        level, longest = await until(pool, False, level)
        while "does not answer" not in caplog.text:
            level, longest = await until(pool, False, level)
        assert longest < DEADLINE_S + SLACK_S
        with fault_server(brightness, port=first.server_address[1]) as again:
            level, _ = await until(pool, True, level)
            assert "reward pool mine: answers again" in caplog.text and again.fates[""] >= 1
            check_counts(pool.counters(), level)

    with fault_server(brightness) as first:
        in_pool(work, **settings(first.url))
