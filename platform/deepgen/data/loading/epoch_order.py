"""The order in which records are read: shuffled epochs that any rank computes for itself and that spare the storage.

Records lie in blocks (parquet row groups), which are read as a whole. An epoch shuffles the blocks, deals them onto
lanes, shuffles each block inside, and takes one record from every lane in turn. So the records of one batch come from
as many blocks as there are lanes, while each block is used up before its lane's next one is read.

Each rank buffers lanes / ranks blocks. If the global batch exceeds LANES, several ranks read the same block. LANES
trades memory for duplicate reads: 128 row groups of 64 pictures of 100 kB are 0.8 GB for a single rank, and 32 ranks
with a micro-batch of 4 read each block once.

Several such orders are drawn by weight in cycles of SLOTS places: each order owns its share of the slots, and where
they lie is shuffled for every cycle. So an order's own position follows from the common one, none of its records is
skipped or drawn twice in its epoch, and after every whole cycle the shares are exact.

Where sizes are known, records of one bucket (``buckets``) stand in runs of RUN. The runs are put together
among records that are near each other anyway: RUN neighbouring lanes, _TURNS records of each. So a record only changes
places within its epoch and within what the same ranks read, and what does not fill a run shares one at its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import repeat

import numpy as np

LANES = 128
SLOTS = 1 << 16
RUN = 8  # a micro-batch of 1, 2, 4 or 8 lies in one run
_TURNS = 64  # more: fuller runs, and more blocks to hold


class BlockOrder:
    """Endless epochs over blocks of `counts` records; every record once an epoch. A pure function of its arguments.

    counts: records of each block. stream: separates orders that must not be alike.
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
        """Number of the record (0..size-1, block by block) at a position of the endless row."""
        epoch, place = divmod(position, self.size)
        lane, turn = self._epoch(epoch).locate(place)
        block, offset = self._epoch(epoch).block_of(lane, turn)
        return int(self._starts[block] + self._inside(epoch, block)[offset])

    def _make_epoch(self, epoch: int) -> _Epoch:
        order = np.random.default_rng([*self._key, epoch]).permutation(len(self.counts))
        return _Epoch(order, self.counts, self.lanes)

    def _shuffle_block(self, epoch: int, block: int) -> np.ndarray:
        generator = np.random.default_rng([*self._key, epoch, block])
        return generator.permutation(int(self.counts[block]))


