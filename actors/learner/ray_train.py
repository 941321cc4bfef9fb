"""Runs the learner under Ray Train: starts its workers, restarts them when one dies, returns their errors.

``preflight.prepare_run`` (driver, before Ray) → ``run_learner`` (driver) → ``worker.work`` (each Ray Train worker) →
``loop.train``.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actors.learner.checkpoints.checkpoint_store import RESULT, CheckpointStore
from actors.learner.console import console, shown
from actors.messages import LearnerJob
from deepgen.cluster.resources import role_placement
from deepgen.config import Settings, UserError
from deepgen.config.schema.roles import LEARNER

_RAY_TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",  # start and end of a run wait for a health check; default 2 s
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean the same in a worker and in the submitted checkout
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process fewer: our checkpoints need no preemption notice
}


def run_learner(job: LearnerJob, work: Callable[[dict[str, Any]], None]) -> Path:
    """Train under Ray Train until the last step. Returns the component folder with the result. Ray must be connected.

    ``work`` (`actors.learner.worker`) runs on every worker. When a worker dies, all of them restart and continue from
    the newest checkpoint, at most train.max_failures times without a newer one in between; likewise when Ray Train's
    controller dies, which takes its workers with it. Lines of rank 0 appear on this process's stdout. Raises a worker's
    UserError unchanged, and KeyboardInterrupt on Ctrl-C.
    """
    settings, folder = job.settings, job.settings.run.folder
    start_deadline = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(settings.cluster.start_deadline_s)}
    for key, value in (_RAY_TRAIN_ENVIRONMENT | start_deadline).items():
        os.environ.setdefault(key, value)
    attempt = uuid.uuid4().hex
    engine = f"Ray Train, DeepSpeed ZeRO-{settings.train.zero_stage}"
    print(f"starting {settings.train.workers} learner worker(s): {engine}", flush=True)
    with shown(folder):
        lost, newest, limit = 0, newest_step(settings), settings.train.max_failures
        while not _fit(_make_trainer(job, work, attempt)):
            before, newest = newest, newest_step(settings)
            lost = 1 if newest > before else lost + 1
            if 0 <= limit < lost:
                raise RuntimeError(f"Ray Train's controller died {lost} times in a row; train.max_failures {limit}")
            print(f"starting Ray Train again ({lost}, train.max_failures {limit}): its controller died")
    return folder / RESULT


def newest_step(settings: Settings) -> int:
    """Step of the newest complete checkpoint; -1 if there is none."""
    newest = CheckpointStore(settings, "").newest()
    return newest.step if newest else -1


def _fit(trainer: Any) -> bool:
    """Train to the end. False: the controller died; its workers die with it, because Ray ends an owner's actors."""
    from ray.exceptions import ActorDiedError
    from ray.train import TrainingFailedError

    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise _user_error(error) or error from None
    except ActorDiedError:
        return False
    return True


def _make_trainer(job: LearnerJob, work: Callable[[dict[str, Any]], None], attempt: str) -> Any:
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    from actors.learner.rendezvous import torch_config

    settings, limit = job.settings, job.settings.train.max_failures
    placement = role_placement(settings.cluster, LEARNER, gpus=job.gpus)

    class LeanTrainer(TorchTrainer):
        """A TorchTrainer with two fewer helper processes and a failure policy that looks at the error.

        We pass no Ray datasets, and Ray removes placement groups together with their creator (the cleaner would warn
        every second on a cluster without a dashboard).
        """

        def _initialize_and_run_controller(self, **options: Any) -> Any:
            options["failure_policy"] = _failure_policy(settings, self.run_config.failure_config)
            return super()._initialize_and_run_controller(**options)

        def _create_default_callbacks(self) -> list[Any]:
            unused = (DatasetsCallback, PlacementGroupCleanerCallback)
            return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]

        def _register_sigint_handler(self, controller: Any) -> None:
            """Keep Ctrl-C a KeyboardInterrupt; Ray's own handler would end the program with exit code 0."""

    return LeanTrainer(
        work,
        train_loop_config={"job": job, "attempt": attempt},
        torch_config=torch_config(gpus=job.gpus),
        scaling_config=ScalingConfig(
            num_workers=settings.train.workers,
            use_gpu=job.gpus,
            resources_per_worker=dict(placement.resources),
            placement_strategy="PACK",  # ranks talk to each other all the time: on as few nodes as can be
            label_selector=dict(placement.labels) or None,
        ),
        run_config=RunConfig(
            name=settings.run.name,
            storage_path=str(settings.run.folder / "ray_train"),
            failure_config=FailureConfig(max_failures=limit, controller_failure_limit=limit),
            logging_config=LoggingConfig(log_level="CRITICAL"),  # errors reach run_learner with their traceback
        ),
    )


