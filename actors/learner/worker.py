"""The body of one learner rank: prepare the process, load the model, train."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.learner.checkpoints.checkpoint_store import CheckpointStore, Manifest
from actors.learner.console import console, silent
from actors.learner.loop import train
from actors.learner.protocols import WorkerContext
from actors.messages import LearnerJob
from deepgen.config import Settings
from deepgen.errors import disk_error, writing
from deepgen.monitoring.log_lines import Speaker, set_up_logs

if TYPE_CHECKING:
    from deepgen.models.unified import UnifiedModel


def work(config: dict[str, Any]) -> None:
    """The function that every Ray Train worker runs."""
    import ray.train

    job: LearnerJob = config["job"]
    train_context = ray.train.get_context()
    rank, world = train_context.get_world_rank(), train_context.get_world_size()
    os.environ |= job.variables
    set_up_logs(Speaker("learner", rank=rank, run=job.settings.run.name))
    prepare_process(job.settings)
    run_worker(job, config["attempt"], rank, world)


def prepare_process(settings: Settings) -> None:
    """Set up the environment of a worker process. Must run before DeepSpeed is imported."""
    import torch

    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    # DeepSpeed compiles its shared-memory collectives once, with the environment's own ninja.
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    torch.set_num_threads(settings.train.threads)
    from huggingface_hub.serialization import _torch as saving

    saving.logger.setLevel(logging.WARNING)  # hides a line per saved component, which Ray Train would print
    # DeepSpeed uses deprecated names of torch.distributed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def run_worker(job: LearnerJob, attempt: str, rank: int, world: int) -> None:
    """Run one worker of an initialised torch process group: load the model, then train."""
    import torch

    from deepgen.tracking.timeline_picture import log_timeline
    from deepgen.tracking.tracker import Tracker

    store = CheckpointStore(job.settings, job.stage, attempt)
    resume = _resumes(job.settings, store.newest(), attempt)
    settings = job.settings.model_copy(update={"run": job.settings.run.model_copy(update={"resume": resume})})
    say = console(settings.run.folder) if rank == 0 else silent
    device = torch.device("cuda", torch.cuda.current_device()) if job.gpus else torch.device("cpu")
    say(f"loading {settings.model.weights}")
    model = load_model(settings, job.stage).to(device)
    with _full_disk_is_final(settings), ExitStack() as stack:
        tracker = stack.enter_context(Tracker(settings, job.stage)) if rank == 0 else None
        context = WorkerContext(job.stage, settings, model, rank, world, device, tracker, say)
        if not train(context, job.build, store, resume) and tracker:
            log_timeline(tracker, settings.run.name)  # at the end of a whole run its report does this
            tracker.close("KILLED")


@contextmanager
def _full_disk_is_final(settings: Settings) -> Iterator[None]:
    """A full or read-only disk becomes a UserError, wherever it was met: a restart would meet it again."""
    try:
        yield
    except OSError as error:
        found = disk_error(error)
        if found is None:
            raise
        with writing("the run", settings.run.folder if found.filename is None else Path(found.filename)):
            raise found from error


def _resumes(settings: Settings, newest: Manifest | None, attempt: str) -> bool:
    """Whether this start resumes: the user asked for it, or Ray Train has restarted the workers."""
    return settings.run.resume or (newest is not None and newest.attempt == attempt)


def load_model(settings: Settings, stage: str) -> UnifiedModel:
    """Load the model that a stage starts from, with fp32 parameters. sft adds a new LoRA unless the folder has one."""
    import torch

    from deepgen.models.unified import UnifiedModel
    from deepgen.models.vlm import LoraSettings

    chosen = settings.model
    lora = LoraSettings(rank=chosen.lora_rank, alpha=chosen.lora_alpha, dropout=chosen.lora_dropout)
    torch.manual_seed(settings.run.seed)  # makes a fresh bridge or LoRA the same on every rank and on resume
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
