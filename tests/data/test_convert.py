"""Conversion of users' data: every form, every kind of damage, and continuing after a stop."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from deepgen.data.conversion.convert_units import (
    Limits,
    convert_unit,
    image_fault,
    shard_path,
    tally_path,
    total_tally,
    unfinished,
    write_plan,
    write_report,
)
from deepgen.data.conversion.raw_data import guess_form, plan_units, source_files
from deepgen.data.conversion.readers.raw_sample import RawData
from deepgen.data.parquet import read_records, write_records
from deepgen.data.records import Record
from deepgen.data.uris import UriError
from deepgen.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
LIMITS = Limits(min_side=16)


def picture(width: int = 32, height: int = 32, kind: str = "PNG", value: int = 90) -> bytes:
    pixels = np.full((height, width, 3), value, dtype=np.uint8)
    pixels[::2] += np.arange(width, dtype=np.uint8)[None, :, None]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def convert(path: Path, out: Path, **options) -> list[Record]:
    form = options.pop("form", None) or guess_form(path)
    source = RawData(path, form, **options)
    units = plan_units(source, 3, source_files(source).files)
    write_plan(out, source, LIMITS, 3, 0, units)
    for unit in unfinished(out, units):
        convert_unit(source, unit, out, LIMITS, seed=0)
    return sorted(read_records(out), key=lambda r: r.id) if any(out.glob("*.parquet")) else []


def reasons(out: Path) -> list[str]:
    lines = [line for file in sorted((out / "quarantine").glob("*.jsonl")) for line in file.read_text().splitlines()]
    return [json.loads(line)["reason"] for line in lines]


# ---------------------------------------------------------------- forms


def test_our_own_parquet(tmp_path):
    records = [Record(f"r{i}", "t2i", f"a {i}", f"{i}", picture(value=i), (), "here") for i in range(7)]
    write_records(tmp_path / "in" / "a.parquet", records)
    again = convert(tmp_path / "in", tmp_path / "out")
    assert [(r.id, r.prompt, r.answer, r.image) for r in again] == [
        (r.id, r.prompt, r.answer, r.image) for r in records
    ]
    assert pq.ParquetFile(next((tmp_path / "out").glob("shard-*"))).metadata.num_rows == 7  # a row group is not split


def test_hugging_face_parquet(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "b.png").write_bytes(picture(value=3))
    rows = [
        {"image": {"bytes": picture(), "path": "a.png"}, "caption": "one"},
        {"image": {"bytes": None, "path": "pictures/b.png"}, "caption": "two"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert [r.prompt for r in convert(tmp_path / "x.parquet", tmp_path / "out")] == ["one", "two"]


def test_hugging_face_columns_are_asked_for(tmp_path):
    rows = [
        {"picture": {"bytes": picture(), "path": None}, "wish": "bluer", "old": [{"bytes": picture(), "path": None}]}
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"which column is the image\? It has: picture, wish, old; say --column image="):
        convert(tmp_path / "x.parquet", tmp_path / "out")
    names = {"image": "picture", "prompt": "wish", "references": "old"}
    (record,) = convert(tmp_path / "x.parquet", tmp_path / "out2", columns=names, task="edit")
    assert (record.task, record.prompt, len(record.references)) == ("edit", "bluer", 1)


def test_webdataset_with_captions_json_and_edits(tmp_path):
    members = {
        "s/000.jpg": picture(kind="JPEG"),
        "s/000.txt": b"a cat\n",
        "s/001.png": picture(),
        "s/001.json": json.dumps({"caption": "a dog", "width": 32}).encode(),
        "s/002.source.png": picture(value=1),
        "s/002.target.png": picture(value=2),
        "s/002.txt": b"make it brighter",
    }
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    found = {r.prompt: r for r in convert(tmp_path, tmp_path / "out")}
    assert set(found) == {"a cat", "a dog", "make it brighter"}
    edit = found["make it brighter"]
    assert (edit.task, edit.image, edit.references) == ("edit", picture(value=2), (picture(value=1),))


def json_sets(folder: Path) -> dict[str, list]:
    """Write the JSON forms of M2.6 with pictures beside them."""
    for i in range(2):
        (folder / f"{i}.png").write_bytes(picture(value=i))
        (folder / f"{i}.json_note").write_text(json.dumps({"caption": f"picture {i}", "other": "no"}))
    return {
        "captions": [{"image": f"{i}.png", "annotation": f"{i}.json_note"} for i in range(2)],
        "blip3o": [
            {"type": "text2image", "txt": "picture 0", "image": "0.png"},
            {"txt": "picture 1", "image_path": "1.png"},
        ],
        "edits": [{"input_image": ["0.png", "1.png"], "output_image": "1.png", "instruction": "picture 1"}],
    }


@pytest.mark.parametrize("form", ["captions", "blip3o", "edits"])
def test_json_lists(tmp_path, form):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "list.json").write_text(json.dumps(json_sets(tmp_path / "in")[form]))
    assert guess_form(tmp_path / "in" / "list.json") == form
    records = convert(tmp_path / "in" / "list.json", tmp_path / "out")
    assert records[-1].prompt == "picture 1"
    assert records[-1].image == picture(value=1)
    assert len(records[-1].references) == (2 if form == "edits" else 0)


def test_a_folder_of_json_lists(tmp_path):
    (tmp_path / "in").mkdir()
    entries = json_sets(tmp_path / "in")["captions"]
    for i, entry in enumerate(entries):
        (tmp_path / "in" / f"part{i}.json").write_text(json.dumps([entry]))
    assert [r.prompt for r in convert(tmp_path / "in", tmp_path / "out")] == ["picture 0", "picture 1"]


# ---------------------------------------------------------------- damage


def bomb() -> bytes:
    """A PNG whose header announces 60,000 x 60,000 pixels."""
    data = bytearray(picture())
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (picture(), ""),
        (picture(kind="JPEG"), ""),
        (None, "file missing"),
        (b"", "no bytes"),
        (b"<html>not found</html>", "not an image"),
        (picture(kind="JPEG", width=200, height=200)[:900], "truncated"),
        (picture(width=8), "a side below 16 px"),
        (picture(width=640, height=16), "sides in a ratio above 8"),
        (bomb(), "not an image"),  # its checksum is wrong; with a correct one the size would be rejected
    ],
)
def test_faults_of_images(data, fault):
    assert image_fault(data, LIMITS) == fault


def test_too_many_pixels_are_refused_by_the_header():
    assert image_fault(picture(64, 64), Limits(16, 8.0, max_pixels=4000)) == "too many pixels"


def test_unusable_samples_are_quarantined_and_counted(tmp_path):
    (tmp_path / "in").mkdir()
    entries = json_sets(tmp_path / "in")["blip3o"]
    entries += [{"txt": " ", "image": "0.png"}, {"txt": "gone", "image": "9.png"}, {"txt": 5, "image": "0.png"}, "text"]
    (tmp_path / "in" / "list.json").write_text(json.dumps(entries))
    assert len(convert(tmp_path / "in" / "list.json", tmp_path / "out")) == 2
    assert sorted(reasons(tmp_path / "out")) == [
        "caption: no text",
        "empty caption",
        "empty caption",
        "target: file missing",
    ]
    total = write_report(tmp_path / "out")
    assert (total.kept, total.total, total.bad_share) == (2, 6, 4 / 6)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["dropped"]["target: file missing"] == 1
    for name in ("samples.png", "histograms.png"):
        assert Image.open(tmp_path / "out" / name).width > 300


def test_the_reason_of_an_unreadable_uri_is_kept(tmp_path):
    (tmp_path / "in" / "folder").mkdir(parents=True)
    images: list[bytes | str] = [
        picture(),
        picture(200, 200),
        "gone.png",
        "also_gone.png",
        "folder",
        "ftp://host/a.png",
    ]
    for number, image in enumerate(images):
        write_records(tmp_path / "in" / f"{number}.parquet", [Record(f"r{number}", "t2i", "a", "a", image, (), "here")])
    assert len(convert(tmp_path / "in", tmp_path / "out")) == 2
    dropped = write_report(tmp_path / "out").dropped
    assert dropped["target: file missing"] == 2
    assert dropped["target: cannot be read (Is a directory)"] == 1
    assert len(dropped) == 3  # one for each kind, not for each name
    lines = [json.loads(file.read_text()) for file in sorted((tmp_path / "out" / "quarantine").glob("*.jsonl"))]
    assert lines[1]["reason"] == "target: file missing"
    assert lines[1]["unread"] == [f"{tmp_path / 'in' / 'also_gone.png'}: file missing"]
    assert "unknown scheme ftp://" in lines[3]["reason"] and lines[3]["unread"][0].startswith("ftp://host/a.png: ")
    assert image_fault(UriError("s3://b/a", "Path does not exist 'b/a'"), LIMITS).endswith("(Path does not exist ...)")
    sized = [row for shard in (tmp_path / "out").glob("shard-*") for row in pq.read_table(shard).to_pylist()]
    assert sorted((row["width"], row["height"]) for row in sized) == [(32, 32), (200, 200)]
    assert all(row["reference_sizes"] == [] for row in sized)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", b"{", "neither a list"),
        ("x.json", b'{"a": 1}', "expected a list"),
        ("x.json", b'[{"what": 1}]', "a list of unknown form"),
        ("x.parquet", b"PAR1 nothing", "can't be read as parquet"),
        ("x.docx", b"hello", r"nothing in it that can be read; allowed: \.parquet, \.arrow, \.tar"),
    ],
)
def test_sources_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        convert(tmp_path / name, tmp_path / "out")


def test_a_cut_tar_is_named(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("0.png")
        info.size = len(picture(300, 300))
        tar.addfile(info, io.BytesIO(picture(300, 300)))
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: len(whole) // 20])
    with pytest.raises(UserError, match=r"a\.tar: damaged archive"):
        convert(tmp_path / "a.tar", tmp_path / "out")


# ---------------------------------------------------------------- going on


def test_finished_units_are_not_read_again(tmp_path):
    records = [Record(f"r{i}", "t2i", f"a {i}", f"{i}", picture(value=i), (), "here") for i in range(6)]
    for i in range(2):
        write_records(tmp_path / "in" / f"{i}.parquet", records[3 * i : 3 * i + 3])
    convert(tmp_path / "in", tmp_path / "out")
    before = shard_path(tmp_path / "out", 0).stat().st_mtime_ns
    tally_path(tmp_path / "out", 1).unlink()  # as if killed while writing the second unit
    shard_path(tmp_path / "out", 1).write_bytes(b"half")
    assert len(convert(tmp_path / "in", tmp_path / "out")) == 6
    assert shard_path(tmp_path / "out", 0).stat().st_mtime_ns == before
    assert total_tally(tmp_path / "out").kept == 6


def test_another_conversion_is_not_mixed_in(tmp_path):
    write_records(tmp_path / "in" / "a.parquet", [Record("r", "t2i", "a", "a", picture(), (), "here")])
    convert(tmp_path / "in", tmp_path / "out")
    with pytest.raises(UserError, match=r"holds another conversion \(task: 't2i', now 'text'\)"):
        convert(tmp_path / "in", tmp_path / "out", task="text")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(UserError, match="is not empty and not a conversion"):
        convert(tmp_path / "in", tmp_path / "full")


@pytest.mark.processes
def test_the_program(tmp_path):
    """On its own Ray cluster: report and samples. (`test_convert_odd.py` has its stop where too many are bad.)"""
    (tmp_path / "in").mkdir()
    entries = [{"txt": f"picture {i}", "image": "0.png"} for i in range(250)]
    (tmp_path / "in" / "0.png").write_bytes(picture(100, 100))
    (tmp_path / "in" / "list.json").write_text(json.dumps(entries))
    command = [sys.executable, str(ROOT / "stages/convert.py"), str(tmp_path / "in" / "list.json"), "--rows", "125"]
    done = subprocess.run([*command, str(tmp_path / "out")], check=False, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "kept 250 of 250 samples" in done.stdout
    assert len(read_records(tmp_path / "out")) == 250
