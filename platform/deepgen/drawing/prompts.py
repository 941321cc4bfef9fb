"""Reads what is to be drawn: one prompt, a list of prompts, or records; each with its sources.

A bad row is told and left out. The noise of a picture depends on the id of its record: an id that the data gives stays,
so whoever draws the held-out prompts of a run with its seed draws the run's pictures. A prompt without an id gets one
from its words and sources, so it is drawn alike wherever it stands.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from deepgen.config.schema.paths import exists
from deepgen.data.images import usable_image
from deepgen.data.loading.buckets import fixed_area_size
from deepgen.data.parquet import PROMPT_LISTS, read_rows, require_regular
from deepgen.data.quotes import quoted_words
from deepgen.data.records import Record, RecordError, check_texts
from deepgen.data.usable import special_tokens
from deepgen.errors import UserError
from deepgen.models.chat_template import render
from deepgen.reading.tables import suffix_of

_SUFFIXES = (".parquet", *PROMPT_LISTS)
_LETTERS = 100  # of the longest token
_WORDS = 40  # letters of a prompt in its id, which is also the file's name


@dataclass(frozen=True)
class Reader:
    """What a model takes: prompts of at most `tokens` of the tokenizer in `folder`, without its special tokens.

    Sources have sides of at most `max_side` pixels once they are scaled.
    """

    folder: Path
    tokens: int
    max_side: int
    image_size: int  # as of the request

    @cached_property
    def reserved(self) -> list[str]:
        return special_tokens(self.folder)

    def check(self, record: Record) -> None:
        """Raise ValueError for a prompt that it would not read as it stands."""
        if not record.prompt.strip():
            raise ValueError("the prompt is empty")
        if len(record.prompt) > _LETTERS * self.tokens:  # for a text of gigabytes, the tokenizer takes hours
            raise ValueError(f"the prompt has {len(record.prompt):,} letters; the model reads {self.tokens:,} tokens")
        check_texts(record, self.reserved)
        for slot, data in enumerate(record.references, start=1):
            image = usable_image(data, f"source {slot}")
            height, width = fixed_area_size(image.height, image.width, self.image_size)
            if max(height, width) > self.max_side:
                raise ValueError(
                    f"source {slot} is {image.width}x{image.height} px, {width}x{height} once it is scaled; allowed: "
                    f"{self.max_side} px, for which the model has positions"
                )
        count = len(self._tokenizer.encode(render(record.prompt)).ids)
        if count > self.tokens:
            raise ValueError(f"the prompt is {count:,} tokens long; the model reads {self.tokens:,}")

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        tokenizer.no_truncation()
        return tokenizer


@dataclass(frozen=True)
class BadPrompt:
    """A row that cannot be drawn, and why."""

    place: str
    reason: str


def read_wanted(
    given: str, images: Sequence[Path], allow: Sequence[str], reader: Reader
) -> tuple[list[Record], list[BadPrompt]]:
    """What `--prompts` and `--images` ask for.

    given: a file or folder that `read_rows` reads, or the prompt itself. images: sources of all prompts.

    Raises UserError if the file cannot be read, or if the prompt given on the command line cannot be drawn.
    """
    require_regular(images)
    sources = tuple(image.read_bytes() for image in images)
    if not given.strip() or not (suffix_of(Path(given)) in _SUFFIXES or exists(Path(given))):
        record = _record(given, sources)
        if fault := _fault(record, reader):
            raise UserError(f"--prompts: {fault}")
        return [record], []
    wanted, bad, places = list[Record](), list[BadPrompt](), dict[str, str]()
    for row in read_rows(Path(given), allow):
        place = f"{row.file}, row {row.number}"
        if isinstance(row.record, RecordError):
            bad.append(BadPrompt(place, row.record.reason))
            continue
        record = _with_sources(row.record, sources)
        if record.id == f"{Path(row.file).name.partition('.')[0]}-{row.number}":
            record = replace(record, id=_own_id(record))  # a list's row without an id
        fault = _fault(record, reader)
        if not fault and record.id in places:
            fault = f"the id or the prompt is that of {places[record.id]}"
        if fault:
            bad.append(BadPrompt(place, fault))
        else:
            wanted.append(record)
            places[record.id] = place
    return wanted, bad


def _record(prompt: str, sources: tuple[bytes, ...]) -> Record:
    task = "edit" if sources else "text" if quoted_words(prompt) else "t2i"
    record = Record("", task, prompt, prompt, None, sources, "command line")
    return replace(record, id=_own_id(record))


def _with_sources(record: Record, sources: tuple[bytes, ...]) -> Record:
    return replace(record, task="edit", references=sources) if sources else record


def _own_id(record: Record) -> str:
    digest = hashlib.blake2b(record.prompt.encode("utf-8", "surrogatepass"), digest_size=4)
    for source in record.references:
        digest.update(source if isinstance(source, bytes) else Path(source).name.encode("utf-8", "surrogateescape"))
    words = re.sub(r"\W+", "-", record.prompt.lower())[:_WORDS].strip("-")
    return f"{words}-{digest.hexdigest()}"


def _fault(record: Record, reader: Reader) -> str:
    """Why a record cannot be drawn, or ""."""
    try:
        reader.check(record)
    except ValueError as error:
        return str(error)
    return ""
