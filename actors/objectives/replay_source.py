"""Recorded steps in the place of the experience stream: training from files, without rollouts and rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from actors.experience.step_advantages import factor_and_clamped, own_advantages, step_advantages
from actors.learner.protocols import TrainedModel, WorkerContext
from actors.messages import Group, RankBatch
from actors.objectives.experience_source import ExperienceSource
from actors.objectives.record_source import MixtureSource
from actors.objectives.replay_files import read_groups, read_metrics

_OF_THE_RUN = ("time/", "throughput/", "idle/", "pool/", "rollout/restarts")  # metrics that say nothing of the samples


class ReplaySource(ExperienceSource):
    """Makes batches as an on-line run does, whole or in pieces, because it is the same code. Only answers differ.

    Own parts of advantages, factor and clamped groups are computed again from the scores, for this run's ranks; the
    final advantages are those of the files.
    """

    def __init__(self, context: WorkerContext, folder: Path, auxiliary: MixtureSource | None) -> None:
        super().__init__(context, None, auxiliary)
        self._folder, self._settings = folder, context.settings

    def _ask(self, method: str, *arguments: Any) -> Any:
        """What the stream has answered to this call."""
        if method == "next_group":
            return self._next_group(*arguments)
        assert method == "next_batch"
        return self._next_batch(*arguments)

    def _next_group(self, step: int, position: int) -> Group:
        (stored,) = read_groups(self._folder, step, [position])
        own = own_advantages(self._settings, stored.group) if stored.own is None else stored.own
        return replace(stored.group, advantages=own)

    def _next_batch(self, step: int, rank: int, world: int) -> RankBatch:
        recorded = read_metrics(self._folder, step)
        metrics = {name: value for name, value in recorded.items() if not name.startswith(_OF_THE_RUN)}
        stored = read_groups(self._folder, step, range(rank, self._settings.rollout.prompts_per_step, world))
        factor, clamped = self._whitening(step) if self._overlap.held else (1.0, 0)
        return RankBatch(tuple(one.group for one in stored), metrics, {}, factor, clamped)

    def _whitening(self, step: int) -> tuple[float, int]:
        positions = range(self._settings.rollout.prompts_per_step)
        groups = [stored.group for stored in read_groups(self._folder, step, positions)]
        advantages = np.stack([group.advantages for group in groups])
        return factor_and_clamped(self._settings, advantages, step_advantages(self._settings, groups).factor)

    def _fetched(self, groups: Sequence[Group]) -> tuple[Group, ...]:
        return tuple(groups)  # they came with their arrays

    def publish(self, policy: TrainedModel, version: int) -> None:
        """Do nothing: nobody draws."""

    def metrics(self) -> dict[str, float]:
        return self._metrics

    def state_dict(self, step: int) -> dict[str, Any]:
        return {"replay": str(self._folder)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: a step's number says everything."""

    def load(self, folder: Path) -> None:
        """Read nothing."""

    def keep(self, folder: Path, step: int) -> str:
        """Write nothing: the batch is in files already."""
        return ""
