"""Conversion of damaged, changed and odd sources: no sample vanishes, and no odd sample stops the others."""

import base64
import bz2
import gzip
import importlib.util
import io
import json
import lzma
import os
import resource
import shlex
import struct
import subprocess
import sys
import tarfile
from argparse import Namespace
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pq_encryption
import pytest
from PIL import Image

from deepgen.data.conversion.convert_units import (
    Tally,
    check_folders,
    convert_unit,
    draw_histograms,
    image_fault,
    write_plan,
)
from deepgen.data.conversion.raw_data import guess_form, plan_units, source_files
from deepgen.data.conversion.readers.raw_sample import RawData
from deepgen.data.uris import UriError
from deepgen.errors import UserError
from tests.data.test_convert import LIMITS, ROOT, convert, picture, reasons

spec = importlib.util.spec_from_file_location("convert_stage", ROOT / "stages/convert.py")
assert spec and spec.loader
stage = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stage)


def pack(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(count: int = 3) -> list[tuple[str, bytes]]:
    return [(f"{i}.{e}", data) for i in range(count) for e, data in (("png", picture(value=i)), ("txt", b"a cat"))]


def listed(folder: Path, entries: list, name: str = "list.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "0.png").write_bytes(picture())
    (folder / name).write_text(json.dumps(entries))
    return folder / name


# ---------------------------------------------------------------- damaged archives


def header_of(path: Path, number: int) -> int:
    with tarfile.open(path) as tar:
        return tar.getmembers()[number].offset


@pytest.mark.parametrize("damage", ["garbage", "zeros", "cut", "cut in header", "no end", "more behind"])
def test_a_tar_that_is_damaged_is_never_a_short_one(tmp_path, damage):
    path = pack(tmp_path / "a.tar", samples())
    whole, at = path.read_bytes(), header_of(path, 4)
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    path.write_bytes(
        {
            "garbage": whole[:at] + b"\x55" * 512 + whole[at + 512 :],
            "zeros": whole[:at] + bytes(512) + whole[at + 512 :],
            "cut": whole[:at],
            "cut in header": whole[: at + 100],
            "no end": whole[:end],
            "more behind": whole + whole,
        }[damage]
    )
    with pytest.raises(UserError, match=r"a\.tar: damaged archive \(.* at byte \d+ after [46] members\); fetch"):
        convert(path, tmp_path / "out")


@pytest.mark.parametrize("pack_with", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_tars_are_read_to_their_checksum(tmp_path, pack_with):
    path = pack(tmp_path / "a.tar", samples())
    good = pack_with(path.read_bytes())
    path.write_bytes(good)
    assert len(convert(path, tmp_path / "out")) == 3
    for number, bad in enumerate((good[:-6], good[:-8] + b"\x01" * 8, good[: len(good) // 2] + bytes(90))):
        path.write_bytes(bad)
        with pytest.raises(UserError, match=r"a\.tar: damaged archive"):
            convert(path, tmp_path / f"out{number}")


# ---------------------------------------------------------------- the plan


def test_another_caption_key_columns_or_images_are_another_conversion(tmp_path):
    path = listed(tmp_path / "in", [{"txt": "a", "image": "0.png"}])
    convert(path, tmp_path / "out")
    for key, value in {"caption_key": "long", "columns": {"image": "x"}, "images": tmp_path}.items():
        with pytest.raises(UserError, match=rf"holds another conversion \({key}: "):
            convert(path, tmp_path / "out", **{key: value})


def test_a_source_that_changed_is_not_mixed_in(tmp_path):
    for name in "bc":
        pack(tmp_path / "in" / f"{name}.tar", samples())
    convert(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "c.tar").rename(tmp_path / "in" / "a.tar")
    with pytest.raises(UserError, match=r"SOURCE has changed, unit 1: 'b\.tar of [\d,]+ bytes, .*now 'a\.tar"):
        convert(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "a.tar").rename(tmp_path / "in" / "c.tar")
    pack(tmp_path / "in" / "d.tar", samples())
    with pytest.raises(UserError, match=r"unit 3: 'none', now 'd\.tar"):
        convert(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_a_damaged_plan_is_one_line(tmp_path, content):
    path = pack(tmp_path / "a.tar", samples())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "plan.json").write_text(content)
    with pytest.raises(UserError, match=r"plan\.json: damaged; delete "):
        convert(path, tmp_path / "out")
    (tmp_path / "out" / "plan.json").rename(tmp_path / "out" / "plan.json.partial")  # as a killed process may leave it
    assert len(convert(path, tmp_path / "out")) == 3


def test_a_damaged_tally_is_one_line(tmp_path):
    (tmp_path / "0.json").write_text("{}")
    with pytest.raises(UserError, match=r"0\.json: damaged; delete it"):
        Tally.load(tmp_path / "0.json")


# ---------------------------------------------------------------- writing


def test_a_full_disk_is_one_line(tmp_path):
    path = pack(tmp_path / "a.tar", samples())
    source = RawData(path, "webdataset")
    (unit,) = plan_units(source, 3, source_files(source).files)
    write_plan(tmp_path / "out", source, LIMITS, 3, 0, [unit])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(UserError, match=r"out: cannot write \(.*; make room or mend the folder, and run the same"):
            convert_unit(source, unit, tmp_path / "out", LIMITS, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_out_must_be_a_folder_apart(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: is a file; give a folder"):
        check_folders(tmp_path / "in", tmp_path / "file")
    for source, out in (("a", "a/out"), ("a/b", "a"), ("a", "a")):
        with pytest.raises(UserError, match="give a folder elsewhere"):
            check_folders(tmp_path / source, tmp_path / out)
    check_folders(tmp_path / "a" / "list.json", tmp_path / "a" / "out")
    with pytest.raises(UserError, match="cannot write"):
        convert(pack(tmp_path / "a.tar", samples()), tmp_path / "file" / "out")


# ---------------------------------------------------------------- odd rows


def test_odd_rows_of_a_list_stop_nothing(tmp_path):
    entries = [
        {"txt": "a \ud83d b", "image": "0.png"},
        {"txt": "a", "image": "x" * 5000},
        {"txt": "a", "image": "0\0.png"},
        {"txt": "a", "image": ["0.png"]},
        {"txt": "a", "image": {"a": 1}},
        {"txt": "good", "image": "0.png"},
    ]
    assert [r.prompt for r in convert(listed(tmp_path / "in", entries), tmp_path / "out")] == ["good"]
    assert sorted(reasons(tmp_path / "out")) == [
        "caption: not UTF-8 text",
        "target: cannot be read (File name too long)",
        "target: cannot be read (dict; allowed: bytes, a name or a struct of bytes and path)",
        "target: cannot be read (embedded null byte)",
        "target: cannot be read (list; allowed: bytes, a name or a struct of bytes and path)",
    ]


def parquet(path: Path, rows: list[dict], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


ROW = {"id": "a", "task": "t2i", "prompt": "p", "answer": "a", "image": picture(), "references": [], "source": "s"}


def test_own_parquet_with_numbers_as_ids_and_structs_as_images(tmp_path):
    image = {"bytes": picture(), "path": None}
    rows = [ROW | {"id": i, "image": image, "references": [image], "task": "edit"} for i in range(2)]
    found = convert(parquet(tmp_path / "x.parquet", rows), tmp_path / "out")
    assert [(r.id, r.image, r.references) for r in found] == [(str(i), picture(), (picture(),)) for i in range(2)]
    convert(parquet(tmp_path / "y.parquet", [ROW | {"image": 3}]), tmp_path / "out2")
    assert reasons(tmp_path / "out2")[0].startswith("target: cannot be read (int; allowed")
    convert(parquet(tmp_path / "z.parquet", [ROW | {"references": "a.png", "task": "edit"}]), tmp_path / "out3")
    assert reasons(tmp_path / "out3") == ["source: file missing"]


def test_text_of_a_parquet_that_is_not_utf8_costs_its_row(tmp_path):
    table = pa.Table.from_pylist([ROW, ROW | {"id": "b"}])
    offsets = pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 2, 4)))
    bad = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"\xff\xfeab")])
    pq.write_table(table.set_column(2, "prompt", bad), tmp_path / "x.parquet")
    assert [r.id for r in convert(tmp_path / "x.parquet", tmp_path / "out")] == ["b"]
    assert reasons(tmp_path / "out") == ["caption: not UTF-8 text"]


def test_a_damaged_row_group_is_named(tmp_path):
    path = parquet(tmp_path / "x.parquet", [ROW | {"prompt": f"p{i}"} for i in range(4)], row_group_size=2)
    column = pq.ParquetFile(path).metadata.row_group(1).column(2)
    data = bytearray(path.read_bytes())
    at = column.dictionary_page_offset
    data[at : at + column.total_compressed_size] = b"\x99" * column.total_compressed_size
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"x\.parquet: row group 2 of 2 can't be read \("):
        convert(path, tmp_path / "out")


def test_what_pillow_raises_is_a_reason(monkeypatch):
    data = picture(kind="BMP")
    Image.init()  # imports Pillow's plugins, one of which loads an image meanwhile

    def raises(error: Exception):
        def load(self):
            raise error

        monkeypatch.setattr(Image.Image, "load", load)
        return image_fault(data, LIMITS)

    for error in (IndexError("x"), TypeError("x"), ArithmeticError("x"), EOFError("x")):
        assert raises(error) == "damaged"
    assert "BytesIO" not in image_fault(b"<html>", LIMITS)


# ---------------------------------------------------------------- tars with many files in a sample


def of_tar(folder: Path, members: list[tuple[str, bytes]], **options):
    return convert(pack(folder / "a.tar", members), folder / "out", **options)


def test_the_target_is_the_one_named_so(tmp_path):
    a, b, c = (picture(value=value) for value in (1, 2, 3))
    text = ("0.txt", b"make it")
    (edit,) = of_tar(tmp_path / "1", [("0.mask.png", a), ("0.png", a), ("0.source.png", b), ("0.target.png", c), text])
    assert (edit.image, edit.references) == (c, (b,))
    (plain,) = of_tar(tmp_path / "2", [("0.mask.png", a), ("0.png", c), text])
    assert (plain.task, plain.image) == ("t2i", c)
    for number, names in enumerate((["0.jpg", "0.png"], ["0.a.png", "0.b.png"], ["0.output.png", "0.target.png"])):
        assert not of_tar(tmp_path / f"bad{number}", [*((name, a) for name in names), text])
        shown = ", ".join(name[2:] for name in names)
        assert reasons(tmp_path / f"bad{number}" / "out") == [f"more than one target image: {shown}"]
        tally = Tally.load(tmp_path / f"bad{number}" / "out" / "tally" / "000000.json")
        assert tally.dropped == {"more than one target image": 1}


def test_files_of_a_sample_in_tars(tmp_path):
    sources = sorted((f"0.source.{i}.png", picture(value=i)) for i in range(11))
    (edit,) = of_tar(tmp_path / "1", [*sources, ("0.target.png", picture()), ("0.txt", b"x")])
    assert edit.references == tuple(picture(value=i) for i in range(11))  # not 0, 1, 10, 2
    assert not of_tar(tmp_path / "2", [("0.png", picture()), ("0.PNG", picture(value=1)), ("0.txt", b"x")])
    assert reasons(tmp_path / "2" / "out") == ["a name twice: png"]
    kinds = {"jfif": "JPEG", "tif": "TIFF", "tiff": "TIFF", "gif": "GIF", "avif": "AVIF", "bmp": "BMP"}
    members = [(f"{e}.{x}", d) for e, k in kinds.items() for x, d in ((e, picture(kind=k)), ("txt", b"x"))]
    assert len(of_tar(tmp_path / "3", members)) == len(kinds)
    assert (
        len(of_tar(tmp_path / "4", [("._0.png", b"j"), ("0.png", picture()), ("._0.txt", b"j"), ("0.txt", b"x")])) == 1
    )


def test_text_in_tars(tmp_path):
    p = picture()
    members = [("0.png", p), ("0.txt", b"\xef\xbb\xbfhello"), ("1.png", p), ("1.txt", "ü".encode("latin-1"))]
    members += [("2.png", p), ("2.json", b"[" * 100_000), ("3.png", p), ("3.json", b'{"caption":"\\ud83d"}')]
    assert [r.prompt for r in of_tar(tmp_path, members)] == ["hello"]
    assert sorted(reasons(tmp_path / "out")) == ["caption: not UTF-8 text", "caption: not UTF-8 text", "empty caption"]
    (record,) = of_tar(tmp_path / "name", [("\udcff0.png", p), ("\udcff0.txt", b"a")])
    assert record.id == "a.tar/\\udcff0"


def test_ids_are_unique_in_a_folder(tmp_path):
    for folder in ("x", "y"):
        pack(tmp_path / "tars" / folder / "a.tar", [*samples(1), *((f"{folder}/{n}", d) for n, d in samples(1))])
        listed(tmp_path / "lists" / folder, [{"txt": folder, "image": f"{folder}/0.png"}])
        parquet(tmp_path / "hf" / folder / "a.parquet", [{"image": picture(), "text": "t"}])
    assert [r.id for r in convert(tmp_path / "tars", tmp_path / "out")] == [
        "x/a.tar/0",
        "x/a.tar/x/0",
        "y/a.tar/0",
        "y/a.tar/y/0",
    ]
    assert [r.id for r in convert(tmp_path / "lists", tmp_path / "out2")] == ["x/list-1", "y/list-1"]
    assert [r.id for r in convert(tmp_path / "hf", tmp_path / "out3")] == ["x/a-1", "y/a-1"]


# ---------------------------------------------------------------- which files


def test_a_folder_of_several_kinds_asks_which(tmp_path):
    for name in "abc":
        pack(tmp_path / "in" / f"{name}.tar", samples(1))
    parquet(tmp_path / "in" / "meta.parquet", [{"image": picture(), "text": "t"}])
    with pytest.raises(UserError, match=r"in: holds 3 \.tar and 1 \.parquet; say --form \(one of records, "):
        guess_form(tmp_path / "in")
    assert len(convert(tmp_path / "in", tmp_path / "out", form="webdataset")) == 3
    assert len(convert(tmp_path / "in", tmp_path / "out2", form="hf")) == 1
    with pytest.raises(
        UserError, match=r"nothing to convert in it \(form edits: no samples in \.json, .*\.tsv files\)"
    ):
        convert(tmp_path / "in", tmp_path / "out3", form="edits")


def test_folders_named_like_files_are_none(tmp_path):
    (tmp_path / "in" / "d.parquet").mkdir(parents=True)
    pack(tmp_path / "in" / "e.tar" / "f.TAR", samples(1))
    assert len(convert(tmp_path / "in", tmp_path / "out")) == 1


def test_annotations_beside_a_list_are_explained(tmp_path):
    path = listed(tmp_path / "in", [{"image": "0.png", "annotation": "note.json"}])
    (tmp_path / "in" / "note.json").write_text('{"caption": "c"}')
    with pytest.raises(UserError, match=r"note\.json: holds a dict; expected a list; .*give the list's file as SOURCE"):
        convert(tmp_path / "in", tmp_path / "out", form="captions")
    assert [r.prompt for r in convert(path, tmp_path / "out")] == ["c"]


def test_json_with_a_byte_order_mark_and_json_too_deep(tmp_path):
    path = listed(tmp_path / "in", [])
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([{"txt": "a", "image": "0.png"}]).encode())
    assert len(convert(path, tmp_path / "out")) == 1
    path.write_bytes(b"[" * 100_000)
    with pytest.raises(UserError, match=r"list\.json: not JSON"):
        guess_form(path)


# ---------------------------------------------------------------- the program


def parsed(monkeypatch, *arguments: str) -> Namespace:
    monkeypatch.setattr(sys, "argv", ["convert.py", "in", "out", *arguments])
    return stage.parse()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "0"], r"argument --rows: '0'; allowed: int from 1 on"),
        (["--rows", "x"], "argument --rows: 'x'; allowed: int"),
        (["--max-bad-share", "1.5"], r"--max-bad-share: '1\.5'; allowed: float from 0 to 1"),
        (["--max-bad-share", "nan"], "allowed: float from 0 to 1"),
        (["--max-aspect", "20"], r"--max-aspect: '20'; allowed: float from 1 to 8"),
        (["--form", "x"], "invalid choice: 'x'"),
    ],
)
def test_arguments_out_of_range_are_one_line(monkeypatch, arguments, message):
    with pytest.raises(UserError, match=message):
        parsed(monkeypatch, *arguments)


