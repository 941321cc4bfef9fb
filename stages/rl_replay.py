"""`stages/rl.py --rollout-only STEPS` and `--train-only FOLDER`: the two halves of a training step, each alone.

The first draws and scores steps with the policy that a run starts from and writes them to RUN/replay. The second trains
on such files, or on those of a step that failed, with the learner's own loop and nothing else (`docs/replay.md`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from actors.learner.checkpoints.checkpoint_store import REPLAY
from actors.learner.preflight import own_folder, prepare_run
from actors.learner.run_control import run_lock
from actors.messages import LearnerJob
from deepgen.cluster.connect import connect
from deepgen.cluster.resources import learner_needs
from deepgen.config import Settings, UserError
from deepgen.config.schema.paths import given_path
from deepgen.config.stage_rules import check_inputs
from deepgen.data.loading.mixture import check_training_data
from deepgen.errors import writing
from stages.rl_report import say

START_AGAIN = "remove it and start again"
MARGIN_S = 60.0  # lets an actor's own error, which says more, arrive first
# (settings, body): start rollout actors, rewards and stream, and call body(settings, stream, ...); `stages.rl.wire`
Wire = Callable[[Settings, Callable[..., None]], None]


def rollout_only(wire: Wire, settings: Settings, text: str) -> None:
    """Draw, score and write the first steps of a run. text: how many."""
    steps = int(text) if text.isascii() and text.isdigit() else 0
    if steps < 1:
        raise UserError(f"--rollout-only: got {text!r}; allowed: a number of steps, 1 or more")
    _check_starts("--rollout-only", settings)
    quiet = _quiet(settings, steps)
    check_inputs(quiet, "rl")
    _check_room(settings)
    with run_lock(settings):
        quiet = prepare_run(quiet, "rl")
        wire(quiet, partial(_write_steps, settings.model_copy(update={"model": quiet.model})))


def _quiet(settings: Settings, steps: int) -> Settings:
    """Settings of a run of so many steps that are all drawn with its first policy; it evaluates and trains nothing."""
    train = {"steps": steps, "warmup_steps": min(steps, settings.train.warmup_steps)}
    staleness = max(steps - 1, settings.experience.max_staleness)
    return settings.model_copy(
        update={
            "train": settings.train.model_copy(update=train),
            "experience": settings.experience.model_copy(update={"max_staleness": staleness}),
            "evaluation": settings.evaluation.model_copy(update={"prompts": 0}),
        }
    )


def train_only(root: Path, settings: Settings, text: str) -> None:
    """Train on the steps in a folder. root: the checkout; text: the folder."""
    _check_starts("--train-only", settings)
    folder = given_path("--train-only", text).resolve()
    if folder.is_relative_to(settings.run.folder.resolve()):
        raise UserError(
            f"--train-only: {folder} lies in the folder of run {settings.run.name!r}, where the results go; allowed: "
            "another run.name"
        )
    with run_lock(settings):
        settings = prepare_run(settings, "rl")
        _check_steps(folder, settings)
        with own_folder(settings):
            if settings.algorithm.sft_coef:
                check_training_data(settings)
            gpus = connect(settings, learner_needs, code_root=root)
        _train(settings, folder, gpus)


def _train(settings: Settings, folder: Path, gpus: bool) -> None:
    from actors.start import recorded_parts, start_learner

    result = start_learner(LearnerJob("rl", settings, recorded_parts(folder), gpus))
    say(f"the trained model is {result}")


def _check_steps(folder: Path, settings: Settings) -> None:
    from actors.objectives.replay_files import check_steps  # late: --help needs no torch

    check_steps(folder, settings)


def _check_starts(option: str, settings: Settings) -> None:
    if settings.run.resume:
        raise UserError(f"{option}: got --resume beside it; allowed: a start from model.weights, as in RUN/model")


def _check_room(settings: Settings) -> None:
    folder = settings.run.folder
    if not (folder / "checkpoints").exists() and any((folder / REPLAY).glob("step-*.json")):
        raise UserError(
            f"--rollout-only: {folder / REPLAY} has steps already; allowed: another run.name, or remove that folder"
        )


def _write_steps(settings: Settings, quiet: Settings, stream: Any, *_: Any) -> None:
    """Write every step that the stream makes to RUN/replay. `quiet`: what `_quiet` made of the settings."""
    import ray

    from actors.experience.stream_client import StreamClient
    from actors.objectives.replay_files import StoredGroup, write_recipe, write_step

    folder, world = settings.run.folder / REPLAY, settings.train.workers
    with writing("the steps", folder, START_AGAIN):
        folder.mkdir(parents=True, exist_ok=True)
    client = StreamClient(stream, settings.experience.deadline_s + MARGIN_S)
    client.ask("begin")
    for step in range(quiet.train.steps):
        batches = [client.ask("next_batch", step, rank, world) for rank in range(world)]
        drawn = [(rank + i * world, group) for rank, b in enumerate(batches) for i, group in enumerate(b.groups)]
        arrays = ray.get([group.trajectory for _, group in drawn], timeout=settings.experience.deadline_s)
        stored = [StoredGroup(at, replace(g, trajectory=a)) for (at, g), a in zip(drawn, arrays, strict=True)]
        with writing(f"step {step}", folder, START_AGAIN):
            write_step(folder, settings, step, stored, batches[0].metrics)
        say(f"step {step} of {quiet.train.steps}: {len(stored)} groups in {folder}")
    with writing("the recipe", folder, START_AGAIN):
        command = write_recipe(folder, settings)
    say(f"to train on them: {command}")
