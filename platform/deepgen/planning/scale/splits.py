"""How the GPUs of a cluster are split between the roles of an rl run, and what a step of a split takes at least.

The times here are bounds by arithmetic: of each role, as if nobody waited for anybody. They sort out which of many
splits are worth simulating (`actors.simulation`), which tells what a step really takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from deepgen.config import PoolSettings, Settings
from deepgen.planning.processes import cards
from deepgen.planning.scale.phases import Phases

_HALVINGS = 60  # of an interval of times, in a search
_SAME = 1.01  # steps whose times differ by less are equally long


@dataclass(frozen=True)
class Split:
    """Processes of each role: learner workers, rollout actors, and replicas by the name of the reward's pool."""

    workers: int
    actors: int
    replicas: Mapping[str, int] = field(hash=False)

    def gpus(self, settings: Settings) -> int:
        """GPUs that it takes; parts of GPUs lie side by side."""
        return self.workers + self.actors + reward_gpus(settings, self.replicas)


def reward_gpus(settings: Settings, replicas: Mapping[str, int]) -> int:
    """GPUs of so many replicas of each pool."""
    return cards(settings.rewards.pools[name].gpus for name, count in replicas.items() for _ in range(count))


@dataclass(frozen=True)
class Load:
    """What a step asks of the roles.

    asked: share of the groups that each reward scores, by pool. compared: pools that score a group in one call.
    """

    settings: Settings
    phases: Phases
    asked: Mapping[str, float]
    compared: frozenset[str] = frozenset()

    @property
    def groups(self) -> int:
        return self.settings.rollout.prompts_per_step

    @property
    def staleness(self) -> int:
        return self.settings.experience.max_staleness

    def pool(self, name: str) -> PoolSettings:
        return self.settings.rewards.pools[name]

    # -- seconds of a step, by role ----------------------------------------------------------------------------------

    def draw_s(self, actors: int) -> float:
        """Of the rollout actors. On-policy all groups begin together and the last actor counts."""
        each = self.groups / actors if self.staleness else math.ceil(self.groups / actors)
        return each * self.phases.sample_s + self.phases.load_s

    def score_s(self, name: str, replicas: int) -> float:
        """Of the replicas of a reward, in full calls."""
        images = self.asked[name] * self.groups * self.settings.rollout.group_size
        call = self.phases.score_s[name]
        least = self.settings.rollout.group_size if name in self.compared else 1.0
        full = max(least, min(self.pool(name).batch_size, images / replicas))
        return images / full * call.of(full) / replicas

    def update_s(self, workers: int) -> float:
        """Of the learner's forwards and backwards."""
        return math.ceil(self.groups / workers) * self.phases.update_s

    def tail_s(self, replicas: Mapping[str, int]) -> float:
        """From the moment when the last group is drawn until it is scored, if the pools are idle then."""
        size = self.settings.rollout.group_size
        return max(
            (
                self.phases.score_s[name].of(size if name in self.compared else math.ceil(size / count))
                for name, count in replicas.items()
                if self.asked[name]
            ),
            default=0.0,
        )

    def step_s(self, split: Split) -> float:
        """Of a whole step."""
        phases, tail = self.phases, self.tail_s(split.replicas)
        scores = [self.score_s(name, count) for name, count in split.replicas.items()]
        draw, score, update = self.draw_s(split.actors), max(scores, default=0.0), self.update_s(split.workers)
        control = self.groups * phases.control_s
        first = phases.sample_s + phases.load_s
        way = phases.step_s + phases.publish_s + phases.sync_s
        if not self.staleness and self.settings.overlap().pieces:
            own = phases.update_s
            return (
                max(draw + tail + own, control + first + tail + own, first + score + own, first + tail + update) + way
            )
        chain = max(draw + tail, first + tail, control + first + tail, first + score) + update + way
        if not self.staleness:
            return chain
        learner = update + phases.step_s + phases.publish_s
        return max(draw, score, control, learner, phases.sync_s, chain / (self.staleness + 1))


# ---- The search ----


def best_splits(load: Load, gpus: int, counts: Sequence[int]) -> list[Split]:
    """For each possible number of learner workers the best splits of at most `gpus` GPUs, the shortest step first.

    Of numbers with equally long steps, the one with the fewest GPUs comes first. For each there is the smallest split
    with such a step, and then the one that gives rollouts and rewards what GPUs are left: steps that bunch up may need
    it. counts: numbers of workers to try. Empty if `gpus` are too few for all roles.
    """
    pairs = [pair for workers in counts if (pair := _splits(load, gpus, workers))]
    if not pairs:
        return []
    fastest = min(load.step_s(small) for small, _ in pairs)

    def order(pair: tuple[Split, Split]) -> tuple[float, int]:
        step = load.step_s(pair[0])
        return (0.0 if step <= fastest * _SAME else step), pair[0].gpus(load.settings)

    splits = [split for pair in sorted(pairs, key=order) for split in pair]
    return [split for number, split in enumerate(splits) if split not in splits[:number]]


def _splits(load: Load, gpus: int, workers: int) -> tuple[Split, Split] | None:
    """The split with so many workers whose slowest role, rollouts or a reward, is as fast as the rest allows.

    Before it, the smallest one whose step is as long. None if the GPUs are too few.
    """
    low, high = 0.0, max(load.draw_s(1), *(load.score_s(name, 1) for name in load.asked), 1e-6)
    best = Split(workers, 1, dict.fromkeys(load.asked, 1))
    if best.gpus(load.settings) > gpus:
        return None
    slowest = high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        split = _within(load, middle, workers)
        if split is not None and split.gpus(load.settings) <= gpus:
            best, high = split, middle
        else:
            low = middle
    return _smallest(load, best, high, slowest), best


def _smallest(load: Load, best: Split, low: float, high: float) -> Split:
    """A split with fewer processes, whose step is as long: where something else decides, rollouts may be slower.

    low, high: limits of the time of rollouts and rewards, the first of them that of `best`.
    """
    limit_s = load.step_s(best) * _SAME
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        split = _within(load, middle, best.workers)
        if split is not None and load.step_s(split) <= limit_s:
            best, low = split, middle
        else:
            high = middle
    return best


def _within(load: Load, limit_s: float, workers: int) -> Split | None:
    """The smallest split whose rollouts and rewards take at most `limit_s`; None if no number of processes does."""
    most = load.groups * (load.staleness + 1)
    actors = _fewest(load.draw_s, limit_s, most)
    found = {name: _fewest(partial(load.score_s, name), limit_s, most) for name in load.asked}
    replicas = {name: count for name, count in found.items() if count is not None}
    if actors is None or len(replicas) < len(found):
        return None
    return Split(workers, actors, replicas)


def _fewest(seconds: Callable[[int], float], limit_s: float, most: int) -> int | None:
    """The smallest count from 1 to `most` with which it takes at most `limit_s`; more never take longer."""
    if seconds(most) > limit_s:
        return None
    low, high = 0, most  # `low` are too few
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if seconds(middle) <= limit_s else (middle, high)
    return high
