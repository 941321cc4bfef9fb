"""Damaged parquet and Arrow: never the end of the process, and what a footer says is what pyarrow reads in it."""

import struct
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepgen.data.conversion.raw_data import guess_form
from deepgen.data.conversion.readers.columnar import read_columnar
from deepgen.data.conversion.readers.parquet_footer import footer_at, row_groups
from deepgen.data.conversion.readers.raw_sample import RawData, Unit
from deepgen.data.conversion.readers.thrift import read_struct
from deepgen.errors import UserError
from tests.data.test_convert import picture
from tests.data.test_convert_forms import arrow
from tests.data.test_convert_odd import parquet


def test_a_damaged_footer_ends_no_process(tmp_path):
    """pyarrow aborts when it is asked for a column whose sizes or statistics are damaged."""
    source = parquet(tmp_path / "a.parquet", [{"image": picture(), "text": "a cat"}] * 3)
    data, outcomes = source.read_bytes(), Counter[str]()
    (size,) = struct.unpack("<I", data[-8:-4])
    for at in range(len(data) - 8 - size, len(data), 3):
        source.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        raw = RawData(source, "hf", "t2i", name="a")
        try:
            found = list(read_columnar(raw, Unit(0, str(source), 0, 1)))
            outcomes["taken" if len(found) == 3 else "short"] += 1
        except UserError:
            outcomes["refused"] += 1
    assert outcomes["taken"] > 50 and outcomes["refused"] > 50, outcomes


def test_a_column_whose_name_is_not_utf8(tmp_path):
    path = arrow(tmp_path / "a.arrow", pa.table({"text": ["a"], "nameless": ["b"]}))
    path.write_bytes(path.read_bytes().replace(b"nameless", b"name\xffess"))
    with pytest.raises(UserError, match="can't be read as Arrow"):
        guess_form(path)


@pytest.mark.parametrize("options", [{}, {"use_dictionary": False, "compression": "zstd"}, {"version": "1.0"}])
def test_a_footer_says_what_pyarrow_reads_in_it(tmp_path, options):
    rows = [{"image": {"bytes": picture(), "path": "a.png"}, "text": "a cat", "tags": ["x", "y"], "n": 1.5}] * 20
    source = parquet(tmp_path / "a.parquet", rows, row_group_size=3, **options)
    metadata, data = pq.ParquetFile(source).metadata, memoryview(source.read_bytes())
    found = row_groups(data, footer_at(data, metadata.serialized_size))
    assert len(found) == metadata.num_row_groups == 7
    for number, chunks in enumerate(found):
        group = metadata.row_group(number)
        assert len(chunks) == group.num_columns == 5
        for chunk, column in zip(chunks, map(group.column, range(5)), strict=True):
            assert ".".join(chunk.path) == column.path_in_schema and chunk.size == column.total_compressed_size
            assert chunk.start == column.dictionary_page_offset or chunk.start == column.data_page_offset
            assert chunk.nulls == column.statistics.null_count


@pytest.mark.parametrize("opening", [b"\x1c", b"\x19\x19"])
def test_structs_without_end(opening):
    with pytest.raises(ValueError, match=r"in structs at|in lists at"):
        read_struct(memoryview(opening * 5000), 0)
