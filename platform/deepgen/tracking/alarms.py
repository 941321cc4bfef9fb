"""Alarms of an rl run: rules on the metrics of its steps that say when something has gone wrong quietly.

At the end of a run of any stage, `last_words` says what its result should not be trusted for.

Pure: metrics in, news out. An alarm begins when its value has been out of range in PATIENCE steps in a row, and ends
when it has been in range in as many. A metric that a step does not have changes nothing: missing is neither good nor
bad.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from deepgen.config.schema.sections import ALARMS

PATIENCE = 3  # steps; one odd batch is no alarm
EXPLODED = 10.0  # times the loss of the first steps
_ENDS = 5  # steps at either end of a run whose median loss is compared
# The policy loss is about 0 at any time, so the sum with it is compared with 1 at least.
_LOSSES = {"loss/flow_matching": 0.0, "loss/sft": 0.0, "loss/total": 1.0}
BASE_STEPS = 3  # first steps of a run, whose mean is what later steps are compared with


class Rule(NamedTuple):
    """metric: its name, or with a slash at the end the largest of all that begin so. below: bad are small values.

    of_start: the value is a share of the metric's mean in the first BASE_STEPS steps.
    """

    metric: str
    text: str  # what a value means
    below: bool = False
    of_start: bool = False


RULES = {
    "zero_spread": Rule("advantage/zero_spread/", "of the groups get equal scores from a reward and learn nothing"),
    "missing": Rule("reward_missing_share/", "of the scores of a reward are missing"),
    "clip_share": Rule("policy/clip_share", "of the samples are clipped"),
    "ratio": Rule("policy/ratio_deviation_max", "is how far a probability ratio is off 1"),
    "kl": Rule("policy/kl", "is the KL to the initial model"),
    "diversity": Rule("rollout/diversity", "of the first steps' diversity is left in the groups", True, True),
    "object_store": Rule("object_store/used_share", "of the cluster's object store is in use"),
}
assert RULES.keys() == ALARMS.keys()


class News(NamedTuple):
    """An alarm that begins or ends."""

    name: str
    line: str  # for the console
    tag: str  # for MLflow


@dataclass
class _State:
    on: bool = False
    streak: int = 0  # steps in a row that say otherwise
    streak_since: int = 0
    since: int = 0  # first step of the alarm that is on
    first: list[float] = field(default_factory=list)  # values of the first steps, for `Rule.of_start`


class Alarms:
    """The alarms of a run. limits: those that replace the ones of ALARMS, by name; None turns a rule off."""

    def __init__(self, limits: Mapping[str, float | None]) -> None:
        self._limits = {name: limit for name, limit in {**ALARMS, **limits}.items() if limit is not None}
        self._states = {name: _State() for name in self._limits}

    def step(self, step: int, metrics: Mapping[str, float]) -> tuple[dict[str, float], list[News]]:
        """Metrics `alarm/<name>` (1 while it is on) of the rules that the step has a value for, and what is new."""
        shown, news = {}, list[News]()
        for name, limit in self._limits.items():
            state, value = self._states[name], _value(RULES[name], metrics, self._states[name])
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


def _value(rule: Rule, metrics: Mapping[str, float], state: _State) -> float | None:
    if rule.metric.endswith("/"):
        found = [value for name, value in metrics.items() if name.startswith(rule.metric)]
    else:
        found = [metrics[rule.metric]] if rule.metric in metrics else []
    found = [value for value in found if not math.isnan(value)]
    if not found:
        return None
    value = max(found)
    if not rule.of_start:
        return value
    if len(state.first) < BASE_STEPS:
        state.first.append(value)
    start = sum(state.first) / len(state.first)
    return value / start if start > 0 else None


def _look(name: str, limit: float, state: _State, step: int, value: float) -> News | None:
    """Take a value into account. Returns the beginning or the end that follows."""
    rule = RULES[name]
    bad = value < limit if rule.below else value > limit
    if bad == state.on:
        state.streak = 0
        return None
    state.streak_since = state.streak_since if state.streak else step
    state.streak += 1
    if state.streak < PATIENCE:
        return None
    state.on, state.streak = bad, 0
    if bad:
        state.since = state.streak_since
        side = "at least" if rule.below else "at most"
        line = f"ALARM {name} since step {state.since}: {value:.3g} {rule.text}; {side} {limit:g} is expected"
        return News(name, line, f"since step {state.since}")
    span = f"from step {state.since} to {state.streak_since - 1}"
    return News(name, f"alarm {name} is over, it lasted {span}: now {value:.3g} {rule.text}", span)
