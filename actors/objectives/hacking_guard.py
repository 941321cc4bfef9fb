"""Looks at each evaluation of an rl run for signs that its rewards are hacked, and remembers them for a resume.

<run folder>/evaluation-before.npz    the first evaluation, which the stage makes
<run folder>/evaluations.jsonl        of each later one its step, the rewards, and their means by prompt
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from deepgen.config import Settings
from deepgen.data.records import Record
from deepgen.evaluation.hacking import HackingTest, prompt_means
from deepgen.evaluation.results import BEFORE, Evaluation
from deepgen.json_lines import drop_torn_end, read_lines

FILE = "evaluations.jsonl"


class HackingGuard:
    """The test of one run, on rank 0. records: the held-out prompts. say: prints a line on the console."""

    def __init__(self, settings: Settings, records: Sequence[Record], say: Callable[[str], None] = print) -> None:
        looks = (settings.train.steps - 1) // settings.evaluation.every  # the last step's comes after the run
        self._test, self._records = HackingTest(looks), records
        self._folder: Path = settings.run.folder
        self._say = say
        self._begun: bool | None = False  # None: never, as the first evaluation is of something else
        self._waiting: list[tuple[int, Evaluation]] = []  # until the first evaluation is there

    @property
    def good_step(self) -> int:
        """The evaluated step with the best held-out rewards so far."""
        return self._test.good_step

    def look(self, step: int, evaluation: Evaluation) -> dict[str, float]:
        """The metrics of `HackingTest.compare` for the evaluation after `step` steps; {} without a first one yet."""
        if self._begun is None:
            return {}
        self._waiting.append((step, replace(evaluation, images=())))
        if not self._begun and not self._begin(evaluation):
            return {}
        metrics = dict[str, float]()
        for number, one in self._waiting:
            means = prompt_means(one.scores)
            self._remember(number, one.names, means)
            metrics = self._compare(number, one, means)
        self._waiting = []
        return metrics

    def _begin(self, evaluation: Evaluation) -> bool:
        """Take up the first evaluation, and those of earlier starts. False: it is not there yet, or of no use."""
        file = self._folder / BEFORE
        if not file.exists():
            return False
        first = Evaluation.load(file, self._records, pictures=False)
        if first is None or first.names != evaluation.names or first.held_out_weights is None:
            self._say(f"{file} is of other prompts or rewards, so the alarm `hacking` has nothing to compare with")
            self._begun, self._waiting = None, []
            return False
        self._compare(0, first, prompt_means(first.scores))
        self._recall(evaluation)
        self._begun = True
        return True

    def _compare(self, step: int, evaluation: Evaluation, means: np.ndarray) -> dict[str, float]:
        held_out = evaluation.held_out_weights
        assert held_out is not None
        return self._test.compare(step, means, evaluation.reward_weights, held_out)

    def _recall(self, evaluation: Evaluation) -> None:
        """Take up the evaluations of earlier starts, of the same prompts and rewards."""
        file, shape = self._folder / FILE, evaluation.reward_weights.shape
        if not file.exists():
            return
        drop_torn_end(file)
        for line in read_lines(file):
            if line and line["names"] == list(evaluation.names):
                means = np.array(line["means"], dtype=np.float64)  # null becomes NaN
                if means.shape == shape:
                    self._compare(line["step"], evaluation, means)

    def _remember(self, step: int, names: Sequence[str], means: np.ndarray) -> None:
        rows = [[None if np.isnan(value) else float(value) for value in row] for row in means]
        with (self._folder / FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "names": list(names), "means": rows}) + "\n")
