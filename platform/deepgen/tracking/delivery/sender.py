"""Background delivery to a tracking server: in order, batched, with retries, without holding up training."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from deepgen.masking import masked

logger = logging.getLogger(__name__)

WARN_EVERY = 20  # failed attempts between two warnings
_NO_CAUSE = "(raised as a result of "  # SQLAlchemy's remark on where it was, before the line that says what
MAX_BATCH = 1000  # metrics in one request: MLflow's limit
_RETRY_S = (1.0, 5.0, 15.0, 60.0)  # waits after the first, second, ... failure in a row


class Item(Protocol):
    """One delivery. `send` raises if it fails; `merge` absorbs a later item and returns True, or returns False."""

    def send(self) -> None: ...

    def merge(self, other: Any) -> bool: ...


@dataclass
class SenderCounts:
    """Counts so far: failed attempts, items refused for good (bad content), items still waiting."""

    failed: int = 0
    refused: int = 0
    pending: int = 0
    last_error: str = field(default="")


class Sender:
    """A daemon thread that sends items one after the other.

    An item that fails stays first in line and is retried with growing pauses. So nothing arrives out of order, and
    nothing is lost while the process lives. `refused(error)` recognises errors that no retry can fix; such an item is
    counted and dropped.
    """

    def __init__(self, refused: Callable[[Exception], bool], hint: str) -> None:
        self._refused, self._hint = refused, hint
        self._inbox: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self._backlog: deque[Item] = deque()
        self._lock = threading.Lock()
        self._counts = SenderCounts()
        self._closing = threading.Event()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tracking-sender", daemon=True)
        self._thread.start()

    def put(self, item: Item) -> None:
        """Hand over an item and return at once."""
        with self._lock:
            self._counts.pending += 1
        self._inbox.put(item)

    def counts(self) -> SenderCounts:
        with self._lock:
            return SenderCounts(**vars(self._counts))

    def flush(self, deadline_s: float) -> bool:
        """Wait until everything handed over so far is delivered or refused. False if the deadline passes first."""
        end = time.monotonic() + deadline_s
        while self.counts().pending and time.monotonic() < end:
            time.sleep(0.01)
        return self.counts().pending == 0

    def close(self, deadline_s: float) -> int:
        """Try the remaining items once more, without pauses, and stop. Returns the number of undelivered items."""
        self._closing.set()
        self._inbox.put(None)
        self._done.wait(deadline_s)
        return self.counts().pending

    def _run(self) -> None:
        failures = 0
        while True:
            self._collect(block=not self._backlog and not self._closing.is_set())
            if not self._backlog:
                if self._closing.is_set():
                    break
                continue
            last_try = self._closing.is_set()
            if self._send_first():
                failures = 0
            elif last_try:
                break
            else:
                self._closing.wait(_RETRY_S[min(failures, len(_RETRY_S) - 1)])
                failures += 1
        self._done.set()

    def _collect(self, block: bool) -> None:
        while block or not self._inbox.empty():
            item = self._inbox.get()
            if item is None:
                return
            block = False
            if self._backlog and self._backlog[-1].merge(item):
                self._settle(1)
            else:
                self._backlog.append(item)

    def _send_first(self) -> bool:
        item = self._backlog[0]
        try:
            item.send()
        except Exception as error:  # noqa: BLE001  process boundary: whatever the server does, training goes on
            if not self._refused(error):
                self._note_failure(error)
                return False
            self._note_refusal(error)
        self._backlog.popleft()
        self._settle(1)
        return True

    def _settle(self, count: int) -> None:
        with self._lock:
            self._counts.pending -= count

    def _note_refusal(self, error: Exception) -> None:
        with self._lock:
            self._counts.refused += 1
            refused = self._counts.refused
        if refused % WARN_EVERY == 1:
            message = "TRACKING: the server refused a record for good (%d so far): %s. %s"
            logger.warning(message, refused, _named(error), self._hint)

    def _note_failure(self, error: Exception) -> None:
        with self._lock:
            self._counts.failed += 1
            self._counts.last_error = _named(error)
            counts = SenderCounts(**vars(self._counts))
        if counts.failed % WARN_EVERY == 1:
            message = "TRACKING: the server cannot be reached (attempt %d failed, %d records wait): %s. %s"
            logger.warning(message, counts.failed, counts.pending, counts.last_error, self._hint)


def first_line(error: Exception) -> str:
    """The first line of what an error says that tells the cause, without secrets; its type if it says nothing."""
    lines = [line for line in str(error).strip().splitlines() if not line.startswith(_NO_CAUSE)]
    return masked(lines[0])[:300] if lines else type(error).__name__


def _named(error: Exception) -> str:
    said, kind = first_line(error), type(error).__name__
    return said if said == kind else f"{kind}: {said}"
