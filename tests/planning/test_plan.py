"""The plan's arithmetic against measured memory: states of real engines, activations of real backward graphs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deepgen.config import load_settings
from deepgen.config.recipes import find_recipe
from deepgen.models.presets import DEEPGEN_5B, TINY, Architecture
from deepgen.models.unified import UnifiedModel
from deepgen.models.vlm import LoraSettings, _decode, add_lora, lora_parameters
from deepgen.planning import memory, plan
from deepgen.planning.memory import CPU_BF16, CPU_FP32, Numbers, states
from deepgen.planning.processes import cards, other_processes
from tests.helpers.factories import make_tiny_model, narrow_architecture
from tests.helpers.learner_workers import run_workers

STATES_OFF = 0.01  # allowed error of a part: padding, and scalars such as step counters
ACTIVATIONS_OFF = 0.06  # allowed error: modulation vectors, and keys repeated for all heads if the kernel needs none


# ---- States ----


@pytest.mark.processes
@pytest.mark.slow
def test_states_are_what_the_engine_holds(tmp_path: Path) -> None:
    """Rank 0 of two gloo workers, ZeRO 0 to 3, in the middle of a step: every part matches, and there is no other."""
    common = ["model.precision=fp32", "train.workers=2", "train.warmup_steps=0", f"run.dir={tmp_path}"]
    files = [tmp_path / f"zero{stage}.json" for stage in range(4)]
    runs = [
        {"overrides": [*common, f"train.zero_stage={stage}"], "measure": str(file)} for stage, file in enumerate(files)
    ]
    run_workers(tmp_path, runs, world=2)
    parameters = memory.Parameters.of(make_tiny_model(), "rl")
    for stage, file in enumerate(files):
        found, expected = json.loads(file.read_text()), states(parameters, stage, 2, ema=True)
        for part in ("frozen", "weights", "master", "moments", "ema"):
            assert found[part] == pytest.approx(getattr(expected, part), rel=STATES_OFF, abs=64), f"ZeRO-{stage} {part}"
        # Stage 2 keeps a full copy of the parameter that two ranks share.
        shared = 4 * parameters.largest if stage == 2 else 0
        assert found["gradients"] == pytest.approx(expected.gradients, rel=STATES_OFF, abs=64 + shared), f"ZeRO-{stage}"
        # All parameters of such a small model are below DeepSpeed's threshold of 100,000 elements, so ZeRO-3 keeps them
        # gathered. The plan counts them in its buffers, as live parameters.
        between = expected.kept + expected.export if stage == 3 else expected.kept - expected.gradients
        assert found["rest"] == pytest.approx(between, rel=0.05), f"ZeRO-{stage}: something else lies in memory"


def test_offloading_moves_the_optimizer_to_main_memory() -> None:
    parameters = memory.Parameters(matrices=(1000,), vectors=(10,), frozen=(500,), whole=7)
    here, there = states(parameters, 2, 4), states(parameters, 2, 4, offload_optimizer=True)
    assert (there.master, there.moments, there.gradients) == (0, 0, 0)
    assert (there.weights, there.frozen) == (here.weights, here.frozen)
    assert there.host >= here.master + here.moments + here.gradients
    with pytest.raises(ValueError, match="stage 1"):
        states(parameters, 0, 4, offload_optimizer=True)


def test_more_workers_and_higher_stages_never_need_more() -> None:
    parameters = memory.Parameters(matrices=(1 << 24,) * 8, vectors=(4096,) * 8, frozen=(1 << 24,) * 8)
    for stage in (1, 2, 3):
        kept = [states(parameters, stage, workers).kept for workers in (1, 2, 4, 8)]
        assert kept == sorted(kept, reverse=True)
    kept = [states(parameters, stage, 8).kept for stage in range(4)]
    assert kept == sorted(kept, reverse=True)


# ---- Activations ----


def wide() -> Architecture:
    """A narrow architecture, yet wide enough that memory that grows with tokens outweighs the rest."""
    text = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
    vision = {"depth": 1, "out_hidden_size": 64, "fullatt_block_indexes": [0]}
    transformer: dict[str, Any] = {
        "num_layers": 4,
        "attention_head_dim": 32,
        "num_attention_heads": 3,
        "joint_attention_dim": 128,
    }
    transformer |= {"caption_projection_dim": 96, "pooled_projection_dim": 64, "dual_attention_layers": (0, 1)}
    sizes = {"num_queries": 8, "connector_hidden": 64, "connector_mlp": 352, "connector_heads": 4, "fusion_stride": 1}
    connector = {"connector_layers": TINY.connector_layers, "vae": TINY.vae}
    return narrow_architecture(text, vision, transformer, **sizes, **connector)


ARCHITECTURE = wide()
PRECISIONS = [pytest.param(CPU_BF16, id="bf16"), pytest.param(CPU_FP32, id="fp32")]
SIZES = [(1, 24), (2, 40), (4, 100)]  # batch, context tokens


@pytest.fixture(scope="module")
def model() -> UnifiedModel:
    return UnifiedModel.from_architecture(ARCHITECTURE)


def kept_for_backward(module: nn.Module, forward: Callable[[], Any], n: Numbers) -> int:
    """Bytes of the storages autograd keeps, without parameters and buffers but with bf16 copies of weights."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            kept[place] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16, enabled=n.cast > 0):
        result = forward()
    del result
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("n", PRECISIONS)
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize(("batch", "context_tokens"), SIZES)
def test_dit_activations(model: UnifiedModel, n: Numbers, trained: bool, batch: int, context_tokens: int) -> None:
    """The input has a target and three references, like an edit."""
    model.transformer.requires_grad_(trained)
    references = [[torch.randn(8, 16, 16)] * 3] * batch
    context = torch.randn(batch, context_tokens, 128, requires_grad=True)
    pooled = torch.randn(batch, 64, requires_grad=True)

    def forward() -> Any:
        return model.transformer(torch.randn(batch, 8, 16, 16), torch.full([batch], 500.0), context, pooled, references)

    expected = memory.dit_activations(
        ARCHITECTURE,
        n,
        batch=batch,
        image_tokens=4 * 64,
        context_tokens=context_tokens,
        trained=trained,
        checkpointing=False,
    )
    expected += n.cast * memory.dit_linears(ARCHITECTURE) if trained else 0  # a separate part in the plan
    assert kept_for_backward(model.transformer, forward, n) == pytest.approx(expected, rel=ACTIVATIONS_OFF)


