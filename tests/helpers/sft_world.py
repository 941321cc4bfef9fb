"""A world small enough for supervised runs: a narrow random model, a few records, and readers of a run's results."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from deepgen.data.parquet import write_records
from deepgen.data.records import Record
from tests.helpers.factories import make_tiny_folder

DATABASE = "mlflow.db"


def make_records(count: int = 12) -> list[Record]:
    rng = np.random.default_rng(0)

    def picture() -> bytes:
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(stream, "PNG")
        return stream.getvalue()

    tasks = ("t2i", "edit", "text", "reasoning")
    return [
        Record(str(i), task, f"prompt {i}", "", picture(), (picture(),) if task == "edit" else (), "test")
        for i, task in ((i, tasks[i % 4]) for i in range(count))
    ]


def make_sft_world(folder: Path, empty_database: Path) -> Path:
    """Write weights/, train.parquet and mlflow.db (for the runs) to `folder`."""
    shutil.copy(empty_database, folder / DATABASE)
    make_tiny_folder(folder / "weights")
    write_records(folder / "train.parquet", make_records())
    return folder


def stage_overrides(world: Path, folder: Path, name: str, *more: str) -> list[str]:
    """Settings of the run `folder`/`name` in this world."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / DATABASE).exists():
        shutil.copy(world / DATABASE, folder)
    return [
        f"run.dir={folder}", f"run.name={name}", "model.preset=tiny", f"model.weights={world / 'weights'}",
        "model.precision=fp32", "model.gradient_checkpointing=false", "model.lora_rank=2", "model.lora_alpha=4",
        f"data.train={world / 'train.parquet'}", f"data.heldout={world / 'train.parquet'}", "data.image_size=64",
        "data.micro_batch=2", "evaluation.prompts=0", "train.steps=4", "train.warmup_steps=0",
        "train.learning_rate=0.001", "train.checkpoint_every=1", "train.keep_checkpoints=2", "train.workers=1",
        "train.zero_stage=2", *more,
    ]  # fmt: skip


def component(folder: Path, name: str, part: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted((folder / name / "model" / part).glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def load_first(folder: Path) -> dict[str, Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return any(not torch.equal(before[name], after[name]) for name in before)
