"""The one way from prompts to pictures: encode, start noise, sampler, decode. Rollouts and evaluations take it, too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deepgen.data.images import decode_image
from deepgen.data.loading.dataset import image_to_tensor
from deepgen.data.records import Record
from deepgen.diffusion.schedule import rollout_sigmas
from deepgen.diffusion.trajectory import Trajectory, VelocityFn, sample, start_group
from deepgen.drawing.pixels import to_pixels
from deepgen.drawing.request import DrawRequest
from deepgen.models.unified import Conditioning, UnifiedModel

BATCH = 16  # pictures in one forward


class Encoded(NamedTuple):
    """A prompt as the DiT reads it. The conditionings have batch size 1; the second is None without guidance."""

    conditioning: Conditioning
    unconditional: Conditioning | None
    references: list[Tensor]  # latents [c, h, w] of the source images
    shape: tuple[int, ...]  # latents [c, h, w] of the target


@dataclass(frozen=True)
class Samples:
    """All samples of one prompt, as training uses them. `conditioning` and `unconditional` have batch size 1."""

    trajectory: Trajectory
    conditioning: Conditioning
    unconditional: Conditioning | None
    references: list[Tensor]


class Painter:
    """Draws with a model on the model's device, without gradients. bf16: under autocast.

    batch: pictures in one forward of `draw`.
    """

    def __init__(self, model: UnifiedModel, *, bf16: bool, batch: int = BATCH) -> None:
        self.model, self._bf16, self._batch = model, bf16, batch
        self._device = next(model.parameters()).device

    def draw(self, request: DrawRequest) -> list[np.ndarray]:
        """The pictures of each prompt, in order: uint8 [samples, H, W, 3] per prompt."""
        pictures: list[list[np.ndarray]] = [[] for _ in request.records]
        for batch in self._batches(request):
            encoded = {i: self.encode(request.records[i], request) for i in dict.fromkeys(i for i, _ in batch)}
            latents = self._sample(request, batch, encoded).final
            for (i, _), picture in zip(batch, self._decoded(latents), strict=True):
                pictures[i].append(picture)
        return [np.stack(own) for own in pictures]

    def draw_group(self, request: DrawRequest) -> tuple[np.ndarray, Samples]:
        """All samples of the request's only prompt in one batch: uint8 [G, H, W, 3], and what training needs."""
        if len(request.records) != 1:
            raise ValueError(f"a group has one prompt, not {len(request.records)}")
        encoded = self.encode(request.records[0], request)
        trajectory = self._sample(request, [(0, j) for j in request.samples], {0: encoded})
        samples = Samples(trajectory, encoded.conditioning, encoded.unconditional, encoded.references)
        return np.stack(self._decoded(trajectory.final)), samples

    # -- the parts --------------------------------------------------------------------------------------------------

    def _batches(self, request: DrawRequest) -> Iterator[list[tuple[int, int]]]:
        """Batches of pairs (prompt, sample) that share a forward.

        Different prompts share a forward only for generation with masked padding. Edits differ in size, and without a
        mask the padding of one prompt would change the pictures of another.
        """
        together: list[tuple[int, int]] = []
        for i, record in enumerate(request.records):
            own = [(i, j) for j in request.samples]
            if record.references or self.model.padding != "masked":
                yield from self._chunks(own)
            else:
                together += own
        yield from self._chunks(together)

    def _chunks(self, pairs: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
        for start in range(0, len(pairs), self._batch):
            yield pairs[start : start + self._batch]

    @torch.no_grad()
    def encode(self, record: Record, request: DrawRequest) -> Encoded:
        """A prompt with its sources."""
        images = [image_to_tensor(decode_image(data), request.image_size) for data in record.references]
        images = [image.to(self._device) for image in images]
        unconditional: Conditioning | None = None
        with self._autocast():
            if request.guidance_scale == 1:
                conditioning = self.model.encode_prompts([record.prompt], [images])
            else:
                conditioning, unconditional = self.model.encode_guided(record.prompt, request.negative_prompt, images)
        if unconditional is not None:
            unconditional = _in_fp32(unconditional)
        references = [latent.float() for latent in self.model.encode_images(images, None)] if images else []
        return Encoded(_in_fp32(conditioning), unconditional, references, self.latent_shape(request, images))

    def latent_shape(self, request: DrawRequest, images: Sequence[Tensor] = ()) -> tuple[int, ...]:
        """Latents [c, h, w] of the target. images: the sources."""
        square = (request.image_size, request.image_size)
        height, width = request.size or (tuple(images[0].shape[-2:]) if images else square)
        config = self.model.vae.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        return config.latent_channels, height // factor, width // factor

    @torch.no_grad()
    def _sample(
        self, request: DrawRequest, batch: Sequence[tuple[int, int]], encoded: dict[int, Encoded]
    ) -> Trajectory:
        """Latents of a batch of pairs (prompt, sample)."""
        first = encoded[batch[0][0]]
        # One prompt alone is expanded: rollouts do this, and the learner has to repeat their bits.
        rows = [encoded[i] for i, _ in batch] if len(encoded) > 1 else [first]
        guides = [row.unconditional for row in rows if row.unconditional is not None]
        starts = [
            start_group(
                first.shape,
                run_seed=request.seed,
                prompt_id=request.records[i].id,
                epoch=request.epoch,
                indices=[j],
                same_noise=request.same_noise,
            )
            for i, j in batch
        ]
        return sample(
            self._velocity(Conditioning.cat([row.conditioning for row in rows]), first.references),
            torch.cat([noise for noise, _ in starts]).to(self._device),
            rollout_sigmas(request.num_steps, request.shift),
            sampler=request.sampler,
            eta=request.eta,
            sde_steps=request.kept_steps,
            generators=[generator for _, generators in starts for generator in generators],
            window=request.sde_window,
            same_noise=request.same_noise and len(encoded) == 1,
            guidance_scale=request.guidance_scale,
            velocity_uncond_fn=self._velocity(Conditioning.cat(guides), first.references) if guides else None,
        )

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

    @torch.no_grad()
    def _decoded(self, latents: Tensor) -> list[np.ndarray]:
        return [to_pixels(picture) for picture in self.model.decode_latents(latents)]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._bf16)


def _in_fp32(conditioning: Conditioning) -> Conditioning:
    """Convert to fp32, so that rollout and learner use the same numbers whatever dtype autocast produced."""
    return replace(conditioning, context=conditioning.context.float(), pooled=conditioning.pooled.float())
