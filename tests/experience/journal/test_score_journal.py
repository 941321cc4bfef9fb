"""Scores on disk: what is read back, and what of a damaged file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from actors.experience.journal.origin import scorer_hash
from actors.experience.journal.score_journal import ScoreJournal
from deepgen.config import PoolSettings
from deepgen.config.schema.pools import make_pool

SCORES = {bytes([n]) * 16: n / 7 for n in range(10)}
BYTES = 32  # of a record


def pool(folder: Path, **options: Any) -> PoolSettings:
    content = {"class": "tests.helpers.fake_rewards:FakeReward", "path": str(folder / "reward")} | options
    return make_pool("fake", content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / "weights").write_bytes(b"weights")
    return tmp_path


def opened(folder: Path, limit: int = 100, **options: Any) -> ScoreJournal:
    return ScoreJournal(folder / "journal", pool(folder, **options), limit)


def only_file(folder: Path) -> Path:
    (file,) = (folder / "journal").iterdir()
    return file


def write(folder: Path) -> Path:
    journal = opened(folder)
    for key, score in SCORES.items():
        journal.add({key: score}, {})
    journal.close()
    return only_file(folder)


def test_scores_come_back(folder: Path) -> None:
    assert write(folder).stat().st_size == len(SCORES) * BYTES
    again = opened(folder)
    assert again.read == SCORES
    again.add({b"x" * 16: 0.5}, {})
    assert opened(folder).read == SCORES | {b"x" * 16: 0.5}


def test_a_cut_record_is_written_over(folder: Path) -> None:
    file = write(folder)
    file.write_bytes(file.read_bytes()[:-5])
    journal = opened(folder)
    assert journal.read == dict(list(SCORES.items())[:-1])
    journal.add({b"x" * 16: 0.5}, {})
    assert opened(folder).read == journal.read | {b"x" * 16: 0.5}


@pytest.mark.parametrize("place", range(BYTES))
def test_a_damaged_record_hides_no_other(folder: Path, place: int) -> None:
    file = write(folder)
    content = bytearray(file.read_bytes())
    content[3 * BYTES + place] ^= 1
    file.write_bytes(content)
    assert opened(folder).read == {key: score for key, score in SCORES.items() if key != bytes([3]) * 16}


def test_another_judge_does_not_answer_with_old_scores(folder: Path) -> None:
    write(folder)
    assert opened(folder, replicas=3, retries=5, deadline_s=7.0).read == SCORES
    weights = folder / "reward" / "weights"
    weights.write_bytes(b"WEIGHTS")
    assert opened(folder).read == {}
    assert len(list((folder / "journal").iterdir())) == 1  # the old scores are gone
    write(folder)
    assert opened(folder, batch_size=1).read == {}


def test_the_code_of_a_reward_counts(folder: Path) -> None:
    one = scorer_hash(pool(folder))
    other = scorer_hash(make_pool("fake", {"class": "tests.helpers.visible_rewards:Brightness"}))
    third = scorer_hash(make_pool("fake", {"class": "tests.helpers.visible_rewards:Redness"}))
    assert len({one, other, third}) == 3


def test_pools_do_not_touch_each_other(folder: Path) -> None:
    write(folder)
    other = ScoreJournal(folder / "journal", make_pool("fake-2", {"class": "ocr"}), 5)
    assert other.read == {} and opened(folder).read == SCORES


def test_a_full_file_begins_anew_with_the_cache(folder: Path) -> None:
    journal, cache = opened(folder, limit=4), dict[bytes, float]()
    for key, score in SCORES.items():
        cache = dict([*cache.items(), (key, score)][-4:])
        journal.add({key: score}, cache)
    assert only_file(folder).stat().st_size <= 8 * BYTES
    journal.add({b"x" * 16: 0.5}, cache)
    assert opened(folder, limit=4).read == dict([*list(SCORES.items())[-3:], (b"x" * 16, 0.5)])


def test_a_write_that_failed_in_the_middle_hides_no_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, write_at = opened(folder), os.pwrite
    journal.add({b"a" * 16: 0.25}, {})
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", lambda file, data, place: write_at(file, data[:40], place))
        with pytest.raises(OSError, match="40 of 64 bytes written"):
            journal.add({b"b" * 16: 0.5, b"c" * 16: 0.75}, {})
    journal.add({b"d" * 16: 1.0}, {})
    assert opened(folder).read == {b"a" * 16: 0.25, b"d" * 16: 1.0}
