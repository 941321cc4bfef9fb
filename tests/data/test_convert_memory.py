"""The memory of a conversion stays small, whatever archives and row groups hold. Measured in processes of its own."""

import gzip
import io
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from deepgen.data.conversion.readers.parquet_footer import footer_at, row_groups
from deepgen.data.conversion.readers.unpacked_sizes import batch_size, pages_of
from deepgen.data.images import check_pixels, header_size
from deepgen.errors import UserError
from tests.data.test_convert import ROOT, convert, picture, reasons
from tests.data.test_convert_forms import arrow, put

MEASURE = """
import re, sys
from pathlib import Path
from deepgen.data.conversion.convert_units import Limits, convert_unit, total_tally, write_plan
from deepgen.data import parquet
from deepgen.data.conversion.raw_data import RawData, guess_form, plan_units, source_files
from deepgen.errors import UserError

path, out = map(Path, sys.argv[1:3])
parquet.HELD_BYTES //= int(sys.argv[3])
parquet.GROUP_BYTES //= int(sys.argv[3])
said = ""
try:
    raw = RawData(path, guess_form(path))
    units = plan_units(raw, 1000, source_files(raw).files)
    write_plan(out, raw, Limits(16), 1000, 0, units)
    for unit in units:
        convert_unit(raw, unit, out, Limits(16), 0)
    total = total_tally(out)
    said = f"kept {total.kept}, dropped {dict(total.dropped)}"
except UserError as error:
    said = str(error)
# Not ru_maxrss, in which a new process begins with the peak of the one that started it.
print(int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10, said)
"""
BASE = 150  # MiB of the process with its libraries, generously; 90 here


def measured(path: Path, out: Path, shrunk: int = 1) -> tuple[int, str]:
    """Convert in a process of its own: its peak memory in MiB beyond its libraries, and what it says.

    shrunk: how many times less a writer of records holds than it usually does.
    """
    command = [sys.executable, "-c", MEASURE, str(path), str(out), str(shrunk)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=200, cwd=ROOT)
    peak, _, said = done.stdout.strip().partition(" ")
    return int(peak) - BASE, said


