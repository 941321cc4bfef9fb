"""Reads and writes whole files of records as parquet, checking each row.

Training reads rows on demand by the same rules (``loading.parquet_store``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from deepgen.data.images import header_size
from deepgen.data.records import NOT_UTF8, Listed, Record, RecordError, check_row, read_prompts
from deepgen.data.uris import reach_of
from deepgen.errors import UserError
from deepgen.reading.file_reader import LFS_POINTER, check_regular, is_lfs_pointer
from deepgen.reading.reach import Reach
from deepgen.reading.tables import TABLES, suffix_of

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("task", pa.string()),
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("image", pa.binary()),
        ("references", pa.list_(pa.binary())),
        ("source", pa.string()),
    ]
)
# Optional columns, may be null: sizes in pixels of the target and of the references (width, height, width, ...). They
# tell training which records share a bucket (``deepgen.data.loading.buckets``) without opening an image.
SIZES = pa.schema([("width", pa.int32()), ("height", pa.int32()), ("reference_sizes", pa.list_(pa.int32()))])
HELD_BYTES, GROUP_BYTES = 128 << 20, 64 << 20  # images that `RecordWriter` holds, and of one row group
PROMPT_LISTS = (".txt", *TABLES)
CONVERT = "data in another form: python stages/convert.py {} OUT"
# Errors from reading a damaged parquet file. UnicodeDecodeError comes from column names.
PARQUET_ERRORS = (pa.ArrowException, OSError, UnicodeDecodeError)


@dataclass(frozen=True)
class Row:
    """A row of a file, counted from 1: its record, or why it has none. named: its id was given, not made."""

    file: str
    number: int
    record: Record | RecordError
    named: bool = True


def read_records(path: Path, allow: Sequence[str] = ()) -> list[Record]:
    """Records of a parquet file, of all ``*.parquet`` in a folder (by name), or of a prompt list (`read_prompts`).

    allow: what their images may be read from besides the folder of `path` and public addresses, as data.allow.

    Raises UserError naming file and row (counted from 1) of the first row that does not fit the schema.
    """
    records = []
    for row in read_rows(path, allow):
        if isinstance(row.record, RecordError):
            raise row.record
        records.append(row.record)
    return records


def read_rows(path: Path, allow: Sequence[str] = (), *, each_line: bool = False) -> list[Row]:
    """Like `read_records`, but returns a RecordError for a parquet row that misfits the schema or repeats an id.

    The same for a row of a prompt list in JSON or CSV, and with `each_line` of text. Raises UserError for faults
    outside single rows: an unreadable file, a missing column, without `each_line` an empty line in a .txt.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; allowed: parquet, a folder of it, or a list of prompts")
    files = parquet_files(path) if path.is_dir() else [path]
    require_regular(files)
    reach = reach_of(path, allow)
    rows: list[Row] = []
    first_seen: dict[str, str] = {}
    for file in files:
        found = (
            read_prompts(file, reach, each_line=each_line)
            if suffix_of(file) in PROMPT_LISTS
            else _read_parquet(file, reach)
        )
        for number, record, named in found:
            place = f"{file}, row {number}"
            if isinstance(record, Record) and record.id in first_seen:
                reason = f"id {record.id!r} was already used in {first_seen[record.id]}"
                record = RecordError(place, reason, record.id)
            elif isinstance(record, Record):
                first_seen[record.id] = place
            rows.append(Row(str(file), number, record, named))
    if not rows:
        raise UserError(f"{path}: holds no records")
    return rows


def parquet_files(folder: Path) -> list[Path]:
    """The ``*.parquet`` files in a folder, sorted by name, without hidden ones.

    Raises UserError if there are none or one is a folder.
    """
    files = sorted(file for file in folder.glob("*.parquet") if not file.name.startswith("."))
    if not files:
        raise UserError(f"{folder}: no *.parquet in this folder; {CONVERT.format(folder)}")
    inner = next((file for file in files if file.is_dir()), None)
    if inner is not None:
        raise UserError(f"{inner}: is a folder; allowed in {folder.name}/ under such a name: parquet files")
    return files


def require_regular(files: Sequence[Path]) -> None:
    """Raise UserError if one is no regular file (reading a FIFO would wait for ever), or a stand-in for one."""
    for file in files:
        try:
            check_regular(file)
            with file.open("rb") as opened:
                is_pointer = is_lfs_pointer(opened.read(len(LFS_POINTER)))
        except OSError as error:
            raise UserError(f"{file}: {error.strerror or error}") from error
        if is_pointer:
            raise UserError(f"{file}: is a pointer of Git LFS, not the file itself; fetch it with git lfs pull")


