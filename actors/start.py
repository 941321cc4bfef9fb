"""Starts and wires the processes of a run. Importing this module loads neither torch nor the model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from actors.experience.rollout_actor import RolloutActor
from actors.experience.rollout_fleet import RESTARTS, WEIGHTS_GROUP
from actors.experience.stream import ExperienceStream
from actors.messages import LearnerJob
from deepgen.cluster.resources import process_resources
from deepgen.config import Settings
from deepgen.data.records import Record

if TYPE_CHECKING:
    from actors.learner.protocols import Parts, WorkerContext


def start_rollouts(settings: Settings, *, gpus: bool) -> dict[str, Any]:
    """Start the rollout actors, spread over the nodes. Returns handles by name, without waiting for the models."""
    options: dict[str, Any] = {
        **_options("rollout", gpus),
        "max_restarts": RESTARTS,
        "concurrency_groups": {WEIGHTS_GROUP: 1},
        "scheduling_strategy": "SPREAD",
    }
    remote = ray.remote(**options)(RolloutActor)
    names = [f"rollout-{i}" for i in range(settings.rollout.actors)]
    return {name: remote.remote(settings, name) for name in names}


def start_stream(
    settings: Settings, prompts: Sequence[Record], rollouts: dict[str, Any], *, resume: bool, gpus: bool
) -> Any:
    """Start the experience stream. Returns its handle; call the stream's `start` next."""
    remote = ray.remote(ExperienceStream).options(**_options("experience", gpus))
    return remote.remote(settings, prompts, rollouts, resume=resume, gpus=gpus)


def learner_parts(stream: Any) -> Callable[[WorkerContext], Parts]:
    """The `build` function of a `LearnerJob` (`actors.messages`). It makes source and objective in a learner worker."""
    return functools.partial(_learner_parts, stream)


def _learner_parts(stream: Any, context: WorkerContext) -> Parts:
    from actors.objectives.build import build_rl

    return build_rl(context, stream)


def start_learner(job: LearnerJob) -> Path:
    """Run the learner under Ray Train to the end. Returns the component folder with the result (see `run_learner`)."""
    from actors.learner.ray_train import run_learner
    from actors.learner.run_control import stops_after_a_step
    from actors.learner.worker import work

    with stops_after_a_step(job.settings):
        return run_learner(job, work)


def _options(role: str, gpus: bool) -> dict[str, float]:
    resources = process_resources(role, gpus=gpus)
    return {"num_cpus": resources["CPU"], "num_gpus": resources.get("GPU", 0.0)}
