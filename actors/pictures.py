"""Pictures of fixed held-out prompts while pretrain and sft are running, drawn by the learner's rank 0 itself.

Left out: ZeRO-3, where one rank alone does not have the weights; the rl stage asks its rollout actors instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from actors.evaluation import GRID_PROMPTS, Evaluation, choose_records, grid, heldout_records
from actors.prompts import left_out
from actors.rollout import EvaluationRequest
from actors.sampling import PolicySampler

if TYPE_CHECKING:
    from pathlib import Path

    from actors.learner import WorkerContext
    from deepgen.config.settings import Settings
    from deepgen.models.unified import UnifiedModel


class _OwnSampler(PolicySampler):
    """Samples with the model that is being trained instead of one read from a folder."""

    def __init__(self, settings: Settings, model: UnifiedModel) -> None:
        self.model = model
        super().__init__(settings)
        torch.set_num_threads(settings.train.threads)

    def load(self, folder: Path) -> None:
        """The model is given."""


def picture_drawer(context: WorkerContext) -> Callable[[int], None] | None:
    """A function that logs a grid when the step it is called with is due; None where nobody draws."""
    settings, tracker = context.settings, context.tracker
    if tracker is None or settings.tracking.grid_every == 0 or settings.train.zero_stage == 3:
        return None
    heldout = heldout_records(settings, judged=False, say=context.say)
    if not heldout:
        return None
    seed = settings.evaluation.seed
    records = tuple(choose_records(heldout, GRID_PROMPTS, seed))
    sampler = _OwnSampler(settings, context.model)
    quarantined = left_out(settings, "data.heldout")

    def draw(step: int) -> None:
        if step % settings.tracking.grid_every and step != settings.train.steps:
            return
        if quarantined:
            tracker.log(step, quarantined)
        context.model.eval()
        images = sampler.evaluate(EvaluationRequest(records, 1, settings.evaluation.num_steps, seed))
        context.model.train()
        unscored = np.zeros((len(records), 1, 0), dtype=np.float32)
        drawn = Evaluation(records, tuple(images), (), unscored, unscored[:, 0], step)
        tracker.log_images("samples", step, grid(drawn, f"step {step}"))

    return draw
