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
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from actors.engine import TrainingEngine, parameter_groups
from actors.launch import load_model, prepare_process
from actors.learner import StepContext, WorkerContext, update
from actors.objectives import FlowMatching, FlowMatchingMicro, build_flow_matching
from benchmarks.common import ROOT, Result, compare, recipe
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
    """Epochs of one step, tiny-sft with one batch of tiny-world records. Needs a process group."""
    with tempfile.TemporaryDirectory() as folder:
        settings = recipe(
            "tiny-sft", weights, f"train.threads={threads}", f"run.dir={folder}", f"data.train={folder}/train.parquet"
        )
        write_one_batch(settings)
        return _measure(settings, Path(folder), repeats)


def write_one_batch(settings: Settings) -> None:
    """As many records of the tiny world as one step reads, so that a step is an epoch."""
    data = settings.data
    wanted = {True: data.edit_per_cycle * data.micro_batch, False: data.t2i_per_cycle * data.micro_batch}
    found = read_records(ROOT / "assets" / "tiny" / "data" / "train.parquet")
    chosen = [[r for r in found if (r.task == "edit") == is_edit][:count] for is_edit, count in wanted.items()]
    write_records(data.train, [*itertools.chain(*chosen)], row_group_size=ROW_GROUP)


def _measure(settings: Settings, folder: Path, repeats: int) -> list[Result]:
    prepare_process(settings)
    context = WorkerContext("sft", settings, load_model(settings, "sft"), 0, 1, CPU, None, lambda line: None)
    trainable = context.model.trainable_parameters("sft")
    context.model.train()
    source, objective = build_flow_matching(context)
    assert isinstance(objective, FlowMatching)
    parts = objective.cache.parts
    engine = TrainingEngine(settings, context.model, trainable, CPU)
    steps = itertools.count()

    def epoch(store: Store) -> None:
        objective.cache = FrozenCache(parts, store)
        step = next(steps)
        update(engine, objective, source.next(step, 0, 1), StepContext(settings.run.seed, step, 0, 1, CPU), settings)
        source.state_dict(step + 1)  # writes what is kept

    def on_disk(name: str) -> DiskStore:
        return DiskStore(folder / name, {part: {} for part in parts})

    memory = MemoryStore()
    names = (f"cache{number}" for number in itertools.count())
    epoch(on_disk("filled"))
    here = StepContext(settings.run.seed, 0, 0, 1, CPU)
    with torch.no_grad(), _autocast(settings):
        micros = objective.prepare(context.model, source.next(0, 0, 1), here)
    floor = BareTraining(settings, micros)
    ours: dict[str, Callable[[], None]] = {
        "nothing kept": lambda: epoch(MemoryStore(0)),
        "kept on disk, first epoch": lambda: epoch(on_disk(next(names))),
        "kept on disk, later epochs": lambda: epoch(on_disk("filled")),
        "kept in memory, later epochs": lambda: epoch(memory),
    }
    samples = sum(len(micro.latents) for micro in micros)
    return [
        _with_rates(compare(f"training, sft, {name}", _describe(micros), samples, work, floor, repeats))
        for name, work in ours.items()
    ]


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
