"""When the circuit breaker of a reward pool opens, lets a probe go, and closes."""

from __future__ import annotations

import random

import pytest

from actors.experience.scoring.breaker import FAILURES, MAX_PAUSE_S, Breaker


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def opened(clock: Clock, pause_s: float = 1.0) -> Breaker:
    breaker = Breaker(pause_s, random.Random(0), clock=clock)
    assert breaker.open("all is dead") and not breaker.open("again")
    return breaker


def test_it_opens_after_failures_in_a_row_of_different_requests() -> None:
    breaker = Breaker(1.0, random.Random(0), clock=Clock())
    told = [breaker.failed("x", new=True) for _ in range(FAILURES - 1)]
    told += [breaker.failed("x", new=False) for _ in range(20)]  # one request, tried again and again
    assert not any(told) and breaker.opened is None and breaker.wait_s() == 0
    assert not breaker.succeeded()
    told = [breaker.failed("x", new=True) for _ in range(FAILURES)]
    assert told == [False] * (FAILURES - 1) + [True] and breaker.opened == 100


def test_one_probe_at_a_time_and_its_success_closes() -> None:
    clock = Clock()
    breaker = opened(clock)
    wait = breaker.wait_s()
    assert wait is not None and 0.5 <= wait <= 1
    clock.now += wait
    assert breaker.wait_s() == 0
    breaker.probing = True
    assert breaker.wait_s() is None
    assert not breaker.failed("still", new=True)  # a call that was under way when it opened
    assert breaker.wait_s() is None
    assert breaker.succeeded() and breaker.wait_s() == 0 and breaker.opened is None


def test_probes_that_fail_come_ever_more_rarely_up_to_a_limit() -> None:
    clock = Clock()
    breaker, waits = opened(clock), []
    for _ in range(12):
        waits.append(breaker.wait_s() or 0.0)
        clock.now += waits[-1]
        breaker.probing = True
        assert not breaker.failed("still", new=True, probe=True)
    assert all(0.5 * 2**n <= wait <= 2**n for n, wait in enumerate(waits[:4]))
    assert MAX_PAUSE_S / 2 <= waits[-1] <= MAX_PAUSE_S
    assert breaker.opened == 100  # since when, not since the last probe


def test_pauses_are_the_same_in_each_run_and_differ_between_pools() -> None:
    first, again, other = (Breaker(1.0, random.Random(name), clock=Clock()) for name in ("a", "a", "b"))
    for breaker in (first, again, other):
        breaker.open("x")
    assert first.wait_s() == again.wait_s() != pytest.approx(other.wait_s())
