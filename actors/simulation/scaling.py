"""The best split of so many GPUs, by arithmetic first and then by simulation, and what a run with it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from actors.simulation.simulated_run import Death, Outcome, simulate
from actors.simulation.stand_ins import Asked
from deepgen.config import Settings
from deepgen.errors import UserError
from deepgen.planning.scale.effective_time import DAY_S, Losses, checkpoint_interval, simulated_share
from deepgen.planning.scale.phases import Phases
from deepgen.planning.scale.splits import Load, Split, best_splits, reward_gpus
from deepgen.tracking.timeline import ROLLOUT
from rewards import is_groupwise

CANDIDATES, FEW_GROUPS = 4, 256  # splits simulated for steps of at most so many groups
FEW_CANDIDATES = 2  # of larger ones
MOMENTS = (1 / 6, 1 / 2, 5 / 6)  # of a step, at which a node dies; of large steps, the middle one
_SAME = 1.01  # steps whose times differ by less are equally long


@dataclass(frozen=True)
class Cluster:
    """node_gpus: of one node; failures: share of the nodes that die in a day."""

    node_gpus: int
    failures: float

    def nodes(self, gpus: float) -> int:
        """Nodes of a role with so many GPUs."""
        return math.ceil(gpus / self.node_gpus)

    def rate(self, nodes: int) -> float:
        """Deaths a second of so many nodes."""
        return self.failures * nodes / DAY_S


@dataclass(frozen=True)
class Prediction:
    """A run on a cluster. settings: with the number of groups and the staleness; every: steps between checkpoints.

    ettr: effective training time, as `effective_time` defines it; losses: what it is made of.
    """

    settings: Settings
    gpus: int
    split: Split
    outcome: Outcome
    every: int
    ettr: float
    losses: Losses

    @property
    def used(self) -> int:
        """GPUs that have work."""
        return self.split.gpus(self.settings)

    @property
    def images_s(self) -> float:
        """Images drawn and trained on in a second, without failures."""
        return self.settings.rollout.prompts_per_step * self.settings.rollout.group_size / self.outcome.step_s

    @property
    def hours(self) -> float:
        """Of the whole run, with failures; without evaluations."""
        return self.settings.train.steps * self.outcome.step_s / self.ettr / 3600 if self.ettr else math.inf


class Scaling:
    """Predictions for one recipe. What it has simulated once it knows, as more GPUs may not help.

    tasks: of the prompts, in turn. fits: whether a learner of so many workers fits its GPUs. say: gets a line when work
    begins that may take long.
    """

    def __init__(
        self,
        phases: Phases,
        tasks: Sequence[str],
        cluster: Cluster,
        fits: Callable[[int], bool],
        say: Callable[[str], None],
    ) -> None:
        self._phases, self._tasks, self._cluster, self._fits, self._say = phases, tasks, cluster, fits, say
        self._outcomes: dict[str, Outcome] = {}
        self._losses: dict[str, Losses] = {}

    def predict(self, settings: Settings, gpus: int) -> Prediction:
        """What a run on at most so many GPUs does, with the split that makes its steps shortest.

        Raises UserError if the GPUs are too few.
        """
        asked = Asked(settings.rewards).shares(self._tasks)
        compared = frozenset(name for name in asked if is_groupwise(settings.rewards.pools[name]))
        load = Load(settings, self._phases, asked, compared)
        found = self._candidates(load, gpus)
        outcomes = [self._simulated(settings, split, gpus) for split in found]
        fastest = min(outcome.step_s for outcome in outcomes)
        equal = [pair for pair in zip(found, outcomes, strict=True) if pair[1].step_s <= fastest * _SAME]
        split, outcome = min(equal, key=lambda pair: pair[0].gpus(settings))
        losses = self._lost(settings, split, outcome, gpus)
        every = checkpoint_interval(losses, settings.train.steps)
        share = simulated_share(losses, every, settings.train.steps, settings.run.seed)
        return Prediction(settings, gpus, split, outcome, every, share, losses)

    def _candidates(self, load: Load, gpus: int) -> list[Split]:
        settings = load.settings
        unit = load.groups // settings.algorithm.updates_per_batch
        divisors = [count for count in range(1, min(unit, gpus) + 1) if unit % count == 0]
        counts = [count for count in divisors if self._fits(count)]
        found = best_splits(load, gpus, counts)
        if not found:
            least = min(counts, default=0) + 1 + reward_gpus(settings, dict.fromkeys(load.asked, 1))
            why = (
                f"a learner that fits, an actor and the rewards need {least}"
                if counts
                else "no learner fits, see --plan"
            )
            raise UserError(f"--simulate: GPUs={gpus} are too few for {settings.run.name}: {why}")
        return found[: CANDIDATES if load.groups <= FEW_GROUPS else FEW_CANDIDATES]

    def _simulated(self, settings: Settings, split: Split, gpus: int) -> Outcome:
        key = _key(settings, split)
        if key not in self._outcomes:
            self._say(f"{gpus} GPUs: simulating {key}")
            self._outcomes[key] = self._simulate(settings, split)
        return self._outcomes[key]

    def _simulate(self, settings: Settings, split: Split, *deaths: Death) -> Outcome:
        return simulate(settings, split, self._phases, self._tasks, deaths=deaths, node_gpus=self._cluster.node_gpus)

    def _lost(self, settings: Settings, split: Split, healthy: Outcome, gpus: int) -> Losses:
        """What deaths cost: those of learner nodes by the phases, the others as the simulated steps take longer."""
        key = _key(settings, split)
        if key in self._losses:
            return self._losses[key]
        self._say(f"{gpus} GPUs: nodes die, with {key}")
        moments = MOMENTS if settings.rollout.prompts_per_step <= FEW_GROUPS else MOMENTS[1:2]
        begin, cluster, phases = healthy.ends[healthy.first - 1], self._cluster, self._phases
        others = []
        for role, nodes in _nodes(settings, split, cluster).items():
            seconds = 0.0
            for moment in moments if cluster.failures else ():
                death = Death(begin + moment * healthy.step_s, role)
                disturbed = self._simulate(settings, split, death)
                seconds += max(0.0, disturbed.ends[-1] - healthy.ends[-1]) / len(moments)
            others.append((cluster.rate(nodes), seconds))
        learner = cluster.rate(cluster.nodes(split.workers))
        self._losses[key] = Losses(
            healthy.step_s, phases.checkpoint_s, phases.write_s, phases.restart_s, learner, tuple(others)
        )
        return self._losses[key]


def _nodes(settings: Settings, split: Split, cluster: Cluster) -> Mapping[str, int]:
    """Nodes by role, of the rollouts and of the rewards that have GPUs."""
    pools = {name: settings.rewards.pools[name].gpus * count for name, count in split.replicas.items()}
    return {ROLLOUT: cluster.nodes(split.actors)} | {name: cluster.nodes(gpus) for name, gpus in pools.items() if gpus}


def _key(settings: Settings, split: Split) -> str:
    """What tells a simulated run of a recipe from another, for a person, too."""
    rewards = ", ".join(f"{name} {count}" for name, count in split.replicas.items())
    steps = f"{settings.rollout.prompts_per_step} groups, max_staleness {settings.experience.max_staleness}"
    return f"{steps}, learner {split.workers}, rollout {split.actors}, {rewards}"
