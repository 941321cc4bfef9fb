"""Records behind one interface, in memory or in parquet files that are read block by block when they are needed."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from deepgen.config.errors import UserError
from deepgen.config.settings import TASKS
from deepgen.data.records import SCHEMA, Record, check_row

CACHE_BYTES = 1 << 30  # of encoded images, per process; what is evicted too soon is read again (data.order)


class RecordStore(Protocol):
    """N records in M blocks; `tasks` uint8 [N] numbers TASKS, `starts` int64 [M + 1] is where each block begins."""

    name: str
    tasks: np.ndarray
    starts: np.ndarray

    def read(self, index: int) -> Record:
        """Record number `index`. Raises UserError naming file and row when it does not fit the schema."""

    def place(self, index: int) -> str:
        """File and row of a record, for messages."""


class ListStore:
    """Records in memory, one block."""

    def __init__(self, records: Sequence[Record], name: str = "data.train") -> None:
        self._records, self.name = list(records), name
        self.tasks = np.array([TASKS.index(record.task) for record in records], dtype=np.uint8)
        self.starts = np.array([0, len(records)])

    def read(self, index: int) -> Record:
        return self._records[index]

    def place(self, index: int) -> str:
        return f"{self.name}, row {index + 1}"


class ParquetStore:
    """A parquet file or a folder of them; only the tasks are in memory, row groups are read when they are needed.

    Raises UserError when a file cannot be read, lacks a column, or a task is unknown, naming file and row.
    """

    def __init__(self, path: Path, cache_bytes: int = CACHE_BYTES) -> None:
        self.name = f"data.train {path}"
        self._files = _files(path)
        self._groups: list[tuple[Path, int, int]] = []  # file, row group, first row in the file
        sizes, tasks = [], []
        for file, fragment in zip(self._files, _fragments(self._files), strict=True):
            row = 0
            for group in fragment.row_groups:
                self._groups.append((file, group.id, row))
                sizes.append(group.num_rows)
                row += group.num_rows
            tasks.append(_read_tasks(file, fragment))
        self.tasks = np.concatenate(tasks)
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        if not len(self.tasks):
            raise UserError(f"{path}: holds no records")
        self._budget, self._held = cache_bytes, 0
        self._blocks: OrderedDict[int, tuple[list[dict[str, object]], int]] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, index: int) -> Record:
        block = self._block_of(index)
        return check_row(self._rows(block)[index - int(self.starts[block])], self.place(index))

    def place(self, index: int) -> str:
        block = self._block_of(index)
        file, _, first = self._groups[block]
        return f"{file}, row {first + index - int(self.starts[block]) + 1}"

    def _block_of(self, index: int) -> int:
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def _rows(self, block: int) -> list[dict[str, object]]:
        """A block's rows; the blocks used last stay in memory up to the budget."""
        with self._lock:
            if block in self._blocks:
                self._blocks.move_to_end(block)
                return self._blocks[block][0]
            file, group, _ = self._groups[block]
            try:
                table = pq.ParquetFile(file).read_row_group(group, columns=SCHEMA.names)
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{file}: can't be read as parquet ({' '.join(str(error).split())[:200]})") from error
            rows = table.to_pylist()
            self._blocks[block] = rows, table.nbytes
            self._held += table.nbytes
            while self._held > self._budget and len(self._blocks) > 1:
                self._held -= self._blocks.popitem(last=False)[1][1]
            return rows


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; allowed: parquet or a folder of it")
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: no *.parquet in this folder")
    return files


def _fragments(files: Sequence[Path]) -> list[ds.ParquetFileFragment]:
    """Row groups of every file, their footers read side by side."""
    from concurrent.futures import ThreadPoolExecutor

    def one(file: Path) -> ds.ParquetFileFragment:
        try:
            (fragment,) = ds.dataset(str(file), format="parquet").get_fragments()
            fragment.ensure_complete_metadata()
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file}: can't be read as parquet ({' '.join(str(error).split())[:200]})") from error
        missing = [name for name in SCHEMA.names if name not in fragment.physical_schema.names]
        if missing:
            raise UserError(f"{file}: missing column {', '.join(missing)}; allowed: {', '.join(SCHEMA.names)}")
        return fragment

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(one, files))


def _read_tasks(file: Path, fragment: ds.ParquetFileFragment) -> np.ndarray:
    """The task column as uint8 [rows]. Raises UserError naming the first row with an unknown task."""
    column = fragment.to_table(columns=["task"]).column("task").combine_chunks().dictionary_encode()
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    names = column.dictionary.to_pylist()
    codes = np.array([TASKS.index(name) if name in TASKS else len(TASKS) for name in names] or [0])
    indices = column.indices.fill_null(len(names)).to_numpy(zero_copy_only=False).astype(np.int64)
    found = np.append(codes, len(TASKS))[indices]
    wrong = np.flatnonzero(found == len(TASKS))
    if len(wrong):
        row = int(wrong[0])
        given = None if indices[row] == len(names) else names[indices[row]]
        raise UserError(f"{file}, row {row + 1}: task {given!r}; allowed: {', '.join(TASKS)}")
    return found.astype(np.uint8)
