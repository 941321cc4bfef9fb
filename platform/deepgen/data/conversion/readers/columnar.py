"""Reads rows of parquet and Arrow files, one at a time, however large their row groups and batches are.

Both are mapped into memory. The system counts the parts of a mapped file that were read as this process's memory until
they are given back (`_Mapped.read`).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from deepgen.data.conversion.readers.image_values import MAX_SAMPLE
from deepgen.data.conversion.readers.parquet_footer import Chunk, footer_at, row_groups
from deepgen.data.conversion.readers.raw_sample import RawData, RawSample, Unit, stem_of
from deepgen.data.conversion.readers.row_forms import columns_of, sample_of
from deepgen.data.conversion.readers.unpacked_sizes import batch_size, pages_of
from deepgen.data.parquet import SCHEMA, decoded_rows
from deepgen.data.uris import UriError
from deepgen.errors import UserError
from deepgen.reading.tables import MAX_ROW

# Arrow holds a page once while it reads it, and the values of a dictionary twice.
MAX_PAGE, MAX_DICTIONARY = 448 << 20, 256 << 20
MAX_BATCH = 256 << 20  # of a compressed Arrow file, unpacked
_GIVE_BACK = 64 << 20  # bytes read from a mapped file until its parts are given back
_ERRORS = (pa.ArrowException, OSError, ValueError)
_BYTES = {
    pa.string(): pa.binary(),
    pa.large_string(): pa.large_binary(),
    pa.string_view(): pa.binary_view(),
}
_FILE_MAGIC = b"ARROW1"


class _Mapped:
    """A file mapped into memory."""

    def __init__(self, file: Path) -> None:
        self._used = 0
        try:
            with file.open("rb") as opened:
                self._map = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: it is empty
            why = getattr(error, "strerror", None) or error
            raise UserError(f"{file}: cannot be read ({why})") from error
        self.buffer, self.view = pa.py_buffer(self._map), memoryview(self._map)

    def read(self, size: int) -> None:
        """Note that `size` bytes were read. Their memory is given back from time to time; the file stays readable."""
        self._used += size
        if self._used > _GIVE_BACK:
            self._map.madvise(mmap.MADV_DONTNEED)
            self._used = 0


def is_arrow(file: Path) -> bool:
    """Whether a file is Arrow's, not parquet, by its name."""
    return file.suffix.lower() in (".arrow", ".feather")


def column_names(file: Path) -> list[str]:
    if is_arrow(file):
        return _arrow_names(file, _Mapped(file))
    return _Parquet(file, _Mapped(file)).names


def is_prompts(file: Path) -> bool:
    """Whether a file of records, by its first row group, has no target images."""
    if is_arrow(file):
        return False
    parquet = _Parquet(file, _Mapped(file))
    rows = parquet.rows[0] if parquet.rows else -1
    return any(chunk.path == ("image",) and chunk.nulls == rows for chunk in chain(*parquet.chunks[:1]))


def parts_of(file: Path, rows: int) -> list[tuple[int, int]]:
    """Ranges [first, last) of row groups, or of Arrow's batches, with about `rows` rows each."""
    mapped = _Mapped(file)
    if is_arrow(file):
        sizes = [batch.num_rows for batch in _batches(file, mapped)]
    else:
        sizes = _Parquet(file, mapped).rows
    runs, first, count = [], 0, 0
    for i, size in enumerate(sizes):
        count += size
        if count >= rows or i + 1 == len(sizes):
            runs.append((first, i + 1))
            first, count = i + 1, 0
    return runs


def read_columnar(raw: RawData, unit: Unit) -> Iterator[RawSample]:
    """The samples in a unit of a parquet or an Arrow file. Raises UserError if a column that is read is there twice."""
    file = Path(unit.file)
    names = column_names(file)
    columns = columns_of(raw, names, file) if raw.form == "hf" else {}
    wanted = list(columns.values()) if columns else [name for name in SCHEMA.names if name in names]
    if twice := next((name for name in wanted if names.count(name) > 1), None):
        raise UserError(f"{file}: has {names.count(twice)} columns {twice!r}; allowed: one")
    read = _arrow_rows if is_arrow(file) else _parquet_rows
    for number, row in read(file, unit, wanted):
        yield sample_of(row, raw, file, f"{stem_of(raw, file)}-{number}", f"{file}, row {number}", columns)


# ---------------------------------------------------------------- parquet


class _Parquet:
    """An open file: its columns' names, and the rows of each row group.

    Raises UserError if it cannot be read, for example because it is encrypted.
    """

    def __init__(self, file: Path, mapped: _Mapped) -> None:
        self._path, self._mapped = file, mapped
        with self._reading():
            # pre_buffer would read a whole row group in advance.
            self.file = pq.ParquetFile(pa.BufferReader(mapped.buffer), pre_buffer=False)
            metadata = self.file.metadata
            self._footer = footer_at(mapped.view, metadata.serialized_size)
            self.names: list[str] = list(self.file.schema_arrow.names)
            self.rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]

    @cached_property
    def chunks(self) -> list[list[Chunk]]:
        """The places of the columns of each row group. Only on demand: a footer of many groups takes half a second."""
        with self._reading():
            return row_groups(self._mapped.view, self._footer)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except _ERRORS as error:
            raise UserError(f"{self._path}: can't be read as parquet ({_why(error)})") from error


