"""Makes samples of rows (mappings): our records, columns named in any way, the JSON forms of M2.6, and prompts."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from deepgen.data.conversion.readers.image_values import image_bytes, images_bytes
from deepgen.data.conversion.readers.raw_sample import RawData, RawSample
from deepgen.data.records import as_list, record_row
from deepgen.errors import UserError

# Usual names of columns, the most telling first.
IMAGE_NAMES = (
    *("image", "jpg", "png", "webp", "image_path", "file_name", "filename", "img", "path", "file"),
    *("image_url", "url"),
)
TEXT_NAMES = ("caption", "text", "prompt", "txt", "instruction", "description")  # of the caption of a picture
JSON_BYTES = 4 << 20  # of one file of captions; as objects in memory, JSON takes up to 25 times as much
_SHOWN = 500  # letters of the names of columns in a message
# Keys that tell the form of a row, beside those of our records.
_KEYS = {"annotation": "captions", "txt": "blip3o", "input_image": "edits"}


def form_of(row: Any) -> str:
    """The form of a table by one of its rows, "" if unknown."""
    if isinstance(row, str):
        return "prompts"
    keys = set(row) if isinstance(row, Mapping) else set()
    has_image = any(row[key] for key in keys & set(IMAGE_NAMES))
    if {"task", "prompt"} <= keys:
        return "records" if has_image else "prompts"
    if not has_image and not keys & {"annotation", "output_image"}:
        return "prompts" if keys & set(TEXT_NAMES) else ""
    told = next((form for key, form in _KEYS.items() if key in keys), "")
    return told or ("pairs" if keys & set(TEXT_NAMES) else "")


def columns_of(raw: RawData, names: Iterable[str], file: Path) -> dict[str, str]:
    """The columns that the forms `hf` and `pairs` read, by role. Raises UserError if one is not there or unknown."""
    names = list(names)
    found = {"image": _column(raw, "image", IMAGE_NAMES, names, file)}
    found["prompt"] = _column(raw, "prompt", TEXT_NAMES, names, file)
    if references := raw.columns.get("references"):
        if references not in names:
            raise UserError(f"{file}: no column {references!r}; it has: {listed(names)}")
        found["references"] = references
    return found


def listed(names: Iterable[Any]) -> str:
    """Names of columns for a message. In a table without a header they are the first row, however long that is."""
    text = ", ".join(map(str, names))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _column(raw: RawData, role: str, usual: tuple[str, ...], names: list[str], file: Path) -> str:
    given = raw.columns.get(role)
    found = given if given in names else next((n for n in usual if n in names), None) if given is None else None
    if found is None:
        raise UserError(f"{file}: which column is the {role}? It has: {listed(names)}; say --column {role}=NAME")
    return found


def sample_of(row: Any, raw: RawData, file: Path, name: str, place: str, columns: Mapping[str, str]) -> RawSample:
    """The sample in a row of `file`, by the form of the data. `columns`: `columns_of`, for the forms that have them."""
    if raw.form == "prompts":
        return _prompt(row, raw, file, name, place)
    row = row if isinstance(row, Mapping) else {}
    if raw.form == "records":
        return _record(row, raw, file, name, place)
    references: Any = []
    task = raw.task
    if raw.form == "edits":
        text, image, references, task = row.get("instruction"), row.get("output_image"), row.get("input_image"), "edit"
    elif raw.form == "blip3o":
        text, image = row.get("txt"), row.get("image") or row.get("image_path")
    elif raw.form == "captions":
        text, image = _annotation(row.get("annotation"), raw, file), row.get("image")
    else:
        text, image = row.get(columns["prompt"]), row.get(columns["image"])
        references = row.get(columns["references"]) if "references" in columns else []
    target = image_bytes(image, raw, file)
    return RawSample(name, task, text, text, target, images_bytes(as_list(references), raw, file), place, raw.name)


def _record(row: Mapping[str, Any], raw: RawData, file: Path, name: str, place: str) -> RawSample:
    references = images_bytes(as_list(row.get("references")), raw, file)
    image = image_bytes(row.get("image"), raw, file)
    own = str(row.get("source") or raw.name)
    id = name if row.get("id") in (None, "") else str(row["id"])
    return RawSample(id, str(row.get("task")), row.get("prompt"), row.get("answer"), image, references, place, own)


def _prompt(row: Any, raw: RawData, file: Path, name: str, place: str) -> RawSample:
    row = record_row(row, name, raw.name, raw.columns.get("prompt", ""))
    references = images_bytes(row["references"], raw, file)
    task, texts = raw.task or row["task"], (row["prompt"], row["answer"])
    return RawSample(str(row["id"]), task, *texts, None, references, place, str(row["source"]), is_prompt=True)


def _annotation(name: Any, raw: RawData, file: Path) -> Any:
    """The caption in an annotation file, None if there is none, or why the file cannot be read."""
    data = image_bytes(name, raw, file, JSON_BYTES)
    if not isinstance(data, bytes):
        return data
    content = json_or_none(data)
    return content.get(raw.caption_key) if isinstance(content, Mapping) else None


def json_or_none(data: bytes) -> Any:
    """The content of a small JSON file, None if it is none."""
    try:
        return json.loads(data) if len(data) <= JSON_BYTES else None
    except (ValueError, RecursionError):
        return None


def caption_text(data: bytes, suffix: str, key: str) -> Any:
    """The caption in a file: its text, or a value of its JSON. Text that is not UTF-8 stays invalid."""
    if suffix != ".json":
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape").strip()
    content = json_or_none(data)
    keys = (key, *TEXT_NAMES) if isinstance(content, Mapping) else ()
    return next((content[k] for k in keys if k in content), None)
