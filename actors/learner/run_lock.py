"""One process a run: a second start of the same run is refused, and the first is left alone."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from deepgen.config import Settings, UserError


@contextmanager
def run_lock(settings: Settings) -> Iterator[None]:
    """Hold run.name in run.dir until the context ends.

    The operating system holds the lock, so it ends with its process, however that dies: no stale file has to be
    removed before a `--resume`. On a network file system, the lock reaches other hosts if the mount supports flock.

    Raises UserError if another process has it, naming that process, or if run.dir is not writable.
    """
    path = lock_file(settings)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise UserError(f"run.dir: cannot write the run folder {path.parent}: {error.strerror or error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(
                f"run.name: {settings.run.name!r} in {settings.run.dir} is running already, {file.read().strip()}; "
                "allowed: another run.name, or this one after that process has ended"
            ) from error
        file.truncate(0)
        now = datetime.now().astimezone()
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {now:%Y-%m-%d %H:%M:%S %z}\n")
        file.flush()
        yield


def lock_file(settings: Settings) -> Path:
    """Beside the run's folder, not in it: a new run of the same name renames the folder."""
    return settings.run.dir / f".{settings.run.name}.lock"
