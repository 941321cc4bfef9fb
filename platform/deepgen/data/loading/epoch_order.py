"""The order in which training reads records: shuffled epochs that every rank computes on its own, reading whole blocks.

The order is a pure function from a position (0, 1, 2, ... without end) to a record, so a resume needs only a position.

Blocks and lanes (`BlockOrder`). A block is a parquet row group and is always read as a whole. Each epoch shuffles the
blocks, deals them onto lanes like cards, and shuffles the records inside each block. Then it takes one record from
every lane in turn. A batch thus mixes records from as many blocks as there are lanes, yet each lane uses up one block
before it opens the next. With two lanes, blocks A and B on the first, C and D on the second, an epoch reads
A C A C ... and then B D B D ...

Each rank buffers lanes / ranks blocks. If the global batch exceeds LANES, several ranks read the same block. LANES
trades memory for duplicate reads: 128 row groups of 64 pictures of 100 kB are 0.8 GB for a single rank, and 32 ranks
with a micro-batch of 4 read each block once.

Weights (`WeightedOrder`). Each source has a block order of its own. A cycle has SLOTS slots, each source owns a fixed
number of them in proportion to its weight, and every cycle shuffles which slots. So the common position determines the
position within each source, no source skips or repeats a record within its epoch, and the shares are exact after every
whole cycle.

Runs (`BucketOrder`). If image sizes are known, records of one bucket (``buckets``) come in runs of RUN, so that a
micro-batch needs little padding. A run draws only on records that are close in the block order: RUN neighbouring lanes,
_TURNS records of each. A record thus stays in its epoch and with the ranks that read its block anyway. Records that do
not fill a run of their bucket share a run with other buckets.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import repeat

import numpy as np

LANES = 128
SLOTS = 1 << 16
RUN = 8  # a micro-batch of 1, 2, 4 or 8 records lies in one run
_TURNS = 64  # a larger value fills more runs, but keeps more blocks in memory


class BlockOrder:
    """Endless epochs over blocks of records; each epoch has every record once. A pure function of its arguments.

    counts: number of records in each block. stream: a number that makes orders with the same seed differ.
    """

    def __init__(self, counts: Sequence[int] | np.ndarray, seed: int, stream: int, lanes: int = LANES) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.size = int(self.counts.sum())
        self._key = [seed, stream, 0x6D6978]
        self.lanes = max(1, min(lanes, len(self.counts)))
        self._starts = np.concatenate([[0], np.cumsum(self.counts)])
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._inside = lru_cache(maxsize=4 * LANES)(self._shuffle_block)

    def member(self, position: int) -> int:
        """Number of the record (0..size-1, counted block by block) at a position of the endless order."""
        epoch, place = divmod(position, self.size)
        # In turn 0 every lane gives its first record, in turn 1 its second, and so on.
        lane, turn = self._epoch(epoch).locate(place)
        block, offset = self._epoch(epoch).block_of(lane, turn)
        # `offset` counts places in the block's shuffled order.
        return int(self._starts[block] + self._inside(epoch, block)[offset])

    def _make_epoch(self, epoch: int) -> _Epoch:
        order = np.random.default_rng([*self._key, epoch]).permutation(len(self.counts))
        return _Epoch(order, self.counts, self.lanes)

    def _shuffle_block(self, epoch: int, block: int) -> np.ndarray:
        generator = np.random.default_rng([*self._key, epoch, block])
        return generator.permutation(int(self.counts[block]))


class BucketOrder:
    """The epochs of a BlockOrder, rearranged into runs: as far as possible, RUN places hold records of one bucket.

    Runs start at positions that are multiples of RUN, counted over all epochs, so micro-batches line up with them.
    buckets: the bucket of each record, any integers. This order uses half the lanes, as each lane has two blocks open.

    Runs are dealt round-robin to groups of RUN lanes. A cell is one group's lanes times _TURNS turns: its places are
    those that these lanes fill in the BlockOrder, and only records within a cell swap places.
    """

    def __init__(
        self, counts: Sequence[int] | np.ndarray, buckets: np.ndarray, seed: int, stream: int, lanes: int = LANES
    ) -> None:
        lanes = max(1, lanes // 2)
        # A multiple of RUN lanes, so that each run takes one record from every lane of its group.
        self._order = BlockOrder(counts, seed, stream, lanes - lanes % RUN if lanes > RUN else lanes)
        self._buckets = buckets
        self._key = [seed, stream, 0x72756E73]
        lanes = self._order.lanes  # BlockOrder uses fewer lanes if there are fewer blocks
        self._groups = 1 if lanes % RUN else lanes // RUN  # one group of all lanes if they do not divide into runs
        self._turns = _TURNS * min(lanes, RUN) // RUN  # runs in a cell
        self._cell = lru_cache(maxsize=4 * LANES // RUN)(self._make_cell)

    def member(self, position: int) -> int:
        """Number of the record at a position of the endless order."""
        size = self._order.size
        epoch, place = divmod(position, size)
        # Runs are aligned to positions, not to epochs: the epoch may start in the middle of a run, whose first
        # `ahead` places then belong to the previous epoch.
        ahead = epoch * size % RUN
        run, offset = divmod(place + ahead, RUN)
        turn, group = divmod(run, self._groups)  # runs go round the groups
        window, turn = divmod(turn, self._turns)  # the cell of the group, and the run within the cell
        missing = ahead if (group, window) == (0, 0) else 0  # the epoch's first cell lacks those `ahead` places
        return int(self._cell(epoch, group, window)[turn * RUN + offset - missing])

    def _make_cell(self, epoch: int, group: int, window: int) -> np.ndarray:
        """Record numbers of a cell (group of lanes, window of turns), in the order in which they are read."""
        size = self._order.size
        ahead = epoch * size % RUN
        # Every _groups-th run has the same lanes; a window has _turns of these runs.
        runs = group + self._groups * (window * self._turns + np.arange(self._turns))
        places = (runs[:, None] * RUN + np.arange(RUN)).ravel() - ahead
        places = places[(places >= 0) & (places < size)]  # the rest belongs to the previous and the next epoch
        members = np.array([self._order.member(epoch * size + int(place)) for place in places])
        # The epoch's first cell may begin with the rest of a run that the previous epoch started.
        head = min(-ahead % RUN, len(places)) if (group, window) == (0, 0) else 0
        generator = np.random.default_rng([*self._key, epoch, group, window])
        return members[_in_runs(self._buckets[members], head, generator)]


def _in_runs(buckets: np.ndarray, head: int, generator: np.random.Generator) -> np.ndarray:
    """A permutation [n] of a cell's records: first `head` records, then shuffled runs, then the remainder.

    buckets: bucket of each record [n]. head: number of places before the first whole run. Records that do not fill a
    run of their bucket are sorted by bucket; they fill mixed runs first, then the head, then the remainder.
    """
    by_bucket = np.argsort(buckets, kind="stable")
    found = buckets[by_bucket]  # bucket of each record, sorted
    # For each sorted record: where its bucket begins and ends.
    first, last = np.searchsorted(found, found, side="left"), np.searchsorted(found, found, side="right")
    fills = np.arange(len(found)) - first < (last - first) // RUN * RUN  # belongs to a full run of its bucket
    row = np.concatenate([by_bucket[fills], by_bucket[~fills]])
    body = (len(row) - head) // RUN * RUN  # places in whole runs
    runs = row[:body].reshape(-1, RUN)
    # The head takes leftovers from behind the runs; `permutation` shuffles whole runs, not the records in them.
    return np.concatenate([row[body : body + head], generator.permutation(runs).ravel(), row[body + head :]])


class WeightedOrder:
    """Endless order over several groups (sources), each drawn in proportion to its weight and in its own epochs.

    counts: for each group, the number of records in each of its blocks.
    source_weights: one per group, above 0, in any unit.
    stream: 0 or 1.
    buckets: for each group, the bucket of each record; None if sizes are unknown.

    Each group gets its share of the lanes, so all groups together hold about as many blocks as a single order would.
    With buckets, each draw takes RUN records of one group.
    """

    def __init__(
        self,
        counts: Sequence[Sequence[int] | np.ndarray],
        source_weights: Sequence[float],
        seed: int,
        stream: int,
        buckets: Sequence[np.ndarray] | None = None,
    ) -> None:
        shares = np.asarray(source_weights, dtype=np.float64) / np.sum(source_weights)
        self.slots = _apportion(shares)
        self._key = [seed, stream, 0x736C6F74]
        self._run = RUN if buckets else 1
        lanes = [max(1, round(LANES * share)) for share in shares]
        own = [stream + 2 * number for number in range(len(shares))]  # unique across both streams
        self._orders: list[BlockOrder | BucketOrder]
        if buckets:
            self._orders = [BucketOrder(*one) for one in zip(counts, buckets, repeat(seed), own, lanes)]
        else:
            self._orders = [BlockOrder(*one) for one in zip(counts, repeat(seed), own, lanes)]
        self._cycle = lru_cache(maxsize=2)(self._make_cycle)

    def member(self, position: int) -> tuple[int, int]:
        """Group, and number of the record within that group, at a position of the endless order."""
        if len(self._orders) == 1:
            return 0, self._orders[0].member(position)
        draw, offset = divmod(position, self._run)
        cycle, slot = divmod(draw, SLOTS)
        groups, earlier = self._cycle(cycle)
        group = int(groups[slot])
        # How often the group has been drawn before: in whole cycles, and in this one.
        drawn = cycle * int(self.slots[group]) + int(earlier[slot])
        return group, self._orders[group].member(drawn * self._run + offset)

    def _make_cycle(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """The group of each slot in a cycle, and how many earlier slots of the cycle belong to the same group."""
        dealt = np.repeat(np.arange(len(self.slots)), self.slots)
        groups = np.random.default_rng([*self._key, cycle]).permutation(dealt)
        # The stable sort lists the slots group by group, each group's slots in order. A slot's place in that list,
        # minus the place where its group begins, is the number of earlier slots of its group.
        by_group = np.argsort(groups, kind="stable")
        earlier = np.empty(SLOTS, dtype=np.int64)
        earlier[by_group] = np.arange(SLOTS) - np.repeat(np.cumsum(self.slots) - self.slots, self.slots)
        return groups, earlier


def _apportion(shares: np.ndarray) -> np.ndarray:
    """Number of slots for each group, int64 [groups]: proportional to shares, at least 1 each, SLOTS in total."""
    left = SLOTS - len(shares)
    exact = shares * left
    slots = 1 + np.floor(exact).astype(np.int64)
    # Rounding down leaves a few slots: one each for the groups with the largest remainders.
    slots[np.argsort(-(exact - np.floor(exact)), kind="stable")[: SLOTS - int(slots.sum())]] += 1
    return slots


class _Epoch:
    """One epoch's blocks, dealt onto lanes. Lanes are sorted by length, longest first.

    Lanes run out of records at different turns. Thanks to the sorting, the lanes that still have records in a turn are
    always lanes 0, 1, ..., so a place within a turn is also the number of its lane.
    """

    def __init__(self, order: np.ndarray, counts: np.ndarray, lanes: int) -> None:
        dealt = [order[lane::lanes] for lane in range(lanes)]
        lengths = np.array([int(counts[blocks].sum()) for blocks in dealt])
        by_length = np.argsort(-lengths, kind="stable")
        self._blocks = [dealt[lane] for lane in by_length]
        self._ends = [np.cumsum(counts[blocks]) for blocks in self._blocks]  # where each block ends in its lane
        turns = int(lengths.max())
        # For each turn, the number of lanes that still have a record: those longer than the turn's number.
        alive = len(lengths) - np.searchsorted(np.sort(lengths), np.arange(turns), side="right")
        self._before = np.concatenate([[0], np.cumsum(alive)])  # records taken before each turn

    def locate(self, place: int) -> tuple[int, int]:
        """Lane and turn of the record at a place in the epoch."""
        turn = int(np.searchsorted(self._before, place, side="right")) - 1
        return place - int(self._before[turn]), turn

    def block_of(self, lane: int, turn: int) -> tuple[int, int]:
        """The block that holds a lane's record number `turn`, and the record's offset in that block."""
        index = int(np.searchsorted(self._ends[lane], turn, side="right"))
        before = int(self._ends[lane][index - 1]) if index else 0
        return int(self._blocks[lane][index]), turn - before
