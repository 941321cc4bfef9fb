"""Steps on disk: they come back bit for bit, and what is damaged or does not fit is one clear line."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.messages import Arrays, Group
from actors.objectives.replay_files import (
    StoredGroup,
    check_steps,
    not_finite,
    read_groups,
    read_metrics,
    write_recipe,
    write_step,
)
from deepgen.config import Settings, UserError, load_settings
from deepgen.data.records import Record

GROUPS, SIZE, REWARDS = 4, 3, ("judge", "clip")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("some")
    own = [f"model.weights={tmp_path / 'model'}", f"rollout.group_size={SIZE}", f"rollout.prompts_per_step={GROUPS}"]
    return load_settings(None, [*own, "train.workers=2", "train.steps=20", f"run.dir={tmp_path}", "run.name=mine"])


def group(number: int, step: int) -> Group:
    random = np.random.default_rng(number)
    record = Record(f"p-{number}", "t2i", "a “red” thing", "red", b"an image", (b"another",), "test")
    arrays: Arrays = {
        "trajectory/log_probs": random.standard_normal((2, SIZE)).astype(np.float32),
        "trajectory/scale": np.array(2, np.float32),
        "conditioning/mask": np.array([[True, False]]),
    }
    scores = np.array([[1, np.nan], [2, 3], [4, 5]], np.float32)
    filled: dict[str, Any] = {"reward_weights": np.array([0.5, 0.5], np.float32), "scores": scores}
    filled |= {"trajectory": arrays, "advantages": random.standard_normal(SIZE).astype(np.float32)}
    return replace(Group(number, step, 1, record, 3), diversity=0.25, **filled)


def write(folder: Path, settings: Settings, step: int) -> None:
    """Write a step as two ranks do."""
    folder.mkdir(exist_ok=True)
    for rank in range(2):
        mine = [StoredGroup(p, group(p, step), np.ones(SIZE, np.float32)) for p in range(rank, GROUPS, 2)]
        write_step(folder, settings, step, mine, {"reward/total": 0.5, "odd": np.nan}, (rank, 2))


def test_groups_come_back_bit_for_bit(tmp_path: Path, settings: Settings) -> None:
    folder = tmp_path / "steps"
    for step in (3, 4):
        write(folder, settings, step)
    found = check_steps(folder, settings)
    assert (found.steps, found.state) == (range(3, 5), None)
    assert read_metrics(folder, 3) == {"reward/total": 0.5}
    stored = read_groups(folder, 4, [2, 1])
    assert [one.position for one in stored] == [2, 1]
    for one in stored:
        written = group(one.position, 4)
        assert replace(one.group.record, image=b"an image", references=(b"another",)) == written.record
        assert (one.group.number, one.group.step, one.group.epoch, one.group.version) == (one.position, 4, 1, 3)
        assert one.group.diversity == 0.25 and one.own is not None and (one.own == 1).all()
        for name in ("reward_weights", "scores", "advantages"):
            np.testing.assert_array_equal(getattr(one.group, name), getattr(written, name))
        assert one.group.trajectory.keys() == written.trajectory.keys()
        for name, array in written.trajectory.items():
            again = one.group.trajectory[name]
            assert (again.dtype, again.shape) == (array.dtype, array.shape)
            np.testing.assert_array_equal(again, array)


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "step-000003-part-1-of-2.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


def gone(folder: Path, pattern: str) -> None:
    for file in folder.glob(pattern):
        file.unlink()


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bit": (lambda f: flip(f / "step-000003-part-0-of-2.safetensors"), r"part-0-of-2.*has changed"),
    "no arrays": (lambda f: gone(f, "*0-of-2.safetensors"), "is missing or has changed"),
    "a number": (lambda f: edit(f, lambda c: c["metrics"].update({"reward/total": 0.6})), r"1-of-2\.json: has changed"),
    "a key": (lambda f: edit(f, lambda c: c.pop("groups")), "has changed"),
    "format": (lambda f: edit(f, lambda c: c.update(format=2)), "format 2; allowed: 1"),
    "half a file": (lambda f: (f / "step-000003-part-0-of-2.json").write_text('{"format": 1,'), "cannot be read"),
    "a list": (lambda f: (f / "step-000003-part-0-of-2.json").write_text("[]"), "cannot be read"),
    "a part": (lambda f: gone(f, "*0-of-2.json"), r"groups \[1, 3\]; allowed: all 4"),
    "all": (lambda f: gone(f, "*.json"), r"there is no step-\*\.json; allowed: a folder of"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found(tmp_path: Path, settings: Settings, damage: str) -> None:
    folder = tmp_path / "steps"
    write(folder, settings, 3)
    spoil, message = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        check_steps(folder, settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("rollout.group_size=8", r"rollout\.group_size: got 8; allowed: 3, with which .*json was written"),
        ("data.image_size=64", r"data\.image_size: got 64; allowed: 512"),
        ("model.preset=tiny", r"model\.preset: got tiny; allowed: deepgen-5b"),
        ("rollout.eta=0.5", r"rollout\.eta: got 0\.5; allowed: 1\.0"),
        ("train.steps=3", r"train\.steps: got 3; allowed: 4 or more, as .* has the steps 3 to 3"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, settings: Settings, changed: str, message: str) -> None:
    folder = tmp_path / "steps"
    write(folder, settings, 3)
    section, _, key = changed.partition("=")[0].partition(".")
    value = getattr(getattr(load_settings(None, [changed, "train.warmup_steps=0"]), section), key)
    other = getattr(settings, section).model_copy(update={key: value})
    with pytest.raises(UserError, match=message):
        check_steps(folder, settings.model_copy(update={section: other}))


def test_other_weights_and_a_gap_are_refused(tmp_path: Path, settings: Settings) -> None:
    folder = tmp_path / "steps"
    write(folder, settings, 3)
    (tmp_path / "model" / "weights").write_text("others")
    with pytest.raises(UserError, match=r"model\.weights: got .*model; allowed: the weights folder, with which"):
        check_steps(folder, settings)
    write(folder, settings, 5)
    with pytest.raises(UserError, match=r"it has the steps \[3, 5\]"):
        check_steps(folder, settings)
    with pytest.raises(UserError, match="nowhere: there is no step"):
        check_steps(tmp_path / "nowhere", settings)


def test_the_recipe_is_the_run_under_another_name(tmp_path: Path, settings: Settings) -> None:
    command = write_recipe(tmp_path, settings)
    program = Path(__file__).resolve().parents[2] / "stages" / "rl.py"
    given = ["--recipe", tmp_path / "recipe.yaml", "--train-only", tmp_path]
    assert shlex.split(command) == [sys.executable, str(program), *map(str, given)]
    again = load_settings(tmp_path / "recipe.yaml")
    assert again.run.name == "mine-replay"
    assert again.model_copy(update={"run": settings.run}) == settings


def test_no_secret_is_written(tmp_path: Path, settings: Settings) -> None:
    tracking = settings.tracking.model_copy(update={"uri": "http://user:hunter2@host"})
    settings = settings.model_copy(update={"tracking": tracking})
    write(tmp_path / "steps", settings, 3)
    write_recipe(tmp_path, settings)
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and b"hunter2" in file.read_bytes()]
    again = load_settings(tmp_path / "recipe.yaml", ["tracking.uri=http://user:hunter2@host"])
    assert again.tracking == settings.tracking


def test_what_is_not_finite_is_named() -> None:
    good = group(0, 7)
    assert not_finite([good], REWARDS) == ""  # a missing score is none
    bad = replace(group(1, 7), scores=np.array([[1, np.inf]] * SIZE, np.float32))
    spoilt = replace(group(2, 7), advantages=np.array([0, np.nan, 0], np.float32))
    assert not_finite([good, spoilt, bad], REWARDS) == "the reward clip of group 1 of step 7 (prompt 'p-1')"
    assert not_finite([good, spoilt], REWARDS) == "the advantages of group 2 of step 7 (prompt 'p-2')"
    spoilt = replace(good, trajectory=good.trajectory | {"trajectory/final": np.array([np.inf])})
    assert not_finite([spoilt], REWARDS) == "the trajectory/final of group 0 of step 7 (prompt 'p-0')"
