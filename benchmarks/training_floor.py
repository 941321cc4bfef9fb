"""What an epoch of training costs end to end above the bare model, and what keeping the work of frozen parts gains.

Ours: the learner's steps with one worker, from records in parquet files to new weights: plan, decoding, VAE, visual
tower, the objective, DeepSpeed's engine, clipping, writing what is kept. Floor: forward, backward and AdamW of the same
model in plain torch on the same batches, which find latents and features of the visual tower made. Left out: Ray Train,
checkpoints, tracking; row groups stay in memory, files of the cache in the system's.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from actors.engine import TrainingEngine, parameter_groups
from actors.launch import load_model, prepare_process
from actors.learner import StepContext, WorkerContext, update
from actors.objectives import FlowMatching, FlowMatchingMicro, build_flow_matching
from benchmarks.common import ROOT, Result, recipe, seconds
from deepgen.algorithms.losses import flow_matching_loss, interpolate
from deepgen.config.settings import Settings
from deepgen.data.convert import ROW_GROUP
from deepgen.data.frozen import FrozenCache, MemoryStore, Store
from deepgen.data.frozen_store import DiskStore
from deepgen.data.records import read_records, write_records
from deepgen.diffusion.schedule import timesteps
from deepgen.models.unified import UnifiedModel

CPU = torch.device("cpu")
GOAL = 0.92  # of the floor's samples a second


def run(weights: Path, repeats: int, threads: int) -> list[Result]:
    """Epochs of one step: tiny-sft on one batch of tiny-world records. Needs a process group."""
    with tempfile.TemporaryDirectory() as folder:
        own = [f"train.threads={threads}", f"run.dir={folder}", f"data.train={folder}/train.parquet"]
        own.append("evaluation.prompts=0")
        settings = recipe("tiny-sft", weights, *own)
        write_one_batch(settings)
        prepare_process(settings)
        ours = OurTraining(settings)
        others = {n: OurTraining(recipe("tiny-sft", weights, *own, f"train.zero_stage={n}")) for n in (0, 2)}
        disk = DiskFolders(Path(folder), ours.parts)
        memory = MemoryStore()
        ours.epoch(disk.filled())
        micros = ours.prepared(disk.filled())
        zero = f"ZeRO-{settings.train.zero_stage}"
        works: dict[str, Callable[[], None]] = {
            f"{zero}, nothing kept": lambda: ours.epoch(MemoryStore(0)),
            f"{zero}, kept on disk, first epoch": lambda: ours.epoch(disk.empty()),
            f"{zero}, kept on disk, later epochs": lambda: ours.epoch(disk.filled()),
            f"{zero}, kept in memory, later epochs": lambda: ours.epoch(memory),
        }
        for stage, training in others.items():
            works[f"ZeRO-{stage}, kept in memory, later epochs"] = partial(training.epoch, memory)
        samples = sum(len(micro.latents) for micro in micros)
        times = in_turns([*works.values(), BareTraining(settings, micros)], repeats)
        return [
            _with_rates(Result(f"training, sft, {name}", _describe(micros), samples, own_times, times[-1]))
            for name, own_times in zip(works, times[:-1], strict=True)
        ]


def write_one_batch(settings: Settings) -> None:
    """As many records of the tiny world as one step reads, so that a step is an epoch."""
    data = settings.data
    wanted = {True: data.edit_per_cycle * data.micro_batch, False: data.t2i_per_cycle * data.micro_batch}
    found = read_records(ROOT / "assets" / "tiny" / "data" / "train.parquet")
    chosen = [[r for r in found if (r.task == "edit") == is_edit][:count] for is_edit, count in wanted.items()]
    write_records(data.train, [*itertools.chain(*chosen)], row_group_size=ROW_GROUP)


class OurTraining:
    """The learner's loop without its log and its checkpoints; the store is chosen anew for each epoch."""

    def __init__(self, settings: Settings) -> None:
        context = WorkerContext("sft", settings, load_model(settings, "sft"), 0, 1, CPU, None, lambda line: None)
        trainable = context.model.trainable_parameters("sft")
        context.model.train()
        self.settings, self.model, self.step = settings, context.model, 0
        self.source, objective = build_flow_matching(context)
        assert isinstance(objective, FlowMatching)
        self.objective, self.parts = objective, objective.cache.parts
        self.engine = TrainingEngine(settings, context.model, trainable, CPU)

    def epoch(self, store: Store) -> None:
        self.objective.cache = FrozenCache(self.parts, store)
        batch = self.source.next(self.step, 0, 1)
        update(self.engine, self.objective, batch, self._here(), self.settings)
        self.step += 1
        self.source.state_dict(self.step)  # writes what is kept

    def prepared(self, store: Store) -> list[FlowMatchingMicro]:
        """The micro-batches of the next epoch as the model gets them."""
        self.objective.cache = FrozenCache(self.parts, store)
        with torch.no_grad(), _autocast(self.settings):
            return self.objective.prepare(self.model, self.source.next(self.step, 0, 1), self._here())

    def _here(self) -> StepContext:
        return StepContext(self.settings.run.seed, self.step, 0, 1, CPU)


