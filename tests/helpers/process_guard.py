"""Makes a test fail if it starts a process without the mark that keeps it out of `make test-fast`."""

from __future__ import annotations

import functools
import multiprocessing.process
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest

MAY_START = ("ray", "vllm", "processes")
STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "os.exec", "multiprocessing")


class ProcessGuard:
    """While on, starting a process fails with a message that names the mark the test lacks.

    Python reports process starts to audit hooks, except those of multiprocessing's "spawn". So its `start` is wrapped.
    """

    def __init__(self) -> None:
        self._complaints: list[str] | None = None  # None: off
        sys.addaudithook(self._look)
        self._wrap_multiprocessing()

    @contextmanager
    def watching(self, marks: set[str]) -> Iterator[None]:
        """Watch a test with these marks. A complaint also counts if the code under test caught the exception."""
        before, self._complaints = self._complaints, None if marks & set(MAY_START) else []
        try:
            yield
        finally:
            found, self._complaints = self._complaints, before
        if found:
            pytest.fail(found[0])

    def _look(self, event: str, arguments: tuple[Any, ...]) -> None:
        """The audit hook: Python calls it for every audited event."""
        if self._complaints is not None and event in STARTS and not _called_from("platform"):  # platform calls `uname`
            mark = next((name for name in ("vllm", "ray") if _called_from(name)), "processes")
            what = f"{event} {arguments!r:.200}"
            self._complaints.append(f"a test that starts a process needs @pytest.mark.{mark}: {what}")
            pytest.fail(self._complaints[-1])

    def _wrap_multiprocessing(self) -> None:
        process: Any = multiprocessing.process.BaseProcess
        start = process.start

        @functools.wraps(start)
        def guarded(own: Any) -> None:
            self._look("multiprocessing", (own.name,))
            start(own)

        process.start = guarded


def _called_from(package: str) -> bool:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] == package:
            return True
        frame = frame.f_back
    return False


GUARD = ProcessGuard()  # one per test process, because an audit hook cannot be removed
