"""Reads the records of a planned micro-batch: prompts, images and seeds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from deepgen.data.loading.dataset import Kept, Picture, Sample, TrainingSet
from deepgen.data.loading.mixture import PlannedMicroBatch
from deepgen.data.quarantine import BadRow
from deepgen.data.records import RecordError
from deepgen.seeds import stable_seed


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of a single task, "edit" or "t2i". Each list has one entry per usable sample; B may be 0.

    ``indices``: record numbers in the training set. ``seeds``: one per sample, for all its random numbers.
    ``references[i]`` is [] in generation. ``bad``: unusable rows; their places in the batch stay empty.
    """

    task: str
    indices: tuple[int, ...]
    prompts: list[str]
    references: list[list[Picture]]
    targets: list[Picture]
    seeds: tuple[int, ...]
    bad: tuple[BadRow, ...]

    def generators(self, purpose: str) -> list[torch.Generator]:
        """New CPU generators, one per sample. Each independent use of random numbers needs its own ``purpose``."""
        return [torch.Generator().manual_seed(stable_seed(seed, purpose)) for seed in self.seeds]

    def split(self, count: int) -> list[MicroBatch]:
        """``count`` micro-batches of neighbouring samples, as even as can be; ``bad`` stays with the first."""
        edges = [len(self.indices) * part // count for part in range(count + 1)]
        return [
            replace(
                self,
                indices=self.indices[begin:end],
                prompts=self.prompts[begin:end],
                references=self.references[begin:end],
                targets=self.targets[begin:end],
                seeds=self.seeds[begin:end],
                bad=() if part else self.bad,
            )
            for part, (begin, end) in enumerate(pairwise(edges))
        ]


def collate(
    data: TrainingSet, planned: PlannedMicroBatch, *, seed: int, step: int, kept: Kept | None = None
) -> MicroBatch:
    """Read a planned micro-batch, without unusable records. Images whose encodings are in ``kept`` are not decoded."""
    samples, usable, places, bad = list[Sample](), list[int](), list[int](), list[BadRow]()
    for place, index in enumerate(planned.members, start=planned.first):
        try:
            samples.append(data.sample(index, kept))
        except RecordError as error:
            bad.append(BadRow(*data.store.locate(index), error.id, error.reason))
        else:
            usable.append(index)
            places.append(place)
    return MicroBatch(
        task=planned.kind,
        indices=tuple(usable),
        prompts=[sample.prompt for sample in samples],
        references=[sample.references for sample in samples],
        targets=[sample.target for sample in samples],
        seeds=tuple(stable_seed(seed, step, planned.number, place) for place in places),
        bad=tuple(bad),
    )
