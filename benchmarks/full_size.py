"""deepgen-5b with random weights on one GPU: a rollout and an update against the bare DiT, and the canary of a sync.

Ours and floor are as in `rollout_floor`, `update_floor` and `canary_share`, one after the other, because both at once
would not fit. Left out: prompts and references (the conditioning is random), KL and auxiliary loss, Ray. Takes 120 GB
of GPU memory; without a GPU there is no result.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor

from actors.experience.policy.canary import take_canary
from actors.experience.policy.policy_sampler import PolicySampler
from actors.experience.policy.weight_sync import load_weights, policy_checksum
from actors.learner.checkpoints.host_copy import fp32_copies
from actors.learner.engine import TrainingEngine
from actors.learner.loop import update
from actors.learner.protocols import StepContext
from actors.messages import Arrays, Group, PolicyWeights
from actors.objectives.experience_source import RLBatch
from actors.objectives.mr_grpo import MRGRPO
from benchmarks.timing import Result, recipe, seconds
from deepgen.config import Settings
from deepgen.data.records import Record
from deepgen.models.presets import DEEPGEN_5B, Architecture
from deepgen.models.unified import Conditioning, UnifiedModel

GROUP, STEPS, TRAINED, IMAGE_SIZE, CONTEXT = 8, 10, 2, 512, 192  # samples, sampler steps, of them trained, px, tokens


def run(weights: Path, repeats: int, threads: int) -> list[Result]:
    """Results for one GPU; none where there is none. Needs a process group."""
    if not torch.cuda.is_available():
        print("full-size: left out, no GPU", flush=True)
        return []
    return FullSize(DEEPGEN_5B, "deepgen-5b", torch.device("cuda"), IMAGE_SIZE, weights, repeats).results()


class FullSize:
    """The benchmark of one architecture on one device."""

    def __init__(
        self,
        architecture: Architecture,
        preset: str,
        device: torch.device,
        image_size: int,
        weights: Path,
        repeats: int,
    ) -> None:
        torch.manual_seed(0)
        self._device, self._repeats, self._config = device, repeats, architecture.transformer
        self._side = image_size // architecture.vae_downsample
        self._settings: Settings = recipe(
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
        self._model = UnifiedModel.from_architecture(architecture, device).eval()
        self._sampler = _Sampler(self._settings, self._model, device, self._conditioning(1))

    def results(self) -> list[Result]:
        """In the order in which memory grows."""
        where = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "CPU"
        shapes = f"{where}, {GROUP} x {{}}, {self._side}x{self._side} latents, {CONTEXT} context"
        rollout = self._times(self._rollout), self._times(self._bare_rollout(), decode=True)
        canary, rest = self._sync()
        learner = self._times(self._update())
        self._model.zero_grad(set_to_none=True)
        _free(self._device)
        bare = self._times(self._bare_update())
        size = f"{sum(p.numel() for p in self._model.transformer.parameters()) / 1e9:.2f} G parameters"
        return [
            Result("rollout, full size", shapes.format(f"{STEPS} steps"), GROUP, *rollout),
            Result("update, full size", shapes.format(f"{TRAINED} transitions"), GROUP * TRAINED, learner, bare),
            Result("canary of a sync, full size", f"{where}, {size}", 1, canary, rest),
        ]

    def _times(self, function: Callable[[], object], *, decode: bool = False) -> tuple[float, ...]:
        def whole() -> None:
            function()
            if decode:
                self._decode()
            _wait(self._device)

        whole()
        return tuple(seconds(whole) for _ in range(self._repeats))

    # -- rollout -------------------------------------------------------------------------------------------------------

    def _rollout(self) -> Arrays:
        record = Record("full-size", "t2i", "a cat", "a cat", None, (), "")
        return self._sampler.sample_group(Group(number=0, step=0, epoch=0, record=record))[1]

    def _bare_rollout(self) -> Callable[[], None]:
        dit, inputs = SD3Transformer2DModel(**self._config).to(self._device).eval(), self._inputs()

        @torch.no_grad()
        def forwards() -> None:
            with torch.autocast(self._device.type, dtype=torch.bfloat16):
                for _ in range(STEPS):
                    dit(**inputs)

        return forwards

    @torch.no_grad()
    def _decode(self) -> None:
        self._model.decode_latents(self._inputs()["hidden_states"])

    # -- update --------------------------------------------------------------------------------------------------------

    def _update(self) -> Callable[[], object]:
        record = Record("full-size", "t2i", "a cat", "a cat", None, (), "")
        asked = Group(number=0, step=0, epoch=0, record=record)
        advantages = np.random.default_rng(0).standard_normal(GROUP).astype(np.float32)
        group = replace(asked, version=0, trajectory=self._rollout(), advantages=advantages)
        objective = MRGRPO(self._settings, None, None)
        engine = TrainingEngine(self._settings, self._model, self._model.trainable_parameters("rl"), self._device)
        step = StepContext(self._settings.run.seed, 1, 0, 1, self._device)  # step 1: repetitions change the policy
        return lambda: update(engine, objective, RLBatch((group,), ()), step, self._settings)

    def _bare_update(self) -> Callable[[], None]:
        dit, inputs = SD3Transformer2DModel(**self._config).to(self._device).train(), self._inputs()
        optimizer = torch.optim.AdamW(dit.parameters(), lr=1e-6)

        def step() -> None:
            for _ in range(TRAINED):
                with torch.autocast(self._device.type, dtype=torch.bfloat16):
                    (velocity,) = dit(**inputs, return_dict=False)
                velocity.float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    # -- sync ----------------------------------------------------------------------------------------------------------

    def _sync(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Times of both canaries, and of the rest: the learner's copy and checksum, an actor's loading and checksum."""
        sent = {name: tensor.requires_grad_(False) for name, tensor in self._model.trainable_parameters("rl")}
        canary = take_canary(self._model, self._settings.rollout)

        def both() -> None:
            for _ in range(2):
                take_canary(self._model, self._settings.rollout)

        def rest() -> None:
            copies = fp32_copies(sent)
            checksum = policy_checksum(1, copies.items())
            published = PolicyWeights(1, checksum, tuple(sent), (), canary)
            load_weights(sent, {name: copy.numpy() for name, copy in copies.items()}, published)
            assert policy_checksum(1, sent.items()) == checksum

        return self._times(both), self._times(rest)

    # -- inputs --------------------------------------------------------------------------------------------------------

    def _conditioning(self, batch: int) -> Conditioning:
        context = torch.randn(batch, CONTEXT, self._config["joint_attention_dim"], device=self._device)
        pooled = torch.randn(batch, self._config["pooled_projection_dim"], device=self._device)
        return Conditioning(context, pooled, None)

    def _inputs(self) -> dict[str, Tensor]:
        conditioning, channels = self._conditioning(GROUP), self._config["in_channels"]
        return {
            "hidden_states": torch.randn(GROUP, channels, self._side, self._side, device=self._device),
            "timestep": torch.full((GROUP,), 500.0, device=self._device),
            "encoder_hidden_states": conditioning.context,
            "pooled_projections": conditioning.pooled,
        }


class _Sampler(PolicySampler):
    """A sampler of a model at hand, for one conditioning: the random VLM has no tokenizer."""

    def __init__(self, settings: Settings, model: UnifiedModel, device: torch.device, given: Conditioning) -> None:
        self._settings, self.model, self._device, self._given = settings, model, device, given

    def _encode(self, record: Record, guidance_scale: float, negative: str = "") -> tuple[Any, ...]:
        return self._given, None, [], self._latent_shape([])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
