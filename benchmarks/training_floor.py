"""The cost of a training epoch, end to end, on top of the bare model, and the gain from cached encodings.

Ours: the learner's steps with one worker, from records in parquet files to new weights: plan, decoding, VAE, visual
tower, objective, DeepSpeed's engine, clipping, writing the cache. Floor: forward, backward and AdamW of the same model
in plain torch on the same batches, decoded beforehand. If ours has to encode images, the floor encodes them too;
otherwise the floor starts from finished latents and visual features. Left out: Ray Train, checkpoints, tracking. Row
groups stay in memory, and cache files in the system's page cache.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from actors.learner.engine import TrainingEngine, parameter_groups
from actors.learner.loop import update
from actors.learner.protocols import BatchSource, StepContext, WorkerContext
from actors.learner.worker import load_model, prepare_process
from actors.objectives.build import build_flow_matching
from actors.objectives.flow_matching import FlowMatching, FlowMatchingMicro
from benchmarks.timing import ROOT, Result, recipe, seconds
from deepgen.algorithms.losses import flow_matching_loss, interpolate
from deepgen.config.settings import Settings
from deepgen.data.cache.disk_store import DiskStore
from deepgen.data.cache.encoded import EncodingCache, MemoryStore, Store
from deepgen.data.conversion.convert_units import ROW_GROUP
from deepgen.data.loading.collate import MicroBatch
from deepgen.data.parquet import read_records, write_records
from deepgen.data.records import Record
from deepgen.diffusion.schedule import timesteps
from deepgen.models.unified import UnifiedModel

CPU = torch.device("cpu")
GOAL = 0.92  # share of the floor's samples per second


def run(weights: Path, repeats: int, threads: int) -> list[Result]:
    """Epochs of one step: tiny-sft on one batch of tiny-world records. Needs a process group."""
    with tempfile.TemporaryDirectory() as folder:
        own = [f"train.threads={threads}", f"run.dir={folder}", f"data.train={folder}/train.parquet"]
        own.append("evaluation.prompts=0")
        settings = recipe("tiny-sft", weights, *own)
        fresh = write_batches(settings, repeats + 2)  # + 2: the warm-up, and the batch read ahead of the last step
        prepare_process(settings)
        ours = OurTraining(settings)
        others = {n: OurTraining(recipe("tiny-sft", weights, *own, f"train.zero_stage={n}")) for n in (0, 2)}
        about: dict[str, dict[str, Any]] = {part: {} for part in ours.parts}
        zero = f"ZeRO-{settings.train.zero_stage}"
        works = {
            f"{zero}, nothing kept": ours.epochs(MemoryStore(0)),
            f"{zero}, kept on disk, first epoch": ours.epochs(DiskStore(Path(folder) / "first", about), fresh),
            f"{zero}, kept on disk, later epochs": ours.epochs(DiskStore(Path(folder) / "later", about)),
            f"{zero}, kept in memory, later epochs": ours.epochs(MemoryStore()),
        }
        for stage, training in others.items():
            works[f"ZeRO-{stage}, kept in memory, later epochs"] = training.epochs(MemoryStore())
        batch, micros = ours.prepared()
        samples = sum(len(micro.latents) for micro in micros)
        made, whole = BareTraining(settings, micros), BareTraining(settings, micros, batch)
        *times, made_times, whole_times = in_turns([*works.values(), made, whole], repeats)
        floors = [whole_times if "nothing" in name or "first" in name else made_times for name in works]
        return [
            _with_rates(Result(f"training, sft, {name}", _describe(micros), samples, own_times, floor_times))
            for name, own_times, floor_times in zip(works, times, floors, strict=True)
        ]


def write_batches(settings: Settings, copies: int) -> Path:
    """Write data.train with as many tiny-world records as one step reads, so that a step is an epoch.

    Returns a file with ``copies`` times as many: the same records under other names, with images that differ in one
    byte.
    """
    data = settings.data
    wanted = {True: data.edit_per_cycle * data.micro_batch, False: data.t2i_per_cycle * data.micro_batch}
    found = read_records(ROOT / "assets" / "tiny" / "data" / "train.parquet")
    chosen = [[r for r in found if (r.task == "edit") == is_edit][:count] for is_edit, count in wanted.items()]
    batch = [*itertools.chain(*chosen)]
    write_records(data.train, batch, row_group_size=ROW_GROUP)
    fresh = data.train.with_name("fresh.parquet")
    write_records(fresh, [copy for n in range(copies) for copy in map(partial(_copy, n), batch)])
    return fresh


def _copy(number: int, record: Record) -> Record:
    """The record with one more byte after each of its images, which no decoder reads."""
    more = bytes([number])
    assert isinstance(record.image, bytes)
    references = tuple(image + more for image in record.references if isinstance(image, bytes))
    return replace(record, id=f"{record.id}/{number}", image=record.image + more, references=references)


class OurTraining:
    """The learner's loop without logging and checkpoints."""

    def __init__(self, settings: Settings) -> None:
        model = load_model(settings, "sft")
        self.context = WorkerContext("sft", settings, model, 0, 1, CPU, None, lambda line: None)
        trainable = model.trainable_parameters("sft")
        model.train()
        self.engine = TrainingEngine(settings, model, trainable, CPU)
        self.parts = tuple(self._source(MemoryStore(), None)[1].cache.parts)

    def epochs(self, store: Store, records: Path | None = None) -> Callable[[], None]:
        """A function that trains one step per call. ``records`` replaces data.train."""
        source, objective = self._source(store, records)
        steps = itertools.count()

        def epoch() -> None:
            step = next(steps)
            batch = source.next(step, 0, 1)
            update(self.engine, objective, batch, self._at(step), self.context.settings)
            source.state_dict(step + 1)  # writes the cache

        return epoch

    def prepared(self) -> tuple[list[MicroBatch], list[FlowMatchingMicro]]:
        """The micro-batches of a step as they are read, and as the model gets them."""
        source, objective = self._source(MemoryStore(), None)
        batch = source.next(0, 0, 1)
        with torch.no_grad(), _autocast(self.context.settings):
            return batch, objective.prepare(self.context.model, batch, self._at(0))

    def _source(self, store: Store, records: Path | None) -> tuple[BatchSource, FlowMatching]:
        settings = self.context.settings
        data = settings.data.model_copy(update={"train": records or settings.data.train})
        context = replace(self.context, settings=settings.model_copy(update={"data": data}))
        source, objective, *_ = build_flow_matching(context)
        assert isinstance(objective, FlowMatching)
        objective.cache = EncodingCache(objective.cache.parts, store)
        return source, objective

    def _at(self, step: int) -> StepContext:
        return StepContext(self.context.settings.run.seed, step, 0, 1, CPU)


