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
from deepgen.data.records import Record, RecordError, first_reserved, is_unicode
from deepgen.data.uris import MAX_BYTES, read_uri
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

    def check_text(self, text: str) -> None:
        """Raise ValueError for a prompt, or a negative one, that the model would not read as it stands."""
        if not is_unicode(text):
            raise ValueError("it is no UTF-8 text")
        if len(text) > _LETTERS * self.tokens:  # for a text of gigabytes, the tokenizer takes hours
            raise ValueError(f"it has {len(text):,} letters; the model reads {self.tokens:,} tokens")
        if found := first_reserved(text, self.reserved):
            raise ValueError(f"it contains the reserved token {found}; remove it")
        count = len(self._tokenizer.encode(render(text)).ids)
        if count > self.tokens:
            raise ValueError(f"it is {count:,} tokens long; the model reads {self.tokens:,}")

    def check(self, record: Record) -> None:
        """Raise ValueError for a record that cannot be drawn."""
        if not record.prompt.strip():
            raise ValueError("the prompt is empty")
        try:
            self.check_text(record.prompt)
        except ValueError as error:
            raise ValueError(f"the prompt: {error}") from error
        for slot, data in enumerate(record.references, start=1):
            image = usable_image(data, f"source {slot}")
            height, width = fixed_area_size(image.height, image.width, self.image_size)
            if max(height, width) > self.max_side:
                raise ValueError(
                    f"source {slot} is {image.width}x{image.height} px, {width}x{height} once it is scaled; allowed: "
                    f"{self.max_side} px, for which the model has positions"
                )

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        file = self.folder / "tokenizer.json"
        if not file.is_file():
            raise UserError(f"--weights: {file} is not there; allowed: a tokenizer of the tokenizers library")
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_truncation()
        return tokenizer


@dataclass(frozen=True)
class BadPrompt:
    """A row that cannot be drawn, and why."""

    place: str
    reason: str


def read_wanted(
    given: str, images: Sequence[Path], reader: Reader, *, allow: Sequence[str] = (), limit: int | None = None
) -> tuple[list[Record], list[BadPrompt]]:
    """What `--prompts` and `--images` ask for, at most `limit` records. Their sources are bytes.

    given: a file or folder that `read_rows` reads, or the prompt itself. images: sources of all prompts.

    Raises UserError if the file cannot be read, or if the prompt given on the command line cannot be drawn.
    """
    require_regular(images)
    sources = tuple(map(_bytes_of, images))
    if not names_a_file(given):
        record = _record(given, sources)
        if fault := _fault(record, reader):
            raise UserError(f"--prompts: {fault}")
        return [_with_id(record)], []
    wanted, bad, places = list[Record](), list[BadPrompt](), dict[str, str]()
    for row in read_rows(Path(given), allow, each_line=True):
        if len(wanted) == limit:
            break
        place = f"{row.file}, row {row.number}"
        if isinstance(row.record, RecordError):
            bad.append(BadPrompt(place, row.record.reason))
            continue
        record, fault = _read(row.record, sources)
        fault = fault or _fault(record, reader)
        if not fault and not row.named:
            record = _with_id(record)
        if not fault and record.id in places:
            fault = f"the {'id' if row.named else 'prompt'} is that of {places[record.id]}"
        if fault:
            bad.append(BadPrompt(place, fault))
        else:
            wanted.append(record)
            places[record.id] = place
    return wanted, bad


def _bytes_of(image: Path) -> bytes:
    if (size := image.stat().st_size) > MAX_BYTES:
        raise UserError(f"--images: {image} has {size >> 20:,} MiB; allowed: {MAX_BYTES >> 20} MiB")
    return image.read_bytes()


def names_a_file(given: str) -> bool:
    """Whether `--prompts` gives a file or folder, and not a prompt. Raises UserError for a file that is not there."""
    if not given.strip() or not is_unicode(given):
        return False
    if exists(Path(given)):
        return True
    if suffix_of(Path(given)) not in _SUFFIXES:
        return False
    raise UserError(
        f"--prompts: there is no file {given[:200]!r}; a prompt that ends like a file's name can be given in a .txt"
    )


def _record(prompt: str, sources: tuple[bytes, ...]) -> Record:
    task = "edit" if sources else "text" if quoted_words(prompt) else "t2i"
    return Record("", task, prompt, prompt, None, sources, "command line")


def _read(record: Record, sources: tuple[bytes, ...]) -> tuple[Record, str]:
    """The record with its sources as bytes, or those of all prompts; and why they cannot be read.

    Without its target, which nobody needs who draws.
    """
    record = replace(record, image=None)
    if sources:
        return replace(record, task="edit", references=sources), ""
    try:
        read = tuple(one if isinstance(one, bytes) else read_uri(one) for one in record.references)
    except ValueError as error:
        return record, str(error)
    return replace(record, references=read), ""


def _with_id(record: Record) -> Record:
    """A record whose id is its words, and a digest of them and of its sources."""
    digest = hashlib.blake2b(f"{record.prompt}\0{sources_of(record)}".encode(), digest_size=4)
    words = re.sub(r"\W+", "-", record.prompt.lower())[:_WORDS].strip("-")
    return replace(record, id=f"{words}-{digest.hexdigest()}")


def sources_of(record: Record) -> str:
    """A digest of a record's sources, which are bytes; "" without any."""
    digest = hashlib.blake2b(digest_size=8)
    for source in record.references:
        assert isinstance(source, bytes)  # `_read` has read them
        digest.update(hashlib.blake2b(source).digest())
    return digest.hexdigest() if record.references else ""


def _fault(record: Record, reader: Reader) -> str:
    """Why a record cannot be drawn, or ""."""
    try:
        reader.check(record)
    except ValueError as error:
        return str(error)
    return ""
