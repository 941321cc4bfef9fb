"""Checks before a run starts, and the treatment of an older run of the same name."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from actors.learner.preflight import own_folder, prepare_run, resolve_weights
from deepgen.config import UserError
from tests.helpers.toy import start


def test_a_new_run_keeps_the_old_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs" / "a" / "checkpoints" / "step-000002").mkdir(parents=True)
    older, aside = tmp_path / "runs" / "a", tmp_path / "runs" / "a.1"
    settings = prepare_run(start(tmp_path), "sft")

    def failing_start() -> None:
        with own_folder(settings):
            (older / "quarantine.jsonl").write_text("of the run that did not start")
            raise UserError("data.prompts: not to be read")

    with pytest.raises(UserError, match="not to be read"):
        failing_start()
    assert [path.name for path in older.iterdir()] == ["checkpoints"] and not aside.exists()
    assert "kept as" not in capsys.readouterr().out
    with own_folder(settings):
        pass
    assert (aside / "checkpoints" / "step-000002").is_dir() and not any(older.iterdir())
    assert "kept as" in capsys.readouterr().out


def test_a_new_run_starts_with_an_empty_journal(tmp_path: Path) -> None:
    """Also where the run before ended without a checkpoint, whose folder it takes over."""
    group = tmp_path / "runs" / "a" / "journal" / "groups" / "step-000000-key.group"
    for resume, kept in (("true", True), ("false", False)):
        group.parent.mkdir(parents=True, exist_ok=True)
        group.touch()
        with own_folder(prepare_run(start(tmp_path, f"run.resume={resume}"), "rl")):
            assert group.exists() == kept


@pytest.mark.parametrize("key", ["model.weights", "data.train", "data.cache_dir"])
def test_a_new_run_does_not_put_its_own_input_aside(tmp_path: Path, key: str) -> None:
    settings = start(tmp_path)
    shutil.copytree(tmp_path / "weights", tmp_path / "runs" / "a" / "model")
    (tmp_path / "runs" / "a" / "checkpoints" / "step-000002").mkdir(parents=True)
    inside = tmp_path / "runs" / "a" / ("cache" if key == "data.cache_dir" else "model")
    settings = start(tmp_path, f"{key}={inside}")
    with pytest.raises(
        UserError, match=rf"{key}: .* lies in the folder of run 'a', which .*; allowed: another run\.name"
    ):
        prepare_run(settings, "sft")


def test_a_resume_of_nothing_is_a_first_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So that a scheduler can repeat one command, with --resume in it, from the first time on."""
    settings = start(tmp_path, "run.resume=true")
    prepare_run(settings, "sft")
    assert "there is no run 'a' in " in capsys.readouterr().out
    prepare_run(settings, "sft")
    assert "has no complete checkpoint yet: starting from step 0" in capsys.readouterr().out


def test_what_cannot_start_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run\.dir: cannot write the run folder .*Not a directory"):
        prepare_run(start(tmp_path, f"run.dir={tmp_path / 'file' / 'runs'}"), "sft")
    (tmp_path / "weights" / "transformer" / "w").write_bytes(bytes(1000))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2000))
    with pytest.raises(UserError, match=r"run\.dir: .* MB free, this run needs about"):
        prepare_run(start(tmp_path), "sft")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2 << 30))
    prepare_run(start(tmp_path), "rl")
    with pytest.raises(UserError, match=r"checkpoints and the result, experience\.journal\)"):
        prepare_run(start(tmp_path, "experience.journal=2"), "rl")


def test_weights_of_an_earlier_run(tmp_path: Path) -> None:
    (tmp_path / "done" / "model" / "transformer").mkdir(parents=True)
    (tmp_path / "stopped" / "checkpoints").mkdir(parents=True)
    assert resolve_weights(tmp_path / "done") == resolve_weights(tmp_path / "done" / "model") == tmp_path / "done/model"
    with pytest.raises(UserError, match="has not finished"):
        resolve_weights(tmp_path / "stopped")
    with pytest.raises(UserError, match="not a component folder"):
        resolve_weights(tmp_path)
