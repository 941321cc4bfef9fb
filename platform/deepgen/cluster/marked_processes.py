"""Processes that carry a mark in their environment, and what they started: found and ended, and no other process.

For a cluster whose head outlives the program that started it. Ray's own `ray stop` ends every Ray process of the user.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from deepgen.errors import UserError

_POLL_S = 0.1
_GONE = (FileNotFoundError, ProcessLookupError, PermissionError)


@dataclass(frozen=True)
class Process:
    """A process. started: clock ticks since boot, so that the next one of this number is not taken for it."""

    pid: int
    parent: int
    started: int


def marked(mark: str) -> set[Process]:
    """All processes of this user whose environment had `mark` (NAME=VALUE) at their start, and all below them.

    Those below count because some overwrite their environment with a title. This process is left out.
    """
    alive = {process.pid: process for process in _processes()}
    wanted = mark.encode()
    found = {pid for pid in alive if wanted in _environment(pid)}
    grown = True
    while grown:
        below = {pid for pid, process in alive.items() if process.parent in found} - found
        found |= below
        grown = bool(below)
    return {alive[pid] for pid in found - {os.getpid()}}


def end_marked(mark: str, soft_s: float, hard_s: float) -> int:
    """End them: SIGTERM, after `soft_s` SIGKILL. Returns how many there were; all are gone.

    What they start meanwhile is ended, too. Raises UserError with their numbers if some are left `hard_s` later.
    """
    started = time.monotonic()
    known: set[Process] = set()
    while True:
        known |= marked(mark)
        left = {process for process in known if process in set(_processes())}
        if not left:
            return len(known)
        age = time.monotonic() - started
        if age > soft_s + hard_s:
            numbers = ", ".join(str(process.pid) for process in sorted(left, key=lambda one: one.pid))
            raise UserError(f"processes {numbers} have not ended within {age:.0f} s, although they were killed")
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM if age < soft_s else signal.SIGKILL)
        time.sleep(_POLL_S)


def _processes() -> Iterator[Process]:
    """All processes that have not ended (`man 5 proc`: state, parent and start are fields 3, 4 and 22 of stat)."""
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            # The name, in parentheses, may hold anything.
            fields = Path(entry.path, "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except _GONE:
            continue
        if fields[0] not in "ZX":
            yield Process(int(entry.name), int(fields[1]), int(fields[19]))


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except _GONE:  # of another user, or ended meanwhile
        return []
