"""Flow matching on training records: the batch source and the objective of pretrain and sft.

The rl stage uses the same pieces for its auxiliary loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actors.learner.collectives import gather
from actors.learner.engine import Weights
from actors.learner.loop import Evaluate, Metrics, Parts, StepContext, WorkerContext
from actors.objectives.encoder_cache import make_cache
from actors.objectives.heldout_loss import Heldout
from deepgen.algorithms.losses import FlowMatchingLoss, flow_matching_loss, interpolate
from deepgen.config.settings import TASKS
from deepgen.data.cache.encoded import EncodingCache
from deepgen.data.loading.buckets import SIDE_MULTIPLE
from deepgen.data.loading.collate import MicroBatch, collate
from deepgen.data.loading.dataset import FEATURES, LATENT, Picture, TrainingSet
from deepgen.data.loading.mixture import Mixture
from deepgen.data.loading.parquet_store import ParquetStore
from deepgen.data.quarantine import Quarantine
from deepgen.diffusion.schedule import timesteps, training_sigmas
from deepgen.errors import UserError
from deepgen.models.vlm import SeenImage

if TYPE_CHECKING:
    from deepgen.config.settings import Settings
    from deepgen.models.unified import UnifiedModel

Turn = tuple[int, int, int]  # step, rank, world


class MixtureSource:
    """Micro-batches of the edit:T2I cycle (M2.4). What is in them follows from the step number and positions.

    While a step is worked on, ``threads`` of them read the records of the next one (0: they are read when asked for).
    ``records.quarantine`` belongs to the state: how many records were read, and how many of them were bad.
    """

    def __init__(self, data: TrainingSet, mixture: Mixture, records: FlowMatching, threads: int = 0) -> None:
        self.data, self.mixture, self._records = data, mixture, records
        self._world = 1
        self._readers = ThreadPoolExecutor(threads, thread_name_prefix="records") if threads else None
        self._coming: dict[Turn, list[Future[MicroBatch]]] = {}

    def next(self, step: int, rank: int, world: int) -> list[MicroBatch]:
        self._world = world
        if self._readers is None:
            return [read() for read in self._reads((step, rank, world))]
        begun = self._coming.pop((step, rank, world), None) or self._begin((step, rank, world))
        batch = [micro.result() for micro in begun]
        following = (step + 1, rank, world)
        self._coming = {following: self._begin(following)}
        return batch

    def _reads(self, turn: Turn) -> list[Callable[[], MicroBatch]]:
        step, rank, world = turn
        kept, seed = self._records.cache, self.mixture.seed
        plan = self.mixture.plan(step, rank, world)
        return [partial(collate, self.data, planned, seed=seed, step=step, kept=kept) for planned in plan]

    def _begin(self, turn: Turn) -> list[Future[MicroBatch]]:
        assert self._readers is not None
        return [self._readers.submit(read) for read in self._reads(turn)]

    def publish(self, weights: Callable[[], Weights], version: int) -> None:
        """Nobody waits for new weights."""

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self, step: int) -> dict[str, Any]:
        """Also makes the encodings made so far durable, so that a resume need not make them again."""
        self._records.cache.flush()
        quarantine = self._records.quarantine.state_dict()
        return self.mixture.state_dict(step, self._world) | {"quarantine": quarantine}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._coming = {}  # of another place in the data
        self.mixture.load_state_dict(state)
        self._records.quarantine.load_state_dict(state["quarantine"])

    def close(self) -> None:
        if self._readers:
            self._readers.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class FlowMatchingMicro:
    """A micro-batch ready for the loss. Lists run over B samples; latents [c, h, w] on the learner's device.

    Without any usable record B is 1: a blank stands in, of which the share is 0, so that the model runs on this rank as
    on all others (ZeRO-3 would hang) and nothing is learnt from it.
    """

    task: str
    prompts: list[str]
    references: list[list[Tensor | SeenImage]]  # for the VLM: pixels, [3, H, W] in [-1, 1], or features
    latents: list[Tensor]  # x0
    reference_latents: list[list[Tensor]]
    noise: list[Tensor]
    sigmas: Tensor  # [B] fp32
    share: float  # of the batch's loss
    bad: int  # records that cannot be used


class FlowMatching:
    """Rectified flow (M2.1): x_t = (1 - sigma) x0 + sigma noise, the DiT predicts noise - x0.

    sigma comes uniformly from the 1000 levels of the shifted training grid. Captions of generation are dropped with
    probability ``caption_drop``; editing drops nothing (M1.8). Every sample has random numbers of its own, derived from
    (seed, step, place in the batch), so they do not change with the number of workers. Records that cannot be used take
    no part in any mean and are noted in ``quarantine``. ``cache`` makes latents, and features for the VLM. ``heldout``
    is what is evaluated meanwhile; the auxiliary loss of rl has none.
    """

    def __init__(self, settings: Settings, cache: EncodingCache, quarantine: Quarantine) -> None:
        self.cache, self.quarantine = cache, quarantine
        self.heldout: Heldout | None = None
        self.caption_drop = settings.data.caption_drop
        self.sigmas = training_sigmas()  # shift 3: the schedule the public weights were trained on

    @classmethod
    def for_worker(cls, context: WorkerContext) -> FlowMatching:
        """With the model's own encoders and the quarantine of the run."""
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

    def prepare_records(
        self, batch: Sequence[MicroBatch], context: StepContext, share: float
    ) -> list[FlowMatchingMicro]:
        """Micro-batches whose losses add up to ``share`` times the mean over the micro-batches of the batch.

        The mean of a micro-batch is over the usable records of all ranks; one that has none counts for nothing.
        Collective. Raises UserError on all ranks when too many records are bad.
        """
        ranks = gather([(len(micro.indices), micro.bad) for micro in batch], context.world)
        usable = [sum(count for count, _ in micros) for micros in zip(*ranks, strict=True)]
        bad = [row for micros in ranks for _, rows in micros for row in rows]
        self.quarantine.add(sum(usable) + len(bad), bad)
        micro_share = share / max(1, sum(count > 0 for count in usable))
        # Gradients are averaged over ranks, so a rank counts by its part of the usable records.
        parts = [context.world * len(m.indices) / max(1, count) for m, count in zip(batch, usable, strict=True)]
        return [
            self._prepare_one(micro, context.device, micro_share * part)
            for micro, part in zip(batch, parts, strict=True)
        ]

    def _prepare_one(self, micro: MicroBatch, device: torch.device, share: float) -> FlowMatchingMicro:
        """Draw captions to drop, noise and times; fetch latents. ``share`` scales the loss."""
        generators = micro.generators("flow matching")
        dropped = [bool(torch.rand((), generator=g) < self.caption_drop) for g in generators]
        levels = [self.sigmas[torch.randint(len(self.sigmas), (), generator=g)] for g in generators]
        is_edit = micro.task == "edit"
        prompts = ["" if drop and not is_edit else p for p, drop in zip(micro.prompts, dropped, strict=True)]
        return self.ready(micro, prompts, levels, device, share, generators)

    def levels(self, times: Iterable[float]) -> list[Tensor]:
        """Noise levels at shares of the training grid, 0 the noisiest and 1 beyond its end."""
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
        """``micro`` with these prompts and noise levels; noise from ``generators``, else from the samples' seeds."""
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
        """The smallest micro-batch of the same task that the model can work on."""
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

    def evaluation(self, step: int) -> Evaluate | None:
        return self.heldout.evaluation(step) if self.heldout else None

    def errors(self, model: UnifiedModel, micro: FlowMatchingMicro) -> FlowMatchingLoss:
        """The model's error on a micro-batch, [] and [B]."""
        is_edit = micro.task == "edit"
        conditioning = model.encode_prompts(micro.prompts, micro.references if is_edit else None)
        noisy = [interpolate(x, n, sigma) for x, n, sigma in zip(micro.latents, micro.noise, micro.sigmas, strict=True)]
        references = micro.reference_latents if is_edit else None
        velocity = model.velocity(noisy, timesteps(micro.sigmas), conditioning, references)
        return flow_matching_loss(velocity, micro.latents, micro.noise)

    def loss(self, model: UnifiedModel, micro: FlowMatchingMicro, context: StepContext) -> tuple[Tensor, Metrics]:
        loss = self.errors(model, micro).loss
        metrics: dict[str, float | Tensor] = {"data/quarantined_sum": float(micro.bad)}
        if micro.share:
            value = loss.detach()
            metrics |= {"loss/flow_matching": value, f"loss/flow_matching_{micro.task}": value}
            metrics["images_sum"] = float(len(micro.latents))
        return loss * micro.share, metrics

    def _for_vlm(self, references: list[list[Picture]], device: torch.device) -> list[list[Tensor | SeenImage]]:
        if FEATURES in self.cache.parts:
            return [[SeenImage(self.cache.get(FEATURES, p).to(device)) for p in pictures] for pictures in references]
        return [[p.image(device) for p in pictures] for pictures in references]


def build_flow_matching(context: WorkerContext) -> Parts:
    """Source and objective of pretrain and sft."""
    settings, data = context.settings, open_training_set(context)
    mixture = Mixture.from_settings(settings, data.store, settings.data.micro_batch)
    edits = int((data.store.tasks == TASKS.index("edit")).sum())
    context.say(f"{len(data) - edits} generation and {edits} editing records, {size_note(mixture)}")
    objective = FlowMatching.for_worker(context)
    objective.heldout = Heldout(context, objective)
    return MixtureSource(data, mixture, objective, settings.data.threads), objective


def size_note(mixture: Mixture) -> str:
    """For the console: whether records of equal size are drawn together."""
    count = mixture.buckets
    return f"in {count} size buckets" if count > 1 else "one size bucket (equal, or no columns width and height)"


def open_training_set(context: WorkerContext) -> TrainingSet:
    """data.train for this model. Raises UserError when a file cannot be read or lacks a column."""
    data = context.settings.data
    return TrainingSet(ParquetStore(data.train), data.image_size, context.model.tokenizer.all_special_tokens)


def _to(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    return [tensor.to(device) for tensor in tensors]
