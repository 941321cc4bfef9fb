"""Starts and wires the processes of a run. Importing this module loads neither torch nor the model."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from actors.experience.rollout_actor import RolloutActor
from actors.experience.rollout_fleet import RESTARTS, WEIGHTS_GROUP
from actors.experience.stream import ExperienceStream
from actors.experience.stream_client import RESTARTS as RESTARTS_OF_STREAM
from actors.messages import LearnerJob
from deepgen.cluster.resources import role_placement
from deepgen.config import Settings
from deepgen.config.schema.roles import ROLLOUT, STREAM

if TYPE_CHECKING:
    from actors.learner.protocols import Parts, WorkerContext


class Rollouts(dict[str, Any]):
    """Handles of rollout actors by their names in the run. `in_ray`: their names in Ray."""

    def __init__(self, handles: dict[str, Any], in_ray: dict[str, str]) -> None:
        super().__init__(handles)
        self.in_ray = in_ray


def start_rollouts(settings: Settings, *, gpus: bool) -> Rollouts:
    """Start the rollout actors, spread over the nodes, without waiting for the models."""
    options: dict[str, Any] = {
        **role_placement(settings.cluster, ROLLOUT, gpus=gpus).options(),
        "max_restarts": RESTARTS,
        "concurrency_groups": {WEIGHTS_GROUP: 1},
        "scheduling_strategy": "SPREAD",
    }
    remote = ray.remote(**options)(RolloutActor)
    run = uuid.uuid4().hex
    in_ray = {f"rollout-{i}": f"rollout-{i} of {run}" for i in range(settings.rollout.most_actors)}
    handles = {name: remote.options(name=named).remote(settings, name) for name, named in in_ray.items()}
    return Rollouts(handles, in_ray)


def start_stream(settings: Settings, rollouts: Rollouts, *, resume: bool, gpus: bool) -> Any:
    """Start the experience stream. Returns its handle; call the stream's `start` next.

    It reads its prompts itself and gets names instead of handles: Ray can start an actor again only as long as objects
    in its arguments exist, and warns of them.
    """
    options = role_placement(settings.cluster, STREAM, gpus=gpus).options()
    remote = ray.remote(ExperienceStream).options(**options, max_restarts=RESTARTS_OF_STREAM)
    return remote.remote(settings, None, rollouts.in_ray, resume=resume, gpus=gpus)


def learner_parts(stream: Any) -> Callable[[WorkerContext], Parts]:
    """The `build` function of a `LearnerJob` (`actors.messages`). It makes source and objective in a learner worker."""
    return functools.partial(_learner_parts, stream)


def _learner_parts(stream: Any, context: WorkerContext) -> Parts:
    from actors.objectives.build import build_rl

    return build_rl(context, stream)


def recorded_parts(folder: Path) -> Callable[[WorkerContext], Parts]:
    """As `learner_parts`, for a run on the recorded steps in a folder."""
    return functools.partial(_recorded_parts, folder)


def _recorded_parts(folder: Path, context: WorkerContext) -> Parts:
    from actors.objectives.build import build_replay

    return build_replay(context, folder)


def start_learner(job: LearnerJob) -> Path:
    """Run the learner under Ray Train to the end. Returns the component folder with the result (see `run_learner`)."""
    from actors.learner.ray_train import run_learner
    from actors.learner.run_control import stops_after_a_step
    from actors.learner.worker import work

    with stops_after_a_step(job.settings):
        return run_learner(job, work)
