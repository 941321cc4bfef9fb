"""Reads rows of JSON lists, JSON lines, CSV, TSV and text files one by one, also gzipped ones.

No file is ever in memory as a whole, and reading can start again behind any row. A row is what the file gives: an
object, a line of text, or `Unreadable` if only this row is wrong.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from deepgen.errors import UserError

TABLES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
MAX_ROW = 96 << 20  # bytes of one row; with an image in base64, 72 MiB of it
MAX_VALUES = 100_000  # commas and brackets of one row: an empty list takes 2 bytes of a file, but 70 of memory
_CHUNK = 1 << 20
_DELIMITERS = (",", "\t", ";", "|")
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_SPACE = " \t\r\n"
_GZIP_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile)


@dataclass(frozen=True)
class Row:
    """A row, counted from 1 (lines in JSON lines and text), and the byte behind it once the file is unpacked."""

    number: int
    value: Any
    end: int


@dataclass(frozen=True)
class Unreadable:
    """In place of a row's value: why it cannot be read."""

    reason: str


def suffix_of(path: Path) -> str:
    """The suffix that tells what a file is, in lower case: .csv for a.CSV and a.csv.gz."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def read_table(file: Path, offset: int = 0, rows: int = 0) -> Iterator[Row]:
    """The rows of a table or text file, from byte `offset` on, behind `rows` rows.

    Raises UserError naming the file, and the row where it can, if the file as a whole cannot be read on.
    """
    try:
        with file.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            stream: Any = gzip.GzipFile(fileobj=raw) if packed else raw
            yield from _rows(stream, file, offset, rows)
    except _GZIP_ERRORS as error:
        raise UserError(f"{file}: damaged gzip ({' '.join(str(error).split())}); fetch it again") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error


def _rows(stream: BinaryIO, file: Path, offset: int, rows: int) -> Iterator[Row]:
    start = stream.read(4096)
    if start.startswith(_UTF16):
        raise UserError(f"{file}: UTF-16 text; allowed: a file saved as UTF-8")
    head = len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0
    kind = suffix_of(file)
    if kind in (".csv", ".tsv"):
        yield from _csv_rows(stream, file, head, offset, rows)
        return
    stream.seek(offset or head)
    if kind not in TABLES:
        yield from ((Row(n, _text(line), end)) for n, line, end in _lines(stream, offset or head, rows))
    elif start[head:].lstrip()[:1] == b"[":
        yield from _list_rows(stream, file, offset or head, rows, first=not offset)
    else:
        yield from _json_lines(stream, file, offset or head, rows)


# ---------------------------------------------------------------- lines


def _lines(stream: BinaryIO, at: int, number: int) -> Iterator[tuple[int, bytes | Unreadable, int]]:
    """Number, content and end of every line. A line of more than MAX_ROW bytes is passed over piece by piece."""
    while line := stream.readline(MAX_ROW + 1):
        number, at = number + 1, at + len(line)
        found: bytes | Unreadable = line
        if len(line) > MAX_ROW:
            found = _too_long()
            while line and not line.endswith(b"\n"):
                line = stream.readline(_CHUNK)
                at += len(line)
        yield number, found, at


def _too_long() -> Unreadable:
    return Unreadable(f"row of more than {MAX_ROW >> 20} MiB")


def _text(line: bytes | Unreadable) -> str | Unreadable:
    """A line as text. Bytes that are not UTF-8 become lone surrogates, which every check of texts refuses."""
    return line if isinstance(line, Unreadable) else line.decode("utf-8", "surrogateescape").strip()


def _json_lines(stream: BinaryIO, file: Path, at: int, rows: int) -> Iterator[Row]:
    found: Iterator[Row] = (
        Row(n, _json(text), end) for n, line, end in _lines(stream, at, rows) if (text := _text(line)) != ""
    )
    if suffix_of(file) == ".json" and not rows:
        found = _more_than_one(found, file)
    yield from found


def _more_than_one(rows: Iterator[Row], file: Path) -> Iterator[Row]:
    """The rows of a .json file that is no list. Raises UserError if it holds a single object, as annotations do."""
    hint = (
        "where lists and annotations share a folder, give the list's file as SOURCE; for pictures with captions beside "
        "them, --form folder"
    )
    first, second = next(rows, None), next(rows, None)
    if first is None or isinstance(first.value, Unreadable):
        raise UserError(f"{file}: neither a list nor one object a line; {hint}")
    if second is None:
        raise UserError(f"{file}: holds a {type(first.value).__name__}; expected a list; {hint}")
    yield from (first, second)
    yield from rows


def _json(text: str | Unreadable) -> Any:
    if isinstance(text, Unreadable):
        return text
    if _values(text) > MAX_VALUES:
        return Unreadable(f"row of more than {MAX_VALUES:,} values")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return Unreadable("not JSON")


def _values(text: str) -> int:
    return sum(text.count(mark) for mark in ",[{")


# ---------------------------------------------------------------- a JSON list


def _list_rows(stream: BinaryIO, file: Path, at: int, rows: int, *, first: bool) -> Iterator[Row]:
    """Elements of the JSON list that begins, or goes on, at byte `at`."""
    source = _Buffer(stream, file)
    if first:
        at += source.skip(_SPACE) + source.expect("[", 1)
    number = rows
    while True:
        at += source.skip(_SPACE)
        if source.peek() == "]":
            break
        if number:
            at += source.expect(",", number)
            at += source.skip(_SPACE)
        number += 1
        value, size = source.value(number)
        at += size
        yield Row(number, value, at)
    source.expect("]", number)
    source.skip(_SPACE)
    if source.peek():
        raise UserError(f"{file}: not JSON (more behind the list, after row {number:,})")


class _Buffer:
    """The text that is being parsed. Sizes are in bytes of the file."""

    def __init__(self, stream: BinaryIO, file: Path) -> None:
        self._stream, self._file = stream, file
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._parse = json.JSONDecoder().raw_decode
        self._text, self._at, self._ended = "", 0, False

    def _more(self, size: int = _CHUNK) -> bool:
        data = b"" if self._ended else self._stream.read(size)
        self._ended = not data
        self._text = self._text[self._at :] + self._decode(data, self._ended)
        self._at = 0
        return not self._ended

    def peek(self) -> str:
        """The next letter, "" at the end of the file."""
        while self._at >= len(self._text) and self._more():
            pass
        return self._text[self._at : self._at + 1]

    def skip(self, letters: str) -> int:
        count = 0
        while (letter := self.peek()) and letter in letters:
            self._at += 1
            count += 1
        return count

    def expect(self, letter: str, number: int) -> int:
        if self.peek() != letter:
            raise UserError(f"{self._file}: not JSON ({letter} expected at row {number:,}; is the file whole?)")
        self._at += 1
        return 1

    def value(self, number: int) -> tuple[Any, int]:
        """The next value and its size. Reads on, twice as much each time, until the value is whole."""
        while True:
            why = ""
            try:
                value, end = self._parse(self._text, self._at)
                # A number at the end of what has been read could go on.
                if end < len(self._text) or self._ended:
                    size = len(self._text[self._at : end].encode("utf-8", "surrogateescape"))
                    self._at = end
                    return value, size
            except json.JSONDecodeError as error:
                why = error.msg
                if not error.msg.startswith("Unterminated") and error.pos < len(self._text) - 16:
                    raise self._broken(number, why) from error
            except RecursionError as error:
                raise self._broken(number, "too deep") from error
            except ValueError as error:  # more digits than Python reads
                raise self._broken(number, "a number of thousands of digits") from error
            held = len(self._text) - self._at
            if held > MAX_ROW:
                raise UserError(f"{self._file}, row {number:,}: more than {MAX_ROW >> 20} MiB, or never closed")
            if held > 4 * _CHUNK and _values(self._text[self._at :]) > MAX_VALUES:
                raise UserError(f"{self._file}, row {number:,}: more than {MAX_VALUES:,} values, or never closed")
            if not self._more(max(_CHUNK, held)) and why:
                raise self._broken(number, f"{why}; is the file whole?")

    def _broken(self, number: int, why: str) -> UserError:
        return UserError(f"{self._file}: not JSON ({why} in row {number:,})")


# ---------------------------------------------------------------- CSV


class _CsvLines:
    """Lines of a CSV file as text, and the byte behind the last one. Raises csv.Error if a row has too many of them."""

    def __init__(self, stream: BinaryIO, at: int, delimiters: Sequence[str] = _DELIMITERS) -> None:
        self._stream, self.at, self._delimiters = stream, at, [one.encode() for one in delimiters]
        self.begin_row()

    def begin_row(self) -> None:
        self._begin, self._values = self.at, 0

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        line = self._stream.readline(MAX_ROW)
        if not line:
            raise StopIteration
        self.at += len(line)
        self._values += max(map(line.count, self._delimiters))
        if self.at - self._begin > MAX_ROW or self._values > MAX_VALUES:
            raise csv.Error(f"a row of more than {MAX_ROW >> 20} MiB or {MAX_VALUES:,} values")
        return line.decode("utf-8", "surrogateescape")


def _csv_rows(stream: BinaryIO, file: Path, head: int, offset: int, rows: int) -> Iterator[Row]:
    csv.field_size_limit(MAX_ROW)
    stream.seek(head)
    lines = _CsvLines(stream, head)
    try:
        first = next(lines, "")
        delimiter = "\t" if suffix_of(file) == ".tsv" else max(_DELIMITERS, key=first.count)
        names = [name.strip() for name in next(csv.reader([first], delimiter=delimiter, skipinitialspace=True), [])]
        if offset:
            stream.seek(offset)
        lines = _CsvLines(stream, offset or lines.at, [delimiter])
        number = rows
        for fields in csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=True):
            lines.begin_row()
            if not fields:
                continue
            number += 1
            value: Any = dict(zip(names, fields, strict=False))
            if len(fields) != len(names):
                value = Unreadable(f"row of {len(fields)} fields: the header has {len(names)}")
            yield Row(number, value, lines.at)
    except csv.Error as error:
        raise UserError(f"{file}: not CSV ({error} near byte {lines.at:,}); is a quote never closed?") from error