def _failure_policy(settings: Settings, config: Any) -> Any:
    """Ray Train's policy, with three differences.

    Errors that a restart cannot fix end the run at once. A newer checkpoint starts the count of failures anew, because
    a run of weeks may meet many. Restarts are shown on the console.
    """
    from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision

    from actors.experience.rollout_fleet import NoRolloutLeftError
    from actors.experience.scoring.pool_parts import RewardPoolError
    from actors.experience.stream_client import StreamLostError

    final = (UserError, ArithmeticError, RewardPoolError, NoRolloutLeftError, StreamLostError)
    say, limit = console(settings.run.folder), settings.train.max_failures

    class Policy(DefaultFailurePolicy):
        restarts, newest = 0, newest_step(settings)

        def make_decision(self, training_failed_error: Any) -> FailureDecision:
            if _cause(training_failed_error, final):
                return FailureDecision.RAISE
            before, self.newest = self.newest, newest_step(settings)
            if self.newest > before:
                super().__init__(config)
                self.restarts = 0
            decision = super().make_decision(training_failed_error)
            if decision is FailureDecision.RETRY:
                self.restarts += 1
                failures = getattr(training_failed_error, "worker_failures", {})
                what = "; ".join(f"worker {rank}: {first_line(error)}" for rank, error in failures.items())
                what = what or first_line(training_failed_error)  # they died before they worked
                say(f"starting the workers again ({self.restarts}, train.max_failures {limit}): {what}")
            return decision

    return Policy(config)


def _user_error(error: Exception) -> UserError | None:
    """The worker's UserError inside Ray's exception, or None if the cause is another error."""
    found = _cause(error, (UserError,))
    return found if isinstance(found, UserError) else None


def _cause(error: Exception, kinds: tuple[type[Exception], ...]) -> BaseException | None:
    """The exception of a worker inside Ray Train's exception, if it is one of ``kinds``; otherwise None."""
    for failure in getattr(error, "worker_failures", {}).values():
        inner: BaseException | None = failure
        while inner is not None:
            if isinstance(inner, kinds):
                return inner
            inner = _wrapped(inner) or inner.__cause__
    return None


def _wrapped(error: BaseException) -> BaseException | None:
    """The exception inside an exception of Ray or Ray Train, or None."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

    if isinstance(error, WorkerGroupStartupFailedError):
        return error.__cause__
    # health_check_failure: of a worker that died between two calls; controller_failure: of one that died in its start
    names = ("_base_exc", "cause", "health_check_failure", "controller_failure")
    return next((inner for name in names if (inner := getattr(error, name, None)) is not None), None)


def first_line(error: BaseException) -> str:
    """First line of the innermost exception, inside all of Ray's wrappers. Says "died" of a process that is gone."""
    from ray.exceptions import ActorUnavailableError

    while (inner := _wrapped(error)) is not None:
        error = inner
    line = next(iter(str(error).splitlines()), type(error).__name__)[:200]
    # Ray's word for a process whose connection broke before the cluster knows of its death.
    return f"a process died or is out of reach: {line}" if isinstance(error, ActorUnavailableError) else line
