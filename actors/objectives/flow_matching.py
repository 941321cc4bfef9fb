"""Flow matching on training records: the objective of pretrain and sft, and the auxiliary loss of rl."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from actors.learner.collectives import gather
from actors.learner.protocols import Metrics, StepContext, WorkerContext
from actors.objectives.encoder_cache import make_cache
from deepgen.algorithms.losses import FlowMatchingLoss, flow_matching_loss, interpolate
from deepgen.data.cache.encoded import EncodingCache
from deepgen.data.loading.buckets import SIDE_MULTIPLE
from deepgen.data.loading.collate import MicroBatch
from deepgen.data.loading.dataset import FEATURES, LATENT, Picture
from deepgen.data.quarantine import Quarantine
from deepgen.diffusion.schedule import timesteps, training_sigmas
from deepgen.errors import UserError
from deepgen.models.vlm import SeenImage

if TYPE_CHECKING:
    from deepgen.config.settings import Settings
    from deepgen.models.unified import UnifiedModel


@dataclass(frozen=True)
class FlowMatchingMicro:
    """A micro-batch ready for the loss. Lists run over B samples; latents [c, h, w] on the learner's device.

    With no usable record, B is 1: a zero-weight dummy keeps all ranks in step (ZeRO-3 would hang without it).
    """

    task: str
    prompts: list[str]
    references: list[list[Tensor | SeenImage]]  # for the VLM: pixels, [3, H, W] in [-1, 1], or features
    latents: list[Tensor]  # x0
    reference_latents: list[list[Tensor]]
    noise: list[Tensor]
    sigmas: Tensor  # [B] fp32
    share: float  # weight of this micro-batch in the batch's loss
    bad: int  # number of unusable records
    update: int = 0  # optimizer steps on the same batch before it


class FlowMatching:
    """Rectified flow (M2.1): x_t = (1 - sigma) x0 + sigma noise, the DiT predicts noise - x0.

    sigma is uniform over the 1000 levels of the shifted training grid. Generation captions are dropped with probability
    ``caption_drop``; editing drops nothing (M1.8). The random numbers of a sample derive from (seed, step, place in the
    batch), so they do not change with the number of workers. Unusable records count in no mean and are listed in
    ``quarantine``. ``cache`` provides latents, and features for the VLM.
    """

    def __init__(self, settings: Settings, cache: EncodingCache, quarantine: Quarantine) -> None:
        self.cache, self.quarantine = cache, quarantine
        self.caption_drop = settings.data.caption_drop
        self.sigmas = training_sigmas()  # shift 3: the schedule the public weights were trained on

    @classmethod
    def for_worker(cls, context: WorkerContext) -> FlowMatching:
        """Make the objective with the model's own encoders and the quarantine of the run."""
        run, max_share = context.settings.run, context.settings.data.max_bad_share
        quarantine = Quarantine(max_share, run.folder, rank=context.rank, resume=run.resume, say=context.say)
        return cls(context.settings, make_cache(context), quarantine)

    def prepare(
        self, model: UnifiedModel, batch: Sequence[MicroBatch], context: StepContext
    ) -> list[FlowMatchingMicro]:
        micros = self.prepare_records(batch, context, 1.0)
        if not any(gather(any(micro.share for micro in micros), context.world)):
            raise UserError(f"data.train: no record of step {context.step} can be used; see {self.quarantine.path}")
        return micros

    def mini_batches(self, micros: Sequence[FlowMatchingMicro]) -> list[Sequence[FlowMatchingMicro]]:
        return [micros]

    def prepare_records(
        self, batch: Sequence[MicroBatch], context: StepContext, share: float
    ) -> list[FlowMatchingMicro]:
        """Micro-batches whose losses add up to ``share`` times the mean loss of the batch's micro-batches.

        The loss of a micro-batch is the mean over the usable records of all ranks. A micro-batch without usable records
        does not count. Collective. Raises UserError on all ranks if too many records are bad.
        """
        ranks = gather([(len(micro.indices), micro.bad) for micro in batch], context.world)
        usable = [sum(count for count, _ in micros) for micros in zip(*ranks, strict=True)]
        bad = [row for micros in ranks for _, rows in micros for row in rows]
        self.quarantine.add(sum(usable) + len(bad), bad)
        micro_share = share / max(1, sum(count > 0 for count in usable))
        # Gradients are averaged over ranks, so each rank is weighted by its share of the usable records.
        parts = [context.world * len(m.indices) / max(1, count) for m, count in zip(batch, usable, strict=True)]
        return [
            self._prepare_one(micro, context.device, micro_share * part)
            for micro, part in zip(batch, parts, strict=True)
        ]

    def _prepare_one(self, micro: MicroBatch, device: torch.device, share: float) -> FlowMatchingMicro:
        """Draw dropped captions, noise and noise levels; fetch latents. ``share`` scales the loss."""
        generators = micro.generators("flow matching")
        dropped = [bool(torch.rand((), generator=g) < self.caption_drop) for g in generators]
        levels = [self.sigmas[torch.randint(len(self.sigmas), (), generator=g)] for g in generators]
        is_edit = micro.task == "edit"
        prompts = ["" if drop and not is_edit else p for p, drop in zip(micro.prompts, dropped, strict=True)]
        return self.ready(micro, prompts, levels, device, share, generators)

    def levels(self, times: Iterable[float]) -> list[Tensor]:
        """Noise levels at fractions of the training grid: 0 is the noisiest level, 1 lies just past the last one."""
        return [self.sigmas[int(time * len(self.sigmas))] for time in times]

    def ready(
        self,
        micro: MicroBatch,
        prompts: list[str],
        levels: Sequence[Tensor],
        device: torch.device,
        share: float,
        generators: Sequence[torch.Generator] | None = None,
    ) -> FlowMatchingMicro:
        """``micro`` with these prompts and noise levels. Noise: from ``generators``, else from the samples' seeds."""
        if not micro.indices:
            return self._blank(micro, device)
        generators = generators or micro.generators("flow matching")
        latents = [self.cache.get(LATENT, picture) for picture in micro.targets]
        noise = [torch.randn(x.shape, generator=g) for x, g in zip(latents, generators, strict=True)]
        clean = [[self.cache.get(LATENT, picture) for picture in pictures] for pictures in micro.references]
        return FlowMatchingMicro(
            task=micro.task,
            prompts=prompts,
            references=self._for_vlm(micro.references, device),
            latents=_to(latents, device),
            reference_latents=[_to(images, device) for images in clean],
            noise=_to(noise, device),
            sigmas=torch.stack([*levels]).to(device),
            share=share,
            bad=len(micro.bad),
        )

    def _blank(self, micro: MicroBatch, device: torch.device) -> FlowMatchingMicro:
        """The smallest micro-batch of the same task that the model can process, with share 0."""
        image = Picture(torch.zeros(SIDE_MULTIPLE, SIDE_MULTIPLE, 3, dtype=torch.uint8))
        latent = self.cache.get(LATENT, image).to(device)
        is_edit = micro.task == "edit"
        return FlowMatchingMicro(
            task=micro.task,
            prompts=[""],
            references=self._for_vlm([[image] if is_edit else []], device),
            latents=[latent],
            reference_latents=[[latent] if is_edit else []],
            noise=[torch.zeros_like(latent)],
            sigmas=self.sigmas[:1].to(device),
            share=0.0,
            bad=len(micro.bad),
        )

    def errors(self, model: UnifiedModel, micro: FlowMatchingMicro) -> FlowMatchingLoss:
        """Flow-matching loss of the model on a micro-batch: mean [] and per sample [B]."""
        is_edit = micro.task == "edit"
        conditioning = model.encode_prompts(micro.prompts, micro.references if is_edit else None)
        noisy = [interpolate(x, n, sigma) for x, n, sigma in zip(micro.latents, micro.noise, micro.sigmas, strict=True)]
        references = micro.reference_latents if is_edit else None
        velocity = model.velocity(noisy, timesteps(micro.sigmas), conditioning, references)
        return flow_matching_loss(velocity, micro.latents, micro.noise)

    def loss(self, model: UnifiedModel, micro: FlowMatchingMicro, context: StepContext) -> tuple[Tensor, Metrics]:
        loss = self.errors(model, micro).loss
        metrics: dict[str, float | Tensor] = {"data/quarantined_sum": float(micro.bad)}
        metrics["data/cut_prompts_sum"] = float(model.cut_prompts(micro.prompts))
        if micro.share:
            value = loss.detach()
            metrics |= {"loss/flow_matching": value, f"loss/flow_matching_{micro.task}": value}
            metrics["images_sum"] = float(len(micro.latents))
        return loss * micro.share, metrics

    def _for_vlm(self, references: list[list[Picture]], device: torch.device) -> list[list[Tensor | SeenImage]]:
        if FEATURES in self.cache.parts:
            return [[SeenImage(self.cache.get(FEATURES, p).to(device)) for p in pictures] for pictures in references]
        return [[p.image(device) for p in pictures] for pictures in references]


def _to(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    return [tensor.to(device) for tensor in tensors]
