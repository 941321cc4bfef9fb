"""Encodings of images, cached in memory or on disk: bit-identical, never stale, never half written."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.learner.preflight import prepare_run
from actors.learner.protocols import StepContext, WorkerContext
from actors.objectives import encoder_cache
from actors.objectives.flow_matching import FlowMatching
from actors.objectives.record_source import MixtureSource
from deepgen.config import UserError, load_settings
from deepgen.data.cache import disk_store
from deepgen.data.cache.disk_store import SUFFIX, WRITING, DiskStore
from deepgen.data.cache.encoded import EncodingCache, MemoryStore
from deepgen.data.loading.dataset import FEATURES, LATENT, Picture, TrainingSet
from deepgen.data.loading.mixture import Mixture
from deepgen.data.loading.parquet_store import ParquetStore
from deepgen.data.parquet import write_records
from deepgen.data.quarantine import Quarantine
from deepgen.data.uris import DataUri, reach_of
from deepgen.models.presets import DEEPGEN_5B
from deepgen.models.unified import UnifiedModel
from deepgen.models.vlm import LoraSettings, add_lora
from tests.helpers.factories import make_tiny_model
from tests.helpers.sft_world import make_records

ABOUT = {LATENT: {"weights": "1"}, FEATURES: {"weights": "2"}}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> UnifiedModel:
    return make_tiny_model()


@pytest.fixture
def shard(tmp_path: Path) -> str:
    """12 records; numbers 1, 5 and 9 are edits."""
    write_records(tmp_path / "train.parquet", make_records(), row_group_size=4)
    return str(tmp_path / "train.parquet")


def make_context(model: UnifiedModel, folder: Path, *overrides: str) -> WorkerContext:
    common = [f"data.train={folder / 'train.parquet'}", f"run.dir={folder / 'runs'}", "data.image_size=64"]
    common += ["data.micro_batch=3", "data.t2i_per_cycle=3", "model.precision=fp32"]
    settings = load_settings(None, [*common, *overrides])
    model.trainable_parameters("sft")
    return WorkerContext("sft", settings, model, 0, 1, CPU, None, lambda _: None)


def make_source(context: WorkerContext, cache: EncodingCache | None = None) -> tuple[FlowMatching, MixtureSource]:
    settings = context.settings
    objective = FlowMatching.for_worker(context)
    if cache is not None:
        objective = FlowMatching(settings, cache, Quarantine(1.0, settings.run.dir / "other"))
    data = TrainingSet(ParquetStore(settings.data.train), settings.data.image_size)
    return objective, MixtureSource(
        data, Mixture.from_settings(settings, data.store, 3), objective.cache, objective.quarantine
    )


def train(context: WorkerContext, cache: EncodingCache | None = None, steps: int = 2) -> list[Tensor]:
    """Losses and one gradient, as the engine computes them, of steps that each read all records once."""
    objective, source = make_source(context, cache)
    numbers = []
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=context.settings.model.precision == "bf16")
    for step in range(steps):
        here = StepContext(1, step, 0, 1, CPU)
        with autocast, torch.no_grad():
            micros = objective.prepare(context.model, source.next(step, 0, 1), here)
        for micro in micros:
            with autocast:
                loss, _ = objective.loss(context.model, micro, here)
            (gradient,) = torch.autograd.grad(loss, [context.model.meta_queries])
            numbers += [loss.detach(), gradient]
    source.state_dict(steps)
    return numbers


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) > 0 and all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*/*/*{SUFFIX}"))


# -- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_with_and_without_a_cache_all_numbers_are_the_same(
    model: UnifiedModel, tmp_path: Path, shard: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a cache, in memory, while filling the disk cache, and from the filled one, which decodes no image."""
    own = f"model.precision={precision}"
    memory = make_context(model, tmp_path, own)
    disk = make_context(model, tmp_path, own, f"data.cache_dir={tmp_path / 'cache'}")
    parts = encoder_cache.make_cache(memory).parts
    assert set(parts) == {LATENT, FEATURES}
    expected = train(memory, EncodingCache(parts, MemoryStore(0)))
    assert same(train(memory), expected)
    assert same(train(disk), expected)
    assert files(tmp_path / "cache")
    monkeypatch.setattr("deepgen.data.loading.dataset.usable_image", lambda *_: pytest.fail("an image was decoded"))
    assert same(train(disk), expected)


