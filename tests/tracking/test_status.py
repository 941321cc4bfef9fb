"""The status of a live run: written in one go, and what the watchdog says of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from deepgen.errors import UserError
from deepgen.tracking.status import STATUS as FILE
from deepgen.tracking.status import Call, read_status, silence_text, status_to_json, write_status
from tests.helpers.statuses import STATUS


def test_a_status_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    write_status(tmp_path / "run", status_to_json(STATUS))
    assert read_status(tmp_path / "run") == STATUS
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["status.json"]


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"time": 1}', b"\xff", b"[" * 100_000])
def test_a_damaged_status_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(UserError, match=r"status\.json: not a run's status \(.*\); a run that goes on replaces it"):
        read_status(tmp_path)


def test_silence_says_who_waits_for_whom() -> None:
    assert silence_text(STATUS, 300) == (
        "nothing has moved for 5:00; busy: rollout-1 for 5:10 (sample_group of group 7), clip reward #0 for 5:00 "
        "(score of 4 images); open requests: clip 12, judge 0; learner 0 has waited for the batch of step 3 for 5:05; "
        "learner 1 has had the batch of step 2 for 8:20"
    )
    nobody = replace(STATUS, calls=(), learner=(), open_requests={})
    assert silence_text(nobody, 300) == (
        "nothing has moved for 5:00; busy: nobody; open requests: none; the learner has not asked for a batch yet"
    )


def test_silence_of_many_actors_is_one_readable_line() -> None:
    many = replace(STATUS, calls=tuple(Call(f"rollout-{i}", "sample_group", 690.0) for i in range(512)))
    text = silence_text(many, 300)
    assert "rollout-7 for 5:10 (sample_group), and 504 more; open" in text
    assert "rollout-8" not in text
