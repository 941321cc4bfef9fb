"""Makes samples of rows (mappings): our records, columns named in any way, the JSON forms of M2.6, and prompts."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from deepgen.data.column_names import IMAGE_NAMES, TEXT_NAMES, edit_columns, first_of, normal_keys
from deepgen.data.conversion.readers.image_values import image_bytes, images_bytes
from deepgen.data.conversion.readers.raw_sample import IMAGE_SUFFIXES, RawData, RawSample
from deepgen.data.records import as_list, record_row
from deepgen.errors import UserError

JSON_BYTES = 4 << 20  # of one file of captions; as objects in memory, JSON takes up to 25 times as much
_SHOWN = 500  # letters of the names of columns in a message
_EDITS = {"input_image", "output_image", "instruction"}


def form_of(row: Any) -> str:
    """The form of a table by one of its rows, "" if unknown."""
    if isinstance(row, str):
        return "prompts"
    keys = normal_keys(row) if isinstance(row, Mapping) else {}
    has_text, has_image = not keys.keys().isdisjoint(TEXT_NAMES), any(keys.get(name) for name in IMAGE_NAMES)
    own = set(row) if isinstance(row, Mapping) else set()
    if {"task", "prompt"} <= own:
        return "records" if has_image else "prompts"
    if "annotation" in own:
        return "captions"
    if own >= _EDITS:
        return "edits"
    if "prompt" in (found := edit_columns(keys)) and keys[found["image"]]:
        return "pairs"
    if not has_image:
        return "prompts" if has_text and "output_image" not in keys else ""
    if "txt" in own and (row.get("image") or row.get("image_path")):
        return "blip3o"
    return "pairs" if has_text else ""


def columns_of(raw: RawData, names: Iterable[str], file: Path) -> dict[str, str]:
    """The columns that the forms `hf` and `pairs` read, by role. Raises UserError if one is not there or unknown.

    Columns of edits are found by their names only if neither the image nor the references are given.
    """
    names, given = list(names), raw.columns
    for name in given.values():
        if name not in names:
            raise UserError(f"{file}: no column {name!r}; it has: {listed(names)}")
    usual = {"image": first_of(IMAGE_NAMES, names), "prompt": first_of(TEXT_NAMES, names)}
    if given.keys().isdisjoint(("image", "references")):
        usual |= edit_columns(names)
    found = {role: name for role, name in (usual | dict(given)).items() if name}
    for role in ("image", "prompt"):
        if role not in found:
            hint = "; is its header missing?" if is_row(names) else ""
            raise UserError(
                f"{file}: which column is the {role}? It has: {listed(names)}; say --column {role}=NAME{hint}"
            )
    return found


def is_row(names: Iterable[Any]) -> bool:
    """Whether names of columns look like a row instead, as one is the name of a picture."""
    return any(str(name).lower().endswith(IMAGE_SUFFIXES) for name in names)


def listed(names: Iterable[Any]) -> str:
    """Names of columns for a message. In a table without a header they are the first row, however long that is."""
    text = ", ".join(map(str, names))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


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
        if "references" in columns:
            references, task = row.get(columns["references"]), "edit"
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


def first_caption(files: Iterable[tuple[Any, str]], key: str) -> Any:
    """The caption in the first of some files that has one. files: their contents, or why one is not read; suffixes."""
    text: Any = None
    for data, suffix in files:
        text = caption_text(data, suffix, key) if isinstance(data, bytes) else data
        if text:
            break
    return text


def caption_text(data: bytes, suffix: str, key: str) -> Any:
    """The caption in a file: its text, or a value of its JSON. Text that is not UTF-8 stays invalid."""
    if suffix != ".json":
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape").strip()
    content = json_or_none(data)
    return _text_in(content, key) if isinstance(content, Mapping) else content


def _text_in(content: Mapping[str, Any], key: str) -> Any:
    """The caption in a JSON object: under the key, or else under a usual name; None if there is none."""
    named = normal_keys(content)
    return next((named[name] for name in (key, *TEXT_NAMES) if named.get(name)), None)