def table(rows: int, size: int) -> pa.Table:
    """Image structs of random bytes, in pieces of 10 rows."""
    data = np.random.default_rng(0).bytes(size)
    images = [[{"bytes": bytes([k, i]) + data, "path": None} for i in range(10)] for k in range(rows // 10)]
    return pa.table({"image": pa.chunked_array([pa.array(some) for some in images]), "text": ["a"] * rows})


@pytest.mark.processes
def test_a_row_group_much_larger_than_the_memory_it_takes(tmp_path):
    pq.write_table(table(200, 1 << 20), tmp_path / "a.parquet", row_group_size=200, compression="none")
    peak, said = measured(tmp_path / "a.parquet", tmp_path / "out")
    assert said == "kept 0, dropped {'target: not an image': 200}"
    assert peak < 130


@pytest.mark.processes
def test_a_batch_of_arrow_much_larger_than_the_memory_it_takes(tmp_path):
    path = arrow(tmp_path / "a.arrow", table(200, 1 << 20).combine_chunks(), rows=200)
    peak, said = measured(path, tmp_path / "out")
    assert "'target: not an image': 200" in said
    assert peak < 130


def test_a_value_that_is_larger_than_a_sample(tmp_path, monkeypatch):
    """As an object of Python it would be there once more, and a picture in base64 many times."""
    monkeypatch.setattr("deepgen.data.conversion.readers.columnar.MAX_SAMPLE", 1 << 20)
    monkeypatch.setattr("deepgen.data.conversion.readers.columnar.MAX_ROW", 1 << 20)
    good = picture()
    rows = pa.table({"image": [good, bytes(2 << 20), good, good], "text": ["a", "b", "c" * (2 << 20), "d"]})
    pq.write_table(rows, tmp_path / "in.parquet")
    assert [record.prompt for record in convert(tmp_path / "in.parquet", tmp_path / "out")] == ["a", "d"]
    said = "cannot be read (more than 1 MiB in one row)"
    assert sorted(reasons(tmp_path / "out")) == [f"caption: {said}", f"target: {said}"]


def test_what_pages_and_batches_unpack_to_is_known_before(tmp_path, monkeypatch):
    for name in ("MAX_PAGE", "MAX_DICTIONARY", "MAX_BATCH"):
        monkeypatch.setattr(f"deepgen.data.conversion.readers.columnar.{name}", 2 << 20)
    values = pa.table({"image": [bytes(3 << 20)] * 2, "text": ["a"] * 2})
    pq.write_table(values, tmp_path / "a.parquet", compression="zstd")
    pq.write_table(values, tmp_path / "b.parquet", compression="zstd", use_dictionary=False)
    arrow(tmp_path / "c.arrow", values, compression="zstd")
    assert all((tmp_path / name).stat().st_size < 10_000 for name in ("a.parquet", "b.parquet", "c.arrow"))
    for name, message in (
        ("a.parquet", "row group 1 of 1: column image has a dictionary of 3 MiB; allowed: 2 MiB; write the file again"),
        ("b.parquet", "row group 1 of 1: column image has a page of 6 MiB; allowed: 2 MiB"),
        ("c.arrow", "has a batch of 6 MiB once it is unpacked; allowed: 2 MiB"),
    ):
        with pytest.raises(UserError, match=rf"{name}: {message}"):
            convert(tmp_path / name, tmp_path / "out" / name)


@pytest.mark.processes
def test_a_value_that_many_rows_share(tmp_path):
    images = pa.DictionaryArray.from_arrays(pa.array([0] * 30, pa.int32()), pa.array([bytes(20 << 20)]))
    pq.write_table(pa.table({"image": images, "text": ["a"] * 30}), tmp_path / "a.parquet", compression="zstd")
    peak, said = measured(tmp_path / "a.parquet", tmp_path / "out")  # 600 MB, if all rows had their own
    assert said == "kept 0, dropped {'target: not an image': 30}"
    assert peak < 250


@pytest.mark.processes
def test_a_member_of_a_compressed_tar_much_larger_than_the_archive(tmp_path):
    packed = gzip.open(tmp_path / "a.tar.gz", "wb", compresslevel=1)  # noqa: SIM115
    with packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for name, size in (("0.jpg", 300 << 20), ("1.txt", 150 << 20)):
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, io.BytesIO(bytes(size)))
        for name, data in (("0.txt", b"a"), ("1.png", picture())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    peak, said = measured(tmp_path / "a.tar.gz", tmp_path / "out")
    assert "more than 160 MiB in one sample" in said and "more than 100,000 letters" in said
    assert peak < 130


@pytest.mark.processes
def test_large_pictures_are_decoded_once_and_one_by_one(tmp_path):
    stream = io.BytesIO()
    Image.new("RGBA", (6000, 6000), (1, 2, 3, 100)).save(stream, "PNG", compress_level=1)
    for i in range(2):
        put(tmp_path / "in" / f"{i}.png", stream.getvalue())
        put(tmp_path / "in" / f"{i}.txt", "a")
    peak, said = measured(tmp_path / "in", tmp_path / "out")
    assert said == "kept 2, dropped {}"
    assert peak < 220  # 137 MiB of pixels in one picture


@pytest.mark.processes
def test_shards_are_written_while_samples_come(tmp_path):
    data = picture(1000, 1000, "BMP")
    for i in range(80):
        put(tmp_path / "in" / f"{i}.bmp", data)
        put(tmp_path / "in" / f"{i}.txt", "a")
    peak, said = measured(tmp_path / "in", tmp_path / "out", shrunk=4)
    assert said == "kept 80, dropped {}"
    assert peak < 130  # the pictures are 229 MiB, of which 32 MiB are held
    groups = pq.ParquetFile(next((tmp_path / "out").glob("shard-*"))).metadata
    assert max(groups.row_group(i).num_rows for i in range(groups.num_row_groups)) == 5  # 16 MiB


@pytest.mark.processes
def test_a_row_of_many_values(tmp_path):
    put(tmp_path / "a.json", '[{"image": "0.png", "text": "a"}, [' + "[]," * (8 << 20))
    peak, said = measured(tmp_path / "a.json", tmp_path / "out")
    assert "row 2: more than 100,000 values" in said
    assert peak < 300  # 600 MiB, if all lists were made


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"image": "0.png", "text": "a"}, "' + "x" * (5 << 20), "row 2: more than 2 MiB, or never closed"),
        ("a.csv", 'image,text\n0.png,"' + "x" * (5 << 20), r"not CSV \(a row of more than 2 MiB"),
        ("a.csv", "image,text\n" + ('"' + "x" * (1 << 20) + '",') * 5, r"not CSV \(a row of more than 2 MiB"),
        ("a.csv", "image;text\n0.png;a\n" + ";" * 100_001 + "\n", r"not CSV \(a row of .* or 100,000 values"),
        ("a.tsv", "\t" * 100_001 + "\n0.png\ta\n", r"not CSV \(a row of .* or 100,000 values"),
    ],
)
def test_rows_without_an_end(tmp_path, monkeypatch, name, content, message):
    monkeypatch.setattr("deepgen.reading.tables.MAX_ROW", 2 << 20)
    with pytest.raises(UserError, match=rf"{name}.*{message}"):
        convert(put(tmp_path / name, content), tmp_path / "out", form="pairs")


