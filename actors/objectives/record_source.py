"""Turns training records into batches, for pretrain and sft and for the auxiliary loss of rl."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from actors.learner.protocols import TrainedModel, WorkerContext
from deepgen.data.cache.encoded import EncodingCache
from deepgen.data.loading.collate import MicroBatch, collate
from deepgen.data.loading.dataset import TrainingSet
from deepgen.data.loading.mixture import Mixture
from deepgen.data.loading.parquet_store import ParquetStore
from deepgen.data.quarantine import Quarantine

Turn = tuple[int, int, int]  # step, rank, world


class MixtureSource:
    """Micro-batches of the edit:T2I cycle (M2.4). The step number and the saved positions determine their records.

    While the learner works on a step, ``threads`` threads read the records of the next one (0: records are read on
    demand). ``quarantine`` is part of the state: how many records were read, and how many of them were bad.
    """

    def __init__(
        self, data: TrainingSet, mixture: Mixture, cache: EncodingCache, quarantine: Quarantine, threads: int = 0
    ) -> None:
        self.data, self.mixture = data, mixture
        self._cache, self._quarantine = cache, quarantine
        self._world = 1
        self._readers = ThreadPoolExecutor(threads, thread_name_prefix="records") if threads else None
        self._coming: dict[Turn, list[Future[MicroBatch]]] = {}

    def next(self, step: int, rank: int, world: int) -> list[MicroBatch]:
        self._world = world
        if self._readers is None:
            return [read() for read in self._reads((step, rank, world))]
        begun = self._coming.pop((step, rank, world), None) or self._begin((step, rank, world))
        batch = [micro.result() for micro in begun]
        following = (step + 1, rank, world)
        self._coming = {following: self._begin(following)}
        return batch

    def _reads(self, turn: Turn) -> list[Callable[[], MicroBatch]]:
        step, rank, world = turn
        kept, seed = self._cache, self.mixture.seed
        plan = self.mixture.plan(step, rank, world)
        return [partial(collate, self.data, planned, seed=seed, step=step, kept=kept) for planned in plan]

    def _begin(self, turn: Turn) -> list[Future[MicroBatch]]:
        assert self._readers is not None
        return [self._readers.submit(read) for read in self._reads(turn)]

    def publish(self, policy: TrainedModel, version: int) -> None:
        """Do nothing: the records do not depend on the weights."""

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self, step: int) -> dict[str, Any]:
        """State before ``step``. Also writes the encodings made so far to disk, so a resume need not repeat them."""
        self._cache.flush()
        quarantine = self._quarantine.state_dict()
        return self.mixture.state_dict(step, self._world) | {"quarantine": quarantine}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._coming = {}  # these were read for another place in the data
        self.mixture.load_state_dict(state)
        self._quarantine.load_state_dict(state["quarantine"])

    def writer(self, step: int) -> None:
        """``state_dict`` has everything."""

    def load(self, folder: Path) -> None:
        """``load_state_dict`` has read everything."""

    def keep(self, folder: Path, step: int) -> str:
        """Write nothing: the records of a step follow from its number, so going on with --resume gets there again."""
        return ""

    def close(self) -> None:
        if self._readers:
            self._readers.shutdown(wait=False, cancel_futures=True)


def size_note(mixture: Mixture) -> str:
    """A note for the console: whether records of equal size are drawn together."""
    count = mixture.buckets
    return f"in {count} size buckets" if count > 1 else "one size bucket (equal, or no columns width and height)"


def open_training_set(context: WorkerContext) -> TrainingSet:
    """Open data.train for this model. Raises UserError if a file cannot be read or lacks a column."""
    data = context.settings.data
    store = ParquetStore(data.train, allow=data.allow)
    return TrainingSet(store, data.image_size, context.model.tokenizer.all_special_tokens)
