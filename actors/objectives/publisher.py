"""Sends the learner's policy versions to the stream, behind its back, and keeps those that are still needed."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor

from actors.experience.policy.weight_sync import check_transport, publish_weights
from actors.experience.stream import version_of
from actors.experience.stream_client import StreamClient
from actors.learner.protocols import Weights
from actors.messages import Canary, PolicyWeights
from deepgen.config.settings import ExperienceSettings


class Publisher:
    """Rank 0's versions. `learner` names this start of the learner, see `ExperienceStream.publish`."""

    def __init__(self, client: StreamClient, learner: str, experience: ExperienceSettings, deadline_s: float) -> None:
        check_transport(experience.transport)
        self._client, self._learner, self._max_staleness = client, learner, experience.max_staleness
        self._transport, self._deadline_s = experience.transport, deadline_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self.under_way: Future[None] | None = None  # of the last version that `start` was called with
        self._lock = threading.Lock()  # guards _kept and _step
        self._kept: dict[int, PolicyWeights] = {}  # versions that later steps are drawn with, and the last
        self._step = 0  # the learner's next one

    def start(self, version: int, weights: Weights, canary: Canary) -> None:
        """Publish a version in a thread; the weights are its own from now on. The one before is finished first."""
        self.finish()
        self.under_way = self._thread.submit(self.publish, version, weights, canary, version)

    def finish(self) -> None:
        """Wait until the last version is published; raise what went wrong with it."""
        under_way, self.under_way = self.under_way, None
        if under_way is not None:
            under_way.result(timeout=self._deadline_s)

    def check(self) -> None:
        """Raise what went wrong with the last version, without waiting for it."""
        if self.under_way is not None and self.under_way.done():
            self.finish()

    def publish(self, version: int, weights: Weights, canary: Canary, step: int) -> None:
        """Publish a version now. `step`: the learner's next one."""
        published = publish_weights(version, weights, canary, self._transport)
        oldest = version_of(step, self._max_staleness)
        with self._lock:
            self._kept = {v: p for v, p in self._kept.items() if v >= oldest} | {version: published}
            self._step = step
        self.publish_again()

    def publish_again(self) -> None:
        """Tell the stream the versions that steps are drawn with, all at once: it may have started again, unnoticed."""
        with self._lock:
            *earlier, newest = (published for _, published in sorted(self._kept.items()))
            step = self._step
        self._client.ask("publish", newest, step, self._learner, earlier)

    def earlier(self, step: int) -> dict[int, PolicyWeights]:
        """The versions before `step` that the steps from there on are drawn with. It may be under way itself."""
        oldest = version_of(step, self._max_staleness)
        with self._lock:
            return {version: kept for version, kept in sorted(self._kept.items()) if oldest <= version < step}

    def close(self) -> None:
        """Finish what has been started: the stage evaluates the last version next."""
        self._thread.shutdown()
