"""Some steps of an rl run in virtual time: the platform's stream, fleet, turns, reward pools and queue do the
scheduling; rollout actors, replicas and learner only take the time that `Phases` says.

A node has processes of one role only. Left out: a stream that dies, the network between nodes, groups and pictures that
take longer than others, evaluations, and the way from a run's start to its first step.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.experience.stream import ExperienceStream
from actors.simulation.stand_ins import Asked, Control, Node, TimedActor, TimedReplica
from actors.simulation.timed_learner import TimedLearner
from actors.simulation.virtual_clock import run_virtual
from deepgen.cluster.resources import Placement
from deepgen.config import PoolSettings, Settings
from deepgen.data.records import Record
from deepgen.planning.scale.phases import Phases
from deepgen.planning.scale.splits import Split
from deepgen.tracking.timeline import LEARNER, ROLLOUT, Recorder

NEVER_S = 1e9  # stands for all deadlines: the simulation says how long things take, not whether that is allowed
WARM_UP, MEASURED = 2, 2  # steps; with max_staleness, as many more fill the pipeline
_PER_NODE = 8  # replicas without a GPU on a node


@dataclass(frozen=True)
class Death:
    """A node of a role dies, `at` seconds after the begin. role: learner, rollout, or a reward's pool."""

    at: float
    role: str
    node: int = 0


@dataclass(frozen=True)
class Outcome:
    """What became of the steps. ends: when each was done, in seconds since the begin.

    idle: share of time without work by role, as `idle/<role>` in a run's metrics, mean over the measured steps.
    """

    ends: tuple[float, ...]
    idle: Mapping[str, float]
    lives: int  # of the learner
    first: int  # measured step, whose predecessors fill the pipeline
    replaced: int = field(default=0)  # rollout actors that started again

    @property
    def step_s(self) -> float:
        """Mean seconds of a measured step."""
        return (self.ends[-1] - self.ends[self.first - 1]) / (len(self.ends) - self.first)


def simulate(
    settings: Settings,
    split: Split,
    phases: Phases,
    tasks: Sequence[str],
    *,
    steps: int | None = None,
    deaths: Sequence[Death] = (),
    node_gpus: int = 8,
) -> Outcome:
    """Run some steps. tasks: of the prompts, in turn. steps: None for as many as a mean needs; at least 2."""
    first = WARM_UP + settings.experience.max_staleness
    steps = first + MEASURED if steps is None else steps
    first = min(first, steps - 1)
    fitted = _fitted(settings, split, steps)
    log = logging.getLogger("actors.experience")
    before = log.level
    log.setLevel(logging.CRITICAL)  # deaths are planned here
    try:
        return run_virtual(_run(fitted, phases, tasks, deaths, node_gpus, first))
    finally:
        log.setLevel(before)


async def _run(
    settings: Settings, phases: Phases, tasks: Sequence[str], deaths: Sequence[Death], node_gpus: int, first: int
) -> Outcome:
    loop = asyncio.get_running_loop()
    places = _Places(settings, phases, node_gpus)
    stream = ExperienceStream(
        settings,
        _records(tasks, settings.rollout.prompts_per_step),
        places.actors(),
        resume=False,
        recorder=Recorder(clock=loop.time),
        replica=places.replica,
    )
    await stream.start()
    learner = TimedLearner(settings, phases, stream)
    for death in deaths:
        if death.role == LEARNER:
            loop.call_at(death.at, learner.die)
        else:
            loop.call_at(death.at, places.nodes(death.role)[death.node].die, phases.revive_s)
    await learner.run()
    ends = tuple(learner.ends[step] for step in range(settings.train.steps))
    await stream.stop()
    replaced = int(max(metrics["rollout/restarts"] for metrics in learner.metrics.values()))
    return Outcome(ends, _idle(learner.metrics, first), learner.lives, first, replaced)


class _Places:
    """Which process is on which node."""

    def __init__(self, settings: Settings, phases: Phases, node_gpus: int) -> None:
        self._settings, self._phases, self._node_gpus = settings, phases, node_gpus
        self._nodes: dict[str, list[Node]] = {}

    def nodes(self, role: str) -> list[Node]:
        """The nodes of a role."""
        return self._nodes[role]

    def _node(self, role: str, number: int) -> Node:
        nodes = self._nodes.setdefault(role, [])
        while len(nodes) <= number:
            nodes.append(Node(f"{role} {len(nodes)}"))
        return nodes[number]

    def actors(self) -> dict[str, Any]:
        """The rollout actors by name."""
        control = Control(self._phases.control_s)
        more = self._phases, Asked(self._settings.rewards), self._settings.rollout.group_size, control
        names = [f"{ROLLOUT}-{number}" for number in range(self._settings.rollout.most_actors)]
        return {
            name: TimedActor(name, self._node(ROLLOUT, number // self._node_gpus), *more)
            for number, name in enumerate(names)
        }

    def replica(self, label: str, settings: PoolSettings, placement: Placement) -> TimedReplica:
        """A replica of a pool, on the node of its number."""
        number = int(label.rpartition("#")[2])
        each = max(1, int(self._node_gpus / settings.gpus)) if settings.gpus else _PER_NODE
        name = settings.pool_name
        node, time = self._node(name, number // each), self._phases.score_s[name]
        return TimedReplica(label, settings, placement, node=node, time=time)


def _fitted(settings: Settings, split: Split, steps: int) -> Settings:
    """The settings of a simulated run: those of the split, without deadlines and files."""
    pools = {
        name: pool.model_copy(
            update={"replicas": split.replicas.get(name, 1), "environment": [], "deadline_s": NEVER_S}
        )
        for name, pool in settings.rewards.pools.items()
    }
    sections: dict[str, dict[str, Any]] = {
        "train": {"workers": split.workers, "steps": steps},
        "rollout": {"actors": split.actors},
        "rewards": {"pools": pools},
        "experience": {"deadline_s": NEVER_S, "journal": 0.0},
        "cluster": {"start_deadline_s": NEVER_S},
    }
    return settings.model_copy(
        update={name: getattr(settings, name).model_copy(update=changes) for name, changes in sections.items()}
    )


def _records(tasks: Sequence[str], count: int) -> list[Record]:
    """As many prompts as a step has, so that all steps have the same tasks. An edit has no picture here."""
    chosen = [tasks[number % len(tasks)] for number in range(count)]
    return [Record(str(number), task, "a prompt", "", None, (), "") for number, task in enumerate(chosen)]


def _idle(metrics: Mapping[int, Mapping[str, float]], first: int) -> dict[str, float]:
    """Mean over the measured steps of each `idle/<role>`, by role."""
    found: dict[str, list[float]] = {}
    for step, of_step in metrics.items():
        for name, value in of_step.items():
            if step >= first and name.startswith("idle/"):
                found.setdefault(name.removeprefix("idle/"), []).append(value)
    return {role: math.fsum(values) / len(values) for role, values in found.items()}
