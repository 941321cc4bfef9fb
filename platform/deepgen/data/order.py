"""The order in which records are read: shuffled epochs that any rank computes for itself and that spare the storage.

Records lie in blocks (parquet row groups), which are read as a whole. An epoch shuffles the blocks, deals them onto
lanes, shuffles each block inside, and takes one record from every lane in turn. So the records of one batch come from
as many blocks as there are lanes, while each block is used up before its lane's next one is read.

A rank goes over lanes / ranks of them, whose blocks it must hold (all of them when it is alone); with more samples in a
batch of all ranks than lanes, so many times more ranks read the same block. LANES stands between the two: 128 row
groups of 64 pictures of 100 kB are 0.8 GB for a single rank, and 32 ranks with a micro-batch of 4 read each block once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

LANES = 128


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