def test_an_image_seen_before_is_the_image(model: UnifiedModel) -> None:
    image = torch.rand(3, 64, 96) * 2 - 1
    seen = model.see_image(image)
    assert seen.features.shape == (2, 3, model.architecture.vlm_hidden)
    direct, again = (model.encode_prompts(["make it red"], [[one]]) for one in (image, seen))
    assert torch.equal(direct.context, again.context) and torch.equal(direct.pooled, again.pooled)
    two = model.encode_prompts(["a", "b"], [[image, image.flip(1)], [image]])
    seen_two = model.encode_prompts(["a", "b"], [[seen, model.see_image(image.flip(1))], [seen]])
    torch.testing.assert_close(two.context, seen_two.context, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="1 of 2 images have been seen"):
        model.encode_prompts(["a"], [[image, seen]])


def test_what_lora_or_zero_3_forbid_is_not_kept(tmp_path: Path, shard: str) -> None:
    """Our LoRA does not change the tower; an imported one on all modules has dropout there."""
    split = make_context(make_tiny_model(), tmp_path, "train.zero_stage=3")
    assert FEATURES not in encoder_cache.make_cache(split).parts
    for modules, kept in (("live", True), ("all", False)):
        model = make_tiny_model()
        add_lora(model.vlm, LoraSettings(rank=2, modules=modules), model.architecture.fusion_layers[0])
        context = make_context(model, tmp_path, f"data.cache_dir={tmp_path / modules}")
        assert (FEATURES in encoder_cache.make_cache(context).parts) == kept
        if not kept:  # the VLM needs the pixels even if the latents are cached
            model.eval()
            assert same(train(context), train(context))
            assert files(tmp_path / modules) and not list((tmp_path / modules).glob(f"{FEATURES}-*"))


def test_memory_is_bounded() -> None:
    calls: list[int] = []

    def encode(image: Tensor) -> Tensor:
        calls.append(round((float(image[0, 0, 0]) + 1) * 127.5))
        return image[0, 0] * 2

    cache = EncodingCache({LATENT: encode}, MemoryStore(max_bytes=2 * 8 * 4))
    for _ in range(2):
        for row in range(3):
            key, kept = cache.find(("a", row, 0), b"", [LATENT])
            pixels = torch.full((1, 8, 3), row, dtype=torch.uint8)
            made = cache.get(LATENT, Picture(pixels, kept, key))
            torch.testing.assert_close(made, torch.full((8,), 2 * (row / 127.5 - 1)))
    assert calls == [0, 1, 2, 2]
    key, _ = cache.find(("a", 2, 0), b"", [LATENT])
    with pytest.raises(ValueError, match="its pixels are needed"):
        cache.get(LATENT, Picture(None, {}, key))


def test_a_bad_record_leaves_nothing(model: UnifiedModel, tmp_path: Path) -> None:
    """The target is intact, the only reference is truncated."""
    records = [replace(r, references=(r.image[:40],)) if r.references and r.image else r for r in make_records()]
    write_records(tmp_path / "train.parquet", records)
    context = make_context(model, tmp_path, f"data.cache_dir={tmp_path / 'cache'}", "data.max_bad_share=1")
    assert same(train(context), train(make_context(model, tmp_path, "data.max_bad_share=1")))
    store: Any = encoder_cache.make_cache(context).store
    file = str(tmp_path / "train.parquet")
    for row, record in enumerate(records, 1):
        assert record.image is not None
        key = store.key((file, row, 0), record.image)
        assert (store.find(LATENT, key, refresh=True) is None) == bool(record.references)


# -- what makes it stale ---------------------------------------------------------------------------------------------


def test_each_part_of_the_key_has_a_folder_of_its_own(tmp_path: Path, shard: str, monkeypatch: Any) -> None:
    model = make_tiny_model()

    def folders(*overrides: str) -> dict[str, str]:
        before = set(tmp_path.glob("cache/*"))
        encoder_cache.make_cache(make_context(model, tmp_path, f"data.cache_dir={tmp_path / 'cache'}", *overrides))
        return {path.name.partition("-")[0]: path.name for path in set(tmp_path.glob("cache/*")) - before}

    assert set(folders()) == {LATENT, FEATURES}
    assert folders() == folders("data.caption_drop=0.5", "run.seed=3", "train.learning_rate=1") == {}
    assert set(folders("data.image_size=128")) == set(folders("model.precision=bf16")) == {LATENT, FEATURES}
    with torch.no_grad():
        next(model.vae.encoder.parameters()).view(-1)[0] += 1e-3
    assert set(folders()) == {LATENT}
    model.vae.register_to_config(scaling_factor=2.0)
    assert set(folders()) == {LATENT}
    with torch.no_grad():
        next(model.vlm.model.visual.parameters()).view(-1)[0] += 1e-3
        next(model.transformer.parameters()).view(-1)[0] += 1e-3  # cached encodings do not depend on it
    assert set(folders()) == {FEATURES}
    monkeypatch.setattr(encoder_cache, "PREPARATION", 1000)
    assert set(folders()) == {LATENT, FEATURES}
    monkeypatch.setattr(encoder_cache, "version", lambda package: "0.0")
    assert set(folders()) == {LATENT, FEATURES}


