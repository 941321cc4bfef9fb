"""Effective training time of a run whose nodes die: the share of its time in which it makes steps that count.

ETTR = steps x their time without failures and checkpoints / the run's whole time. A learner node's death costs the
steps since the newest checkpoint on disk, and the restart; one during a restart begins that again. The death of another
node makes the step longer in which it happens (`Losses.others`, which `actors.simulation` measures with the real fleet
and pools). Nodes die independently of each other, after exponentially distributed times, and are replaced at once.

The best interval between checkpoints is Young's first-order one, sqrt(2 C M), for a checkpoint that costs C and a
learner that lives M on average (J. W. Young, 1974); Daly (2006) gives the same as long as C is much smaller than M.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

DAY_S = 86400.0
_DEATHS = 400  # of the learner, that a mean rests on
_MOST_STEPS = 200_000


@dataclass(frozen=True)
class Losses:
    """What failures cost, in seconds; rates in deaths a second.

    checkpoint_s: the learner waits for a checkpoint; write_s: until it is on disk; restart_s: of the learner.
    learner_rate: deaths of learner nodes. others: (rate of deaths, seconds that each costs) for every other role.
    """

    step_s: float
    checkpoint_s: float
    write_s: float
    restart_s: float
    learner_rate: float
    others: Sequence[tuple[float, float]] = ()


def checkpoint_interval(losses: Losses, most: int) -> int:
    """Steps between checkpoints: Young's interval, from what it takes to write one up to `most` steps."""
    if losses.learner_rate <= 0:
        return most
    best_s = math.sqrt(2 * losses.checkpoint_s / losses.learner_rate)
    least = math.ceil(losses.write_s / losses.step_s)  # the next checkpoint would wait for the one before
    return min(most, max(1, least, round(best_s / losses.step_s)))


def expected_share(losses: Losses, every: int) -> float:
    """ETTR by arithmetic, to first order in the rates of deaths."""
    per_step = losses.checkpoint_s / every
    interval_s = every * losses.step_s + losses.checkpoint_s
    a_death = interval_s / 2 + losses.write_s + losses.restart_s
    lost = losses.learner_rate * a_death + sum(rate * seconds for rate, seconds in losses.others)
    return losses.step_s / (losses.step_s + per_step) * (1 - lost) if lost < 1 else 0.0


def longest_restart(losses: Losses, every: int, goal: float) -> float:
    """Seconds of a restart with which `expected_share` is `goal`; below 0 if it cannot be."""
    without = expected_share(replace(losses, restart_s=0.0), every)
    per_second = losses.learner_rate / (1 + losses.checkpoint_s / every / losses.step_s)
    return (without - goal) / per_second if per_second else math.inf


def simulated_share(losses: Losses, every: int, steps: int, seed: int) -> float:
    """ETTR of runs of `steps` steps one after the other, with deaths at random moments; 0 if they get nowhere.

    So many runs that the mean rests on some hundred deaths, as far as that ends soon.
    """
    rate = losses.learner_rate + sum(rate for rate, _ in losses.others)
    wanted = _DEATHS / rate / losses.step_s if rate else 0.0
    runs = max(1, math.ceil(min(wanted, _MOST_STEPS) / steps))
    dice = random.Random(seed)
    times = [_run(losses, every, steps, dice) for _ in range(runs)]
    return runs * steps * losses.step_s / math.fsum(times)


def _run(losses: Losses, every: int, steps: int, dice: random.Random) -> float:
    """Seconds of one run; infinite if it makes no progress."""
    now, done, tries = 0.0, 0, 0
    saved, writing = 0, (0, 0.0)  # step of the checkpoint on disk; of the newest one, and when it is on disk
    death = _wait(dice, losses.learner_rate)
    while done < steps:
        due = (done + 1) % every == 0 and done + 1 < steps
        end = now + losses.step_s + _delays(losses, dice)
        if due:
            end = max(end, writing[1]) + losses.checkpoint_s
        if death >= end:
            now, done = end, done + 1
            if due:
                saved = writing[0]  # it is on disk: the one after it had to wait for that
                writing = (done, now + losses.write_s)
            continue
        if writing[1] <= death:
            saved = writing[0]
        writing, done, tries = (saved, 0.0), saved, tries + 1
        now, death = death + losses.restart_s, death + _wait(dice, losses.learner_rate)
        if tries > _MOST_STEPS:
            return math.inf
    return now


def _delays(losses: Losses, dice: random.Random) -> float:
    """Seconds that the deaths of other nodes add to a step."""
    return sum(seconds for rate, seconds in losses.others for _ in range(_deaths(dice, rate * losses.step_s)))


def _deaths(dice: random.Random, mean: float) -> int:
    """A number of deaths by Poisson's law."""
    count, time = 0, _wait(dice, 1.0)
    while time < mean:
        count, time = count + 1, time + _wait(dice, 1.0)
    return count


def _wait(dice: random.Random, rate: float) -> float:
    return dice.expovariate(rate) if rate else math.inf
