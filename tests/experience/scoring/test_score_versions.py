"""Scores are kept by the version of the reward that gave them, and found by other runs where that is known."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.experience.journal.score_journal import ScoreJournal
from actors.experience.scoring.pool_parts import RewardScores
from actors.experience.scoring.reward_pool import RewardPool
from deepgen.config.schema.pools import make_pool
from rewards import RewardRequest, Score
from rewards.remote.protocol import MAX_SCORER, read_answer, write_answer
from tests.helpers.fault_server import FaultServer, fault_server
from tests.helpers.local_replicas import LocalRef, Script, ask, in_pool, script
from tests.rewards.remote.test_client import brightness, remote

__all__ = ["script"]

SERVED = {"class": "tests.helpers.local_replicas:Scripted"}
SCORES = {bytes([n]) * 16: n / 7 for n in range(10)}


class Service:
    """A scorer that tells its version, which a test changes with its scores."""

    def __init__(self, version: Any = "v1") -> None:
        self.version, self.bonus, self.asked = version, 0.0, 0

    def __call__(self, path: str, body: bytes) -> Any:
        answer = brightness(path, body)
        self.asked += len(answer["scores"])
        scores = [{"score": one["score"] + self.bonus} for one in answer["scores"]]
        return {"version": 1, "scorer": self.version, "scores": scores}

    def becomes(self, version: str) -> None:
        self.version, self.bonus = version, self.bonus + 10.0


def grey(*levels: int) -> tuple[LocalRef, list[bytes | None]]:
    requests = [RewardRequest("a", "", "t2i", np.full((8, 8, 3), level, np.uint8)) for level in levels]
    return LocalRef(requests), [b"%16d" % level for level in levels]


async def levels_of(pool: RewardPool, *levels: int) -> list[float | None]:
    return [None if value is None else round(value * 255) for value in (await pool.score(*grey(*levels))).values]


def in_run(folder: Path, name: str, scorer: FaultServer, work: Any) -> Any:
    """What `work` returns for the pool of a run below `folder`."""
    options = {"class": "remote", "url": scorer.url, "timeout_s": 30.0, "deadline_s": 60.0}
    return in_pool(work, journal=folder / name / "journal", runs=folder, **options)


def test_another_run_finds_the_scores_of_a_version_that_is_known(script: Script, tmp_path: Path) -> None:
    service = Service()
    with fault_server(service) as scorer:
        assert in_run(tmp_path, "a", scorer, lambda pool: levels_of(pool, 1, 2)) == [1, 2]
        asked = service.asked
        assert in_run(tmp_path, "b", scorer, lambda pool: levels_of(pool, 1, 2)) == [1, 2]
        assert service.asked == asked + 1  # the first request
        service.becomes("v2")
        assert in_run(tmp_path, "c", scorer, lambda pool: levels_of(pool, 1, 2)) == [2551, 2552]
        assert in_run(tmp_path, "b", scorer, lambda pool: levels_of(pool, 1)) == [2551]


@pytest.mark.parametrize("version", [None, "", 7, "x" * (MAX_SCORER + 1)])
def test_a_version_that_is_not_told_is_found_by_the_same_run_only(script: Script, tmp_path: Path, version: Any) -> None:
    service = Service(version)
    with fault_server(service) as scorer:
        for name, asked in (("a", 1), ("a", 0), ("b", 1)):
            before = service.asked
            assert in_run(tmp_path, name, scorer, lambda pool: levels_of(pool, 9)) == [9]
            assert service.asked == before + 1 + asked


def test_a_scorer_that_changes_during_the_run_is_asked_again(script: Script, tmp_path: Path) -> None:
    service = Service()

    async def work(pool: RewardPool) -> list[list[float | None]]:
        found = [await levels_of(pool, 1, 2)]
        service.becomes("v2")
        found += [await levels_of(pool, 3), await levels_of(pool, 1, 2, 3)]
        service.version, service.bonus = "v1", 0.0  # and back
        return [*found, await levels_of(pool, 4), await levels_of(pool, 1, 2, 3), await levels_of(pool, 1, 2, 3)]

    with fault_server(service) as scorer:
        found = in_run(tmp_path, "a", scorer, work)
    assert found == [[1, 2], [2553], [2551, 2552, 2553], [4], [1, 2, 3], [1, 2, 3]]
    assert service.asked == 1 + 2 + 1 + 2 + 1 + 1  # nothing twice under one version


def test_a_call_whose_scores_are_of_two_versions_is_of_none(monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service()

    def changing(path: str, body: bytes) -> Any:
        service.version = f"v{service.asked}"
        return service(path, body)

    monkeypatch.setattr("rewards.remote.protocol.MAX_REQUESTS", 1)
    with fault_server(changing) as scorer:
        reward, requests = remote(scorer.url), grey(1, 2)[0].content
        reward.score(requests[:1])
        assert reward.version == "v0"
        reward.score(requests)
        assert reward.version == ""


def test_the_version_travels() -> None:
    scores: list[Score] = [0.5]
    assert read_answer(write_answer(scores, "ü 1"), 1) == ([0.5], "ü 1")
    assert read_answer(write_answer(scores), 1) == ([0.5], "")
    assert read_answer(b"no json", 1)[1] == ""


# -- files of other runs -----------------------------------------------------------------------------------------------


def journal(folder: Path, name: str, limit: int = 100) -> ScoreJournal:
    return ScoreJournal(folder / name / "journal", make_pool(name, SERVED), limit)


def test_files_of_other_runs_are_read_whatever_happened_to_them(tmp_path: Path) -> None:
    for name in ("a", "b", "torn", "empty"):
        kept = journal(tmp_path, name)
        kept.add(SCORES, {})
        kept.close()
    files = {name: next((tmp_path / name / "journal").iterdir()) for name in ("a", "b", "torn", "empty")}
    content = bytearray(files["a"].read_bytes())
    content[40] ^= 1
    files["a"].write_bytes(content)
    files["torn"].write_bytes(files["torn"].read_bytes()[:-7])
    files["empty"].write_bytes(b"")
    files["b"].unlink()
    (tmp_path / "b" / "journal" / files["b"].name).mkdir()  # no file
    reader = journal(tmp_path, "reader")
    assert reader.read == {} and reader.read_others(tmp_path, 100) == SCORES
    assert reader.damaged == {files["a"]: 1}
    assert reader.read_others(tmp_path / "nowhere", 100) == {} == reader.read_others(tmp_path, 0)


def test_the_newest_scores_are_taken_and_no_more_than_fit(tmp_path: Path) -> None:
    for age, name in enumerate(("new", "old")):
        kept = journal(tmp_path, name)
        kept.add({bytes([age, n]) * 8: float(n) for n in range(10)}, {})
        kept.close()
        (file,) = (tmp_path / name / "journal").iterdir()
        os.utime(file, (1e9 - age, 1e9 - age))
    found = journal(tmp_path, "reader").read_others(tmp_path, 13)
    assert len(found) == 13 and all(bytes([0, n]) * 8 in found for n in range(10))


def test_a_file_that_grows_meanwhile_gives_only_whole_scores(tmp_path: Path) -> None:
    writer, reader = journal(tmp_path, "writer", 2000), journal(tmp_path, "reader", 2000)
    ended = threading.Event()

    def write() -> None:
        for n in range(1500):
            writer.add({n.to_bytes(16, "big"): n / 3}, {})
        ended.set()

    thread = threading.Thread(target=write)
    thread.start()
    sizes: list[int] = []
    while not ended.is_set():
        found = reader.read_others(tmp_path, 2000)
        assert all(score == int.from_bytes(key, "big") / 3 for key, score in found.items())
        sizes.append(len(found))
    thread.join()
    assert len(reader.read_others(tmp_path, 2000)) == 1500 and sizes == sorted(sizes) and not reader.damaged


def test_damage_is_told(script: Script, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)

    async def work(pool: RewardPool) -> RewardScores:
        return await ask(pool, ["0123456789abcdef", "fedcba9876543210"])

    def run(name: str) -> Sequence[float | None]:
        found: RewardScores = in_pool(work, journal=tmp_path / name / "journal", runs=tmp_path)
        return found.values

    assert run("a") == [16.0, 16.0]
    (file,) = (tmp_path / "a" / "journal").iterdir()
    file.write_bytes(b"\0" + file.read_bytes()[1:])
    script.score = lambda names: [1.0 for _ in names]
    assert run("b") == [1.0, 16.0]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"reward pool mine: damaged scores in {file}: 1; they are left out and asked for again"
