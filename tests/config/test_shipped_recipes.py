"""The recipes that are shipped: they load, they are the paper's, and the plan says what they need."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from deepgen.config import (
    Settings,
    UserError,
    load_settings,
    parse_command_line,
)
from deepgen.config.recipes import find_recipe
from deepgen.config.schema.sections import TASKS
from deepgen.config.stage_rules import check_stage
from deepgen.models.stage_parts import Stage

ROOT = Path(__file__).resolve().parents[2]
STAGES = get_args(Stage)


@pytest.mark.parametrize("stage", STAGES)
def test_shipped_recipe_loads_and_says_what_it_was_verified_on(stage: Stage) -> None:
    path = find_recipe(f"tiny-{stage}")
    settings = load_settings(path)
    check_stage(settings, stage)
    assert settings.model.preset == "tiny"
    assert settings.evaluation.guidance_scale == 1  # as their rollouts draw
    assert "# Verified on:" in path.read_text()


@pytest.mark.parametrize(
    ("stage", "updates", "images"), [("pretrain", 200_000 // 4, 64 * 4 * 4), ("sft", 400_000 // 3, 64 * 4 * 3)]
)
def test_5b_recipes_are_the_papers(stage: Stage, updates: int, images: int) -> None:
    """Method 2.2: the number of iterations in optimizer steps, and of images in each step."""
    path = find_recipe(f"deepgen-5b-{stage}")
    s = load_settings(path)
    check_stage(s, stage)
    assert "# Verified on: settings and memory arithmetic only; not run on GPUs" in path.read_text()
    assert (s.model.preset, s.model.precision, s.data.image_size) == ("deepgen-5b", "bf16", 512)
    assert s.train.steps == updates and s.train.warmup_steps == updates // 100
    assert s.train.workers * s.data.micro_batch * (s.data.edit_per_cycle + s.data.t2i_per_cycle) == images
    assert (s.train.beta1, s.train.beta2, s.train.weight_decay, s.train.grad_clip) == (0.9, 0.95, 0.05, 1.0)
    assert s.train.learning_rate == {"pretrain": 1e-4, "sft": 5e-5}[stage]
    assert (s.train.schedule, s.train.zero_stage, s.train.min_learning_rate) == ("cosine", 2, 0.0)
    assert s.model.fresh_bridge == (stage == "pretrain")
    assert s.model.lora_rank == {"pretrain": 0, "sft": 64}[stage]


def test_5b_rl_recipe_is_the_papers() -> None:
    """Method 3: its settings are the defaults, its weights those of the published sets."""
    s, usual = load_settings(find_recipe("deepgen-5b-rl")), Settings()
    assert (s.rollout, s.algorithm) == (usual.rollout, usual.algorithm)
    general, text = {"preference": 0.7, "clip": 0.3}, {"preference": 0.2, "clip": 0.1, "ocr": 0.7}
    assert s.rewards.weights == {"t2i": general, "reasoning": general, "text": text, "edit": {}}
    duel = s.rewards.pools["preference"].model_dump()
    assert (duel["class"], duel["tournament"], duel["both_orders"]) == ("vlm_duel", "full", True)
    assert (duel["temperature"], duel["max_tokens"], duel["required"]) == (0.0, 4096, True)
    assert s.rollout.prompts_per_step * s.rollout.group_size == 256 and s.train.steps == 1500
    assert (s.train.learning_rate, s.train.warmup_steps, s.train.beta2) == (2e-6, 20, 0.999)


@pytest.mark.parametrize("recipe", ["deepgen-5b-rl", "deepgen-5b-rl-8gpu", "deepgen-5b-edit-rl"])
def test_5b_rl_recipes_load_and_differ_only_where_they_say(recipe: str) -> None:
    path = find_recipe(recipe)
    s, papers = load_settings(path), load_settings(find_recipe("deepgen-5b-rl"))
    check_stage(s, "rl")
    assert "# Verified on: settings and memory arithmetic only; not run on GPUs" in path.read_text()
    assert s.run.name == recipe and s.experience.max_staleness == 0
    assert s.algorithm.model_copy(update={"sft_batch": 32, "update_micro_batch": 32}) == papers.algorithm
    assert s.rollout.model_copy(update={"actors": 8}) == papers.rollout
    assert s.train.workers * s.algorithm.sft_batch == 256
    if recipe == "deepgen-5b-edit-rl":
        assert {task: bool(row) for task, row in s.rewards.weights.items()} == {task: task == "edit" for task in TASKS}
        assert s.rewards.pools["edited"].model_dump()["sources"] == 1
    else:
        assert s.rewards.weights == papers.rewards.weights


@pytest.mark.parametrize(
    ("recipe", "stage"),
    [
        ("deepgen-5b-pretrain", "pretrain"),
        ("deepgen-5b-sft", "sft"),
        ("deepgen-5b-rl", "rl"),
        ("deepgen-5b-rl-8gpu", "rl"),
        ("deepgen-5b-edit-rl", "rl"),
    ],
)
def test_5b_recipes_say_which_weights_are_missing(
    recipe: str, stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["--recipe", recipe]
    with pytest.raises(UserError, match=r"model\.weights: no file or folder .*deepgen-5b") as caught:
        parse_command_line(stage, argv)
    assert "\n" not in str(caught.value)
    for flag in ("--print-config", "--plan"):
        with pytest.raises(SystemExit):
            parse_command_line(stage, [*argv, flag], plan=lambda settings, stage: "a plan")


def test_plan_is_printed_and_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--plan", "train.workers=3", "model.weights=nowhere"]
    with pytest.raises(SystemExit) as caught:
        parse_command_line("sft", argv, plan=lambda settings, stage: f"{stage} on {settings.train.workers}")
    assert (caught.value.code, capsys.readouterr().out) == (0, "sft on 3\n")
