"""The recipes of docs/judges.md, as a reader would copy them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deepgen.config import load_settings
from rewards.judging.engines import JudgeOptions


def recipes(root: Path) -> list[str]:
    return re.findall(r"^```yaml\n(.*?)^```", (root / "docs/judges.md").read_text(encoding="utf-8"), re.S | re.M)


@pytest.mark.parametrize("number", range(4))
def test_recipes_load_and_ask_judges(root: Path, tmp_path: Path, number: int) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(recipes(root)[number], encoding="utf-8")
    rewards = load_settings(recipe).rewards
    judges = [rewards.pools[name] for name in rewards.used() if isinstance(rewards.pools[name], JudgeOptions)]
    assert judges
    assert all(row for row in rewards.weights.values())


def test_no_recipe_is_left_out(root: Path) -> None:
    assert len(recipes(root)) == 4
