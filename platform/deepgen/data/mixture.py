"""Which records make the batch of a step: a fixed cycle of task-pure micro-batches, computed from the step number.

One optimizer step is one whole cycle (M2.4, M8.7): first ``edit_per_cycle`` micro-batches of editing, then
``t2i_per_cycle`` of generation, the same task on every rank at the same time. Each source is an endless row of
shuffled epochs (``deepgen.data.order``). Where a batch lies in that row follows from the step number and an origin
(step, positions), so nothing has to be replayed on resume, and a resume on another number of ranks goes on where the
old run stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deepgen.config.errors import UserError
from deepgen.data.order import BlockOrder

SOURCES = ("edit", "t2i")


@dataclass(frozen=True)
class PlannedMicroBatch:
    """One micro-batch of one rank: ``members`` number the records within their source ("edit" or "t2i").

    ``first`` is the place of its first record in the micro-batch of all ranks together; random numbers are drawn per
    place, so they do not depend on how many ranks share the work.
    """

    source: str
    number: int
    first: int
    members: tuple[int, ...]


@dataclass
class Mixture:
    """Plan of batches. ``blocks``: of each source, the records in every block; every rank builds the same object."""

    seed: int
    blocks: Mapping[str, Sequence[int] | np.ndarray]
    per_cycle: dict[str, int]
    micro_batch: int
    origin_step: int = 0
    origin: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SOURCES, 0))

    def __post_init__(self) -> None:
        for source in SOURCES:
            count = self.per_cycle.get(source, 0)
            if count and not np.sum(self.blocks.get(source, ())):
                others = "editing (task edit)" if source == "edit" else "generation (tasks t2i, reasoning, text)"
                raise UserError(
                    f"data.{source}_per_cycle: got {count}, but data.train holds no {others} records; "
                    "allowed with this data: 0"
                )
        self._orders = {
            source: BlockOrder(self.blocks[source], self.seed, SOURCES.index(source))
            for source in SOURCES
            if self.per_cycle.get(source, 0)
        }

    @property
    def cycle(self) -> int:
        """Micro-batches in one optimizer step."""
        return sum(self.per_cycle.get(source, 0) for source in SOURCES)

    def plan(self, step: int, rank: int, world: int) -> list[PlannedMicroBatch]:
        """The micro-batches of ``rank`` at optimizer step ``step``, in the order they are worked on."""
        batches: list[PlannedMicroBatch] = []
        for source in SOURCES:
            start = self._position(source, step, world)
            for turn in range(self.per_cycle.get(source, 0)):
                first = rank * self.micro_batch
                begin = start + turn * self.micro_batch * world + first
                members = tuple(self._member(source, begin + j) for j in range(self.micro_batch))
                batches.append(PlannedMicroBatch(source, len(batches), first, members))
        return batches

    def state_dict(self, step: int, world: int) -> dict[str, Any]:
        """State before optimizer step ``step``: where each source goes on."""
        return {"step": step, "positions": {source: self._position(source, step, world) for source in SOURCES}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.origin_step = int(state["step"])
        self.origin = {source: int(state["positions"][source]) for source in SOURCES}

    def _position(self, source: str, step: int, world: int) -> int:
        per_step = self.per_cycle.get(source, 0) * self.micro_batch * world
        return self.origin[source] + (step - self.origin_step) * per_step

    def _member(self, source: str, position: int) -> int:
        return self._orders[source].member(position)
