"""A world small enough for RL tests: a narrow random model, a few prompts and records."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from deepgen.config import Settings, load_settings
from deepgen.data.parquet import write_records
from deepgen.data.records import Record
from tests.helpers.factories import make_tiny_folder

SIZE = 64
PROMPTS = 6


def picture(seed: int) -> bytes:
    """A PNG of random colours."""
    pixels = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_records(count: int, prefix: str, *, images: bool = False) -> list[Record]:
    """`count` records; every third is an edit."""
    records = []
    for i in range(count):
        task = "edit" if i % 3 == 2 else "t2i"
        references = (picture(100 + i),) if task == "edit" else ()
        words = f"a {'red' if i % 2 else 'green'} thing number {i}"
        records.append(Record(f"{prefix}-{i}", task, words, words, picture(i) if images else None, references, "test"))
    return records


def make_world(folder: Path) -> Path:
    """Write model/, train.parquet, prompts.parquet and heldout.parquet to `folder`."""
    make_tiny_folder(folder / "model")
    write_records(folder / "train.parquet", make_records(9, "train", images=True))
    write_records(folder / "prompts.parquet", make_records(PROMPTS, "rl"))
    write_records(folder / "heldout.parquet", make_records(4, "heldout"))
    return folder


def overrides(world: Path, *more: str) -> list[str]:
    """Settings of a run in this world, with two groups of four images per step."""
    return [
        f"run.dir={world / 'runs'}",
        "run.seed=3",
        f"model.weights={world / 'model'}",
        "model.preset=tiny",
        "model.precision=fp32",
        "model.gradient_checkpointing=false",
        f"data.train={world / 'train.parquet'}",
        f"data.prompts={world / 'prompts.parquet'}",
        f"data.heldout={world / 'heldout.parquet'}",
        "data.weights={}",
        f"data.image_size={SIZE}",
        "train.steps=4",
        "train.workers=1",
        "train.warmup_steps=0",
        "train.checkpoint_every=2",
        "train.zero_stage=1",
        "rollout.num_steps=4",
        "rollout.sde_steps=2",
        "rollout.eta=0.7",
        "rollout.group_size=4",
        "rollout.prompts_per_step=2",
        "rollout.actors=2",
        "algorithm.update_micro_batch=4",
        "algorithm.sft_batch=3",
        "algorithm.kl_beta=0.001",
        "rewards.weights.t2i={aesthetic: 0.5, clip: 0.5}",
        "rewards.weights.edit={aesthetic: 1.0}",
        "rewards.weights.text={aesthetic: 1.0}",
        "rewards.weights.reasoning={aesthetic: 1.0}",
        "rewards.aesthetic.class=tests.helpers.visible_rewards:Brightness",
        "rewards.clip.class=tests.helpers.visible_rewards:Redness",
        "experience.deadline_s=240",
        "tracking.grid_every=2",
        "evaluation.prompts=4",
        "evaluation.samples_per_prompt=2",
        "evaluation.num_steps=4",
        "evaluation.guidance_scale=1",
        "evaluation.every=0",
        *more,
    ]


def make_settings(world: Path, *more: str) -> Settings:
    return load_settings(None, overrides(world, *more))
