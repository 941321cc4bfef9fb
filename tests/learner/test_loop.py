"""The learner loop: one step a batch, equal on all ranks and ZeRO stages, exact after a kill, clear refusals."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from actors.learner import checkpoint_store as checkpoints
from actors.learner.checkpoint_store import CheckpointStore
from actors.learner.engine import parameter_groups
from actors.learner.loop import reduce_metrics
from actors.learner.lr_schedule import learning_rate
from actors.learner.preflight import own_folder, prepare_run, resolve_weights
from actors.learner.protocols import StepContext
from actors.objectives.flow_matching import FlowMatching
from actors.objectives.record_source import MixtureSource
from deepgen.algorithms.losses import flow_matching_loss
from deepgen.config import UserError, load_settings
from deepgen.data.cache.encoded import EncodingCache, MemoryStore
from deepgen.data.loading.dataset import LATENT, TrainingSet
from deepgen.data.loading.mixture import Mixture
from deepgen.data.loading.parquet_store import ListStore
from deepgen.data.parquet import write_records
from deepgen.data.quarantine import Quarantine
from deepgen.data.records import Record
from deepgen.models.presets import DEEPGEN_5B
from deepgen.tracking.journal import read_series
from tests.helpers.factories import make_tiny_folder
from tests.helpers.learner_workers import ROOT, run_workers
from tests.helpers.toy import STEPS, TOY, ToyModel, check_toy, plain_torch, toy_result, toy_run

SFT = ROOT / "stages" / "sft.py"


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_zero_stage_is_plain_training_with_one_step_a_batch(tmp_path: Path, world: int) -> None:
    """The same global batch on 1, 2 and 4 workers, all stages: losses, norms, weights, averages of plain torch."""
    runs = [
        toy_run(tmp_path, f"zero{stage}", f"train.zero_stage={stage}", f"train.workers={world}", "train.ema_decay=0.9")
        for stage in range(4)
    ]
    run_workers(tmp_path, runs, world=world)
    expected = plain_torch()
    for stage in range(4):
        check_toy(tmp_path, f"zero{stage}", expected)
        log = [json.loads(line) for line in (tmp_path / f"zero{stage}.jsonl").read_text().splitlines()]
        assert [entry["step"] for entry in log] == list(range(STEPS + 1))
        for entry, figures in zip(log[::2], expected.evaluations, strict=True):
            assert {k: v for k, v in entry.items() if k.startswith("heldout")} == pytest.approx(figures, rel=1e-5)
        del log[0]  # what the run started from
        np.testing.assert_allclose([entry["train/grad_norm"] for entry in log], expected.norms, rtol=1e-4)
        np.testing.assert_allclose([entry["loss/total"] for entry in log], expected.losses, rtol=1e-5)


@pytest.mark.processes
@pytest.mark.slow
def test_a_killed_run_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    """Bit for bit, with noise from torch's generator: ended between two checkpoints, or by SIGKILL while it writes one.

    Shards come in pairs, the engine's and the averages': the fourth is cut short with all else of step 4 on the disk.
    """
    for stage, death, code in ((0, {"die_after": 5}, 9), (2, {"die_writing": 4}, -signal.SIGKILL)):
        options = (f"train.zero_stage={stage}", "train.ema_decay=0.9")
        whole = toy_run(tmp_path / "whole", f"zero{stage}", *options, noise=0.3)
        cut = toy_run(tmp_path / "cut", f"zero{stage}", *options, noise=0.3)
        run_workers(tmp_path, [whole, cut | death], exit_code=code)
        run, log = tmp_path / "cut" / f"zero{stage}", tmp_path / "cut" / f"zero{stage}.jsonl"
        assert not (run / "model").exists()
        if stage == 2:
            begun = run / "checkpoints" / ".writing-step-000004"
            names = ["ema-0.safetensors", "engine-0.blake2b", "engine-0.safetensors"]
            assert sorted(path.name for path in begun.iterdir()) == names
        run_workers(tmp_path, [cut | {"overrides": [*cut["overrides"], "run.resume=true"]}])
        # Steps since the last checkpoint are done twice; a step is logged once its checkpoint is written.
        again = [0, 1, 2, 3, 4, 5, 5, 6] if stage == 0 else [0, 1, 2, 3, 3, 4, 5, 6]
        assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == again
        for part in ("model", "model-ema"):
            expected, result = (toy_result(tmp_path / which, f"zero{stage}", part) for which in ("whole", "cut"))
            assert all(torch.equal(result[name], expected[name]) for name in expected)
        steps = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert steps == ["step-000002", "step-000004", "step-000006"]


def test_wherever_a_checkpoint_is_cut_the_one_before_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended before each single thing that is done to the disk: never half a checkpoint, and the next one is whole."""

    class Killed(BaseException):
        """Passes every `except`."""

    monkeypatch.setattr("torch.distributed.barrier", lambda: None)
    engine: Any = SimpleNamespace(rank=0, parameters=[])
    engine.save = lambda folder: (folder / "engine-0.safetensors").write_bytes(bytes(1000))
    newest: list[int] = []
    for operations in range(40):
        store = CheckpointStore(start(tmp_path, f"run.name=cut{operations}", "train.keep_checkpoints=1"), "rl")
        store.save(2, engine, None, {"step": 2})
        left = operations

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    if real.__name__ == "write_text":
                        real(arguments[0], arguments[1][:50])  # half a manifest
                    raise Killed
                return real(*arguments, **options)

            return call

        with monkeypatch.context() as patch, suppress(Killed):
            for owner, name in ((Path, "mkdir"), (Path, "write_text"), (Path, "rename"), (shutil, "rmtree")):
                patch.setattr(owner, name, counted(getattr(owner, name)))
            patch.setattr(checkpoints, "_flush", counted(checkpoints._flush))
            store.save(4, engine, None, {"step": 4})
        found = store.newest()
        assert found is not None and found.source == {"step": found.step}
        newest.append(found.step)
        store.save(4, engine, None, {"step": 4})
        assert [path.name for path in store.folder.iterdir()] == ["step-000004"]
        if left >= 0:
            break
    assert newest == sorted(newest) and newest.count(2) >= 6 and newest.count(4) >= 3


