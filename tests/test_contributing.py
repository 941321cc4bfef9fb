"""Checks on commit and push: the hooks exist and work, and the workflow runs the same commands as a developer."""

from __future__ import annotations

import importlib.util
import os
import shlex
from pathlib import Path
from typing import Any

import commit_subject
import pytest
import yaml


def hooks(root: Path) -> dict[str, dict[str, Any]]:
    (repository,) = yaml.safe_load((root / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    return {hook["id"]: hook for hook in repository["hooks"]}


def test_hooks_need_no_network(root: Path) -> None:
    assert list(hooks(root)) == ["ruff-check", "ruff-format", "mypy", "commit-subject"]
    for hook in hooks(root).values():
        python, *arguments = shlex.split(hook["entry"])
        assert (hook["language"], python) == ("system", ".venv/bin/python")
        if arguments[0] == "-m":
            assert importlib.util.find_spec(arguments[1])
        else:
            assert (root / arguments[0]).is_file()


def test_hooks_and_make_check_are_the_same(root: Path) -> None:
    makefile = (root / "Makefile").read_text()
    for name in ("ruff-check", "ruff-format", "mypy"):
        command = hooks(root)[name]["entry"].removeprefix(".venv/bin/python ").removesuffix(" --force-exclude")
        assert f"\t$(RUN) {command}" in makefile


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("Share one cluster between tests\n\n" + "Why: " + "x" * 200, 0),
        ("# a comment of git's, which may be long: " + "x" * 80 + "\n\nShort\n", 0),
        ("x" * 72, 0),
        ("x" * 73 + "\n", 1),
        ("# nothing but comments\n", 1),
    ],
)
def test_subjects_have_at_most_72_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], message: str, code: int
) -> None:
    (tmp_path / "message").write_text(message)
    assert commit_subject.main([str(tmp_path / "message")]) == code
    assert capsys.readouterr().err.count("\n") == code


def test_the_workflow_runs_what_a_person_runs(root: Path) -> None:
    (job,) = yaml.safe_load((root / ".github/workflows/ci.yaml").read_text())["jobs"].values()
    assert job["timeout-minutes"] == 30
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert ".ci/run" in commands and any("g++" in command for command in commands)
    (python,) = [step["with"] for step in job["steps"] if "setup-python" in step.get("uses", "")]
    assert (python["python-version"], python["cache"]) == ("3.11", "pip")
    assert (root / python["cache-dependency-path"]).is_file()
    assert os.access(root / ".ci" / "run", os.X_OK)
    assert "make test\n" in (root / ".ci" / "run").read_text()
