"""The exception for user mistakes, and the wrapper around each program that turns it into an exit code."""

from __future__ import annotations

import difflib
import errno
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from safetensors import SafetensorError

USAGE_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 130
TERMINATED_EXIT_CODE = 143
# No space, no quota, file too large for the limit, read-only: nothing that trying again would mend.
_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})


class UserError(Exception):
    """A mistake the user can fix. The message is one line: what is wrong, what was given, what is allowed."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, as sent by schedulers and `ray job stop`. Handled like Ctrl-C, except for the exit code."""


@contextmanager
def writing(what: str, where: Path, then: str = "continue with --resume") -> Iterator[None]:
    """Around writing into the run's folder: its failure becomes a UserError that names the file or folder `where`.

    then: what to do once there is room.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        said = getattr(error, "strerror", None) or error
        raise UserError(
            f"run.dir: cannot write {what} to {where}: {said}; make room or let it be written, then {then}"
        ) from error


def disk_error(error: BaseException) -> OSError | None:
    """The OSError of a full or read-only disk: the exception itself, one that Ray has carried, or one of its causes."""
    while True:
        inner = getattr(error, "cause", None) or error.__cause__
        if isinstance(error, OSError) and error.errno in _DISK:
            return error
        if not isinstance(inner, BaseException):
            return None
        error = inner


def stop_on_sigterm() -> None:
    """Raise `Terminated` in the main thread on SIGTERM. Replaces Ray's handler, which aborts the process."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, stop)


def run_program(main: Callable[[], int | None], *, resumes: bool = True) -> NoReturn:
    """Run a stage's `main` and exit with its exit code.

    `UserError` exits with 2 and one line on stderr. Ctrl-C exits with 130 and SIGTERM with 143; both print the command
    that continues the run: the same one with --resume, or without it for a program that continues by itself
    (`resumes` False). A reader that closes the output early (`--help | head`) is no error. A full or read-only disk is
    reported like a UserError. Any other exception is a bug and keeps its traceback.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background programs that ignore Ctrl-C
    stop_on_sigterm()
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python's flush at exit must not fail either
        code = 0
    except OSError as error:
        found = disk_error(error)
        if found is None:
            raise
        print(f"error: cannot write {found.filename or 'a file'}: {found.strerror}; make room", file=sys.stderr)
        sys.exit(USAGE_EXIT_CODE)
    except UserError as error:
        # Ray raises a subclass that carries the remote traceback as its text and the original as `cause`.
        message = str(getattr(error, "cause", None) or error)
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(USAGE_EXIT_CODE)
    except KeyboardInterrupt as interrupt:
        arguments = [*(a for a in sys.argv if a != "--resume"), *(["--resume"] if resumes else [])]
        again = "" if resumes else ", run the same command again"
        print(f"\nstopped; to continue{again}: {shlex.join(['python', *arguments])}", file=sys.stderr)
        sys.exit(TERMINATED_EXIT_CODE if isinstance(interrupt, Terminated) else INTERRUPTED_EXIT_CODE)
    sys.exit(code or 0)


def nearest(given: str, names: Iterable[str]) -> str:
    """ "; did you mean 'x'?" with the name that `given` probably misspells, or "" if no name is close."""
    names = list(names)
    given = given.replace("-", "_")
    found = difflib.get_close_matches(given, names, n=1, cutoff=0.6)
    if not found:  # perhaps the right leaf with a wrong or missing section
        by_leaf = {name.rsplit(".", 1)[-1]: name for name in reversed(names)}
        found = [by_leaf[n] for n in difflib.get_close_matches(given.rsplit(".", 1)[-1], by_leaf, n=1, cutoff=0.7)]
    return f"; did you mean {found[0]!r}?" if found else ""