def write_records(path: Path, records: list[Record], *, row_group_size: int | None = None) -> None:
    """Write records as one parquet file, replacing it atomically. `row_group_size`: rows that are read together.

    The columns SIZES get the sizes of images held as bytes, or null if the header is unreadable.
    Raises UserError if some images are bytes and others paths.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    images = [r.image for r in records if r.image is not None]
    references = [reference for r in records for reference in r.references]
    schema = _schema(_kind(path, "image", images), _kind(path, "references", references))
    pq.write_table(_table(records, schema), temporary, compression="zstd", row_group_size=row_group_size)
    temporary.replace(path)


def _table(records: Sequence[Record], schema: pa.Schema) -> pa.Table:
    rows = [asdict(record) | {"references": list(record.references)} | _sizes(record) for record in records]
    return pa.Table.from_pylist(rows, schema=pa.schema([*schema, *SIZES]))


def _table_of_bytes(records: Sequence[Record]) -> pa.Table:
    """Like `_table` for images held as bytes; a single large image is not copied."""
    table = _table([replace(record, image=None, references=()) for record in records], SCHEMA)
    sizes = [_sizes(record) for record in records]
    for field in SIZES:
        column = pa.array([size[field.name] for size in sizes], field.type)
        table = table.set_column(table.column_names.index(field.name), field, column)
    ends = np.cumsum([0, *(len(record.references) for record in records)], dtype=np.int32)
    references = pa.ListArray.from_arrays(pa.array(ends), _binary([one for r in records for one in r.references]))
    table = table.set_column(SCHEMA.names.index("references"), SCHEMA.field("references"), references)
    return table.set_column(SCHEMA.names.index("image"), SCHEMA.field("image"), _binary([r.image for r in records]))


def _binary(values: Sequence[bytes | str | None]) -> pa.Array:
    data = [value for value in values if isinstance(value, bytes)]
    if len(data) < len(values):
        return pa.array(values, pa.binary())
    ends = pa.py_buffer(np.cumsum([0, *map(len, data)], dtype=np.int32))
    content = pa.py_buffer(data[0] if len(data) == 1 else b"".join(data))
    return pa.Array.from_buffers(pa.binary(), len(data), [None, ends, content])


class RecordWriter:
    """Writes a file of records that hold their images as bytes while they come, a context manager.

    Some records are held, at most HELD_BYTES of images, so that `shuffle` can mix them. The file
    gets its name when the context ends without an error. Without records, there is none.
    """

    def __init__(self, path: Path, row_group_size: int, shuffle: Callable[[list[Record]], None]) -> None:
        self._path, self._rows, self._shuffle = path, row_group_size, shuffle
        self._temporary = path.with_name(path.name + ".tmp")
        self._schema = pa.schema([*SCHEMA, *SIZES])
        self._writer: pq.ParquetWriter | None = None
        self._held: list[Record] = []
        self._bytes = 0

    def __enter__(self) -> RecordWriter:
        return self

    def add(self, record: Record) -> None:
        size = _bytes_of(record)
        if self._held and self._bytes + size > HELD_BYTES:
            self._write_held()
        self._held.append(record)
        self._bytes += size
        if self._bytes > HELD_BYTES:
            self._write_held()

    def _write_held(self) -> None:
        if self._writer is None:
            images = ("image", "references.list.element")
            texts = [name for name in SCHEMA.names if name not in ("image", "references")]
            self._writer = pq.ParquetWriter(
                self._temporary,
                self._schema,
                compression=dict.fromkeys(images, "none") | dict.fromkeys([*texts, *SIZES.names], "zstd"),
                use_dictionary=texts,
                write_statistics=texts,  # of images, they would be a whole one
            )
        self._shuffle(self._held)
        group, size = list[Record](), 0
        held, self._held, self._bytes = self._held[::-1], [], 0
        while held:
            record = held.pop()
            if group and (len(group) == self._rows or size + _bytes_of(record) > GROUP_BYTES):
                self._writer.write_table(_table_of_bytes(group))
                group, size = [], 0
            group.append(record)
            size += _bytes_of(record)
        self._writer.write_table(_table_of_bytes(group))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._held and kind is None:
            self._write_held()
        if self._writer is not None:
            self._writer.close()
            if kind is None:
                self._temporary.replace(self._path)


def _bytes_of(record: Record) -> int:
    return sum(len(data) for data in (record.image, *record.references) if isinstance(data, bytes))


def _sizes(record: Record) -> dict[str, Any]:
    """A record's values for the columns SIZES."""
    width, height = (None, None) if record.image is None else header_size(record.image)
    references = [side for data in record.references for side in header_size(data)]
    return {"width": width, "height": height, "reference_sizes": None if None in references else references}


