"""The `Record` that every stage uses, the rules that turn a row into one, and prompt lists.

A record is one training pair or one prompt. It holds its images as encoded bytes, or as paths and URIs that ``images``
reads when it opens them. ``parquet`` reads and writes files of records.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from deepgen.config.settings import TASKS
from deepgen.data.column_names import PROMPT_NAMES, normal_keys, source_column
from deepgen.data.quotes import quoted_words
from deepgen.data.uris import absolute
from deepgen.errors import UserError
from deepgen.masking import masked
from deepgen.reading.reach import Reach
from deepgen.reading.tables import TABLES, Unreadable, read_table, suffix_of

_TEXT_COLUMNS = ("id", "task", "prompt", "answer", "source")
NOT_UTF8 = object()  # replaces a row's text that is not UTF-8


@dataclass(frozen=True)
class Record:
    """One pair of prompt and target image, or a prompt alone (``image`` None)."""

    id: str  # unique in its file
    task: str  # one of TASKS
    prompt: str  # caption, riddle or edit instruction, as the user types it
    answer: str  # plain description of what the target shows; judges compare against it
    image: bytes | str | None  # target image: encoded bytes (`images.FORMATS`), or its path or URI (`uris.DataUri`)
    references: tuple[bytes | str, ...]  # source images in the same form, () unless task == "edit"
    source: str  # name of the data set the record came from; data.weights weights these


class RecordError(UserError):
    """One unusable row. ``reason`` is the message without the place; ``id`` is "" if the row has none."""

    def __init__(self, place: str, reason: str, id: str = "") -> None:
        super().__init__(f"{place}: {reason}")
        self.place, self.reason, self.id = place, masked(reason), id

    def __reduce__(self) -> tuple[Any, ...]:
        # Ray pickles errors between processes. By default pickle would call __init__ with the message alone.
        return type(self), (self.place, self.reason, self.id)


def check_texts(record: Record, reserved: Sequence[str]) -> None:
    """Raise ValueError if prompt or answer contains a reserved text, which a model would read as structure.

    A policy could be told there that its instructions end, and a judge that its verdict has been given.
    """
    for what, text in (("prompt", record.prompt), ("answer", record.answer)):
        if found := first_reserved(text, reserved):
            raise ValueError(f"{what} contains the reserved token {found}; remove it")


def first_reserved(text: str, reserved: Sequence[str]) -> str:
    """The first reserved text in a text, or ""."""
    return next((token for token in reserved if token in text), "")


def check_row(row: dict[str, Any], place: str, folder: Path, reach: Reach) -> Record:
    """The record in a row of the schema; relative image paths start at `folder`. Raises RecordError if unusable.

    reach: what its images may be read from.
    """
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
            what = "a path that is not UTF-8" if image is NOT_UTF8 else _no_text(image)
            raise wrong(f"an image is {what.replace('text', 'encoded bytes, or a path or URI')}")
    if not all(images):
        raise wrong("an image of no bytes; allowed: an encoded image, or null for no target")

    def found(image: Any) -> Any:
        return absolute(image, folder, reach) if isinstance(image, str) else image

    return Record(**(row | {"image": found(row["image"]), "references": tuple(found(image) for image in references)}))


def record_row(value: Any, name: str, source: str, prompt: str = "") -> dict[str, Any]:
    """A row for `check_row` from a row of JSON or CSV, which may be a prompt alone.

    What is absent gets its usual value.

    name, source: the id and the source of a row without. prompt: the key of the prompt; "" for the usual ones.
    """
    row = {"prompt": value} if isinstance(value, str) else normal_keys(value) if isinstance(value, Mapping) else {}
    text = next((row[key] for key in ([prompt] if prompt else PROMPT_NAMES) if row.get(key)), "")
    references = as_list(row.get("references") or row.get(source_column(row) or ""))
    references = references if isinstance(references, list) else [references] if references else []
    usual = "edit" if references else "text" if isinstance(text, str) and quoted_words(text) else "t2i"
    return {
        "id": name if row.get("id") in (None, "") else str(row["id"]),
        "task": row.get("task") or usual,
        "prompt": text,
        "answer": row.get("answer") or text,
        "image": row.get("image") or None,
        "references": references,
        "source": row.get("source") or source,
    }


def as_list(value: Any) -> Any:
    """A list that a CSV file gives as JSON text; any other value unchanged."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return found if isinstance(found, list) else value
    return value


def _no_text(value: Any) -> str:
    if value is NOT_UTF8:
        return "not UTF-8"
    return f"{'null' if value is None else type(value).__name__}; allowed: text"


class Listed(NamedTuple):
    """A row of a prompt list, counted from 1: its record, or why it has none, and whether its id was given."""

    number: int
    record: Record | RecordError
    named: bool


def read_prompts(file: Path, reach: Reach, *, each_line: bool) -> list[Listed]:
    """Records of a prompt list: text with one prompt a line, JSON lines, a JSON list, CSV or TSV, gzipped or not.

    A row of JSON or CSV is a prompt, or has the columns of a record, of which only `prompt` is needed; one of them that
    cannot be used gives a RecordError. A line of text gets the task text if it has words to draw in quotes, otherwise
    t2i. reach: what their images may be read from. each_line: a line of text that is no prompt is a RecordError, too.

    Raises UserError, unless `each_line`, naming the first line of text that is empty or not UTF-8.
    """
    found: list[Listed] = []
    stem = Path(file.name.removesuffix(".gz")).stem
    for row in read_table(file):
        place, name = f"{file}, row {row.number}", f"{stem}-{row.number}"
        try:
            record = _listed_record(row.value, place, name, file, reach)
        except RecordError as error:
            if suffix_of(file) not in TABLES and not each_line:
                raise UserError(f"{place}: {error.reason}") from error
            found.append(Listed(row.number, error, named=False))
            continue
        named = isinstance(row.value, Mapping) and normal_keys(row.value).get("id") not in (None, "")
        found.append(Listed(row.number, record, named))
    return found


def _listed_record(value: Any, place: str, name: str, file: Path, reach: Reach) -> Record:
    if isinstance(value, Unreadable):
        raise RecordError(place, value.reason)
    if value == "":
        raise RecordError(place, "empty line; allowed: one prompt a line")
    row = record_row(value, name, file.name)
    for column, text in row.items():
        if isinstance(text, str) and not is_unicode(text):
            raise RecordError(place, f"not UTF-8 text in {column}; allowed: a file saved as UTF-8", name)
    return check_row(row, place, file.parent, reach)


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can encode the text. Lone surrogates, for example from damaged JSON, cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
