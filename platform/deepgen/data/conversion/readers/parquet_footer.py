"""Where the columns of a parquet file lie, from its footer.

pyarrow says it, too (`RowGroupMetaData.column`), but ends the whole process if the footer of a column is damaged or
encrypted: an exception in C++ that it does not expect.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from deepgen.data.conversion.readers.thrift import read_struct

# Numbers of fields in parquet.thrift.
_ROW_GROUPS, _COLUMNS, _META_DATA = 4, 1, 3
_PATH, _PACKED_SIZE, _DATA, _DICTIONARY, _STATISTICS, _NULLS = 3, 7, 9, 11, 12, 3
_DAMAGED = "encrypted, or its footer is damaged"


@dataclass(frozen=True)
class Chunk:
    """A column of a row group: the names on its path, its first byte and how many, and its nulls, None if not said."""

    path: tuple[str, ...]
    start: int
    size: int
    nulls: int | None


def footer_at(data: memoryview, size: int) -> int:
    """The first byte of the footer in a file's bytes. size: of its content. Raises ValueError if it is signed."""
    # An encrypted column may stand in a footer that is readable; that one is signed behind its content.
    if struct.unpack_from("<I", data, len(data) - 8)[0] != size:
        raise ValueError(_DAMAGED)
    return len(data) - 8 - size


def row_groups(data: memoryview, footer: int) -> list[list[Chunk]]:
    """The columns of every row group in a file's bytes. Raises ValueError if the footer is damaged or encrypted."""
    try:
        content, _ = read_struct(data, footer)
        return [[_chunk(column[_META_DATA]) for column in group[_COLUMNS]] for group in content[_ROW_GROUPS]]
    except (LookupError, TypeError, AttributeError) as error:  # absent, or of another kind
        raise ValueError(_DAMAGED) from error


def _chunk(column: dict[int, Any]) -> Chunk:
    starts = [column[_DATA], column.get(_DICTIONARY) or column[_DATA]]
    path = tuple(str(name, "utf-8", "surrogateescape") for name in column[_PATH])
    chunk = Chunk(path, min(starts), column[_PACKED_SIZE], column.get(_STATISTICS, {}).get(_NULLS))
    if chunk.start < 0 or chunk.size < 0:
        raise ValueError(_DAMAGED)
    return chunk