class BucketOrder:
    """The epochs of a BlockOrder with runs of one bucket: every RUN places from a multiple of RUN on, if they can.

    buckets: of each record by its number, any integers. Half the lanes are used, as each has two blocks in work.
    """

    def __init__(
        self, counts: Sequence[int] | np.ndarray, buckets: np.ndarray, seed: int, stream: int, lanes: int = LANES
    ) -> None:
        lanes = max(1, lanes // 2)
        self._order = BlockOrder(counts, seed, stream, lanes - lanes % RUN if lanes > RUN else lanes)
        self._buckets = buckets
        self._key = [seed, stream, 0x72756E73]
        lanes = self._order.lanes
        self._groups = 1 if lanes % RUN else lanes // RUN  # of RUN lanes, if runs meet the same lanes again
        self._turns = _TURNS * min(lanes, RUN) // RUN
        self._cell = lru_cache(maxsize=4 * LANES // RUN)(self._make_cell)

    def member(self, position: int) -> int:
        """Number of the record at a position of the endless row."""
        size = self._order.size
        epoch, place = divmod(position, size)
        ahead = epoch * size % RUN  # places of the epoch's first run that belong to the epoch before
        run, offset = divmod(place + ahead, RUN)
        turn, group = divmod(run, self._groups)
        window, turn = divmod(turn, self._turns)
        missing = ahead if (group, window) == (0, 0) else 0
        return int(self._cell(epoch, group, window)[turn * RUN + offset - missing])

    def _make_cell(self, epoch: int, group: int, window: int) -> np.ndarray:
        """Records of a cell: the places of runs that lie in the same lanes, window * _turns turns after the first."""
        size = self._order.size
        ahead = epoch * size % RUN
        runs = group + self._groups * (window * self._turns + np.arange(self._turns))
        places = (runs[:, None] * RUN + np.arange(RUN)).ravel() - ahead
        places = places[(places >= 0) & (places < size)]
        members = np.array([self._order.member(epoch * size + int(place)) for place in places])
        head = min(-ahead % RUN, len(places)) if (group, window) == (0, 0) else 0
        generator = np.random.default_rng([*self._key, epoch, group, window])
        return members[_in_runs(self._buckets[members], head, generator)]


def _in_runs(buckets: np.ndarray, head: int, generator: np.random.Generator) -> np.ndarray:
    """Places [n] taken in an order that has runs of one bucket, shuffled, after the first `head` ones.

    What is left of each bucket stands bucket by bucket at head, tail and in the last runs to be filled.
    """
    by_bucket = np.argsort(buckets, kind="stable")
    found = buckets[by_bucket]
    first, last = np.searchsorted(found, found, side="left"), np.searchsorted(found, found, side="right")
    fills = np.arange(len(found)) - first < (last - first) // RUN * RUN
    row = np.concatenate([by_bucket[fills], by_bucket[~fills]])
    body = (len(row) - head) // RUN * RUN
    runs = row[:body].reshape(-1, RUN)
    return np.concatenate([row[body : body + head], generator.permutation(runs).ravel(), row[body + head :]])


class WeightedOrder:
    """Endless row over several groups of blocks (sources), each drawn by its weight and each in epochs of its own.

    counts: for each group the records of its blocks; source_weights: one a group, above 0, in any unit; stream: 0 or 1;
    buckets: for each group those of its records, None without any. Of the lanes a group has its share, so that together
    they hold about as many blocks as one order would. With buckets a group is drawn RUN records at a time.
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
        own = [stream + 2 * number for number in range(len(shares))]
        self._orders: list[BlockOrder | BucketOrder]
        if buckets:
            self._orders = [BucketOrder(*one) for one in zip(counts, buckets, repeat(seed), own, lanes)]
        else:
            self._orders = [BlockOrder(*one) for one in zip(counts, repeat(seed), own, lanes)]
        self._cycle = lru_cache(maxsize=2)(self._make_cycle)

    def member(self, position: int) -> tuple[int, int]:
        """Group and number of the record in it at a position of the endless row."""
        if len(self._orders) == 1:
            return 0, self._orders[0].member(position)
        draw, offset = divmod(position, self._run)
        cycle, slot = divmod(draw, SLOTS)
        groups, earlier = self._cycle(cycle)
        group = int(groups[slot])
        drawn = cycle * int(self.slots[group]) + int(earlier[slot])
        return group, self._orders[group].member(drawn * self._run + offset)

    def _make_cycle(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """Of every slot its group, and how many slots before it in the cycle the group has."""
        dealt = np.repeat(np.arange(len(self.slots)), self.slots)
        groups = np.random.default_rng([*self._key, cycle]).permutation(dealt)
        by_group = np.argsort(groups, kind="stable")
        earlier = np.empty(SLOTS, dtype=np.int64)
        earlier[by_group] = np.arange(SLOTS) - np.repeat(np.cumsum(self.slots) - self.slots, self.slots)
        return groups, earlier


def _apportion(shares: np.ndarray) -> np.ndarray:
    """SLOTS dealt out by shares, at least one to each, int64 [groups]; largest remainders first."""
    left = SLOTS - len(shares)
    exact = shares * left
    slots = 1 + np.floor(exact).astype(np.int64)
    slots[np.argsort(-(exact - np.floor(exact)), kind="stable")[: SLOTS - int(slots.sum())]] += 1
    return slots


class _Epoch:
    """Blocks on lanes; the longest lane is the first, so those that still have records are always the first ones."""

    def __init__(self, order: np.ndarray, counts: np.ndarray, lanes: int) -> None:
        dealt = [order[lane::lanes] for lane in range(lanes)]
        lengths = np.array([int(counts[blocks].sum()) for blocks in dealt])
        by_length = np.argsort(-lengths, kind="stable")
        self._blocks = [dealt[lane] for lane in by_length]
        self._ends = [np.cumsum(counts[blocks]) for blocks in self._blocks]  # records up to and with each block
        turns = int(lengths.max())
        alive = len(lengths) - np.searchsorted(np.sort(lengths), np.arange(turns), side="right")  # lanes at each turn
        self._before = np.concatenate([[0], np.cumsum(alive)])  # records taken before each turn

    def locate(self, place: int) -> tuple[int, int]:
        """Lane and turn of the record at a place of the epoch."""
        turn = int(np.searchsorted(self._before, place, side="right")) - 1
        return place - int(self._before[turn]), turn

    def block_of(self, lane: int, turn: int) -> tuple[int, int]:
        """Block and offset in it of a lane's record number `turn`."""
        index = int(np.searchsorted(self._ends[lane], turn, side="right"))
        before = int(self._ends[lane][index - 1]) if index else 0
        return int(self._blocks[lane][index]), turn - before
