"""The cost of a rollout on top of its DiT: one group sampled as an actor does it, against equally large bare forwards.

Ours: encode the prompt (and an edit's source), sample with noise and log-probabilities, decode, pack for the object
store. Floor: `num_steps` forwards of diffusers' SD3 transformer. Left out: Ray, rewards, weight transfer.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from actors.experience.policy.policy_sampler import PolicySampler
from actors.messages import Group
from benchmarks.timing import Result, Shape, bare_dit, bare_inputs, compare, joined_size, recipe
from deepgen.data.images import decode_image
from deepgen.data.loading.dataset import image_to_tensor
from deepgen.data.parquet import read_records
from deepgen.data.records import Record
from deepgen.models.presets import TINY, Architecture
from deepgen.models.unified import UnifiedModel


def run(weights: Path, repeats: int, threads: int) -> list[Result]:
    """Results for a generation prompt and an edit prompt of the tiny world, with the rollout settings of tiny-rl."""
    settings = recipe("tiny-rl", weights, f"rollout.threads={threads}")
    sampler = PolicySampler(settings)
    records = read_records(settings.data.prompts)
    group, steps = settings.rollout.group_size, settings.rollout.num_steps
    results = []
    for task in ("t2i", "edit"):
        record = next(record for record in records if record.task == task)
        request = Group(number=0, step=0, epoch=0, record=record)
        shape = replace(_shape(sampler.model, record, settings.data.image_size), batch=group)

        def ours(request: Group = request) -> None:
            sampler.sample_group(request)

        shapes = f"{group} x {steps} steps, {shape.height}x{shape.width} latents, {shape.context} context"
        results.append(compare(f"rollout, {task}", shapes, group, ours, BareRollout(shape, steps), repeats))
    return results


class BareRollout:
    """Forwards of a bare DiT, under autocast if `bf16`."""

    def __init__(
        self,
        shape: Shape,
        steps: int,
        architecture: Architecture = TINY,
        device: str | torch.device = "cpu",
        *,
        bf16: bool = False,
    ) -> None:
        self._dit, self._inputs = bare_dit(architecture, device).eval(), bare_inputs(shape, architecture, device)
        self._steps, self._bf16, self._kind = steps, bf16, torch.device(device).type

    @torch.no_grad()
    def __call__(self) -> None:
        with torch.autocast(self._kind, dtype=torch.bfloat16, enabled=self._bf16):
            for _ in range(self._steps):
                self._dit(**self._inputs)


@torch.no_grad()
def _shape(model: UnifiedModel, record: Record, image_size: int) -> Shape:
    """Shape of the DiT call for one sample of this prompt."""
    images = [image_to_tensor(decode_image(data), image_size) for data in record.references]
    context = model.encode_prompts([record.prompt], [images]).context.shape[1]
    side = image_size // model.architecture.vae_downsample
    references = [model.encode_images(images)] if images else None
    height, width = joined_size([torch.empty(1, side, side)], references)
    return Shape(1, height, width, context)
