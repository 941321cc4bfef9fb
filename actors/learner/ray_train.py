"""Ray Train around the learner: start its workers, start them again when one dies, bring its errors back.

``preflight.prepare_run`` (driver, before Ray) → ``run_learner`` (driver) → ``worker.work`` (each Ray Train worker) →
``loop.train``.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actors.learner.checkpoint_store import RESULT
from actors.learner.console import console, shown
from actors.messages import LearnerJob
from deepgen.cluster.resources import process_resources
from deepgen.config import Settings, UserError

_RAY_TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",  # start and end of a run wait for a look at the workers; default 2 s
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean the same in a worker as in the submitted checkout
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process less: our checkpoints do not wait for a notice
}


def run_learner(job: LearnerJob, work: Callable[[dict[str, Any]], None]) -> Path:
    """Train under Ray Train until the last step; the component folder with the result. Ray must be connected.

    ``work`` (`actors.learner.worker`) runs on every worker. When one dies, all are started again and go on from the
    last checkpoint, at most train.max_failures times. Lines of rank 0 appear on this process's stdout. Raises
    UserError of a worker as it is, KeyboardInterrupt on Ctrl-C.
    """
    from ray.train import TrainingFailedError

    settings, folder = job.settings, job.settings.run.folder
    start_deadline = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(settings.cluster.start_deadline_s)}
    for key, value in (_RAY_TRAIN_ENVIRONMENT | start_deadline).items():
        os.environ.setdefault(key, value)
    trainer = _make_trainer(job, work)
    engine = f"Ray Train, DeepSpeed ZeRO-{settings.train.zero_stage}"
    print(f"starting {settings.train.workers} learner worker(s): {engine}", flush=True)
    with shown(folder):
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise _user_error(error) or error from None
    return folder / RESULT


def _make_trainer(job: LearnerJob, work: Callable[[dict[str, Any]], None]) -> Any:
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    settings, limit = job.settings, job.settings.train.max_failures

    class LeanTrainer(TorchTrainer):
        """Two helper processes less: we pass no Ray datasets, and Ray removes placement groups with their creator
        (the cleaner would warn every second on a cluster without dashboard). And a failure policy that looks at what
        failed."""

        def _initialize_and_run_controller(self, **options: Any) -> Any:
            options["failure_policy"] = _failure_policy(settings, self.run_config.failure_config)
            return super()._initialize_and_run_controller(**options)

        def _create_default_callbacks(self) -> list[Any]:
            unused = (DatasetsCallback, PlacementGroupCleanerCallback)
            return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]

        def _register_sigint_handler(self, controller: Any) -> None:
            """Ctrl-C stays a KeyboardInterrupt; Ray's own handler would end the program with exit code 0."""

    return LeanTrainer(
        work,
        train_loop_config={"job": job, "attempt": uuid.uuid4().hex},
        torch_config=TorchConfig(backend="nccl" if job.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=settings.train.workers,
            use_gpu=job.gpus,
            resources_per_worker=process_resources("learner", gpus=job.gpus),
        ),
        run_config=RunConfig(
            name=settings.run.name,
            storage_path=str(settings.run.folder / "ray_train"),
            failure_config=FailureConfig(max_failures=limit, controller_failure_limit=limit),
            logging_config=LoggingConfig(log_level="CRITICAL"),  # errors come back to run_learner with their traceback
        ),
    )


def _failure_policy(settings: Settings, config: Any) -> Any:
    """Ray Train's own, but what would only happen again ends the run at once; restarts are told on the console."""
    from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision

    from actors.experience.reward_pool import RewardPoolError
    from actors.experience.rollout_fleet import NoRolloutLeftError

    say, limit = console(settings.run.folder), settings.train.max_failures

    class Policy(DefaultFailurePolicy):
        restarts = 0

        def make_decision(self, training_failed_error: Any) -> FailureDecision:
            if _cause(training_failed_error, (UserError, ArithmeticError, RewardPoolError, NoRolloutLeftError)):
                return FailureDecision.RAISE
            decision = super().make_decision(training_failed_error)
            if decision is FailureDecision.RETRY:
                self.restarts += 1
                failures = getattr(training_failed_error, "worker_failures", {}) or {"": training_failed_error}
                what = "; ".join(f"worker {rank}: {_first_line(error)}" for rank, error in failures.items())
                say(f"starting the workers again ({self.restarts}, train.max_failures {limit}): {what}")
            return decision

    return Policy(config)


def _user_error(error: Exception) -> UserError | None:
    """The worker's UserError inside Ray's exception, if that is what it was."""
    found = _cause(error, (UserError,))
    return found if isinstance(found, UserError) else None


def _cause(error: Exception, kinds: tuple[type[Exception], ...]) -> BaseException | None:
    """What a worker raised, as Ray Train's exception carries it, if it is one of ``kinds``."""
    for failure in getattr(error, "worker_failures", {}).values():
        inner: BaseException | None = failure
        while inner is not None:
            if isinstance(inner, kinds):
                return inner
            inner = _wrapped(inner) or inner.__cause__
    return None


def _wrapped(error: BaseException) -> BaseException | None:
    """What an exception of Ray's or Ray Train's is about."""
    return getattr(error, "_base_exc", None) or getattr(error, "cause", None)


def _first_line(error: BaseException) -> str:
    """What went wrong, from the inside of the exceptions that Ray wraps around it."""
    while (inner := _wrapped(error)) is not None:
        error = inner
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