def _parquet_rows(file: Path, unit: Unit, columns: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbers and rows of the row groups of a unit, some columns of them."""
    mapped = _Mapped(file)
    parquet = _Parquet(file, mapped)
    number = sum(parquet.rows[: unit.first])
    for group in range(unit.first, unit.last):
        place = f"{file}: row group {group + 1} of {len(parquet.rows)}"
        try:
            _check_pages(mapped, parquet.chunks[group], columns, place)
            batches = parquet.file.iter_batches(1, row_groups=[group], columns=columns, use_threads=False)
            for batch in batches:
                number += 1
                mapped.read(batch.nbytes)
                yield number, _row(batch)
        except (*_ERRORS, IndexError) as error:
            raise UserError(f"{place} can't be read ({_why(error)}); fetch the file again") from error


def _check_pages(mapped: _Mapped, chunks: Sequence[Chunk], columns: list[str], place: str) -> None:
    """Raise UserError if reading the columns would unpack a page that is too large."""
    for chunk in chunks:
        if chunk.path[0] not in columns:
            continue
        for page in pages_of(mapped.view, chunk):
            limit = MAX_DICTIONARY if page.is_dictionary else MAX_PAGE
            if page.size > limit:
                raise UserError(
                    f"{place}: column {'.'.join(chunk.path)} has a {'dictionary' if page.is_dictionary else 'page'} "
                    f"of {page.size >> 20:,} MiB; allowed: {limit >> 20} MiB; write the file again in pieces, as with "
                    "pyarrow's write_table(..., write_batch_size=16, use_dictionary=False)"
                )
        mapped.read(_GIVE_BACK // 8)


def _row(batch: pa.RecordBatch) -> dict[str, Any]:
    """The only row of a batch, with a UriError in place of each value that Python cannot hold, or that is too large.

    Text that is not UTF-8 gets lone surrogates, which mark it as invalid.
    """
    row: dict[str, Any] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        texts = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        limit = MAX_ROW if texts else MAX_SAMPLE
        if not pa.types.is_dictionary(column.type) and column.nbytes > limit + 64:  # offsets count, too
            row[name] = UriError(name, f"more than {limit >> 20} MiB in one row")
            continue
        try:
            (found,) = decoded_rows(pa.table([column], [name]), lambda text: text.decode("utf-8", "surrogateescape"))
            row[name] = found[name]
        except (*_ERRORS, LookupError, OverflowError) as error:  # a date in year 9,999,999, a path that is not UTF-8
            row[name] = UriError(name, f"is {column.type}, and not readable: {_why(error)}")
    return row


def _why(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


# ---------------------------------------------------------------- Arrow


def _arrow_stream(mapped: _Mapped) -> pa.NativeFile:
    """The messages of an Arrow file of either kind: a stream, or one between a signature and an index."""
    return pa.BufferReader(mapped.buffer.slice(8) if mapped.view[: len(_FILE_MAGIC)] == _FILE_MAGIC else mapped.buffer)


def _arrow_names(file: Path, mapped: _Mapped) -> list[str]:
    try:
        return list(pa.ipc.open_stream(_arrow_stream(mapped)).schema.names)
    except _ERRORS as error:
        raise UserError(f"{file}: can't be read as Arrow ({_why(error)})") from error


def _batches(file: Path, mapped: _Mapped) -> Iterator[pa.RecordBatch]:
    _arrow_names(file, mapped)
    try:
        for message in pa.ipc.MessageReader.open_stream(_arrow_stream(mapped)):
            if (size := batch_size(message)) > MAX_BATCH:
                raise UserError(
                    f"{file}: has a batch of {size >> 20:,} MiB once it is unpacked; allowed: {MAX_BATCH >> 20} MiB; "
                    "write it again in smaller batches"
                )
        yield from pa.ipc.open_stream(_arrow_stream(mapped))
    except (*_ERRORS, struct.error) as error:
        raise UserError(f"{file}: a batch can't be read ({_why(error)}); fetch the file again") from error


def _check_offsets(batch: pa.RecordBatch, file: Path) -> None:
    """Raise UserError if a value would lie outside of the batch's buffers, which Arrow reads without a look at them.

    Texts are looked at as bytes: one that is not UTF-8 makes its row unusable, not the file.
    """
    try:
        for column in batch.columns:
            column.view(_as_bytes(column.type)).validate(full=True)
    except pa.ArrowException as error:
        raise UserError(f"{file}: a batch can't be read ({_why(error)}); fetch the file again") from error


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    """The type with bytes in the place of texts, at any depth."""
    if kind in _BYTES:
        return _BYTES[kind]
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_as_bytes(field.type)) for field in kind])
    for is_list, list_of in ((pa.types.is_list, pa.list_), (pa.types.is_large_list, pa.large_list)):
        if is_list(kind):
            return list_of(kind.value_field.with_type(_as_bytes(kind.value_type)))
    return kind


def _arrow_rows(file: Path, unit: Unit, columns: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbers and rows of the batches of a unit, some columns of them."""
    mapped = _Mapped(file)
    number = 0
    for index, batch in enumerate(_batches(file, mapped)):
        if index >= unit.last:
            break
        if index < unit.first:
            number += batch.num_rows
            continue
        chosen = batch.select(columns)
        _check_offsets(chosen, file)
        for at in range(batch.num_rows):
            row = chosen.slice(at, 1)
            number += 1
            mapped.read(row.nbytes)
            yield number, _row(row)
