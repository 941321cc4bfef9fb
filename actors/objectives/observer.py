"""Evaluation during rl: the rollout actors draw held-out prompts, and rewards score them while training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray

from actors.experience.stream_client import Request, StreamClient, VersionGoneError
from actors.learner.protocols import WorkerContext
from actors.objectives.hacking_guard import HackingGuard
from deepgen.data.usable import left_out
from deepgen.evaluation.choose import GRID_PROMPTS, choose_records, heldout_records
from deepgen.evaluation.pictures import grid
from deepgen.evaluation.results import Evaluation, evaluation_metrics
from deepgen.tracking.tracker import Tracker


class Observer:
    """Requests pictures and held-out scores from the stream every few steps; logs them when they arrive. Rank 0."""

    def __init__(self, context: WorkerContext, stream: Any, tracker: Tracker) -> None:
        settings = self._settings = context.settings
        self._client, self._tracker = StreamClient(stream, settings.experience.deadline_s), tracker
        self._say = context.say
        self._heldout = heldout_records(settings)
        if quarantined := left_out(settings, "data.prompts", "data.heldout"):
            tracker.log(0, quarantined)
        self._grid = choose_records(self._heldout, GRID_PROMPTS, settings.evaluation.seed) if self._heldout else []
        self._pending: list[tuple[int, str, Request]] = []
        watched = self._heldout and settings.rewards.held_out() and settings.evaluation.every
        self._guard = HackingGuard(settings, self._heldout, context.say) if watched else None
        self._arrived = dict[str, float]()

    def evaluation(self, step: int) -> None:
        """Request the evaluations due after ``step`` steps, whose policy is already published, and log finished ones.

        After the last step, wait for all pending evaluations. The stage evaluates the last policy itself (`rl_report`).
        """
        last = step >= self._settings.train.steps
        if self._heldout and not last:
            if _due(step, self._settings.tracking.grid_every):
                self._order(step, "grid", self._grid, 1)
            if step and _due(step, self._settings.evaluation.every):
                self._order(step, "eval", self._heldout, self._settings.evaluation.samples_per_prompt)
        self._collect(wait_s=self._settings.experience.deadline_s if last else 0.0)

    def arrived(self) -> dict[str, float]:
        """What the guard against hacking says of the evaluations that have finished."""
        found, self._arrived = self._arrived, {}
        return found

    def needed(self) -> frozenset[int]:
        """With roll_back, the best evaluated step, and those whose evaluation is not known yet."""
        if self._guard is None or self._settings.tracking.action("hacking") != "roll_back":
            return frozenset()
        return frozenset({self._guard.good_step, *(step for step, what, _ in self._pending if what == "eval")})

    def close(self) -> None:
        """Log the evaluations that have finished by now."""
        self._collect(wait_s=0.0)

    def _collect(self, wait_s: float) -> None:
        """Log finished evaluations, after waiting at most `wait_s` for the pending ones."""
        if not self._pending:
            return
        references = [request.reference for _, _, request in self._pending]
        ready, _ = ray.wait(references, num_returns=len(references), timeout=wait_s)
        for step, what, request in [item for item in self._pending if item[2].reference in ready]:
            try:
                self._log(step, what, self._client.wait(request))
            except VersionGoneError as error:  # the stream had to start again
                self._say(f"step {step}: no {what}: {error}")
        self._pending = [item for item in self._pending if item[2].reference not in ready]

    def _order(self, step: int, what: str, records: Sequence[Any], samples: int) -> None:
        self._pending.append((step, what, self._client.request("evaluate", records, samples, version=step)))

    def _log(self, step: int, what: str, evaluation: Evaluation) -> None:
        if what == "grid":
            self._tracker.log_images("samples", step, grid(evaluation, f"step {step}"))
        else:
            self._tracker.log(step, evaluation_metrics(evaluation))
            if self._guard:
                self._arrived |= self._guard.look(step, evaluation)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
