"""The programs behind `make base`: their order, their error messages, and how they split descriptions."""

import sys

import pytest

from deepgen.errors import UserError
from stages.base import make_all
from stages.base.make_all import Step, after, run_all, steps
from stages.base.train_vlm import split_description


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    monkeypatch.setattr(make_all, "WORK", tmp_path)
    monkeypatch.setattr(make_all.time, "sleep", lambda _: None)
    return tmp_path


def append(path, word):
    return [sys.executable, "-c", f"open({str(path)!r}, 'a').write({word!r} + ' ')"]


def test_every_need_is_a_step_that_stands_before():
    seen: set[str] = set()
    for name, step in steps().items():
        assert set(step.needs) <= seen, name
        seen.add(name)


@pytest.mark.processes
def test_steps_run_once_their_needs_are_met(workshop):
    log = workshop / "order"
    plan = {"a": Step(append(log, "a")), "b": Step(append(log, "b"), ("a",)), "c": Step(append(log, "c"), ("b",))}
    run_all(plan, set())
    assert log.read_text() == "a b c "
    run_all(plan, {"a", "b"})
    assert log.read_text() == "a b c c "
    assert {path.name for path in (workshop / "done").iterdir()} == {"a", "b", "c"}


@pytest.mark.processes
def test_a_failed_step_is_named_with_its_log(workshop):
    plan = {"a": Step([sys.executable, "-c", "print('no room'); raise SystemExit(3)"]), "b": Step(["true"], ("a",))}
    with pytest.raises(UserError, match=r"step a failed \(no room\); see .*a.log"):
        run_all(plan, set())
    assert not (workshop / "done").exists()


def test_what_follows_from_a_step():
    plan = {"a": Step([]), "b": Step([], ("a",)), "c": Step([]), "d": Step([], ("b", "c"))}
    assert after("b", plan) == {"b", "d"}
    assert after("a", plan) == {"a", "b", "d"}


@pytest.mark.parametrize(
    ("answer", "thing", "attribute"),
    [
        ("a red pear", "pear", "red"),
        ("an orange tulip", "tulip", "orange"),
        ("girl, dark skin tone", "girl", "dark skin tone"),
        ("bald woman, light skin tone", "woman", "bald light skin tone"),
        ("a tomato on a yellow background", "tomato", "on yellow background"),
        ("a pie, upside down", "pie", "upside down"),
        ("a light bulb", "light bulb", ""),
    ],
)
def test_thing_and_attribute(answer, thing, attribute):
    assert split_description(answer) == (thing, attribute)
