"""The batch plan: a pure function of the step, the same cycle on every rank, each record once per epoch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from deepgen.config import UserError, load_settings
from deepgen.data.loading.collate import collate
from deepgen.data.loading.dataset import TrainingSet
from deepgen.data.loading.mixture import Mixture, Part
from deepgen.data.loading.parquet_store import ListStore, ParquetStore
from deepgen.data.parquet import write_records
from deepgen.data.records import Record
from tests.data.test_records import PICTURE

CYCLE = {"edit": 1, "t2i": 3}
T2I = Part(np.arange(31), np.array([0, 10, 13, 31]))  # blocks of 10, 3 and 18 records
PARTS = {"edit": [Part(np.arange(31, 38), np.array([0, 38]))], "t2i": [T2I]}


def make(micro_batch: int = 2, seed: int = 1) -> Mixture:
    return Mixture(seed, PARTS, CYCLE, micro_batch)


def test_every_rank_has_the_same_tasks_in_the_same_order() -> None:
    for step in range(5):
        for rank in range(3):
            plan = make().plan(step, rank, 3)
            assert [(b.kind, b.number) for b in plan] == [("edit", 0), ("t2i", 1), ("t2i", 2), ("t2i", 3)]
            assert all(len(b.members) == 2 for b in plan)


def test_a_batch_is_computed_without_its_predecessors() -> None:
    in_order = make()
    forwards = [in_order.plan(step, 0, 2) for step in range(40)]
    assert make().plan(39, 0, 2) == forwards[39]
    assert make(seed=2).plan(3, 0, 2) != forwards[3]


def in_stream_order(mixture: Mixture, steps: range, world: int) -> list[int]:
    """Generation records in the order of the data: micro-batch by micro-batch, rank by rank."""
    plans = [[mixture.plan(step, rank, world) for rank in range(world)] for step in steps]
    return [m for ranks in plans for number in range(1, 4) for plan in ranks for m in plan[number].members]


def test_each_epoch_has_every_record_once() -> None:
    drawn = in_stream_order(make(), range(50), 2)
    epochs = [drawn[i : i + 31] for i in range(0, len(drawn) - 31, 31)]
    assert all(sorted(epoch) == list(range(31)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_ranks_share_what_one_rank_would_do() -> None:
    """2 ranks with micro-batch 2 get the same records, at the same places, as 1 rank with micro-batch 4."""
    for step in range(10):
        (one,) = (make(4).plan(step, 0, 1),)
        two = [make(2).plan(step, rank, 2) for rank in range(2)]
        for number, whole in enumerate(one):
            assert whole.members == two[0][number].members + two[1][number].members
            assert [two[0][number].first, two[1][number].first] == [0, 2]


def test_state_continues_on_another_number_of_ranks() -> None:
    before, after = make(), make()
    seen = in_stream_order(before, range(3), 2)
    state = before.state_dict(3, 2)
    assert state == {"step": 3, "positions": {"edit": 12, "t2i": 36}}
    after.load_state_dict(state)
    seen += in_stream_order(after, range(3, 8), 1)
    assert sorted(seen[:31]) == sorted(seen[31:62]) == list(range(31))
    same = make()
    same.load_state_dict(state)
    assert same.plan(5, 1, 2) == before.plan(5, 1, 2)


def stored(folder: Path, counts: Sequence[int] = (12, 8), change: str = "", *more: str) -> Mixture:
    """A mixture over files with `counts` records, every fourth an edit, in row groups of 4."""
    folder.mkdir()

    def record(number: int) -> Record:
        task = "edit" if number % 4 == 0 else "reasoning" if change == "task" else "t2i"
        source = "b" if number % (3 if change == "source" else 2) else "a"
        picture = PICTURE if number % 2 and change == "sizes" else b"unknown"
        return Record(str(number), task, "p", "p", picture, (b"unknown",) if task == "edit" else (), source)

    for file, count in enumerate(counts):
        records = [record(sum(counts[:file]) + i) for i in range(count)]
        write_records(folder / f"{file}.parquet", records, row_group_size=3 if change == "groups" else 4)
    return Mixture.from_settings(load_settings(None, list(more)), ParquetStore(folder), 2)


def test_a_resume_needs_the_same_records(tmp_path: Path) -> None:
    state = json.loads(json.dumps(stored(tmp_path / "a").state_dict(3, 2)))
    (tmp_path / "a").rename(tmp_path / "moved")
    (tmp_path / "moved" / "1.parquet").rename(tmp_path / "moved" / "2.parquet")
    no_edits = load_settings(None, ["data.edit_per_cycle=0"])
    moved = Mixture.from_settings(no_edits, ParquetStore(tmp_path / "moved"), 4)
    for same in (moved, stored(tmp_path / "b", change="source")):
        same.load_state_dict(state)
        assert same.origin == state["positions"]
    with pytest.raises(UserError) as caught:
        stored(tmp_path / "c", (12, 8, 4)).load_state_dict(state)
    assert str(caught.value) == (
        "data.train: is not what the run has been reading (20 records then, 24 now); allowed: the same records in the "
        "same order, or a new run"
    )
    for change in ("task", "groups", "sizes"):
        with pytest.raises(UserError, match=r"\(20 records then and now, of other tasks, sources, sizes or row groups"):
            stored(tmp_path / change, change=change).load_state_dict(state)
    stored(tmp_path / "d").load_state_dict({name: state[name] for name in ("step", "positions")})  # an older state


def test_a_resume_needs_the_same_data_sets_where_they_are_told_apart(tmp_path: Path) -> None:
    apart = "data.temperature=2"
    state = stored(tmp_path / "a", (12, 8), "", apart).state_dict(3, 2)
    stored(tmp_path / "b", (12, 8), "", apart).load_state_dict(state)
    with pytest.raises(UserError, match=r"data\.train: is not what the run has been reading"):
        stored(tmp_path / "c", (12, 8), "source", apart).load_state_dict(state)


def test_a_task_without_records_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.edit_per_cycle: got 1, but data\.train holds no editing"):
        Mixture(1, {"edit": [], "t2i": [T2I]}, CYCLE, 2)
    Mixture(1, {"t2i": [T2I]}, {"edit": 0, "t2i": 3}, 2)


def test_random_numbers_belong_to_the_place_in_the_batch() -> None:
    data = TrainingSet(ListStore([Record(str(i), "t2i", str(i), "", PICTURE, (), "") for i in range(31)]), 64)
    (whole,) = (collate(data, make(4).plan(2, 0, 1)[1], seed=1, step=2),)
    halves = [collate(data, make(2).plan(2, rank, 2)[1], seed=1, step=2) for rank in range(2)]
    assert whole.prompts == halves[0].prompts + halves[1].prompts
    assert whole.seeds == halves[0].seeds + halves[1].seeds
    assert len(set(whole.seeds)) == 4
    first, again = whole.generators("noise")[0], halves[0].generators("noise")[0]
    assert torch.equal(torch.randn(3, generator=first), torch.randn(3, generator=again))
