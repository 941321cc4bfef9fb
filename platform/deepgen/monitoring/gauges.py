"""A run's metrics for Prometheus, on the endpoints that every Ray node has for them (docs/operations.md).

Ray puts `ray_` before each name and adds its own labels (node, session, worker). Only where DEEPGEN_METRICS is 1: for
the workers on a cluster that is joined. A private cluster ends with the program, and nobody would ask it.

Ray forgets a gauge that has not been set for 20 s, which is right for processes that are gone, but a step may take
longer. So a thread sets each again to what it was.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

from deepgen.monitoring.variables import METRICS

RUN = "run"  # the label of all
REFRESH_S = 5.0


class Declared(NamedTuple):
    """counts: whether it is a counter. labels: besides RUN."""

    text: str
    labels: tuple[str, ...] = ()
    counts: bool = False


DECLARED = {
    "deepgen_images_total": Declared("Images trained on", counts=True),
    "deepgen_step": Declared("Finished optimizer steps"),
    "deepgen_step_seconds": Declared("Seconds of the last step in a phase", ("phase",)),
    "deepgen_staleness_versions": Declared("Largest age of the last step's samples, in policy versions"),
    "deepgen_idle_share": Declared("Share of the last step without a call, mean over the actors of a role", ("role",)),
    "deepgen_missing_rewards_total": Declared("Images without a score", ("reward", "reason"), counts=True),
    "deepgen_open_requests": Declared("Images that wait for a score or are being scored", ("reward",)),
    "deepgen_policy_version": Declared("Newest published policy version"),
    "deepgen_rollout_actors": Declared("Rollout actors that could get a call"),
}


class Gauges:
    """Sets and counts the metrics of one run in one process; does nothing where they are off."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._made: dict[str, Any] = {}
        self._totals: dict[tuple[str, ...], float] = {}
        self._values: dict[tuple[str, ...], float] = {}  # of gauges, by name and labels
        self._refresher: threading.Thread | None = None
        self.on = os.environ.get(METRICS) == "1" and "ray" in sys.modules

    def set(self, name: str, value: float, *labels: str) -> None:
        """labels: values of the declared ones, in order."""
        if not self.on:
            return
        self._metric(name).set(value, self._tags(name, labels))
        self._values[name, *labels] = value
        if self._refresher is None:
            self._refresher = threading.Thread(target=self._keep_alive, name="gauges", daemon=True)
            self._refresher.start()

    def refresh(self) -> None:
        """Set all gauges to what they were set to last."""
        for (name, *labels), value in list(self._values.items()):
            self._metric(name).set(value, self._tags(name, tuple(labels)))

    def _keep_alive(self) -> None:
        import ray

        pause = threading.Event()
        while ray.is_initialized() and not pause.wait(REFRESH_S):
            self.refresh()

    def add(self, name: str, amount: float, *labels: str) -> None:
        """Count on. An amount of 0 or less changes nothing."""
        if self.on and amount > 0:
            self._metric(name).inc(amount, self._tags(name, labels))

    def add_up_to(self, name: str, total: float, *labels: str) -> None:
        """Count on to a total since the start of what is counted. One that falls has started again at 0."""
        before = self._totals.get((name, *labels), 0.0)
        self._totals[name, *labels] = total
        self.add(name, total - before if total >= before else total, *labels)

    def step(self, done: int, images: float, metrics: Mapping[str, float]) -> None:
        """What a learner knows after `done` steps. images: trained on in this one. metrics: its, as in MLflow."""
        self.set("deepgen_step", done)
        self.add("deepgen_images_total", images)
        if "policy/staleness_max" in metrics:
            self.set("deepgen_staleness_versions", metrics["policy/staleness_max"])
        for key, seconds in metrics.items():
            if key.startswith("time/") and key.endswith("_s"):
                self.set("deepgen_step_seconds", seconds, key.removeprefix("time/").removesuffix("_s"))

    def pools(self, counters: Mapping[str, float], waiting: Mapping[str, int]) -> None:
        """What the experience stream knows of its rewards. counters: `pool/<reward>/<key>`; waiting: open requests."""
        for reward, number in waiting.items():
            self.set("deepgen_open_requests", number, reward)
            start = f"pool/{reward}/missing/"
            for key, total in counters.items():
                if key.startswith(start):
                    self.add_up_to("deepgen_missing_rewards_total", total, reward, key.removeprefix(start))

    def _metric(self, name: str) -> Any:
        if name not in self._made:
            from ray.util.metrics import Counter, Gauge

            declared = DECLARED[name]
            kind = Counter if declared.counts else Gauge
            self._made[name] = kind(name, declared.text, (RUN, *declared.labels))
        return self._made[name]

    def _tags(self, name: str, labels: tuple[str, ...]) -> dict[str, str]:
        return dict(zip((RUN, *DECLARED[name].labels), (self._run, *labels), strict=True))
