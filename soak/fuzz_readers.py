"""For each kind of input: makes one from a seed, and hands it to the code that reads it in training or conversion.

Every function returns whether something of the input was taken; what is left out of it has a reason.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import asdict
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file

from actors.learner.checkpoints.checkpoint_shards import ENGINE, ShardReader, is_as_written, write_shard
from actors.learner.checkpoints.checkpoint_store import FORMAT, MANIFEST, Manifest, newest_checkpoint
from deepgen.config import load_settings
from deepgen.config.recipes import find_recipe
from deepgen.data.conversion.convert_units import Limits, convert_unit
from deepgen.data.conversion.raw_data import FORMS, guess_form, plan_units, source_files
from deepgen.data.conversion.readers.raw_sample import RawData
from deepgen.data.images import header_size, usable_image
from deepgen.data.loading.parquet_store import ParquetStore
from deepgen.data.parquet import read_rows
from deepgen.data.quarantine import FILES, rows_in
from deepgen.data.records import Record, RecordError
from deepgen.data.uris import absolute, read_uri
from deepgen.errors import UserError
from deepgen.models.weights_io.tensor_files import open_safetensors
from deepgen.reading import bucket_reader
from deepgen.tracking.journal import FILE_NAME as METRICS
from deepgen.tracking.journal import Journal, make_entry, read_entries
from deepgen.tracking.status import STATUS, Call, Rank, Status, read_status, status_to_json, write_status
from soak import fuzz_inputs

_STEP, _SHARD, _WEIGHTS = "checkpoints/step-000001", f"{ENGINE}-0.safetensors", "weights/model.safetensors"
_QUARANTINE = FILES["data.train"]
_LIMITS = Limits(min_side=8)


def pictures(chance: random.Random, folder: Path) -> bool:
    """As training and conversion open one."""
    data = fuzz_inputs.picture(chance)
    header_size(data)
    try:
        usable_image(data, "image")
    except ValueError as error:
        if not str(error).strip():
            raise AssertionError("no reason") from error
        return False
    return True


def archives(chance: random.Random, folder: Path) -> bool:
    """A tar, converted."""
    seed, other = chance.choices(fuzz_inputs.tars(), k=2)
    name = "a.tar" if seed[:2] not in (b"\x1f\x8b", b"\xfd7") else "a.tar.gz" if seed[0] == 0x1F else "a.tar.xz"
    return _converted(folder, name, fuzz_inputs.damaged(chance, seed, other), chance)


def tables(chance: random.Random, folder: Path) -> bool:
    """Parquet and Arrow, as training data, as prompts and converted."""
    name, content = fuzz_inputs.choose(chance, fuzz_inputs.tables)
    return _trained_on(folder / name, content) | _converted(folder, name, content, chance)


def _trained_on(file: Path, content: bytes) -> bool:
    """Read all of a file as a training does."""
    file.write_bytes(content)
    try:
        store = ParquetStore(file)
        store.sizes()
        store.sources()
    except UserError:
        return False
    return sum(_is_record(store, index) for index in range(len(store.tasks))) > 0


def _is_record(store: ParquetStore, index: int) -> bool:
    try:
        store.read(index)
    except (RecordError, UserError):
        return False
    return True


def lists(chance: random.Random, folder: Path) -> bool:
    """JSON, JSON lines, CSV and text, as prompts and converted."""
    name, content = fuzz_inputs.choose(chance, fuzz_inputs.lists)
    return _converted(folder, name, content, chance)


def _converted(folder: Path, name: str, content: bytes, chance: random.Random) -> bool:
    """Read a file as prompts and convert it, in the form that is guessed or in any."""
    source, out = folder / "source", folder / "out"
    source.mkdir()
    (source / name).write_bytes(content)
    (source / "a.png").write_bytes(fuzz_inputs.pictures()[0])
    (source / "a.txt").write_text("a sign", encoding="utf-8")
    try:
        taken = any(isinstance(row.record, Record) for row in read_rows(source / name))
    except UserError:
        taken = False
    form = guess_form(source / name) if chance.random() < 0.8 else chance.choice(list(FORMS))
    raw = RawData(source / name, form, "t2i", name="fuzz")
    kept = sum(convert_unit(raw, unit, out, _LIMITS, 0).kept for unit in plan_units(raw, 8, source_files(raw).files))
    return taken or kept > 0


def recipes(chance: random.Random, folder: Path) -> bool:
    """A recipe and an override."""
    path = folder / "recipe.yaml"
    shutil.copy(find_recipe(chance.choice(("tiny-rl", "tiny-sft", "deepgen-5b-pretrain"))), path)
    fuzz_inputs.damaged_file(chance, path)
    key = chance.choice(("train.steps", "run.name", "rewards.weights", "data.weights", "model", "data.train", "x"))
    value = fuzz_inputs.damaged(chance, b"{a: 1, b: [2, 3]}", b"1e400").decode("utf-8", "replace")
    load_settings(path, [f"{key}={value}"] if chance.random() < 0.5 else [])
    return True


def addresses(chance: random.Random, folder: Path) -> bool:
    """An address in a record, relative to its folder. Of buckets only the name is read: their client is not ours."""
    bucket_reader._system = _no_bucket  # type: ignore[assignment]
    (folder / "a.png").write_bytes(fuzz_inputs.pictures()[0])
    read_uri(absolute(fuzz_inputs.address(chance), folder))
    return True


def _no_bucket(base: str) -> Any:
    raise OSError("no connection is made here")


def manifests(chance: random.Random, folder: Path) -> bool:
    """A damaged file among those that a resume, an export or --status reads of a run."""
    made = _run()
    for name, content in made.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    name = chance.choice(list(made))
    fuzz_inputs.damaged_file(chance, folder / name)
    if name == _QUARANTINE:
        return bool(rows_in(folder / name))
    if name == METRICS:
        Journal(folder, resume=True).close()
        return bool(list(read_entries(folder / name)))
    if name == STATUS:
        return read_status(folder) is not None
    if name == _WEIGHTS:
        return bool(open_safetensors(folder / name))
    if newest_checkpoint(folder / "checkpoints") is None or not is_as_written(folder / _STEP / _SHARD):
        return False
    return bool(ShardReader(folder / _STEP, ENGINE, 0).read("a", 0, 8).isfinite().all())


@cache
def _run() -> dict[str, bytes]:
    """Files of a small run, by name."""
    with TemporaryDirectory() as made:
        folder = Path(made)
        (folder / _STEP).mkdir(parents=True)
        files = write_shard(folder / _STEP, ENGINE, 0, [("a", 0, torch.arange(8.0))])
        sizes = {file.name: file.stat().st_size for file in files}
        manifest = Manifest(FORMAT, 1, "rl", "tiny", 1, 1, False, "a", "assets/tiny/model", {}, {}, {}, sizes)
        (folder / _STEP / MANIFEST).write_text(json.dumps(asdict(manifest)), encoding="utf-8")
        (folder / "weights").mkdir()
        save_file({"meta_queries": torch.ones(2, 3)}, folder / _WEIGHTS, {"lora_alpha": "8"})
        rows = [{"file": "a.parquet", "row": row, "id": "a", "reason": "x"} for row in (1, 2)]
        (folder / _QUARANTINE).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        journal = Journal(folder, resume=False)
        for step in (1, 2):
            journal.append(make_entry(step, 0.0, {"loss/total": 0.5, "reward/mean": None}))
        journal.close()
        call = Call("rollout-0", "group 1", 0.0)
        counts = {"rollout": 1}
        status = Status(1.0, False, 2, 1, counts, (call,), (), (Rank(0, 1, True, 0.0),), counts, counts, counts)
        write_status(folder, status_to_json(status))
        return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
