"""The study of mixed rewards: its reward, its settings and its table. The runs themselves are `soak --only mixing`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deepgen.config import load_settings
from deepgen.config.recipes import find_recipe
from deepgen.config.stage_rules import check_stage
from deepgen.tracking.paired_table import paired_table
from rewards import RewardRequest
from soak.mixing import METHODS, REWARDS, MixedRun, WideBrightness, mixing_rows, overrides


@pytest.mark.parametrize("method", METHODS)
def test_runs_differ_in_the_method_alone(tmp_path: Path, method: str) -> None:
    settings = load_settings(find_recipe("tiny-rl"), overrides(tmp_path, method, 7))
    check_stage(settings, "rl")
    assert (settings.algorithm.advantage, settings.run.seed) == (method, 7)
    assert all(row == REWARDS for row in settings.rewards.weights.values())
    pool = settings.rewards.pools["light"]
    assert isinstance(pool, WideBrightness.Options)
    black, white = (np.full((4, 4, 3), value, np.uint8) for value in (0, 255))
    requests = [RewardRequest("a cat", "", "t2i", image) for image in (black, white)]
    assert WideBrightness(pool).score(requests) == [0, 100]


def test_table_has_shares_and_changes() -> None:
    before, after = {"aesthetic": [0.5, 0.6], "light": [80.0, 90.0]}, {"aesthetic": [0.6, 0.7], "light": [80.0, 88.0]}
    shares = {"advantage/share/aesthetic": ([1, 2], [0.75, 0.85]), "advantage/share/light": ([1, 2], [0.25, 0.15])}
    run = MixedRun("gdpo", 7, shares, paired_table(before, after))
    first, light = mixing_rows(run)
    assert first == "| gdpo | 7 | aesthetic | 80.0% | 0.550 | +0.100 (+0.100 to +0.100) |"
    assert light.startswith("| gdpo | 7 | light | 20.0% | 85.000 | -1.000 (-2.000 to")
