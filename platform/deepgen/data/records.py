"""The `Record` that every stage uses, the rules that turn a row into one, and prompt lists as plain text.

A record is one training pair or one prompt. It holds its images as encoded bytes, or as paths and URIs that ``images``
reads when it opens them. ``parquet`` reads and writes files of records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepgen.config.settings import TASKS
from deepgen.data.quotes import quoted_words
from deepgen.data.uris import absolute
from deepgen.errors import UserError
from deepgen.masking import masked
from deepgen.reading.reach import Reach

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
            what = "null; allowed: encoded bytes, or a path or URI" if image is None else "a path that is not UTF-8"
            raise wrong(f"an image is {what}")
    if not all(images):
        raise wrong("an image of no bytes; allowed: an encoded image, or null for no target")

    def found(image: Any) -> Any:
        return absolute(image, folder, reach) if isinstance(image, str) else image

    return Record(**(row | {"image": found(row["image"]), "references": tuple(found(image) for image in references)}))


def _no_text(value: Any) -> str:
    if value is NOT_UTF8:
        return "not UTF-8"
    return f"{'null' if value is None else type(value).__name__}; allowed: text"


def read_prompt_lines(file: Path) -> list[Record]:
    """One record per line of a text file: task text if the line has words to draw in quotes, otherwise t2i.

    Raises UserError naming the first row that is empty or not UTF-8.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        row = file.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(
            f"{file}, row {row}: not UTF-8 text ({error.reason}); allowed: a file saved as UTF-8"
        ) from error
    records = []
    # Not splitlines(), which would also split a prompt at a form feed or a Unicode line separator.
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        prompt = line.strip()
        if not prompt:
            raise UserError(f"{file}, row {number}: empty line; allowed: one prompt a line")
        task = "text" if quoted_words(prompt) else "t2i"
        records.append(Record(f"{file.stem}-{number}", task, prompt, prompt, None, (), file.name))
    return records
