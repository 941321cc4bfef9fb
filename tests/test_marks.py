"""The guard that keeps processes out of `make test-fast` notices every way to start one."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from tests.helpers.process_guard import GUARD, MAY_START


def start_by(method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    context.Process(target=print).start()


def start_by_loader() -> None:
    from torch.utils.data import DataLoader

    next(iter(DataLoader([1, 2], num_workers=1)))  # type: ignore[arg-type]  # a list will do


def start_as(module: str) -> None:
    """As code of this module would: no cluster is wanted here."""
    exec("import os; os.fork()", {"__name__": module})


def start_and_hide_it() -> None:
    with suppress(BaseException):
        os.fork()


@pytest.mark.parametrize(
    ("start", "mark"),
    [
        pytest.param(lambda: subprocess.run(["true"], check=True), "processes", id="subprocess"),
        pytest.param(os.fork, "processes", id="fork"),
        pytest.param(lambda: os.system("true"), "processes", id="system"),
        *(pytest.param(lambda m=m: start_by(m), "processes", id=m) for m in ("fork", "spawn", "forkserver")),
        pytest.param(start_by_loader, "processes", id="loader"),
        pytest.param(start_and_hide_it, "processes", id="hidden"),
        pytest.param(lambda: start_as("ray._private.node"), "ray", id="ray"),
        pytest.param(lambda: start_as("vllm.engine"), "vllm", id="vllm"),
    ],
)
def test_a_process_without_a_mark_fails_the_test(start: Callable[[], Any], mark: str) -> None:
    with pytest.raises(pytest.fail.Exception, match=rf"needs @pytest\.mark\.{mark}:"), GUARD.watching({"slow"}):
        start()


@pytest.mark.processes
@pytest.mark.parametrize("mark", MAY_START)
def test_a_marked_test_may_start_one(mark: str) -> None:
    with GUARD.watching({mark}):
        assert subprocess.run(["true"], check=False).returncode == 0
