"""`stages/export.py` of a run: of its result, or of a checkpoint as long as it has not finished."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from actors.learner.checkpoints.checkpoint_shards import ENGINE, write_shard
from actors.learner.checkpoints.checkpoint_store import MANIFEST, CheckpointStore
from actors.learner.ema import Ema
from actors.learner.worker import load_model
from deepgen.config import UserError, load_settings
from deepgen.fingerprint import fingerprint
from deepgen.models.unified import UnifiedModel
from deepgen.models.vlm import LoraSettings
from stages import export
from stages.exporting.drawn_weights import component_folder
from stages.exporting.export_run import padding_of
from tests.helpers.exported_pipeline import load_pipeline
from tests.helpers.factories import make_tiny_folder

STEPS = 9


class Run:
    """A run as the learner writes it, whose training only adds to the weights."""

    def __init__(self, folder: Path, weights: Path, stage: str, *more: str) -> None:
        own = [f"run.dir={folder}", "run.name=a", f"model.weights={weights}", "model.preset=tiny", "model.lora_rank=2"]
        steps = [f"train.steps={STEPS}", "train.warmup_steps=0", "train.keep_checkpoints=9"]
        self.settings = load_settings(None, [*own, *steps, *more])
        self.folder, self.stage = folder / "a", stage
        self.model = load_model(self.settings, stage)
        self.trained = self.model.trainable_parameters(stage)
        self.ema = Ema(self.trained, 0.5) if self.settings.train.ema_decay else None

    @torch.no_grad()
    def save(self, step: int) -> Path:
        """Train up to this step, and write its checkpoint as two ranks do."""
        for _, parameter in self.trained:
            parameter.add_(torch.randn(parameter.shape, generator=torch.manual_seed(step)))
        if self.ema:
            self.ema.update(self.trained, step)
        engine: Any = SimpleNamespace(rank=0, world=1, zero_stage=0, parameters=self.trained)
        engine.pieces = lambda: self._pieces(0)
        store = CheckpointStore(self.settings, self.stage)
        store.save(step, engine, self.ema, {}, self._write_rank_1)
        store.finish()
        return store.path(step)

    def _write_rank_1(self, folder: Path) -> None:
        write_shard(folder, ENGINE, 1, self._pieces(1))

    def _pieces(self, rank: int) -> list[tuple[str, int, torch.Tensor]]:
        """Each rank holds about a half of every parameter."""
        found = []
        for name, parameter in self.trained:
            flat = parameter.detach().flatten()
            half = flat.numel() // 2
            found.append((f"weight:{name}", half * rank, flat[:half] if rank == 0 else flat[half:]))
        return found

    def finish(self) -> None:
        self.model.save_folder(self.folder / "model")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base weights with a LoRA, as after sft."""
    folder = tmp_path_factory.mktemp("weights")
    plain = make_tiny_folder(folder / "plain")
    model = UnifiedModel.from_folder(plain, lora=LoraSettings(rank=2, alpha=3))
    model.save_folder(folder / "sft")
    shutil.copytree(plain, folder / "base")
    shutil.rmtree(folder / "base" / "bridge")
    return folder


@pytest.fixture
def run_of(weights: Path, tmp_path: Path) -> Callable[..., Run]:
    def make(stage: str = "rl", base: str = "sft", *more: str) -> Run:
        return Run(tmp_path / "runs", weights / base, stage, *more)

    return make


