"""Sources by weight: exact shares, each source in its own whole epochs, and errors that name the wrong key."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from deepgen.config import UserError, load_settings
from deepgen.data.loading import epoch_order as order_module
from deepgen.data.loading.epoch_order import WeightedOrder
from deepgen.data.loading.mixture import Mixture, Part, make_parts
from deepgen.data.loading.parquet_store import ListStore, ParquetStore
from deepgen.data.parquet import write_records
from deepgen.data.records import Record

SLOTS = 512  # the real number would take minutes
SETS = {"photos": 27, "posters": 9, "edits": 6}


def make_records() -> list[Record]:
    return [
        Record(f"{name}-{i}", "edit" if name == "edits" else "t2i", "x", "", b"x", (b"x",) * (name == "edits"), name)
        for name, count in SETS.items()
        for i in range(count)
    ]


def store() -> ListStore:
    return ListStore(make_records())


def shares(*overrides: str) -> list[float]:
    """The weights of generation's parts."""
    parts = make_parts(store(), load_settings(None, overrides), ["edit", "t2i"])
    weights = [part.source_weight for part in parts["t2i"]]
    return [weight / sum(weights) for weight in weights]


def test_weights_by_size_temperature_and_hand() -> None:
    assert shares() == [1.0]  # without weights, one order covers all sources
    assert shares("data.temperature=2") == pytest.approx([3**0.5 / (1 + 3**0.5), 1 / (1 + 3**0.5)])
    assert shares("data.weights={photos: 1, posters: 3, edits: 1}") == [0.25, 0.75]
    assert shares("data.weights={photos: 0, posters: 3, edits: 1}") == [1.0]
    by_hand = load_settings(None, ["data.weights={photos: 0, posters: 3, edits: 1}"])
    (part,) = make_parts(store(), by_hand, ["t2i"])["t2i"]
    assert part.rows.tolist() == list(range(27, 36))


def test_parquet_says_the_same(tmp_path: Path) -> None:
    records = make_records()
    write_records(tmp_path / "a.parquet", records[:30], row_group_size=4)
    write_records(tmp_path / "b.parquet", records[30:], row_group_size=5)
    settings = load_settings(None, ["data.temperature=3"])
    ours, theirs = (make_parts(s, settings, ["edit", "t2i"]) for s in (ParquetStore(tmp_path), store()))
    for kind in ("edit", "t2i"):
        assert [p.source_weight for p in ours[kind]] == [p.source_weight for p in theirs[kind]]
        assert [p.rows.tolist() for p in ours[kind]] == [p.rows.tolist() for p in theirs[kind]]
    assert [p.counts().tolist() for p in ours["t2i"]] == [[4, 4, 4, 4, 4, 4, 3], [1, 2, 5, 1]]


@pytest.mark.parametrize("weights", [[1.0, 3.0], [5, 2.5, 0.001], [1e-12, 1]])
def test_shares_are_exact_and_each_group_has_whole_epochs(
    weights: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order_module, "SLOTS", SLOTS)
    counts = [[5, 3], [4], [7]][: len(weights)]
    order = WeightedOrder(counts, weights, 1, 0)
    assert order.slots.sum() == SLOTS and order.slots.min() >= 1
    drawn = [order.member(place) for place in range(SLOTS + 300)]
    assert Counter(group for group, _ in drawn[:SLOTS]) == dict(enumerate(order.slots.tolist()))
    wanted = np.array(weights) / sum(weights) * SLOTS
    assert np.abs(order.slots - wanted).max() <= len(weights)
    for group, blocks in enumerate(counts):
        members, size = [member for g, member in drawn if g == group], sum(blocks)
        epochs = [members[i : i + size] for i in range(0, len(members) - size + 1, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    again = WeightedOrder(counts, weights, 1, 0)
    assert [again.member(place) for place in range(SLOTS + 299, SLOTS - 5, -1)] == drawn[: SLOTS - 5 : -1]
    assert [WeightedOrder(counts, weights, 2, 0).member(place) for place in range(100)] != drawn[:100]


def make(micro_batch: int) -> Mixture:
    settings = load_settings(None, ["data.weights={photos: 1, posters: 2, edits: 1}", "data.t2i_per_cycle=3"])
    return Mixture.from_settings(settings, store(), micro_batch)


def in_stream_order(mixture: Mixture, steps: range, world: int) -> list[int]:
    plans = [[mixture.plan(step, rank, world) for rank in range(world)] for step in steps]
    return [m for ranks in plans for number in range(1, 4) for plan in ranks for m in plan[number].members]


def test_a_resume_on_another_number_of_ranks_skips_and_repeats_nothing() -> None:
    whole = in_stream_order(make(2), range(24), 1)
    before, after = make(2), make(2)
    seen = in_stream_order(before, range(3), 4)  # 4 ranks: 72 records
    after.load_state_dict(before.state_dict(3, 4))
    seen += in_stream_order(after, range(3, 15), 1)
    assert seen == whole
    photos, posters = ([m for m in seen if (m < 27) == first] for first in (True, False))
    assert sorted(photos[:27]) == list(range(27))
    assert all(sorted(posters[i : i + 9]) == list(range(27, 36)) for i in range(0, 81, 9))
    assert len(posters) == pytest.approx(96, abs=15)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "data.weights={photos: 1, poster: 1, edits: 1}",
            r"data\.weights\.poster: data\.train has no source 'poster'; allowed: 'edits', 'photos', 'posters'"
            r", or data\.weights=\{\} to mix by size; did you mean 'posters'\?",
        ),
        ("data.weights={photos: 1, edits: 1}", r"data\.weights: no weight for 'posters'; allowed: one for each"),
        ("data.weights={photos: 0, posters: 0, edits: 1}", r"all 0 for the t2i records of 'photos', 'posters'"),
        ("data.weights={photos: -1}", r"data\.weights\.photos: got -1 on the command line; allowed: a weight >= 0"),
        (
            "data.weights=3",
            r"data\.weights: got 3 on the command line; allowed: a weight >= 0, at most 1e6, for",
        ),
        ("data.temperature=0.5", r"data\.temperature: got 0\.5"),
    ],
)
def test_weights_that_do_not_fit_are_one_clear_line(override: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        Mixture.from_settings(load_settings(None, [override]), store(), 2)
    assert "\n" not in str(caught.value)


def test_one_of_weights_and_temperature() -> None:
    with pytest.raises(UserError, match=r"data\.temperature: got 2 beside data\.weights; allowed: one of the two"):
        load_settings(None, ["data.temperature=2", "data.weights={a: 1}"])


def test_a_source_of_its_own_for_every_record_is_refused() -> None:
    records = [Record(str(i), "t2i", "x", "", b"x", (), f"file, row {i}") for i in range(1001)]
    with pytest.raises(UserError, match=r"1,001 different texts in the column source .*allowed .*at most 1,000"):
        make_parts(ListStore(records), load_settings(None, ["data.temperature=2"]), ["t2i"])


def test_part_counts_only_blocks_with_records() -> None:
    assert Part(np.array([0, 1, 9]), np.array([0, 4, 8, 12])).counts().tolist() == [2, 1]
