"""Records of one size are drawn together; otherwise the order does not change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from deepgen.config import UserError, load_settings
from deepgen.data.loading.buckets import bucket_numbers, fixed_area_size
from deepgen.data.loading.dataset import TrainingSet
from deepgen.data.loading.epoch_order import RUN, BucketOrder, WeightedOrder
from deepgen.data.loading.mixture import Mixture
from deepgen.data.loading.parquet_store import ParquetStore
from deepgen.data.parquet import SIZES, write_records
from deepgen.data.records import Record
from tests.data.test_records import EDIT, GOOD, encoded

SHAPES = ((48, 48), (96, 32), (32, 96), (40, 60))


def record(number: int, shape: tuple[int, int], task: str = "t2i") -> Record:
    image = encoded(np.full((*shape, 3), number, dtype=np.uint8))
    references = (image,) if task == "edit" else ()
    return Record(str(number), task, f"prompt {number}", "", image, references, f"set {number % 2}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files, row groups of 16: 150 generation and 50 editing records of four shapes."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("sized")
    shapes = [SHAPES[i] for i in rng.choice(4, 200, p=[0.4, 0.3, 0.2, 0.1])]
    records = [record(i, shape, "edit" if i % 4 == 0 else "t2i") for i, shape in enumerate(shapes)]
    write_records(path / "a.parquet", records[:120], row_group_size=16)
    write_records(path / "b.parquet", records[120:], row_group_size=16)
    return path


def make(folder: Path, micro_batch: int, *more: str) -> Mixture:
    return Mixture.from_settings(load_settings(None, ["data.image_size=64", *more]), ParquetStore(folder), micro_batch)


# ---------------------------------------------------------------- buckets


def test_a_bucket_is_a_shape_after_resizing() -> None:
    rng = np.random.default_rng(1)
    target, reference = rng.integers(20, 2000, (2, 400, 2), dtype=np.int32)
    target[:9], reference[::2] = 0, 0  # unknown; absent
    target[9:30] = [600, 599]
    target[30:32] = [2240, 1260], [704, 384]  # equal but for a rounding error
    numbers = bucket_numbers([target, reference], 512)

    def shape(size: np.ndarray) -> tuple[int, int] | None:
        return fixed_area_size(int(size[1]), int(size[0]), 512) if size.all() else None

    shapes = [(shape(a), shape(b)) for a, b in zip(target, reference, strict=True)]
    assert len(set(numbers.tolist())) == len(set(shapes))
    assert len({*zip(numbers.tolist(), shapes, strict=True)}) == len(set(shapes))
    assert numbers.dtype == np.uint8


def test_sizes_are_read_from_the_columns_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = replace(EDIT, references=(encoded(np.zeros((10, 30, 3), np.uint8)), encoded(np.zeros((8, 9, 3), np.uint8))))
    write_records(tmp_path / "a.parquet", [GOOD, wide, replace(GOOD, id="c", image=b"no image")])
    table = pq.read_table(tmp_path / "a.parquet")
    pq.write_table(table.drop_columns(SIZES.names), tmp_path / "b.parquet")  # as written by other programs
    floats = table.set_column(table.column_names.index("width"), "width", pa.array([640.0, None, 3.0]))
    pq.write_table(floats, tmp_path / "c.parquet")
    monkeypatch.setattr(Image, "open", lambda _: pytest.fail("an image was opened"))
    target, first, second = (sizes.tolist() for sizes in ParquetStore(tmp_path).sizes())
    assert target == [[5, 4], [5, 4], [0, 0], *[[0, 0]] * 3, [640, 4], [0, 4], [3, 0]]
    assert (first[1], second[1], first[0], first[4]) == ([30, 10], [9, 8], [0, 0], [0, 0])
    assert ParquetStore(tmp_path / "b.parquet").sizes() == []
    words = table.set_column(table.column_names.index("width"), "width", pa.array(["broad"] * 3))
    pq.write_table(words, tmp_path / "c.parquet")
    with pytest.raises(UserError, match=r"c\.parquet: column width is string; allowed: int32, or no such column"):
        ParquetStore(tmp_path).sizes()


# ---------------------------------------------------------------- order


@pytest.mark.parametrize("counts", [[5], [1] * 30, [64] * 40 + [7], [16] * 128, [300, 1, 20]])
def test_every_record_once_an_epoch_in_runs(counts: list[int]) -> None:
    size = sum(counts)
    buckets = np.random.default_rng(0).choice(5, size, p=[0.5, 0.2, 0.15, 0.1, 0.05])
    order = BucketOrder(counts, buckets, 1, 0)
    drawn = [order.member(place) for place in range(3 * size)]
    epochs = [drawn[i : i + size] for i in range(0, 3 * size, size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    again = BucketOrder(counts, buckets, 1, 0)
    assert [again.member(place) for place in reversed(range(3 * size))] == drawn[::-1]
    assert size < 30 or epochs[0] != epochs[1]
    if size > 1000:
        runs = buckets[np.array(drawn[: 3 * size // RUN * RUN])].reshape(-1, RUN)
        assert (runs == runs[:, :1]).all(axis=1).mean() > 0.9
        assert len({*runs[:40, 0].tolist()}) > 2  # shuffled


def test_a_rank_reads_the_blocks_it_would_read_anyway() -> None:
    """128 blocks of 64 on 64 lanes, 8 ranks with micro-batch 8: one rank reads each block and holds two per lane."""
    buckets = np.random.default_rng(0).integers(0, 6, 64 * 128)
    order = BucketOrder([64] * 128, buckets, 1, 0)
    readers: dict[int, set[int]] = {}
    for place in range(64 * 128):
        readers.setdefault(order.member(place) // 64, set()).add(place // RUN % 8)
    assert len(readers) == 128 and all(len(ranks) == 1 for ranks in readers.values())


def test_weights_are_kept_and_each_part_has_epochs_of_its_own() -> None:
    counts, buckets = [[30, 33], [500]], [np.arange(63) % 3, np.arange(500) % 2]
    order = WeightedOrder(counts, [1, 3], 1, 0, buckets)
    drawn = [order.member(place) for place in range(6000)]
    own = [[member for group, member in drawn if group == number] for number in range(2)]
    assert len(own[0]) / len(drawn) == pytest.approx(0.25, abs=0.03)
    for rows, size in zip(own, (63, 500), strict=True):
        assert all(sorted(rows[i : i + size]) == list(range(size)) for i in range(0, len(rows) - size, size))
    runs = [drawn[i : i + RUN] for i in range(0, 6000, RUN)]
    assert all(len({group for group, _ in run}) == 1 for run in runs)
    pure = [len({buckets[group][member] for group, member in run}) == 1 for run in runs]
    assert np.mean(pure) > 0.75


# ---------------------------------------------------------------- mixture


def test_micro_batches_have_one_shape(folder: Path) -> None:
    mixture, data = make(folder, 4), TrainingSet(ParquetStore(folder), 64)
    assert mixture.buckets == 2 * len({fixed_area_size(*shape, 64) for shape in SHAPES}) == 8  # edits have two images
    plans = [batch for step in range(12) for batch in mixture.plan(step, 0, 1)]
    shapes = []
    for batch in plans:
        samples = [data.sample(member) for member in batch.members]
        shapes.append({tuple(picture.image().shape for picture in (s.target, *s.references)) for s in samples})
    assert np.mean([len(found) == 1 for found in shapes]) > 0.8
    assert len(set.union(*shapes)) > 4
    plain = Mixture(42, {"t2i": [replace(part, buckets=None) for part in mixture.parts["t2i"]]}, {"t2i": 1}, 4)
    assert plain.buckets == 1 and "image_size" not in plain.state_dict(0, 1)


@pytest.mark.parametrize("weights", ["", "data.weights={set 0: 1, set 1: 2}"])
def test_a_resume_on_other_ranks_loses_nothing(folder: Path, weights: str) -> None:
    """The order continues without gaps: 5 steps of 3 ranks x 2, then 1 rank x 5, then 2 ranks x 4."""
    more = [weights] if weights else []
    whole, seen = make(folder, 1, *more), list[int]()
    row = [batch.members[0] for step in range(200) for batch in whole.plan(step, 0, 1) if batch.kind == "t2i"]
    state, step = whole.state_dict(0, 1), 0
    for steps, ranks, micro in ((5, 3, 2), (7, 1, 5), (4, 2, 4)):
        mixture = make(folder, micro, *more)
        mixture.load_state_dict(state)
        for now in range(step, step + steps):
            plans = [mixture.plan(now, rank, ranks) for rank in range(ranks)]
            seen += [m for turn in (1, 2) for plan in plans for m in plan[turn].members]
        step += steps
        state = mixture.state_dict(step, ranks)
    assert seen == row[: len(seen)] and len(seen) > 150
    if not weights:
        assert sorted(seen[:150]) == [i for i in range(200) if i % 4]


def test_other_buckets_are_refused(folder: Path) -> None:
    state = make(folder, 4).state_dict(3, 2)
    with pytest.raises(UserError, match=r"data\.image_size: got 128; allowed: 64, whose buckets the run draws from"):
        make(folder, 4, "data.image_size=128").load_state_dict(state)
