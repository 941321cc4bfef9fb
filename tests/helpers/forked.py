"""Worker processes, forked from a server process that has already imported their modules. This saves ten seconds each.

The first call starts the server, a clean Python process that ends with the tests. It inherits only the environment of
the test's process.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

DEADLINE_S = 600


@functools.cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.worker_imports"])
    return context


def run_ranks(work: Callable[..., None], world: int, *arguments: Any) -> tuple[list[int | None], list[str]]:
    """Run ``work(rank, world, *arguments)`` for all ranks in parallel, each in its own process, and wait.

    Returns the exit codes (negative: a signal) and the output of each rank. ``work`` must be a module-level function.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / str(rank) for rank in range(world)]
        processes = [
            _server().Process(target=_rank, args=(output, work, rank, world, arguments))
            for rank, output in enumerate(outputs)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + DEADLINE_S
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        for process in processes:
            process.kill()  # no effect unless time is up
            process.join()
        return [process.exitcode for process in processes], [output.read_text() for output in outputs]


def _rank(output: Path, work: Callable[..., None], rank: int, world: int, arguments: tuple[Any, ...]) -> None:
    with output.open("w") as stream:
        for standard in (1, 2):
            os.dup2(stream.fileno(), standard)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    work(rank, world, *arguments)
