"""Folders in settings and arguments: what addresses, variables and home folders mean, and what cannot be a folder."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from deepgen.config import UserError, load_settings, settings_from_dict
from deepgen.config.recipes import find_recipe
from deepgen.config.schema.paths import expanded
from deepgen.config.schema.sections import MAX_NAME

ROOT = Path(__file__).resolve().parents[2]
OUTPUTS, INPUTS = ("run.dir", "data.cache_dir"), ("model.weights", "data.train", "rewards.judge.path")


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the variable SCRATCH and the home folder, and the current one."""
    folder = tmp_path / "big disk"
    folder.mkdir()
    monkeypatch.setenv("SCRATCH", str(folder))
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.delenv("NO_SUCH", raising=False)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("key", [*OUTPUTS, *INPUTS])
@pytest.mark.parametrize(
    "given",
    ["$SCRATCH/runs", "${SCRATCH}/runs", "~/runs", "file://$SCRATCH/runs", "file://localhost$SCRATCH/runs", "runs"],
)
def test_variables_homes_and_files_are_what_they_look_like(scratch: Path, key: str, given: str) -> None:
    (scratch / "runs").mkdir()
    section, name, *more = key.split(".")
    settings = load_settings(find_recipe("tiny-rl"), [f"{key}={given}"])
    for found in (settings, settings_from_dict(settings.model_dump())):
        value = found.rewards.pools[name] if more else getattr(found, section)
        assert str(getattr(value, more[0] if more else name)) == str(scratch / "runs")
    assert [path.name for path in scratch.iterdir()] == ["runs"]


@pytest.mark.parametrize("key", [*OUTPUTS, *INPUTS])
@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("S3:/bucket/runs", "an address of kind S3://; allowed: a folder"),
        ("hdfs://name/runs", "an address of kind hdfs://"),
        ("https://host/runs", "an address of kind https://"),
        ("$NO_SUCH/runs", "but the variable NO_SUCH is not set"),
        ("${NO_SUCH}", "but the variable NO_SUCH is not set"),
        ("file://host/runs", "an address without a full path on this machine"),
        ("file://runs", "an address without a full path on this machine"),
        ("a\nb", "which has a control character in it"),
        ("a\x01b", "which has a control character in it"),
    ],
)
def test_what_is_no_folder_is_refused_by_name(scratch: Path, key: str, given: str, why: str) -> None:
    with pytest.raises(UserError) as caught:
        load_settings(find_recipe("tiny-rl"), [f"{key}={given}"])
    assert str(caught.value).startswith(f"{key}: got ")
    assert why in str(caught.value) and "\n" not in str(caught.value)
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("key", [key for key in (*OUTPUTS, *INPUTS) if key != "run.dir"])
@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_bucket_is_refused_where_a_folder_of_this_machine_is_wanted(scratch: Path, key: str, scheme: str) -> None:
    with pytest.raises(UserError, match=rf"^{key}: got .*an address of kind {scheme}://; allowed: a folder"):
        load_settings(find_recipe("tiny-rl"), [f"{key}={scheme}://bucket/x"])


def test_letters_of_an_address_are_decoded_and_those_of_a_path_are_not() -> None:
    assert expanded("file:///a%20b/c") == Path("/a b/c")
    assert expanded("/a%20b/c:/d") == Path("/a%20b/c:/d")
    assert expanded("runs/5$") == Path("runs/5$")


@pytest.mark.processes
@pytest.mark.parametrize("program", ["convert", "export"])
def test_programs_refuse_a_bucket_before_they_make_anything(scratch: Path, program: str) -> None:
    command = [sys.executable, str(ROOT / "stages" / f"{program}.py"), str(ROOT / "assets/tiny/data"), "s3://b/out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert "out: got 's3://b/out', an address of kind s3://; allowed: a folder" in last
    assert not list(scratch.iterdir())


def test_programs_take_variables(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["convert.py", "$SCRATCH/in", "file://$SCRATCH/out"])
    arguments = runpy.run_path(str(ROOT / "stages" / "convert.py"))["parse"]()
    assert (arguments.source, arguments.out) == (scratch / "in", scratch / "out")


@pytest.mark.parametrize(
    "name",
    [
        "x" * 300,
        "x" * (MAX_NAME + 1),
        "a/b",
        "../a",
        "a\\b",
        ".hidden",
        "a.",
        "a b",
        "a\nb",
        "a\x01b",
        "-a",
        '""',
        "é",
    ],
)
def test_names_that_make_no_folder_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"^run\.name: got .*; allowed: letters, digits, ") as caught:
        load_settings(None, [f"run.name={name}"])
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["mlflow.db", "mlartifacts", "NUL", "con", "aux.1", "COM1"])
def test_names_that_are_taken_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"^run\.name: got '{name}', which is the name of a file"):
        load_settings(None, [f"run.name={name}"])


@pytest.mark.parametrize("name", ["a", "A.1", "x" * MAX_NAME, "console", "tiny-rl_2"])
def test_other_names_are_folders(name: str, tmp_path: Path) -> None:
    settings = load_settings(None, [f"run.name={name}", f"run.dir={tmp_path}"])
    assert settings.run.folder == tmp_path / name
