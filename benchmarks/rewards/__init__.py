"""How fast rewards are: judges against a bare vLLM engine, pools beside each other, the cache, and faults."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import ray

from benchmarks.rewards import judge_speed, pool_speed
from benchmarks.timing import Result
from deepgen.cluster.private import start_private

CPUS = 4  # logical: the rewards here reserve shares, and a machine of two cores has to hold them all


def run(weights: Path, repeats: int, threads: int) -> Iterator[Result]:
    """Results one by one. Starts a local Ray; rewards use one thread each, whatever `threads` says."""
    start_private(CPUS, log_to_driver=False)
    try:
        yield from pool_speed.results(weights, repeats)
        yield from judge_speed.results(repeats)
    finally:
        ray.shutdown()
