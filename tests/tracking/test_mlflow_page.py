"""Names in MLflow's form, and the settings that its page shows."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from deepgen.config import load_settings
from deepgen.tracking.mlflow_page import (
    MAX_NAME,
    Names,
    changed_settings,
    default_settings,
    flatten,
    mlflow_name,
    page_address,
    storable,
)


def original(name: str) -> str:
    return re.sub(r"_x([0-9a-f]{4,6})_", lambda match: chr(int(match[1], 16)), name)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("train.learning_rate", "train.learning_rate"),
        ("advantage/zero_spread/judge", "advantage/zero_spread/judge"),
        ("data.weights.图片", "data.weights.图片"),
        ("/data/laion/", "_x002f_data/laion_x002f_"),
        ("a//b", "a_x002f_/b"),
        ("a/../b/./c...d", "a/_x002e__x002e_/b/_x002e_/c...d"),
        ("..a", "_x002e_.a"),
        ("loss:total", "loss_x003a_total"),
        ("_x003a_", "_x005f_x003a_"),
    ],
)
def test_names_that_mlflow_takes_stay_and_others_can_be_read_back(given: str, shown: str) -> None:
    assert mlflow_name(given) == shown and original(shown) == given


def test_every_name_is_taken_and_no_two_become_one() -> None:
    from mlflow.utils.validation import _validate_param_name

    rng = random.Random(0)
    letters = [
        "/",
        ".",
        "_",
        "x",
        "0",
        "02f",
        "002f",
        "_x002f_",
        ":",
        "图",
        "é",
        "\u0301",
        "\n",
        " ",
        "😀",
        "\ud800",
        "%",
    ]
    names = {"".join(rng.choices(letters, k=rng.randint(1, 7))) for _ in range(5000)}
    shown = {name: mlflow_name(name) for name in names}
    for name, safe in shown.items():
        _validate_param_name(safe)
        assert original(safe) == name
        assert re.fullmatch(r"[a-zA-Z0-9_\-./ ]+", mlflow_name(name, ascii_only=True))
    long = [f"data.weights.{'/' * 300}{i}" for i in range(2)]
    assert len({mlflow_name(name) for name in long}) == 2 and all(len(mlflow_name(name)) == MAX_NAME for name in long)


def test_names_that_differ_by_case_only_stay_apart_where_case_is_ignored() -> None:
    rng = random.Random(1)
    names = {"".join(rng.choices("lLoO/_\u212akK:", k=rng.randint(1, 4))) for _ in range(2000)} | {"x" * 300, "X" * 300}
    taken = Names()
    shown = {name: taken(name) for name in sorted(names)}
    assert len({safe.lower() for safe in shown.values()}) == len(names)
    assert all(original(safe) == name for name, safe in shown.items() if len(name) < 300)
    assert {taken.cut[shown["x" * 300]], taken.cut[shown["X" * 300]]} == {"x" * 300, "X" * 300} and len(taken.cut) == 2
    assert [taken(name) for name in names] == [shown[name] for name in names]  # whatever the order is from now on
    again = Names(shown.values())  # a run that goes on knows MLflow's names only
    assert [again(name) for name in names] == [shown[name] for name in names]


def test_a_name_that_grows_too_long_by_its_case_is_cut_and_kept() -> None:
    taken = Names(["loss" * 60])
    shown = taken("LOSS" * 60)
    assert len(shown) == MAX_NAME and taken.cut == {shown: "LOSS" * 60}


def test_values_are_what_postgresql_takes() -> None:
    assert storable("a\0b\ud800c 图\n") == "a\\x00b\\ud800c 图\n"


def test_only_what_differs_from_the_defaults_is_shown() -> None:
    assert changed_settings(load_settings(None, [])) == {}
    own = [
        "train.steps=70",
        "rewards.judge.replicas=2",
        "data.weights={a: 1}",
        "rewards.weights.t2i={judge: 0.7, clip: 1}",
    ]
    assert changed_settings(load_settings(None, [*own, "rewards.weights.edit={ocr: 1}"])) == {
        "train.steps": "70",
        "rewards.judge.replicas": "2",
        "data.weights.a": "1.0",
        "rewards.weights.t2i.clip": "1.0",
        "rewards.weights.edit.ocr": "1.0",  # other rewards than by default: the task's whole row
    }
    assert changed_settings(load_settings(None, ["rewards.weights.edit={}"])) == {"rewards.weights.edit": "{}"}


def test_a_pool_of_ones_own_is_compared_with_the_defaults_of_its_class() -> None:
    own = ["rewards.light.class=examples.own_reward.brightness:Brightness", "rewards.light.wanted=0.9"]
    settings = load_settings(None, own)
    assert changed_settings(settings) == {
        "rewards.light.class": "examples.own_reward.brightness:Brightness",
        "rewards.light.wanted": "0.9",
    }
    assert flatten(default_settings(settings)).keys() == flatten(settings.model_dump()).keys()


def test_make_ui_shows_the_same_page(root: Path) -> None:
    page = page_address("1", "rl").replace("#", r"\#")
    assert f"PAGE := {page}\n" in (root / "Makefile").read_text()
