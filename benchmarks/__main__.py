"""Runs the benchmarks and prints a markdown table: `make bench`, or `python -m benchmarks --only rollout`."""

from __future__ import annotations

import argparse
import importlib
import tempfile
from pathlib import Path

# Each module has run(weights, repeats, threads) -> Iterable[Result].
BENCHMARKS = {
    "rollout": "benchmarks.rollout_floor",
    "draw": "benchmarks.drawing_floor",
    "update": "benchmarks.update_floor",
    "loader": "benchmarks.loader_floor",
    "training": "benchmarks.training_floor",
    "judge": "benchmarks.judge_batch",
    "rewards": "benchmarks.rewards",
    "overlap": "benchmarks.overlap",
    "control": "benchmarks.control_plane",
    "simulation": "benchmarks.simulated_steps",
    "canary": "benchmarks.canary_share",
    "checkpoint": "benchmarks.checkpoint_cost",
    "full-size": "benchmarks.full_size",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", choices=sorted(BENCHMARKS), help="one benchmark instead of all")
    parser.add_argument("--repeats", type=int, default=7, help="repetitions, of which the median counts (default 7)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1, as the actors run)")
    arguments = parser.parse_args()
    if arguments.repeats < 2 or arguments.threads < 1:
        parser.error("--repeats needs at least 2, --threads at least 1")

    import torch  # late: --help should not wait for it

    from benchmarks.timing import HEADER, save_random_model, start_process_group

    torch.set_num_threads(arguments.threads)
    print(HEADER, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        weights = save_random_model(Path(folder) / "model")
        start_process_group(Path(folder))
        for name in [arguments.only] if arguments.only else BENCHMARKS:
            for result in importlib.import_module(BENCHMARKS[name]).run(weights, arguments.repeats, arguments.threads):
                print(result.row(), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
