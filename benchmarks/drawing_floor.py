"""The cost of drawing on top of DiT and VAE: prompts to pictures, against bare forwards and diffusers' SD3 pipeline.

Ours: encode the prompts and their negative, sample by the ODE with guidance, decode, round to pixels. Floors: twice
`STEPS` forwards of diffusers' SD3 transformer and one decoding by its VAE; and its StableDiffusion3Pipeline, which is
given the encoded prompts. Left out: Ray, PNG files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from benchmarks.rollout_floor import BareRollout
from benchmarks.timing import Result, Shape, bare_dit, bare_inputs, compare
from deepgen.data.records import Record
from deepgen.drawing.painter import Painter
from deepgen.drawing.request import DrawRequest
from deepgen.models.presets import TINY, Architecture
from deepgen.models.unified import UnifiedModel
from deepgen.models.weights_io.folder import SHIFT

STEPS, GUIDANCE, SAMPLES = 20, 4.0, 8
PROMPTS = ("a red ring on a white background", "two small blue boats on a lake in the rain, seen from above")


def run(weights: Path, repeats: int, threads: int) -> list[Result]:
    """Results for one prompt with eight samples, for two prompts with four of each, and for the SD3 pipeline."""
    side = TINY.transformer["sample_size"] * TINY.vae_downsample
    painter = Painter(UnifiedModel.from_folder(weights).eval().requires_grad_(False), bf16=False)
    records = tuple(Record(f"r{i}", "t2i", prompt, "", None, (), "") for i, prompt in enumerate(PROMPTS))
    one = DrawRequest(records[:1], tuple(range(SAMPLES)), 0, side, STEPS, SHIFT, guidance_scale=GUIDANCE)
    two = replace(one, records=records, samples=tuple(range(SAMPLES // 2)))
    short, long, nothing = (painter.model.encode_prompts([text], [[]]).context.shape[1] for text in (*PROMPTS, ""))
    shapes = f"{SAMPLES} x {STEPS} steps, {side} px, guidance"
    cases: list[tuple[str, DrawRequest, Callable[[], object]]] = [
        ("drawing, one prompt", one, BareDrawing(side, (short, nothing))),
        ("drawing, two prompts", two, BareDrawing(side, (long, nothing))),
        ("drawing, against diffusers' SD3", one, StockPipeline(side, max(short, nothing))),
    ]
    return [compare(name, shapes, SAMPLES, partial(painter.draw, own), floor, repeats) for name, own, floor in cases]


class BareDrawing:
    """Forwards of a bare DiT and one decoding by the VAE. contexts: tokens that the two branches of guidance read."""

    def __init__(self, side: int, contexts: Sequence[int], architecture: Architecture = TINY) -> None:
        cells = side // architecture.vae_downsample
        self._branches = [BareRollout(Shape(SAMPLES, cells, cells, n), STEPS, architecture) for n in contexts]
        self._vae = AutoencoderKL(**architecture.vae).eval()
        self._latents = torch.randn(SAMPLES, architecture.vae["latent_channels"], cells, cells)

    @torch.no_grad()
    def __call__(self) -> None:
        for forwards in self._branches:
            forwards()
        self._vae.decode(self._latents)


class StockPipeline:
    """diffusers' StableDiffusion3Pipeline with the same transformer, VAE, steps and guidance."""

    def __init__(self, side: int, context: int, architecture: Architecture = TINY) -> None:
        cells = side // architecture.vae_downsample
        texts = dict.fromkeys(f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3"))
        self._pipeline = StableDiffusion3Pipeline(
            transformer=bare_dit(architecture).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
            vae=AutoencoderKL(**architecture.vae).eval(),
            **texts,
        )
        self._pipeline.set_progress_bar_config(disable=True)
        given = bare_inputs(Shape(SAMPLES, cells, cells, context), architecture)
        self._arguments = {
            "prompt_embeds": given["encoder_hidden_states"],
            "negative_prompt_embeds": given["encoder_hidden_states"],
            "pooled_prompt_embeds": given["pooled_projections"],
            "negative_pooled_prompt_embeds": given["pooled_projections"],
            "latents": given["hidden_states"],
            "height": side,
            "width": side,
        }

    def __call__(self) -> np.ndarray:
        found: np.ndarray = self._pipeline(
            **self._arguments, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="np"
        ).images
        return found
