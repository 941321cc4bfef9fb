"""From a planned micro-batch to prompts and images, and the bounded cache of what the frozen VAE makes of them."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass

import torch
from torch import Tensor

from deepgen.data.dataset import Sample, TrainingSet
from deepgen.data.mixture import PlannedMicroBatch
from deepgen.data.quarantine import BadRow
from deepgen.data.records import RecordError
from deepgen.diffusion.rollout import stable_seed


@dataclass(frozen=True)
class MicroBatch:
    """One task-pure micro-batch. ``task`` is "edit" or "t2i"; lists run over its B usable samples, which may be none.

    ``indices``: record numbers in the training set (cache keys); ``seeds``: one per sample, for all its random numbers.
    ``references[i]`` is [] in generation; ``targets[i]`` is None when its latent is cached. Images are float32
    [3, h, w] in [-1, 1], on the CPU. ``bad``: the rows whose places stay empty.
    """

    task: str
    indices: tuple[int, ...]
    prompts: list[str]
    references: list[list[Tensor]]
    targets: list[Tensor | None]
    seeds: tuple[int, ...]
    bad: tuple[BadRow, ...]

    def generators(self, purpose: str) -> list[torch.Generator]:
        """Fresh CPU generators, one a sample; ``purpose`` separates uses that must not share numbers."""
        return [torch.Generator().manual_seed(stable_seed(seed, purpose)) for seed in self.seeds]


def collate(
    data: TrainingSet, planned: PlannedMicroBatch, *, seed: int, step: int, cached: Container[int] = ()
) -> MicroBatch:
    """Read a planned micro-batch; a record that cannot be used is missing from it. ``cached``: no target needed."""
    samples, usable, places, bad = list[Sample](), list[int](), list[int](), list[BadRow]()
    for place, index in enumerate(planned.members, start=planned.first):
        try:
            samples.append(data.sample(index, target=index not in cached))
        except RecordError as error:
            bad.append(BadRow(*data.store.locate(index), error.id, error.reason))
        else:
            usable.append(index)
            places.append(place)
    return MicroBatch(
        task=planned.source,
        indices=tuple(usable),
        prompts=[sample.prompt for sample in samples],
        references=[sample.references for sample in samples],
        targets=[sample.target for sample in samples],
        seeds=tuple(stable_seed(seed, step, planned.number, place) for place in places),
        bad=tuple(bad),
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

    def __contains__(self, index: object) -> bool:
        """Whether the target of record ``index`` is kept, so that its image is not needed again."""
        return (index, 0) in self._latents

    def encode(self, image: Tensor) -> Tensor:
        """Latent [c, h, w] of an image that belongs to no record."""
        return self._encode(image)

    def get(self, index: int, slot: int, image: Tensor | None) -> Tensor:
        """Latent [c, h, w] of a record's target (slot 0) or of its reference number ``slot`` (from 1).

        ``image`` may be None for one that is kept.
        """
        key = (index, slot)
        if key in self._latents:
            return self._latents[key]
        if image is None:
            raise ValueError(f"record {index}: its latent {slot} is not kept, and there is no image")
        latent = self._encode(image)
        size = latent.numel() * latent.element_size()
        if self._bytes + size <= self._max_bytes:
            self._latents[key] = latent
            self._bytes += size
        return latent
