"""One deadline for a whole read, however many waits it has."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

_Result = TypeVar("_Result")


class Deadline:
    """A moment `seconds` from now."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds left, above 0. Raises TimeoutError if the moment has passed."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise self.error()
        return left

    def error(self, more: str = "") -> TimeoutError:
        return TimeoutError(f"not read within {self.seconds:g} s{more}")

    def call(self, function: Callable[[], _Result]) -> _Result:
        """The result of a call that has no deadline of its own. Raises its error, or TimeoutError.

        A call that is late goes on in its daemon thread, and its result is dropped.
        """
        result: list[_Result] = []
        errors: list[Exception] = []

        def run() -> None:
            try:
                result.append(function())
            except Exception as error:  # noqa: BLE001  carried to the caller's thread
                errors.append(error)

        thread = threading.Thread(target=run, name="read", daemon=True)
        thread.start()
        thread.join(self.left())
        if errors:
            raise errors[0]
        if not result:
            raise self.error()
        return result[0]
