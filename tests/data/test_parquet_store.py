"""Records are read from parquet block by block, in an order that reads few blocks twice."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from deepgen.config.settings import load_settings
from deepgen.data.loading.epoch_order import BlockOrder
from deepgen.data.loading.mixture import make_parts
from deepgen.data.loading.parquet_store import ParquetStore
from deepgen.data.parquet import SCHEMA, read_rows, write_records
from deepgen.data.records import Record, RecordError
from deepgen.errors import UserError

COUNTS = [5, 1, 7, 3, 3, 8, 2, 4]


def record(i: int, task: str = "t2i") -> Record:
    return Record(f"r{i}", task, f"prompt {i}", "", b"x" * 100, (b"y",) if task == "edit" else (), "test")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files, row groups of 4: 10 records, then 5; every third one is an edit."""
    records = [record(i, "edit" if i % 3 == 0 else "t2i") for i in range(15)]
    write_records(tmp_path / "a.parquet", records[:10], row_group_size=4)
    write_records(tmp_path / "b.parquet", records[10:], row_group_size=4)
    return tmp_path


# ---------------------------------------------------------------- order


@pytest.mark.parametrize("lanes", [1, 2, 3, 8, 100])
def test_every_record_once_an_epoch(lanes: int) -> None:
    order, size = BlockOrder(COUNTS, 1, 0, lanes), sum(COUNTS)
    epochs = [[order.member(epoch * size + place) for place in range(size)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_order_is_a_function_of_seed_stream_and_position() -> None:
    positions = range(70)
    order = [BlockOrder(COUNTS, 1, 0).member(p) for p in positions]
    again = BlockOrder(COUNTS, 1, 0)
    assert [again.member(p) for p in reversed(positions)] == order[::-1]
    assert [BlockOrder(COUNTS, 2, 0).member(p) for p in positions] != order
    assert [BlockOrder(COUNTS, 1, 1).member(p) for p in positions] != order


def test_one_block_is_shuffled_whole() -> None:
    order = BlockOrder([1000], 1, 0)
    drawn = np.array([order.member(p) for p in range(1000)])
    assert abs(np.corrcoef(drawn, np.arange(1000))[0, 1]) < 0.1
    assert (np.diff(drawn) == 1).sum() < 10


def test_a_block_is_read_by_one_rank_and_used_up() -> None:
    """With 64 blocks of 16 records on 16 lanes and 4 ranks with micro-batch 4, no block is opened twice."""
    order = BlockOrder([16] * 64, 1, 0, lanes=16)
    readers: dict[int, set[int]] = {}
    opened: Counter[int] = Counter()
    for rank in range(4):
        held: list[int] = []
        for step in range(64):
            blocks = {order.member(step * 16 + rank * 4 + j) // 16 for j in range(4)}
            assert len(blocks) == 4  # a batch mixes as many blocks as it has samples
            for block in blocks:
                readers.setdefault(block, set()).add(rank)
                if block not in held:
                    opened[block] += 1
                    held = [*held[-7:], block]
    assert all(len(ranks) == 1 for ranks in readers.values())
    assert set(opened.values()) == {1}


def test_a_single_rank_reads_each_block_once_if_it_can_hold_the_lanes(tmp_path: Path, monkeypatch) -> None:
    """32 row groups of 4 on 8 lanes: an epoch reads 32 row groups if 8 fit in memory, and far more if one fits."""
    write_records(tmp_path / "a.parquet", [record(i) for i in range(128)], row_group_size=4)
    reads = 0
    real = pq.ParquetFile.read_row_group

    def counted(self: pq.ParquetFile, group: int, columns: list[str]) -> pa.Table:
        nonlocal reads
        reads += 1
        return real(self, group, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    order, seen = BlockOrder([4] * 32, 1, 0, lanes=8), []
    for budget, few in ((10 * 1000, True), (1, False)):  # a block has about 700 bytes
        store, reads = ParquetStore(tmp_path, cache_bytes=budget), 0
        seen = [store.read(order.member(place)).id for place in range(128)]
        assert (reads == 32) == few
    assert len(set(seen)) == 128


# ---------------------------------------------------------------- store


def test_records_come_back_from_every_row_group(folder: Path) -> None:
    store = ParquetStore(folder)
    assert store.starts.tolist() == [0, 4, 8, 10, 14, 15]
    assert [store.read(i).id for i in range(15)] == [f"r{i}" for i in range(15)]
    assert store.read(3).references == (b"y",)
    assert store.locate(11) == (str(folder / "b.parquet"), 2)


def test_parts_of_the_mixture(folder: Path) -> None:
    parts = make_parts(ParquetStore(folder), load_settings(), ["edit", "t2i"])
    assert parts["edit"][0].rows.tolist() == [0, 3, 6, 9, 12]
    assert [part.counts().tolist() for part in (*parts["edit"], *parts["t2i"])] == [[2, 1, 1, 1], [2, 3, 1, 3, 1]]


def test_memory_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    real = pq.ParquetFile.read_row_group

    def counted(self: pq.ParquetFile, group: int, columns: list[str]) -> pa.Table:
        reads.append(group)
        return real(self, group, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    small, large = ParquetStore(folder, cache_bytes=1), ParquetStore(folder)
    for store, expected in ((small, 8), (large, 2)):
        reads.clear()
        for _ in range(4):
            assert (store.read(0).id, store.read(14).id) == ("r0", "r14")
        assert len(reads) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "paint"}, r"a\.parquet, row 2: task 'paint'; allowed: t2i"),
        ({"task": None}, r"a\.parquet, row 2: task None; allowed: t2i"),
    ],
)
def test_an_unknown_task_is_named_before_anything_is_read(tmp_path: Path, change: dict, message: str) -> None:
    rows = [vars(record(0)), vars(record(1)) | change]
    pq.write_table(
        pa.Table.from_pylist([row | {"references": []} for row in rows], schema=SCHEMA), tmp_path / "a.parquet"
    )
    with pytest.raises(UserError, match=message):
        ParquetStore(tmp_path)


def test_a_row_that_does_not_fit_is_named_when_it_is_read(tmp_path: Path) -> None:
    write_records(tmp_path / "a.parquet", [record(0), replace(record(1), prompt="  ")])
    store = ParquetStore(tmp_path / "a.parquet")
    assert store.read(0).id == "r0"
    with pytest.raises(UserError, match=r"a\.parquet, row 2: prompt is empty"):
        store.read(1)


def with_bytes(file: Path, column: str, values: list) -> None:
    """Write a file of records whose text column `column` holds these bytes, UTF-8 or not."""
    write_records(file, [record(i) for i in range(len(values))])
    table = pq.read_table(file)
    kind = pa.list_(pa.string()) if column == "references" else pa.string()
    stored = pa.list_(pa.binary()) if column == "references" else pa.binary()
    text = pa.chunked_array([pa.array(values, stored)]).cast(
        options=pc.CastOptions(target_type=kind, allow_invalid_utf8=True)
    )
    pq.write_table(table.set_column(table.column_names.index(column), column, text), file)


@pytest.mark.parametrize(
    ("column", "says"),
    [(name, f"{name} is not UTF-8") for name in ("id", "prompt", "answer", "source")]
    + [("image", "an image is a path that is not UTF-8")],
)
def test_text_that_is_not_utf8_is_a_bad_row(tmp_path: Path, column: str, says: str) -> None:
    file = tmp_path / "a.parquet"
    with_bytes(file, column, ["grün".encode(), b"caf\xe9", b"c"])
    store = ParquetStore(file)
    assert [store.read(i).prompt for i in (0, 2)] == (["grün", "c"] if column == "prompt" else ["prompt 0", "prompt 2"])
    with pytest.raises(RecordError, match=rf"a\.parquet, row 2: {says}") as caught:
        store.read(1)
    assert caught.value.id == ("" if column == "id" else "r1")
    assert [isinstance(row.record, RecordError) for row in read_rows(file)] == [False, True, False]
    if column == "source":
        assert store.sources()[0] == ["c", "caf\ufffd", "grün"]


def test_paths_of_references_that_are_not_utf8(tmp_path: Path) -> None:
    with_bytes(tmp_path / "a.parquet", "references", [[], [b"/a.png", b"caf\xe9"], None])
    store = ParquetStore(tmp_path / "a.parquet")
    assert store.read(2).references == ()
    with pytest.raises(RecordError, match="row 2: task t2i with 2 reference images"):
        store.read(1)


def test_a_binary_text_column_is_read_row_by_row(tmp_path: Path) -> None:
    write_records(tmp_path / "a.parquet", [record(0), record(1)])
    table = pq.read_table(tmp_path / "a.parquet")
    stored = pa.array([b"red", b"caf\xe9"], pa.binary())
    pq.write_table(table.set_column(table.column_names.index("prompt"), "prompt", stored), tmp_path / "a.parquet")
    store = ParquetStore(tmp_path / "a.parquet")
    assert store.read(0).prompt == "red"
    with pytest.raises(RecordError, match="row 2: prompt is not UTF-8"):
        store.read(1)


def test_a_task_that_is_not_utf8_is_named_before_anything_is_read(tmp_path: Path) -> None:
    with_bytes(tmp_path / "a.parquet", "task", [b"t2i", b"t2\xe9"])
    with pytest.raises(UserError, match=r"a\.parquet, row 2: task 't2\ufffd'; allowed: t2i"):
        ParquetStore(tmp_path)


@pytest.mark.parametrize(("content", "message"), [(b"no parquet", "can't be read as parquet"), (None, "no such file")])
def test_files_that_cannot_be_read(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(UserError, match=message):
        ParquetStore(tmp_path / "a.parquet")


@pytest.mark.parametrize("column", ["task", "source", "width", "prompt"])
def test_a_column_of_damaged_bytes_is_named_by_its_file(folder: Path, column: str) -> None:
    file = folder / "b.parquet"
    group = pq.ParquetFile(file).metadata.row_group(0)
    place = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == column)
    start = place.dictionary_page_offset or place.data_page_offset
    data = bytearray(file.read_bytes())
    data[start : start + place.total_compressed_size] = b"\xff" * place.total_compressed_size
    file.write_bytes(data)

    def read() -> None:
        store = ParquetStore(folder)
        store.sources()
        store.sizes()
        store.read(11)

    with pytest.raises(UserError, match=r"b\.parquet: can't be read as parquet"):
        read()


def test_a_damaged_name_of_a_column(folder: Path) -> None:
    file = folder / "b.parquet"
    file.write_bytes(file.read_bytes().replace(b"answer", b"answe\xc9"))
    for reader in (ParquetStore, read_rows):
        with pytest.raises(UserError, match=r"b\.parquet: can't be read as parquet"):
            reader(folder)


def test_a_folder_among_the_files_is_named(folder: Path) -> None:
    (folder / "c.parquet").mkdir()
    for reader in (ParquetStore, read_rows):
        with pytest.raises(UserError, match=r"c\.parquet: is a folder; allowed in .* under such a name: parquet files"):
            reader(folder)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a"], "task": ["t2i"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="missing column prompt, answer, image, references, source"):
        ParquetStore(tmp_path / "a.parquet")


def test_a_footer_with_another_number_of_rows(tmp_path: Path) -> None:
    write_records(tmp_path / "a.parquet", [record(i) for i in range(4)])
    data, said = (tmp_path / "a.parquet").read_bytes(), set[str]()
    behind = data.rindex(b"ARROW:schema")  # the row groups end here
    for at in range(behind - 60, behind):
        (tmp_path / "a.parquet").write_bytes(data[:at] + bytes([data[at] ^ 2]) + data[at + 1 :])
        try:
            store = ParquetStore(tmp_path / "a.parquet")
            assert [store.read(i).id for i in range(len(store.tasks))] == ["r0", "r1", "r2", "r3"]
        except UserError as error:
            said.add(str(error).partition(": ")[2])
    assert "its footer says 5 rows, and 4 can be read; fetch the file again" in said, said