@pytest.mark.processes
def test_old_checkpoints_go_and_damaged_ones_are_passed_over(tmp_path: Path) -> None:
    run = toy_run(tmp_path, "a", "train.keep_checkpoints=2")
    run_workers(tmp_path, [run])
    settings = load_settings(None, run["overrides"])
    store = CheckpointStore(settings, "rl")
    newest = store.newest()
    assert newest is not None and newest.step == 6
    assert sorted(path.name for path in store.folder.iterdir()) == ["step-000004", "step-000006"]
    largest = max((tmp_path / "a/checkpoints/step-000006").glob("*.safetensors"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])
    newest = store.newest()
    assert newest is not None and newest.step == 4

    for changed, stage, says in [
        ([], "sft", "stage: got sft"),
        (["model.preset=tiny"], "rl", "model.preset: got tiny"),
        (["run.seed=1"], "rl", "run.seed: got 1"),
        (["data.temperature=2"], "rl", "data.temperature: got 2.0; allowed: 1.0"),
        (["data.weights={a: 1}"], "rl", "data.weights: got {'a': 1.0}; allowed: {}"),
        (["train.ema_decay=0.5"], "rl", "train.ema_decay: got above 0"),
        (["train.steps=3"], "rl", "train.steps: got 3"),
        ([f"model.weights={ROOT / 'tests' / 'golden'}"], "rl", "is not what the checkpoint"),
    ]:
        with pytest.raises(UserError, match=says) as caught:
            CheckpointStore(load_settings(None, [*run["overrides"], *changed]), stage).check_fits(newest)
        assert "step-000004" in str(caught.value) and "\n" not in str(caught.value)


# -- before anything starts ------------------------------------------------------------------------------------------


def start(tmp_path: Path, *overrides: str) -> Any:
    (tmp_path / "weights" / "transformer").mkdir(parents=True, exist_ok=True)
    (tmp_path / "weights" / "transformer" / "config.json").write_text(json.dumps(dict(DEEPGEN_5B.transformer)))
    own = [f"run.dir={tmp_path / 'runs'}", "run.name=a", f"model.weights={tmp_path / 'weights'}"]
    return load_settings(None, [*own, *overrides])


