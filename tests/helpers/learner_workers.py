"""Workers for learner tests, without Ray: processes of one gloo group."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.helpers.forked import run_ranks
from tests.helpers.small_disk import fill

ROOT = Path(__file__).resolve().parents[2]


def run_workers(folder: Path, runs: Sequence[dict[str, Any]], *, world: int = 1, exit_code: int = 0) -> str:
    """Train each of ``runs`` in turn on ``world`` workers and wait. Returns the workers' output.

    A run is {"overrides": [...]} plus optional keys: "recipe", "stage" (default: the toy model), "noise" and "pieces"
    (both toy; pieces: batches arrive in pieces, with losses held back).
    "fails": (steps, what) lets their updates fail as `ToyFailing` says (toy). "ends": a folder: the run ends with
    UserError (toy), whose text each rank writes to NAME.RANK.error there.
    "arrivals": {step: metrics} that evaluations bring on rank 0; "back": steps that may have to be gone back to (toy).
    "replays": (step, folder) trains on that step alone (toy), from the state in the folder.
    "attempt": what tells this start from others (toy).
    "die_after": n ends the worker abruptly in the step after n steps. "die_writing": n kills it (SIGKILL) when half of
    the n-th checkpoint shard is on disk; "slow_writing": s writes each shard s seconds after the step has ended;
    "fail_writing": r lets rank r fail to write any. "fill": (folder, "shard" or "result") lets rank 0 fill the disk of
    a folder before it writes its first shard, or when the last checkpoint is complete. "measure": a file name; instead
    of the usual training, rank 0 writes its memory use there (``tests.helpers.memory_states``).
    """
    folder.mkdir(parents=True, exist_ok=True)
    rendezvous = folder / f"rendezvous-{len(list(folder.glob('rendezvous-*')))}"
    exit_codes, outputs = run_ranks(work, world, f"file://{rendezvous}", list(runs))
    assert exit_codes == [exit_code] * world, "\n".join(outputs)
    return "\n".join(outputs)


def work(rank: int, world: int, rendezvous: str, runs: list[dict[str, Any]]) -> None:
    """The work of one rank."""
    import torch.distributed as dist

    from actors.learner.worker import prepare_process
    from deepgen.config import load_settings
    from deepgen.config.recipes import find_recipe

    for number, run in enumerate(runs):
        settings = load_settings(find_recipe(run["recipe"]) if "recipe" in run else None, run["overrides"])
        if number == 0:
            prepare_process(settings)
            dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
        start = _measure if "measure" in run else _train_toy if "stage" not in run else _train_stage
        start(settings, run, rank, world)
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # About once in a hundred normal exits, a library's C++ thread still runs and ends the process with "terminate
    # called without an active exception", after all work is done. So skip the normal exit, as Ray's workers do.
    os._exit(0)


def _measure(settings: Any, run: dict[str, Any], rank: int, world: int) -> None:
    from tests.helpers.memory_states import measure

    found = measure(settings)
    if rank == 0:
        Path(run["measure"]).write_text(json.dumps(found))


def _train_stage(settings: Any, run: dict[str, Any], rank: int, world: int) -> None:
    from actors.learner.worker import run_worker
    from actors.messages import LearnerJob
    from actors.objectives.build import build_flow_matching

    build = functools.partial(_build, build_flow_matching, run.get("die_after", 0))
    run_worker(LearnerJob(run["stage"], settings, build, gpus=False), "", rank, world)


def _train_toy(settings: Any, run: dict[str, Any], rank: int, world: int) -> None:
    import torch

    from actors.learner.checkpoints.checkpoint_store import CheckpointStore
    from actors.learner.loop import train
    from actors.learner.protocols import Parts, Replayed, WorkerContext
    from deepgen.errors import UserError
    from tests.helpers.toy import ToyFailing, ToyHeld, ToyModel, ToyObjective, ToyPieces, ToySource

    class Log:
        def log(self, step: int, metrics: dict[str, float]) -> None:
            with (Path(settings.run.dir) / f"{settings.run.name}.jsonl").open("a") as stream:
                stream.write(json.dumps({"step": step} | metrics) + "\n")

        def tag(self, name: str, value: str) -> None: ...

    model: Any = ToyModel()
    tracker: Any = Log() if rank == 0 else None
    context = WorkerContext("rl", settings, model, rank, world, torch.device("cpu"), tracker, print)
    pieces = run.get("pieces", False)
    toy = (ToyHeld if pieces else ToyObjective)(run.get("noise", 0.0), settings.algorithm.updates_per_batch)
    failing, what = run.get("fails", ((), ""))
    toy = ToyFailing(failing, what, settings.algorithm.updates_per_batch) if failing else toy
    toy.arrivals, toy.back = (run.get("arrivals", {}) if rank == 0 else {}), frozenset(run.get("back", ()))
    step, state = run.get("replays", (0, None))
    replayed = Replayed(range(step, step + 1), Path(state)) if state else None
    parts = Parts(ToyPieces() if pieces else ToySource(), toy, toy, replayed)
    build = functools.partial(_build, lambda _: parts, run.get("die_after", 0))
    _disturb_writing(run, rank)
    try:
        train(context, build, CheckpointStore(settings, "rl", run.get("attempt", "")), settings.run.resume)
    except UserError as error:
        if "ends" not in run:
            raise
        (Path(run["ends"]) / f"{settings.run.name}.{rank}.error").write_text(str(error))
    else:
        assert "ends" not in run


def _build(build: Callable[[Any], Any], die_after: int, context: Any) -> Any:
    parts = build(context)
    return parts._replace(source=_Dying(parts.source, die_after)) if die_after else parts


def _disturb_writing(run: dict[str, Any], rank: int) -> None:
    """Make the shards of this process slow, or impossible, or its death: see ``run_workers``."""
    from actors.learner.checkpoints import checkpoint_shards as shards

    write, left = shards.save_file, run.get("die_writing", 0)
    full, when = run.get("fill", ("", ""))
    if when == "result" and rank == 0:
        _fill_after_checkpoints(Path(full))

    def disturbed(tensors: dict[str, Any], file: Path) -> None:
        nonlocal left
        left -= 1
        time.sleep(run.get("slow_writing", 0.0))
        if when == "shard" and rank == 0:
            fill(Path(full))
        if run.get("fail_writing") == rank:
            raise OSError(f"no room for {file.name}")
        write(tensors, file)
        if left == 0:
            os.truncate(file, file.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    shards.save_file = disturbed


def _fill_after_checkpoints(folder: Path) -> None:
    from actors.learner.checkpoints.checkpoint_store import CheckpointStore

    finish = CheckpointStore.finish

    def finish_and_fill(store: CheckpointStore) -> None:
        finish(store)
        fill(folder)

    setattr(CheckpointStore, finish.__name__, finish_and_fill)  # the process ends with the run


class _Dying:
    """A source that ends its process abruptly when it is asked for more than ``batches`` batches."""

    def __init__(self, source: Any, batches: int) -> None:
        self._source, self._left = source, batches

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def next(self, step: int, rank: int, world: int) -> Any:
        if self._left == 0:
            os._exit(9)
        self._left -= 1
        return self._source.next(step, rank, world)
