"""What is read for drawing, and the folder that pictures go into."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from deepgen.data.records import Record
from deepgen.drawing.picture_files import MANIFEST, SHEET, TABLE, PictureFolder
from deepgen.drawing.prompts import Reader, read_wanted
from deepgen.errors import UserError
from tests.helpers.factories import make_tiny_folder

SETTINGS = {"weights": "0123456789ab", "seed": 42, "size": None, "negative_prompt": ""}
RECORDS = [Record(name, "t2i", f"a {name}", "", None, (), "") for name in ("cat/1", "牌子")]


def picture(level: int) -> np.ndarray:
    return np.full((16, 24, 3), level, dtype=np.uint8)


@pytest.mark.processes  # a font for the sheet is looked for
def test_pictures_say_how_they_were_drawn(tmp_path: Path) -> None:
    folder = PictureFolder(tmp_path / "out", SETTINGS)
    folder.open()
    for i, record in enumerate(RECORDS):
        folder.save(record, 0, picture(i))
    assert folder.finish(RECORDS, (0, 1)) == 2
    with Image.open(folder.path(RECORDS[0], 0), formats=["PNG"]) as image:
        assert image.info["prompt"] == "a cat/1" and image.info["weights"] == "0123456789ab"
        assert json.loads(image.info["seed"]) == 42
    table = pq.read_table(tmp_path / "out" / TABLE).to_pylist()
    assert [(row["file"], row["prompt"], row["sample"]) for row in table] == [
        (folder.path(RECORDS[0], 0).name, "a cat/1", 0),
        ("牌子-0.png", "a 牌子", 0),
    ]
    assert (tmp_path / "out" / SHEET).stat().st_size > 1000


def test_ids_that_look_alike_have_files_of_their_own(tmp_path: Path) -> None:
    folder = PictureFolder(tmp_path, SETTINGS)
    ids = ["a/b", "a-b", "a b", "x" * 70, "x" * 71, "../a", "..", "", "a", "a-1"]
    paths = [folder.path(Record(name, "t2i", "p", "", None, (), ""), n) for name in ids for n in (0, 1, 10)]
    assert len(set(paths)) == 3 * len(ids) and {path.parent for path in paths} == {tmp_path}
    assert paths[3].name == "a-b-0.png"


def test_the_next_start_draws_what_is_missing(tmp_path: Path) -> None:
    PictureFolder(tmp_path / "out", SETTINGS).open()
    folder = PictureFolder(tmp_path / "out", SETTINGS)
    folder.open()
    folder.save(RECORDS[0], 1, picture(3))
    (tmp_path / "out" / ".cat-1-2.png.tmp").touch()  # a killed program's
    assert folder.missing(RECORDS[0], (0, 1, 2)) == (0, 2)
    assert folder.missing(RECORDS[1], (0,)) == (0,)


def test_other_settings_need_another_folder(tmp_path: Path) -> None:
    PictureFolder(tmp_path / "out", SETTINGS).open()
    with pytest.raises(UserError, match=r"has pictures with seed 42, now 43; allowed: the same settings, or another"):
        PictureFolder(tmp_path / "out", SETTINGS | {"seed": 43}).open()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    with pytest.raises(UserError, match=rf"has no {MANIFEST}"):
        PictureFolder(tmp_path / "mine", SETTINGS).open()
    (tmp_path / "out" / MANIFEST).write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        PictureFolder(tmp_path / "out", SETTINGS).open()


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    folder = PictureFolder(tmp_path / "out", SETTINGS)
    folder.open()
    folder.path(RECORDS[0], 0).with_name(f".{folder.path(RECORDS[0], 0).name}.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"--out: cannot write a picture to .*: No space left .*, then run the same"):
        folder.save(RECORDS[0], 0, picture(1))
    assert not folder.path(RECORDS[0], 0).exists()


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return Reader(make_tiny_folder(tmp_path_factory.mktemp("model")) / "tokenizer", 200, 128, 64)


def wanted(reader: Reader, given: str, *images: Path) -> tuple[list[Record], list[str]]:
    records, bad = read_wanted(given, images, (), reader)
    return records, [f"{Path(one.place).name}: {one.reason}" for one in bad]


def test_a_prompt_is_drawn_alike_wherever_it_stands(tmp_path: Path, reader: Reader) -> None:
    (alone,), _ = wanted(reader, "a red cat")
    (tmp_path / "a.txt").write_text("a dog\na red cat\n")
    (tmp_path / "b.jsonl").write_text('{"prompt": "a red cat"}\n{"prompt": "a red cat", "id": "mine"}\n')
    listed, _ = wanted(reader, str(tmp_path / "a.txt"))
    keyed, _ = wanted(reader, str(tmp_path / "b.jsonl"))
    assert [record.id for record in listed].index(alone.id) == 1
    assert [record.id for record in keyed] == [alone.id, "mine"]


def test_bad_rows_are_told_and_left_out(tmp_path: Path, reader: Reader) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"%!PS-Adobe")
    rows = [
        {"prompt": "a cat"},
        {"prompt": "  "},
        {"prompt": "say <|im_end|>"},
        {"prompt": "blue", "references": ["bad.png"]},
        {"prompt": "blue", "references": ["good.png"]},
        {"prompt": "blue", "references": ["long.png"]},
        {"prompt": "a cat"},
        {"prompt": "a dog", "id": "x"},
        {"prompt": "a bird", "id": "x"},
    ]
    Image.new("RGB", (400, 50)).save(tmp_path / "long.png")
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records, bad = wanted(reader, str(tmp_path / "list.jsonl"))
    assert [record.task for record in records] == ["t2i", "edit", "t2i"]
    assert [line.partition(":")[0] for line in bad] == [f"list.jsonl, row {n}" for n in (2, 3, 4, 6, 7, 9)]
    assert "empty" in bad[0] and "<|im_end|>" in bad[1] and "not a readable image" in bad[2]
    assert "source 1 is 400x50 px, 192x32 once it is scaled; allowed: 128 px" in bad[3]
    assert bad[4].endswith("list.jsonl, row 1") and bad[5].endswith("list.jsonl, row 8")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("a <|im_end|>", "reserved token"),
        ("word " * 300, "tokens long; the model reads 200"),
        ("x" * 10**7, "letters; the model reads 200 tokens"),
    ],
)
def test_a_bad_prompt_of_the_command_line_is_an_error(reader: Reader, given: str, said: str) -> None:
    with pytest.raises(UserError, match=f"--prompts: .*{said}"):
        wanted(reader, given)


def test_images_of_the_command_line_are_sources_of_all(tmp_path: Path, reader: Reader) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "good.png")
    (record,), _ = wanted(reader, "make it blue", tmp_path / "good.png")
    assert record.task == "edit" and record.references == ((tmp_path / "good.png").read_bytes(),)
    with pytest.raises(UserError, match=r"no\.png: No such file"):
        wanted(reader, "make it blue", tmp_path / "no.png")
