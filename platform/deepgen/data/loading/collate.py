"""From a planned micro-batch to prompts and images."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deepgen.data.loading.dataset import Kept, Picture, Sample, TrainingSet
from deepgen.data.loading.mixture import PlannedMicroBatch
from deepgen.data.quarantine import BadRow
from deepgen.data.records import RecordError
from deepgen.seeds import stable_seed


@dataclass(frozen=True)
class MicroBatch:
    """One task-pure micro-batch. ``task`` is "edit" or "t2i"; lists run over its B usable samples, which may be none.

    ``indices``: record numbers in the training set; ``seeds``: one per sample, for all its random numbers.
    ``references[i]`` is [] in generation. ``bad``: the rows whose places stay empty.
    """

    task: str
    indices: tuple[int, ...]
    prompts: list[str]
    references: list[list[Picture]]
    targets: list[Picture]
    seeds: tuple[int, ...]
    bad: tuple[BadRow, ...]

    def generators(self, purpose: str) -> list[torch.Generator]:
        """Fresh CPU generators, one a sample; ``purpose`` separates uses that must not share numbers."""
        return [torch.Generator().manual_seed(stable_seed(seed, purpose)) for seed in self.seeds]


def collate(
    data: TrainingSet, planned: PlannedMicroBatch, *, seed: int, step: int, kept: Kept | None = None
) -> MicroBatch:
    """Read a planned micro-batch; a record that cannot be used is missing from it. ``kept``: no pixels needed."""
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
