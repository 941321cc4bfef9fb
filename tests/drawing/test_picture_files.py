"""The folder that pictures go into: what they say of themselves, and what goes on in it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from deepgen.data.records import Record
from deepgen.drawing.picture_files import LOCK, MANIFEST, SHEET, TABLE, PictureFolder
from deepgen.errors import UserError
from deepgen.seeds import sample_seed

SETTINGS = {"weights": "0123456789ab", "seed": 42, "size": (64, 48), "negative_prompt": ""}
RECORDS = [Record(name, "t2i", f"a {name}", "", None, (), "") for name in ("cat/1", "牌子")]


def picture(level: int) -> np.ndarray:
    return np.full((16, 24, 3), level, dtype=np.uint8)


@pytest.mark.processes  # a font for the sheet is looked for
def test_pictures_say_how_they_were_drawn(tmp_path: Path) -> None:
    folder = PictureFolder(tmp_path / "out")
    with folder.opened(SETTINGS):
        for i, record in enumerate(RECORDS):
            folder.save(record, 0, picture(i))
        assert folder.finish(RECORDS, (0, 1)) == 2
    with Image.open(folder.path(RECORDS[0], 0), formats=["PNG"]) as image:
        assert image.info["prompt"] == "a cat/1" and image.info["weights"] == "0123456789ab"
        assert json.loads(image.info["seed"]) == 42 and json.loads(image.info["size"]) == [64, 48]
        assert int(image.info["noise_seed"]) == sample_seed(42, "cat/1", 0, 0)
    table = pq.read_table(tmp_path / "out" / TABLE).to_pylist()
    assert [(row["file"], row["prompt"], row["sample"]) for row in table] == [
        (folder.path(RECORDS[0], 0).name, "a cat/1", 0),
        ("牌子-0.png", "a 牌子", 0),
    ]
    assert (tmp_path / "out" / SHEET).stat().st_size > 1000


@pytest.mark.processes
def test_the_table_has_all_that_is_there(tmp_path: Path) -> None:
    folder = PictureFolder(tmp_path)
    with folder.opened(SETTINGS):
        for sample in (0, 1, 2):
            folder.save(RECORDS[0], sample, picture(sample))
        folder.save(RECORDS[1], 0, picture(9))
        Image.new("RGB", (8, 8)).save(tmp_path / "mine.png")
        assert folder.finish(RECORDS[:1], (0, 1)) == 2
        assert sorted(row["sample"] for row in pq.read_table(tmp_path / TABLE).to_pylist()) == [0, 0, 1, 2]
        assert folder.finish([replace(RECORDS[0], id="new")], (0,)) == 0
        assert len(pq.read_table(tmp_path / TABLE)) == 4


def test_ids_that_look_alike_have_files_of_their_own(tmp_path: Path) -> None:
    folder = PictureFolder(tmp_path)
    ids = ["a/b", "a-b", "a b", "x" * 120, "x" * 121, "\U00020000" * 70, "../a", "..", "", "a", "a-1"]
    paths = [folder.path(Record(name, "t2i", "p", "", None, (), ""), n) for name in ids for n in (0, 1, 10)]
    assert len(set(paths)) == 3 * len(ids) and {path.parent for path in paths} == {tmp_path}
    assert paths[3].name == "a-b-0.png" and all(len(path.name.encode()) < 200 for path in paths)


def test_the_next_start_draws_what_is_missing(tmp_path: Path) -> None:
    folder = PictureFolder(tmp_path / "out")
    with folder.opened(SETTINGS):
        folder.save(RECORDS[0], 1, picture(3))
        folder.save(RECORDS[0], 3, picture(3))
    whole = folder.path(RECORDS[0], 3).read_bytes()
    folder.path(RECORDS[0], 3).write_bytes(whole[:-20])  # cut off
    folder.path(RECORDS[0], 4).touch()
    folder.path(RECORDS[0], 0).with_name(".cat.png.tmp").touch()  # a killed program's
    again = PictureFolder(tmp_path / "out")
    with again.opened(SETTINGS):
        assert again.missing(RECORDS[0], (0, 1, 2, 3, 4)) == (0, 2, 3, 4)
        assert again.missing(RECORDS[1], (0,)) == (0,)


def test_an_id_stands_for_one_prompt_and_its_sources(tmp_path: Path) -> None:
    folder, edit = PictureFolder(tmp_path), replace(RECORDS[1], task="edit", references=(b"one",))
    with folder.opened(SETTINGS):
        folder.save(RECORDS[0], 0, picture(1))
        folder.save(edit, 0, picture(1))
        assert folder.missing(edit, (0, 1)) == (1,)
        with pytest.raises(UserError, match=r"has prompt 'a cat/1', but 'cat/1' now has 'a boat'; remove it, or give"):
            folder.missing(replace(RECORDS[0], prompt="a boat"), (0,))
        with pytest.raises(UserError, match=r"has sources '\w+', but '牌子' now has '\w+'"):
            folder.missing(replace(edit, references=(b"two",)), (0,))


def test_other_settings_need_another_folder(tmp_path: Path) -> None:
    folder, out = PictureFolder(tmp_path / "out"), tmp_path / "out"
    with folder.opened(SETTINGS | {"seed": 1}):
        pass
    with folder.opened(SETTINGS):  # there was no picture yet
        folder.save(RECORDS[0], 0, picture(1))
    said = r"has pictures with seed 42, now 43; allowed: the same settings, or another"
    with pytest.raises(UserError, match=said), folder.opened(SETTINGS | {"seed": 43}):
        pass
    for content, said in (("{", "is not JSON"), ("[]", "holds no settings")):
        (out / MANIFEST).write_text(content)
        with pytest.raises(UserError, match=said), folder.opened(SETTINGS):
            pass


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    for path in (tmp_path / "mine", tmp_path / "mine" / "letter.txt"):
        with pytest.raises(UserError, match=rf"has no {MANIFEST}"), PictureFolder(path).opened(SETTINGS):
            pass
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]
    long = PictureFolder(tmp_path / ("x" * 300))
    with pytest.raises(UserError, match="--out: cannot write the pictures folder"), long.opened(SETTINGS):
        pass


def test_one_process_at_a_time(tmp_path: Path) -> None:
    said = rf"--out: .* is being drawn into, process {os.getpid()} on .*; allowed: another folder"
    first, second = PictureFolder(tmp_path), PictureFolder(tmp_path)
    with first.opened(SETTINGS), pytest.raises(UserError, match=said), second.opened(SETTINGS):
        pass
    assert (tmp_path / LOCK).is_file()
    with PictureFolder(tmp_path).opened(SETTINGS):
        pass


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    folder = PictureFolder(tmp_path / "out")
    with folder.opened(SETTINGS):
        path = folder.path(RECORDS[0], 0)
        path.with_name(f".{path.name}.tmp").symlink_to("/dev/full")
        with pytest.raises(
            UserError, match=r"--out: cannot write a picture to .*: No space left .*, then run the same"
        ):
            folder.save(RECORDS[0], 0, picture(1))
    assert not path.exists()
