"""Stores of records with one interface: in memory, or in parquet files that are read block by block on demand."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from deepgen.config.settings import TASKS
from deepgen.data.parquet import (
    PARQUET_ERRORS,
    SCHEMA,
    SIZES,
    as_type,
    conform,
    parquet_files,
    require_regular,
    to_rows,
    unreadable,
)
from deepgen.data.records import Record, check_row
from deepgen.data.uris import reach_of
from deepgen.errors import UserError

CACHE_BYTES = 1 << 30  # encoded images per process; a block that is evicted too early is read again (epoch_order)


class RecordStore(Protocol):
    """N records in M blocks. `tasks`: uint8 [N], indices in TASKS. `starts`: int64 [M + 1], where each block begins."""

    name: str
    tasks: np.ndarray
    starts: np.ndarray

    def read(self, index: int) -> Record:
        """Record number `index`. Raises RecordError naming file and row if the row does not fit the schema."""

    def locate(self, index: int) -> tuple[str, int]:
        """File and row (from 1) of a record."""

    def sources(self) -> tuple[list[str], np.ndarray]:
        """The different names in the column source, and the index of each record's name among them, int64 [N]."""

    def sizes(self) -> list[np.ndarray]:
        """Sizes in pixels (width, height), one int32 [N, 2] array for targets, one for first references, and so on.

        A size is 0 if the image is absent or its size unknown. The list is empty if no size is known.
        """


class ListStore:
    """Records in memory, as a single block."""

    def __init__(self, records: Sequence[Record], name: str = "data.train") -> None:
        self._records, self.name = list(records), name
        self.tasks = np.array([TASKS.index(record.task) for record in records], dtype=np.uint8)
        self.starts = np.array([0, len(records)])

    def read(self, index: int) -> Record:
        return self._records[index]

    def locate(self, index: int) -> tuple[str, int]:
        return self.name, index + 1

    def sources(self) -> tuple[list[str], np.ndarray]:
        names = sorted({record.source for record in self._records})
        return names, np.array([names.index(record.source) for record in self._records])

    def sizes(self) -> list[np.ndarray]:
        return []


class ParquetStore:
    """A parquet file or a folder of them. Only the tasks are always in memory; row groups are read on demand.

    allow: what images may be read from besides the folder of `path` and public addresses, as data.allow.

    Raises UserError naming file and row if a file is unreadable, a column is missing or a task is unknown.
    """

    def __init__(self, path: Path, cache_bytes: int = CACHE_BYTES, *, allow: Sequence[str] = ()) -> None:
        self.name = f"data.train {path}"
        self._files = _files(path)
        self._reach = reach_of(path, allow)
        self._groups: list[tuple[Path, int, int]] = []  # file, row group, first row in the file
        sizes, tasks = [], []
        self._fragments = _fragments(self._files)
        for file, fragment in zip(self._files, self._fragments, strict=True):
            counts, row = [group.num_rows for group in fragment.row_groups], 0
            for group, count in zip(fragment.row_groups, counts, strict=True):
                self._groups.append((file, group.id, row))
                row += count
            sizes += counts
            tasks.append(_read_tasks(file, fragment))
            _require_rows(file, counts, len(tasks[-1]))
        self.tasks = np.concatenate(tasks)
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        if not len(self.tasks):
            raise UserError(f"{path}: holds no records")
        self._budget, self._held = cache_bytes, 0
        self._blocks: OrderedDict[int, tuple[list[dict[str, object]], int]] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, index: int) -> Record:
        block = self._block_of(index)
        file, row = self.locate(index)
        values = self._rows(block)[index - int(self.starts[block])]
        return check_row(values, f"{file}, row {row}", Path(file).parent, self._reach)

    def locate(self, index: int) -> tuple[str, int]:
        block = self._block_of(index)
        file, _, first = self._groups[block]
        return str(file), first + index - int(self.starts[block]) + 1

    def sources(self) -> tuple[list[str], np.ndarray]:
        """As in `RecordStore`. This reads the column on each call, as most runs do not need sources.

        A null counts as source "". In a name that is not UTF-8, invalid bytes are replaced; `read` rejects its record.
        """
        columns = [_codes(file, part, "source") for file, part in zip(self._files, self._fragments, strict=True)]
        shown = [[(name or b"").decode(errors="replace") for name in found] for found, _ in columns]
        names = sorted({name for found in shown for name in found})
        number = {name: i for i, name in enumerate(names)}
        parts = zip(shown, (codes for _, codes in columns), strict=True)
        return names, np.concatenate([np.array([number[name] for name in found])[codes] for found, codes in parts])

    def sizes(self) -> list[np.ndarray]:
        """As in `RecordStore`. This reads the columns SIZES on each call. Raises UserError if one has a wrong type."""
        found = [_sizes(file, fragment) for file, fragment in zip(self._files, self._fragments, strict=True)]
        images = max(len(sizes) for sizes in found)
        if not any(sizes[0].any() for sizes in found):
            return []
        blank = [np.zeros_like(sizes[0]) for sizes in found]
        filled = [[*sizes, *[empty] * (images - len(sizes))] for sizes, empty in zip(found, blank, strict=True)]
        return [np.concatenate(parts) for parts in zip(*filled, strict=True)]

    def _block_of(self, index: int) -> int:
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def _rows(self, block: int) -> list[dict[str, object]]:
        """A block's rows. Recently used blocks stay in memory, up to the budget."""
        with self._lock:
            if block in self._blocks:
                self._blocks.move_to_end(block)
                return self._blocks[block][0]
            file, group, _ = self._groups[block]
            try:
                table = pq.ParquetFile(file).read_row_group(group, columns=SCHEMA.names)
            except PARQUET_ERRORS as error:
                raise unreadable(file, error) from error
            _require_rows(file, [int(self.starts[block + 1] - self.starts[block])], table.num_rows)
            rows = to_rows(table, file)
            self._blocks[block] = rows, table.nbytes
            self._held += table.nbytes
            while self._held > self._budget and len(self._blocks) > 1:
                self._held -= self._blocks.popitem(last=False)[1][1]
            return rows


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; allowed: parquet or a folder of it")
    files = parquet_files(path) if path.is_dir() else [path]
    require_regular(files)
    return files


