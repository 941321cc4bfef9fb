"""Which folders are checkpoints, which one is used and which are removed; damage that does not change the size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors.learner.checkpoints.checkpoint_store import MANIFEST, CheckpointStore, check_shards
from deepgen.config import UserError, load_settings
from deepgen.fingerprint import fingerprint


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., CheckpointStore]:
    """A function that writes checkpoints of some steps into one run and returns the store."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "w").write_bytes(bytes(100))
    engine: Any = SimpleNamespace(rank=0, world=1, parameters=[])
    engine.pieces = lambda: [("weight:w", 0, torch.arange(1000.0))]

    def write(
        *steps: int, keep: int = 9, stage: str = "sft", more: tuple[str, ...] = (), needed: tuple[int, ...] = ()
    ) -> CheckpointStore:
        own = [f"run.dir={tmp_path}", "run.name=a", f"model.weights={tmp_path / 'weights'}", "train.steps=9"]
        settings = load_settings(None, [*own, f"train.keep_checkpoints={keep}", "train.warmup_steps=0", *more])
        store = CheckpointStore(settings, stage)
        for step in steps:
            store.save(step, engine, None, {}, needed=frozenset(needed))
        store.finish()
        return store

    return write


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


def newest(store: CheckpointStore) -> int | None:
    manifest = store.newest()
    return None if manifest is None else manifest.step


def test_a_damaged_later_one_takes_no_place(save: Callable[..., CheckpointStore]) -> None:
    store = save(1, 2, 3, 100)
    (store.folder / "step-000100" / "engine-0.safetensors").unlink()
    assert newest(store) == 3
    store = save(4, keep=1)
    assert newest(store) == 4
    assert names(store) == ["step-000004", "unused-step-000100"]
    (store.folder / "step-000004" / MANIFEST).unlink()
    assert names(save(5, 6, keep=2)) == ["step-000005", "step-000006", "unused-step-000100"]


def test_one_that_may_be_gone_back_to_is_kept(save: Callable[..., CheckpointStore]) -> None:
    store = save(0, 2, 4, 6, 8, keep=2, needed=(5, 1))
    assert names(store) == [f"step-{step:06d}" for step in (0, 4, 6, 8)]
    assert [found and found.step for found in (store.newest(5), store.newest(3), store.newest())] == [4, 0, 8]
    assert names(save(9, keep=1, needed=(4,))) == ["step-000004", "step-000009"]


def test_a_password_is_not_written_and_may_change(save: Callable[..., CheckpointStore]) -> None:
    store = save(1, more=("tracking.uri=http://user:hunter2@host",))
    written = [file.read_bytes() for file in store.folder.rglob("*") if file.is_file()]
    assert len(written) >= 2 and not any(b"hunter2" in data for data in written)
    manifest = store.newest()
    assert manifest is not None and manifest.settings["tracking"]["uri"] == "http://user:***@host"
    save(more=("tracking.uri=http://user:another@elsewhere",)).check_fits(manifest)


def test_steps_are_numbers(save: Callable[..., CheckpointStore]) -> None:
    store = save(999998, 999999, 1000000, 1000001, keep=2)
    assert names(store) == ["step-1000000", "step-1000001"]
    assert newest(store) == 1000001


def test_what_is_called_otherwise_is_left_alone(save: Callable[..., CheckpointStore]) -> None:
    store = save(1, 2, 3)
    (store.folder / "step-000003").rename(store.folder / "step-000003.bad")
    (store.folder / "step-000001").rename(store.folder / "step-000009")  # its content says step 1
    (store.folder / "step-000007").write_text("a file")
    assert newest(store) == 2
    store = save(4, keep=1)
    assert names(store) == ["step-000003.bad", "step-000004", "step-000007", "unused-step-000009"]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", b"\xff\xfe\x00", "null", '{"format": 4}', "UNKNOWN", "FILES", "STEP", "SETTINGS"],
)
def test_a_damaged_manifest_is_passed_over(save: Callable[..., CheckpointStore], content: str | bytes) -> None:
    store = save(1, 2)
    file = store.folder / "step-000002" / MANIFEST
    manifest = json.loads(file.read_text())
    changed = {"UNKNOWN": {"new": 1}, "FILES": {"files": None}, "STEP": {"step": 3}, "SETTINGS": {"settings": {}}}
    if isinstance(content, str) and content in changed:
        content = json.dumps(manifest | changed[content])
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    assert newest(store) == 1


def test_another_format_is_named(save: Callable[..., CheckpointStore]) -> None:
    store = save(1)
    (store.folder / "step-000001" / MANIFEST).write_text('{"format": 3}')
    with pytest.raises(UserError, match=r"manifest\.json: checkpoint format 3; allowed: 4"):
        store.newest()


@pytest.mark.parametrize("place", [0, 3, -4])
def test_a_shard_that_has_changed_is_refused(save: Callable[..., CheckpointStore], place: int) -> None:
    """The length is unchanged: only bytes in the header or in the values differ."""
    file = save(1).folder / "step-000001" / "engine-0.safetensors"
    content = bytearray(file.read_bytes())
    content[place] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"engine-0\.safetensors: has changed since it was written; remove its folder"):
        check_shards(file.parent, 0, 1)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("model.lora_alpha=64", "model.lora_alpha: got 64.0; allowed: 128.0"),
        ("model.padding=reference", "model.padding: got reference; allowed: masked"),
    ],
)
def test_what_changes_the_model_must_stay(save: Callable[..., CheckpointStore], more: str, says: str) -> None:
    manifest = save(1).newest()
    assert manifest is not None
    with pytest.raises(UserError, match=says):
        save(more=(more,)).check_fits(manifest)


def test_the_updates_of_a_batch_must_stay_in_rl(save: Callable[..., CheckpointStore]) -> None:
    """They say how many optimizer steps AdamW has counted."""
    one, two = ((f"algorithm.updates_per_batch={count}",) for count in (1, 2))
    manifest = save(1, stage="rl", more=one).newest()
    assert manifest is not None
    with pytest.raises(UserError, match=r"algorithm\.updates_per_batch: got 2; allowed: 1, with which"):
        save(stage="rl", more=two).check_fits(manifest)
    del manifest.settings["algorithm"]["updates_per_batch"]  # written before there was the setting
    save(stage="rl", more=one).check_fits(manifest)


def test_a_fingerprint_sees_all_through_a_file(tmp_path: Path) -> None:
    content = bytearray(10 << 20)
    (tmp_path / "w").write_bytes(content)
    before = fingerprint(tmp_path)
    for place in (5, 4 << 20, (8 << 20) + 60000, len(content) - 1):
        changed = content.copy()
        changed[place] = 1
        (tmp_path / "w").write_bytes(changed)
        assert fingerprint(tmp_path) != before
    (tmp_path / "w").write_bytes(content)
    assert fingerprint(tmp_path) == before
