"""Flow matching on training records: the batch source and the objective of pretrain and sft.

The rl stage uses the same pieces for its auxiliary loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actors.engine import Weights
from actors.learner import Metrics, Parts, StepContext, WorkerContext
from actors.pictures import picture_drawer
from deepgen.algorithms.losses import flow_matching_loss, interpolate
from deepgen.data.collate import LatentCache, MicroBatch, collate
from deepgen.data.dataset import TrainingSet
from deepgen.data.mixture import Mixture
from deepgen.diffusion.schedule import timesteps, training_sigmas

if TYPE_CHECKING:
    from deepgen.config.settings import Settings
    from deepgen.models.unified import UnifiedModel

LATENT_CACHE_BYTES = 512 << 20


class MixtureSource:
    """Micro-batches of the edit:T2I cycle (M2.4). Everything follows from the step number; its state is a position.

    ``draw`` is called with the step number whenever there are new weights, to take pictures.
    """

    def __init__(self, data: TrainingSet, mixture: Mixture, draw: Callable[[int], None] | None = None) -> None:
        self.data, self.mixture, self._draw = data, mixture, draw
        self._world = 1

    @classmethod
    def from_settings(
        cls, settings: Settings, data: TrainingSet, draw: Callable[[int], None] | None = None
    ) -> MixtureSource:
        """The source that data.* describes; raises UserError when a task of the cycle has no records."""
        per_cycle = {"edit": settings.data.edit_per_cycle, "t2i": settings.data.t2i_per_cycle}
        return cls(data, Mixture(settings.run.seed, data.blocks(), per_cycle, settings.data.micro_batch), draw)

    def next(self, step: int, rank: int, world: int) -> list[MicroBatch]:
        self._world = world
        plan = self.mixture.plan(step, rank, world)
        return [collate(self.data, planned, seed=self.mixture.seed, step=step) for planned in plan]

    def publish(self, weights: Callable[[], Weights], version: int) -> None:
        if self._draw:
            self._draw(version)

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self, step: int) -> dict[str, Any]:
        return self.mixture.state_dict(step, self._world)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mixture.load_state_dict(state)

    def close(self) -> None:
        """Nothing is open."""


@dataclass(frozen=True)
class FlowMatchingMicro:
    """A micro-batch ready for the loss. Lists run over B samples; latents [c, h, w] on the learner's device."""

    task: str
    prompts: list[str]
    references: list[list[Tensor]]  # pixels for the VLM, [3, H, W] in [-1, 1]
    latents: list[Tensor]  # x0
    reference_latents: list[list[Tensor]]
    noise: list[Tensor]
    sigmas: Tensor  # [B] fp32
    share: float  # of the batch's loss


class FlowMatching:
    """Rectified flow (M2.1): x_t = (1 - sigma) x0 + sigma noise, the DiT predicts noise - x0.

    sigma comes uniformly from the 1000 levels of the shifted training grid. Captions of generation are dropped with
    probability ``caption_drop``; editing drops nothing (M1.8). Every sample has random numbers of its own, derived from
    (seed, step, place in the batch), so they do not change with the number of workers.
    """

    def __init__(self, data: TrainingSet, settings: Settings, encode: Callable[[Tensor], Tensor]) -> None:
        self.data = data
        self.caption_drop = settings.data.caption_drop
        self.sigmas = training_sigmas()  # shift 3: the schedule the public weights were trained on
        self.cache = LatentCache(encode, LATENT_CACHE_BYTES)

    @classmethod
    def for_worker(cls, data: TrainingSet, context: WorkerContext) -> FlowMatching:
        """With the model's own VAE, whose latents are kept on the CPU."""

        def encode(image: Tensor) -> Tensor:
            (latent,) = context.model.encode_images([image.to(context.device)], None)
            return latent.float().cpu()

        return cls(data, context.settings, encode)

    def prepare(
        self, model: UnifiedModel, batch: Sequence[MicroBatch], context: StepContext
    ) -> list[FlowMatchingMicro]:
        return [self.prepare_one(micro, context.device, 1 / len(batch)) for micro in batch]

    def prepare_one(self, micro: MicroBatch, device: torch.device, share: float) -> FlowMatchingMicro:
        """Draw captions to drop, noise and times; fetch latents. ``share`` scales the loss."""
        latents = [self.cache.get(i, 0, partial(self.data.target, i)) for i in micro.indices]
        generators = micro.generators("flow matching")
        dropped = [bool(torch.rand((), generator=g) < self.caption_drop) for g in generators]
        levels = torch.stack([self.sigmas[torch.randint(len(self.sigmas), (), generator=g)] for g in generators])
        noise = [torch.randn(x.shape, generator=g) for x, g in zip(latents, generators, strict=True)]
        clean = [self._reference_latents(*pair) for pair in zip(micro.indices, micro.references, strict=True)]
        is_edit = micro.task == "edit"
        return FlowMatchingMicro(
            task=micro.task,
            prompts=["" if drop and not is_edit else p for p, drop in zip(micro.prompts, dropped, strict=True)],
            references=[_to(images, device) for images in micro.references],
            latents=_to(latents, device),
            reference_latents=[_to(images, device) for images in clean],
            noise=_to(noise, device),
            sigmas=levels.to(device),
            share=share,
        )

    def loss(self, model: UnifiedModel, micro: FlowMatchingMicro, context: StepContext) -> tuple[Tensor, Metrics]:
        is_edit = micro.task == "edit"
        conditioning = model.encode_prompts(micro.prompts, micro.references if is_edit else None)
        noisy = [interpolate(x, n, sigma) for x, n, sigma in zip(micro.latents, micro.noise, micro.sigmas, strict=True)]
        references = micro.reference_latents if is_edit else None
        velocity = model.velocity(noisy, timesteps(micro.sigmas), conditioning, references)
        loss = flow_matching_loss(velocity, micro.latents, micro.noise).loss
        value = loss.detach()
        own = f"loss/flow_matching_{micro.task}"
        return loss * micro.share, {"loss/flow_matching": value, own: value, "images_sum": float(len(noisy))}

    def _reference_latents(self, index: int, images: list[Tensor]) -> list[Tensor]:
        return [self.cache.get(index, slot, image.clone) for slot, image in enumerate(images, start=1)]


def build_flow_matching(context: WorkerContext) -> Parts:
    """Source and objective of pretrain and sft."""
    data = TrainingSet.read(context.settings.data.train, context.settings.data.image_size)
    context.say(f"{len(data.t2i)} generation and {len(data.edit)} editing records")
    source = MixtureSource.from_settings(context.settings, data, picture_drawer(context))
    return source, FlowMatching.for_worker(data, context)


def _to(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    return [tensor.to(device) for tensor in tensors]
