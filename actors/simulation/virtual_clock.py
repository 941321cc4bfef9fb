"""An asyncio event loop whose time is virtual: it jumps to the next timer when nothing is left to do before it.

A program that waits only for timers and for its own tasks does in it what it does in real time, in the same order, in
the time that its own code takes. It cannot wait for the world outside: what it would run in a thread runs at once.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class StuckError(RuntimeError):
    """Nothing will ever happen: every task waits, and there is no timer."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """See the module. Its time begins at 0, in seconds."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_Jumps(self._jump))

    def time(self) -> float:
        """The virtual time in seconds."""
        return self._now

    def run_in_executor(self, executor: Any, func: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        """Run it now, in no time."""
        future: asyncio.Future[T] = self.create_future()
        future.set_result(func(*args))
        return future

    def _write_to_self(self) -> None:
        """There is no other thread that would have to wake this one."""

    def _jump(self, seconds: float | None) -> None:
        if seconds is None:
            raise StuckError(f"after {self._now:g} s every task waits for another one")
        self._now += seconds


class _Jumps(selectors.SelectSelector):
    """Where a loop would wait for files or the next timer, the time jumps."""

    def __init__(self, jump: Callable[[float | None], None]) -> None:
        super().__init__()
        self._jump = jump

    def select(self, timeout: float | None = None) -> list[Any]:
        """No file is ever ready. timeout: seconds until the next timer; None: there is none."""
        if timeout is None or timeout > 0:
            self._jump(timeout)
        return []


def run_virtual(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, run in a virtual loop. Raises what it raises, and StuckError."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)