def value(number: float) -> Tensor:
    return torch.full((2, 2), float(number))


def lookup(store: DiskStore, shard: str, image: bytes | str, part: str = LATENT) -> Tensor | None:
    key = store.key((shard, 1, 0), image)
    return None if key is None else store.find(part, key, refresh=True)


def put(store: DiskStore, shard: str, image: bytes | str, made: Tensor, part: str = LATENT) -> None:
    key = store.key((shard, 1, 0), image)
    assert key is not None
    store.put(part, key, made)


def test_a_changed_shard_or_image_is_never_served(tmp_path: Path, shard: str) -> None:
    store = DiskStore(tmp_path / "cache", ABOUT)
    put(store, shard, b"image", value(1))
    store.flush()
    fresh = DiskStore(tmp_path / "cache", ABOUT)
    found = lookup(fresh, shard, b"image")
    assert found is not None and torch.equal(found, value(1))
    assert lookup(fresh, shard, b"imagf") is None  # other bytes in the same place
    assert lookup(fresh, shard, b"image", FEATURES) is None
    assert lookup(DiskStore(tmp_path / "cache", {LATENT: {"weights": "3"}}), shard, b"image") is None
    copy = tmp_path / "elsewhere" / "train.parquet"
    copy.parent.mkdir()
    copy.write_bytes(Path(shard).read_bytes())
    assert lookup(fresh, str(copy), b"image") is not None  # the same shard
    write_records(Path(shard), make_records()[:-1], row_group_size=4)
    assert lookup(DiskStore(tmp_path / "cache", ABOUT), shard, b"image") is None


def test_images_that_stay_where_they_are(tmp_path: Path, shard: str) -> None:
    store, image = DiskStore(tmp_path / "cache", ABOUT), tmp_path / "a picture.png"
    image.write_bytes(b"first")
    path = DataUri(str(image), reach_of(tmp_path))
    for uri in (path, DataUri(f"file://{str(image).replace(' ', '%20')}", path.reach)):
        put(store, shard, uri, value(1))
        assert lookup(store, shard, uri) is not None
    image.write_bytes(b"later one")
    assert lookup(store, shard, path) is None
    assert store.key((shard, 1, 0), str(image)) is None  # of no data set; the decoder reports the fault
    image.unlink()
    assert store.key((shard, 1, 0), path) is None
    put(store, shard, "s3://bucket/image.png", value(2))
    assert lookup(store, shard, "s3://bucket/image.png") is not None


# -- several writers, kills, full disks ------------------------------------------------------------------------------


