"""`stages/rl.py --status RUN` on folders of runs that live, have ended, have died or never were."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from actors.learner.run_control import Holder, lock_holder, run_lock
from deepgen.config import Settings, UserError, load_settings, parse_command_line
from deepgen.tracking.journal import make_entry
from deepgen.tracking.status import Call, Status, status_to_json, write_status
from stages.rl_status import describe, show_status, status_text
from tests.helpers.statuses import STATUS

HERE = Holder("process 4242 on host", lives=True)
GONE = replace(HERE, lives=False)


def settings_in(folder: Path, name: str = "a") -> Settings:
    return load_settings(None, [f"run.dir={folder / 'runs'}", f"run.name={name}"])


def write(folder: Path, status: Status) -> None:
    write_status(folder, status_to_json(status))


def test_a_live_run() -> None:
    numbers = {"train/grad_norm": 1.0, "reward/clip": 0.25, "reward/total": 0.5}
    entries = [make_entry(2, 900.0, numbers), make_entry(2, 901.0, {"eval/clip": 0.3})]
    assert describe("tiny-rl", STATUS, HERE, entries, 2, now=1002.0).splitlines() == [
        "tiny-rl: running, process 4242 on host",
        "",
        "step         2 of 60 done  clip 0.250  total 0.500",
        "weights      version 2 published last",
        "checkpoint   after step 2",
        "missing      clip 3, judge 0 scores since the start",
        "restarts     rollout 1, clip 0, judge 0",
        "",
        "learner 0 has waited for the batch of step 3 for 5:07",
        "learner 1 has had the batch of step 2 for 8:22",
        "step 2: of 4 groups 4 are sampled, 4 scored",
        "step 3: of 4 groups 2 are sampled, 1 scored",
        "open requests: clip 12, judge 0",
        "busy: 2 of 4 actors",
        "  rollout-1          5:12  sample_group of group 7",
        "  clip reward #0     5:02  score of 4 images",
    ]


def test_a_run_with_a_journal() -> None:
    journal = {"groups_written": 12.0, "groups_read": 3.0, "bytes_written": 4.5e6, "skipped": 0.0}
    numbers = {"train/grad_norm": 1.0, **{f"journal/{name}": count for name, count in journal.items()}}
    text = describe("tiny-rl", STATUS, HERE, [make_entry(2, 900.0, numbers)], 2, now=1002.0)
    assert "journal      12 groups written (4.5 MB), 3 read, 0 skipped" in text.splitlines()


@pytest.mark.parametrize(
    ("status", "holder", "now", "first"),
    [
        (
            STATUS,
            GONE,
            1060.0,
            "a: dead: its process, process 4242 on host, is gone without an end; as it was 1:00 ago",
        ),
        (STATUS, HERE, 1060.0, "a: process 4242 on host starts, ends or hangs: its status is old, written 1:00 ago"),
        (replace(STATUS, ended=True), GONE, 1060.0, "a: ended 1:00 ago"),
    ],
)
def test_a_stale_status_is_said_to_be_stale(status: Status, holder: Holder, now: float, first: str) -> None:
    text = describe("a", status, holder, [], None, now)
    assert text.splitlines()[0] == first
    assert "checkpoint   none yet" in text
    assert ("rollout-1          5:10  sample_group" in text) != status.ended  # ages of the moment when it was written


def test_many_busy_actors_fit_on_a_screen() -> None:
    many = replace(STATUS, calls=tuple(Call(f"rollout-{i}", "sample_group", 690.0) for i in range(512)))
    lines = describe("a", many, HERE, [], None, 1000.0).splitlines()
    assert len(lines) < 40
    assert lines[-1] == "  and 496 more, which began later"


def test_a_run_is_found_by_its_name_and_by_its_folder(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    write(settings.run.folder, replace(STATUS, time=time.time()))
    with run_lock(settings):
        assert lock_holder(settings) is not None
        by_name = status_text(settings_in(tmp_path, "other"), "a")
        assert by_name.startswith("a: running, process ")
        assert status_text(load_settings(None, ["run.dir=/nowhere"]), str(settings.run.folder)).startswith("a: running")
    assert status_text(settings, "a").startswith("a: dead: its process, process ")


def test_there_is_one_line_where_there_is_no_run(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    write(settings.run.dir / "bright", STATUS)
    with pytest.raises(UserError, match=r"no run 'brigt' in .*runs; allowed: bright, .*; did you mean 'bright'\?"):
        status_text(settings, "brigt")
    settings.run.folder.mkdir()
    with pytest.raises(UserError, match=r"a has no status\.json; allowed: the folder of an rl run that has begun"):
        status_text(settings, "a")
    with run_lock(settings):
        assert status_text(settings, "a").startswith("a: starting, process ")


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = settings_in(tmp_path)
    write(settings.run.folder, STATUS)
    with pytest.raises(SystemExit) as ended:
        parse_command_line("rl", ["--status", "a", f"run.dir={settings.run.dir}"], instead={"status": show_status})
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("a: dead: its process is gone")
    with pytest.raises(UserError, match=r"--status: sft has none; allowed: rl\.py in stages/"):
        parse_command_line("sft", ["--status", "a"])
    with pytest.raises(UserError, match=r"--status: got no value"):
        parse_command_line("rl", ["--status"], instead={"status": show_status})
    with pytest.raises(SystemExit):
        parse_command_line("rl", ["--help"])
    assert "  --status RUN " in capsys.readouterr().out
