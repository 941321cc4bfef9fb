"""Alarms of an rl run: rules on the metrics of its steps that say when something has gone wrong quietly.

At the end of a run of any stage, `last_words` says what its result should not be trusted for.

Pure: metrics in, news out. An alarm begins when its value has been out of range in PATIENCE steps in a row (`hacking`:
in one evaluation, as its value allows for the number of looks), and ends when it has been in range in as many. A metric
that a step does not have changes nothing: missing is neither good nor bad.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from deepgen.config.schema.sections import ALARMS, TrackingSettings

PATIENCE = 3  # steps; one odd batch is no alarm
EXPLODED = 10.0  # times the loss of the first steps
_ENDS = 5  # steps at either end of a run whose median loss is compared
# The policy loss is about 0 at any time, so the sum with it is compared with 1 at least.
_LOSSES = {"loss/flow_matching": 0.0, "loss/sft": 0.0, "loss/total": 1.0}
BASE_STEPS = 3  # first steps of a run, whose mean is what later steps are compared with
AGREEMENT_STEPS, AGREEMENT_LEAST = 10, 6  # newest steps whose agreement is averaged, and how few say something
_ERRORS = 3.0  # standard errors that a mean agreement may lie below its true value

CHANCE, GOOD_STEP = "hacking/chance", "hacking/good_step"  # metrics, see `deepgen.evaluation.hacking`

Metrics = Mapping[str, float]


class News(NamedTuple):
    """An alarm that begins or ends."""

    name: str
    line: str  # for the console
    tag: str  # for MLflow
    begins: bool


@dataclass
class _State:
    on: bool = False
    streak: int = 0  # steps in a row that say otherwise
    streak_since: int = 0
    since: int = 0  # first step of the alarm that is on
    first: dict[str, list[float]] = field(default_factory=dict)  # values of the first steps, by metric
    recent: dict[str, deque[float]] = field(default_factory=dict)  # of the newest ones


class Rule(NamedTuple):
    """value: of a step's metrics, None if they have none. below: bad are small values. patience: steps in a row."""

    value: Callable[[Metrics, _State], float | None]
    text: str  # what a value means
    below: bool = False
    patience: int = PATIENCE


def _metric(name: str) -> Callable[[Metrics, _State], float | None]:
    """The metric of this name, or with a slash at the end the largest of all that begin so."""
    return lambda metrics, state: max(_found(metrics, name).values(), default=None)


def _of_start(name: str) -> Callable[[Metrics, _State], float | None]:
    """The metric as a share of its mean in the first BASE_STEPS steps."""
    return lambda metrics, state: _share_of_start(state, name, metrics.get(name, math.nan))


def _saturation(metrics: Metrics, state: _State) -> float | None:
    """Spread within groups that is left of the first steps' to a reward that has risen since, the least of all.

    A share of a spread: it does not depend on the reward's range, whose end need not be known.
    """
    left = []
    for name, spread in _found(metrics, "reward_spread/").items():
        reward = name.replace("reward_spread/", "reward/")
        share = _share_of_start(state, name, spread)
        mean, start = metrics.get(reward, math.nan), _start(state, reward, metrics.get(reward, math.nan))
        if share is not None and start is not None:
            left.append(share if mean > start else 1.0)
    return min(left, default=None)


def _agreement(metrics: Metrics, state: _State) -> float | None:
    """Agreement of a trained reward with a held-out one in the newest steps, at best; the least of all pairs."""
    best = []
    for name, value in _found(metrics, "agreement/").items():
        recent = state.recent.setdefault(name, deque(maxlen=AGREEMENT_STEPS))
        recent.append(value)
        if len(recent) >= AGREEMENT_LEAST:
            best.append(statistics.fmean(recent) + _ERRORS * statistics.stdev(recent) / len(recent) ** 0.5)
    return min(best, default=None)


