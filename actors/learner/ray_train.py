"""Starting a learner: checks before anything runs, Ray Train around the loop, its lines on the console, its errors.

``prepare_run`` (driver, before Ray) → ``run_learner`` (driver) → ``_work`` (each Ray Train worker) → ``learner.train``.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.learner.checkpoint_store import RESULT, SPARE_BYTES, CheckpointStore, Manifest, megabytes
from deepgen.cluster.resources import process_resources
from deepgen.config import Settings, UserError
from deepgen.data.usable import JUDGED
from deepgen.models.presets import check_width
from deepgen.models.stage_parts import TRAINED_PARTS
from deepgen.tracking.tracker import check_tracking

if TYPE_CHECKING:
    from actors.learner.loop import Parts, WorkerContext
    from deepgen.models.unified import UnifiedModel

CONSOLE = "console.log"
_POLL_S = 0.2
_RAY_TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",  # start and end of a run wait for a look at the workers; default 2 s
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean the same in a worker as in the submitted checkout
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process less: our checkpoints do not wait for a notice
}


@dataclass(frozen=True)
class LearnerJob:
    """One run of the learner. ``build`` makes source and objective inside each worker; it is pickled by reference."""

    stage: str
    settings: Settings
    build: Callable[[WorkerContext], Parts]
    gpus: bool


def prepare_run(settings: Settings, stage: str) -> Settings:
    """Check what can be checked before anything starts and make the run folder; settings with weights resolved.

    Raises UserError when a folder cannot be written, the disk is too small, MLflow's server does not answer, there is
    nothing to resume, the checkpoint does not fit, or an input lies in the folder of an older run that `own_folder`
    would put aside.
    """
    weights = resolve_weights(Path(settings.model.weights))
    settings = settings.model_copy(update={"model": settings.model.model_copy(update={"weights": weights})})
    check_width(settings.model.preset, weights)
    folder, store = settings.run.folder, CheckpointStore(settings, stage)
    if settings.run.resume:
        _check_resume(store, settings)
    elif store.folder.exists():
        _check_inputs_elsewhere(settings)
    check_tracking(settings)
    _check_writable(folder)
    if settings.data.cache_dir:
        _check_cache_folder(Path(settings.data.cache_dir))
    _check_space(folder, settings, stage)
    return settings


@contextmanager
def own_folder(settings: Settings) -> Iterator[None]:
    """A new run never writes into the folder of an older one that has checkpoints: the older one is renamed to
    ``<name>.1`` (.2, ...). If the start fails inside this context, everything is as it was."""
    folder = settings.run.folder
    if settings.run.resume:
        yield
        return
    if not (folder / "checkpoints").exists():
        for judged in folder.glob(f"*{JUDGED}"):  # by a start that came to nothing: what was bad may be mended
            judged.unlink()
        yield
        return
    kept = next(path for n in range(1, 10**6) if not (path := folder.with_name(f"{folder.name}.{n}")).exists())
    folder.rename(kept)
    folder.mkdir()
    try:
        yield
    except BaseException:  # Ctrl-C, too
        shutil.rmtree(folder)
        kept.rename(folder)
        raise
    print(f"an earlier run of this name is kept as {kept}", flush=True)


def _check_inputs_elsewhere(settings: Settings) -> None:
    """Raise UserError when a new run would put its own input aside."""
    folder, data = settings.run.folder.resolve(), settings.data
    inputs: dict[str, Path | str] = {"model.weights": settings.model.weights, "data.cache_dir": data.cache_dir}
    inputs |= {f"data.{key}": getattr(data, key) for key in ("train", "prompts", "heldout")}
    for key, path in inputs.items():
        if str(path) and Path(path).resolve().is_relative_to(folder):
            raise UserError(
                f"{key}: {path} lies in the folder of run {settings.run.name!r}, which a new run of this name puts "
                "aside; allowed: another run.name, or --resume to continue that run"
            )


def _check_resume(store: CheckpointStore, settings: Settings) -> None:
    if not store.run_folder.is_dir():
        raise UserError(f"--resume: there is no run {settings.run.name!r} in {settings.run.dir}")
    manifest = store.newest()
    if manifest is None:
        print(f"{store.run_folder} has no complete checkpoint yet: starting from step 0", flush=True)
    else:
        store.check_fits(manifest)


def resolve_weights(path: Path) -> Path:
    """The component folder ``path`` is, or that the finished run in folder ``path`` has written."""
    if (path / "transformer").is_dir():
        return path
    if (path / RESULT / "transformer").is_dir():
        return path / RESULT
    if (path / "checkpoints").is_dir():
        raise UserError(f"model.weights: the run {path} has not finished; finish it with --resume")
    raise UserError(f"model.weights: {path} is not a component folder (it has no transformer/) and not a finished run")


def run_learner(job: LearnerJob) -> Path:
    """Train under Ray Train until the last step; the component folder with the result. Ray must be connected.

    When a worker dies, all are started again and go on from the last checkpoint, at most train.max_failures times.
    Lines of rank 0 appear on this process's stdout. Raises UserError of a worker as it is, KeyboardInterrupt on Ctrl-C.
    """
    from ray.train import TrainingFailedError

    settings, folder = job.settings, job.settings.run.folder
    start_deadline = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(settings.cluster.start_deadline_s)}
    for key, value in (_RAY_TRAIN_ENVIRONMENT | start_deadline).items():
        os.environ.setdefault(key, value)
    trainer = _make_trainer(job)
    console = folder / CONSOLE
    console.touch()
    engine = f"Ray Train, DeepSpeed ZeRO-{settings.train.zero_stage}"
    print(f"starting {settings.train.workers} learner worker(s): {engine}", flush=True)
    with _shown(console):
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise _user_error(error) or error from None
    return folder / RESULT


def _make_trainer(job: LearnerJob) -> Any:
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
        _work,
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

    say, limit = _console(settings.run.folder), settings.train.max_failures

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


@contextmanager
def _shown(console: Path) -> Iterator[None]:
    """Print what rank 0 adds to its console file meanwhile."""
    done = threading.Event()

    def follow() -> None:
        while not done.wait(_POLL_S):
            _copy_lines(lines)

    with console.open() as lines:
        lines.seek(0, os.SEEK_END)
        follower = threading.Thread(target=follow, daemon=True)
        follower.start()
        try:
            yield
        finally:
            done.set()
            follower.join()
            _copy_lines(lines)


def _copy_lines(lines: Any) -> None:
    text = lines.read()
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()


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


def _check_writable(folder: Path) -> None:
    try:
        _probe(folder)
    except OSError as error:
        raise UserError(f"run.dir: cannot write the run folder {folder}: {error.strerror or error}") from error


def _check_cache_folder(folder: Path) -> None:
    try:
        _probe(folder)
    except OSError as error:
        raise UserError(
            f"data.cache_dir: got {str(folder)!r}, which cannot be written ({error.strerror or error}); allowed: a "
            "folder to write to, or empty for none"
        ) from error


def _probe(folder: Path) -> None:
    """Make a folder and write something into it. OSError when that cannot be done."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".probe-{uuid.uuid4().hex}"
    probe.write_bytes(b"\0" * 4096)
    probe.unlink()


