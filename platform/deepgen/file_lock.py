"""A lock on a file, so that one process at a time writes into a folder."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from deepgen.errors import UserError, writing


@contextmanager
def file_lock(path: Path, key: str, what: str, taken: Callable[[str], str], then: str) -> Iterator[None]:
    """Hold the file until the context ends. It and its folder are made if they are not there, and stay.

    The operating system holds the lock, so it ends with its process, however that dies: no stale file has to be
    removed. On a network file system, the lock reaches other hosts if the mount supports flock.

    key, what: the setting that names the folder, and what is in it. taken: the error's message if another process has
    the file, from that process's description. then: what to do once the file can be written.

    Raises UserError if another process has it, or if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{key}: cannot write {what} folder {path.parent}: {error.strerror or error}") from error
    with file:
        if not lock(file.fileno()):
            file.seek(0)
            raise UserError(taken(file.read().strip()))
        now = datetime.now().astimezone()
        with writing(f"who has {what}", path, then, key):
            os.ftruncate(file.fileno(), 0)
            holder = f"process {os.getpid()} on {socket.gethostname()} since {now:%Y-%m-%d %H:%M:%S %z}\n"
            os.write(file.fileno(), holder.encode())  # by no buffer, which closing the file would try to write again
        yield


def lock(descriptor: int) -> bool:
    """Hold an open file or folder until it is closed. False if another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
