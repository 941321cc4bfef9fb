"""Samples groups and evaluation images with the model, and packs a group for its way to the learner.

A packed group includes the conditioning it was sampled with. The learner therefore encodes no prompt a second time, and
scores the transitions with exactly the numbers they were drawn with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.experience.policy.no_picture import no_picture
from actors.messages import Arrays, EvaluationRequest, Group
from deepgen.config import Settings
from deepgen.data.images import decode_image
from deepgen.data.loading.dataset import image_to_tensor
from deepgen.data.records import Record
from deepgen.diffusion.schedule import rollout_sigmas
from deepgen.diffusion.trajectory import Trajectory, VelocityFn, choose_sde_steps, sample, start_group, step_seed
from deepgen.models.unified import Conditioning, UnifiedModel

_EVALUATION_BATCH = 16  # images per forward in an evaluation


@dataclass(frozen=True)
class Samples:
    """A group as the learner uses it. `conditioning` and `unconditional` (None without guidance) have batch size 1."""

    trajectory: Trajectory
    conditioning: Conditioning
    unconditional: Conditioning | None
    references: list[Tensor]  # latents [c, h, w] of an edit's source images


class PolicySampler:
    """Samples with the policy on this process's device, without gradients."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings.rollout.threads)
        self._settings = settings
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.load(settings.model.weights)

    def load(self, folder: Path) -> None:
        """Read the model from a component folder."""
        model = UnifiedModel.from_folder(folder, padding=self._settings.model.padding)
        self._trained = [name for name, _ in model.trainable_parameters("rl")]
        self.model = model.to(self._device).eval().requires_grad_(False)

    def trained_parameters(self) -> dict[str, Tensor]:
        """The parameters that rl trains, by name, as far as the model has them now."""
        found = dict(self.model.named_parameters())
        return {name: found[name] for name in self._trained if name in found}

    # -- sampling ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample_group(self, group: Group) -> tuple[np.ndarray, Arrays]:
        """Sample one group. Returns images uint8 [G, H, W, 3] and the packed group (see `unpack_samples`)."""
        settings, rollout, record = self._settings, self._settings.rollout, group.record
        conditioning, unconditional, references, shape = self._encode(record, rollout.guidance_scale)
        noise, generators = start_group(
            shape,
            run_seed=settings.run.seed,
            prompt_id=record.id,
            epoch=group.epoch,
            indices=range(rollout.group_size),
            same_noise=rollout.same_noise,
        )
        trajectory = sample(
            self._velocity(conditioning, references),
            noise.to(self._device),
            rollout_sigmas(rollout.num_steps, rollout.shift),
            sampler=rollout.sampler,
            eta=rollout.eta,
            sde_steps=trained_steps(settings, group.step) if rollout.sampler != "ode" else [],
            generators=generators,
            window=rollout.sde_window,
            same_noise=rollout.same_noise,
            guidance_scale=rollout.guidance_scale,
            velocity_uncond_fn=None if unconditional is None else self._velocity(unconditional, references),
        )
        images = np.stack([to_pixels(image) for image in self.model.decode_latents(trajectory.final)])
        return images, pack_samples(Samples(trajectory, conditioning, unconditional, references))

    def _encode(
        self, record: Record, guidance_scale: float, negative: str = ""
    ) -> tuple[Conditioning, Conditioning | None, list[Tensor], tuple[int, ...]]:
        """Conditioning, unconditional conditioning (None without guidance), reference latents, target latent shape.

        negative: text of the unconditional branch.
        """
        size = self._settings.data.image_size
        images = [image_to_tensor(decode_image(data), size).to(self._device) for data in record.references]
        unconditional: Conditioning | None = None
        with self._autocast():
            if guidance_scale == 1:
                conditioning = self.model.encode_prompts([record.prompt], [images])
            else:
                conditioning, unconditional = self.model.encode_guided(record.prompt, negative, images)
        if unconditional is not None:
            unconditional = _in_fp32(unconditional)
        references = [latent.float() for latent in self.model.encode_images(images, None)] if images else []
        return _in_fp32(conditioning), unconditional, references, self._latent_shape(images)

    def _latent_shape(self, images: Sequence[Tensor]) -> tuple[int, ...]:
        """Latent shape [c, h, w] of the target: the size of the first source image, or a square without one."""
        height, width = images[0].shape[-2:] if images else (self._settings.data.image_size,) * 2
        config = self.model.vae.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        return config.latent_channels, height // factor, width // factor

    def _velocity(self, conditioning: Conditioning, references: list[Tensor]) -> VelocityFn:
        """Velocity function of latents [B, c, h, w]. B is the conditioning's batch size, or any number if that is 1."""

        def velocity(latents: Tensor, timesteps: Tensor) -> Tensor:
            batch = len(latents)
            per_sample = [references] * batch if references else None
            with self._autocast():
                v = self.model.velocity(latents, timesteps, conditioning.expand(batch), per_sample)
            assert isinstance(v, Tensor)  # one tensor in, one tensor out
            return v.float()

        return velocity

    def _autocast(self) -> torch.autocast:
        bf16 = self._settings.model.precision == "bf16"
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=bf16)

    # -- evaluation -------------------------------------------------------------------------------------------------

    def evaluate(self, request: EvaluationRequest) -> list[np.ndarray]:
        """The images of each prompt, in order: uint8 [samples, H, W, 3] per prompt."""
        images: list[list[np.ndarray]] = [[] for _ in request.records]
        for batch in self._evaluation_batches(request):
            for (i, _), image in zip(batch, self._draw(request, batch), strict=True):
                images[i].append(image)
        return [np.stack(own) for own in images]

    def _evaluation_batches(self, request: EvaluationRequest) -> Iterator[list[tuple[int, int]]]:
        """Batches of (prompt, sample) index pairs that share a forward.

        Different prompts share a forward only for generation with masked padding. Edits differ in size, and without a
        mask the padding of one prompt would change the images of another.
        """
        together: list[tuple[int, int]] = []
        for i, record in enumerate(request.records):
            own = [(i, j) for j in range(request.samples)]
            if record.references or self._settings.model.padding != "masked":
                yield from _chunks(own)
            else:
                together += own
        yield from _chunks(together)

    @torch.no_grad()
    def _draw(self, request: EvaluationRequest, batch: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        rollout = self._settings.rollout
        encoded = {
            i: self._encode(request.records[i], request.guidance_scale, request.negative_prompt)
            for i in dict.fromkeys(i for i, _ in batch)
        }
        first = encoded[batch[0][0]]
        noise = [
            start_group(first[3], run_seed=request.seed, prompt_id=request.records[i].id, epoch=0, indices=[j])
            for i, j in batch
        ]
        conditioning = Conditioning.cat([encoded[i][0] for i, _ in batch])
        unconditional = [encoded[i][1] for i, _ in batch]
        guide = [item for item in unconditional if item is not None]
        trajectory = sample(
            self._velocity(conditioning, first[2]),
            torch.cat([start for start, _ in noise]).to(self._device),
            rollout_sigmas(request.num_steps, rollout.shift),
            sampler="ode",
            eta=0.0,
            sde_steps=[],
            generators=[generator for _, generators in noise for generator in generators],
            guidance_scale=request.guidance_scale,
            velocity_uncond_fn=self._velocity(Conditioning.cat(guide), first[2]) if guide else None,
        )
        return [to_pixels(image) for image in self.model.decode_latents(trajectory.final)]


def trained_steps(settings: Settings, step: int) -> list[int]:
    """Indices of the sampler steps that training step `step` keeps and trains. All its groups share them (M3.4)."""
    rollout = settings.rollout
    return choose_sde_steps(
        rollout.num_steps, rollout.sde_steps, rollout.sde_window, step_seed(settings.run.seed, step)
    )


def to_pixels(image: Tensor) -> np.ndarray:
    """Convert [3, H, W] in [-1, 1] to uint8 [H, W, 3], rounding as the published scripts do (M1.7).

    `no_picture` if a number is not finite.
    """
    if not image.isfinite().all():
        return no_picture(*image.shape[1:])
    return (image.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def pack_samples(samples: Samples) -> Arrays:
    """Pack a group into named arrays, which pass through the object store without copies."""
    tensors = {f"trajectory/{name}": tensor for name, tensor in vars(samples.trajectory).items()}
    for branch in ("conditioning", "unconditional"):
        conditioning = getattr(samples, branch)
        if conditioning is not None:
            named = {field.name: getattr(conditioning, field.name) for field in fields(conditioning)}
            tensors |= {f"{branch}/{name}": tensor for name, tensor in named.items() if tensor is not None}
    tensors |= {f"reference/{i}": latent for i, latent in enumerate(samples.references)}
    return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}


def unpack_samples(arrays: Mapping[str, np.ndarray], device: torch.device) -> Samples:
    """The group that `pack_samples` packed, copied to `device`."""

    def part(prefix: str) -> dict[str, Any]:
        names = [name for name in arrays if name.startswith(f"{prefix}/")]
        return {name.partition("/")[2]: torch.tensor(arrays[name], device=device) for name in names}

    def conditioning(prefix: str) -> Conditioning:
        return Conditioning(**{"mask": None, **part(prefix)})

    return Samples(
        trajectory=Trajectory(**part("trajectory")),
        conditioning=conditioning("conditioning"),
        unconditional=conditioning("unconditional") if part("unconditional") else None,
        references=list(part("reference").values()),
    )


def _in_fp32(conditioning: Conditioning) -> Conditioning:
    """Convert to fp32, so that rollout and learner use the same numbers whatever dtype autocast produced."""
    return replace(conditioning, context=conditioning.context.float(), pooled=conditioning.pooled.float())


def _chunks(pairs: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    for start in range(0, len(pairs), _EVALUATION_BATCH):
        yield pairs[start : start + _EVALUATION_BATCH]