def _check_space(folder: Path, settings: Settings, stage: str) -> None:
    """Room for the checkpoints (weights and two moments in fp32) and the result, estimated from the weights' files."""
    weights = Path(settings.model.weights)
    trained = sum(_folder_bytes(weights / part) for part in TRAINED_PARTS[stage])
    count = min(settings.train.keep_checkpoints, settings.train.steps // settings.train.checkpoint_every + 1) + 1
    needed = 3 * trained * count + _folder_bytes(weights) + SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"run.dir: {folder} has {megabytes(free)} free, this run needs about {megabytes(needed)} ({count} "
            "checkpoints and the result); make room, lower train.keep_checkpoints or choose another run.dir"
        )


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _work(config: dict[str, Any]) -> None:
    """The function of every Ray Train worker."""
    import ray.train

    job: LearnerJob = config["job"]
    train_context = ray.train.get_context()
    rank, world = train_context.get_world_rank(), train_context.get_world_size()
    prepare_process(job.settings)
    run_worker(job, config["attempt"], rank, world)


def prepare_process(settings: Settings) -> None:
    """Environment of a worker process; must run before DeepSpeed is imported."""
    import torch

    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    # DeepSpeed compiles its shared-memory collectives once, with the environment's own ninja.
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    torch.set_num_threads(settings.train.threads)
    from huggingface_hub.serialization import _torch as saving

    saving.logger.setLevel(logging.WARNING)  # Ray Train would show on the console where each component was saved
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's older names


def run_worker(job: LearnerJob, attempt: str, rank: int, world: int) -> None:
    """One worker of an initialised torch process group: load the model, then train."""
    import torch

    from actors.learner.loop import WorkerContext, train
    from deepgen.tracking.tracker import Tracker

    store = CheckpointStore(job.settings, job.stage, attempt)
    resume = _resumes(job.settings, store.newest(), attempt)
    settings = job.settings.model_copy(update={"run": job.settings.run.model_copy(update={"resume": resume})})
    say = _console(settings.run.folder) if rank == 0 else _silent
    device = torch.device("cuda", torch.cuda.current_device()) if job.gpus else torch.device("cpu")
    say(f"loading {settings.model.weights}")
    model = load_model(settings, job.stage).to(device)
    with ExitStack() as stack:
        tracker = stack.enter_context(Tracker(settings, job.stage)) if rank == 0 else None
        context = WorkerContext(job.stage, settings, model, rank, world, device, tracker, say)
        train(context, job.build, store, resume)


def _resumes(settings: Settings, newest: Manifest | None, attempt: str) -> bool:
    """A run resumes when the user asked for it, or when Ray Train started its workers again."""
    return settings.run.resume or (newest is not None and newest.attempt == attempt)


def load_model(settings: Settings, stage: str) -> UnifiedModel:
    """The model a stage starts from: fp32 parameters; sft attaches a new LoRA unless the folder has one."""
    import torch

    from deepgen.models.unified import UnifiedModel
    from deepgen.models.vlm import LoraSettings

    chosen = settings.model
    lora = LoraSettings(rank=chosen.lora_rank, alpha=chosen.lora_alpha, dropout=chosen.lora_dropout)
    torch.manual_seed(settings.run.seed)  # a fresh bridge and a fresh LoRA are the same on every rank and on resume
    model = UnifiedModel.from_folder(
        chosen.weights,
        padding=chosen.padding,
        lora=lora if stage == "sft" and chosen.lora_rank else None,
        preset=chosen.preset,
        fresh_bridge=chosen.fresh_bridge,
    )
    if chosen.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model


def _console(folder: Path) -> Callable[[str], None]:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CONSOLE

    def say(line: str) -> None:
        with path.open("a") as stream:
            stream.write(line + "\n")

    return say


def _silent(line: str) -> None:
    """Ranks above 0 say nothing."""