@pytest.fixture
def run_export(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """A function that calls the program with a source and options, and returns what it wrote."""

    def call(source: Path, *options: str | Path) -> Path:
        out = tmp_path / f"out-{len(list(tmp_path.glob('out-*')))}"
        monkeypatch.setattr(sys, "argv", ["export.py", str(source), str(out), *map(str, options)])
        try:
            assert export.main() == 0
        except UserError:
            assert not list(tmp_path.glob(f"*{out.name}*"))
            raise
        return out

    return call


def same(folder: Path, model: UnifiedModel) -> bool:
    found, wanted = UnifiedModel.from_folder(folder).state_dict(), model.state_dict()
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("stage", "base", "more"),
    [
        ("pretrain", "base", ("model.fresh_bridge=true",)),  # the base has no bridge
        ("pretrain", "plain", ()),
        ("sft", "plain", ("model.lora_alpha=5",)),  # a new LoRA
        ("sft", "sft", ("model.lora_alpha=3",)),
        ("sft", "sft", ("model.lora_rank=0",)),  # goes on with the folder's LoRA, whatever its rank
        ("sft", "plain", ("model.lora_rank=0",)),
        ("rl", "sft", ()),
        ("rl", "plain", ()),
    ],
)
def test_a_checkpoint_of_every_stage(
    run_of: Callable[..., Run], run_export: Callable[..., Path], stage: str, base: str, more: tuple[str, ...]
) -> None:
    run = run_of(stage, base, *more)
    out = run_export(run.save(1))
    assert same(out, run.model)
    run.finish()
    config = Path("vlm_lora", "adapter_config.json")
    if (run.folder / "model" / config).exists():
        then, now = (json.loads((folder / config).read_text()) for folder in (run.folder / "model", out))
        assert (then["r"], then["lora_alpha"]) == (now["r"], now["lora_alpha"])


def test_a_checkpoint_that_diffusers_draws_from(
    run_of: Callable[..., Run], run_export: Callable[..., Path], tmp_path: Path
) -> None:
    run = run_of("rl", "sft", "model.padding=reference")
    out = run_export(run.save(1), "--layout", "diffusers")
    pipe = load_pipeline(out, tmp_path / "code")
    assert pipe.config.padding == padding_of(out) == "reference"
    found, wanted = pipe.transformer.state_dict(), run.model.transformer.state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert pipe("a cat", num_inference_steps=1, height=64, width=96).images[0].size == (96, 64)
    run.finish()
    assert padding_of(run_export(run.folder, "--layout", "diffusers")) == "reference"
    assert padding_of(run.folder / "model") == "reference"


