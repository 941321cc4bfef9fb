"""Evaluation on held-out records in pretrain and sft: their flow-matching loss, and pictures of some of them.

Every evaluation uses the same records, noise and times, so only the weights make a difference. If the run keeps
averaged weights (train.ema_decay), the loop evaluates them in the same way. Left out: rewards, which the rl stage has;
pictures under ZeRO-3, where no single rank has all weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from actors.learner.collectives import gather
from actors.learner.protocols import Evaluate
from deepgen.data.images import usable_image
from deepgen.data.loading.collate import MicroBatch
from deepgen.data.loading.dataset import Picture, resized
from deepgen.data.records import Record
from deepgen.data.usable import left_out
from deepgen.drawing.painter import Painter
from deepgen.drawing.request import DrawRequest
from deepgen.evaluation.choose import GRID_PROMPTS, choose_records, heldout_records
from deepgen.evaluation.pictures import grid
from deepgen.evaluation.results import Evaluation
from deepgen.seeds import stable_seed

if TYPE_CHECKING:
    from actors.learner.protocols import StepContext, WorkerContext
    from actors.objectives.flow_matching import FlowMatching, FlowMatchingMicro
    from deepgen.models.unified import UnifiedModel


@dataclass(frozen=True)
class Timed:
    """A held-out record and its time, as a fraction of the noise schedule; 0 is the noisiest."""

    record: Record
    time: float


class HeldoutLoss:
    """Flow-matching loss of held-out records by task. The times of a task's records cover the noise schedule evenly.

    The micro-batches are split over the ranks. Every rank gets equally many of each kind, the last ones empty if
    necessary (ZeRO-3 would hang otherwise). Records without a usable target are skipped.
    """

    def __init__(self, context: WorkerContext, records: Sequence[Record], objective: FlowMatching) -> None:
        self._objective, self._settings = objective, context.settings
        self._chunks = share_out(records, context.settings.data.micro_batch, context.rank, context.world)
        self._micros: list[tuple[FlowMatchingMicro, list[str]]] | None = None  # made at first use: needs the model

    def measure(self, model: UnifiedModel, context: StepContext) -> dict[str, list[float]]:
        """Losses of the records by task, the same on all ranks. Collective."""
        if self._micros is None:
            self._micros = [self._prepare(kind, chunk, context.device) for kind, chunk in self._chunks]
        mine: list[tuple[str, float]] = []
        for micro, tasks in self._micros:
            errors = self._objective.errors(model, micro).per_sample.tolist()
            mine += zip(tasks, errors, strict=False)  # the dummy of an empty micro-batch has an error but no task
        found: dict[str, list[float]] = {}
        for task, error in (pair for rank in gather(mine, context.world) for pair in rank):
            found.setdefault(task, []).append(error)
        return dict(sorted(found.items()))

    def _prepare(self, kind: str, chunk: Sequence[Timed], device: torch.device) -> tuple[FlowMatchingMicro, list[str]]:
        """Prepare a micro-batch. Returns it with the tasks of its samples."""
        usable: list[Timed] = []
        targets: list[Picture] = []
        for timed in chunk:
            try:
                targets.append(self._picture(timed.record.image))
            except ValueError:  # target image missing or damaged
                continue
            usable.append(timed)
        records = [timed.record for timed in usable]
        seed = self._settings.evaluation.seed
        micro = MicroBatch(
            task=kind,
            indices=tuple(range(len(records))),
            prompts=[record.prompt for record in records],
            references=[[self._picture(data) for data in record.references] for record in records],
            targets=targets,
            seeds=tuple(stable_seed(seed, record.id) for record in records),
            bad=(),
        )
        levels = self._objective.levels(timed.time for timed in usable)
        return self._objective.ready(micro, micro.prompts, levels, device, share=1.0), [r.task for r in records]

    def _picture(self, data: bytes | str | None) -> Picture:
        """Decode and resize an image. Raises ValueError if it is missing or unusable."""
        if data is None:
            raise ValueError("no image")
        return Picture(resized(usable_image(data, "image"), self._settings.data.image_size))


def share_out(
    records: Iterable[Record], micro_batch: int, rank: int, world: int
) -> list[tuple[str, tuple[Timed, ...]]]:
    """This rank's micro-batches as (kind, records), kind "edit" or "t2i". All ranks have the same order of kinds."""
    by_task: dict[str, list[Record]] = {}
    for record in records:
        by_task.setdefault(record.task, []).append(record)
    timed = [Timed(record, (i + 0.5) / len(own)) for own in by_task.values() for i, record in enumerate(own)]
    mine: list[tuple[str, tuple[Timed, ...]]] = []
    for kind in ("edit", "t2i"):
        own = [one for one in timed if (one.record.task == "edit") == (kind == "edit")]
        chunks = [tuple(own[i : i + micro_batch]) for i in range(0, len(own), micro_batch)]
        # Empty chunks fill up the last round, so that every rank gets equally many.
        chunks += [()] * (-len(chunks) % world)
        mine += [(kind, chunk) for chunk in chunks[rank::world]]
    return mine


