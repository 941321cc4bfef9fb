"""Turns experience into batches for the learner, and sends the learner's weights back to the stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from actors.experience.weight_sync import publish_weights
from actors.learner.protocols import WorkerContext
from actors.messages import Group, RankBatch
from actors.objectives.record_source import MixtureSource
from deepgen.data.loading.collate import MicroBatch

_ANSWER_MARGIN_S = 60.0  # lets the stream's own error, which says more, arrive first


@dataclass(frozen=True)
class RLBatch:
    """One rank's share of a step: samples with their advantages, and records for the auxiliary loss."""

    groups: tuple[Group, ...]  # with the arrays of their trajectories
    records: tuple[MicroBatch, ...]


class ExperienceSource:
    """Gets batches from the experience stream, and publishes rank 0's weights to it."""

    def __init__(self, context: WorkerContext, stream: Any, auxiliary: MixtureSource | None) -> None:
        self._context, self._stream, self._auxiliary = context, stream, auxiliary
        self._deadline_s = context.settings.experience.deadline_s + _ANSWER_MARGIN_S
        self._metrics: dict[str, float] = {}

    def next(self, step: int, rank: int, world: int) -> RLBatch:
        import ray

        batch: RankBatch = self._ask(self._stream.next_batch.remote(step, rank, world))
        self._metrics = dict(batch.metrics)
        fetched = ray.get([group.trajectory for group in batch.groups], timeout=self._deadline_s)
        groups = [replace(group, trajectory=arrays) for group, arrays in zip(batch.groups, fetched, strict=True)]
        records = self._auxiliary.next(step, rank, world) if self._auxiliary else ()
        return RLBatch(tuple(groups), tuple(records))

    def publish(self, weights: Callable[[], dict[str, Tensor]], version: int) -> None:
        full = weights()
        if self._context.rank == 0:
            self._ask(self._stream.publish.remote(publish_weights(version, full)))

    def metrics(self) -> dict[str, float]:
        return self._metrics

    def state_dict(self, step: int) -> dict[str, Any]:
        state: dict[str, Any] = self._ask(self._stream.state.remote(step)) if self._context.rank == 0 else {}
        if self._auxiliary:
            state["auxiliary"] = self._auxiliary.state_dict(step)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = dict(state)
        auxiliary = state.pop("auxiliary", None)
        if self._auxiliary and auxiliary:
            self._auxiliary.load_state_dict(auxiliary)
        if self._context.rank == 0:
            self._ask(self._stream.restore.remote(state))

    def close(self) -> None:
        if self._auxiliary:
            self._auxiliary.close()

    def _ask(self, reference: Any) -> Any:
        import ray

        return ray.get(reference, timeout=self._deadline_s)
