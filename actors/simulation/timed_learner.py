"""A learner that only takes time: its ranks, its publisher and its checkpoints, against a real `ExperienceStream`.

The order of waits is that of `TrainingLoop.run_step`, `ExperienceSource.next` and `Publisher`; those three block
threads of a Ray process, so they cannot run in an event loop.
"""

from __future__ import annotations

import asyncio
from typing import Any

from actors.experience.rollout_fleet import RolloutError
from actors.experience.stream import ExperienceStream, version_of
from actors.messages import Canary, Group, PolicyWeights, RankBatch
from deepgen.config import Settings
from deepgen.planning.scale.phases import Phases

_MOST_LIVES = 1000


class TimedLearner:
    """Trains on the stream's batches for `train.steps`.

    It goes on from the newest whole checkpoint after `die`, or when the stream cannot make its batch, as Ray Train
    starts a learner again (`train.max_failures`).

    ends: when each step was done, by step; one that was done again has its last time. metrics: of rank 0's batches, by
    step. lives: how often it has started.
    """

    def __init__(self, settings: Settings, phases: Phases, stream: ExperienceStream) -> None:
        self._settings, self._phases, self._stream = settings, phases, stream
        self._world, self._steps = settings.train.workers, settings.train.steps
        self._pieces = settings.overlap().pieces
        self.ends: dict[int, float] = {}
        self.metrics: dict[int, dict[str, float]] = {}
        self.lives = 0
        self._saved: list[tuple[int, float, dict[str, Any]]] = []  # step, when it is on disk, the stream's state
        self._sending: asyncio.Task[None] | None = None
        self._life: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Take all steps, and again those that a death undoes."""
        while True:
            self._life = asyncio.ensure_future(self._live())
            await asyncio.wait({self._life})
            if not self._life.cancelled() and not isinstance(self._life.exception(), RolloutError):
                return self._life.result()
            if self.lives >= _MOST_LIVES:
                raise RuntimeError(f"the learner has started {self.lives} times and gets nowhere")
            if self._sending is not None:
                self._sending.cancel()
            await asyncio.sleep(self._phases.restart_s)

    def die(self) -> None:
        """A node of the learner dies."""
        if self._life is not None:
            self._life.cancel()

    async def _live(self) -> None:
        self.lives += 1
        now = asyncio.get_running_loop().time()
        self._saved = [saved for saved in self._saved if saved[1] <= now]
        start = 0
        if self._saved:
            start, _, state = self._saved[-1]
            await self._stream.restore(state)
        for version in range(version_of(start, self._settings.experience.max_staleness), start + 1):
            await self._send(version, start)
        await self._stream.begin()
        for step in range(start, self._steps):
            await self._step(step)
        if self._sending is not None:
            await self._sending

    async def _step(self, step: int) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(self._rank(step, rank) for rank in range(self._world)))
        await asyncio.sleep(self._phases.step_s)
        if self._sending is not None:
            await self._sending  # one version at a time
        await asyncio.sleep(self._phases.publish_s)
        self._sending = asyncio.ensure_future(self._send(step + 1, step + 1))
        if (step + 1) % self._settings.train.checkpoint_every == 0:
            await self._save(step + 1)
        self.ends[step] = loop.time()

    async def _rank(self, step: int, rank: int) -> None:
        """Wait for a rank's share of a step, and work on it: group by group, or when it is whole."""
        groups: list[Group] = []
        if self._pieces:
            for position in range(rank, self._settings.rollout.prompts_per_step, self._world):
                groups.append(await self._stream.next_group(step, position, self._name))
                await self._fetch(groups[-1])
                await asyncio.sleep(self._phases.update_s)
        batch: RankBatch = await self._stream.next_batch(step, rank, self._world, self._name)
        if rank == 0:
            self.metrics[step] = batch.metrics
        if not self._pieces:
            for group in batch.groups:
                await self._fetch(group)
            await asyncio.sleep(self._phases.update_s * len(batch.groups))

    async def _fetch(self, group: Group) -> None:
        """Read a trajectory, which takes no time of its own; one that was lost is drawn again."""
        trajectory = group.trajectory
        while trajectory.lost:
            (trajectory,) = await self._stream.draw_again(group.step, group.number, self._name)

    async def _send(self, version: int, step: int) -> None:
        """Publish a version, behind the learner's back. The first one of a run is the folder that all have read."""
        if version:
            await asyncio.sleep(self._phases.sync_s)
        published = PolicyWeights(version, f"{version} of life {self.lives}", (), (), Canary(0.0, None))
        await self._stream.publish(published, step, self._name)

    async def _save(self, step: int) -> None:
        loop = asyncio.get_running_loop()
        if self._saved:
            await asyncio.sleep(max(0.0, self._saved[-1][1] - loop.time()))  # one checkpoint at a time
        await asyncio.sleep(self._phases.checkpoint_s)
        self._saved.append((step, loop.time() + self._phases.write_s, await self._stream.state(step)))

    @property
    def _name(self) -> str:
        return f"life {self.lives}"
