"""`metrics.jsonl` and its like after a death in the middle of a line, and on a full disk."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepgen.data.quarantine import FILE, BadRow, Quarantine, rows_in
from deepgen.errors import UserError
from deepgen.tracking.journal import FILE_NAME, Journal, make_entry, read_series
from deepgen.tracking.timeline import read_spans
from deepgen.tracking.tracker import Tracker
from tests.helpers.small_disk import fill, small_disk
from tests.tracking.test_tracker import settings_in

TORN = [  # what may stand at the end of a file
    b'{"step": 2, "ti',
    b"{",
    b'{"step": 2, "time": 1, "metrics": {"a": 7}}',  # all but the end of the line
    b'{"file": "t.parquet", "row": 1',
    b"\0" * 64,  # after a power cut
    b"\xff\xfe\x80",
]
DAMAGED = [b"\n", b"null\n", b'[1]\n{"a"\n', *(end + b"\n" for end in TORN[:2] + TORN[4:])]  # and in its middle


@pytest.mark.parametrize("end", TORN)
def test_a_torn_last_line_is_dropped(tmp_path: Path, end: bytes) -> None:
    whole = b'{"step": 1, "time": 1, "metrics": {"a": 1}}\n'
    (tmp_path / FILE_NAME).write_bytes(whole + end)
    journal = Journal(tmp_path, resume=True)
    journal.append(make_entry(2, 2.0, {"a": 4}))
    journal.close()
    assert read_series(journal.path) == {"a": ([1, 2], [1.0, 4.0])}
    assert [json.loads(line)["step"] for line in journal.path.read_bytes().splitlines()] == [1, 2]

    bad = [BadRow("t.parquet", row, f"r{row}", "no") for row in (1, 2)]
    said: list[str] = []
    Quarantine(1.0, tmp_path, say=said.append).add(9, bad[:1])
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes() + end)
    Quarantine(1.0, tmp_path, resume=True, say=said.append).add(9, bad)
    assert [json.loads(line)["row"] for line in path.read_bytes().splitlines()] == [1, 2]


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_hides_no_other(tmp_path: Path, line: bytes) -> None:
    """A resume goes on; a row that was in such a line is written again."""
    (tmp_path / FILE_NAME).write_bytes(line + b'{"step": 1, "time": 1, "metrics": {"a": 1}}\n' + line)
    assert read_series(tmp_path / FILE_NAME) == {"a": ([1], [1.0])}
    (tmp_path / FILE).write_bytes(line + b'{"file": "t", "row": 7}\n')
    assert rows_in(tmp_path / FILE) == ({("t", 7)}, False)
    (tmp_path / "timeline-x.jsonl").write_bytes(
        line + b'{"actor": "a", "role": "r", "what": "w", "begin": 1, "end": 2}\n'
    )
    assert [span.actor for span in read_spans(tmp_path)] == ["a"]


@pytest.fixture
def disk(tmp_path: Path, empty_database: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 4) as folder:
        shutil.copy(empty_database, folder / "mlflow.db")
        yield folder


@pytest.mark.processes
def test_numbers_wait_for_room(disk: Path) -> None:
    """Nothing is lost, and no line is torn, if there is room again before the end."""
    journal = Journal(disk, resume=False)
    journal.append(make_entry(0, 0.0, {"a": 0.0}))
    filler, refused = fill(disk), 0
    for step in range(1, 300):  # some still fit into the last page
        try:
            journal.append(make_entry(step, 0.0, {"a": float(step)}))
        except OSError:
            refused += 1
    assert refused > 100
    filler.unlink()
    journal.append(make_entry(300, 0.0, {"a": 300.0}))
    journal.close()
    assert read_series(journal.path)["a"][0] == list(range(301))
    assert all(json.loads(line) for line in journal.path.read_text().splitlines())


@pytest.mark.processes
def test_numbers_that_are_lost_are_an_error_at_the_end(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With the file's name; a run that has failed already keeps its own error."""
    uri = f"tracking.uri=sqlite:///{disk.parent / 'mlflow.db'}"  # elsewhere
    shutil.copy(disk / "mlflow.db", disk.parent / "mlflow.db")
    for number, status in enumerate(("FINISHED", "FAILED")):
        tracker = Tracker(settings_in(disk, uri, f"run.name=a{number}"), "rl").start()
        filler = fill(disk)
        for step in range(200):
            tracker.log(step, {"a": 1.0})
        assert tracker.journal_failures > 0
        says = f"run.dir: cannot write the numbers to {tracker.folder / FILE_NAME}: No space left on device; make room"
        caplog.clear()
        if status == "FINISHED":
            with pytest.raises(UserError) as caught:
                tracker.close(status)
            assert str(caught.value).startswith(says)
        else:
            with caplog.at_level(logging.WARNING):
                tracker.close(status)
            assert says in caplog.text
        filler.unlink()


@pytest.mark.processes
def test_a_database_on_a_full_disk_is_named(disk: Path) -> None:
    (disk / "trial" / "images").mkdir(parents=True)
    fill(disk)
    with pytest.raises(UserError) as caught:
        Tracker(settings_in(disk), "rl", attach=True).start()
    assert str(caught.value).startswith(f"tracking.uri: cannot read or write {disk / 'mlflow.db'}: ")
    assert "database or disk is full; make room" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.processes
def test_unusable_records_on_a_full_disk(disk: Path) -> None:
    """One line with the file. With room the next start goes on from what is whole."""
    rows = [BadRow("t.parquet", row, f"r{row}", "no " * 20) for row in range(200)]
    quarantine = Quarantine(1.0, disk, say=lambda line: None)
    quarantine.add(1000, rows[:1])
    filler = fill(disk)
    with pytest.raises(UserError, match=rf"run\.dir: cannot write unusable records to {disk / FILE}: No space left"):
        quarantine.add(1000, rows)
    filler.unlink()
    Quarantine(1.0, disk, resume=True, say=lambda line: None).add(1000, rows)
    assert [json.loads(line)["row"] for line in (disk / FILE).read_text().splitlines()] == list(range(200))
