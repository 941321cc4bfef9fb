"""Code that the base trainings share: the world's pictures as arrays, a schedule, a progress bar."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from deepgen.data.images import decode_image
from deepgen.data.parquet import read_records
from deepgen.data.records import Record

DATA = Path("assets/tiny/data")
MODEL = Path("assets/tiny/model")
REWARDS = Path("assets/tiny/rewards")
LESSONS = Path("runs/base/lessons.parquet")
BACKBONE = Path("runs/base/vlm")  # the VLM before the bridge training; judge and tower start from it
PROMPT_ENCODER = Path("runs/base/prompt_encoder.pt")
TOWER = Path("runs/base/tower.safetensors")
FADED = {"t2i": "faded copies", "edit": "faded edits"}  # names of the data sets that `fade` adds to train


@dataclass
class Pictures:
    """Unique pictures of a split: images [N, 64, 64, 3] uint8, their answers, and whether each shows a word."""

    images: np.ndarray
    answers: list[str]
    is_text: np.ndarray

    def weights(self, text_share: float) -> np.ndarray:
        """Sampling probabilities under which words get `text_share` of the draws."""
        w = np.where(
            self.is_text, text_share / max(self.is_text.sum(), 1), (1 - text_share) / max((~self.is_text).sum(), 1)
        )
        return w / w.sum()


def unique_pictures(records: list[Record]) -> Pictures:
    """One entry per distinct target picture, as edits and prompts in several wordings share targets."""
    by_answer = {r.answer: r for r in records if r.image is not None}
    rows = [by_answer[a] for a in sorted(by_answer)]
    images = np.stack([decode_image(r.image) for r in rows if r.image is not None])
    return Pictures(images, [r.answer for r in rows], np.array([r.task == "text" for r in rows]))


def load_split(name: str, data: Path = DATA) -> list[Record]:
    """The clean records of a split, without the copies that `fade` adds."""
    return [r for r in read_records(data / f"{name}.parquet") if r.source not in FADED.values()]


def to_float(images: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def cosine_lr(step: int, total: int, peak: float, warmup: int = 100) -> float:
    """Learning rate of a step: linear warm-up, then a cosine down to 2 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1))))


def training_steps(
    total: int, name: str, optimizer: torch.optim.Optimizer, peak: float, start: int = 0
) -> Iterator[tuple[int, tqdm]]:
    """Yield (step, progress bar), after setting the learning rate of the step."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    bar = tqdm(range(start, total), desc=name, mininterval=5, initial=start, total=total)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, total, peak) * group.get("lr_scale", 1.0)
        yield step, bar


@torch.no_grad()
def update_ema(ema: dict[str, torch.Tensor], model: torch.nn.Module, decay: float, step: int) -> None:
    """Update the moving average of the floating-point parameters. Its decay warms up as (1 + n) / (10 + n)."""
    d = min(decay, (1 + step) / (10 + step))
    for name, p in model.named_parameters():
        ema[name].lerp_(p.detach(), 1 - d)
