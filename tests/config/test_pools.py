"""Reward pools in the settings: any number of them, each with the options of its reward's class."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

from deepgen.cluster.resources import pool_placement
from deepgen.config import (
    InputPath,
    PoolSettings,
    Settings,
    Share,
    UserError,
    load_settings,
    parse_command_line,
    setting,
    settings_from_dict,
    settings_hash,
)

HERE = "tests.config.test_pools"


class Blurry:
    """Whether an image is blurred.

    More is not said in --help.
    """

    class Options(PoolSettings):
        path: InputPath = setting("tests/golden", "Folder.")
        words: list[str] = setting([], "Words.")
        gpus: Share = setting(0.5, "GPUs of one replica.")

    def score(self, requests): ...


class Plain:
    def score(self, requests): ...


class Old:
    name = "old"

    @classmethod
    def from_settings(cls, settings): ...

    def score(self, requests): ...


class Scoreless:
    pass


class Odd(Plain):
    Options: ClassVar[dict[str, int]] = {"wanted": 1}


def a_function() -> None: ...


def message_of(*overrides: str, recipe: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_settings(recipe, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def recipe_file(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


@pytest.fixture
def blurry(tmp_path: Path) -> Settings:
    text = f"""
    rewards:
      sharp: {{class: "{HERE}:Blurry", replicas: 3, path: tests}}
      soft: {{class: "{HERE}:Blurry", words: [a, b], replicas: 1..4}}
      weights: {{t2i: {{sharp: 1, soft: 0.5, clip: 0}}, edit: {{}}, text: {{}}, reasoning: {{}}}}
    """
    return load_settings(recipe_file(tmp_path, text), ["rewards.soft.batch_size=7", "rewards.soft.gpus=2"])


def test_each_pool_has_its_own_values_and_its_class_the_defaults(blurry: Settings, root: Path) -> None:
    sharp, soft = blurry.rewards.pools["sharp"], blurry.rewards.pools["soft"]
    assert isinstance(sharp, Blurry.Options) and isinstance(soft, Blurry.Options)
    assert (sharp.replicas, sharp.batch_size, sharp.path) == (3, 64, root / "tests")
    assert (soft.replicas, soft.batch_size, soft.path, soft.words) == ("1..4", 7, root / "tests/golden", ["a", "b"])
    assert (sharp.pool_name, soft.dotted("path")) == ("sharp", "rewards.soft.path")
    assert blurry.rewards.used() == ("sharp", "soft")
    assert pool_placement(blurry.cluster, sharp, gpus=True).resources == {"CPU": 0.05, "GPU": 0.5}
    assert pool_placement(blurry.cluster, soft, gpus=False).resources == {"CPU": 0.05}


def test_pools_travel_between_nodes(blurry: Settings, tmp_path: Path) -> None:
    content = blurry.model_dump()
    assert content["rewards"]["sharp"]["class"] == f"{HERE}:Blurry"
    assert content["rewards"]["sharp"]["path"] == "tests"  # relative, as the other node's checkout is elsewhere
    again = settings_from_dict(content)
    assert again == blurry == pickle.loads(pickle.dumps(blurry))
    assert again.rewards.pools["soft"].pool_name == "soft"
    assert (again.rewards.pools["soft"].least_replicas, again.rewards.pools["soft"].most_replicas) == (1, 4)
    alone = pickle.loads(pickle.dumps(blurry.rewards.pools["soft"]))
    assert (alone, alone.pool_name) == (blurry.rewards.pools["soft"], "soft")
    assert load_settings(recipe_file(tmp_path, yaml.safe_dump(content))) == blurry  # as --print-config prints it
    changed = load_settings(tmp_path / "mine.yaml", ["rewards.soft.words=[c]"])
    assert settings_hash(changed) != settings_hash(blurry) == settings_hash(again)


def test_help_lists_options_of_own_pools(blurry: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_command_line("rl", ["--recipe", str(tmp_path / "mine.yaml"), "--help"])
    text = capsys.readouterr().out
    assert f"\nrewards.sharp: class {HERE}:Blurry. Whether an image is blurred.\n" in text
    assert "\n  rewards.sharp.replicas = 1  [3]\n" in text
    assert "\n  rewards.soft.words = []  [['a', 'b']]\n" in text
    assert text.count("Further attempts after a failed call.") == 1


def test_a_file_of_an_own_reward_must_be_there(blurry: Settings, tmp_path: Path) -> None:
    there = [f"{key}={tmp_path}" for key in ("model.weights", "data.train", "data.prompts", "data.heldout")]
    with pytest.raises(UserError, match=r"^rewards\.soft\.path: no file or folder 'nowhere'"):
        parse_command_line("rl", ["--recipe", str(tmp_path / "mine.yaml"), *there, "rewards.soft.path=nowhere"])


def test_a_registered_name_needs_no_class_and_may_get_another() -> None:
    settings = load_settings(None, ["rewards.judge.replicas=2", f"rewards.clip.class={HERE}:Plain"])
    assert settings.rewards.pools["judge"].class_ == "judge"
    assert type(settings.rewards.pools["clip"]) is PoolSettings
    second = load_settings(None, ["rewards.strict.path=tests", "rewards.strict.class=judge"]).rewards.pools["strict"]
    assert type(second) is type(settings.rewards.pools["judge"])


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        # wrong class
        (["rewards.mine.class=jugde"], ["rewards.mine.class: got 'jugde'", "'judge'", "judge, ocr, clip, aesthetic"]),
        (["rewards.mine.class=nowhere.at:All"], ["rewards.mine.class: there is no module 'nowhere'"]),
        ([f"rewards.mine.class={HERE}:Blury"], [f"rewards.mine.class: module '{HERE}' has no 'Blury'", "Blurry"]),
        ([f"rewards.mine.class={HERE}:a_function"], ["a function; allowed: a class with a method score(requests)"]),
        ([f"rewards.mine.class={HERE}:Scoreless"], ["a class without it; allowed: a class with a method score"]),
        ([f"rewards.mine.class={HERE}:Odd"], ["Options of", "allowed: class Options(PoolSettings)"]),
        (["rewards.total.class=ocr"], ["rewards.total: 'total' cannot be the name of a pool"]),
        # wrong option
        (["rewards.judge.pth=x"], ["unknown key 'rewards.judge.pth' on the command line", "'rewards.judge.path'"]),
        (["rewards.jugde.path=x"], ["unknown key 'rewards.jugde.path'", "did you mean 'rewards.judge.path'"]),
        (["rewards.mine.replicas=2"], ["'rewards.mine.replicas'", "a new pool needs rewards.mine.class="]),
        (["rewards.mine.class=ocr", "rewards.mine.replicas=0"], ["rewards.mine.replicas: got 0", "number >= 1"]),
        (["rewards.ocr.replicas=4..2"], ["rewards.ocr.replicas: got '4..2'", "or a range of them, e.g. 1..4"]),
        (["rewards.ocr.replicas=few"], ["rewards.ocr.replicas: got 'few'", "whole number >= 1, or a range"]),
        (["rewards.ocr.replicas=1.5"], ["rewards.ocr.replicas: got 1.5"]),
        (["rewards.ocr.path=x"], ["'rewards.ocr.path'", "allowed in this pool: class, replicas"]),
        (["rewards.ocr.gpus=1.5"], ["rewards.ocr.gpus: got 1.5", "0 or more, above 1 a whole number"]),
        (["rewards.judge=x"], ["rewards.judge: is a section"]),
        # old spellings
        ([f"rewards.mine.class={HERE}:Old"], ["has from_settings, as rewards had", "class Options(PoolSettings)"]),
        (
            ["rewards.weights.t2i.brightness=1"],
            ["unknown reward 'brightness'", "rewards.brightness.class=package.module:Class"],
        ),
    ],
)  # fmt: skip
def test_wrong_pool_is_one_clear_line(overrides: list[str], parts: list[str]) -> None:
    message = message_of(*overrides)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("rewards", "parts"),
    [
        ("brightness: {replicas: 2}", ["unknown reward 'brightness'", "write its class, rewards.brightness.class: "]),
        ("wieghts: {t2i: {ocr: 1}}", ["rewards.wieghts", "did you mean 'weights'"]),
        ("judge: 5", ["rewards.judge: got 5 in mine.yaml; allowed: a section"]),
        ("judge.path: x", ["rewards.judge.path: written with dots in mine.yaml"]),
        ("judge: {class: 3}", ["rewards.judge.class: got 3 in mine.yaml", "allowed: judge, ocr, clip"]),
        ("judge: {pth: 3}", ["unknown key 'rewards.judge.pth' in mine.yaml; did you mean 'rewards.judge.path'?"]),
        ("judge: {retries: many}", ["rewards.judge.retries: got 'many' in mine.yaml", "from 0 to 20"]),
        (f"mine: {{class: '{HERE}:Blurry', words: 3}}", ["rewards.mine.words: got 3 in mine.yaml; allowed: list"]),
        ("a b: {class: ocr}", ["'a b' cannot be the name of a pool"]),
    ],
)
def test_wrong_pool_in_a_recipe_is_one_clear_line(tmp_path: Path, rewards: str, parts: list[str]) -> None:
    message = message_of(recipe=recipe_file(tmp_path, f"rewards:\n  {rewards}\n"))
    assert all(part in message for part in parts), message


def test_another_class_on_the_command_line_drops_the_options_of_the_recipes(tmp_path: Path) -> None:
    """It drops nothing else: it keeps common keys, and keys that neither class knows."""
    recipe = recipe_file(tmp_path, "rewards: {judge: {path: tests, gpu_memory_share: 0.5, replicas: 3}}")
    plain = load_settings(recipe, [f"rewards.judge.class={HERE}:Plain"]).rewards.pools["judge"]
    assert (plain.replicas, plain.class_) == (3, f"{HERE}:Plain")
    blurry = load_settings(recipe, ["rewards.judge.path=stages", f"rewards.judge.class={HERE}:Blurry"])
    assert blurry.model_dump()["rewards"]["judge"]["path"] == "stages"
    recipe = recipe_file(tmp_path, "rewards: {mine: {path: tests}}")  # only the command line gives the class
    assert load_settings(recipe, ["rewards.mine.class=clip"]).rewards.pools["mine"].class_ == "clip"
    recipe = recipe_file(tmp_path, "rewards: {judge: {paht: tests}}")
    message = message_of(f"rewards.judge.class={HERE}:Plain", recipe=recipe)
    assert message.startswith("unknown key 'rewards.judge.paht' in mine.yaml; allowed in this pool: class, replicas")


@pytest.mark.processes
def test_reading_settings_imports_no_torch(root: Path) -> None:
    """Reading settings imports the classes of the rewards, but not the libraries that run them."""
    heavy = ["torch", "ray", "vllm", "transformers", "rapidocr"]
    code = f"import sys, deepgen.config as c; c.load_settings(); print([m for m in {heavy} if m in sys.modules])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