def test_a_new_run_keeps_the_old_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs" / "a" / "checkpoints" / "step-000002").mkdir(parents=True)
    older, aside = tmp_path / "runs" / "a", tmp_path / "runs" / "a.1"
    settings = prepare_run(start(tmp_path), "sft")

    def failing_start() -> None:
        with own_folder(settings):
            (older / "quarantine.jsonl").write_text("of the run that did not start")
            raise UserError("data.prompts: not to be read")

    with pytest.raises(UserError, match="not to be read"):
        failing_start()
    assert [path.name for path in older.iterdir()] == ["checkpoints"] and not aside.exists()
    assert "kept as" not in capsys.readouterr().out
    with own_folder(settings):
        pass
    assert (aside / "checkpoints" / "step-000002").is_dir() and not any(older.iterdir())
    assert "kept as" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["model.weights", "data.train", "data.cache_dir"])
def test_a_new_run_does_not_put_its_own_input_aside(tmp_path: Path, key: str) -> None:
    settings = start(tmp_path)
    shutil.copytree(tmp_path / "weights", tmp_path / "runs" / "a" / "model")
    (tmp_path / "runs" / "a" / "checkpoints" / "step-000002").mkdir(parents=True)
    inside = tmp_path / "runs" / "a" / ("cache" if key == "data.cache_dir" else "model")
    settings = start(tmp_path, f"{key}={inside}")
    with pytest.raises(
        UserError, match=rf"{key}: .* lies in the folder of run 'a', which .*; allowed: another run\.name"
    ):
        prepare_run(settings, "sft")


def test_what_cannot_start_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--resume: there is no run 'a'"):
        prepare_run(start(tmp_path, "run.resume=true"), "sft")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run\.dir: cannot write the run folder .*Not a directory"):
        prepare_run(start(tmp_path, f"run.dir={tmp_path / 'file' / 'runs'}"), "sft")
    (tmp_path / "weights" / "transformer" / "w").write_bytes(bytes(1000))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2000))
    with pytest.raises(UserError, match=r"run\.dir: .* MB free, this run needs about"):
        prepare_run(start(tmp_path), "sft")


def test_weights_of_an_earlier_run(tmp_path: Path) -> None:
    (tmp_path / "done" / "model" / "transformer").mkdir(parents=True)
    (tmp_path / "stopped" / "checkpoints").mkdir(parents=True)
    assert resolve_weights(tmp_path / "done") == resolve_weights(tmp_path / "done" / "model") == tmp_path / "done/model"
    with pytest.raises(UserError, match="has not finished"):
        resolve_weights(tmp_path / "stopped")
    with pytest.raises(UserError, match="not a component folder"):
        resolve_weights(tmp_path)


# -- pieces ----------------------------------------------------------------------------------------------------------


def test_learning_rate() -> None:
    settings = load_settings(None, [*TOY, "train.min_learning_rate=0.001", "train.steps=12"])
    rates = [learning_rate(settings, step) for step in range(12)]
    assert rates[:3] == pytest.approx([0.005, 0.01, 0.01])
    assert all(a >= b for a, b in pairwise(rates[2:])) and 0.001 < rates[-1] < 0.0015
    constant = load_settings(None, [*TOY, "train.schedule=constant"])
    assert learning_rate(constant, 5) == 0.01


def test_weight_decay_only_for_matrices() -> None:
    groups = parameter_groups(ToyModel().trainable_parameters("rl"), 0.1)
    assert [(group["weight_decay"], {p.dim() for p in group["params"]}) for group in groups] == [(0.1, {2}), (0.0, {1})]


def test_metrics_are_reduced_by_their_names() -> None:
    reported: list[Any] = [
        {"a": 1.0, "r_max": 3.0, "n_sum": 2},
        {"a": torch.tensor(2.0), "b": 5.0, "r_max": 1.0, "n_sum": 2},
    ]
    assert reduce_metrics(reported, 1) == {"a": 1.5, "b": 5.0, "r_max": 3.0, "n_sum": 4}


# -- flow matching ---------------------------------------------------------------------------------------------------


def make_records(count: int = 12) -> list[Record]:
    rng = np.random.default_rng(0)

    def picture() -> bytes:
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(stream, "PNG")
        return stream.getvalue()

    tasks = ("t2i", "edit", "text", "reasoning")
    return [
        Record(str(i), task, f"prompt {i}", "", picture(), (picture(),) if task == "edit" else (), "test")
        for i, task in ((i, tasks[i % 4]) for i in range(count))
    ]


