"""Evaluation during rl: held-out prompts are drawn by the rollout actors and scored while the training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from actors.learner.protocols import WorkerContext
from deepgen.data.usable import left_out
from deepgen.evaluation.choose import GRID_PROMPTS, choose_records, heldout_records
from deepgen.evaluation.pictures import grid
from deepgen.evaluation.results import Evaluation


class Observer:
    """Asks for pictures and held-out scores every few versions and logs them once they are there."""

    def __init__(self, context: WorkerContext, stream: Any) -> None:
        settings = context.settings
        self._context, self._stream, self._settings = context, stream, settings
        self._heldout = heldout_records(settings)
        self._quarantined = left_out(settings, "data.prompts", "data.heldout")
        self._grid = choose_records(self._heldout, GRID_PROMPTS, settings.evaluation.seed) if self._heldout else []
        self._pending: list[tuple[int, str, Any]] = []

    def published(self, version: int) -> None:
        """Order what is due at this version. The last one is evaluated by the stage itself, with the first."""
        if self._quarantined and self._context.tracker:
            self._context.tracker.log(version, self._quarantined)
        self._quarantined = {}  # once a start
        if self._heldout and version < self._settings.train.steps:
            if _due(version, self._settings.tracking.grid_every):
                self._order(version, "grid", self._grid, 1)
            if version and _due(version, self._settings.evaluation.every):
                self._order(version, "eval", self._heldout, self._settings.evaluation.samples_per_prompt)
        self.collect(wait_s=0.0 if version < self._settings.train.steps else self._settings.experience.deadline_s)

    def collect(self, wait_s: float) -> None:
        """Log the evaluations that are finished, after waiting for the rest at most `wait_s`."""
        import ray

        if not self._pending:
            return
        references = [reference for _, _, reference in self._pending]
        ready, _ = ray.wait(references, num_returns=len(references), timeout=wait_s)
        for version, what, reference in [item for item in self._pending if item[2] in ready]:
            self._log(version, what, ray.get(reference))
        self._pending = [item for item in self._pending if item[2] not in ready]

    def _order(self, version: int, what: str, records: Sequence[Any], samples: int) -> None:
        self._pending.append((version, what, self._stream.evaluate.remote(records, samples)))

    def _log(self, version: int, what: str, evaluation: Evaluation) -> None:
        tracker = self._context.tracker
        assert tracker is not None
        if what == "grid":
            tracker.log_images("samples", version, grid(evaluation, f"step {version}"))
        else:
            tracker.log(version, {f"eval/{name}": value for name, value in evaluation.means().items()})


def _due(version: int, every: int) -> bool:
    return every > 0 and version % every == 0
