"""Processes for learner tests: ``python tests/learner_workers.py JOB.json`` runs one worker of a gloo group without Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def start_workers(
    tmp: Path, overrides: list[str], *, world: int = 1, die_after: int = 0, noise: float = 0.0
) -> list[subprocess.Popen[str]]:
    """Start ``world`` workers that train the toy model with these settings; each dies hard after ``die_after`` steps."""
    tmp.mkdir(parents=True, exist_ok=True)
    rendezvous = tmp / f"rendezvous-{len(list(tmp.glob('rendezvous-*')))}"
    processes = []
    for rank in range(world):
        job = {
            "rank": rank, "world": world, "rendezvous": str(rendezvous), "overrides": overrides,
            "die_after": die_after, "noise": noise,
        }  # fmt: skip
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))), "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
        }  # fmt: skip
        command = [sys.executable, str(Path(__file__)), json.dumps(job)]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    return processes


def finish(processes: list[subprocess.Popen[str]], expected: int = 0) -> str:
    """Wait for the workers; their output."""
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    codes = [process.returncode for process in processes]
    assert codes == [expected] * len(codes), "\n".join(outputs)
    return "\n".join(outputs)


class _Dying:
    """A source that ends its process, as a kill does, in the middle of the step after ``die_after`` whole ones."""

    def __init__(self, source: Any, die_after: int) -> None:
        self._source, self._left = source, die_after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def next(self, step: int, rank: int, world: int) -> Any:
        if self._left == 0:
            os._exit(9)
        self._left -= 1
        return self._source.next(step, rank, world)


def main() -> None:
    job = json.loads(sys.argv[1])
    import torch
    import torch.distributed as dist
    from toy import ToyModel, ToyObjective, ToySource

    from actors.checkpoints import CheckpointStore
    from actors.learner import WorkerContext, train
    from deepgen.config import load_settings

    torch.set_num_threads(1)
    settings = load_settings(None, job["overrides"])
    dist.init_process_group("gloo", init_method=f"file://{job['rendezvous']}", rank=job["rank"], world_size=job["world"])

    class Recorder:
        def log(self, step: int, metrics: dict[str, float]) -> None:
            with (Path(settings.run.dir) / "log.jsonl").open("a") as stream:
                stream.write(json.dumps({"step": step} | metrics) + "\n")

    context = WorkerContext(
        "rl", settings, ToyModel(), job["rank"], job["world"], torch.device("cpu"),  # type: ignore[arg-type]
        Recorder() if job["rank"] == 0 else None, print if job["rank"] == 0 else lambda line: None,  # type: ignore[arg-type]
    )  # fmt: skip
    source = _Dying(ToySource(), job["die_after"]) if job["die_after"] else ToySource()
    parts = (source, ToyObjective(job["noise"]))
    train(context, lambda _: parts, CheckpointStore(settings, "rl"), settings.run.resume)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
