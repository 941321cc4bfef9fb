"""The record schema of every stage, and its files: parquet in and out, and prompt lists as plain text.

One record is one training pair or one prompt. ``read_records`` reads files whole and checks them row by row; training
reads its rows when they are needed (``loading.parquet_store``). Images are encoded bytes, or paths and URIs that are
read when the image is. Left out on purpose: resizing and tensors (``loading.dataset``).
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from deepgen.config.settings import TASKS
from deepgen.data.uris import absolute, read_uri
from deepgen.errors import UserError

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
# May be absent or null: pixels of the target and, in turn, width and height of every reference. Training then knows
# which records become equally large (``deepgen.data.loading.buckets``) without opening an image.
SIZES = pa.schema([("width", pa.int32()), ("height", pa.int32()), ("reference_sizes", pa.list_(pa.int32()))])
_TEXT_COLUMNS = ("id", "task", "prompt", "answer", "source")
MAX_ASPECT = 8.0  # longer by shorter side of an image that can be trained on
MAX_PIXELS = 100_000_000  # more are refused by the header; Pillow's own limit is 179 million
# What Pillow's decoders raise on damaged data. DecompressionBombError is an Exception of its own.
DECODE_ERRORS = (
    ArithmeticError,
    AttributeError,
    EOFError,
    Image.DecompressionBombError,
    LookupError,
    OSError,
    RuntimeError,  # AVIF: "Failed to decode frame 0"
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
_ORIENTATION = 0x0112  # of EXIF: how the stored picture is turned to stand upright
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # where Pillow keeps it
# What reading a damaged parquet file raises; the last one for the name of a column.
PARQUET_ERRORS = (pa.ArrowException, OSError, UnicodeDecodeError)
NOT_UTF8 = object()  # stands in a row for such text
_QUOTED = re.compile(r'"([^"]+)"')


@dataclass(frozen=True)
class Record:
    """One pair of prompt and target image, or a prompt alone (``image`` None)."""

    id: str  # unique in its file
    task: str  # one of TASKS
    prompt: str  # caption, riddle or edit instruction, as the user types it
    answer: str  # plain description of what the target shows; judges compare against it
    image: bytes | str | None  # target image: encoded (PNG, WebP, JPEG), or an absolute path or URI of it
    references: tuple[bytes | str, ...]  # source images in the same way, () unless task == "edit"
    source: str  # the data set it came from; data.weights weighs them


class RecordError(UserError):
    """One row that cannot be used. ``reason`` is the message without the place; ``id`` is "" when the row has none."""

    def __init__(self, place: str, reason: str, id: str = "") -> None:
        super().__init__(f"{place}: {reason}")
        self.place, self.reason, self.id = place, reason, id

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.place, self.reason, self.id)  # not the one line: Ray sends it between processes


def quoted_words(prompt: str) -> list[str]:
    """Segments between straight double quotes: the words a text-rendering prompt asks for."""
    return _QUOTED.findall(prompt)


def decode_image(data: bytes | str) -> np.ndarray:
    """Encoded image, or its path or URI -> uint8 [H, W, 3] RGB, upright by EXIF; transparent parts become white.

    Raises ValueError if it can't be read.
    """
    return np.array(open_image(data), dtype=np.uint8)


def open_image(data: bytes | str) -> Image.Image:
    """Decoded RGB image, upright, as `decode_image`. The header is judged before anything is decoded."""
    try:
        image: Image.Image = Image.open(io.BytesIO(read_uri(data) if isinstance(data, str) else data))
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} px; allowed: at most {MAX_PIXELS:,} pixels")
        _check_white(image)
        image.load()
    except DECODE_ERRORS as error:
        raise ValueError(f"not a readable image ({' '.join(str(error).split())[:200]})") from error
    turn = _TURNS.get(_orientation(image))
    if image.mode.startswith("I"):
        image = _from_16_bits(image)
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba)
    image = image if image.mode == "RGB" else image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def _check_white(image: Image.Image) -> None:
    """Raise ValueError for greys of which nobody says which number is white: Pillow would cut them off at 255."""
    grey16 = "allowed: 8 bits, or unsigned 16 bits from black to white"
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):  # a PPM's are scaled to 16 bits
        raise ValueError(f"greys of mode {image.mode}, of which white is not known; {grey16}")
    if image.mode.startswith("I;16") and isinstance(image, TiffImageFile):
        bits, first_is_white = (image.tag_v2.get(258) or (1,))[0], image.tag_v2.get(262) == 0
        if bits != 16 or first_is_white:
            raise ValueError(f"grey TIFF of {bits} bits{' with white as 0' if first_is_white else ''}; {grey16}")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Greys from 0 to 65535 in 8 bits; the one that stands for transparent becomes white."""
    grey = np.asarray(image).astype(np.uint32)
    eight = ((grey + 128) // 257).astype(np.uint8)
    if "transparency" in image.info:
        eight[grey == image.info["transparency"]] = 255
    return Image.fromarray(eight)


def _orientation(image: Image.Image) -> int:
    """EXIF's, 1 to 8, as far as the file has been read; 1 where it says none. A TIFF is turned by Pillow itself."""
    if image.format == "TIFF" or not any(key in image.info for key in _EXIF):
        return 1
    try:
        found = Image.Image.getexif(image).get(_ORIENTATION)  # a PngImageFile's own decodes the image
    except DECODE_ERRORS:  # a damaged note beside a sound picture, which viewers pass over too
        return 1
    return found if found in _TURNS else 1


@dataclass(frozen=True)
class Row:
    """A row of a file, counted from 1: the record in it, or why there is none."""

    file: str
    number: int
    record: Record | RecordError


def check_prompt(prompt: str, reserved: Sequence[str]) -> None:
    """Raise ValueError when the prompt contains one of the texts that would pass for structure."""
    found = next((token for token in reserved if token in prompt), None)
    if found is not None:
        raise ValueError(f"prompt contains the reserved token {found}; remove it")


def usable_image(data: bytes | str, what: str) -> Image.Image:
    """As `open_image`. Raises ValueError, naming `what`, when it cannot be read or has an absurd shape."""
    try:
        image = open_image(data)
    except ValueError as error:
        raise ValueError(f"{what} is {error}") from error
    sides = sorted(image.size)
    if sides[1] > MAX_ASPECT * sides[0]:
        size = f"{image.width}x{image.height} px"
        raise ValueError(f"{what} is {size}; allowed: sides in a ratio of at most {MAX_ASPECT:g}")
    return image


def read_records(path: Path) -> list[Record]:
    """Records of a parquet file, of all ``*.parquet`` in a folder (by name), or of a ``.txt`` with a prompt a line.

    Raises UserError naming file and row (counted from 1) at the first thing that does not fit the schema.
    """
    records = []
    for row in read_rows(path):
        if isinstance(row.record, RecordError):
            raise row.record
        records.append(row.record)
    return records


def read_rows(path: Path) -> list[Row]:
    """As `read_records`, but a parquet row that does not fit the schema, or whose id is taken, stays with its reason.

    Raises UserError for what is no row: a file that cannot be read or lacks a column, an empty line of a .txt.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; allowed: parquet, a folder of it, or a .txt of prompts")
    files = parquet_files(path) if path.is_dir() else [path]
    rows: list[Row] = []
    first_seen: dict[str, str] = {}
    for file in files:
        found = _read_prompt_lines(file) if file.suffix == ".txt" else _read_parquet(file)
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
    """The ``*.parquet`` in a folder, by name. Raises UserError when there are none, or one is a folder."""
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise UserError(f"{folder}: no *.parquet in this folder")
    inner = next((file for file in files if file.is_dir()), None)
    if inner is not None:
        raise UserError(f"{inner}: is a folder; allowed in {folder.name}/ under such a name: parquet files")
    return files


def write_records(path: Path, records: list[Record], *, row_group_size: int | None = None) -> None:
    """Write records as one parquet file, replacing it as a whole. `row_group_size`: rows that are read together.

    Sizes of images held as bytes are noted beside them (SIZES), null where the header cannot be read.
    Raises UserError when a file would hold images both as bytes and as paths.
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
    """The columns of SIZES."""
    width, height = (None, None) if record.image is None else header_size(record.image)
    references = [side for data in record.references for side in header_size(data)]
    return {"width": width, "height": height, "reference_sizes": None if None in references else references}


def header_size(data: bytes | str) -> tuple[int, int] | tuple[None, None]:
    """(width, height) in pixels of the upright image, by the header; None for what lies elsewhere or is no image."""
    if isinstance(data, str):
        return None, None
    try:
        with Image.open(io.BytesIO(data)) as image:
            return (image.height, image.width) if _orientation(image) >= 5 else image.size
    except DECODE_ERRORS:
        return None, None


def _kind(path: Path, column: str, images: Sequence[bytes | str]) -> pa.DataType:
    paths = sum(isinstance(image, str) for image in images)
    if paths not in (0, len(images)):
        raise UserError(f"{path}: {column} holds {paths} paths among {len(images)} images; allowed: all bytes, or none")
    return pa.string() if paths else pa.binary()


def _schema(image: pa.DataType, reference: pa.DataType) -> pa.Schema:
    """SCHEMA with image and references of these types, binary or string."""
    types = {"image": image, "references": pa.list_(reference)}
    return pa.schema([(field.name, types.get(field.name, field.type)) for field in SCHEMA])


def unreadable(file: Path, error: Exception) -> UserError:
    """The one line for a file that is no parquet, or damaged."""
    return UserError(f"{file}: can't be read as parquet ({' '.join(str(error).split())[:200]})")


def conform(table: pa.Table, file: Path) -> pa.Table:
    """The columns of SCHEMA in their types, images as bytes or as text. Raises UserError naming file and column.

    An empty table says whether the files' columns can be read at all.
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
    """A column cast; text that is not UTF-8 passes, as it concerns its row alone. Raises ArrowException."""
    return column.cast(options=pc.CastOptions(target_type=wanted, allow_invalid_utf8=True))


def to_rows(table: pa.Table, file: Path) -> list[dict[str, Any]]:
    """Rows for `check_row`, which names text that is not UTF-8. Raises UserError as `conform` does."""
    return decoded_rows(conform(table, file), _decoded)


def decoded_rows(table: pa.Table, decode: Callable[[bytes], Any]) -> list[dict[str, Any]]:
    """Rows of a table, with `decode` for its text where some is not UTF-8: to_pylist gives all or nothing."""
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


def _read_prompt_lines(file: Path) -> list[Record]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        row = file.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(
            f"{file}, row {row}: not UTF-8 text ({error.reason}); allowed: a file saved as UTF-8"
        ) from error
    records = []
    # Not splitlines(): a form feed or a line separator inside a prompt begins no new one.
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        prompt = line.strip()
        if not prompt:
            raise UserError(f"{file}, row {number}: empty line; allowed: one prompt a line")
        task = "text" if quoted_words(prompt) else "t2i"
        records.append(Record(f"{file.stem}-{number}", task, prompt, prompt, None, (), file.name))
    return records


def _read_parquet(file: Path) -> list[Record | RecordError]:
    try:
        table = pq.read_table(file)
    except PARQUET_ERRORS as error:
        raise unreadable(file, error) from error
    found: list[Record | RecordError] = []
    for number, row in enumerate(to_rows(table, file), start=1):
        try:
            found.append(check_row(row, f"{file}, row {number}", file.parent))
        except RecordError as error:
            found.append(error)
    return found


def _no_text(value: Any) -> str:
    if value is NOT_UTF8:
        return "not UTF-8"
    return f"{'null' if value is None else type(value).__name__}; allowed: text"


def check_row(row: dict[str, Any], place: str, folder: Path) -> Record:
    """The record of a row of the schema; relative paths of images start from `folder`. Raises RecordError."""
    name = row["id"] if isinstance(row["id"], str) else ""

    def wrong(reason: str) -> RecordError:
        return RecordError(place, reason, name)

    for column in _TEXT_COLUMNS:
        if not isinstance(row[column], str):
            raise wrong(f"{column} is {_no_text(row[column])}")
    if row["task"] not in TASKS:
        raise wrong(f"task {row['task']!r}; allowed: {', '.join(TASKS)}")
    if not row["id"] or not row["prompt"].strip():
        raise wrong(f"{'id' if not row['id'] else 'prompt'} is empty")
    references = tuple(row["references"] or ())
    if (row["task"] == "edit") != bool(references):
        allowed = "at least 1" if row["task"] == "edit" else "none (only edit has them)"
        raise wrong(f"task {row['task']} with {len(references)} reference images; allowed: {allowed}")
    images = [*references, *([] if row["image"] is None else [row["image"]])]
    for image in images:
        if not isinstance(image, bytes | str):
            what = "null; allowed: encoded bytes, or a path or URI" if image is None else "a path that is not UTF-8"
            raise wrong(f"an image is {what}")
    if not all(images):
        raise wrong("an image of no bytes; allowed: an encoded image, or null for no target")

    def found(image: Any) -> Any:
        return absolute(image, folder) if isinstance(image, str) else image

    return Record(**(row | {"image": found(row["image"]), "references": tuple(found(image) for image in references)}))
