"""Finished groups on disk: what is read back, what is drawn again, and how much is kept."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actors.experience.journal.group_journal as module
from actors.experience.journal.group_journal import GIB, Drawn, GroupJournal, forget_groups, groups_folder
from actors.experience.journal.journal_counts import JournalCounts
from actors.messages import Group, JournalNews
from deepgen.config import Settings, load_settings
from deepgen.data.records import Record
from deepgen.data.uris import absolute

WEIGHTS = "checksum of version 3"
GROUP = Group(6, 3, 1, Record("p-1", "edit", "make it red", "a red cat", None, (b"a picture",), "test"))


def settings(folder: Path, *more: str) -> Settings:
    (folder / "weights").mkdir(exist_ok=True)
    (folder / "weights" / "w").write_bytes(b"weights")
    where = [f"run.dir={folder / 'runs'}", "run.name=a", f"model.weights={folder / 'weights'}"]
    return load_settings(None, [*where, "experience.journal=1", *more])


class Actor:
    """A journal, and how often its actor draws."""

    def __init__(self, settings: Settings, name: str = "rollout-0", kernels: str = "a CPU") -> None:
        self.journal, self.draws = GroupJournal(settings, name, kernels), 0

    def draw(self, group: Group) -> Drawn:
        self.draws += 1
        numbers = np.random.default_rng(group.step)
        images = numbers.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
        turned = numbers.normal(size=(3, 2)).astype(np.float32).T
        return images, {"trajectory/sigmas": turned, "conditioning/mask": np.array([True, False]), "x/0": np.array(3)}

    def drawn(self, group: Group = GROUP, weights: str = WEIGHTS) -> Drawn:
        found = self.journal.drawn(group, weights, self.draw)
        self.journal.flush(60)
        return found


def files(folder: Path) -> list[Path]:
    """The journal's files, in order."""
    return sorted(groups_folder(folder / "runs" / "a").iterdir())


def only_file(folder: Path) -> Path:
    (file,) = files(folder)
    return file


def assert_same(one: Drawn, other: Drawn) -> None:
    assert np.array_equal(one[0], other[0]) and one[1].keys() == other[1].keys()
    for name, array in one[1].items():
        found = other[1][name]
        assert (array.dtype, array.shape) == (found.dtype, found.shape) and np.array_equal(array, found)


def test_another_actor_reads_what_one_has_drawn(tmp_path: Path) -> None:
    run = settings(tmp_path)
    first, second = Actor(run), Actor(run, "rollout-1")
    assert_same(first.drawn(), second.drawn())
    assert (first.draws, second.draws) == (1, 0)
    assert only_file(tmp_path).name.startswith("step-000003-")
    size = only_file(tmp_path).stat().st_size
    assert first.journal.news() == JournalNews({"groups_written": 1, "bytes_written": size}, ())
    assert second.journal.news() == JournalNews({"groups_read": 1}, ())
    assert second.journal.news() == JournalNews({}, ())


@pytest.mark.parametrize("changed", ["rollout.eta=0.5", "run.seed=9", "data.image_size=256", "model.precision=fp32"])
def test_other_settings_draw_again(tmp_path: Path, changed: str) -> None:
    Actor(settings(tmp_path)).drawn()
    other = Actor(settings(tmp_path, changed))
    other.drawn()
    assert other.draws == 1


def test_settings_that_draw_the_same_do_not(tmp_path: Path) -> None:
    Actor(settings(tmp_path)).drawn()
    other = Actor(settings(tmp_path, "train.steps=70", "rollout.actors=3", "train.learning_rate=1e-5"))
    other.drawn()
    assert other.draws == 0


def test_another_group_policy_or_machine_draws_again(tmp_path: Path) -> None:
    run = settings(tmp_path)
    actor = Actor(run)
    actor.drawn()
    others = [replace(GROUP, step=4), replace(GROUP, epoch=2)]
    others += [
        replace(GROUP, record=replace(GROUP.record, **change))
        for change in ({"id": "p-2"}, {"prompt": "make it blue"}, {"references": (b"another picture",)})
    ]
    for group in others:
        actor.drawn(group)
    actor.drawn(weights="checksum of version 4")
    assert actor.draws == 7
    elsewhere = Actor(run, kernels="another CPU")
    elsewhere.drawn()
    (tmp_path / "weights" / "w").write_bytes(b"WEIGHTS")
    retrained = Actor(run)
    retrained.drawn()
    assert elsewhere.draws == retrained.draws == 1


