"""Who has a run, and how it is asked to stop: one process a run, and a checkpoint before SIGTERM ends it."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType

from deepgen.config import Settings, UserError
from deepgen.errors import Terminated, writing

STOP = "stop-requested"  # file in the run's folder that asks the learner to stop after its step


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
        file = path.open("a+", encoding="utf-8")
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
        now = datetime.now().astimezone()
        with writing("who has the run", path, "start again"):
            os.ftruncate(file.fileno(), 0)
            holder = f"process {os.getpid()} on {socket.gethostname()} since {now:%Y-%m-%d %H:%M:%S %z}\n"
            os.write(file.fileno(), holder.encode())  # by no buffer, which closing the file would try to write again
        yield


def lock_file(settings: Settings) -> Path:
    """Beside the run's folder, not in it: a new run of the same name renames the folder."""
    return settings.run.dir / f".{settings.run.name}.lock"


@dataclass(frozen=True)
class Holder:
    """Who has had a run last (`process 4242 on host since ...`), and whether that process still has it."""

    who: str
    lives: bool


def lock_holder(settings: Settings) -> Holder | None:
    """The last process of a run; None if nobody has ever started it. On another host, see `run_lock`."""
    try:
        file = lock_file(settings).open(encoding="utf-8")
    except FileNotFoundError:
        return None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # let go at once
            lives = False
        except BlockingIOError:
            lives = True
        return Holder(file.read().strip(), lives)


@contextmanager
def stops_after_a_step(settings: Settings) -> Iterator[None]:
    """On SIGTERM or SIGHUP, let the learner finish its step and write a checkpoint; then raise `Terminated`.

    Schedulers send these signals some time before they kill. A second signal raises `Terminated` at once. SIGHUP stays
    ignored under nohup. Call it in the main thread.
    """
    file = settings.run.folder / STOP
    file.unlink(missing_ok=True)

    def ask(number: int, frame: FrameType | None) -> None:
        if file.exists():
            raise Terminated
        try:
            file.touch()
        except OSError as error:  # the learner cannot be asked
            raise Terminated from error
        print("stopping after this step and its checkpoint; a second signal ends at once", flush=True)

    numbers = [signal.SIGTERM, *([] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP])]
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if file.exists():
        raise Terminated


def stop_requested(run_folder: Path) -> bool:
    """Whether the learner shall stop after its step."""
    return (run_folder / STOP).exists()
