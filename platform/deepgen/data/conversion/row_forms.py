"""Makes samples of rows (mappings): our records, columns of Hugging Face data sets, and the JSON forms of M2.6."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepgen.data.conversion.image_values import image_bytes, record_image, unpacked
from deepgen.data.conversion.raw_sample import RawData, RawSample, stem_of
from deepgen.errors import UserError

HF_IMAGE, HF_TEXT = ("image", "jpg", "png", "webp"), ("caption", "text", "prompt", "txt", "instruction")


def records_row(row: dict[str, Any], name: str, place: str, raw: RawData) -> RawSample:
    folder = Path(place.rpartition(", row ")[0]).parent
    given = row.get("references")
    values = given if isinstance(given, list) else [] if given is None else [given]
    references = tuple(record_image(value, folder) for value in values)
    image = record_image(row.get("image"), folder)
    own = str(row.get("source") or raw.name)
    id = name if row.get("id") in (None, "") else str(row["id"])
    return RawSample(id, str(row.get("task")), row.get("prompt"), row.get("answer"), image, references, place, own)


def hf_picker(raw: RawData, names: list[str], file: Path) -> Any:
    """A function that makes a sample from a row, using the columns found in `names`."""
    image = _column(raw, "image", HF_IMAGE, names, file)
    prompt = _column(raw, "prompt", HF_TEXT, names, file)
    reference_column = raw.columns.get("references")
    if reference_column and reference_column not in names:
        raise UserError(f"{file}: no column {reference_column!r}; it has: {', '.join(names)}")

    def pick(row: dict[str, Any], name: str, place: str, raw: RawData) -> RawSample:
        values = row[reference_column] if reference_column else []
        references = tuple(
            image_bytes(unpacked(v), file.parent) for v in (values if isinstance(values, list) else [values])
        )
        text, target = row[prompt], image_bytes(unpacked(row[image]), file.parent)
        return RawSample(name, raw.task, text, text, target, references, place, raw.name)

    return pick


def _column(raw: RawData, role: str, usual: tuple[str, ...], names: list[str], file: Path) -> str:
    given = raw.columns.get(role)
    found = given if given in names else next((n for n in usual if n in names), None) if given is None else None
    if found is None:
        raise UserError(f"{file}: which column is the {role}? It has: {', '.join(names)}; say --column {role}=NAME")
    return found


def entry_row(raw: RawData, file: Path, row: int, entry: Any) -> RawSample:
    """One row of the JSON forms (M2.6)."""
    place, name = f"{file}, row {row}", f"{stem_of(raw, file)}-{row}"
    root = raw.images or (raw.path if raw.path.is_dir() else raw.path.parent)
    entry = entry if isinstance(entry, Mapping) else {}
    if raw.form == "edits":
        given = entry.get("input_image") or []
        references = tuple(image_bytes(v, root) for v in (given if isinstance(given, list) else [given]))
        text, image = entry.get("instruction"), entry.get("output_image")
        return RawSample(name, "edit", text, text, image_bytes(image, root), references, place, raw.name)
    if raw.form == "blip3o":
        text, image = entry.get("txt"), entry.get("image") or entry.get("image_path")
    else:
        text, image = _annotation(root, entry.get("annotation"), raw.caption_key), entry.get("image")
    return RawSample(name, raw.task, text, text, image_bytes(image, root), (), place, raw.name)


def _annotation(root: Path, name: Any, key: str) -> Any:
    """The caption in an annotation file; None if the file or the caption is missing."""
    data = image_bytes(name, root)
    content = json_or_none(data) if isinstance(data, bytes) else None
    return content.get(key) if isinstance(content, Mapping) else None


def json_or_none(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None
