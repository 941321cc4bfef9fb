"""The order in which records are read: shuffled epochs that any rank computes for itself and that spare the storage.

Records lie in blocks (parquet row groups), which are read as a whole. An epoch shuffles the blocks, deals them onto
lanes, shuffles each block inside, and takes one record from every lane in turn. So the records of one batch come from
as many blocks as there are lanes, while each block is used up before its lane's next one is read.

A rank goes over lanes / ranks of them, whose blocks it must hold (all of them when it is alone); with more samples in a
batch of all ranks than lanes, so many times more ranks read the same block. LANES stands between the two: 128 row
groups of 64 pictures of 100 kB are 0.8 GB for a single rank, and 32 ranks with a micro-batch of 4 read each block once.

Several such orders are drawn by weight in cycles of SLOTS places: each order owns its share of the slots, and where
they lie is shuffled for every cycle. So an order's own position follows from the common one, none of its records is
skipped or drawn twice in its epoch, and after every whole cycle the shares are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

LANES = 128
SLOTS = 1 << 16


class BlockOrder:
    """Endless epochs over blocks of `counts` records; every record once an epoch. A pure function of its arguments.

    counts: records of each block. stream: separates orders that must not be alike.
    """

    def __init__(self, counts: Sequence[int] | np.ndarray, seed: int, stream: int, lanes: int = LANES) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.size = int(self.counts.sum())
        self._key = [seed, stream, 0x6D6978]
        self._lanes = max(1, min(lanes, len(self.counts)))
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
        return _Epoch(order, self.counts, self._lanes)

    def _shuffle_block(self, epoch: int, block: int) -> np.ndarray:
        generator = np.random.default_rng([*self._key, epoch, block])
        return generator.permutation(int(self.counts[block]))


class WeightedOrder:
    """Endless row over several groups of blocks, each drawn by its weight and each in epochs of its own.

    counts: for each group the records of its blocks; weights: one a group, above 0, in any unit; stream: 0 or 1. Of the
    lanes a group has its share, so that together they hold about as many blocks as one order would.
    """

    def __init__(
        self, counts: Sequence[Sequence[int] | np.ndarray], weights: Sequence[float], seed: int, stream: int
    ) -> None:
        shares = np.asarray(weights, dtype=np.float64) / np.sum(weights)
        self.slots = _apportion(shares)
        self._key = [seed, stream, 0x736C6F74]
        self._orders = [
            BlockOrder(group, seed, stream + 2 * number, max(1, round(LANES * share)))
            for number, (group, share) in enumerate(zip(counts, shares, strict=True))
        ]
        self._cycle = lru_cache(maxsize=2)(self._make_cycle)

    def member(self, position: int) -> tuple[int, int]:
        """Group and number of the record in it at a position of the endless row."""
        if len(self._orders) == 1:
            return 0, self._orders[0].member(position)
        cycle, slot = divmod(position, SLOTS)
        groups, earlier = self._cycle(cycle)
        group = int(groups[slot])
        return group, self._orders[group].member(cycle * int(self.slots[group]) + int(earlier[slot]))

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
