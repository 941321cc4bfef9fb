"""How large the parts of parquet and Arrow files are once they are unpacked, from their headers.

Arrow unpacks a page of parquet, or a batch of Arrow, as a whole. It may be 2 GiB or more, however small the file is.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

_DICTIONARY = 2  # type of a page that holds the values to which the others refer
_TYPE, _UNPACKED, _PACKED = 1, 2, 3  # fields of a page header


@dataclass(frozen=True)
class Page:
    """Bytes of a page once it is unpacked, and whether it is a dictionary."""

    size: int
    is_dictionary: bool


def pages_of(data: memoryview, column: pq.ColumnChunkMetaData) -> Iterator[Page]:
    """The pages of a column chunk in a file's bytes. Raises ValueError or IndexError if its headers are damaged."""
    at = column.data_page_offset
    if column.dictionary_page_offset:
        at = min(at, column.dictionary_page_offset)
    end = at + column.total_compressed_size
    while at < end:
        fields, at = _struct(data, at)
        if not 0 <= fields.get(_PACKED, -1) <= end - at or fields.get(_UNPACKED, -1) < 0:
            raise ValueError(f"no page header at byte {at:,}")
        yield Page(fields[_UNPACKED], fields.get(_TYPE) == _DICTIONARY)
        at += fields[_PACKED]


# ---------------------------------------------------------------- Thrift's compact protocol


def _struct(data: memoryview, at: int) -> tuple[dict[int, int], int]:
    """The whole numbers of a struct by field, and the byte behind it."""
    number, found = 0, dict[int, int]()
    while kind := data[at]:
        at += 1
        if kind >> 4:
            number += kind >> 4
        else:
            number, at = _integer(data, at)
        if 4 <= kind & 15 <= 6:
            found[number], at = _integer(data, at)
        else:
            at = _behind(data, at, kind & 15)
    return found, at + 1


def _behind(data: memoryview, at: int, kind: int) -> int:
    """The byte behind a value that does not matter."""
    if kind in (1, 2):  # true, false: the kind is the value
        return at
    if kind == 3:
        return at + 1
    if 4 <= kind <= 6:
        return _integer(data, at)[1]
    if kind == 7:
        return at + 8
    if kind == 8:
        length, at = _unsigned(data, at)
        return at + length
    if kind == 12:
        return _struct(data, at)[1]
    raise ValueError(f"no page header at byte {at:,}")  # lists, sets and maps are in none


def _integer(data: memoryview, at: int) -> tuple[int, int]:
    value, at = _unsigned(data, at)
    return (value >> 1) ^ -(value & 1), at


def _unsigned(data: memoryview, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError(f"no page header at byte {at:,}")


# ---------------------------------------------------------------- Arrow's messages, which are FlatBuffers


def batch_size(message: pa.Message) -> int:
    """Bytes that the buffers of a message take if they are unpacked; 0 if they are not compressed.

    Raises struct.error if the message is damaged.
    """
    if message.body is None:
        return 0
    data = memoryview(message.metadata)
    batch = _table_at(data, _field(data, _table_at(data, 0), 2))
    if message.type == "dictionary":
        batch = _table_at(data, _field(data, batch, 1))
    buffers = _field(data, batch, 2)
    if not buffers or not _field(data, batch, 3):
        return 0
    vector = _table_at(data, buffers)
    body, total = memoryview(message.body), 0
    for number in range(struct.unpack_from("<I", data, vector)[0]):
        start, length = struct.unpack_from("<qq", data, vector + 4 + 16 * number)
        if length >= 8:
            total += max(length, *struct.unpack_from("<q", body, start))
    return total


def _table_at(data: memoryview, at: int) -> int:
    """Where the table or vector begins whose offset is at a byte."""
    return at + int(struct.unpack_from("<I", data, at)[0])


def _field(data: memoryview, table: int, number: int) -> int:
    """Where a field of a table begins; 0 if it is absent."""
    fields = table - struct.unpack_from("<i", data, table)[0]
    if 4 + 2 * number >= struct.unpack_from("<H", data, fields)[0]:
        return 0
    offset = struct.unpack_from("<H", data, fields + 4 + 2 * number)[0]
    return table + offset if offset else 0
