"""Processes with a mark in their environment, and those below them, are found and ended; others are not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from deepgen.cluster.marked_processes import end_marked, marked

NAME = "DEEPGEN_TEST_MARK"
SLEEP = "import time; print('ready', flush=True); time.sleep(60)"
# Starts another one without the mark, as Ray's workers, which overwrite their environment.
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEP!r}], env={{}})"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"


@contextmanager
def running(code: str, **marks: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, env=os.environ | marks, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


@pytest.mark.processes
def test_children_are_found_and_ended_and_others_are_not() -> None:
    with running(PARENT, **{NAME: "a"}) as ours, running(SLEEP, **{NAME: "ab"}) as other:
        found = marked(f"{NAME}=a")
        assert len(found) == 2 and ours.pid in {process.pid for process in found}
        assert end_marked(f"{NAME}=a", soft_s=5, hard_s=5) == 2
        assert ours.wait(5) != 0 and marked(f"{NAME}=a") == set()
        assert other.poll() is None


@pytest.mark.processes
def test_one_that_ignores_sigterm_is_killed() -> None:
    with running(STUBBORN, **{NAME: "b"}) as process:
        began = time.monotonic()
        assert end_marked(f"{NAME}=b", soft_s=0.3, hard_s=5) == 1
        assert process.wait(5) == -9 and time.monotonic() - began >= 0.3


def test_without_such_processes_nothing_is_ended() -> None:
    assert marked(f"{NAME}=none") == set() and end_marked(f"{NAME}=none", soft_s=1, hard_s=1) == 0
