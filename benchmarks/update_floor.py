"""The cost of an optimizer step on top of its DiT: the learner's update against bare forward, backward and AdamW.

Ours: `learner.loop.update` with DeepSpeed's engine, the objective and everything it computes besides the DiT (text and
vision path, bridge, reference velocities). Floor: diffusers' SD3 transformer on inputs of the same shapes, with one
AdamW step at the end. Left out: Ray Train, checkpoints, waiting for batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.experience.policy.policy_sampler import PolicySampler
from actors.learner.engine import TrainingEngine
from actors.learner.loop import update
from actors.learner.protocols import Objective, StepContext, WorkerContext
from actors.learner.worker import load_model, prepare_process
from actors.messages import Group
from actors.objectives.build import auxiliary_records, build_flow_matching
from actors.objectives.experience_source import RLBatch
from actors.objectives.flow_matching import FlowMatching, FlowMatchingMicro
from actors.objectives.mr_grpo import MRGRPO
from actors.objectives.policy_losses import PolicyMicro
from benchmarks.timing import Result, Shape, bare_dit, bare_inputs, compare, joined_size, recipe
from deepgen.config.settings import TASKS
from deepgen.data.parquet import read_records
from deepgen.models.presets import TINY, Architecture
from deepgen.models.unified import UnifiedModel

CPU = torch.device("cpu")


def run(weights: Path, repeats: int, threads: int) -> list[Result]:
    """Results for the three stages, with their recipes' batches (rl: one group per task). Needs a process group."""
    return [_measure(stage, weights, repeats, threads) for stage in ("pretrain", "sft", "rl")]


def _measure(stage: str, weights: Path, repeats: int, threads: int) -> Result:
    """A sample is an image in pretrain and sft, and a trained transition of an image (or a record) in rl."""
    threaded = (f"train.threads={threads}", f"rollout.threads={threads}")
    settings = recipe(f"tiny-{stage}", weights, f"rollout.prompts_per_step={len(TASKS)}", *threaded)
    prepare_process(settings)
    context = WorkerContext(stage, settings, load_model(settings, stage), 0, 1, CPU, None, _say_nothing)
    trainable = context.model.trainable_parameters(stage)
    objective, batch = rl_experience(context) if stage == "rl" else _records(context)
    # Step 1 with samples of version 0: repetitions change the policy, so the check for ratio 1 must not apply.
    step = StepContext(settings.run.seed, 1, 0, 1, CPU)
    with torch.no_grad():  # also fills the latent cache, so that its cost does not count
        shapes = [_shape(context.model, micro) for micro in objective.prepare(context.model, batch, step)]
    engine = TrainingEngine(settings, context.model, trainable, CPU)

    def ours() -> None:
        update(engine, objective, batch, step, settings)

    samples = sum(shape.batch for shape in shapes)
    return compare(f"update, {stage}", describe(shapes), samples, ours, BareUpdate(shapes), repeats)


def _records(context: WorkerContext) -> tuple[Objective, Any]:
    source, objective, *_ = build_flow_matching(context)
    return objective, source.next(0, 0, 1)


def rl_experience(context: WorkerContext) -> tuple[Objective, RLBatch]:
    """The groups of a step, cycling through the tasks, with random advantages; and records for the auxiliary loss."""
    settings = context.settings
    sampler = PolicySampler(settings)
    prompts = read_records(settings.data.prompts)
    by_task = [[record for record in prompts if record.task == task] for task in TASKS]
    groups = []
    for number in range(settings.rollout.prompts_per_step):
        record = by_task[number % len(TASKS)][number]
        asked = Group(number=number, step=0, epoch=0, record=record)
        _, arrays = sampler.sample_group(asked)
        advantages = np.random.default_rng(number).standard_normal(settings.rollout.group_size).astype(np.float32)
        groups.append(replace(asked, version=0, trajectory=arrays, advantages=advantages))
    matching = FlowMatching.for_worker(context)
    auxiliary = auxiliary_records(context, matching).next(0, 0, 1)
    return MRGRPO.for_worker(context, matching), RLBatch(tuple(groups), tuple(auxiliary))


class BareUpdate:
    """Forward and backward of a bare DiT on each shape, under autocast if `bf16`, then one AdamW step."""

    def __init__(
        self,
        shapes: Sequence[Shape],
        architecture: Architecture = TINY,
        device: str | torch.device = "cpu",
        *,
        bf16: bool = False,
    ) -> None:
        self.dit = bare_dit(architecture, device).train()
        self.optimizer = torch.optim.AdamW(self.dit.parameters(), lr=1e-5)
        self.inputs = [bare_inputs(shape, architecture, device) for shape in shapes]
        self._bf16, self._kind = bf16, torch.device(device).type

    def __call__(self) -> None:
        for inputs in self.inputs:
            with torch.autocast(self._kind, dtype=torch.bfloat16, enabled=self._bf16):
                (velocity,) = self.dit(**inputs, return_dict=False)
            velocity.float().square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def describe(shapes: Sequence[Shape]) -> str:
    """Short text about the DiT calls of a batch: samples by size, largest micro-batch, range of context tokens."""
    sizes: dict[str, int] = {}
    for shape in shapes:
        size = f"{shape.height}x{shape.width}"
        sizes[size] = sizes.get(size, 0) + shape.batch
    samples = " + ".join(f"{count} of {size}" for size, count in sizes.items())
    contexts = [shape.context for shape in shapes]
    largest = max(shape.batch for shape in shapes)
    return f"{samples} latents by up to {largest}, {min(contexts)}-{max(contexts)} context"


def _shape(model: UnifiedModel, micro: FlowMatchingMicro | PolicyMicro) -> Shape:
    if isinstance(micro, PolicyMicro):
        height, width = joined_size([micro.x[0]], [micro.references])
        return Shape(len(micro.x), height, width, micro.conditioning.context.shape[1])
    is_edit = micro.task == "edit"
    context = model.encode_prompts(micro.prompts, micro.references if is_edit else None).context.shape[1]
    height, width = joined_size(micro.latents, micro.reference_latents if is_edit else None)
    return Shape(len(micro.latents), height, width, context)


def _say_nothing(line: str) -> None:
    """Print nothing: console lines would break the table."""