def test_two_writers_fill_one_folder(tmp_path: Path, shard: str) -> None:
    """They write overlapping encodings at the same time, and each also finds those of the other."""
    stores = [DiskStore(tmp_path / "cache", ABOUT, pending_bytes=64) for _ in range(2)]

    def fill(store: DiskStore, numbers: range) -> None:
        for number in numbers:
            put(store, shard, b"%d" % number, value(number))

    numbers = (range(60), range(40, 100))
    threads = [threading.Thread(target=fill, args=pair) for pair in zip(stores, numbers, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for store in stores:
        store.flush()
    for store in (*stores, DiskStore(tmp_path / "cache", ABOUT)):
        for number in range(100):
            found = lookup(store, shard, b"%d" % number)
            assert found is not None and torch.equal(found, value(number))
    assert not list((tmp_path / "cache").rglob(f"*{WRITING}"))


@pytest.mark.processes
def test_a_killed_writer_leaves_nothing_to_be_read(tmp_path: Path, shard: str, monkeypatch: Any) -> None:
    """The writer is killed with half of its file written. A process that starts an hour later cleans up."""
    child = os.fork()
    if child == 0:
        try:
            own = DiskStore(tmp_path / "cache", ABOUT)
            put(own, shard, b"image", value(1))
            monkeypatch.setattr(os, "fsync", lambda _: os._exit(9))
            own.flush()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    (left,) = (tmp_path / "cache").rglob(f"*{WRITING}")
    assert left.stat().st_size > 0
    store = DiskStore(tmp_path / "cache", ABOUT)
    assert lookup(store, shard, b"image") is None and left.exists()  # another process may still be writing it
    put(store, shard, b"image", value(1))
    store.flush()
    os.utime(left, (time.time() - 7200,) * 2)
    assert lookup(DiskStore(tmp_path / "cache", ABOUT), shard, b"image") is not None
    assert not left.exists()


def test_a_resume_finds_what_the_last_checkpoint_had(
    model: UnifiedModel, tmp_path: Path, shard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = make_context(model, tmp_path, f"data.cache_dir={tmp_path / 'cache'}")
    objective, source = make_source(context)
    batch = source.next(0, 0, 1)
    objective.prepare(model, batch, StepContext(1, 0, 0, 1, CPU))
    assert not files(tmp_path / "cache")
    source.state_dict(1)
    assert len(files(tmp_path / "cache")) == 2
    _, resumed = make_source(context)
    monkeypatch.setattr("deepgen.data.loading.dataset.usable_image", lambda *_: pytest.fail("an image was decoded"))
    for before, after in zip(batch, resumed.next(0, 0, 1), strict=True):
        assert before.prompts == after.prompts
        assert all(picture.pixels is None and LATENT in picture.kept for picture in after.targets)
        assert all({LATENT, FEATURES} == set(p.kept) for pictures in after.references for p in pictures)


def test_a_full_disk_ends_the_run_and_leaves_nothing_half(tmp_path: Path, shard: str, monkeypatch: Any) -> None:
    store = DiskStore(tmp_path / "cache", ABOUT)
    put(store, shard, b"image", value(1))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError) as caught:
            store.flush()
    message = str(caught.value)
    assert message.startswith(f"data.cache_dir: cannot write {tmp_path / 'cache' / 'latent-'}") and "\n" not in message
    assert "No space left on device; make room" in message and "--resume" in message
    assert not files(tmp_path / "cache") and not list((tmp_path / "cache").rglob(f"*{WRITING}"))
    store.flush()  # now there is room
    assert lookup(DiskStore(tmp_path / "cache", ABOUT), shard, b"image") is not None


def test_a_damaged_file_is_named(tmp_path: Path, shard: str) -> None:
    store = DiskStore(tmp_path / "cache", ABOUT)
    put(store, shard, b"image", value(1))
    store.flush()
    (file,) = files(tmp_path / "cache")
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"delete it, then continue with --resume") as caught:
        lookup(DiskStore(tmp_path / "cache", ABOUT), shard, b"image")
    assert str(caught.value).startswith(f"data.cache_dir: {file} cannot be read")


def test_a_folder_that_cannot_be_written_is_refused_before_the_start(tmp_path: Path) -> None:
    (tmp_path / "weights" / "transformer").mkdir(parents=True)
    (tmp_path / "weights" / "transformer" / "config.json").write_text(json.dumps(dict(DEEPGEN_5B.transformer)))
    (tmp_path / "file").write_text("")
    common = [f"run.dir={tmp_path / 'runs'}", f"model.weights={tmp_path / 'weights'}"]
    bad = tmp_path / "file" / "cache"
    with pytest.raises(UserError) as caught:
        prepare_run(load_settings(None, [*common, f"data.cache_dir={bad}"]), "sft")
    assert str(caught.value) == (
        f"data.cache_dir: got {str(bad)!r}, which cannot be written (Not a directory); allowed: a folder to write to, "
        "or empty for none"
    )
    prepare_run(load_settings(None, [*common, "data.cache_dir="]), "sft")
    with pytest.raises(UserError, match=r"data\.cache_dir: cannot write .*Not a directory"):
        DiskStore(bad, ABOUT)


def test_the_path_is_absolute_and_empty_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_settings(None, ["data.cache_dir=kept"]).data.cache_dir == str(tmp_path / "kept")
    assert load_settings(None, ["data.cache_dir="]).data.cache_dir == ""


def test_little_of_it_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pending encodings are written in time, and the index drops shards that have not been used for long."""
    monkeypatch.setattr(disk_store, "MOST_ENTRIES", 10)
    shards = []
    for number in range(4):
        shards.append(str(tmp_path / f"{number}.parquet"))
        write_records(Path(shards[-1]), make_records()[number:], row_group_size=4)
    store = DiskStore(tmp_path / "cache", ABOUT, pending_bytes=100)
    for number in range(32):
        put(store, shards[number % 4], b"%d" % number, value(number))
        assert sum(len(waiting) for waiting in store._pending.values()) <= 100 // 16
    for number in range(32):
        found = lookup(store, shards[number % 4], b"%d" % number)
        assert found is not None and torch.equal(found, value(number))
        assert sum(len(shard.entries) for shard in store._shards.values()) <= 16