class DiskFolders:
    """Stores on disk as a run that starts finds them, with the files of an earlier one or with none."""

    def __init__(self, folder: Path, parts: Iterable[str]) -> None:
        self.folder, self.parts, self.number = folder, tuple(parts), 0

    def filled(self) -> DiskStore:
        return self._store("filled")

    def empty(self) -> DiskStore:
        self.number += 1
        return self._store(f"cache{self.number}")

    def _store(self, name: str) -> DiskStore:
        return DiskStore(self.folder / name, {part: {} for part in self.parts})


def in_turns(works: Sequence[Callable[[], None]], repeats: int) -> list[tuple[float, ...]]:
    """Seconds of each work's repetitions, one of each after the other, after a warm-up of all."""
    for work in works:
        work()
    rounds = [[seconds(work) for work in works] for _ in range(repeats)]
    return list(zip(*rounds, strict=True))


class BareTraining:
    """Forward and backward of each micro-batch through a model that DeepSpeed does not know, then one AdamW step."""

    def __init__(self, settings: Settings, micros: Sequence[FlowMatchingMicro]) -> None:
        self.settings, self.micros = settings, micros
        self.model: UnifiedModel = load_model(settings, "sft")
        trainable = self.model.trainable_parameters("sft")
        self.model.train()
        self.optimizer = torch.optim.AdamW(parameter_groups(trainable, settings.train.weight_decay), lr=1e-5)

    def __call__(self) -> None:
        for micro in self.micros:
            with _autocast(self.settings):
                noisy = [interpolate(*one) for one in zip(micro.latents, micro.noise, micro.sigmas, strict=True)]
                given = (micro.references, micro.reference_latents) if micro.task == "edit" else ()
                velocity = self.model(micro.prompts, noisy, timesteps(micro.sigmas), *given)
                loss = flow_matching_loss(velocity, micro.latents, micro.noise).loss * micro.share
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def _autocast(settings: Settings) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=settings.model.precision == "bf16")


def _describe(micros: Sequence[FlowMatchingMicro]) -> str:
    edits = sum(len(micro.latents) for micro in micros if micro.task == "edit")
    height, width = micros[0].latents[0].shape[-2:]
    return f"{sum(len(m.latents) for m in micros)} samples, {edits} of them edits, {height}x{width} latents"


def _with_rates(result: Result) -> Result:
    """With samples a second of both in the text."""
    ours, floor = (result.samples / statistics.median(times) for times in (result.ours, result.floor))
    share = 1 / statistics.median(result.ratios)
    return replace(
        result,
        shapes=f"{result.shapes}: {ours:.1f} of {floor:.1f} samples/s, {share:.2f} (goal {GOAL})",
    )