def test_the_newest_checkpoint_until_the_run_has_finished(
    run_of: Callable[..., Run], run_export: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of()
    first = run.save(4)
    early = load_file(run_export(first, "--layout", "native") / "model.safetensors")
    run.save(6)
    (run.folder / "checkpoints" / ".writing-step-000008").mkdir()
    assert same(run_export(run.folder), run.model)
    assert "step-000006: checkpoint of step 6 (rl) layout" in capsys.readouterr().out
    again = load_file(run_export(first, "--layout", "native") / "model.safetensors")
    assert all(torch.equal(early[name], again[name]) for name in early)
    run.save(STEPS)
    run.finish()
    run_export(run.folder)
    assert "a/model: components layout" in capsys.readouterr().out
    shutil.rmtree(run.folder / "checkpoints")
    assert same(run_export(run.folder), run.model)


def test_a_run_that_went_on_after_its_end(run_of: Callable[..., Run], run_export: Callable[..., Path]) -> None:
    """Its result is of the steps before."""
    run = run_of()
    run.save(STEPS)
    run.finish()
    longer = run_of("rl", "sft", f"train.steps={STEPS + 9}")
    longer.save(STEPS + 1)
    assert same(run_export(run.folder), longer.model)


def test_averages(run_of: Callable[..., Run], run_export: Callable[..., Path]) -> None:
    run = run_of("rl", "sft", "train.ema_decay=0.5")
    folder = run.save(1)
    assert run.ema
    found = load_file(run_export(run.folder, "--ema", "--layout", "native") / "model.safetensors")
    assert all(torch.equal(found[name], average) for name, average in run.ema.parts.items())
    assert same(run_export(folder), run.model)
    run.save(STEPS)
    run.finish()
    (run.folder / "model").rename(run.folder / "model-ema")
    assert same(run_export(run.folder, "--ema"), run.model)


def test_averages_that_are_not_there(
    run_of: Callable[..., Run], run_export: Callable[..., Path], weights: Path
) -> None:
    run = run_of()
    folder = run.save(1)
    for source in (run.folder, folder):
        with pytest.raises(UserError, match=r"--ema: got .*step-000001, which has no averages; allowed: a run with"):
            run_export(source, "--ema")
    with pytest.raises(UserError, match=r"--ema: got .*sft; allowed: a run with train\.ema_decay, or one of its"):
        run_export(weights / "sft", "--ema")


def test_base_weights_that_have_moved(
    run_of: Callable[..., Run], run_export: Callable[..., Path], weights: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(weights / "sft", tmp_path / "base"))
    run = Run(tmp_path / "runs", base, "rl")
    run.save(1)
    base.rename(tmp_path / "moved")
    with pytest.raises(
        UserError, match=r"step-000001: .* model\.weights, .*base, which is not there; give --base FOLDER"
    ):
        run_export(run.folder)
    assert same(run_export(run.folder, "--base", tmp_path / "moved"), run.model)
    with pytest.raises(UserError, match=r"--base: .*plain is not what the checkpoint .*step-000001 was trained from"):
        run_export(run.folder, "--base", weights / "plain")
    shutil.copytree(weights / "plain", base)
    with pytest.raises(UserError, match=r"model\.weights: .*base is not what the checkpoint .* the folder has changed"):
        run_export(run.folder)


def test_a_run_without_a_checkpoint(run_of: Callable[..., Run], run_export: Callable[..., Path]) -> None:
    run = run_of()
    writing = run.folder / "checkpoints" / ".writing-step-000001"
    writing.mkdir(parents=True)
    with pytest.raises(UserError, match=r"runs/a: the run has no complete checkpoint yet"):
        run_export(run.folder)
    write_shard(writing, ENGINE, 0, [("weight:transformer.proj_out.bias", 0, torch.ones(3))])
    with pytest.raises(UserError, match=r"\.writing-step-000001: not a complete checkpoint"):
        run_export(writing)


@pytest.mark.parametrize("damage", ["manifest", "short", "byte", "format", "hole"])
def test_damaged_checkpoints(run_of: Callable[..., Run], run_export: Callable[..., Path], damage: str) -> None:
    folder = run_of().save(1)
    shard, manifest = folder / "engine-1.safetensors", folder / MANIFEST
    content = shard.read_bytes()
    if damage == "manifest":
        manifest.write_text("{")
    elif damage == "short":
        shard.write_bytes(content[:-1])
    elif damage == "byte":
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "format":
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 3}))
    else:
        kept = json.loads(manifest.read_text())
        kept["files"] = {name: size for name, size in kept["files"].items() if "engine-1" not in name}
        manifest.write_text(json.dumps(kept))
        shard.unlink()
    message = {
        "manifest": r"step-000001: not a complete checkpoint; manifest\.json",
        "short": r"step-000001: not a complete checkpoint",
        "byte": r"engine-1\.safetensors: has changed since it was written",
        "format": r"manifest\.json: checkpoint format 3; allowed: 4",
        "hole": r"step-000001: \d+ of \d+ elements of weight:transformer\.\S+ from 0 on are not there",
    }[damage]
    with pytest.raises(UserError, match=message):
        run_export(folder)


@pytest.mark.parametrize("option", ["--vlm", "--dit", "--variant"])
def test_options_that_a_checkpoint_does_not_need(
    run_of: Callable[..., Run], run_export: Callable[..., Path], weights: Path, option: str
) -> None:
    with pytest.raises(UserError, match=rf"{option}: got .*plain with the checkpoint .*; allowed: --base"):
        run_export(run_of().save(1), option, weights / "plain")


def test_weights_to_draw_with_are_there_as_long_as_they_are_needed(run_of: Callable[..., Run], tmp_path: Path) -> None:
    run = run_of()
    checkpoint, out = run.save(1), tmp_path / "out"
    killed = tmp_path / ".out.weights-killed"
    killed.mkdir()
    options: dict[str, Any] = {"averages": False, "base": None}
    with component_folder(checkpoint, out, **options) as first, component_folder(run.folder, out, **options) as second:
        assert not killed.exists() and first != second
        assert same(first, run.model) and same(second, run.model)
        assert fingerprint(first) == fingerprint(second)
    assert not list(tmp_path.glob(".out*"))
    with pytest.raises(UserError, match="nowhere"), component_folder(tmp_path / "nowhere", out, **options):
        pass


def test_a_fingerprint_sees_behind_links(tmp_path: Path) -> None:
    for name, content in (("one", b"1"), ("two", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(content)
    (tmp_path / "model").mkdir()
    found = set()
    for name in ("one", "two"):
        link = tmp_path / "model" / "part"
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / name)
        found.add(fingerprint(tmp_path / "model"))
    assert len(found) == 2