def test_pictures_on_disk_count_by_what_they_hold(tmp_path: Path) -> None:
    picture, actor = tmp_path / "picture.png", Actor(settings(tmp_path))
    group = replace(GROUP, record=replace(GROUP.record, references=(absolute(str(picture), tmp_path),)))
    for content, draws in ((b"one", 1), (b"one", 1), (b"two", 2)):
        picture.write_bytes(content)
        actor.drawn(group)
        assert actor.draws == draws


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip(place: int) -> Callable[[Path], None]:
    def flip_bit(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[place] ^= 4
        file.write_bytes(content)

    return flip_bit


def of_another_group(file: Path) -> None:
    other = Actor(settings(file.parents[4]))
    other.drawn(replace(GROUP, step=9))
    (foreign,) = file.parent.glob("step-000009-*")
    foreign.rename(file)


@pytest.mark.parametrize("damage", [cut, empty, flip(3), flip(20), flip(60), flip(-1), of_another_group])
def test_a_damaged_group_is_drawn_again(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    run = settings(tmp_path)
    before = Actor(run).drawn()
    damage(only_file(tmp_path))
    actor = Actor(run)
    assert_same(before, actor.drawn())
    assert actor.draws == 1
    (warning,) = actor.journal.news().warnings
    assert warning == f"{only_file(tmp_path)} is damaged; the group is drawn again"
    assert_same(before, actor.drawn())  # the file is whole again
    assert actor.draws == 1


def test_the_bound_is_kept(tmp_path: Path) -> None:
    actor = Actor(settings(tmp_path))
    actor.drawn()
    size = only_file(tmp_path).stat().st_size
    bounded = Actor(settings(tmp_path, f"experience.journal={2.5 * size / GIB}"))
    for step in range(4, 8):
        bounded.drawn(replace(GROUP, step=step))
    news = bounded.journal.news()
    assert news.counts == {"groups_written": 1, "bytes_written": size, "skipped": 3}
    assert "experience.journal: its " in news.warnings[0] and "full until the next checkpoint" in news.warnings[0]
    forget_groups(settings(tmp_path).run.folder, before=4)
    bounded.drawn(replace(GROUP, step=8))
    assert [file.name[:11] for file in files(tmp_path)] == ["step-000004", "step-000008"]


def test_groups_of_finished_steps_go(tmp_path: Path) -> None:
    run = settings(tmp_path)
    forget_groups(run.run.folder, before=5)  # nothing is there yet
    actor = Actor(run)
    for step in (3, 4, 5, 12):
        actor.drawn(replace(GROUP, step=step))
    folder = groups_folder(run.run.folder)
    (folder / "step-000004-key.rollout-1.writing").write_bytes(b"left by a dead actor")
    (folder / "notes").write_bytes(b"not ours")
    forget_groups(run.run.folder, before=5)
    assert [file.name[:11] for file in files(tmp_path)] == ["notes", "step-000005", "step-000012"]


def test_a_full_disk_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, mode: str = "r", **more: Any) -> Any:
        if "w" in mode:
            self.touch()
            raise OSError(errno.ENOSPC, "No space left on device")
        return open(self, mode, **more)

    run = settings(tmp_path)
    actor = Actor(run)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full)
        actor.drawn()
        actor.drawn(replace(GROUP, step=4))
    news = actor.journal.news()
    assert news.counts == {"skipped": 2} and len(set(news.warnings)) == 1
    assert "No space left on device; groups that are not kept would be drawn again" in news.warnings[0]
    assert not files(tmp_path)
    actor.drawn()
    assert actor.journal.news().counts["groups_written"] == 1


def test_a_slow_disk_delays_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    actor, go_on = Actor(settings(tmp_path)), threading.Event()
    write = GroupJournal._write

    def slow(self: GroupJournal, file: Path, drawn: Drawn) -> None:
        assert go_on.wait(60)
        write(self, file, drawn)

    monkeypatch.setattr(GroupJournal, "_write", slow)
    for step in range(6):
        actor.journal.drawn(replace(GROUP, step=step), WEIGHTS, actor.draw)
    go_on.set()
    actor.journal.flush(60)
    news = actor.journal.news()
    assert (news.counts["groups_written"], news.counts["skipped"]) == (4, 2)
    assert "the disk is slower than generation, 4 groups are waiting" in news.warnings[0]


def test_a_bug_is_no_fault_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(tensors: Any) -> bytes:
        raise ZeroDivisionError

    actor = Actor(settings(tmp_path))
    monkeypatch.setattr(module, "save", broken)
    actor.journal.drawn(GROUP, WEIGHTS, actor.draw)
    with pytest.raises(ZeroDivisionError):
        actor.journal.flush(60)
    with pytest.raises(ZeroDivisionError):
        actor.drawn(replace(GROUP, step=4))


def test_the_stream_adds_up_and_says_a_warning_once(caplog: pytest.LogCaptureFixture) -> None:
    counts = JournalCounts()
    counts.add(None)
    assert counts.metrics() == {}  # off
    for _ in range(2):
        counts.add(JournalNews({"groups_written": 2, "bytes_written": 10, "skipped": 1}, ("the disk is full",)))
    assert counts.metrics() == {
        "journal/groups_written": 4.0,
        "journal/groups_read": 0.0,
        "journal/bytes_written": 20.0,
        "journal/skipped": 2.0,
    }
    assert [record.getMessage() for record in caplog.records] == ["the disk is full"]
