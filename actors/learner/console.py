"""Shows the learner's lines on the console that started the run: rank 0 writes a file, the driver prints it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepgen.errors import output_lost

FILE = "console.log"
_POLL_S = 0.2


def console(folder: Path) -> Callable[[str], None]:
    """A function that appends a line to the run's console file. It may be called in any process."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE

    def say(line: str) -> None:
        try:
            with path.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")
        except OSError as error:  # the disk is full; what ends the run for that comes up elsewhere
            print(f"cannot write {path}: {error.strerror or error}: {line}", file=sys.stderr)

    return say


def silent(line: str) -> None:
    """Print nothing; ranks above 0 use this."""


@contextmanager
def shown(folder: Path) -> Iterator[None]:
    """While the context is open, print the lines that are added to the run's console file.

    When nobody reads the output any more (`| head`, a closed terminal), the run goes on.
    """
    done = threading.Event()
    path = folder / FILE

    def follow() -> None:
        while not (output_lost() or done.wait(_POLL_S)):
            _copy_lines(lines)
        if output_lost():
            print(f"nobody reads the output any more; the run goes on, its lines are in {path}", file=sys.stderr)

    path.touch()
    with path.open(encoding="utf-8") as lines:
        lines.seek(0, os.SEEK_END)
        follower = threading.Thread(target=follow, daemon=True)
        follower.start()
        try:
            yield
        finally:
            done.set()
            follower.join()
            _copy_lines(lines)


def _copy_lines(lines: Any) -> None:
    text = lines.read()
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()