def in_turns(works: Sequence[Callable[[], None]], repeats: int) -> list[tuple[float, ...]]:
    """Seconds of each work's repetitions. After a warm-up, all works run in turns."""
    for work in works:
        work()
    rounds = [[seconds(work) for work in works] for _ in range(repeats)]
    return list(zip(*rounds, strict=True))


class BareTraining:
    """Forward and backward of each micro-batch through a model without DeepSpeed, then one AdamW step.

    With ``batch`` (the pictures of the same micro-batches), VAE and visual tower encode the pictures first.
    """

    def __init__(
        self, settings: Settings, micros: Sequence[FlowMatchingMicro], batch: Sequence[MicroBatch] = ()
    ) -> None:
        self.settings, self.micros, self.batch = settings, micros, batch
        self.model: UnifiedModel = load_model(settings, "sft")
        trainable = self.model.trainable_parameters("sft")
        self.model.train()
        self.optimizer = torch.optim.AdamW(parameter_groups(trainable, settings.train.weight_decay), lr=1e-5)

    def __call__(self) -> None:
        with torch.no_grad(), _autocast(self.settings):
            for pictures in self.batch:
                self._encode(pictures)
        for micro in self.micros:
            with _autocast(self.settings):
                noisy = [interpolate(*one) for one in zip(micro.latents, micro.noise, micro.sigmas, strict=True)]
                given = (micro.references, micro.reference_latents) if micro.task == "edit" else ()
                velocity = self.model(micro.prompts, noisy, timesteps(micro.sigmas), *given)
                loss = flow_matching_loss(velocity, micro.latents, micro.noise).loss * micro.share
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _encode(self, batch: MicroBatch) -> None:
        for picture in (*batch.targets, *itertools.chain(*batch.references)):
            self.model.encode_images([picture.image()], None)
        for picture in itertools.chain(*batch.references):
            self.model.see_image(picture.image())


def _autocast(settings: Settings) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=settings.model.precision == "bf16")


def _describe(micros: Sequence[FlowMatchingMicro]) -> str:
    edits = sum(len(micro.latents) for micro in micros if micro.task == "edit")
    height, width = micros[0].latents[0].shape[-2:]
    return f"{sum(len(m.latents) for m in micros)} samples, {edits} of them edits, {height}x{width} latents"


def _with_rates(result: Result) -> Result:
    """The result with the samples per second of both sides in its text."""
    ours, floor = (result.samples / statistics.median(times) for times in (result.ours, result.floor))
    share = 1 / statistics.median(result.ratios)
    return replace(
        result,
        shapes=f"{result.shapes}: {ours:.1f} of {floor:.1f} samples/s, {share:.2f} (goal {GOAL})",
    )