RULES = {
    "zero_spread": Rule(
        _metric("advantage/zero_spread/"), "of the groups get equal scores from a reward and learn nothing"
    ),
    "missing": Rule(_metric("reward_missing_share/"), "of the scores of a reward are missing"),
    "clip_share": Rule(_metric("policy/clip_share"), "of the samples are clipped"),
    "ratio": Rule(_metric("policy/ratio_deviation_max"), "is how far a probability ratio is off 1"),
    "kl": Rule(_metric("policy/kl"), "is the KL to the initial model"),
    "diversity": Rule(
        _of_start("rollout/diversity"), "of the first steps' diversity is left in the groups", below=True
    ),
    "saturation": Rule(
        _saturation, "of the first steps' spread is left in the groups to a reward that has risen", below=True
    ),
    "disagreement": Rule(
        _agreement, "at best is the rank correlation of a trained reward with a held-out one", below=True
    ),
    "hacking": Rule(
        _metric(CHANCE),
        "is the chance that held-out rewards fall so while trained ones rise, though none is hacked",
        below=True,
        patience=1,
    ),
    "object_store": Rule(_metric("object_store/used_share"), "of the cluster's object store is in use"),
}
assert RULES.keys() == ALARMS.keys()


class Alarms:
    """The alarms of a run, with the limits of tracking.alarms."""

    def __init__(self, settings: TrackingSettings) -> None:
        self._limits = {name: limit for name in RULES if (limit := settings.limit(name)) is not None}
        self._states = {name: _State() for name in self._limits}

    def step(self, step: int, metrics: Mapping[str, float]) -> tuple[dict[str, float], list[News]]:
        """Metrics `alarm/<name>` (1 while it is on) of the rules that the step has a value for, and what is new."""
        shown, news = {}, list[News]()
        for name, limit in self._limits.items():
            state, value = self._states[name], RULES[name].value(metrics, self._states[name])
            if value is None:
                continue
            if found := _look(name, limit, state, step, value):
                news.append(found)
            shown[f"alarm/{name}"] = float(state.on)
        return shown, news

    def resume(self, steps: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Take up the steps of the run so far, in order, without news."""
        for step, metrics in steps:
            self.step(step, metrics)


def last_words(steps: Sequence[tuple[int, Mapping[str, float]]]) -> list[str]:
    """What a person should know of a run that has ended, a line each. steps: (step, metrics) in order."""
    found = []
    skipped = max((metrics.get("train/skipped_updates", 0.0) for _, metrics in steps), default=0.0)
    if skipped:
        found.append(f"{skipped:.0f} updates were left out, because they were not finite")
    for name, least in _LOSSES.items():
        values = [abs(metrics[name]) for _, metrics in steps if name in metrics]
        ends = min(_ENDS, len(values) // 2)
        if not ends:
            continue
        first, last = statistics.median(values[:ends]), statistics.median(values[-ends:])
        if last > EXPLODED * max(first, least):
            rise = f"{name} was {first:.3g} in the first steps and is {last:.3g} in the last"
            found.append(f"{rise}: the training has exploded; a smaller train.learning_rate may help")
            break
    return [f"WARNING: {line}" for line in found]


def _found(metrics: Metrics, prefix: str) -> dict[str, float]:
    """The metrics that have a value and this name, or with a slash at its end begin so."""
    names = [name for name in metrics if name == prefix or (prefix.endswith("/") and name.startswith(prefix))]
    return {name: metrics[name] for name in names if not math.isnan(metrics[name])}


def _start(state: _State, name: str, value: float) -> float | None:
    """Mean of a metric in the first BASE_STEPS steps that have it, of which this one may be one."""
    first = state.first.setdefault(name, [])
    if len(first) < BASE_STEPS and not math.isnan(value):
        first.append(value)
    return sum(first) / len(first) if first else None


def _share_of_start(state: _State, name: str, value: float) -> float | None:
    start = _start(state, name, value)
    return value / start if start and start > 0 and not math.isnan(value) else None


def _look(name: str, limit: float, state: _State, step: int, value: float) -> News | None:
    """Take a value into account. Returns the beginning or the end that follows."""
    rule = RULES[name]
    bad = value < limit if rule.below else value > limit
    if bad == state.on:
        state.streak = 0
        return None
    state.streak_since = state.streak_since if state.streak else step
    state.streak += 1
    if state.streak < rule.patience:
        return None
    state.on, state.streak = bad, 0
    if bad:
        state.since = state.streak_since
        side = "at least" if rule.below else "at most"
        line = f"ALARM {name} since step {state.since}: {value:.3g} {rule.text}; {side} {limit:g} is expected"
        return News(name, line, f"since step {state.since}", begins=True)
    span = f"from step {state.since} to {state.streak_since - 1}"
    return News(name, f"alarm {name} is over, it lasted {span}: now {value:.3g} {rule.text}", span, begins=False)
