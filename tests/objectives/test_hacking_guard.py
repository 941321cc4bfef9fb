"""The guard against hacked rewards over several starts of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from actors.objectives.hacking_guard import FILE, HackingGuard
from deepgen.config import Settings, load_settings
from deepgen.evaluation.results import BEFORE, Evaluation
from tests.helpers.rl_world import make_records

RECORDS = tuple(make_records(12, "x"))
NAMES = ("judge", "aesthetic")


def settings(folder: Path) -> Settings:
    return load_settings(None, [f"run.dir={folder}", "run.name=a", "train.steps=60", "evaluation.every=10"])


def evaluation(step: int, held_out: float) -> Evaluation:
    """The trained reward is step / 100. Of one prompt a score is missing."""
    noise = np.random.default_rng(step).normal(0, 0.01, (len(RECORDS), 2, 2))
    scores = (noise + np.array([step / 100, held_out])).astype(np.float32)
    scores[3, :, 1] = np.nan
    weights = np.tile(np.array([[1, 0], [0, 1]], np.float32)[:, None], (1, len(RECORDS), 1))
    return Evaluation(RECORDS, (), NAMES, scores, weights[0], step, weights[1])


def test_it_waits_for_the_first_evaluation_and_remembers_the_others(tmp_path: Path) -> None:
    ours = settings(tmp_path)
    ours.run.folder.mkdir()
    guard = HackingGuard(ours, RECORDS)
    assert guard.look(10, evaluation(10, 0.6)) == {}
    evaluation(0, 0.5).save(ours.run.folder / BEFORE)
    seen = guard.look(20, evaluation(20, 0.55))
    assert seen["hacking/good_step"] == guard.good_step == 10
    assert seen["hacking/chance"] < 0.05  # above the start, but below what it has been

    with (ours.run.folder / FILE).open("a") as file:
        file.write('{"step": 30, "means"')  # torn by a kill
    resumed = HackingGuard(ours, RECORDS)
    assert resumed.look(20, evaluation(20, 0.55)) == seen
    assert resumed.look(30, evaluation(30, 0.65))["hacking/good_step"] == 30


def test_evaluations_of_other_rewards_or_prompts_do_not_count(tmp_path: Path) -> None:
    ours = settings(tmp_path)
    ours.run.folder.mkdir()
    evaluation(0, 0.5).save(ours.run.folder / BEFORE)
    HackingGuard(ours, RECORDS).look(10, evaluation(10, 0.6))
    said = list[str]()
    guard = HackingGuard(ours, RECORDS[:-1], said.append)
    assert guard.look(20, evaluation(20, 0.1)) == guard.look(30, evaluation(30, 0.1)) == {}
    assert len(said) == 1 and "other prompts or rewards" in said[0]
    (ours.run.folder / FILE).write_text('{"step": 10, "names": ["judge", "hpsv2"], "means": [[1, 2]]}\n')
    assert HackingGuard(ours, RECORDS).look(20, evaluation(20, 0.4))["hacking/good_step"] == 0