def test_dit_linears(model: UnifiedModel) -> None:
    blocks = model.transformer.transformer_blocks
    real = sum(m.weight.numel() for m in blocks.modules() if isinstance(m, nn.Linear))
    assert memory.dit_linears(ARCHITECTURE) == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize("n", PRECISIONS)
@pytest.mark.parametrize(("batch", "context_tokens"), SIZES)
def test_bridge_activations(model: UnifiedModel, n: Numbers, batch: int, context_tokens: int) -> None:
    states_ = [torch.randn(batch, context_tokens, 64, requires_grad=True) for _ in ARCHITECTURE.fusion_layers]
    expected = memory.bridge_activations(ARCHITECTURE, n, batch=batch, context_tokens=context_tokens)
    expected += n.cast * sum(tensor.numel() for tensor in model.bridge_state().values())
    found = kept_for_backward(model, lambda: model.fuse(states_, None), n)
    assert found == pytest.approx(expected, rel=ACTIVATIONS_OFF)


@pytest.mark.parametrize("n", PRECISIONS)
@pytest.mark.parametrize("lora_rank", [0, 8])
@pytest.mark.parametrize(("batch", "context_tokens"), SIZES)
def test_vlm_activations(n: Numbers, lora_rank: int, batch: int, context_tokens: int) -> None:
    vlm = UnifiedModel.from_architecture(ARCHITECTURE).vlm.requires_grad_(False)
    if lora_rank:
        add_lora(vlm, LoraSettings(rank=lora_rank), ARCHITECTURE.fusion_layers[0])
        vlm.train()
    embeds = torch.randn(batch, context_tokens, 64, requires_grad=True)
    mask = torch.ones(batch, context_tokens, dtype=torch.bool)
    positions = torch.arange(context_tokens).expand(3, batch, -1)

    def forward() -> Any:
        return _decode(vlm.model.language_model, embeds, mask, positions, ARCHITECTURE.fusion_layers)

    tokens = {"batch": batch, "context_tokens": context_tokens, "lora_rank": lora_rank}
    expected = memory.vlm_activations(ARCHITECTURE, n, checkpointing=False, **tokens)
    expected += n.cast * sum(adapter.numel() for adapter in lora_parameters(vlm).values())
    assert kept_for_backward(vlm, forward, n) == pytest.approx(expected, rel=ACTIVATIONS_OFF)


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_checkpointed_layers_keep_nothing_but_their_inputs(stage: str) -> None:
    """This also holds in pretrain, where only think tokens need a gradient from the frozen decoder."""
    model = UnifiedModel.from_architecture(ARCHITECTURE)
    if stage == "sft":
        add_lora(model.vlm, LoraSettings(rank=8), ARCHITECTURE.fusion_layers[0])
    model.trainable_parameters(stage)
    model.enable_gradient_checkpointing()
    model.train()
    embeds = torch.randn(2, 40, 64, requires_grad=True)
    mask, positions = torch.ones(2, 40, dtype=torch.bool), torch.arange(40).expand(3, 2, -1)
    decoder = model.vlm.model.language_model
    kept = kept_for_backward(
        model, lambda: _decode(decoder, embeds, mask, positions, ARCHITECTURE.fusion_layers), CPU_FP32
    )
    inputs = ARCHITECTURE.fusion_layers[0] * embeds.numel() * 4
    assert kept <= inputs  # torch's hooks do not see all of them


# ---- The text ----


def test_plan_of_the_5b_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    settings = load_settings(find_recipe("deepgen-5b-sft"), ["train.workers=8"])
    job = plan.make_job(settings, "sft")
    assert sum(job.parameters.matrices) + sum(job.parameters.vectors) == job.parameters.trained
    assert 2_675_621_052 < job.parameters.trained < 2_675_621_052 + 185_163_776  # DiT and bridge, and the live LoRA
    text = plan.plan_text(settings, "sft")
    assert "8 learner workers, ZeRO-2, bf16" in text
    assert f"{job.total() / memory.GIB:.1f}" in text
    for size in plan.GPU_GIB:
        assert f"  {size} GB" in text
        found = plan.smallest_cluster(job, size)
        assert found is None or found.total() <= memory.usable(size)
    assert job.total() < replace(job, zero_stage=1).total() < replace(job, zero_stage=0).total()
    assert max(map(len, text.splitlines())) <= 120


def test_checkpointing_and_precision_count() -> None:
    with_, without, fp32 = (
        plan.make_job(load_settings(find_recipe("deepgen-5b-sft"), overrides), "sft").batch()
        for overrides in ([], ["model.gradient_checkpointing=false"], ["model.precision=fp32"])
    )
    dit, vlm = "activations: DiT", "activations: VLM decoder"
    assert without[dit] > 8 * with_[dit] and without[vlm] > 8 * with_[vlm]
    assert fp32["bf16 copies of the trained weights (autocast)"] == 0


RL_RECIPES = {"deepgen-5b-rl": 24, "deepgen-5b-rl-8gpu": 8, "deepgen-5b-edit-rl": 8}  # GPUs of 80 GB


@pytest.fixture(scope="module")
def rl_parameters() -> memory.Parameters:
    return plan.count_parameters(load_settings(None, []), "rl", DEEPGEN_5B)


@pytest.mark.parametrize(("recipe", "gpus"), RL_RECIPES.items())
def test_rl_recipes_fit_what_they_say_and_the_plan_adds_it_up(
    recipe: str, gpus: int, rl_parameters: memory.Parameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without weights or data here."""
    monkeypatch.setattr(plan, "count_parameters", lambda *of: rl_parameters)
    settings = load_settings(find_recipe(recipe))
    text = plan.plan_text(settings, "rl")
    assert f"GPUs in all: {gpus} ({settings.train.workers} learner, {settings.rollout.actors} rollout, " in text
    assert plan.make_job(settings, "rl").total() <= memory.usable(80)
    for name in settings.rewards.used():
        assert f"  {name}: {settings.rewards.pools[name].replicas} replica" in text
    assert "size of the weights: not known without files in weights/" in text
    assert max(map(len, text.partition("beside the learner")[2].splitlines())) <= 120


def test_plan_of_pools(tmp_path: Path) -> None:
    """Replicas, GPUs, who asks elsewhere, and the size of weights that are here."""
    (tmp_path / "part.safetensors").write_bytes(b"")
    os.truncate(tmp_path / "part.safetensors", 64 * memory.GIB)  # takes no room on the disk
    (tmp_path / "the_same.bin").write_bytes(b"weights")
    judges = ["rewards.large.class=vlm_judge", f"rewards.large.path={tmp_path}", "rewards.large.gpus=4.0"]
    judges += ["rewards.far.class=vlm_judge", "rewards.far.endpoint=http://judge:1/v1", "rewards.far.model=m"]
    pools = [*judges, "rewards.far.gpus=0", "rewards.kept.path=nowhere", "rewards.ocr.replicas=1..6"]
    row = "rewards.weights.edit={large: 1, far: 1, kept: 1, ocr: 1, clip: 0}"
    none = [f"rewards.weights.{task}={{}}" for task in ("t2i", "reasoning", "text")]
    text = "\n".join(other_processes(load_settings(None, [*pools, row, *none]), 8 * memory.GIB))
    assert "8 rollout actors, one GPU each (rollout.actors)\n    the model in fp32: 8.0 GiB" in text
    assert "large: 1 replica, 4 GPUs each of one machine, over which the model is split (rewards.large.rep" in text
    assert "vLLM takes 85% of a GPU's memory" in text and "weights on each GPU, as large as their files: 16.0 G" in text
    assert "far: 1 replica that only ask" in text and "http://judge:1/v1" in text
    assert "kept: 1 replica, 0.1 of a GPU each" in text and "not known without files in nowhere" in text
    assert "ocr: 1 replica, up to 6 as requests wait, 0.05 of a CPU each and no GPU (" in text
    assert "GPUs in all: 21 (8 learner, 8 rollout, 0.1 kept, 4 large)" in text
    assert "one of them needs 4 GPUs" in text and "clip" not in text


def test_plan_of_rollout_actors_with_parts_of_a_gpu() -> None:
    parts = [
        "rollout.actors=1..3",
        "cluster.roles.rollout.gpus=0.2",
        "cluster.roles.learner.gpus=0.6",
        "train.workers=1",
    ]
    none = [f"rewards.weights.{task}={{ocr: 1}}" for task in ("t2i", "reasoning", "text", "edit")]
    text = "\n".join(other_processes(load_settings(None, [*parts, *none]), 8 * memory.GIB))
    assert "1 rollout actor, up to 3 as nodes come, 0.2 of a GPU each (rollout.actors)" in text
    assert "GPUs in all: 1 (0.6 learner, 0.2 rollout)" in text


@pytest.mark.parametrize(
    ("wanted", "gpus"), [([], 0), ([1, 1, 4], 6), ([0.9, 0.1, 0.9], 2), ([0.5, 0.6, 0.5], 2), ([0.1] * 10, 1)]
)
def test_parts_of_gpus_lie_side_by_side(wanted: list[float], gpus: int) -> None:
    assert cards(wanted) == gpus


def test_only_what_an_rl_run_draws_counts(rl_parameters: memory.Parameters, monkeypatch: pytest.MonkeyPatch) -> None:
    """Edits need more than generation: where they are rewarded, and where the auxiliary loss has them."""
    monkeypatch.setattr(plan, "count_parameters", lambda *of: rl_parameters)

    def size(*overrides: str) -> int:
        settings = load_settings(find_recipe("deepgen-5b-rl"), [*overrides])
        return plan.make_job(settings, "rl").batch()["activations: DiT"]

    assert size() < size("rewards.weights.edit.clip=1") == size("data.edit_per_cycle=1", "data.t2i_per_cycle=0")
    assert size() == size("data.edit_per_cycle=1", "algorithm.sft_coef=0")
