"""The forms that people keep data in: every kind of table, folders of pictures, tars in any order, links and caches."""

import base64
import csv
import gzip
import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from deepgen.data.conversion.convert_units import image_fault, write_report
from deepgen.data.conversion.look import look
from deepgen.data.conversion.raw_data import guess_form, notes_of, plan_units, read_unit, source_files
from deepgen.data.conversion.readers.raw_sample import RawData, Unit
from deepgen.data.conversion.readers.row_forms import columns_of
from deepgen.data.conversion.readers.source_files import find_files
from deepgen.data.parquet import write_records
from deepgen.data.records import Record
from deepgen.errors import UserError
from tests.data.test_convert import LIMITS, convert, picture, reasons
from tests.data.test_convert_odd import pack, parquet, samples


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(rows: list) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def units(raw: RawData, rows: int) -> list[Unit]:
    return plan_units(raw, rows, source_files(raw).files)


def notes(raw: RawData) -> list[str]:
    return notes_of(raw, source_files(raw))


# ---------------------------------------------------------------- which files


def test_a_file_of_a_kind_that_a_form_never_has_is_refused(tmp_path):
    parquet(tmp_path / "a.parquet", [{"image": b"x", "text": "a"}])
    with pytest.raises(UserError, match=r"^--form: got pairs for .*a\.parquet; allowed: files of \.json, "):
        units(RawData(tmp_path / "a.parquet", "pairs"), 8)


def test_linked_folders_are_followed_once(tmp_path):
    pack(tmp_path / "disk2" / "deep" / "b.tar", samples(2))
    pack(tmp_path / "in" / "here" / "a.tar", samples(1))
    (tmp_path / "in" / "a link").symlink_to(tmp_path / "disk2")
    (tmp_path / "in" / "another").symlink_to(tmp_path / "disk2" / "deep")
    (tmp_path / "disk2" / "deep" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "here" / "c.tar").symlink_to("a.tar")
    assert [r.id for r in convert(tmp_path / "in", tmp_path / "out")] == [
        "a link/deep/b.tar/0",
        "a link/deep/b.tar/1",
        "here/a.tar/0",
    ]
    found = find_files(tmp_path / "in")
    assert len(found.repeated) == 3
    assert any("passed over 3 links to what is read already, the first " in note for note in found.notes())


def test_links_to_folders_around_the_source_are_not_entered(tmp_path, monkeypatch):
    pack(tmp_path / "in" / "a.tar", samples(1))
    for name, target in (("up", ".."), ("root", "/"), (".hidden", "/"), ("outer", tmp_path)):
        (tmp_path / "in" / name).symlink_to(target)
    scan, seen = os.scandir, list[str]()

    def scanned(folder):
        seen.append(str(folder))
        return scan(folder)

    monkeypatch.setattr("os.scandir", scanned)
    found = find_files(tmp_path / "in")
    assert seen == [str(tmp_path / "in")]
    assert [file.name for file in found.files] == ["a.tar"] and len(found.repeated) == 3 and not found.hidden


def test_a_picture_may_have_two_names_and_two_captions(tmp_path):
    put(tmp_path / "in" / "a.png", picture())
    (tmp_path / "in" / "b.png").symlink_to("a.png")
    for name in "ab":
        put(tmp_path / "in" / f"{name}.txt", f"caption {name}")
    assert [r.prompt for r in convert(tmp_path / "in", tmp_path / "out")] == ["caption a", "caption b"]


def test_hidden_files_are_passed_over_and_told(tmp_path):
    pack(tmp_path / "in" / "a.tar", [*samples(1), (".ipynb_checkpoints/0-checkpoint.png", picture())])
    pack(tmp_path / "in" / ".ipynb_checkpoints" / "a-checkpoint.tar", samples(1))
    put(tmp_path / "in" / "._a.tar", "from a Mac")
    put(tmp_path / "in" / ".DS_Store", "of no kind")
    assert [r.id for r in convert(tmp_path / "in", tmp_path / "out")] == ["a.tar/0"]
    (note,) = find_files(tmp_path / "in").notes()
    assert note == f"passed over 2 hidden files, the first {tmp_path}/in/._a.tar"
    (tmp_path / ".cache").mkdir()
    (tmp_path / "in").rename(tmp_path / ".cache" / "in")  # a hidden folder that is asked for is read
    assert len(convert(tmp_path / ".cache" / "in", tmp_path / "out2")) == 1


