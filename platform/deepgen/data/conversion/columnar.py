"""Reads rows of parquet files, row group by row group."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from deepgen.data.conversion.raw_sample import RawData, RawSample, Unit, stem_of
from deepgen.data.conversion.row_forms import hf_picker, records_row
from deepgen.data.parquet import decoded_rows
from deepgen.errors import UserError


def row_groups(file: Path, rows: int) -> list[tuple[int, int]]:
    """Ranges [first, last) of row groups with about `rows` rows each."""
    with _open_parquet(file) as parquet:
        sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
    runs, first, count = [], 0, 0
    for i, size in enumerate(sizes):
        count += size
        if count >= rows or i + 1 == len(sizes):
            runs.append((first, i + 1))
            first, count = i + 1, 0
    return runs


def parquet_schema(file: Path) -> pa.Schema:
    with _open_parquet(file) as parquet:
        return parquet.schema_arrow


def read_parquet(raw: RawData, unit: Unit) -> Iterator[RawSample]:
    file = Path(unit.file)
    with _open_parquet(file) as parquet:
        before = sum(parquet.metadata.row_group(i).num_rows for i in range(unit.first))
        names = parquet.schema_arrow.names
        pick = records_row if raw.form == "records" else hf_picker(raw, names, file)
        for group in range(unit.first, unit.last):
            for row in _group_rows(parquet, group, file):
                before += 1
                yield pick(row, f"{stem_of(raw, file)}-{before}", f"{file}, row {before}", raw)


def _open_parquet(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: can't be read as parquet ({' '.join(str(error).split())[:160]})") from error


def _group_rows(parquet: pq.ParquetFile, group: int, file: Path) -> list[dict[str, Any]]:
    """Rows of a row group. Text that is not UTF-8 gets lone surrogates, which mark it as invalid."""
    try:
        return decoded_rows(parquet.read_row_group(group), lambda text: text.decode("utf-8", "surrogateescape"))
    except (pa.ArrowException, OSError, ValueError) as error:
        why = " ".join(str(error).split())[:160]
        raise UserError(
            f"{file}: row group {group + 1} of {parquet.num_row_groups} can't be read ({why}); fetch the file again"
        ) from error
