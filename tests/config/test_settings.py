"""Settings, recipes and the command line."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml

from deepgen.config import (
    Settings,
    UserError,
    load_settings,
    parse_command_line,
    settings_from_dict,
    settings_hash,
    shown_settings,
)
from deepgen.config.cli import WIDTH
from deepgen.config.recipes import find_recipe, parse_value
from deepgen.config.schema.paths import CHECKOUT
from deepgen.config.schema.reward_weights import weight_at
from deepgen.config.schema.sections import TASKS
from deepgen.config.settings import allowed_values, leaf_keys, sections
from deepgen.config.stage_rules import check_stage
from deepgen.models.stage_parts import Stage

ROOT = Path(__file__).resolve().parents[2]
STAGES = get_args(Stage)

# Frozen on purpose: each new key is a decision (at most 100, without the options that a reward's class owns), and
# renaming a key breaks other people's recipes.
KEYS = {
    "run": "name dir seed resume",
    "model": "preset weights padding precision gradient_checkpointing lora_rank lora_alpha lora_dropout fresh_bridge",
    "data": "train prompts heldout image_size edit_per_cycle t2i_per_cycle micro_batch caption_drop "
    "temperature weights max_bad_share threads allow cache_dir",
    "train": "steps learning_rate min_learning_rate beta1 beta2 weight_decay warmup_steps schedule grad_clip workers "
    "threads zero_stage offload_optimizer ema_decay checkpoint_every keep_checkpoints max_failures",
    "rollout": "sampler eta num_steps shift guidance_scale sde_steps sde_window group_size prompts_per_step actors "
    "same_noise threads",
    "algorithm": "advantage whiten advantage_clip policy_loss clip_range kl kl_beta sft_coef sft_batch "
    "update_micro_batch updates_per_batch decoupled_loss importance_cap off_policy_min_sigma",
    "rewards": "weights",
    "rewards.<name>": "class replicas batch_size deadline_s retries required environment gpus",
    "rewards.judge": "gpus path gpu_memory_share",
    "rewards.ocr": "match_case punctuation look_alikes ngram",
    "rewards.clip": "path",
    "rewards.aesthetic": "path",
    "rewards.remote": "url token_env timeout_s",
    "rewards.pickscore": "gpus path",
    "rewards.hpsv2": "gpus path version",
    "rewards.hpsv3": "batch_size gpus path",
    "rewards.image_reward": "gpus path",
    "rewards.clip_direction": "path source_text",
    "rewards.clip_source": "path",
    "rewards.kept": "gpus path may_change",
    "rewards.vlm_judge": "gpus path model endpoint token_env concurrency jpeg_quality gpu_memory_share context "
    "max_pixels sources system fence max_tokens temperature mode questions combine lowest "
    "highest pattern",
    "rewards.vlm_duel": "gpus path model endpoint token_env concurrency jpeg_quality gpu_memory_share context "
    "max_pixels sources system fence max_tokens temperature mode question pattern tournament "
    "partners both_orders",
    "experience": "max_staleness overlap transport deadline_s silence_s journal",
    "cluster": "address num_cpus start_deadline_s roles",
    "tracking": "uri experiment grid_every alarms",
    "evaluation": "prompts samples_per_prompt num_steps guidance_scale negative_prompt seed every",
}


def recipe_file(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def message_of(overrides: list[str], recipe: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_settings(recipe, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- Keys ----


def test_keys_are_frozen_few_and_shallow() -> None:
    assert list(leaf_keys()) == [f"{section}.{key}" for section, keys in KEYS.items() for key in keys.split()]
    assert len(leaf_keys({})) <= 100
    assert max(key.count(".") + 1 for key in leaf_keys()) <= 3


def test_each_key_and_section_is_explained() -> None:
    assert all(section.about for section in sections().values())
    for key, field in leaf_keys().items():
        assert str(field.description).endswith("."), key
        assert allowed_values(field), key


def test_defaults_are_the_papers() -> None:
    s = Settings()
    assert (s.rollout.sampler, s.rollout.eta, s.rollout.num_steps, s.rollout.shift) == ("cps", 1.0, 50, 3.0)
    assert (s.rollout.group_size, s.rollout.prompts_per_step, s.rollout.sde_steps) == (8, 32, 30)
    assert (s.algorithm.advantage, s.algorithm.clip_range, s.algorithm.advantage_clip) == ("gdpo", 1e-4, 5.0)
    assert (s.algorithm.kl_beta, s.algorithm.sft_coef) == (5e-7, 1e-4)
    assert (s.train.learning_rate, s.train.warmup_steps, s.train.steps) == (2e-6, 20, 1500)
    assert s.rewards.weights["text"] == {"judge": 0.2, "clip": 0.1, "ocr": 0.7}
    assert (s.rollout.guidance_scale, s.evaluation.guidance_scale, s.evaluation.negative_prompt) == (1.0, 4.0, "")


# ---- Recipes ----


def test_recipe_holds_differences_and_the_command_line_wins(tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path, "train: {steps: 200, learning_rate: 1e-4}\nrollout:\n")
    settings = load_settings(recipe, ["train.steps=100"])
    assert (settings.train.steps, settings.train.learning_rate, settings.train.beta1) == (100, 1e-4, 0.9)


def test_reward_weights_replace_a_task_or_one_weight(tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path, "rewards: {weights: {t2i: {aesthetic: 1}}}")
    weights = load_settings(recipe, ["rewards.weights.text.ocr=0.5", "rewards.weights.edit={clip: 1}"]).rewards.weights
    assert weights["t2i"] == {"aesthetic": 1}
    assert weights["text"] == {"judge": 0.2, "clip": 0.1, "ocr": 0.5}
    assert weights["edit"] == {"clip": 1}
    assert weights["reasoning"] == Settings().rewards.weights["reasoning"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("5E6", 5e6), (".5", 0.5), ("1.", 1.0), ("-2", -2), ("1_000", 1000), ("true", True),
        ("~", None), ("no", "no"), ("on", "on"), ("1:30", "1:30"), ("2026-01-01", "2026-01-01"), ("'1'", "1"),
    ],
)  # fmt: skip
def test_yaml_scalars(text: str, value: object) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("train:\n  steps: 1\n  steps: 2\n", ["'steps' is given twice", "first on line 2", "line 3"]),
        ("train: {steps: 1", ["not valid YAML", "line 1"]),
        ("run:\n  name: &x [*x]", ["not valid YAML", "more than 100,000 values", "line 2"]),
        (
            "data:\n  allow: [" + ", ".join(f"&a{i + 1} [{f'*a{i},' * 9 if i else ''}]" for i in range(9)) + "]",
            ["100,000"],
        ),
        ("just words", ["got a str", "sections"]),
        ("train: 3", ["train: got 3 in mine.yaml", "section"]),
        ("train:\n  stepz: 3", ["unknown key 'train.stepz' in mine.yaml", "'train.steps'"]),
        ("train.steps: 3", ["train.steps: written with dots", "nested"]),
        ("trian: {steps: 3}", ["unknown key 'trian'", "did you mean 'train'"]),
        ("train: {steps: '3'}", ["train.steps: got '3' in mine.yaml; allowed: whole number >= 1"]),
        ("train: {steps: true}", ["train.steps: got True"]),
        ("rewards: {weights: {t2i: 5}}", ["rewards.weights.t2i: got 5 in mine.yaml", "a weight >= 0"]),
        ("rewards: {weights: }", ["rewards.weights: got nothing"]),
        ("run: {name: ../x}", ["run.name: got '../x'", "letters"]),
    ],
)
def test_bad_recipe_is_one_clear_line(tmp_path: Path, content: str, parts: list[str]) -> None:
    message = message_of([], recipe_file(tmp_path, content))
    assert all(part in message for part in parts), message


def test_recipe_that_is_no_text_or_missing(tmp_path: Path) -> None:
    path = tmp_path / "image.yaml"
    path.write_bytes(b"\x89PNG\xff\xfe")
    assert "not a text file" in message_of([], path)
    with pytest.raises(UserError, match=r"no file or recipe 'tiny-rll'; did you mean 'tiny-rl'\?.*tiny-pretrain"):
        find_recipe("tiny-rll")


def test_weights_may_change_over_steps_and_belong_to_data_sets(tmp_path: Path) -> None:
    recipe = recipe_file(
        tmp_path,
        """
        rewards:
          weights:
            t2i: {judge: [0, 0.5, 20], clip: 1}
            source:posters.txt: {ocr: 0.7}
        """,
    )
    overrides = ["rewards.weights.text.clip=[1, 0.2, 4]", "rewards.weights.source:posters.txt.clip=[0, 1, 3]"]
    settings = load_settings(recipe, [*overrides, "rewards.weights.source:a.b={aesthetic: 1}"])
    weights = settings.rewards.weights
    assert weights["t2i"] == {"judge": (0, 0.5, 20), "clip": 1}
    assert weights["text"]["clip"] == (1, 0.2, 4)
    assert weights["source:posters.txt"] == {"ocr": 0.7, "clip": (0, 1, 3)}
    assert weights["source:a.b"] == {"aesthetic": 1}
    assert settings.rewards.used() == ("judge", "ocr", "clip", "aesthetic")
    assert settings.rewards.tasks_of("aesthetic") == TASKS  # those of the data set are not known
    assert settings.rewards.tasks_of("judge") == ("t2i", "reasoning", "text", "edit")

    again = recipe_file(tmp_path, yaml.safe_dump(shown_settings(settings)))
    for same in (load_settings(again), settings_from_dict(settings.model_dump()), pickle.loads(pickle.dumps(settings))):
        assert same.rewards.weights == weights and settings_hash(same) == settings_hash(settings)


def test_a_weight_goes_linearly_from_first_to_last() -> None:
    assert [weight_at((0.0, 0.5, 5), step) for step in (0, 1, 4, 5, 6, None)] == [0, 0.1, 0.4, 0.5, 0.5, 0.5]
    assert [weight_at((1.0, 0.0, 2), step) for step in (0, 1, 2, None)] == [1, 0.5, 0, 0]
    assert [weight_at(0.3, step) for step in (0, None)] == [0.3, 0.3]


# ---- Values ----


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["train.stepz=3"], ["unknown key 'train.stepz' on the command line", "'train.steps'"]),
        (["learning_rate=3"], ["unknown key 'learning_rate'", "did you mean 'train.learning_rate'"]),
        (["train=3"], ["train: is a section", "train.steps="]),
        (["train.steps"], ["key=value"]),
        (["train.steps=ten"], ["train.steps: got 'ten' on the command line; allowed: whole number >= 1"]),
        (["train.steps={"], ["train.steps: cannot read '{'"]),
        (["train.learning_rate=.nan"], ["train.learning_rate: got '.nan'"]),
        (["rollout.sampler=cpss"], ["cps, flow_sde, dance_sde or ode", "did you mean 'cps'"]),
        (["rollout.sde_window=al"], ["got 'al' on the command line", "all, window or first", "did you mean 'all'"]),
        (["model.lora_rank=-1"], ["model.lora_rank: got -1", "from 0 to 1024"]),
        (["data.image_size=65"], ["data.image_size: got 65", "multiple of 32"]),
        (["data.train="], ["data.train: got ''", "path"]),
        (["train.steps=0", "train.workers=0"], ["train.steps: got 0", "(and 1 more)"]),
        (["rewards.weights.txt.ocr=1"], ["rewards.weights.txt: unknown task", "did you mean 'text'"]),
        (["rewards.weights.text.orc=1"], ["unknown reward 'orc'", "judge, ocr, clip, aesthetic", "'ocr'"]),
        (["rewards.weights.text.ocr=-1"], ["rewards.weights.text.ocr: got -1 on the command line"]),
        (["rewards.weights.text.ocr=true"], ["rewards.weights.text.ocr: got True", "[first, last, steps]"]),
        (["rewards.weights.text.ocr=[0, 1]"], ["rewards.weights.text.ocr: got [0, 1] on the command line"]),
        (["rewards.weights.text.ocr=[0, 1, 0]"], ["rewards.weights.text.ocr: got [0, 1, 0]"]),
        (["rewards.weights.text.ocr=[0, 2e6, 5]"], ["rewards.weights.text.ocr: got [0, 2000000.0, 5]"]),
        (["rewards.weights.text={ocr: [0, 1, 9]}"], ["rewards.weights.text: every weight is 0 at step 0"]),
        (["rewards.weights.text={ocr: [1, 0, 9], clip: 0}"], ["rewards.weights.text: every weight is 0 in the end"]),
        (["rewards.weights.sauce:posters={ocr: 1}"], ["unknown task 'sauce:posters'", "of a data set: source:NAME"]),
        (["rewards.weights.source:posters.orc=1"], ["rewards.weights.source:posters.orc: unknown reward 'orc'"]),
        (["rollout.num_steps=10", "rollout.sde_steps=10"], ["rollout.sde_steps: got 10", "1 to 9"]),
        (["rollout.eta=1.5"], ["rollout.eta: got 1.5 with rollout.sampler cps", "<= 1"]),
        (["rollout.group_size=1"], ["rollout.group_size: got 1 with algorithm.advantage gdpo", ">= 2"]),
        (["train.steps=5"], ["train.warmup_steps: got 20 with train.steps 5", "0 to 5"]),
        (["train.min_learning_rate=1"], ["train.min_learning_rate", "at most"]),
        (["data.edit_per_cycle=0", "data.t2i_per_cycle=0"], ["data.t2i_per_cycle", "at least one"]),
        (
            ["tracking.alarms={clip_shar: 1}"],
            ["tracking.alarms: unknown alarm 'clip_shar'", "zero_spread", "'clip_share'"],
        ),
        (["tracking.alarms={kl: -1}"], ["tracking.alarms: got -1", "a number >= 0, at most 1e6, null, or"]),
        (["algorithm.updates_per_batch=0"], ["algorithm.updates_per_batch: got 0", ">= 1"]),
        (["algorithm.importance_cap=0.5"], ["algorithm.importance_cap: got 0.5", ">= 1"]),
        (["algorithm.off_policy_min_sigma=1"], ["algorithm.off_policy_min_sigma: got 1", ">= 0 and < 1"]),
        (["evaluation.guidance_scale=0.5"], ["evaluation.guidance_scale: got 0.5", ">= 1"]),
        (
            ["evaluation.guidance_scale=1", "evaluation.negative_prompt=blurry, cut off"],
            [
                "evaluation.negative_prompt: got 'blurry, cut off' with evaluation.guidance_scale 1",
                "allowed: empty, or",
            ],
        ),
    ],
)
def test_bad_value_is_one_clear_line(overrides: list[str], parts: list[str]) -> None:
    message = message_of(overrides)
    assert all(part in message for part in parts), message


def test_single_images_work_without_group_statistics() -> None:
    settings = load_settings(None, ["rollout.group_size=1", "algorithm.advantage=reinforcepp"])
    assert settings.rollout.group_size == 1


def test_text_keys_take_the_text_as_it_is() -> None:
    settings = load_settings(None, ["run.name=2026", "tracking.uri=http://host:5000"])
    assert (settings.run.name, settings.tracking.uri) == ("2026", "http://host:5000")


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["rollout.sampler=ode"], "rollout.sampler: got 'ode'"),
        (["rollout.sampler=ode", "algorithm.policy_loss=diffusion_nft"], "rollout.same_noise: got true"),
        (
            ["algorithm.policy_loss=diffusion_nft", "algorithm.kl=latent_mean"],
            "algorithm.kl: got 'latent_mean' with .*allowed: velocity or none",
        ),
        (["rollout.eta=0"], "rollout.eta: got 0"),
        (["train.workers=5"], "rollout.prompts_per_step: got 32 for train.workers 5"),
        (
            ["algorithm.updates_per_batch=3"],
            "algorithm.updates_per_batch: got 3 with rollout.prompts_per_step 32 and train.workers 8, 4 groups a rank; "
            "allowed: a divisor of 4",
        ),
        (
            ["algorithm.updates_per_batch=2", "algorithm.sft_batch=5"],
            "algorithm.sft_batch: got 5 with algorithm.updates_per_batch 2 and 3 micro-batches a cycle; allowed: >= 6",
        ),
        (
            ["algorithm.policy_loss=diffusion_nft", "algorithm.decoupled_loss=true"],
            "algorithm.decoupled_loss: got true with .*allowed: false, or algorithm.policy_loss=clipped_ratio",
        ),
        (
            ["algorithm.policy_loss=diffusion_nft", "algorithm.off_policy_min_sigma=0.1"],
            "algorithm.off_policy_min_sigma: got 0.1 with .*allowed: 0, or",
        ),
        (
            ["algorithm.off_policy_min_sigma=0.9"],
            "algorithm.off_policy_min_sigma: got 0.9, but all trained steps may .*sde_window all; allowed: 0 to 0.8",
        ),
        ([f"rewards.weights.{task}={{}}" for task in TASKS], "rewards.weights: got no weight above 0"),
    ],
)
def test_rl_refuses_what_only_rl_cannot_run(overrides: list[str], part: str) -> None:
    settings = load_settings(None, overrides)
    check_stage(settings, "sft")
    with pytest.raises(UserError, match=part):
        check_stage(settings, "rl")


# ---- Paths and transport ----


def test_inputs_are_found_in_the_current_folder_then_in_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert CHECKOUT == ROOT
    monkeypatch.chdir(tmp_path)
    assert load_settings(None, ["model.weights=tests/golden"]).model.weights == ROOT / "tests/golden"
    (tmp_path / "tests/golden").mkdir(parents=True)
    assert load_settings(None, ["model.weights=tests/golden"]).model.weights == tmp_path / "tests/golden"
    assert load_settings(None, ["model.weights=nowhere"]).model.weights == Path("nowhere")
    assert load_settings(None, ["run.dir=out"]).run.dir == tmp_path / "out"


def test_settings_travel_between_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(None, ["model.weights=tests/golden", "rewards.judge.path=tests", f"data.train={tmp_path}"])
    content = settings.model_dump()
    assert content["model"]["weights"] == "tests/golden"  # relative, as the other node's checkout is elsewhere
    assert content["data"]["train"] == str(tmp_path)
    (tmp_path / "tests/golden").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)  # as Ray Train does; a folder of the same name here must not win
    assert settings_from_dict(content) == settings
    assert pickle.loads(pickle.dumps(settings)) == settings
    assert str(ROOT / "tests").encode() not in pickle.dumps(settings)
    with pytest.raises(UserError, match=r"unknown key 'train\.stepz'"):
        settings_from_dict({"train": {"stepz": 1}})


def test_hash_ignores_place_and_resume() -> None:
    base = settings_hash(Settings())
    assert settings_hash(load_settings(None, ["run.dir=/elsewhere", "run.resume=true", "data.cache_dir=x"])) == base
    assert settings_hash(load_settings(None, ["train.steps=99"])) != base


# ---- Command line ----


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A recipe whose inputs all exist."""
    return recipe_file(
        tmp_path,
        f"""
        model: {{weights: {tmp_path}}}
        data: {{train: {tmp_path}, prompts: {tmp_path}, heldout: {tmp_path}}}
        rewards: {{judge: {{path: {tmp_path}}}, clip: {{path: {tmp_path}}}}}
        """,
    )


