"""deepgen-5b with random weights on one GPU: a rollout and an update against the bare DiT, and the canary of a sync.

Ours and floor are as in `rollout_floor`, `update_floor` and `canary_share`, but under bf16 autocast both, and one after
the other, because they would not fit at once. Left out: prompts and references (the conditioning is random), KL and
auxiliary loss. Takes 120 GB of GPU memory; without a GPU there is no result.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.experience.policy.policy_sampler import PolicySampler
from actors.learner.engine import TrainingEngine
from actors.learner.loop import update
from actors.learner.protocols import StepContext
from actors.learner.worker import prepare_process
from actors.messages import Group
from actors.objectives.experience_source import RLBatch
from actors.objectives.mr_grpo import MRGRPO
from benchmarks import canary_share
from benchmarks.rollout_floor import BareRollout
from benchmarks.timing import Result, Shape, bare_inputs, recipe, seconds
from benchmarks.update_floor import BareUpdate
from deepgen.config import Settings
from deepgen.data.records import Record
from deepgen.drawing.painter import Encoded, Painter
from deepgen.drawing.request import DrawRequest
from deepgen.models.presets import PRESETS
from deepgen.models.unified import Conditioning, UnifiedModel

GROUP, STEPS, TRAINED, CONTEXT = 8, 10, 2, 192  # samples, sampler steps, those of them that are trained, tokens


def run(weights: Path, repeats: int, threads: int) -> list[Result]:
    """Results for one GPU; none where there is none. Needs a process group."""
    if not torch.cuda.is_available():
        print("full-size: left out, no GPU", flush=True)
        return []
    return measure("deepgen-5b", 512, torch.device("cuda"), weights, repeats)


def measure(preset: str, image_size: int, device: torch.device, weights: Path, repeats: int) -> list[Result]:
    """Results for a preset on a device, in the order in which memory grows."""
    settings = recipe(
        "tiny-rl",
        weights,
        f"model.preset={preset}",
        f"data.image_size={image_size}",
        f"rollout.num_steps={STEPS}",
        f"rollout.group_size={GROUP}",
        f"rollout.sde_steps={TRAINED}",
        "algorithm.sft_coef=0",
        f"algorithm.update_micro_batch={GROUP}",
    )
    prepare_process(settings)
    torch.manual_seed(0)
    architecture = PRESETS[preset]
    model = UnifiedModel.from_architecture(architecture, device).eval()
    side = image_size // architecture.vae_downsample
    shape, bare = Shape(GROUP, side, side, CONTEXT), (architecture, device)
    sampler = _Sampler(settings, model, device, _conditioning(shape, *bare))
    group = Group(number=0, step=0, epoch=0, record=Record("full-size", "t2i", "a cat", "a cat", None, (), ""))

    drawn = _times(lambda: sampler.sample_group(group), repeats, device)
    drawn_bare = _times(_bare_rollout(model, shape, *bare), repeats, device)
    sync = canary_share.measure("canary of a sync, full size", model, model, settings.rollout, repeats)
    ours = _times(_update(settings, model, sampler, group, device), repeats, device)
    model.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()
    floor = _times(BareUpdate([shape] * TRAINED, *bare, bf16=True), repeats, device)

    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    shapes = f"{where}, {GROUP} x {{}}, {side}x{side} latents, {CONTEXT} context"
    return [
        Result("rollout, full size", shapes.format(f"{STEPS} steps"), GROUP, drawn, drawn_bare),
        Result("update, full size", shapes.format(f"{TRAINED} transitions"), GROUP * TRAINED, ours, floor),
        sync,
    ]


def _update(
    settings: Settings, model: UnifiedModel, sampler: PolicySampler, group: Group, device: torch.device
) -> Callable[[], object]:
    """The learner's update on a group with random advantages."""
    _, arrays = sampler.sample_group(group)
    advantages = np.random.default_rng(0).standard_normal(GROUP).astype(np.float32)
    batch = RLBatch((replace(group, version=0, trajectory=arrays, advantages=advantages),), ())
    engine = TrainingEngine(settings, model, model.trainable_parameters("rl"), device)
    step = StepContext(settings.run.seed, 1, 0, 1, device)  # step 1: repetitions change the policy
    return lambda: update(engine, MRGRPO(settings, None, None), batch, step, settings)


class _Sampler(PolicySampler):
    """A sampler of a model at hand, for one conditioning: the random VLM has no tokenizer."""

    def __init__(self, settings: Settings, model: UnifiedModel, device: torch.device, given: Conditioning) -> None:
        self._settings, self.model, self._device = settings, model, device
        self._painter = _Painter(model, bf16=True)
        self._painter.given = given


class _Painter(Painter):
    given: Conditioning

    def encode(self, record: Record, request: DrawRequest) -> Encoded:
        return Encoded(self.given, None, [], self.latent_shape(request))


def _conditioning(shape: Shape, *bare: Any) -> Conditioning:
    inputs = bare_inputs(replace(shape, batch=1), *bare)
    return Conditioning(inputs["encoder_hidden_states"], inputs["pooled_projections"], None)


def _bare_rollout(model: UnifiedModel, shape: Shape, *bare: Any) -> Callable[[], object]:
    """Forwards of the bare DiT, and the decoding of as many latents."""
    forwards, latents = BareRollout(shape, STEPS, *bare, bf16=True), bare_inputs(shape, *bare)["hidden_states"]

    @torch.no_grad()
    def rollout() -> None:
        forwards()
        model.decode_latents(latents)

    return rollout


def _times(function: Callable[[], object], repeats: int, device: torch.device) -> tuple[float, ...]:
    """Seconds of each call after a first one."""

    def whole() -> None:
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()

    whole()
    return tuple(seconds(whole) for _ in range(repeats))