def test_flow_matching_targets_and_dropped_captions(tmp_path: Path) -> None:
    settings = load_settings(None, ["data.micro_batch=8", "data.image_size=64", "data.caption_drop=0.5"])
    data = TrainingSet(ListStore(make_records()), 64)
    cache = EncodingCache({LATENT: lambda image: image[:, ::4, ::4]}, MemoryStore())
    objective = FlowMatching(settings, cache, Quarantine(0.0, tmp_path))
    source = MixtureSource(data, Mixture.from_settings(settings, data.store, 8), objective.cache, objective.quarantine)
    context = StepContext(1, 0, 0, 1, torch.device("cpu"))
    asked: list[tuple[list[str], Any]] = []

    class Perfect:
        """Knows the velocity of the micro-batch it is asked about."""

        def encode_prompts(self, prompts: list[str], references: Any) -> None:
            asked.append((prompts, references))

        def velocity(self, latents: list[Tensor], times: Tensor, conditioning: Any, references: Any) -> list[Tensor]:
            sigma = (times / 1000).view(-1, 1, 1, 1)
            noisy = torch.stack(micro.latents) * (1 - sigma) + torch.stack(micro.noise) * sigma
            torch.testing.assert_close(torch.stack(latents), noisy)
            return [n - x for n, x in zip(micro.noise, micro.latents, strict=True)]

    model: Any = Perfect()
    micros = objective.prepare(model, source.next(0, 0, 1), context)
    assert [micro.task for micro in micros] == ["edit", "t2i", "t2i"]
    for micro in micros:
        loss, metrics = objective.loss(model, micro, context)
        assert float(loss) == pytest.approx(0, abs=1e-10)
        assert metrics["images_sum"] == 8 and f"loss/flow_matching_{micro.task}" in metrics
        assert micro.share == pytest.approx(1 / 3)
    assert "" not in asked[0][0] and asked[0][1] is not None
    dropped = [prompt == "" for prompts, _ in asked[1:] for prompt in prompts]
    assert 2 <= sum(dropped) <= 14 and asked[1][1] is None
    again = objective.prepare(model, source.next(0, 0, 1), context)
    assert torch.equal(torch.stack(again[1].noise), torch.stack(micros[1].noise))
    assert again[1].prompts == micros[1].prompts
    assert flow_matching_loss(micros[0].latents, micros[0].latents, micros[0].noise).loss > 0.5


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random model and a few records."""
    folder = tmp_path_factory.mktemp("world")
    make_tiny_folder(folder / "weights")
    write_records(folder / "train.parquet", make_records())
    return folder


def stage_overrides(world: Path, folder: Path, name: str, *more: str) -> list[str]:
    return [
        f"run.dir={folder}", f"run.name={name}", "model.preset=tiny", f"model.weights={world / 'weights'}",
        "model.precision=fp32", "model.gradient_checkpointing=false", "model.lora_rank=2", "model.lora_alpha=4",
        f"data.train={world / 'train.parquet'}", f"data.heldout={world / 'train.parquet'}", "data.image_size=64",
        "data.micro_batch=2", "evaluation.prompts=0", "train.steps=4", "train.warmup_steps=0",
        "train.learning_rate=0.001", "train.checkpoint_every=1", "train.keep_checkpoints=2", "train.workers=1",
        "train.zero_stage=2", *more,
    ]  # fmt: skip


def component(folder: Path, name: str, part: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted((folder / name / "model" / part).glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


@pytest.mark.processes
@pytest.mark.slow
def test_two_ranks_train_like_one_with_the_same_global_batch(world: Path, tmp_path: Path) -> None:
    """Weights, held-out losses of the weights and of their averages, pictures of both."""
    names = {"ranks1": (1, 2), "ranks2": (2, 2), "zero3": (2, 3)}
    for name, (ranks, stage) in names.items():
        overrides = stage_overrides(
            world, tmp_path, name, f"train.workers={ranks}", f"data.micro_batch={4 // ranks}", "train.steps=2",
            "model.lora_dropout=0", f"train.zero_stage={stage}", "train.ema_decay=0.5", "evaluation.prompts=11",
            "evaluation.every=1", "evaluation.num_steps=2",
        )  # fmt: skip
        run_workers(tmp_path, [{"stage": "sft", "overrides": overrides}], world=ranks)
    before = {part: load_first(world / "weights" / part) for part in ("bridge", "transformer", "vae")}
    series = {name: read_series(tmp_path / name / "metrics.jsonl") for name in names}
    tasks = ("t2i", "edit", "text", "reasoning", "all")
    expected = {f"heldout_loss{kind}/{task}" for kind in ("", "_ema") for task in tasks} | {"heldout_loss/records"}
    for name in ("ranks2", "zero3"):
        for part in ("bridge", "transformer", "vlm_lora"):
            one, two = component(tmp_path, "ranks1", part), component(tmp_path, name, part)
            assert one and one.keys() == two.keys()
            for key in one:
                torch.testing.assert_close(one[key], two[key], rtol=0, atol=2e-5, msg=f"{name} {part} {key}")
        assert {key for key in series[name] if key.startswith("heldout")} == expected
        for key in expected:
            steps, values = series["ranks1"][key]
            assert steps == ([1, 2] if "_ema" in key else [0, 1, 2])
            assert series[name][key][0] == steps
            assert series[name][key][1] == pytest.approx(values, rel=1e-3)
    assert series["ranks1"]["heldout_loss/records"][1] == [11, 11, 11]
    start, first, last = series["ranks1"]["heldout_loss/all"][1]
    averages = series["ranks1"]["heldout_loss_ema/all"][1]
    assert len({start, first, last, *averages}) == 5  # each is of weights of its own
    pictures = sorted(path.name for path in (tmp_path / "ranks1" / "images").iterdir())
    assert pictures == ["samples-000000.png", "samples-000002.png", "samples_ema-000002.png"]
    assert not any((tmp_path / "zero3" / "images").iterdir())
    assert changed(before["bridge"], component(tmp_path, "ranks1", "bridge"))
    assert changed(before["transformer"], component(tmp_path, "ranks1", "transformer"))
    assert not changed(before["vae"], component(tmp_path, "ranks1", "vae"))


def load_first(folder: Path) -> dict[str, Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return any(not torch.equal(before[name], after[name]) for name in before)


@contextmanager
def interruptible() -> Iterator[None]:
    """Children started inside do not ignore Ctrl-C, even if these tests run in a shell's background and do."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def start_sft(folder: Path, overrides: list[str]) -> subprocess.Popen[str]:
    """stages/sft.py in run folder ``folder``/ray/a, once its third checkpoint is there."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, str(SFT), *overrides],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while process.poll() is None and not (folder / "ray" / "a" / "checkpoints" / "step-000003").exists():
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[0]
    return process


@pytest.mark.ray
@pytest.mark.slow
def test_sft_under_ray_train_interrupted_and_resumed(world: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle: exit code 130 and how to go on; then the same weights as a run that was left alone."""
    overrides = stage_overrides(world, tmp_path / "ray", "a", "train.steps=40")
    with interruptible():
        first = start_sft(tmp_path, overrides)
    first.send_signal(signal.SIGINT)
    output = first.communicate(timeout=120)[0]
    assert first.returncode == 130, output
    assert "to continue:" in output and "--resume" in output

    command = [sys.executable, str(SFT), *overrides, "--resume"]
    second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "resuming after step" in second.stdout and "step 40/40" in second.stdout
    alone = stage_overrides(world, tmp_path / "alone", "a", "train.steps=40")
    run_workers(tmp_path, [{"stage": "sft", "recipe": "tiny-sft", "overrides": alone}])
    for part in ("bridge", "transformer", "vlm_lora"):
        expected, result = component(tmp_path / "alone", "a", part), component(tmp_path / "ray", "a", part)
        assert all(torch.equal(result[name], expected[name]) for name in expected), part


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_worker_is_started_again(world: Path, tmp_path: Path) -> None:
    """SIGKILL of one of two workers: Ray Train starts both again from the last checkpoint, and nothing is different."""
    options = ("train.workers=2", "train.steps=20", "train.max_failures=1")
    process = start_sft(tmp_path, stage_overrides(world, tmp_path / "ray", "a", *options, "cluster.num_cpus=4"))
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if child.cmdline()[:1] and child.cmdline()[0].startswith("ray::RayTrainWorker")
    ]
    assert len(workers) == 2
    workers[1].kill()
    output = process.communicate(timeout=900)[0]
    assert process.returncode == 0, output
    assert output.count("starting the workers again (1, train.max_failures 1): worker ") == 1
    assert "resuming after step" in output and "step 20/20" in output
    alone = stage_overrides(world, tmp_path / "alone", "a", *options)
    run_workers(tmp_path, [{"stage": "sft", "recipe": "tiny-sft", "overrides": alone}], world=2)
    for part in ("bridge", "transformer", "vlm_lora"):
        expected, result = component(tmp_path / "alone", "a", part), component(tmp_path / "ray", "a", part)
        assert expected and all(torch.equal(result[name], expected[name]) for name in expected), part