@pytest.mark.parametrize("spelling", [["--train.steps", "30"], ["--train.steps=30"], ["train.steps=30"]])
def test_three_spellings_of_an_override(inputs: Path, spelling: list[str]) -> None:
    settings = parse_command_line("rl", ["--recipe", str(inputs), *spelling, "--resume"])
    assert (settings.train.steps, settings.run.resume) == (30, True)


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--train.steps"], "--train.steps: got no value"),
        (["--train.steps", "--resume"], "--train.steps: got no value"),
        (["--resume=yes"], "--resume: got a value"),
        (["--resum"], "unknown option '--resum'; did you mean 'resume'"),
        (["--steps", "3"], "unknown option '--steps'; did you mean 'train.steps'"),
        (["train.steps", "3"], "cannot read 'train.steps'"),
        (["-x"], "cannot read '-x'"),
        (["--recipe", "none.yaml"], "no file or recipe 'none.yaml'"),
        (["data.heldout=none.parquet"], "data.heldout: no file or folder 'none.parquet' in "),
        (["rewards.clip.path=none"], "rewards.clip.path: no file or folder 'none'"),
    ],
)
def test_bad_command_line(inputs: Path, argv: list[str], part: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_command_line("rl", ["--recipe", str(inputs), *argv])
    assert part in str(caught.value)


def test_unused_inputs_may_be_missing(inputs: Path) -> None:
    unused = ["data.train=none", "algorithm.sft_coef=0", "data.heldout=none", "evaluation.prompts=0"]
    assert parse_command_line("rl", ["--recipe", str(inputs), *unused, "rewards.aesthetic.path=none"])
    assert parse_command_line("sft", ["--recipe", str(inputs), "data.prompts=none", "rewards.judge.path=none"])


@pytest.mark.parametrize("stage", STAGES)
def test_print_config_is_a_recipe_of_the_same_settings(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_command_line(stage, ["--print-config", "--train.learning_rate", "3e-5"])
    printed = capsys.readouterr().out
    assert caught.value.code == 0
    assert yaml.safe_load(printed)["train"]["learning_rate"] == 3e-5
    assert load_settings(recipe_file(tmp_path, printed)) == load_settings(
        find_recipe(f"tiny-{stage}"), ["train.learning_rate=3e-5"]
    )


@pytest.mark.parametrize("stage", STAGES)
def test_help_explains_each_key_in_100_columns(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_command_line(stage, ["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert caught.value.code == 0
    assert max(map(len, lines)) <= WIDTH
    for key in leaf_keys():
        assert any(line.startswith(f"  {key} = ") for line in lines), key


def run_python(code: str, *argv: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "platform")}
    command = [sys.executable, "-c", code, *argv]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=60, check=False)


@pytest.mark.processes
def test_config_imports_neither_torch_nor_ray() -> None:
    heavy = ["torch", "ray", "vllm", "transformers", "diffusers", "mlflow", "numpy", "pyarrow"]
    done = run_python(f"import sys, deepgen.config; print([m for m in {heavy} if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


PROGRAM = "import sys; from deepgen.config import *; run_program(lambda: {})"


@pytest.mark.processes
def test_user_error_leaves_with_2_and_one_line() -> None:
    done = run_python(PROGRAM.format("parse_command_line('rl', sys.argv[1:])"), "--train.stepz", "3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown key 'train.stepz' on the command line; did you mean 'train.steps'?\n"


@pytest.mark.parametrize(
    "content", ["train: {steps: !!int abc}", "model: !!bool maybe", "[" * 5000, f"train: {{steps: {'9' * 5000}}}"]
)
def test_yaml_that_cannot_be_made_into_values_is_one_clear_line(tmp_path: Path, content: str) -> None:
    with pytest.raises(UserError, match=r"recipe .*: not valid YAML: ") as caught:
        load_settings(recipe_file(tmp_path, content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("~nobody-is-called-so/x", "but there is no home folder ~nobody-is-called-so"),
        ("x" * 600, "no file or"),
        ("a\\0b", "no file or"),
    ],
)
def test_names_no_file_can_have_are_not_there(name: str, why: str) -> None:
    for argv in (["--recipe", name], [f"data.prompts={name}"]):
        with pytest.raises(UserError, match=why):
            parse_command_line("rl", argv)


@pytest.mark.processes
def test_user_error_of_a_ray_actor_is_still_one_line() -> None:
    remote = (
        "type('RayTaskError(UserError)', (UserError,), {'cause': UserError('data.train: row 3')})('long\\ntraceback')"
    )
    done = run_python(PROGRAM.format(f"(_ for _ in ()).throw({remote})"))
    assert (done.returncode, done.stderr) == (2, "error: data.train: row 3\n")


# ---- Secrets ----


def test_settings_are_shown_without_secrets_and_say_so_when_read_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "tracking.uri=http://user:hunter2@host:5000/?token=hunter2"
    with pytest.raises(SystemExit):
        parse_command_line("sft", [secret, "--print-config"])
    shown = capsys.readouterr().out
    assert "uri: http://user:***@host:5000/?token=***" in shown and "hunter2" not in shown
    settings = load_settings(None, [secret])
    assert shown_settings(settings)["tracking"]["uri"] == "http://user:***@host:5000/?token=***"
    assert settings.tracking.uri.endswith("token=hunter2")
    path = recipe_file(tmp_path, shown)
    assert message_of([], path) == (
        "tracking.uri: got 'http://user:***@host:5000/?token=***' in mine.yaml, whose secret was hidden when it was "
        "written; give it again"
    )
    assert load_settings(path, [secret]).tracking.uri == settings.tracking.uri


@pytest.mark.parametrize(
    "given",
    ["tracking.urii=http://u:hunter2@h", "train.steps=http://u:hunter2@h", "http://u:hunter2@h"],
)
def test_what_is_wrong_with_a_setting_is_said_without_secrets(given: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_command_line("sft", [given])
    assert "hunter2" not in str(caught.value)