def test_the_share_of_bad_samples_counts_at_the_start_and_of_few(monkeypatch):
    args = parsed(monkeypatch)
    few, many = (Tally(kept=n, dropped=Counter({"empty caption": n})) for n in (2, 200))
    stage.check_share(few, args, stage.LOOK_AFTER)
    for tally, least in ((few, 0), (many, stage.LOOK_AFTER)):
        with pytest.raises(UserError, match=r"in: 50\.0% of \d+ samples cannot be used \(mostly: empty caption"):
            stage.check_share(tally, args, least)


def program(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "stages/convert.py"), *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=200)


@pytest.mark.processes
def test_what_is_wrong_in_a_unit_is_one_line_of_the_program(tmp_path):
    """The fault that stopped the last run also stops the next one, before it connects to a cluster."""
    pack(tmp_path / "in" / "a.tar", [(f"{i}.txt", b"no image") for i in range(250)])
    path = pack(tmp_path / "in" / "b.tar", samples())
    path.write_bytes(path.read_bytes()[: header_of(path, 4)])
    source = RawData(tmp_path / "in", "webdataset", name="in")
    units = plan_units(source, 1000, source_files(source).files)
    write_plan(tmp_path / "out", source, LIMITS, 1000, 0, units)
    convert_unit(source, units[0], tmp_path / "out", LIMITS, 0)
    done = program(tmp_path / "in", tmp_path / "out", "--max-bad-share", 1, "--min-side", 16)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {path}: damaged archive (ends without its closing block")
    assert "Traceback" not in done.stderr
    done = program(tmp_path / "in", tmp_path / "out", "--min-side", 16, "--address", "nowhere:1")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "100.0% of 250 samples cannot be used" in done.stderr


@pytest.mark.processes
def test_nothing_kept_is_an_error(tmp_path):
    source = RawData(pack(tmp_path / "a.tar", [("0.txt", b"no image")]), "webdataset", name="a")
    (unit,) = plan_units(source, 1000, source_files(source).files)
    limits = stage.Limits()
    write_plan(tmp_path / "out", source, limits, 1000, 0, [unit])
    convert_unit(source, unit, tmp_path / "out", limits, 0)  # already done, so the program only reports
    done = program(tmp_path / "a.tar", tmp_path / "out", "--max-bad-share", 1)
    assert done.returncode == 2
    assert "not one of 1 samples can be used" in done.stderr
    assert "data.train=" not in done.stdout


@pytest.mark.processes
def test_ctrl_c_says_the_same_command_again():
    code = "import sys; sys.argv = ['c.py', 'a b']; from deepgen.config import run_program\n"
    code += "def main(): raise KeyboardInterrupt\nrun_program(main, resumes=False)"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 130
    line = shlex.join([sys.executable, os.path.abspath("c.py"), "a b"])
    assert done.stderr.strip() == f"stopped; to continue, run the same command again: {line}"


def test_histograms_stay_readable(tmp_path):
    sides = Counter({64 * i: i for i in range(1, 150)})
    dropped = Counter(
        {f"target: cannot be read (<error {i} in words that go on and on, and on>)": i for i in range(1, 31)}
    )
    tally = Tally(kept=10, sides=sides, dropped=dropped)
    top = tally.top_reasons()
    assert len(top) == 11 and top["20 other reasons"] == sum(range(1, 21))
    draw_histograms(tally, tmp_path / "h.png")
    assert Image.open(tmp_path / "h.png").height < 800


def test_an_unreadable_file_is_a_reason(tmp_path):
    assert image_fault(UriError("x", "Permission denied"), LIMITS) == "cannot be read (Permission denied)"


def test_arrow_whose_offsets_lead_out_of_its_buffers(tmp_path):
    """Arrow looks at no offset when it reads; without our own look the process dies."""
    bad = pa.py_buffer(struct.pack("<iii", 0, 1 << 30, 3))
    image = pa.Array.from_buffers(pa.binary(), 2, [None, bad, pa.py_buffer(b"abc")])
    text = pa.array(["a", "b"])
    nested = pa.StructArray.from_arrays([image, pa.array([None, None], pa.string())], ["bytes", "path"])
    for number, column in enumerate((image, nested)):
        path = tmp_path / f"{number}.arrow"
        batch = pa.record_batch({"image": column, "text": text})
        with pa.ipc.new_stream(path, batch.schema) as sink:
            sink.write_batch(batch)
        with pytest.raises(UserError, match=r"\.arrow: a batch can't be read \(.*[Oo]ffset.*\); fetch the file again"):
            convert(path, tmp_path / f"out-{number}")


# ---------------------------------------------------------------- odd columns


def written(path: Path, table: pa.Table) -> Path:
    """The table in a file, parquet or Arrow by its name."""
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    return path


NO_TEXT = pa.array([b"\xff\xfe"])
ODD_TEXTS = {
    "date": pa.array([2**31 - 1], pa.int32()).cast(pa.date32()),
    "duration": pa.array([2**62], pa.int64()).cast(pa.duration("s")),
    "time zone": pa.array([1], pa.int64()).cast(pa.timestamp("us", tz="No/Where")),
    "struct": pa.StructArray.from_arrays([NO_TEXT.view(pa.string())], ["a"]),
    "dictionary": pa.DictionaryArray.from_arrays(pa.array([0], pa.int32()), NO_TEXT.view(pa.string())),
}


@pytest.mark.parametrize("odd", ODD_TEXTS.values(), ids=ODD_TEXTS.keys())
def test_a_value_that_python_cannot_hold_makes_its_row_unusable(tmp_path, odd):
    table = pa.table({"image": [picture()], "text": odd})
    assert convert(written(tmp_path / "a.parquet", table), tmp_path / "out") == []
    (reason,) = reasons(tmp_path / "out")
    assert reason.startswith("caption: cannot be read (is ")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_path_that_is_not_utf8_in_a_struct(tmp_path, name):
    images = pa.StructArray.from_arrays([pa.array([picture()]), NO_TEXT.view(pa.string())], ["bytes", "path"])
    convert(written(tmp_path / name, pa.table({"image": images, "text": ["a"]})), tmp_path / "out")
    assert reasons(tmp_path / "out")[0].startswith("target: cannot be read (is struct<bytes: binary, path: string>")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_two_columns_of_one_name(tmp_path, name):
    columns = [pa.array([picture()]), pa.array(["a"]), pa.array(["b"])]
    path = written(tmp_path / name, pa.Table.from_arrays(columns, ["image", "text", "text"]))
    with pytest.raises(UserError, match="has 2 columns 'text'; allowed: one"):
        convert(path, tmp_path / "out")


class Keys(pq_encryption.KmsClient):
    def __init__(self) -> None:
        super().__init__()

    def wrap_key(self, key: bytes, name: str) -> bytes:
        return base64.b64encode(key)


@pytest.mark.parametrize("readable_footer", [False, True])
def test_encrypted_columns(tmp_path, readable_footer):
    """pyarrow aborts the process when it is asked about an encrypted column under a readable footer."""
    table = pa.table({"image": [picture()], "text": ["a"]})
    properties = pq_encryption.CryptoFactory(lambda _: Keys()).file_encryption_properties(
        pq_encryption.KmsConnectionConfig(),
        pq_encryption.EncryptionConfiguration("foot", column_keys={"of": ["text"]}, plaintext_footer=readable_footer),
    )
    with pq.ParquetWriter(tmp_path / "a.parquet", table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)
    with pytest.raises(UserError, match=r"can't be read as parquet .*encrypted"):
        convert(tmp_path / "a.parquet", tmp_path / "out")


def test_a_number_of_thousands_of_digits_in_a_list(tmp_path):
    (tmp_path / "a.json").write_text('[{"image": "a.png", "text": ' + "9" * 5000 + "}]", encoding="utf-8")
    with pytest.raises(UserError, match=r"not JSON .a number of thousands of digits in row 1"):
        convert(tmp_path / "a.json", tmp_path / "out", form="pairs")


# ---------------------------------------------------------------- odd headers of tars


def sparse_header(size: int) -> bytes:
    """A file with holes of GNU tar, whose map goes on in the next block."""
    info = tarfile.TarInfo("1.png")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, size
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[386:410], block[482], block[483:495] = b"%011o\0" % 0 + b"%011o\0" % size, 1, b"%011o\0" % size
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:]))
    return bytes(block)


def test_a_file_with_holes_whose_map_goes_on(tmp_path):
    more = (bytes(504) + b"\x01").ljust(512, b"\0")
    whole = pack(tmp_path / "whole.tar", samples(1)).read_bytes()
    before = sparse_header(512) + more * 2000 + bytes(512)
    (tmp_path / "a.tar").write_bytes(before + bytes(512) + whole)
    assert [record.prompt for record in convert(tmp_path / "a.tar", tmp_path / "out")] == ["a cat"]
    for number, content in enumerate((sparse_header(512) + more * 3000 + whole, sparse_header(512) + more)):
        (tmp_path / "b.tar").write_bytes(content)
        with pytest.raises(UserError, match=r"b.tar: damaged archive .a map of holes of .* bytes that goes on"):
            convert(tmp_path / "b.tar", tmp_path / f"out{number}")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_headers_upon_headers(tmp_path, kind):
    info = tarfile.TarInfo("a")
    info.type = kind
    whole = pack(tmp_path / "whole.tar", samples(1)).read_bytes()
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) * 3000 + whole)
    with pytest.raises(UserError, match=r"a.tar: damaged archive .hundreds of additional headers"):
        convert(tmp_path / "a.tar", tmp_path / "out")
