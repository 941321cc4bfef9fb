"""The exception for user mistakes, and the wrapper around each program that turns it into an exit code."""

from __future__ import annotations

import difflib
import errno
import io
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

from safetensors import SafetensorError

from deepgen.masking import masked
from deepgen.monitoring.log_lines import DRIVER, Speaker, set_up_logs

USAGE_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 130
TERMINATED_EXIT_CODE = 143
# Options of the stages that leave nothing to continue, or refuse to (`deepgen.config.cli`).
_ONLY_SHOWN = ("--help", "-h", "--plan", "--print-config", "--status", "--simulate")  # the output is the result, no log
_NOT_CONTINUED = (*_ONLY_SHOWN, "--rollout-only", "--train-only")
SUBMITTED_COPY = "_ray_pkg_" in __file__  # Ray's name of the folder for the files of a job
# No space, no quota, file too large for the limit, read-only: nothing that trying again would mend.
_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})


class UserError(Exception):
    """A mistake the user can fix. The message is one line: what is wrong, what was given, what is allowed.

    Secrets in it are hidden (`deepgen.masking`).

    trace: of the user's code, where that is at fault; a program prints it before the line, which comes last so.
    """

    def __init__(self, message: object = "", trace: str = "") -> None:
        super().__init__(masked(str(message)))
        self.trace = masked(trace)

    def words(self) -> str:
        """What a program says of it at its end."""
        # Ray raises a subclass that carries the remote traceback as its text and the original as `cause`.
        found = getattr(self, "cause", None) or self
        line = f"error: {' '.join(str(found).split())}"
        return f"{found.trace.rstrip()}\n{line}" if found.trace else line


class Terminated(KeyboardInterrupt):
    """SIGTERM, as sent by schedulers and `ray job stop`. Handled like Ctrl-C, except for the exit code.

    came: whether the signal has come. Where Ray waits, it raises a KeyboardInterrupt of its own in the place of this.
    """

    came = False


@contextmanager
def writing(what: str, where: Path, then: str = "continue with --resume", key: str = "run.dir") -> Iterator[None]:
    """Around writing into the folder that `key` names: failing becomes a UserError naming the file or folder `where`.

    then: what to do once there is room.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        said = getattr(error, "strerror", None) or error
        raise UserError(
            f"{key}: cannot write {what} to {where}: {said}; make room or let it be written, then {then}"
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
        Terminated.came = True
        raise Terminated

    signal.signal(signal.SIGTERM, stop)


def run_program(main: Callable[[], int | None], *, resumes: bool = True) -> NoReturn:
    """Run a stage's `main` and exit with its exit code.

    `UserError` exits with 2 and one line on stderr. Ctrl-C exits with 130 and SIGTERM with 143; both print the command
    that continues the run: the same one with --resume, or without it for a program that continues by itself
    (`resumes` False). A reader that closes the output early (`--help | head`) is no error, and a run goes on without
    it. A full or read-only disk is reported like a UserError. Any other exception is a bug and keeps its traceback,
    without secrets.
    """
    _fill_standard_streams()
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)
    if not _has_option(_ONLY_SHOWN):
        set_up_logs(Speaker(DRIVER))
    sys.excepthook = print_traceback
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background programs that ignore Ctrl-C
    stop_on_sigterm()
    try:
        code = main()
    except OSError as error:
        found = disk_error(error)
        if found is None:
            raise
        print(f"error: cannot write {found.filename or 'a file'}: {found.strerror}; make room", file=sys.stderr)
        sys.exit(USAGE_EXIT_CODE)
    except UserError as error:
        print(error.words(), file=sys.stderr)
        sys.exit(USAGE_EXIT_CODE)
    except KeyboardInterrupt as interrupt:
        print(f"\nstopped{_how_to_continue(resumes)}", file=sys.stderr)
        terminated = Terminated.came or isinstance(interrupt, Terminated)
        sys.exit(TERMINATED_EXIT_CODE if terminated else INTERRUPTED_EXIT_CODE)
    sys.exit(code or 0)


def print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As `sys.excepthook`, but secrets are hidden: other libraries' errors name addresses as they were given."""
    print(masked("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def command(program: str | Path, *arguments: str | Path) -> str:
    """A line for a shell that runs a Python program: with this very interpreter, from any folder.

    In the copy of a checkout that Ray unpacked (`ray job submit`) both are as in the line that is submitted.
    """
    python = [sys.executable, os.path.abspath(program)]
    if SUBMITTED_COPY:
        python = ["python", str(program)]
    return shlex.join([*python, *map(str, arguments)])


def _has_option(names: Iterable[str]) -> bool:
    return any(argument.partition("=")[0] in names for argument in sys.argv[1:])


def _how_to_continue(resumes: bool) -> str:
    if _has_option(_NOT_CONTINUED):
        return ""
    given = [argument for argument in sys.argv[1:] if not resumes or argument != "--resume"]
    line = command(sys.argv[0], *given, *(["--resume"] if resumes else []))
    shown = masked(line)
    note = " (with what is secret in the place of ***)" if shown != line else ""
    again = "" if resumes else ", run the same command again"
    return f"; to continue{again}{note}: {shown}"


class _Lasting(io.FileIO):
    """A console stream that outlives its reader: when that has gone (a closed pipe or terminal), lines go nowhere."""

    lost = False

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
        self.lost = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())  # also for this process's children
        os.close(nowhere)
        return len(data)


def _fill_standard_streams() -> None:
    """Open those that the caller has closed (`>&-`) to nowhere.

    The next files would get their numbers, and what children print would be written into these. Libraries, too, take
    for granted that the streams are there.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is not None:
            continue
        stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115  # for the rest of the program
        if stream.fileno() == number:
            os.set_inheritable(number, True)
        setattr(sys, name, stream)


def _lasting(stream: Any) -> Any:
    """The same console stream, but no write fails: not for a reader that has gone, nor for letters it cannot show."""
    if stream not in (sys.__stdout__, sys.__stderr__):
        return stream  # a caller's own, or one that leads nowhere
    stream.flush()
    raw = _Lasting(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=stream.encoding, errors="backslashreplace", line_buffering=True
    )


def output_lost() -> bool:
    """Whether the reader of this program's output has gone."""
    return getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "lost", False)


def nearest(given: str, names: Iterable[str]) -> str:
    """ "; did you mean 'x'?" with the name that `given` probably misspells, or "" if no name is close."""
    names = list(names)
    given = given.replace("-", "_")
    found = difflib.get_close_matches(given, names, n=1, cutoff=0.6)
    if not found:  # perhaps the right leaf with a wrong or missing section
        by_leaf = {name.rsplit(".", 1)[-1]: name for name in reversed(names)}
        found = [by_leaf[n] for n in difflib.get_close_matches(given.rsplit(".", 1)[-1], by_leaf, n=1, cutoff=0.7)]
    return f"; did you mean {found[0]!r}?" if found else ""
