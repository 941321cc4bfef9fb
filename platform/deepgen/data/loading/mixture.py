"""Which records make the batch of a step: a fixed cycle of single-task micro-batches, computed from the step number.

One optimizer step is one whole cycle (M2.4, M8.7): first ``edit_per_cycle`` micro-batches of editing, then
``t2i_per_cycle`` of generation. All ranks work on the same task at the same time.

Editing and generation each have an endless order of shuffled epochs (``epoch_order``). If sources have weights, the
order draws each source by its weight, in its own epochs. A batch's position in the order follows from the step number
and an origin (step, positions). So a resume replays nothing, and it continues where the old run stopped even with
another number of ranks. If records store their image sizes, records of one bucket are drawn together
(``deepgen.data.loading.buckets``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from deepgen.config.settings import TASKS
from deepgen.data.loading.buckets import bucket_numbers
from deepgen.data.loading.epoch_order import WeightedOrder
from deepgen.data.loading.parquet_store import ParquetStore, RecordStore
from deepgen.errors import UserError, nearest

if TYPE_CHECKING:
    from deepgen.config.settings import Settings

BATCH_KINDS = ("edit", "t2i")  # editing; generation (all other tasks)
MOST_SOURCES = 1000  # limit with data.weights or data.temperature
_SHOWN = 20  # most names in one message


@dataclass(frozen=True)
class Part:
    """Records of one kind that are drawn with one weight: those of a source, or all of the kind.

    rows: record numbers in the store, ascending.
    starts: first record number of each block of the store.
    source_weight: relative frequency of drawing them, above 0, in any unit.
    buckets: bucket of each row; None if all records are in one bucket.
    """

    rows: np.ndarray
    starts: np.ndarray
    source_weight: float = 1.0
    buckets: np.ndarray | None = None

    def counts(self) -> np.ndarray:
        """Number of these records in each block, without blocks that have none."""
        found = np.diff(np.searchsorted(self.rows, self.starts))
        return found[found > 0]


@dataclass(frozen=True)
class PlannedMicroBatch:
    """One micro-batch of one rank. ``kind`` is "edit" or "t2i"; ``members`` are record numbers in the store.

    ``first`` is the place of its first record in the combined micro-batch of all ranks. Each place has its own random
    numbers, so they do not depend on the number of ranks.
    """

    kind: str
    number: int
    first: int
    members: tuple[int, ...]


@dataclass
class Mixture:
    """The plan of all batches; every rank builds the same one. ``parts``: the records to draw from, by kind.

    ``image_size``: determines the buckets and so the order of the records; a resume therefore checks it.
    ``records``: `fingerprint` of the records. A resume compares it, unless it is empty.
    """

    seed: int
    parts: Mapping[str, Sequence[Part]]
    per_cycle: dict[str, int]
    micro_batch: int
    origin_step: int = 0
    origin: dict[str, int] = field(default_factory=lambda: dict.fromkeys(BATCH_KINDS, 0))
    image_size: int = 0
    records: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_settings(cls, settings: Settings, store: RecordStore, micro_batch: int) -> Mixture:
        """The mixture that the settings under data.* define. Raises UserError naming a key that does not fit."""
        per_cycle = {"edit": settings.data.edit_per_cycle, "t2i": settings.data.t2i_per_cycle}
        used = [kind for kind in BATCH_KINDS if per_cycle[kind]]
        parts = make_parts(store, settings, used)
        size, records = settings.data.image_size, fingerprint(store, parts)
        return cls(settings.run.seed, parts, per_cycle, micro_batch, image_size=size, records=records)

    def __post_init__(self) -> None:
        for kind in BATCH_KINDS:
            count = self.per_cycle.get(kind, 0)
            if count and not self.parts.get(kind):
                others = "editing (task edit)" if kind == "edit" else "generation (tasks t2i, reasoning, text)"
                raise UserError(
                    f"data.{kind}_per_cycle: got {count}, but data.train holds no {others} records; "
                    "allowed with this data: 0"
                )
        buckets = [part.buckets for parts in self.parts.values() for part in parts if part.buckets is not None]
        self.buckets = len(np.unique(np.concatenate(buckets))) if buckets else 1  # number of different buckets
        self._orders = {
            kind: WeightedOrder(
                [part.counts() for part in self.parts[kind]],
                [part.source_weight for part in self.parts[kind]],
                self.seed,
                BATCH_KINDS.index(kind),
                [part.buckets for part in self.parts[kind] if part.buckets is not None],
            )
            for kind in BATCH_KINDS
            if self.per_cycle.get(kind, 0)
        }

    @property
    def cycle(self) -> int:
        """Micro-batches in one optimizer step."""
        return sum(self.per_cycle.get(kind, 0) for kind in BATCH_KINDS)

    def plan(self, step: int, rank: int, world: int) -> list[PlannedMicroBatch]:
        """The micro-batches of ``rank`` for optimizer step ``step``, in processing order."""
        batches: list[PlannedMicroBatch] = []
        for kind in BATCH_KINDS:
            start = self._position(kind, step, world)
            for turn in range(self.per_cycle.get(kind, 0)):
                first = rank * self.micro_batch
                begin = start + turn * self.micro_batch * world + first
                members = tuple(self._member(kind, begin + j) for j in range(self.micro_batch))
                batches.append(PlannedMicroBatch(kind, len(batches), first, members))
        return batches

    def state_dict(self, step: int, world: int) -> dict[str, Any]:
        """State before optimizer step ``step``: each kind's next position and the record fingerprint. JSON-able."""
        state = {"step": step, "positions": {kind: self._position(kind, step, world) for kind in BATCH_KINDS}}
        state |= {"image_size": self.image_size} if self.buckets > 1 else {}
        return state | ({"records": dict(self.records)} if self.records else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`. Raises UserError if the records or their buckets have changed.

        The shuffled order would then be a different one, and the epoch would repeat some records and skip others.
        """
        then = state.get("image_size", self.image_size)
        if then != self.image_size:
            raise UserError(
                f"data.image_size: got {self.image_size}; allowed: {then}, whose buckets the run draws from"
            )
        self._check_records(state.get("records", {}))
        self.origin_step = int(state["step"])
        self.origin = {kind: int(state["positions"][kind]) for kind in BATCH_KINDS}

    def _check_records(self, then: Mapping[str, Any]) -> None:
        """Compare the entries that both have. Older versions saved none, and a run may leave out a kind."""
        if all(then[name] == self.records[name] for name in then.keys() & self.records.keys()):
            return
        counts = f"{then['count']:,} records then, {self.records['count']:,} now"
        if then["count"] == self.records["count"]:
            counts = f"{then['count']:,} records then and now, of other tasks, sources, sizes or row groups"
        raise UserError(
            f"data.train: is not what the run has been reading ({counts}); allowed: the same records in the same "
            "order, or a new run"
        )

    def _position(self, kind: str, step: int, world: int) -> int:
        per_step = self.per_cycle.get(kind, 0) * self.micro_batch * world
        return self.origin[kind] + (step - self.origin_step) * per_step

    def _member(self, kind: str, position: int) -> int:
        part, member = self._orders[kind].member(position)
        return int(self.parts[kind][part].rows[member])


def check_training_data(settings: Settings) -> None:
    """Raise UserError if data.train does not fit the keys that mix it. Call it before the workers start."""
    data = settings.data
    Mixture.from_settings(settings, ParquetStore(data.train, allow=data.allow), data.micro_batch)


def fingerprint(store: RecordStore, parts: Mapping[str, Sequence[Part]]) -> dict[str, Any]:
    """Everything but the seed that determines the order of the records: their count, and a hash for each kind.

    The hash covers tasks, blocks, sources and buckets, which are in memory anyway, but not the files' names or paths.
    """
    common = hashlib.blake2b(digest_size=16)
    common.update(store.tasks.astype(np.uint8).tobytes())
    common.update(store.starts.astype(np.int64).tobytes())
    found: dict[str, Any] = {"count": len(store.tasks)}
    for kind, own in parts.items():
        digest = common.copy()
        for part in own:
            buckets = np.zeros(0) if part.buckets is None else part.buckets
            for numbers in (part.rows, buckets):
                digest.update(f"{len(numbers)}:".encode())
                digest.update(np.ascontiguousarray(numbers, dtype=np.int64).data)
        found[kind] = digest.hexdigest()
    return found


def make_parts(store: RecordStore, settings: Settings, used: Sequence[str]) -> dict[str, list[Part]]:
    """The parts of each kind: one per source with data.weights or data.temperature, otherwise one for all records.

    A kind without records has no parts. Raises UserError naming the key that does not fit the records.
    """
    is_edit = store.tasks == TASKS.index("edit")
    sizes = store.sizes()
    buckets = bucket_numbers(sizes, settings.data.image_size) if sizes else None
    if buckets is not None and not buckets.any():
        buckets = None  # all of one size

    def part(found: np.ndarray, source_weight: float = 1.0) -> Part:
        return Part(found, store.starts, source_weight, None if buckets is None else buckets[found])

    rows = {"edit": np.flatnonzero(is_edit), "t2i": np.flatnonzero(~is_edit)}
    by_hand, temperature = settings.data.weights, settings.data.temperature
    if not by_hand and temperature == 1:
        return {kind: [part(rows[kind])] if len(rows[kind]) else [] for kind in used}
    names, codes = store.sources()
    if len(names) > MOST_SOURCES:
        raise UserError(
            f"data.train: {len(names):,} different texts in the column source ({names[0]!r}, {names[1]!r}, ...); "
            f"allowed with data.weights or data.temperature: at most {MOST_SOURCES:,}, the names of data sets"
        )
    _check_names(by_hand, names)
    parts: dict[str, list[Part]] = {}
    for kind in used:
        own = [(name, rows[kind][codes[rows[kind]] == number]) for number, name in enumerate(names)]
        own = [(name, found) for name, found in own if len(found)]
        missing = [name for name, _ in own if by_hand and name not in by_hand]
        if missing:
            raise UserError(f"data.weights: no weight for {_listed(missing)}; allowed: one for each, 0 leaves it out")
        largest = max((len(found) for _, found in own), default=1)
        by_size = [(len(found) / largest) ** (1 / temperature) for _, found in own]
        source_weights = [by_hand[name] for name, _ in own] if by_hand else by_size
        parts[kind] = [part(found, weight) for (_, found), weight in zip(own, source_weights, strict=True) if weight]
        if own and not parts[kind]:
            raise UserError(f"data.weights: all 0 for the {kind} records of {_listed([n for n, _ in own])}")
    return parts


def _check_names(given: Mapping[str, float], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise UserError(
                f"data.weights.{name}: data.train has no source {name!r}; allowed: {_listed(known)}, or "
                f"data.weights={{}} to mix by size{nearest(name, known)}"
            )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(repr(name) for name in names[:_SHOWN]) + more