def _kind(path: Path, column: str, images: Sequence[bytes | str]) -> pa.DataType:
    paths = sum(isinstance(image, str) for image in images)
    if paths not in (0, len(images)):
        raise UserError(f"{path}: {column} holds {paths} paths among {len(images)} images; allowed: all bytes, or none")
    return pa.string() if paths else pa.binary()


def _schema(image: pa.DataType, reference: pa.DataType) -> pa.Schema:
    """SCHEMA with the given types for image and references, binary or string."""
    types = {"image": image, "references": pa.list_(reference)}
    return pa.schema([(field.name, types.get(field.name, field.type)) for field in SCHEMA])


def unreadable(file: Path, error: Exception) -> UserError:
    """The error for a file that is damaged or not parquet."""
    hint = "" if file.suffix.lower() == ".parquet" else f"; {CONVERT.format(file)}"
    return UserError(f"{file}: can't be read as parquet ({' '.join(str(error).split())[:200]}){hint}")


def conform(table: pa.Table, file: Path) -> pa.Table:
    """The table cast to SCHEMA, images as bytes or as text. Raises UserError naming file and column.

    An empty table is enough to check a file's columns.
    """
    try:
        missing = [name for name in SCHEMA.names if name not in table.column_names]
    except UnicodeDecodeError as error:
        raise unreadable(file, error) from error
    if missing:
        raise UserError(f"{file}: missing column {', '.join(missing)}; allowed: {', '.join(SCHEMA.names)}")
    image, references = (table.schema.field(name).type for name in ("image", "references"))
    wanted = _schema(_image_type(image), _image_type(getattr(references, "value_type", references)))
    for field in wanted:
        try:
            column = as_type(table.column(field.name), field.type)
        except pa.ArrowException as error:
            raise UserError(
                f"{file}: column {field.name} is {table.schema.field(field.name).type}, which does not fit; allowed: "
                f"{field.type}{' or strings in place of binary' if field.name in ('image', 'references') else ''} "
                f"({' '.join(str(error).split())[:120]})"
            ) from error
        table = table.set_column(table.column_names.index(field.name), field, column)
    return table.select(SCHEMA.names)


def as_type(column: pa.ChunkedArray, wanted: pa.DataType) -> pa.ChunkedArray:
    """The column cast to a type. Text that is not UTF-8 passes, as only its row is wrong. Raises ArrowException."""
    return column.cast(options=pc.CastOptions(target_type=wanted, allow_invalid_utf8=True))


def to_rows(table: pa.Table, file: Path) -> list[dict[str, Any]]:
    """Rows for `check_row`, with NOT_UTF8 for text that is not UTF-8. Raises UserError like `conform`."""
    return decoded_rows(conform(table, file), _decoded)


def decoded_rows(table: pa.Table, decode: Callable[[bytes], Any]) -> list[dict[str, Any]]:
    """Rows of a table. If some text is not UTF-8, `decode` decodes all text, because to_pylist then returns nothing."""
    rows: list[dict[str, Any]]
    try:
        rows = table.to_pylist()
    except UnicodeDecodeError:
        rows = _decoded_value_by_value(table, decode)
    return rows


def _decoded_value_by_value(table: pa.Table, decode: Callable[[bytes], Any]) -> list[dict[str, Any]]:
    texts = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
    kinds = texts | {pa.list_(text): pa.list_(binary) for text, binary in texts.items()}
    text = [field for field in table.schema if field.type in kinds]
    for field in text:
        number = table.column_names.index(field.name)
        table = table.set_column(number, field.name, table.column(field.name).cast(kinds[field.type]))
    rows: list[dict[str, Any]] = table.to_pylist()
    for row in rows:
        for field in text:
            value = row[field.name]
            values = [None if one is None else decode(one) for one in (value if isinstance(value, list) else [value])]
            row[field.name] = values if isinstance(value, list) else values[0]
    return rows


def _decoded(value: bytes) -> Any:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return NOT_UTF8


def _image_type(given: pa.DataType) -> pa.DataType:
    given = given.value_type if pa.types.is_dictionary(given) else given
    text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return pa.string() if any(is_kind(given) for is_kind in text) else pa.binary()


def _read_parquet(file: Path, reach: Reach) -> list[Listed]:
    try:
        table = pq.read_table(file)
    except PARQUET_ERRORS as error:
        raise unreadable(file, error) from error
    found: list[Listed] = []
    for number, row in enumerate(to_rows(table, file), start=1):
        try:
            found.append(Listed(number, check_row(row, f"{file}, row {number}", file.parent, reach), named=True))
        except RecordError as error:
            found.append(Listed(number, error, named=True))
    return found
