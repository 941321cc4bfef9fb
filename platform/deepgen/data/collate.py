"""From a planned micro-batch to prompts and images, and the bounded cache of what the frozen VAE makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deepgen.data.dataset import TrainingSet
from deepgen.data.mixture import PlannedMicroBatch
from deepgen.diffusion.rollout import stable_seed


@dataclass(frozen=True)
class MicroBatch:
    """One task-pure micro-batch. ``task`` is "edit" or "t2i"; lists run over its B samples.

    ``indices``: record numbers in the training set (cache keys); ``seeds``: one per sample, for all its random numbers.
    ``references[i]`` is [] in generation. Images are float32 [3, h, w] in [-1, 1], on the CPU.
    """

    task: str
    indices: tuple[int, ...]
    prompts: list[str]
    references: list[list[Tensor]]
    seeds: tuple[int, ...]

    def generators(self, purpose: str) -> list[torch.Generator]:
        """Fresh CPU generators, one a sample; ``purpose`` separates uses that must not share numbers."""
        return [torch.Generator().manual_seed(stable_seed(seed, purpose)) for seed in self.seeds]


def collate(data: TrainingSet, planned: PlannedMicroBatch, *, seed: int, step: int) -> MicroBatch:
    """Prompts and reference images of a planned micro-batch; targets are fetched through the ``LatentCache``."""
    numbers = data.edit if planned.source == "edit" else data.t2i
    indices = tuple(int(numbers[member]) for member in planned.members)
    places = range(planned.first, planned.first + len(indices))
    return MicroBatch(
        task=planned.source,
        indices=indices,
        prompts=[data.prompt(i) for i in indices],
        references=[data.references(i) for i in indices],
        seeds=tuple(stable_seed(seed, step, planned.number, place) for place in places),
    )


class LatentCache:
    """Keeps the VAE's latents of the first images it sees, up to ``max_bytes``; the VAE is frozen in every stage.

    Images are encoded one at a time and by the mode of the posterior, so that a latent does not depend on its
    neighbours or on whether it was cached: a resumed run, with an empty cache, is the same to the bit. (The reference
    samples the posterior, M1.7; its spread is small against the noise that flow matching adds.) Once full, nothing is
    thrown out: under shuffled epochs every image is equally likely to come next.
    """

    def __init__(self, encode: Callable[[Tensor], Tensor], max_bytes: int) -> None:
        self._encode = encode
        self._max_bytes = max_bytes
        self._bytes = 0
        self._latents: dict[tuple[int, int], Tensor] = {}

    def __len__(self) -> int:
        return len(self._latents)

    def get(self, index: int, slot: int, image: Callable[[], Tensor]) -> Tensor:
        """Latent [c, h, w] of a record's target (slot 0) or of its reference number ``slot`` (from 1)."""
        key = (index, slot)
        if key in self._latents:
            return self._latents[key]
        latent = self._encode(image())
        size = latent.numel() * latent.element_size()
        if self._bytes + size <= self._max_bytes:
            self._latents[key] = latent
            self._bytes += size
        return latent
