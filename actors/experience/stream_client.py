"""Calls on the experience stream that outlive its process.

Ray starts a dead stream again, in its first state. Every call may be made twice: what a stream answers follows from its
arguments and from the policy versions that the learner has published. So a call that the stream's death interrupted is
simply made again. `ExperienceSource` publishes the versions anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayTaskError

RESTARTS = -1  # of the stream: no limit, see ATTEMPTS
ATTEMPTS = 20  # of one call; some of them meet a stream that is still starting
_LOOK_S = 0.2  # between looks at what else may end a wait
_PAUSE_S = 1.0  # before a stream that is starting again is asked again


class StreamLostError(RuntimeError):
    """The stream is gone, or dies whenever it is asked."""


class StreamForgotError(RuntimeError):
    """The stream has started again and does not know the learner's versions yet."""


class VersionGoneError(LookupError):
    """A policy version is no longer there."""


@dataclass(frozen=True)
class Request:
    """A call under way."""

    method: str
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    reference: Any
    since: float


class StreamClient:
    """The stream as another process calls it. `deadline_s`: longest wait for one answer."""

    def __init__(self, stream: Any, deadline_s: float) -> None:
        self._stream, self._deadline_s = stream, deadline_s

    def request(self, method: str, *arguments: Any, **named: Any) -> Request:
        """Make a call. Returns at once; `wait` returns the answer."""
        reference = getattr(self._stream, method).remote(*arguments, **named)
        return Request(method, arguments, named, reference, time.monotonic())

    def ask(self, method: str, *arguments: Any, meanwhile: Callable[[], None] | None = None, **named: Any) -> Any:
        """Make a call and wait for the answer, see `wait`."""
        return self.wait(self.request(method, *arguments, **named), meanwhile)

    def wait(self, request: Request, meanwhile: Callable[[], None] | None = None) -> Any:
        """The answer to a call, made again if the stream dies. `meanwhile` runs every 0.2 s; its error ends the wait.

        Raises the stream's own error, StreamLostError, or TimeoutError after the deadline.
        """
        deaths = 0
        while True:
            try:
                return self._answer(request, meanwhile)
            except RayTaskError:  # raised by the stream, which lives: perhaps for the death of another actor
                raise
            except ActorDiedError as error:
                raise StreamLostError(f"the experience stream is gone, in {request.method}") from error
            except ActorUnavailableError as error:
                deaths += 1
                if deaths == ATTEMPTS:
                    raise StreamLostError(
                        f"the experience stream has died {deaths} times in {request.method}"
                    ) from error
                if time.monotonic() - request.since > self._deadline_s:
                    raise _late(request) from error
                time.sleep(_PAUSE_S)
            again = self.request(request.method, *request.arguments, **request.named)
            request = replace(again, since=request.since)

    def _answer(self, request: Request, meanwhile: Callable[[], None] | None) -> Any:
        try:
            while meanwhile and not ray.wait([request.reference], timeout=_LOOK_S)[0]:
                meanwhile()
                if time.monotonic() - request.since > self._deadline_s:
                    raise _late(request)
            return ray.get(request.reference, timeout=self._deadline_s)
        except GetTimeoutError as error:
            raise _late(request) from error


def _late(request: Request) -> TimeoutError:
    age = time.monotonic() - request.since
    return TimeoutError(f"the experience stream has not answered {request.method} after {age:.0f} s")