def test_what_is_no_file_is_named_and_nothing_waits_for_it(tmp_path):
    pack(tmp_path / "in" / "a.tar", samples(1))
    os.mkfifo(tmp_path / "in" / "b.tar")
    with pytest.raises(UserError, match=r"b\.tar: is a FIFO; allowed: a regular file"):
        guess_form(tmp_path / "in")
    (tmp_path / "in" / "b.tar").unlink()
    (tmp_path / "in" / "b.tar").symlink_to("gone")
    with pytest.raises(UserError, match=r"b\.tar: a link to nothing"):
        guess_form(tmp_path / "in")


# ---------------------------------------------------------------- tables


PAIRS = [{"file_name": f"{i}.png", "text": f"a “cat”, {i}\nof two lines"} for i in range(5)]


def written(path: Path, rows: list[dict]) -> Path:
    """A table of the kind that the name says, with pictures beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for i in range(len(rows)):
        put(path.parent / f"{i}.png", picture(value=i))
    if path.suffix == ".parquet":
        return parquet(path, rows)
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8-sig") as stream:
            table = csv.DictWriter(stream, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t")
            table.writeheader()
            table.writerows(rows)
        return path
    text = lines(rows) if "jsonl" in path.name else json.dumps(rows, indent=1)
    return put(path, gzip.compress(text.encode()) if path.suffix == ".gz" else text)


@pytest.mark.parametrize(
    "name", ["metadata.jsonl", "metadata.csv", "list.tsv", "a.json", "a.jsonl.gz", "a.json.gz", "A.CSV", "a.parquet"]
)
def test_pairs_in_every_kind_of_table(tmp_path, name):
    path = written(tmp_path / "in" / name.lower(), PAIRS)
    path.rename(path.with_name(name))
    assert guess_form(tmp_path / "in") == ("hf" if name == "a.parquet" else "pairs")
    found = convert(tmp_path / "in", tmp_path / "out")  # units of 3 rows: reading goes on within the file
    assert [(r.prompt, r.image) for r in found] == [(row["text"], picture(value=i)) for i, row in enumerate(PAIRS)]


def test_metadata_in_several_folders_names_pictures_beside_it(tmp_path):
    for folder in ("train", "test"):
        written(tmp_path / "in" / folder / "metadata.jsonl", PAIRS[:2])
    assert len(convert(tmp_path / "in", tmp_path / "out")) == 4


def test_columns_of_a_table_are_asked_for(tmp_path):
    path = written(tmp_path / "in" / "a.csv", [{"bild": "0.png", "wort": "a", "alt": '["0.png"]'}])
    with pytest.raises(
        UserError, match=r"a\.csv: a list of unknown form \(has the keys bild, wort, alt\); give --form"
    ):
        guess_form(path)
    with pytest.raises(UserError, match=r"which column is the image\? It has: bild, wort, alt; say --column image="):
        convert(path, tmp_path / "out", form="pairs")
    names = {"image": "bild", "prompt": "wort", "references": "alt"}
    (edit,) = convert(path, tmp_path / "out2", form="pairs", columns=names, task="edit")
    assert (edit.prompt, edit.references) == ("a", (picture(value=0),))


def test_rows_that_cannot_be_read_cost_themselves(tmp_path):
    put(tmp_path / "in" / "0.png", picture())
    row = '{"image": "0.png", "text": "a"}'
    put(tmp_path / "in" / "a.jsonl", f'{row}\n\n{{"image": \n{row}\n[1]\n{row[:-9]}')
    assert [r.id for r in convert(tmp_path / "in" / "a.jsonl", tmp_path / "out")] == ["a-1", "a-4"]
    assert sorted(reasons(tmp_path / "out")) == ["empty caption", "not JSON", "not JSON"]
    put(tmp_path / "in" / "b.csv", "image,text\n0.png,one, two\n0.png\n0.png,a\n")
    assert [r.id for r in convert(tmp_path / "in" / "b.csv", tmp_path / "out2")] == ["b-3"]
    assert reasons(tmp_path / "out2")[0] == "row of 3 fields: the header has 2"
    put(tmp_path / "in" / "c.csv", b"image,text\n0.png,caf\xe9\n0.png,a\n")
    assert len(convert(tmp_path / "in" / "c.csv", tmp_path / "out3")) == 1
    assert reasons(tmp_path / "out3") == ["caption: not UTF-8 text"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"txt": "a", "image": "0.png"}, {"txt"', r"not JSON \(.* in row 2"),
        ("a.json", '[{"txt": "a", "image": "0.png"} {}]', r"not JSON \(, expected at row 1"),
        ("a.json", '[{"txt": "a", "image": "0.png"}] x', r"not JSON \(more behind the list, after row 1\)"),
        ("a.json", '{\n"caption": "a"\n}', "neither a list nor one object a line; .* --form folder"),
        ("a.csv", 'image,text\n0.png,"a\n0.png,b\n', r"not CSV \(.*is a quote never closed"),
        ("a.jsonl.gz", gzip.compress(lines(PAIRS).encode(), mtime=0)[:-20], "damaged gzip"),
        ("a.csv", "image,text\n".encode("utf-16"), "UTF-16 text; allowed: a file saved as UTF-8"),
    ],
)
def test_tables_that_are_damaged_are_named(tmp_path, name, content, message):
    path = put(tmp_path / name, content)
    with pytest.raises(UserError, match=rf"{name}.*{message}"):
        convert(path, tmp_path / "out", form="pairs")


def test_our_records_and_prompts_in_tables(tmp_path):
    rows = [{"id": "x", "task": "text", "prompt": 'a "HI"', "answer": "hi", "image": "0.png", "references": []}]
    path = written(tmp_path / "in" / "a.jsonl", rows)
    (record,) = convert(path, tmp_path / "out")
    assert (record.id, record.task, record.answer, record.image) == ("x", "text", "hi", picture(value=0))
    prompts = put(tmp_path / "p" / "PROMPTS.TXT", 'a cat\r\na "HI"\r\n')
    assert guess_form(tmp_path / "p") == "prompts"
    found = convert(prompts, tmp_path / "out2", task="")
    assert [(r.task, r.prompt, r.image) for r in found] == [("t2i", "a cat", None), ("text", 'a "HI"', None)]
    assert write_report(tmp_path / "out2").kept == 2
    assert not (tmp_path / "out2" / "samples.png").exists()
    write_records(tmp_path / "q" / "a.parquet", found)
    assert guess_form(tmp_path / "q") == "prompts"
    assert [r.prompt for r in convert(tmp_path / "q", tmp_path / "out3", task="")] == ["a cat", 'a "HI"']


def test_the_json_forms_in_other_kinds_of_tables(tmp_path):
    edits = [{"input_image": ["0.png", "1.png"], "output_image": "1.png", "instruction": f"do {i}"} for i in range(2)]
    path = written(tmp_path / "in" / "a.jsonl", edits)
    assert guess_form(path) == "edits"
    assert [len(r.references) for r in convert(path, tmp_path / "out")] == [2, 2]
    path = written(tmp_path / "in2" / "a.csv", [row | {"input_image": '["0.png", "1.png"]'} for row in edits])
    assert [len(r.references) for r in convert(path, tmp_path / "out2")] == [2, 2]


# ---------------------------------------------------------------- images in rows


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_base64_pictures(tmp_path, name):
    data = [picture(kind=kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")]
    texts = [base64.b64encode(one).decode() for one in data]
    urls = [f"data:image/x;base64,{text}" for text in texts]
    folded = [base64.encodebytes(data[0]).decode(), base64.urlsafe_b64encode(data[1]).decode().rstrip("=")]
    rows = [{"image": text, "text": "a"} for text in [*texts, *urls, *folded]]
    found = convert(written(tmp_path / "in" / name, rows), tmp_path / "out")
    assert Counter(r.image for r in found) == Counter([*data, *data, *data[:2]])


def test_base64_that_is_damaged_is_cut_in_the_quarantine(tmp_path):
    rows = [{"image": "data:image/jpeg;base64," + text, "text": "a"} for text in ("A" * 9_999 + "!", "x" * 5_000)]
    rows += [{"image": "data:image/svg+xml,<svg/>", "text": "a"}, {"image": "/9j/" + "A" * 4_000, "text": "a"}]
    rows += [{"image": "x" * 5_000, "text": "a"}, {"image": "0.png", "text": "a"}]
    assert len(convert(written(tmp_path / "in" / "a.jsonl", rows), tmp_path / "out")) == 1
    assert len(reasons(tmp_path / "out")) == 5
    assert "data: without base64; allowed: data:image/" in " ".join(reasons(tmp_path / "out"))
    text = (tmp_path / "out" / "quarantine" / "000000.jsonl").read_text()
    assert max(map(len, text.splitlines())) < 1_500


def test_base64_in_our_own_records(tmp_path):
    text = base64.b64encode(picture()).decode()
    write_records(tmp_path / "in" / "a.parquet", [Record("r", "t2i", "a", "a", text, (), "s")])
    assert convert(tmp_path / "in", tmp_path / "out")[0].image == picture()


# ---------------------------------------------------------------- folders of pictures


def test_pictures_with_captions_beside_them(tmp_path):
    for name, caption, content in [
        ("1.jpg", "1.txt", "\ufeffone\n"),
        ("sub/2.PNG", "sub/2.TXT", "two"),
        ("3.webp", "3.caption", "three"),
        ("4.png", "4.json", '{"caption": "four", "width": 3}'),
        ("a.b.png", "a.b.txt", "five"),
    ]:
        put(tmp_path / "in" / name, picture())
        put(tmp_path / "in" / caption, content)
    put(tmp_path / "in" / "6.png", picture())
    put(tmp_path / "in" / "README.txt", "not a caption")
    assert guess_form(tmp_path / "in") == "folder"
    found = convert(tmp_path / "in", tmp_path / "out")
    assert {r.id: r.prompt for r in found} == {
        "1.jpg": "one",
        "sub/2.PNG": "two",
        "3.webp": "three",
        "4.png": "four",
        "a.b.png": "five",
    }
    assert reasons(tmp_path / "out") == ["no caption beside the picture: 6.txt or 6.caption or 6.json"]
    (tmp_path / "in" / "1.jpg").rename(tmp_path / "in" / "0.jpg")
    with pytest.raises(UserError, match="SOURCE has changed"):
        convert(tmp_path / "in", tmp_path / "out")


# ---------------------------------------------------------------- tars in any order


def scattered(count: int = 4) -> list[tuple[str, bytes]]:
    """Members as `tar cf x.tar *.png *.txt` orders them."""
    return sorted(samples(count), key=lambda member: member[0].rpartition(".")[2])


@pytest.mark.parametrize("compressed", [False, True])
def test_tars_whose_members_are_not_grouped(tmp_path, compressed):
    path = pack(tmp_path / "in" / "a.tar", scattered())
    if compressed:
        path.write_bytes(gzip.compress(path.read_bytes()))
        path = path.rename(path.with_name("a.tar.gz"))
    found = convert(tmp_path / "in", tmp_path / "out")
    assert [r.image for r in found] == [picture(value=i) for i in range(4)]
    assert {r.prompt for r in found} == {"a cat"}


def test_edits_that_lie_apart_in_a_compressed_tar_are_told(tmp_path):
    members = [(f"{i}.{kind}.png", picture(value=i)) for kind in ("source", "target") for i in range(3)]
    members += [(f"{i}.txt", b"do it") for i in range(3)]
    path = pack(tmp_path / "a.tar", members)
    assert len(convert(path, tmp_path / "out")) == 3
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(UserError, match=r"a\.tar: the files of one sample lie apart, .*; uncompress it"):
        convert(path, tmp_path / "out2")


def test_tars_made_by_tar_with_a_dot(tmp_path):
    path = pack(tmp_path / "a.tar", [("./s/" + name, data) for name, data in scattered(2)])
    assert [r.id for r in convert(path, tmp_path / "out")] == ["a.tar/s/0", "a.tar/s/1"]


def test_a_header_of_a_tar_cannot_fill_the_memory(tmp_path):
    info = tarfile.TarInfo("0.png")
    info.pax_headers = {"comment": "x" * (2 << 20)}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(info)
    with pytest.raises(UserError, match=r"a\.tar: damaged archive \(.*a header of 2,097,\d+ bytes"):
        convert(tmp_path / "a.tar", tmp_path / "out")


# ---------------------------------------------------------------- Arrow


def arrow(path: Path, table: pa.Table, *, stream: bool = True, compression: str | None = None, rows: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    options = pa.ipc.IpcWriteOptions(compression=compression)
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with path.open("wb") as sink, make(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


def hf_table(count: int) -> pa.Table:
    return pa.Table.from_pylist(
        [{"image": {"bytes": picture(value=i), "path": None}, "caption": f"c{i}"} for i in range(count)]
    )


def test_a_folder_of_save_to_disk(tmp_path):
    """As `datasets.DatasetDict.save_to_disk` writes it."""
    for split, count in (("train", 5), ("test", 2)):
        arrow(tmp_path / "in" / split / "data-00000-of-00001.arrow", hf_table(count))
        put(tmp_path / "in" / split / "dataset_info.json", '{"features": {}}')
        put(tmp_path / "in" / split / "state.json", '{"_data_files": []}')
    put(tmp_path / "in" / "dataset_dict.json", '{"splits": ["train", "test"]}')
    assert guess_form(tmp_path / "in") == "hf"
    found = convert(tmp_path / "in", tmp_path / "out")
    assert [r.id.rpartition("/")[0] for r in found] == ["test", "test", *["train"] * 5]
    assert [r.image for r in found[2:]] == [picture(value=i) for i in range(5)]


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
@pytest.mark.parametrize("stream", [True, False])
def test_arrow_files_of_both_kinds(tmp_path, stream, compression):
    path = arrow(tmp_path / "a.arrow", hf_table(5), stream=stream, compression=compression)
    assert [r.prompt for r in convert(path, tmp_path / "out")] == [f"c{i}" for i in range(5)]


def test_damaged_arrow_files_are_named(tmp_path):
    path = arrow(tmp_path / "a.arrow", hf_table(5))
    whole = path.read_bytes()
    for content, message in ((b"", "cannot be read"), (b"nothing at all", "can't be read as Arrow")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"a\.arrow: {message}"):
            guess_form(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a\.arrow: a batch can't be read"):
        convert(path, tmp_path / "out")


def test_units_of_a_source_cover_each_row_once(tmp_path):
    written(tmp_path / "in" / "a.jsonl", PAIRS)
    parquet(tmp_path / "hf" / "a.parquet", [{"image": picture(), "text": str(i)} for i in range(7)], row_group_size=2)
    for path, form in ((tmp_path / "in", "pairs"), (tmp_path / "hf", "hf")):
        for rows in (1, 2, 3, 100):
            raw = RawData(path, form)
            names = [sample.id for unit in units(raw, rows) for sample in read_unit(raw, unit)]
            assert names == [f"a-{i}" for i in range(1, (5 if form == "pairs" else 7) + 1)]


def test_dictionary_columns_are_read(tmp_path):
    table = pa.table({"image": pa.array([picture()] * 3).dictionary_encode(), "text": ["a", "b", "c"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert [r.prompt for r in convert(tmp_path / "a.parquet", tmp_path / "out")] == ["a", "b", "c"]


# ---------------------------------------------------------------- what lies beside the data


def test_files_of_other_kinds_are_told(tmp_path):
    pack(tmp_path / "in" / "a.tar", samples(1))
    for name in ("b.tar.zst", "c.zip", "d.zip", "README.md", "LICENSE"):
        put(tmp_path / "in" / name, "x")
    (tmp_path / "in" / "self").symlink_to("self")
    raw = RawData(tmp_path / "in", guess_form(tmp_path / "in"))
    (note,) = notes(raw)
    assert note == (
        f"passed over 4 files of other kinds (2 .zip, 1 .zst, 1 no suffix), the first {tmp_path}/in/b.tar.zst"
    )
    put(tmp_path / "pics" / "a.png", picture())
    put(tmp_path / "pics" / "a.png.txt", "a caption, not passed over")
    assert notes(RawData(tmp_path / "pics", "folder")) == []
    put(tmp_path / "pics" / "list.csv", "image,text\na.png,a\n")
    of_the_list = notes(RawData(tmp_path / "pics", "pairs"))  # it names its pictures
    assert of_the_list == ["reads image from 'image', prompt from 'text'"]


def test_what_img2dataset_writes_beside_tars_and_folders(tmp_path):
    for folder in ("tars", "pictures"):
        parquet(tmp_path / folder / "00000.parquet", [{"url": "http://a.invalid/1.jpg", "caption": "a"}])
        put(tmp_path / folder / "00000_stats.json", '{\n"count": 1\n}')
    pack(tmp_path / "tars" / "00000.tar", samples(1))
    put(tmp_path / "pictures" / "00000" / "0.png", picture())
    put(tmp_path / "pictures" / "00000" / "0.txt", "a")
    assert guess_form(tmp_path / "tars") == "webdataset"
    assert guess_form(tmp_path / "pictures") == "folder"
    parquet(tmp_path / "rows" / "00000.parquet", [{"jpg": picture(), "caption": "a"}])
    put(tmp_path / "rows" / "00000_stats.json", '{\n"count": 1\n}')
    assert guess_form(tmp_path / "rows") == "hf"


def test_results_that_datasets_caches_beside_its_files_are_no_data(tmp_path):
    arrow(tmp_path / "data-00000-of-00001.arrow", hf_table(2))
    arrow(tmp_path / "cache-1b2c.arrow", hf_table(2))
    arrow(tmp_path / "cache-3d4e.arrow", pa.table({"indices": [1, 0]}))
    assert len(find_files(tmp_path).files) == 3
    put(tmp_path / "dataset_info.json", "{}")
    assert [file.name for file in find_files(tmp_path).files] == ["data-00000-of-00001.arrow"]
    assert "passed over 2 files of other kinds (2 .arrow)" in find_files(tmp_path).notes()[0]


def test_files_that_git_lfs_has_not_fetched_are_told(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    for name in ("a.parquet", "a.tar", "a.csv"):
        with pytest.raises(UserError, match=rf"{name}: is a pointer of Git LFS, .*git lfs pull"):
            guess_form(put(tmp_path / name, pointer))
    assert image_fault(pointer.encode(), LIMITS) == "a pointer of Git LFS, not the file itself"


def test_pictures_in_other_formats_are_named():
    for name, data in {"HEIC": b"\0\0\0\x18ftypheic\0", "JPEG XL": b"\xff\x0a\0", "SVG": b"<?xml ?>\n<svg>"}.items():
        assert image_fault(data, LIMITS) == f"an image in a format that is not read ({name})"
    buffer = io.BytesIO()
    Image.new("F", (32, 32)).save(buffer, "TIFF")
    assert image_fault(buffer.getvalue(), LIMITS) == "greys whose white is unknown"


# ---------------------------------------------------------------- columns as public sets name them


@pytest.mark.parametrize(
    ("image", "references", "prompt", "others"),
    [
        ("edited_image", "original_image", "edit_prompt", ["original_prompt", "edited_prompt"]),  # InstructPix2Pix
        ("target_img", "source_img", "instruction", ["mask_img", "turn_index"]),  # MagicBrush
        ("edited_image", "source_image", "edit_prompt", ["source_caption", "target_caption"]),  # UltraEdit
        ("edited_img", "src_img", "edited_prompt_list", ["task", "sc_score_1"]),  # OmniEdit
        ("output_image", "input_image", "edit", ["input", "output", "inverse_edit"]),  # HQ-Edit
        ("edited_image", "image", "Instruction", []),
        ("URL", "", "TEXT", ["SAMPLE_ID", "NSFW", "similarity"]),  # LAION
        ("jpg", "", "caption", ["url", "key", "status"]),  # img2dataset
        ("Image Path", "", "Caption", []),
        ("image", "", "text", ["conditioning_image"]),
    ],
)
def test_columns_are_known_by_usual_names(image, references, prompt, others):
    columns = {"image": image, "prompt": prompt} | ({"references": references} if references else {})
    assert (
        columns_of(RawData(Path("a"), "hf"), [*others, prompt, image, *filter(None, [references])], Path("a"))
        == columns
    )
    plain = RawData(Path("a"), "hf", columns={"image": image, "prompt": prompt})  # no edits if the image is given
    assert "references" not in columns_of(plain, [*others, *columns.values()], Path("a"))


def test_edits_in_tables_and_parquet_are_edits(tmp_path):
    row = {"source_img": "0.png", "target_img": "1.png", "instruction": "do it", "mask_img": "2.png"}
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        path = written(tmp_path / name[2:] / name, [row] * 3)
        edits = convert(path, tmp_path / f"out-{name}")
        assert {(edit.task, edit.image, edit.references) for edit in edits} == {
            ("edit", picture(value=1), (picture(value=0),))
        }
        assert notes(RawData(path, guess_form(path))) == [
            "reads image from 'target_img', prompt from 'instruction', references from 'source_img'; not read: mask_img"
        ]


def test_the_first_of_several_captions_is_kept_and_told(tmp_path):
    rows = [{"file_name": "0.png", "captions": texts} for texts in (["", "one", "two"], ["three"], [])]
    path = written(tmp_path / "a.jsonl", rows)
    assert [r.prompt for r in convert(path, tmp_path / "out")] == ["one", "three"]
    assert reasons(tmp_path / "out") == ["empty caption"]
    assert "1 have several captions; the first of each is kept" in list(look(RawData(path, "pairs"), LIMITS, 0.1))


def test_a_table_without_a_header_is_told(tmp_path):
    path = put(tmp_path / "a.csv", "0.png,a cat\n1.png,a dog\n")
    with pytest.raises(UserError, match=r"has the keys 0\.png, a cat\); is its header missing\?"):
        guess_form(path)
    with pytest.raises(UserError, match=r"which column is the image\?.*is its header missing\?"):
        notes(RawData(path, "pairs"))


def test_spaces_behind_the_commas_of_csv(tmp_path):
    put(tmp_path / "0.png", picture())
    path = put(tmp_path / "a.csv", 'text, image\n"a, b", 0.png\nc, "0.png"\n')
    assert [r.prompt for r in convert(path, tmp_path / "out")] == ["a, b", "c"]


def test_a_place_is_said_on_one_line_with_what_was_not_read(tmp_path):
    put(tmp_path / "a\nb.png", picture())
    put(tmp_path / "a\nb.txt", "a cat")
    put(tmp_path / "c\nd.png", picture())
    lines = list(look(RawData(tmp_path, "folder"), LIMITS, 1))
    assert lines[1].endswith("of 2 samples looked at, 1 would be kept (1 t2i)")
    assert not any("\n" in line for line in lines)
    path = put(tmp_path / "list.csv", "image,text\ngone.png,a\n0.png,b\n")
    put(tmp_path / "0.png", picture())
    assert f"{path}, row 1 ({tmp_path}/gone.png)" in str(list(look(RawData(path, "pairs"), LIMITS, 1)))


# ---------------------------------------------------------------- captions as people keep them


def test_captions_in_tars(tmp_path):
    pictures = {name: picture(value=i) for i, name in enumerate("abcd")}
    members = [(f"{name}.png", data) for name, data in pictures.items()]
    members += [("a.caption", b"one"), ("b.txt", b" "), ("b.json", b'{"TEXT": "two"}'), ("c.json", b'"three"')]
    members += [("d.cls", b"3"), ("__key__", b"k"), ("__MACOSX/a.txt", b"x"), ("e.v1.png", picture())]
    members += [(f"photo 2.{i}.{kind}", data) for i in (0, 1) for kind, data in (("png", picture()), ("txt", b"dots"))]
    members += [("f.original.png", picture()), ("f.edited.png", picture()), ("f.txt", b"edit")]
    path = pack(tmp_path / "a.tar", members)
    found = {r.id.partition("/")[2]: r for r in convert(path, tmp_path / "out")}
    assert {name: r.prompt for name, r in found.items()} == {
        "a": "one",
        "b": "two",
        "c": "three",
        "f": "edit",
        "photo 2.0": "dots",
        "photo 2.1": "dots",
    }
    assert found["f"].task == "edit"
    assert sorted(reasons(tmp_path / "out")) == [
        "no caption in the sample: its files are png, cls",
        "no caption in the sample: its files are v1.png",
    ]


def test_captions_beside_pictures(tmp_path):
    for name, caption, text in [("1.png", "1.png.txt", "a"), ("2.PNG", "2.Txt", "b"), ("3.png", "3.caption", "c")]:
        put(tmp_path / "in" / name, picture())
        put(tmp_path / "in" / caption, text)
    put(tmp_path / "in" / "3.txt", "\n")  # an empty one does not hide the other
    assert [r.prompt for r in convert(tmp_path / "in", tmp_path / "out")] == ["a", "b", "c"]
