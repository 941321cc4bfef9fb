"""A circuit breaker: while all calls of a reward fail, it is asked rarely, with one call at a time."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

FAILURES = 3  # failed calls in a row that open it
MAX_PAUSE_S = 30.0


class Breaker:
    """Closed, calls go on. After FAILURES failed calls in a row, of different requests, it is open: none goes on.

    After a pause one call may go as a probe (half-open). Its success closes the breaker; its failure doubles the pause.

    pause_s: the first pause. jitter: what pauses are shortened with, by up to a half, so that pools of one service do
    not ask it at the same moments.
    """

    def __init__(self, pause_s: float, jitter: random.Random, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._first_pause_s, self._jitter, self._clock = pause_s, jitter, clock
        self.opened: float | None = None  # since when it is open, by the clock
        self.last = ""  # what the last failed call died of
        self._in_a_row, self._probes = 0, 0
        self._next_probe = 0.0
        self.probing = False

    def succeeded(self) -> bool:
        """A call has been answered. Returns whether that closed the breaker."""
        was_open, self.opened = self.opened is not None, None
        self._in_a_row, self._probes, self.probing = 0, 0, False
        return was_open

    def failed(self, what: str, *, new: bool, probe: bool = False) -> bool:
        """A call has failed. `new`: with requests that had not failed before. Returns whether that opened the breaker.

        Calls that were under way when it opened say nothing new.
        """
        self.last = what
        if probe:
            self.probing = False
            self._plan_probe()
        elif self.opened is None and new:
            self._in_a_row += 1
            if self._in_a_row >= FAILURES:
                return self.open(what)
        return False

    def open(self, what: str) -> bool:
        """Open it at once. Returns whether it was closed."""
        self.last = what
        if self.opened is not None:
            return False
        self.opened = self._clock()
        self._plan_probe()
        return True

    def wait_s(self) -> float | None:
        """Seconds until a call may go on: 0 is now. None: not before the probe that is under way ends."""
        if self.opened is None:
            return 0.0
        return None if self.probing else max(0.0, self._next_probe - self._clock())

    def _plan_probe(self) -> None:
        pause = min(self._first_pause_s * 2**self._probes, MAX_PAUSE_S)
        self._next_probe = self._clock() + pause * self._jitter.uniform(0.5, 1)
        self._probes = min(self._probes + 1, 20)
