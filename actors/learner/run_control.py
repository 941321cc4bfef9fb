"""Who has a run, and how it is asked to stop: one process a run, and a checkpoint before SIGTERM ends it."""

from __future__ import annotations

import fcntl
import json
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from deepgen.config import Settings
from deepgen.errors import Terminated
from deepgen.file_lock import file_lock

STOP = "stop-requested"  # file in the run's folder that asks the learner to stop after its step
HALTED = "halted.json"  # file in the folder of a run that an alarm has ended


def run_lock(settings: Settings) -> AbstractContextManager[None]:
    """Hold run.name in run.dir until the context ends (`file_lock`).

    Raises UserError if another process has it, naming that process, or if run.dir is not writable.
    """
    return file_lock(
        lock_file(settings),
        "run.dir",
        "the run",
        lambda holder: (
            f"run.name: {settings.run.name!r} in {settings.run.dir} is running already, {holder}; "
            "allowed: another run.name, or this one after that process has ended"
        ),
        "start again",
    )


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


@dataclass(frozen=True)
class Halt:
    """Why a run ended before its last step, and what its result is: the weights after `result_step` steps."""

    step: int  # steps that were done
    alarm: str
    action: str  # stop or roll_back
    line: str  # of the alarm
    result_step: int
    attempt: str = ""  # the start of the run that it ended (`CheckpointStore`)


def write_halt(run_folder: Path, halt: Halt | None) -> None:
    """Note the end of a run beside it; None removes the note of an earlier end."""
    file = run_folder / HALTED
    if halt is None:
        file.unlink(missing_ok=True)
    else:
        file.write_text(json.dumps(asdict(halt), indent=1), encoding="utf-8")


def read_halt(run_folder: Path) -> Halt | None:
    """Why an alarm has ended the run; None if none has."""
    file = run_folder / HALTED
    return Halt(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def result_text(halt: Halt) -> str:
    kept = "" if halt.action == "stop" else ", before the held-out rewards began to fall"
    return f"its result are the weights after step {halt.result_step}{kept}"
