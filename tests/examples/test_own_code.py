"""`examples/`: user code works as the documents describe."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml

from actors.experience.reward_requests import make_requests, request_key, reward_weights
from actors.experience.scoring.reward_router import RewardRouter
from deepgen.algorithms.advantages import group_advantages
from deepgen.cluster.own_environment import own_environment
from deepgen.cluster.resources import rl_needs
from deepgen.config import Settings, load_settings, parse_command_line
from deepgen.config.schema.pools import make_pool
from deepgen.data.records import Record
from examples.own_reward.brightness import Brightness
from rewards import Missing, RewardRequest, build_reward, is_groupwise

REWARD, ADVANTAGE = "examples/own_reward/recipe.yaml", "examples/own_advantage/recipe.yaml"


@pytest.fixture
def settings() -> Settings:
    return parse_command_line("rl", ["--recipe", REWARD])


def grey(level: int) -> np.ndarray:
    return np.full((8, 8, 3), level, dtype=np.uint8)


def test_the_documents_show_what_runs(root: Path) -> None:
    text = (root / "docs" / "own-reward.md").read_text()
    code, recipe = (re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL) for kind in ("python", "yaml"))
    for shown, file in zip(code, ("brightness.py", "variety.py"), strict=True):
        assert (root / "examples" / "own_reward" / file).read_text().endswith(shown)
    assert yaml.safe_load(recipe[0])["rewards"] == yaml.safe_load((root / REWARD).read_text())["rewards"]
    assert len(re.findall(r"^\d\. ", text, re.MULTILINE)) == 2  # steps
    algorithms = (root / "docs" / "algorithms.md").read_text()
    assert yaml.safe_load((root / ADVANTAGE).read_text())["algorithm"]["advantage"] in algorithms


def test_two_pools_of_one_class_have_options_of_their_own(settings: Settings) -> None:
    assert settings.rewards.used() == ("ocr", "light", "dark")
    light, dark = (build_reward(settings.rewards.pools[name]) for name in ("light", "dark"))
    assert isinstance(light, Brightness) and isinstance(dark, Brightness)
    requests = [RewardRequest("a cat", "", "t2i", grey(level)) for level in (0, 255)]
    assert light.score(requests) == pytest.approx([0.1, 0.9])
    assert dark.score(requests) == pytest.approx([0.9, 0.1])
    roles = [need.role for need in rl_needs(settings, gpus=False)]
    assert roles[-3:] == ["ocr reward", "light reward", "dark reward"]


def test_a_reward_may_bring_the_environment_that_it_needs(root: Path) -> None:
    text = (root / "docs" / "own-reward.md").read_text()
    shown = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[1])["rewards"]["old"]
    pool = load_settings(None, [f"rewards.old.class={shown['class']}"]).rewards.pools["old"]
    own = own_environment(pool)
    assert own and own.lines == tuple(shown["environment"]) == ("transformers<5",)


def test_variety_is_what_tells_an_image_from_the_others() -> None:
    pool = make_pool("variety", {"class": "examples.own_reward.variety:Variety"})
    assert is_groupwise(pool)
    sizes = {"a cat": (0, 0, 255), "a dog": (7,)}
    groups = [[RewardRequest(prompt, "", "t2i", grey(level)) for level in levels] for prompt, levels in sizes.items()]
    scores = build_reward(pool).score_groups(groups)  # type: ignore[attr-defined]
    assert scores[0] == pytest.approx([0.5, 0.5, 1.0]) and isinstance(scores[1][0], Missing)


def test_the_same_pool_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    mine = ["rewards.light.class=examples.own_reward.brightness:Brightness", "rewards.light.wanted=0.9"]
    argv = ["rewards.weights.t2i.light=1.0", *mine]
    pool = parse_command_line("rl", argv).rewards.pools["light"]
    assert isinstance(pool, Brightness.Options)
    assert pool.wanted == 0.9
    with pytest.raises(SystemExit):
        parse_command_line("rl", ["--help", *mine])
    text = capsys.readouterr().out
    assert "rewards.light: class examples.own_reward.brightness:Brightness. How close the mean" in text
    assert "  rewards.light.wanted = 0.5\n      Wanted mean brightness" in text


@pytest.mark.ray
def test_pools_of_one_class_score_beside_each_other(ray_local: ModuleType, settings: Settings) -> None:
    bright = {task: {"light": 1.0, "dark": 0.5} if task == "t2i" else {"dark": 1.0} for task in ("t2i", "edit")}
    rewards = settings.rewards.model_copy(update={"weights": bright})
    router = RewardRouter(settings.model_copy(update={"rewards": rewards}), gpus=False)
    drawn, edited = (Record(task, task, "a cat", "", None, (), "test") for task in ("t2i", "edit"))
    requests = [*make_requests(drawn, [grey(255)]), *make_requests(edited, [grey(51)])]
    asked = zip((drawn, edited), requests, strict=True)
    keys = [request_key(request) for request in requests]
    weights = np.stack([reward_weights(rewards, record, request, 0) for record, request in asked])

    async def score() -> np.ndarray:
        await router.start()
        try:
            return await router.score(ray_local.put(requests), keys, weights)
        finally:
            router.stop()

    scores = asyncio.run(score())
    assert router.names == ("light", "dark")
    np.testing.assert_allclose(scores, [[0.9, 0.1], [np.nan, 0.9]], atol=1e-6)
    assert {"pool/light/calls", "pool/dark/calls"} <= router.counters().keys()


def test_own_advantage_counts_who_is_beaten() -> None:
    settings = parse_command_line("rl", ["--recipe", ADVANTAGE])
    rewards = torch.tensor([[0.1], [0.2], [9.0], [0.5], [0.5], [torch.nan]])
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    result = group_advantages(settings.algorithm.advantage, rewards, torch.ones_like(rewards), groups, whiten="none")
    assert result.advantages.tolist() == [-1, 0, 1, 0, 0, 0]
