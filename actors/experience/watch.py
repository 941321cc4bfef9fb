"""Watches a run from inside the experience stream: idle shares of each step, status.json, a word when all is silent.

It knows what moves because rollout fleet and reward pools record their calls in its `Recorder`, and the stream tells it
who asks for batches. It changes nothing: without it, a run would end with the same bits.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from contextlib import suppress

from actors.experience.rollout_fleet import RolloutFleet
from actors.experience.scoring.reward_router import RewardRouter
from actors.experience.step_metrics import StepClock
from deepgen.config import Settings
from deepgen.monitoring.gauges import Gauges
from deepgen.tracking.status import Call, GroupsOfStep, Rank, Status, silence_text, status_to_json, write_status
from deepgen.tracking.timeline import LEARNER, ROLLOUT, Recorder, Span, busy_share

log = logging.getLogger(__name__)

_PERIOD_S = 2.0  # between two status files, unless a step begins


class Watch:
    """See the module. `recorder` is the one that `fleet` and `rewards` record in."""

    def __init__(self, settings: Settings, recorder: Recorder, fleet: RolloutFleet, rewards: RewardRouter) -> None:
        self._folder, self._steps = settings.run.folder, settings.train.steps
        self._groups, self._silence_s = settings.rollout.prompts_per_step, settings.experience.silence_s
        self._recorder, self._fleet, self._rewards = recorder, fleet, rewards
        used = {name: settings.rewards.pools[name] for name in rewards.names}
        self._pools = {name: pool.most_replicas for name, pool in used.items()}
        self._clocks: dict[int, StepClock] = {}
        self._ranks: dict[int, Rank] = {}
        self._waits: list[Span] = []  # of the ranks, since the last batch
        self._handed: tuple[int, float] | None = None  # the step whose batch rank 0 got last, and when
        self._gauges = Gauges(settings.run.name)
        self._said = -math.inf  # when the last word about a silence was said
        self._changed, self._stopped = asyncio.Event(), False
        self._task: asyncio.Task[None] | None = None

    def start(self, newest: Callable[[], int | None]) -> None:
        """Begin to write and to watch. `newest`: the newest published policy version."""
        self._task = asyncio.create_task(self._run(newest))

    async def stop(self, newest: int | None) -> None:
        """Write a last status, which says that the run's stream has ended."""
        if self._task is None:
            return
        self._stopped = True  # no cancel: `wait_for` swallows one that comes together with its event (Python 3.11)
        self._changed.set()
        await self._task
        await self._write(self._status(newest, ended=True))
        self._recorder.flush()

    # -- what the stream tells ---------------------------------------------------------------------------------------

    def step(self, step: int) -> StepClock:
        """The clock of a step whose groups begin."""
        clock = self._clocks[step] = StepClock(self._recorder.clock)
        return clock

    def asked(self, step: int, rank: int) -> None:
        """A learner rank asks for its batch."""
        self._ranks[rank] = Rank(rank, step, True, self._now_moved())
        self._clocks = {number: clock for number, clock in self._clocks.items() if number >= step}
        self._changed.set()

    def handed_out(self, step: int, rank: int) -> dict[str, float]:
        """A rank gets its batch. For rank 0: `idle/<role>` since it got the batch before; {} if there was none."""
        now = self.got(step, rank)
        if rank:
            return {}
        before, self._handed = self._handed, (step, now)
        waits, self._waits = [*self._waits, *(_wait(r) for r in self._ranks.values() if r.waits)], []
        spans = self._recorder.since(before[1] if before else now)
        if before is None or before[0] != step - 1 or now <= before[1]:
            return {}
        idle = {
            f"idle/{role}": 1 - busy_share((s for s in spans if s.role == role), before[1], now, max(1, actors))
            for role, actors in self._actors().items()
        }
        idle[f"idle/{LEARNER}"] = busy_share(waits, before[1], now, len(self._ranks))
        for key, share in idle.items():
            self._gauges.set("deepgen_idle_share", share, key.removeprefix("idle/"))
        return idle

    def got(self, step: int, rank: int) -> float:
        """A rank gets what it asked for, a whole batch or one group of it. Returns the time."""
        now = self._now_moved()
        self._waits.append(_wait(self._ranks[rank], now))
        self._ranks[rank] = Rank(rank, step, False, now)
        self._changed.set()
        return now

    def _now_moved(self) -> float:
        self._recorder.moved = self._recorder.clock()
        return self._recorder.moved

    # -- status and silence ------------------------------------------------------------------------------------------

    async def _run(self, newest: Callable[[], int | None]) -> None:
        while not self._stopped:
            self._changed.clear()
            status = self._status(newest())
            self._show(status)
            await self._write(status)
            self._recorder.flush()
            quiet_since = self._recorder.moved
            if status.time - max(quiet_since, self._said) >= self._silence_s:
                self._said = status.time
                log.warning("%s", silence_text(status, status.time - quiet_since))
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), min(_PERIOD_S, self._silence_s))

    def _show(self, status: Status) -> None:
        """For Prometheus, what the status says."""
        if not self._gauges.on:
            return
        self._gauges.pools(self._rewards.counters(), status.open_requests)
        self._gauges.set("deepgen_rollout_actors", status.actors[ROLLOUT])
        if status.version is not None:
            self._gauges.set("deepgen_policy_version", status.version)

    async def _write(self, status: Status) -> None:
        try:
            await asyncio.to_thread(write_status, self._folder, status_to_json(status))
        except OSError as error:
            log.warning("cannot write the status of the run to %s: %s", self._folder, error.strerror or error)

    def _actors(self) -> dict[str, int]:
        return {ROLLOUT: self._fleet.working, **self._pools}

    def _status(self, newest: int | None, *, ended: bool = False) -> Status:
        counters = self._rewards.counters()

        def of_pools(key: str) -> dict[str, int]:
            return {name: int(counters[f"pool/{name}/{key}"]) for name in self._rewards.names}

        return Status(
            time=self._recorder.clock(),
            ended=ended,
            steps=self._steps,
            version=newest,
            actors=self._actors(),
            calls=tuple(Call(span.actor, span.call, span.begin) for span in self._recorder.open()),
            under_way=tuple(
                GroupsOfStep(step, self._groups, clock.sampled_groups, clock.scored_groups)
                for step, clock in sorted(self._clocks.items())
            ),
            learner=tuple(rank for _, rank in sorted(self._ranks.items())),
            open_requests=self._rewards.open_requests(),
            missing=of_pools("missing"),
            restarts={ROLLOUT: self._fleet.restarts} | of_pools("restarts"),
        )


def _wait(rank: Rank, end: float = math.inf) -> Span:
    """The wait of a rank for its batch, which has lasted since it asked."""
    return Span(f"{LEARNER} {rank.rank}", LEARNER, "wait", rank.since, end, step=rank.step)
