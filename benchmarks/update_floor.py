"""What an optimizer step costs above its DiT: the learner's update against bare forward, backward and AdamW.

Ours: `actors.learner.update` with DeepSpeed's engine, the objective and everything it computes besides the DiT (text
and vision path, bridge, reference velocities). Floor: diffusers' SD3 transformer on inputs of the same shapes, one
AdamW step at the end. Left out: Ray Train, checkpoints, waiting for batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from actors.engine import TrainingEngine
from actors.launch import load_model, prepare_process
from actors.learner import StepContext, WorkerContext, update
from actors.objectives import FlowMatchingMicro, build_flow_matching
from benchmarks.common import Result, Shape, bare_dit, bare_inputs, compare, joined_size, recipe
from deepgen.models.unified import UnifiedModel

CPU = torch.device("cpu")


def run(weights: Path, repeats: int, threads: int) -> list[Result]:
    """Results for the supervised stages, with their recipes' batches. Needs a process group."""
    return [_supervised(stage, weights, repeats, threads) for stage in ("pretrain", "sft")]


def _supervised(stage: str, weights: Path, repeats: int, threads: int) -> Result:
    settings = recipe(f"tiny-{stage}", weights, f"train.threads={threads}")
    prepare_process(settings)
    context = WorkerContext(stage, settings, load_model(settings, stage), 0, 1, CPU, None, _say_nothing)
    trainable = context.model.trainable_parameters(stage)
    source, objective = build_flow_matching(context)
    step = StepContext(settings.run.seed, 0, 0, 1, CPU)
    batch = source.next(0, 0, 1)
    with torch.no_grad():  # also fills the cache of latents, which the update is not charged for
        shapes = [_shape(context.model, micro) for micro in objective.prepare(context.model, batch, step)]
    engine = TrainingEngine(settings, context.model, trainable, CPU)

    def ours() -> None:
        update(engine, objective, batch, step, settings)

    samples = sum(shape.batch for shape in shapes)
    return compare(f"update, {stage}", describe(shapes), samples, ours, BareUpdate(shapes), repeats)


class BareUpdate:
    """Forward and backward of a bare DiT on each shape, then one AdamW step."""

    def __init__(self, shapes: Sequence[Shape]) -> None:
        self.dit = bare_dit().train()
        self.optimizer = torch.optim.AdamW(self.dit.parameters(), lr=1e-5)
        self.inputs = [bare_inputs(shape) for shape in shapes]

    def __call__(self) -> None:
        for inputs in self.inputs:
            (velocity,) = self.dit(**inputs, return_dict=False)
            velocity.square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def describe(shapes: Sequence[Shape]) -> str:
    """Short text of the DiT calls of a batch."""
    texts = [f"{s.batch} of {s.height}x{s.width} latents, {s.context} context" for s in shapes]
    return "; ".join(f"{texts.count(text)} x {text}" for text in dict.fromkeys(texts))


def _shape(model: UnifiedModel, micro: FlowMatchingMicro) -> Shape:
    is_edit = micro.task == "edit"
    context = model.encode_prompts(micro.prompts, micro.references if is_edit else None).context.shape[1]
    height, width = joined_size(micro.latents, micro.reference_latents if is_edit else None)
    return Shape(len(micro.latents), height, width, context)


def _say_nothing(line: str) -> None:
    """The learner's console lines have no place in a table."""
