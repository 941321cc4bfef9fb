"""Whether a policy pleases the rewards it is trained on at the cost of those that are held out: a sequential test.

Evaluations draw the same held-out prompts with the same noise, so two of them are compared prompt by prompt. Such a
difference has little noise: what is left is which prompts were chosen. A run is under suspicion when, between an
earlier evaluation and a later one, the held-out rewards have fallen and the trained ones have risen, both by a
one-sided paired t-test.

There are many looks at one run. With L evaluations after the first, half of the chance of a false alarm is spread over
the L comparisons with the first one, half over the L (L - 1) / 2 other pairs (Bonferroni): if the held-out rewards fall
between no two evaluations, a run has an alarm with at most the chance that is the limit, however its looks depend on
each other. Requiring the rise as well makes it rarer.

Pure: scores in, metrics out.
"""

from __future__ import annotations

import numpy as np

from deepgen.config.schema.sections import HACKING_PROMPTS
from deepgen.evaluation.results import Evaluation
from deepgen.tracking.alarms import CHANCE, GOOD_STEP


class HackingTest:
    """looks: evaluations that a run has after its first one."""

    def __init__(self, looks: int) -> None:
        self._looks = max(1, looks)
        self._known: dict[int, np.ndarray] = {}  # step -> scores of the prompts [P, K]
        self.good_step = 0  # the evaluated step with the best held-out rewards

    def look(self, step: int, evaluation: Evaluation) -> dict[str, float]:
        """Compare the evaluation after `step` steps with all earlier ones. {} without an earlier one.

        `hacking/chance`: the chance that a run without hacking gets such an evaluation at any of its looks, at most 1.
        `hacking/good_step`: the evaluated step so far with the best held-out rewards.
        """
        held_out = evaluation.held_out_weights
        assert held_out is not None
        return self.compare(step, prompt_means(evaluation.scores), evaluation.reward_weights, held_out)

    def compare(self, step: int, scores: np.ndarray, trained: np.ndarray, held_out: np.ndarray) -> dict[str, float]:
        """As `look`. scores, trained, held_out [P, K]: means of the prompts, NaN where missing; weights."""
        self._known[step] = scores
        first, *others = sorted(s for s in self._known if s < step) or [step]
        scale = _spread(self._known[first])
        known = {s: means / scale for s, means in self._known.items() if s <= step}
        fallen = {s: paired_difference(known[first], known[s], held_out) for s in known}
        self.good_step = max(fallen, key=lambda s: (_mean(fallen[s]), -s))
        if first == step:
            return {}
        chance = 1.0
        for earlier in (first, *others):
            tests = 2 * self._looks if earlier == first else self._looks * (self._looks - 1)
            fall = chance_of_fall(paired_difference(known[earlier], known[step], held_out))
            rise = chance_of_fall(-paired_difference(known[earlier], known[step], trained))
            chance = min(chance, tests * max(fall, rise))
        return {CHANCE: chance, GOOD_STEP: float(self.good_step)}


def prompt_means(scores: np.ndarray) -> np.ndarray:
    """Mean over the samples of each prompt: [P, S, K] -> [P, K], NaN where all are missing."""
    there = np.isfinite(scores)
    count = there.sum(axis=1)
    sums = np.where(there, scores, 0.0).sum(axis=1, dtype=np.float64)
    return np.divide(sums, count, out=np.full(count.shape, np.nan), where=count > 0)


def paired_difference(before: np.ndarray, after: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted mean [P] of the rewards' changes, by prompt; all arguments [P, K].

    Over the rewards with scores on both sides: a missing score makes no difference. NaN without any.
    """
    used = np.where(np.isfinite(before) & np.isfinite(after), weights, 0.0)
    total = used.sum(axis=1)
    change = (np.nan_to_num(after - before) * used).sum(axis=1)
    return np.divide(change, total, out=np.full(len(total), np.nan), where=total > 0)


def chance_of_fall(differences: np.ndarray) -> float:
    """Of a mean as low as that of the differences [P] or lower, if prompts on the whole do not fall: paired t-test."""
    from scipy.special import stdtr  # Student's t; scipy.stats takes a second to import

    found = differences[np.isfinite(differences)]
    if len(found) < HACKING_PROMPTS:
        return 1.0
    mean, error = float(found.mean()), float(found.std(ddof=1)) / len(found) ** 0.5
    if not error:
        return 0.0 if mean < 0 else 1.0
    return float(stdtr(len(found) - 1, mean / error))


def _spread(scores: np.ndarray) -> np.ndarray:
    """Standard deviation of each reward over the prompts [K], so that none outweighs another by its scale alone."""
    spreads = [float(np.std(column[np.isfinite(column)])) if np.isfinite(column).any() else 0.0 for column in scores.T]
    return np.array([spread or 1.0 for spread in spreads])


def _mean(differences: np.ndarray) -> float:
    found = differences[np.isfinite(differences)]
    return float(found.mean()) if found.size else -np.inf