@pytest.mark.parametrize(("kind", "most"), [("WEBP", 40_000_000), ("JPEG2000", 32_000_000), ("JPEG", 64_000_000)])
def test_pixels_of_formats_that_take_more_memory(kind, most, monkeypatch):
    monkeypatch.setattr("deepgen.data.images._MAX_DECODING", 640_000)  # a thousandth
    stream = io.BytesIO()
    side = int((most / 1000) ** 0.5) + 1
    Image.new("RGB", (side, side)).save(stream, kind, **({"progressive": True} if kind == "JPEG" else {}))
    with pytest.raises(ValueError, match=f"allowed: at most {most // 1000:,} as "):
        check_pixels(stream.getvalue())


def test_tiffs_are_unpacked_in_pieces_that_may_be_larger_than_the_picture(monkeypatch):
    """Pieces are strips and tiles. Of a tile of 100 MP, a picture of 64 x 64 px would take gigabytes."""
    monkeypatch.setattr("deepgen.data.images._MAX_DECODING", 640_000)
    tags = {256: 64, 257: 64, 258: 8, 259: 8, 262: 1, 322: 1024, 323: 1024, 324: 8, 325: 8}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    tiled = struct.pack("<2sHI8sH", b"II", 42, 16, b"", len(tags)) + entries + bytes(4)
    assert header_size(tiled) == (64, 64)
    with pytest.raises(ValueError, match="as TIFF in pieces of 1,048,576 bytes"):
        check_pixels(tiled)
    stream = io.BytesIO()
    Image.new("RGB", (384, 384)).save(stream, "TIFF", compression="tiff_lzw", strip_size=1 << 20)
    with pytest.raises(ValueError, match="as TIFF in pieces of 442,368 bytes"):
        check_pixels(stream.getvalue())


@pytest.mark.parametrize("per_scan", [3, 1])
def test_jpegs_in_several_scans_take_the_memory_of_progressive_ones(per_scan, monkeypatch):
    data = jpeg_of_zeros(256, per_scan)
    check_pixels(data)
    monkeypatch.setattr("deepgen.data.images._MAX_DECODING", 640_000)
    if per_scan == 3:
        check_pixels(data)
    else:
        with pytest.raises(ValueError, match="allowed: at most 64,000 as JPEG in several scans"):
            check_pixels(data)


def jpeg_of_zeros(side: int, per_scan: int) -> bytes:
    """A baseline JPEG of three colours, all of them in one scan or each in its own."""
    codes = b"".join(struct.pack(">HHB", 0xFFC4, 20, kind << 4) + b"\x01" + bytes(16) for kind in (0, 1))
    frame = struct.pack(">HHBHHB", 0xFFC0, 17, 8, side, side, 3) + b"".join(bytes([c, 0x11, 0]) for c in (1, 2, 3))
    data = b"\xff\xd8" + struct.pack(">HHB", 0xFFDB, 67, 0) + b"\x01" * 64 + frame + codes
    for first in range(1, 4, per_scan):
        colors = b"".join(bytes([c, 0]) for c in range(first, first + per_scan))
        head = struct.pack(">HHB", 0xFFDA, 6 + 2 * per_scan, per_scan) + colors + b"\x00\x3f\x00"
        data += head + bytes(per_scan * (side // 8) ** 2 // 4)
    return data + b"\xff\xd9"


def test_pictures_that_python_decodes_are_small(monkeypatch):
    monkeypatch.setattr("deepgen.data.images._IN_PYTHON", {"qoi": ("QOI", 100), "ppm_plain": ("plain PPM", 100)})
    stream = io.BytesIO()
    Image.new("RGB", (16, 16)).save(stream, "QOI")
    for data, kind in ((stream.getvalue(), "QOI"), (b"P1 16 16 " + b"1 " * 256, "plain PPM")):
        with pytest.raises(ValueError, match=f"allowed: at most 100 as {kind}"):
            check_pixels(data)


def test_sizes_of_pages_and_batches_are_those_that_were_written(tmp_path):
    pq.write_table(table(20, 1000), tmp_path / "a.parquet", row_group_size=20, compression="zstd", use_dictionary=False)
    footer = pq.ParquetFile(tmp_path / "a.parquet").metadata.serialized_size
    data = memoryview((tmp_path / "a.parquet").read_bytes())
    sizes = [page.size for page in pages_of(data, row_groups(data, footer_at(data, footer))[0][0])]
    assert 20 * 1000 < sum(sizes) < 21 * 1000
    path = arrow(tmp_path / "a.arrow", pa.table({"a": [bytes(5000)] * 3}), compression="lz4", rows=3)
    found = [batch_size(message) for message in pa.ipc.MessageReader.open_stream(pa.OSFile(str(path)))]
    assert found[0] == 0 and 15_000 <= found[1] < 15_100
