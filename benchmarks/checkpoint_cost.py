"""What a checkpoint after every step costs a step: the learner's loop with train.checkpoint_every=1 and without.

Ours: `TrainingLoop.run_step`, which ends with `CheckpointStore.save`: wait for the checkpoint of the step before, whose
files a thread has been writing during the step, make room, copy. Floor: the next step of the same engine, without a
checkpoint and while none is written. sft: all of a step of tiny-sft. rl: the update of the update benchmark, one group
per task instead of the recipe's six, and no rollouts: a step of tiny-rl takes about ten times as long, and its
checkpoint the same. The share of CPU time is what a checkpoint would cost if no core were free for it. Left out: Ray
Train, tracking, evaluation.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from actors.learner.checkpoints.checkpoint_store import CheckpointStore
from actors.learner.engine import TrainingEngine
from actors.learner.loop import TrainingLoop
from actors.learner.protocols import Parts, TrainedModel, WorkerContext
from actors.learner.worker import load_model, prepare_process
from actors.objectives.build import build_flow_matching
from benchmarks.timing import Result, recipe, seconds
from benchmarks.update_floor import rl_experience
from deepgen.config.settings import TASKS

CPU = torch.device("cpu")
GOAL = 1.1  # of a step without a checkpoint
_NEVER = 10**6


def run(weights: Path, repeats: int, threads: int) -> list[Result]:
    """Results for sft and rl; a sample is a step. Needs a process group."""
    return [_measure(stage, weights, repeats, threads) for stage in ("sft", "rl")]


def _measure(stage: str, weights: Path, repeats: int, threads: int) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        own = [f"run.dir={folder}", f"train.threads={threads}", f"rollout.threads={threads}", f"train.steps={_NEVER}"]
        own += [f"train.checkpoint_every={_NEVER}", f"rollout.prompts_per_step={len(TASKS)}", "evaluation.prompts=0"]
        steps = _Steps(stage, weights, own)
        steps.plain()
        steps.saving()  # also reserves the memory of the copies
        steps.store.finish()
        newest = steps.store.newest()
        assert newest is not None
        ours, floor, writing, stepping = [], [], [], []
        for _ in range(repeats):
            writing.append(_cpu_seconds(steps.save_and_finish))
            stepping.append(_cpu_seconds(steps.plain))
            steps.save()  # is being written while the next step is timed
            ours.append(seconds(steps.saving))
            steps.store.finish()
            floor.append(seconds(steps.plain))
        steps.close()
        name = f"checkpoint_every=1, {stage}, ZeRO-{newest.zero_stage}"
        size, share = sum(newest.files.values()) / 1e6, statistics.median(writing) / statistics.median(stepping)
        shapes = f"{size:.0f} MB, copied and written with {share:.1%} of a step's CPU time (goal {GOAL})"
        return Result(name, shapes, 1, tuple(ours), tuple(floor))


class _Steps:
    """The learner's steps of one stage, with a checkpoint or without, by the same engine."""

    def __init__(self, stage: str, weights: Path, overrides: list[str]) -> None:
        settings = recipe(f"tiny-{stage}", weights, *overrides)
        prepare_process(settings)
        model = load_model(settings, stage)
        context = WorkerContext(stage, settings, model, 0, 1, CPU, None, lambda line: None)
        trainable = model.trainable_parameters(stage)
        self.parts = _rl_parts(context) if stage == "rl" else build_flow_matching(context)._replace(evaluator=None)
        model.train()
        self.engine, self.store = TrainingEngine(settings, model, trainable, CPU), CheckpointStore(settings, stage)
        every = settings.model_copy(update={"train": settings.train.model_copy(update={"checkpoint_every": 1})})
        self._plain, self._saving = (
            TrainingLoop(replace(context, settings=chosen), self.parts, self.engine, None, self.store, 0)
            for chosen in (settings, every)
        )
        self._done = 1  # in rl, the samples of version 0 must be those of an earlier step: ratio 1 would be checked

    def plain(self) -> None:
        self._step(self._plain)

    def saving(self) -> None:
        self._step(self._saving)

    def save(self) -> None:
        self.store.save(self._done, self.engine, None, self.parts.source.state_dict(self._done))

    def save_and_finish(self) -> None:
        self.save()
        self.store.finish()

    def close(self) -> None:
        self.store.finish()
        self.store.close(print)
        self.parts.source.close()

    def _step(self, loop: TrainingLoop) -> None:
        loop.run_step(self._done)
        self._done += 1


def _rl_parts(context: WorkerContext) -> Parts:
    objective, batch = rl_experience(context)
    return Parts(_Same(batch), objective, None)


def _cpu_seconds(function: Callable[[], object]) -> float:
    """CPU time of all threads in one call, which other load on the machine does not change much."""
    begin = time.process_time()
    function()
    return time.process_time() - begin


@dataclass
class _Same:
    """A source that has one batch for all steps."""

    batch: Any

    def next(self, step: int, rank: int, world: int) -> Any:
        return self.batch

    def publish(self, policy: TrainedModel, version: int) -> None: ...

    def keep(self, folder: Path, step: int) -> str:
        return ""

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self, step: int) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def writer(self, step: int) -> None: ...

    def load(self, folder: Path) -> None: ...

    def close(self) -> None: ...