class Pictures:
    """Draws fixed held-out prompts and logs them as one grid. Used on rank 0, which has the tracker."""

    def __init__(self, context: WorkerContext, records: Sequence[Record]) -> None:
        self._settings, self._tracker = context.settings, context.tracker
        self._records = tuple(choose_records(records, GRID_PROMPTS, context.settings.evaluation.seed))
        self._painter = Painter(context.model, bf16=context.settings.model.precision == "bf16")

    def draw(self, step: int, suffix: str) -> None:
        images = self._painter.draw(DrawRequest.of_evaluation(self._settings, self._records, 1))
        unscored = np.zeros((len(self._records), 1, 0), dtype=np.float32)
        drawn = Evaluation(self._records, tuple(images), (), unscored, unscored[:, 0], step)
        assert self._tracker is not None
        self._tracker.log_images(f"samples{suffix}", step, grid(drawn, f"step {step}{suffix.replace('_', ', ')}"))


class Heldout:
    """Computes the loss every evaluation.every steps and pictures every tracking.grid_every, and both at the end."""

    def __init__(self, context: WorkerContext, objective: FlowMatching) -> None:
        settings = self._settings = context.settings
        self._say = context.say
        self._pictures: Pictures | None = None
        records = heldout_records(settings, say=context.say)
        self._loss = HeldoutLoss(context, records, objective) if records else None
        if context.tracker and records and settings.tracking.grid_every and settings.train.zero_stage < 3:
            self._pictures = Pictures(context, records)
        if context.tracker and (quarantined := left_out(settings, "data.heldout")):
            context.tracker.log(0, quarantined)

    def evaluation(self, step: int) -> Evaluate | None:
        """The evaluation due after ``step`` steps, or None; the same on all ranks, but only rank 0 draws pictures."""
        loss = self._loss is not None and self._due(step, self._settings.evaluation.every)
        grid_every = self._settings.tracking.grid_every
        pictures = self._loss is not None and grid_every > 0 and self._due(step, grid_every)
        return partial(self._evaluate, loss, pictures) if loss or pictures else None

    def arrived(self) -> dict[str, float]:
        """None: results are logged at once."""
        return {}

    def needed(self) -> frozenset[int]:
        return frozenset()

    def close(self) -> None:
        """Do nothing: results are logged at once."""

    def _evaluate(
        self, loss: bool, pictures: bool, model: UnifiedModel, context: StepContext, suffix: str
    ) -> dict[str, float]:
        if pictures and self._pictures:
            self._pictures.draw(context.step, suffix)
        if not (loss and self._loss):
            return {}
        losses = self._loss.measure(model, context)
        if not losses:
            return {}
        means = {task: float(np.mean(own)) for task, own in losses.items()}
        everything = [loss for own in losses.values() for loss in own]
        whole, tasks = float(np.mean(everything)), ", ".join(f"{task} {mean:.4f}" for task, mean in means.items())
        weights = " of the averaged weights" if suffix else ""
        self._say(f"held-out loss{weights} after {context.step} steps: {whole:.4f} ({tasks})")
        figures = {f"heldout_loss{suffix}/{name}": mean for name, mean in (means | {"all": whole}).items()}
        return figures | {"heldout_loss/records": float(len(everything))}

    def _due(self, step: int, every: int) -> bool:
        return step in (0, self._settings.train.steps) or (every > 0 and step % every == 0)
