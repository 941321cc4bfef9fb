"""The record schema of every stage, and its files: parquet in and out, and prompt lists as plain text.

One record is one training pair or one prompt. Files are read whole and checked row by row before anything starts; an
error names file and row. Left out on purpose: resizing and tensors (``deepgen.data.dataset``).
"""

from __future__ import annotations

import io
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from deepgen.config.errors import UserError
from deepgen.config.settings import TASKS

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
_TEXT_COLUMNS = ("id", "task", "prompt", "answer", "source")
MAX_ASPECT = 8.0  # longer by shorter side of an image that can be trained on
_QUOTED = re.compile(r'"([^"]+)"')


@dataclass(frozen=True)
class Record:
    """One pair of prompt and target image, or a prompt alone (``image`` None)."""

    id: str  # unique in its file
    task: str  # one of TASKS
    prompt: str  # caption, riddle or edit instruction, as the user types it
    answer: str  # plain description of what the target shows; judges compare against it
    image: bytes | None  # encoded target image (PNG, WebP, JPEG)
    references: tuple[bytes, ...]  # encoded source images, () unless task == "edit"
    source: str  # where it came from


def quoted_words(prompt: str) -> list[str]:
    """Segments between straight double quotes: the words a text-rendering prompt asks for."""
    return _QUOTED.findall(prompt)


def decode_image(data: bytes) -> np.ndarray:
    """Encoded image -> uint8 [H, W, 3] RGB; transparent parts become white. Raises ValueError if it can't be read."""
    return np.array(open_image(data), dtype=np.uint8)


def open_image(data: bytes) -> Image.Image:
    """Encoded image -> decoded RGB image; as `decode_image`."""
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"not a readable image ({error})") from error
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba)
    return image if image.mode == "RGB" else image.convert("RGB")


def read_records(path: Path) -> list[Record]:
    """Records of a parquet file, of all ``*.parquet`` in a folder (by name), or of a ``.txt`` with a prompt a line.

    Raises UserError naming file and row (counted from 1) at the first thing that does not fit the schema.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; allowed: parquet, a folder of it, or a .txt of prompts")
    if path.is_dir():
        files = sorted(path.glob("*.parquet"))
        if not files:
            raise UserError(f"{path}: no *.parquet in this folder")
    else:
        files = [path]
    records: list[Record] = []
    first_seen: dict[str, str] = {}
    for file in files:
        rows = _read_prompt_lines(file) if file.suffix == ".txt" else _read_parquet(file)
        for number, record in enumerate(rows, start=1):
            place = f"{file}, row {number}"
            if record.id in first_seen:
                raise UserError(f"{place}: id {record.id!r} was already used in {first_seen[record.id]}")
            first_seen[record.id] = place
            records.append(record)
    if not records:
        raise UserError(f"{path}: holds no records")
    return records


def write_records(path: Path, records: list[Record], *, row_group_size: int | None = None) -> None:
    """Write records as one parquet file, replacing it as a whole. `row_group_size`: rows that are read together."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [asdict(record) | {"references": list(record.references)} for record in records]
    temporary = path.with_name(path.name + ".tmp")
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    pq.write_table(table, temporary, compression="zstd", row_group_size=row_group_size)
    temporary.replace(path)


def _read_prompt_lines(file: Path) -> list[Record]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    records = []
    for number, line in enumerate(lines, start=1):
        prompt = line.strip()
        if not prompt:
            raise UserError(f"{file}, row {number}: empty line; allowed: one prompt a line")
        task = "text" if quoted_words(prompt) else "t2i"
        records.append(Record(f"{file.stem}-{number}", task, prompt, prompt, None, (), file.name))
    return records


def _read_parquet(file: Path) -> list[Record]:
    try:
        table = pq.read_table(file)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: can't be read as parquet ({' '.join(str(error).split())[:200]})") from error
    missing = [name for name in SCHEMA.names if name not in table.column_names]
    if missing:
        raise UserError(f"{file}: missing column {', '.join(missing)}; allowed: {', '.join(SCHEMA.names)}")
    try:
        table = table.select(SCHEMA.names).cast(SCHEMA)
    except pa.ArrowException as error:
        raise UserError(f"{file}: a column has the wrong type ({' '.join(str(error).split())[:200]})") from error
    return [check_row(row, f"{file}, row {number}") for number, row in enumerate(table.to_pylist(), start=1)]


def check_row(row: dict[str, Any], place: str) -> Record:
    """The record of a row of the schema. Raises UserError that begins with `place`."""
    for name in _TEXT_COLUMNS:
        if row[name] is None:
            raise UserError(f"{place}: {name} is null; allowed: text")
    if row["task"] not in TASKS:
        raise UserError(f"{place}: task {row['task']!r}; allowed: {', '.join(TASKS)}")
    if not row["id"] or not row["prompt"].strip():
        raise UserError(f"{place}: {'id' if not row['id'] else 'prompt'} is empty")
    references = tuple(row["references"] or ())
    if (row["task"] == "edit") != bool(references):
        allowed = "at least 1" if row["task"] == "edit" else "none (only edit has them)"
        raise UserError(f"{place}: task {row['task']} with {len(references)} reference images; allowed: {allowed}")
    if any(not reference for reference in references) or row["image"] == b"":
        raise UserError(f"{place}: an image of no bytes; allowed: an encoded image, or null for no target")
    return Record(**(row | {"references": references}))