def _fragments(files: Sequence[Path]) -> list[ds.ParquetFileFragment]:
    """The row groups of every file. Threads read the files' footers in parallel."""
    from concurrent.futures import ThreadPoolExecutor

    def one(file: Path) -> ds.ParquetFileFragment:
        try:
            (fragment,) = ds.dataset(str(file), format="parquet").get_fragments()
            fragment.ensure_complete_metadata()
        except PARQUET_ERRORS as error:
            raise unreadable(file, error) from error
        conform(fragment.physical_schema.empty_table(), file)
        return fragment

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(one, files))


def _require_rows(file: Path, said: Sequence[int], found: int) -> None:
    """Raise UserError if the footer of a file says other numbers of rows, by row group, than there are."""
    if sum(said) != found or min(said, default=0) < 0:
        raise UserError(f"{file}: its footer says {sum(said):,} rows, and {found:,} can be read; fetch the file again")


def _columns(file: Path, fragment: ds.ParquetFileFragment, names: Sequence[str]) -> pa.Table:
    """Some columns of a file. Raises UserError if they are unreadable, for example damaged."""
    try:
        return fragment.to_table(columns=list(names))
    except PARQUET_ERRORS as error:
        raise unreadable(file, error) from error


def _codes(file: Path, fragment: ds.ParquetFileFragment, column: str) -> tuple[list[bytes | None], np.ndarray]:
    """The different values of a text column as stored bytes (None for null), and the index of each row's value.

    The indices are int64 [rows].
    """
    text = as_type(_columns(file, fragment, [column]).column(column), pa.string())
    values = text.cast(pa.binary()).combine_chunks().dictionary_encode()
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    names = values.dictionary.to_pylist() + [None] * bool(values.null_count)
    return names, values.indices.fill_null(len(names) - 1).to_numpy(zero_copy_only=False).astype(np.int64)


def _sizes(file: Path, fragment: ds.ParquetFileFragment) -> list[np.ndarray]:
    """One file's sizes in pixels, as in `RecordStore.sizes`: int32 [rows, 2] arrays; 0 if the file gives no size."""
    rows = fragment.count_rows()
    present = [field for field in SIZES if field.name in fragment.physical_schema.names]
    table = _columns(file, fragment, [field.name for field in present])
    if present:
        _require_rows(file, [rows], table.num_rows)
    columns = {}
    for field in present:
        try:
            columns[field.name] = table.column(field.name).cast(field.type).combine_chunks()
        except pa.ArrowException as error:
            raise UserError(
                f"{file}: column {field.name} is {table.schema.field(field.name).type}; allowed: {field.type}, or no "
                f"such column ({' '.join(str(error).split())[:120]})"
            ) from error
    target = np.zeros((rows, 2), dtype=np.int32)
    if "width" in columns and "height" in columns:
        target = np.stack([_numbers(columns["width"]), _numbers(columns["height"])], axis=1)
    if "reference_sizes" not in columns:
        return [target]
    lengths = _numbers(pc.list_value_length(columns["reference_sizes"]))
    values = _numbers(pc.list_flatten(columns["reference_sizes"]))
    begins = np.cumsum(lengths, dtype=np.int64) - lengths
    sizes = [target]
    for first in range(0, int(lengths.max(initial=0)) - 1, 2):
        has = lengths >= first + 2
        size = np.zeros((rows, 2), dtype=np.int32)
        size[has] = values[begins[has][:, None] + [first, first + 1]]
        sizes.append(size)
    return sizes


def _numbers(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """A column of whole numbers as int32, 0 for null."""
    found: np.ndarray = pc.fill_null(column, 0).to_numpy(zero_copy_only=False).astype(np.int32)
    return found


def _read_tasks(file: Path, fragment: ds.ParquetFileFragment) -> np.ndarray:
    """The task column as uint8 [rows]. Raises UserError naming the first row with an unknown task."""
    names, codes = _codes(file, fragment, "task")
    known = {task.encode(): number for number, task in enumerate(TASKS)}
    found = np.array([len(TASKS) if name is None else known.get(name, len(TASKS)) for name in names])[codes]
    wrong = np.flatnonzero(found == len(TASKS))
    if len(wrong):
        row = int(wrong[0])
        name = names[codes[row]]
        shown = None if name is None else name.decode(errors="replace")
        raise UserError(f"{file}, row {row + 1}: task {shown!r}; allowed: {', '.join(TASKS)}")
    return found.astype(np.uint8)
