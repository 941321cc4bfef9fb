"""How large the parts of parquet and Arrow files are once they are unpacked, from their headers.

Arrow unpacks a page of parquet, or a batch of Arrow, as a whole. It may be 2 GiB or more, however small the file is.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from deepgen.data.conversion.readers.parquet_footer import Chunk
from deepgen.data.conversion.readers.thrift import read_struct

_DICTIONARY = 2  # type of a page that holds the values to which the others refer
_TYPE, _UNPACKED, _PACKED = 1, 2, 3  # fields of a page header


@dataclass(frozen=True)
class Page:
    """Bytes of a page once it is unpacked, and whether it is a dictionary."""

    size: int
    is_dictionary: bool


def pages_of(data: memoryview, chunk: Chunk) -> Iterator[Page]:
    """The pages of a column chunk in a file's bytes. Raises ValueError or IndexError if its headers are damaged."""
    at, end = chunk.start, chunk.start + chunk.size
    while at < end:
        fields, at = read_struct(data, at)
        unpacked, packed = fields.get(_UNPACKED), fields.get(_PACKED)
        if not isinstance(unpacked, int) or not isinstance(packed, int) or unpacked < 0 or not 0 <= packed <= end - at:
            raise ValueError(f"no page header at byte {at:,}")
        yield Page(unpacked, fields.get(_TYPE) == _DICTIONARY)
        at += packed


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
