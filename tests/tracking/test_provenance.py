"""Where a run's code comes from: commit, what is not committed, the job, and what a continued run adds."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from deepgen.tracking import provenance
from deepgen.tracking.provenance import attempt_tags, git_diff, git_state


@pytest.fixture
def git(tmp_path: Path) -> Callable[..., None]:
    """Calls git in a new checkout with one commit."""

    def call(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    call("init")
    (tmp_path / "file.py").write_text("one = 1\n")
    call("add", ".")
    call("commit", "-m", "one")
    return call


@pytest.mark.processes
def test_the_diff_has_what_is_changed_staged_and_new_without_secrets(tmp_path: Path, git: Callable[..., None]) -> None:
    assert git_diff(tmp_path) == ""
    (tmp_path / "file.py").write_text("one = 2\napi_key = 'hunter2'\n")
    (tmp_path / "staged.py").write_text("two = 2\n")
    git("add", "staged.py")
    (tmp_path / "new.py").write_text("three = 3\n")
    patch = git_diff(tmp_path)
    assert patch.startswith("# not in git: new.py\ndiff --git ") and patch.endswith("+two = 2\n")
    assert "-one = 1\n+one = 2\n" in patch and "hunter2" not in patch
    (tmp_path / "file.py").write_text("one = 2\n")
    (tmp_path / "diff.patch").write_text(git_diff(tmp_path))
    git("reset", "--hard")
    git("apply", "diff.patch")
    assert (tmp_path / "file.py").read_text() == "one = 2\n" and (tmp_path / "staged.py").exists()


@pytest.mark.processes
def test_a_large_diff_is_cut_at_a_line(
    tmp_path: Path, git: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "MAX_DIFF", 1000)
    (tmp_path / "file.py").write_text("".join(f"x = {number}\n" for number in range(1000)))
    *_, last, note = git_diff(tmp_path).splitlines()
    assert last.startswith("+x = ") and note.startswith("# cut here: ") and note.endswith(" more bytes")
    assert len(git_diff(tmp_path)) < 1100
    monkeypatch.setattr(provenance, "MAX_DIFF", 5)
    assert git_diff(tmp_path).startswith("# cut here: ")


@pytest.mark.processes
def test_code_without_git_is_what_the_submitter_says_or_unknown(
    tmp_path: Path, git: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    commit = "0123456789abcdef0123456789abcdef01234567"
    said = {
        commit: (commit, "false"),
        f"{commit}-dirty": (commit, "true"),
        "": ("unknown",) * 2,
        "v1": ("unknown",) * 2,
    }
    for text, (name, dirty) in said.items():
        monkeypatch.setenv("DEEPGEN_GIT_COMMIT", text)
        assert git_state(copy) == {"git.commit": name, "git.dirty": dirty}
    assert git_diff(copy) == ""
    monkeypatch.setenv("DEEPGEN_GIT_COMMIT", commit)
    assert git_state(tmp_path)["git.commit"] != commit  # a checkout knows better
    command = ["git", "-C", str(tmp_path), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    git("tag", "-a", "v1", "-m", "v1")
    (tmp_path / "file.py").write_text("one = 2\n")
    monkeypatch.setenv("DEEPGEN_GIT_COMMIT", subprocess.check_output(command, text=True))
    assert git_state(copy) == git_state(tmp_path) | {"git.dirty": "true"}


def test_a_continued_run_keeps_its_tags_and_adds_what_differs() -> None:
    first = {"git.commit": "a", "ray.job_id": "01", "host": "node1", "attempts": "1"}
    second = attempt_tags({"git.commit": "a", "ray.job_id": "02", "host": "node1"}, first)
    assert second == {"attempts": "2", "attempt.2.ray.job_id": "02"}
    third = attempt_tags({"git.commit": "b", "ray.job_id": "02", "host": "node1"}, first | second)
    assert third == {"attempts": "3", "attempt.3.git.commit": "b"}
    fourth = attempt_tags({"git.commit": "a", "ray.job_id": "01", "host": "node1"}, first | second | third)
    assert fourth == {"attempts": "4", "attempt.4.git.commit": "a", "attempt.4.ray.job_id": "01"}
    assert attempt_tags({"host": "x"}, {"host": "x"}) == {"attempts": "2"}  # of a run from before there were attempts
