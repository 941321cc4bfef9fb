"""Processes that carry a mark in their environment, and what they started: found and ended, and no other process.

For a cluster whose head outlives the program that started it. Ray's own `ray stop` ends every Ray process of the user.
"""

from __future__ import annotations

import time
from contextlib import suppress

import psutil

from deepgen.errors import UserError

_POLL_S = 0.1


def marked(mark: str) -> set[psutil.Process]:
    """All processes of this user whose environment had `mark` (NAME=VALUE) at their start, and all below them.

    Those below count because some overwrite their environment with a title. This process is left out.
    """
    name, _, value = mark.partition("=")
    found = {process for process in psutil.process_iter() if _variable(process, name) == value}
    for process in list(found):
        with suppress(psutil.Error):  # it has ended
            found.update(process.children(recursive=True))
    return {process for process in found - {psutil.Process()} if _lives(process)}


def end_marked(mark: str, soft_s: float, hard_s: float) -> int:
    """End them: SIGTERM, after `soft_s` SIGKILL. Returns how many there were; all are gone.

    What they start meanwhile is ended, too. Raises UserError with their numbers if some are left `hard_s` later.
    """
    started = time.monotonic()
    known: set[psutil.Process] = set()
    while True:
        known |= marked(mark)
        left = [process for process in known if _lives(process)]
        if not left:
            return len(known)
        age = time.monotonic() - started
        if age > soft_s + hard_s:
            numbers = ", ".join(map(str, sorted(process.pid for process in left)))
            raise UserError(f"processes {numbers} have not ended within {age:.0f} s, although they were killed")
        for process in left:
            with suppress(psutil.Error):
                (process.terminate if age < soft_s else process.kill)()
        time.sleep(_POLL_S)


def _variable(process: psutil.Process, name: str) -> str | None:
    """A variable of its environment; None without it, for processes of other users, and for those that have ended."""
    with suppress(psutil.Error):
        found: str | None = process.environ().get(name)
        return found
    return None


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False
