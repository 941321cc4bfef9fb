"""A whole supervised run on one rank and on two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deepgen.tracking.journal import read_series
from tests.helpers.learner_workers import run_workers
from tests.helpers.sft_world import changed, component, load_first, make_sft_world, stage_overrides


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Path:
    return make_sft_world(tmp_path_factory.mktemp("world"), empty_database)


@pytest.mark.processes
@pytest.mark.slow
def test_two_ranks_train_like_one_with_the_same_global_batch(world: Path, tmp_path: Path) -> None:
    """They have equal weights, held-out losses of weights and averages, and pictures of both."""
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
    assert len({start, first, last, *averages}) == 5  # each comes from different weights
    pictures = sorted(path.name for path in (tmp_path / "ranks1" / "images").iterdir())
    assert pictures == ["samples-000000.png", "samples-000002.png", "samples_ema-000002.png"]
    assert not any((tmp_path / "zero3" / "images").iterdir())
    assert changed(before["bridge"], component(tmp_path, "ranks1", "bridge"))
    assert changed(before["transformer"], component(tmp_path, "ranks1", "transformer"))
    assert not changed(before["vae"], component(tmp_path, "ranks1", "vae"))
