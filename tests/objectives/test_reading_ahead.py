"""The source reads the next step's records during the current step; nothing else changes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors.objectives.record_source import MixtureSource
from deepgen.config import UserError, load_settings
from deepgen.data.loading.dataset import Picture, Sample
from deepgen.data.loading.mixture import Mixture
from deepgen.data.loading.parquet_store import ListStore
from deepgen.data.records import Record

DEADLINE_S = 30.0


def make_source(threads: int, told: Callable[[int], None] = lambda index: None) -> MixtureSource:
    """A source of 24 records without pictures. It calls `told` for each record it reads."""
    tasks = ("t2i", "edit", "text", "t2i")
    store = ListStore([Record(str(i), tasks[i % 4], f"prompt {i}", "", b"", (), "") for i in range(24)])

    def sample(index: int, kept: Any) -> Sample:
        told(index)
        return Sample(f"prompt {index}", [], Picture(torch.zeros(1, 1, 3, dtype=torch.uint8)))

    data: Any = SimpleNamespace(store=store, sample=sample)
    state = {"read": 0, "bad": 0, "rows": []}
    quarantine: Any = SimpleNamespace(state_dict=lambda: state, load_state_dict=lambda _: None)
    cache: Any = SimpleNamespace(flush=lambda: None, find=None)
    return MixtureSource(data, Mixture.from_settings(load_settings(None, []), store, 2), cache, quarantine, threads)


def contents(source: MixtureSource, steps: range, rank: int, world: int) -> list[Any]:
    batches = [source.next(step, rank, world) for step in steps]
    return [[(micro.task, micro.indices, micro.seeds) for micro in batch] for batch in batches]


def test_batches_are_the_same_also_after_a_resume_on_other_ranks() -> None:
    plain, ahead = make_source(0), make_source(2)
    expected = contents(plain, range(3), 0, 1)
    assert contents(ahead, range(3), 0, 1) == expected
    resumed = make_source(2)
    resumed.next(0, 0, 1)  # a batch from the old position is being read
    for source in (plain, resumed):
        source.load_state_dict(ahead.state_dict(3))
    assert contents(resumed, range(3, 6), 1, 2) == contents(plain, range(3, 6), 1, 2)
    for source in (ahead, resumed):
        source.close()


def test_the_next_step_is_read_unasked() -> None:
    found, all_there = set[int](), threading.Event()
    plan = make_source(0)
    wanted = {index for micro in plan.next(1, 0, 1) for index in micro.indices}

    def told(index: int) -> None:
        found.add(index)
        if wanted <= found:
            all_there.set()

    source = make_source(1, told)
    source.next(0, 0, 1)
    assert all_there.wait(DEADLINE_S), f"read {found} of {wanted}"
    source.close()


def test_what_goes_wrong_is_raised_where_the_batch_is_asked_for() -> None:
    plan = make_source(0)
    later = {index for micro in plan.next(1, 0, 1) for index in micro.indices}
    bad = min(later - {index for micro in plan.next(0, 0, 1) for index in micro.indices})

    def told(index: int) -> None:
        if index == bad:
            raise UserError("part.parquet: can't be read")

    source = make_source(2, told)
    source.next(0, 0, 1)
    with pytest.raises(UserError, match=r"part\.parquet"):
        source.next(1, 0, 1)
    source.close()
