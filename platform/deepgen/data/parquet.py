"""Reads and writes whole files of records as parquet, checking each row.

Training reads rows on demand by the same rules (``loading.parquet_store``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from deepgen.data.images import header_size
from deepgen.data.records import NOT_UTF8, Record, RecordError, check_row, read_prompt_lines
from deepgen.data.uris import reach_of
from deepgen.errors import UserError
from deepgen.reading.file_reader import check_regular
from deepgen.reading.reach import Reach

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
# Errors from reading a damaged parquet file. UnicodeDecodeError comes from column names.
PARQUET_ERRORS = (pa.ArrowException, OSError, UnicodeDecodeError)


@dataclass(frozen=True)
class Row:
    """A row of a file, counted from 1: its record, or why it has none."""

    file: str
    number: int
    record: Record | RecordError


def read_records(path: Path, allow: Sequence[str] = ()) -> list[Record]:
    """Records of a parquet file, of all ``*.parquet`` in a folder (by name), or of a ``.txt`` with one prompt a line.

    allow: what their images may be read from besides the folder of `path` and public addresses, as data.allow.

    Raises UserError naming file and row (counted from 1) of the first row that does not fit the schema.
    """
    records = []
    for row in read_rows(path, allow):
        if isinstance(row.record, RecordError):
            raise row.record
        records.append(row.record)
    return records


def read_rows(path: Path, allow: Sequence[str] = ()) -> list[Row]:
    """Like `read_records`, but returns a RecordError for a parquet row that misfits the schema or repeats an id.

    Raises UserError for faults outside single rows: an unreadable file, a missing column, an empty line in a .txt.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; allowed: parquet, a folder of it, or a .txt of prompts")
    files = parquet_files(path) if path.is_dir() else [path]
    require_regular(files)
    reach = reach_of(path, allow)
    rows: list[Row] = []
    first_seen: dict[str, str] = {}
    for file in files:
        found = read_prompt_lines(file) if file.suffix == ".txt" else _read_parquet(file, reach)
        for number, record in enumerate(found, start=1):
            place = f"{file}, row {number}"
            if isinstance(record, Record) and record.id in first_seen:
                reason = f"id {record.id!r} was already used in {first_seen[record.id]}"
                record = RecordError(place, reason, record.id)
            elif isinstance(record, Record):
                first_seen[record.id] = place
            rows.append(Row(str(file), number, record))
    if not rows:
        raise UserError(f"{path}: holds no records")
    return rows


def parquet_files(folder: Path) -> list[Path]:
    """The ``*.parquet`` files in a folder, sorted by name. Raises UserError if there are none or one is a folder."""
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise UserError(f"{folder}: no *.parquet in this folder")
    inner = next((file for file in files if file.is_dir()), None)
    if inner is not None:
        raise UserError(f"{inner}: is a folder; allowed in {folder.name}/ under such a name: parquet files")
    return files


def require_regular(files: Sequence[Path]) -> None:
    """Raise UserError if one is no regular file: reading a FIFO would wait for ever."""
    for file in files:
        try:
            check_regular(file)
        except OSError as error:
            raise UserError(f"{file}: {error.strerror or error}") from error


def write_records(path: Path, records: list[Record], *, row_group_size: int | None = None) -> None:
    """Write records as one parquet file, replacing it atomically. `row_group_size`: rows that are read together.

    The columns SIZES get the sizes of images held as bytes, or null if the header is unreadable.
    Raises UserError if some images are bytes and others paths.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [asdict(record) | {"references": list(record.references)} | _sizes(record) for record in records]
    temporary = path.with_name(path.name + ".tmp")
    images = [r.image for r in records if r.image is not None]
    references = [reference for r in records for reference in r.references]
    schema = _schema(_kind(path, "image", images), _kind(path, "references", references))
    table = pa.Table.from_pylist(rows, schema=pa.schema([*schema, *SIZES]))
    pq.write_table(table, temporary, compression="zstd", row_group_size=row_group_size)
    temporary.replace(path)


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
    return UserError(f"{file}: can't be read as parquet ({' '.join(str(error).split())[:200]})")


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


def _read_parquet(file: Path, reach: Reach) -> list[Record | RecordError]:
    try:
        table = pq.read_table(file)
    except PARQUET_ERRORS as error:
        raise unreadable(file, error) from error
    found: list[Record | RecordError] = []
    for number, row in enumerate(to_rows(table, file), start=1):
        try:
            found.append(check_row(row, f"{file}, row {number}", file.parent, reach))
        except RecordError as error:
            found.append(error)
    return found
