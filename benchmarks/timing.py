"""Shared code of the benchmarks: random models with the tiny preset's shapes, paired timing, a markdown table."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor

from deepgen.config.settings import Settings, load_settings
from deepgen.models.presets import TINY, Architecture
from deepgen.models.unified import UnifiedModel
from deepgen.models.weights_io.folder import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
HEADER = (
    "| benchmark | shapes | threads | ours, ms/sample | floor, ms/sample | ratio (quartiles) |\n"
    "|---|---|---:|---:|---:|---:|"
)


@dataclass(frozen=True)
class Shape:
    """Input of one bare DiT call: `batch` samples of `height` x `width` latent cells with `context` text tokens."""

    batch: int
    height: int
    width: int
    context: int


@dataclass(frozen=True)
class Result:
    """Seconds of each repetition of ours and of the floor, measured in turns, for `samples` samples."""

    name: str
    shapes: str
    samples: int
    ours: tuple[float, ...]
    floor: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        return [ours / floor for ours, floor in zip(self.ours, self.floor, strict=True)]

    def row(self) -> str:
        """One line of the markdown table under `HEADER`: medians, and the quartiles of the paired ratios."""
        ours, floor = (1000 * statistics.median(times) / self.samples for times in (self.ours, self.floor))
        low, middle, high = statistics.quantiles(self.ratios, n=4, method="inclusive")
        threads = torch.get_num_threads()
        ratio = f"{middle:.2f} ({low:.2f}-{high:.2f})"
        return f"| {self.name} | {self.shapes} | {threads} | {ours:.2f} | {floor:.2f} | {ratio} |"


def compare(
    name: str, shapes: str, samples: int, ours: Callable[[], object], floor: Callable[[], object], repeats: int
) -> Result:
    """Time both in turns after a warm-up of each, so that other load on the machine affects both equally."""
    ours()
    floor()
    times: list[tuple[float, float]] = [(seconds(ours), seconds(floor)) for _ in range(repeats)]
    return Result(name, shapes, samples, tuple(t[0] for t in times), tuple(t[1] for t in times))


def recipe(name: str, weights: Path, *overrides: str) -> Settings:
    """The shipped recipe with the benchmark's own weights."""
    return load_settings(ROOT / "stages" / "recipes" / f"{name}.yaml", [f"model.weights={weights}", *overrides])


def save_random_model(folder: Path) -> Path:
    """Write a component folder of the tiny preset with random weights; time does not depend on their values."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(ROOT / "assets" / "tiny" / "model" / "tokenizer")
    UnifiedModel.from_architecture(TINY, tokenizer=tokenizer).save_folder(folder)
    return folder


def bare_dit(architecture: Architecture = TINY, device: str | torch.device = "cpu") -> SD3Transformer2DModel:
    """diffusers' own SD3 transformer with an architecture's widths and random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        return SD3Transformer2DModel(**architecture.transformer)


def bare_inputs(
    shape: Shape, architecture: Architecture = TINY, device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """Random arguments for one call of `bare_dit`."""
    config = architecture.transformer
    with torch.device(device):
        return {
            "hidden_states": torch.randn(shape.batch, config["in_channels"], shape.height, shape.width),
            "timestep": torch.full((shape.batch,), 500.0),
            "encoder_hidden_states": torch.randn(shape.batch, shape.context, config["joint_attention_dim"]),
            "pooled_projections": torch.randn(shape.batch, config["pooled_projection_dim"]),
        }


def joined_size(targets: Sequence[Tensor], references: Sequence[Sequence[Tensor]] | None) -> tuple[int, int]:
    """(height, width) of one latent with as many cells as a target and its references together."""
    height, width = targets[0].shape[-2:]
    extra = sum(r.shape[-1] * r.shape[-2] for r in references[0]) if references else 0
    return height + extra // width, width


def start_process_group(folder: Path) -> None:
    """Start a group with this one process, because DeepSpeed needs a group."""
    import torch.distributed as dist

    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder / 'rendezvous'}", rank=0, world_size=1)


def seconds(function: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin
