"""Phase times that nobody has given or measured: from the arithmetic of the recipe's DiT, and from stated assumptions.

What is called measured comes from one H200 (docs/performance.md). Nothing here was run on a cluster. Left out: encoding
the prompts, the second backward pass of `experience.overlap=on`, and communication that hides behind a backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from deepgen.config import PoolSettings, Settings
from deepgen.models.presets import PRESETS, Architecture
from deepgen.planning.memory import FP32, dit_linears
from deepgen.planning.plan import sample_tokens
from deepgen.planning.scale.phases import (
    ASSUMED,
    ESTIMATED,
    MEASURED,
    CallTime,
    Figure,
    PhaseFigures,
    ScoreFigure,
)

# Measured on one H200: 9 GB of weights, and pictures of 512 px.
COPY_BYTES_S = 9e9 / 5.2  # from a GPU to main memory
CHECKSUM_BYTES_S = 9e9 / 13.9
LOAD_BYTES_S = 9e9 / (1.7 + 18.8)  # into the model, and compared
DECODE_S = 0.155 / 8  # of one picture by the VAE
CONTROL_S = 0.0031  # of the stream for one group; 2 CPU cores
# Assumed.
DISK_BYTES_S = 2e9  # of the file system that all ranks write a checkpoint to
RESTART_S, REVIVE_S = 120.0, 60.0
TOKENS_S = 2500.0  # that a replica on vLLM writes
WRITTEN = 0.25  # of max_tokens, by a judge that writes
READ_S = 0.05  # of a judge that reads its answer from one token
GPU_IMAGE_S, CPU_IMAGE_S = 0.02, 0.4  # of a reward without vLLM
ADAMW_BYTES = 28  # read and written for one parameter: weight, gradient, two moments
MEMORY_BYTES_S = 3e12


@dataclass(frozen=True)
class Machine:
    """tflops: dense bf16 of one GPU, 1e12 a second; utilisation: the share of it that a DiT gets; link_gb_s: 1e9 bytes
    a second that a GPU sends to another node.
    """

    tflops: float = 989.0
    utilisation: float = 0.2
    link_gb_s: float = 25.0

    @property
    def flops_s(self) -> float:
        return self.tflops * 1e12 * self.utilisation


def dit_flops(architecture: Architecture, image_tokens: int, context_tokens: int) -> float:
    """Floating-point operations of one forward of the DiT for one image: two for each multiply-add.

    Its linear layers by tokens, and the attention's two products; modulation and norms are left out.
    """
    dit = architecture.transformer
    width = dit["num_attention_heads"] * dit["attention_head_dim"]
    layers, dual = dit["num_layers"], len(dit["dual_attention_layers"])
    image = (12 * layers + 4 * dual) * width**2  # attention 4, MLP 8; a second attention 4
    context = (12 * (layers - 1) + 3) * width**2  # the last block only reads the context
    both = image_tokens + context_tokens
    attention = 2 * width * (layers * both**2 + dual * image_tokens**2)
    return 2.0 * (image * image_tokens + context * context_tokens + attention)


def estimate(settings: Settings, machine: Machine, workers: int) -> PhaseFigures:
    """All phases of the recipe on this machine. workers: learner ranks, over which a checkpoint is split."""
    architecture, rollout, algorithm = PRESETS[settings.model.preset], settings.rollout, settings.algorithm
    size, edit = settings.data.image_size, any("edit" in settings.rewards.tasks_of(n) for n in settings.rewards.used())
    one = dit_flops(architecture, *sample_tokens(architecture, size, edit=edit)) / machine.flops_s
    branches = 1 if rollout.guidance_scale == 1 else 2
    trained = 4 if settings.model.gradient_checkpointing else 3  # forwards that forward and backward take
    reference = 1 if algorithm.kl != "none" and algorithm.kl_beta else 0
    decoded = DECODE_S * (size / 512) ** 2
    images = rollout.group_size
    parameters = dit_linears(architecture)
    weights = FP32 * parameters
    link = machine.link_gb_s * 1e9
    sft = algorithm.sft_batch * trained * one if algorithm.sft_coef else 0.0
    speed = f"{machine.tflops:g} TFLOPS at {machine.utilisation:.0%}"
    forward = f"{one * 1000:.1f} ms a DiT forward: {speed}"
    size_gb = f"{weights / 1e9:.1f} GB of trained weights"
    numbers = {
        "sample_s": Figure(images * (rollout.num_steps * branches * one + decoded), ESTIMATED, forward),
        "load_s": Figure(weights / LOAD_BYTES_S, ESTIMATED, f"{size_gb}, as measured on an H200"),
        "update_s": Figure(images * rollout.sde_steps * branches * (trained + reference) * one, ESTIMATED, forward),
        "step_s": Figure(
            sft + 2 * weights / link + parameters / workers * ADAMW_BYTES / MEMORY_BYTES_S,
            ESTIMATED,
            f"auxiliary loss {sft:.2f} s, all-reduce at {machine.link_gb_s:g} GB/s, AdamW",
        ),
        "publish_s": Figure(weights / COPY_BYTES_S, ESTIMATED, f"{size_gb}, as measured on an H200"),
        "sync_s": Figure(weights / CHECKSUM_BYTES_S + weights / link, ESTIMATED, "checksum as on an H200, one way"),
        "checkpoint_s": Figure(
            3 * weights / workers / COPY_BYTES_S, ESTIMATED, f"12 bytes a parameter, {workers} ranks"
        ),
        "write_s": Figure(3 * weights / DISK_BYTES_S, ASSUMED, f"{DISK_BYTES_S / 1e9:g} GB/s for all ranks together"),
        "restart_s": Figure(RESTART_S, ASSUMED),
        "revive_s": Figure(REVIVE_S, ASSUMED),
        "control_s": Figure(CONTROL_S, MEASURED, "docs/performance.md, on 2 CPU cores"),
    }
    return PhaseFigures(numbers, {name: _score(settings, name) for name in settings.rewards.used()})


def _score(settings: Settings, name: str) -> ScoreFigure:
    """Of a reward whose model is not known here."""
    pool = settings.rewards.pools[name]
    answers = _answers(pool, settings.rollout.group_size)
    if answers and getattr(pool, "mode", "") != "text":
        return ScoreFigure(CallTime(0.0, answers * READ_S), ASSUMED, f"{answers:g} answers an image of one token each")
    if answers:
        tokens = WRITTEN * getattr(pool, "max_tokens", 0)
        why = f"{answers:g} answers an image, {tokens:g} tokens each, {TOKENS_S:g} tokens/s a replica"
        return ScoreFigure(CallTime(0.0, answers * tokens / TOKENS_S), ASSUMED, why)
    seconds, where = (GPU_IMAGE_S, "a GPU") if pool.gpus else (CPU_IMAGE_S, "a CPU core")
    return ScoreFigure(CallTime(0.0, seconds), ASSUMED, f"a small model on {where}")


def _answers(pool: PoolSettings, images: int) -> float:
    """Answers that a judge writes for one image; 0 for a reward that is no judge on vLLM."""
    if not hasattr(pool, "max_tokens"):
        return 0.0
    if getattr(pool, "tournament", "") == "full":
        pairs = images * (images - 1) / 2 * (2 if getattr(pool, "both_orders", False) else 1)
        return pairs / images
    return 1.0
