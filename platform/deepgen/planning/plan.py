"""What `--plan` prints: memory of a learner GPU by part, and the smallest clusters that have it.

Reads settings and presets only: starts no Ray, loads no weights, and takes parameter counts from a model on torch's
meta device. The arithmetic is `planning.memory`; here it meets the settings. Memory is in GiB, for a GPU sold as
80 GB has about 80 GiB.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from deepgen.config import Settings
from deepgen.models.presets import PRESETS, Architecture
from deepgen.models.stage_parts import Stage
from deepgen.planning import memory
from deepgen.planning.memory import FP32, GIB, Numbers, Parameters, States
from deepgen.planning.processes import other_processes

PROMPT_TOKENS = 256  # of a prompt with its chat wrapper; the limit is Architecture.max_prompt_tokens
GPU_GIB = (24, 40, 48, 80, 96, 141)
WORKERS = (1, 2, 4, 8, 16, 32, 64, 128)
_WIDTH = 58


@dataclass(frozen=True)
class Job:
    """Everything the memory of a learner rank depends on. `records`: samples in one forward and backward."""

    settings: Settings
    stage: Stage
    architecture: Architecture
    parameters: Parameters
    workers: int
    zero_stage: int
    records: int
    prompt_tokens: int = PROMPT_TOKENS

    @property
    def numbers(self) -> Numbers:
        return memory.CUDA_BF16 if self.settings.model.precision == "bf16" else memory.CUDA_FP32

    def states(self) -> States:
        return memory.states(
            self.parameters,
            self.zero_stage,
            self.workers,
            ema=self.settings.train.ema_decay > 0,
            offload_optimizer=self.settings.train.offload_optimizer and self.zero_stage > 0,
        )

    def batch(self) -> dict[str, int]:
        """Bytes that are there while a batch is worked on, by part."""
        parts = {"bf16 copies of the trained weights (autocast)": self.numbers.cast * self.parameters.trained}
        parts |= _policy_activations(self) if self.stage == "rl" else _flow_activations(self)
        return parts | {"communication: gradient bucket, gathered weights": self.states().buffers}

    def total(self) -> int:
        """The largest sum at any time, in bytes."""
        states = self.states()
        return states.kept + max(sum(self.batch().values()), states.step, states.export)


def plan_text(settings: Settings, stage: Stage) -> str:
    """The whole answer to `--plan`."""
    job = make_job(settings, stage)
    lines = [*_head(job), "", *_table(job), "", *_clusters(job)]
    return "\n".join([*lines, "", *_other_processes(job), *_notes(job)])


def make_job(settings: Settings, stage: Stage) -> Job:
    architecture = PRESETS[settings.model.preset]
    parameters = count_parameters(settings, stage, architecture)
    records = settings.algorithm.update_micro_batch if stage == "rl" else settings.data.micro_batch
    return Job(settings, stage, architecture, parameters, settings.train.workers, settings.train.zero_stage, records)


def count_parameters(settings: Settings, stage: Stage, architecture: Architecture) -> Parameters:
    """Sizes of everything a learner rank of this stage holds, from the model on the meta device."""
    import torch

    from deepgen.models.unified import UnifiedModel
    from deepgen.models.vlm import LoraSettings, add_lora

    model = UnifiedModel.from_architecture(architecture, "meta")
    if stage == "sft" and settings.model.lora_rank:
        with torch.device("meta"):
            add_lora(model.vlm, LoraSettings(rank=settings.model.lora_rank), architecture.fusion_layers[0])
    parameters = Parameters.of(model, stage)
    if stage == "rl" and settings.algorithm.kl != "none" and settings.algorithm.kl_beta > 0:
        tensors = (*model.transformer.parameters(), *model.transformer.buffers())
        parameters = replace(parameters, reference=sum(t.numel() for t in tensors))
    return parameters


# ---- Activations of each stage ----


def sample_tokens(
    architecture: Architecture, size: int, *, edit: bool, prompt_tokens: int = PROMPT_TOKENS
) -> tuple[int, int]:
    """Image tokens of the DiT, and context tokens, of one square sample of `size` pixels; an edit has one reference."""
    side = size // (architecture.vae_downsample * architecture.transformer["patch_size"])
    context = prompt_tokens + architecture.num_queries + ((size // 32) ** 2 if edit else 0)
    return side * side * (2 if edit else 1), context


def _tokens(job: Job, *, edit: bool) -> tuple[int, int]:
    return sample_tokens(job.architecture, job.settings.data.image_size, edit=edit, prompt_tokens=job.prompt_tokens)


def _flow_activations(job: Job) -> dict[str, int]:
    """Of the larger task in pretrain and sft. A gradient passes through DiT, bridge and decoder in both."""
    image, context = _tokens(job, edit=job.settings.data.edit_per_cycle > 0)
    checkpointing, joint = job.settings.model.gradient_checkpointing, job.stage == "sft"
    shape = {"batch": job.records, "context_tokens": context}
    return {
        "activations: DiT": memory.dit_activations(
            job.architecture, job.numbers, image_tokens=image, trained=joint, checkpointing=checkpointing, **shape
        ),
        "activations: bridge": memory.bridge_activations(job.architecture, job.numbers, **shape),
        "activations: VLM decoder": memory.vlm_activations(
            job.architecture,
            job.numbers,
            lora_rank=job.settings.model.lora_rank if joint else 0,
            checkpointing=checkpointing,
            **shape,
        ),
    }


def _policy_activations(job: Job) -> dict[str, int]:
    """Of the DiT, in the policy loss or in the auxiliary one, and the transitions of all groups of this rank.

    Each transition lies on the GPU with both states (diffusion_nft: a sample and its mixture with noise), each group
    with its conditioning, all in fp32.
    """
    settings, architecture = job.settings, job.architecture
    rewarded = any("edit" in settings.rewards.tasks_of(name) for name in settings.rewards.used())
    image, context = _tokens(job, edit=rewarded)
    branches = 1 if settings.rollout.guidance_scale == 1 else 2
    passes = [(job.records * branches, image, context)]
    if settings.algorithm.sft_coef:
        cycle = settings.data.edit_per_cycle + settings.data.t2i_per_cycle
        passes.append((settings.algorithm.sft_batch // cycle, *_tokens(job, edit=settings.data.edit_per_cycle > 0)))
    groups = -(-settings.rollout.prompts_per_step // job.workers)
    transitions = groups * settings.rollout.sde_steps * settings.rollout.group_size
    latent = architecture.transformer["in_channels"] * (settings.data.image_size // architecture.vae_downsample) ** 2
    return {
        "activations: DiT": max(
            memory.dit_activations(
                architecture,
                job.numbers,
                batch=batch,
                image_tokens=image_tokens,
                context_tokens=context_tokens,
                trained=True,
                checkpointing=settings.model.gradient_checkpointing,
            )
            for batch, image_tokens, context_tokens in passes
        ),
        "transitions of the step, conditioning of its groups": FP32
        * (2 * latent * transitions + groups * branches * context * architecture.context_dim),
    }


# ---- The text ----


def _head(job: Job) -> Iterator[str]:
    settings = job.settings
    checkpointing = "with" if settings.model.gradient_checkpointing else "without"
    yield (
        f"{settings.run.name}: {job.stage} of {settings.model.preset}, {job.workers} learner workers, "
        f"ZeRO-{job.zero_stage}, {settings.model.precision}"
    )
    unit = "transitions" if job.stage == "rl" else "records"
    yield f"{job.records} {unit} a forward, {settings.data.image_size} px, {checkpointing} gradient checkpointing"


def _table(job: Job) -> Iterator[str]:
    states, parameters = job.states(), job.parameters
    frozen = sum(parameters.frozen) + parameters.whole + parameters.reference
    reference = ", KL reference" if parameters.reference else ""
    yield "GiB on each learner GPU, kept from batch to batch"
    yield _row(f"frozen weights ({frozen / 1e6:,.0f} M{reference}, fp32)", states.frozen)
    yield _row(f"trained weights ({parameters.trained / 1e6:,.0f} M, fp32)", states.weights)
    yield _row("DeepSpeed's own fp32 copy of them", states.master)
    yield _row("gradients (fp32)", states.gradients)
    yield _row("AdamW's two moments (fp32)", states.moments)
    yield _row("averaged copy, train.ema_decay (fp32)", states.ema)
    yield "during a batch"
    batch = job.batch()
    for name, size in batch.items():
        yield _row(name, size)
    yield "at other times"
    yield _row("optimizer step: second gradients or all-gather", states.step)
    yield _row("ZeRO-3 start and export: the whole model in fp32", states.export)
    yield f"{'largest in all':<{_WIDTH}}{job.total() / GIB:8.1f}"
    if states.host:
        yield _row("main memory a rank, for the offloaded optimizer", states.host)


def _row(name: str, size: int | str) -> str:
    value = size if isinstance(size, str) else f"{size / GIB:.1f}" if size else "-"
    return f"  {name:<{_WIDTH - 2}}{value:>8}"


def _clusters(job: Job) -> Iterator[str]:
    yield "the smallest learner that fits, by GPU (fewest GPUs, then the lowest ZeRO stage)"
    yield f"  {'GPU':<10}{'usable GiB':>10}{'GPUs':>8}{'ZeRO':>8}{'needs GiB':>12}"
    key = "algorithm.update_micro_batch" if job.stage == "rl" else "data.micro_batch"
    one = replace(job, records=1)
    for size in GPU_GIB:
        head = f"  {f'{size} GB':<10}{memory.usable(size) / GIB:>10.1f}"
        if found := smallest_cluster(job, size):
            yield f"{head}{found.workers:>8}{found.zero_stage:>8}{found.total() / GIB:>12.1f}"
        elif found := smallest_cluster(one, size):
            yield f"{head}{found.workers:>8}{found.zero_stage:>8}{found.total() / GIB:>12.1f}  with {key}=1"
        else:
            last = replace(one, workers=_counts(job)[-1], zero_stage=3)
            cause = " at start and export" if last.states().export > sum(last.batch().values()) else ""
            yield f"{head}{last.workers:>8}{3:>8}{last.total() / GIB:>12.1f}  too much{cause}, even with {key}=1"


def smallest_cluster(job: Job, gpu_gib: int) -> Job | None:
    """The job with the fewest workers, then the lowest ZeRO stage, that fits GPUs of this size; None if none does."""
    for workers in _counts(job):
        for stage in range(4):
            candidate = replace(job, workers=workers, zero_stage=stage)
            if candidate.total() <= memory.usable(gpu_gib):
                return candidate
    return None


def _counts(job: Job) -> tuple[int, ...]:
    """Numbers of workers to try; in rl each rank gets as many groups."""
    groups = job.settings.rollout.prompts_per_step
    return tuple(n for n in WORKERS if job.stage != "rl" or groups % n == 0)


def _other_processes(job: Job) -> Iterator[str]:
    """Processes beside the learner."""
    if job.stage == "rl":
        parameters = job.parameters
        model = sum(parameters.frozen) + parameters.trained + parameters.whole
        yield from other_processes(job.settings, FP32 * model)


def _notes(job: Job) -> Iterator[str]:
    from deepgen.data.cache.disk_store import PENDING_BYTES
    from deepgen.data.cache.encoded import MEMORY_BYTES

    limit = job.architecture.max_prompt_tokens
    longer = replace(job, prompt_tokens=limit).total() - job.total()
    yield f"assumed: square images, one reference an edit, prompts of {PROMPT_TOKENS} tokens; one at the limit,"
    yield f"  {limit:,}, in a batch adds {longer / GIB:.1f} GiB. Usable: 95 % of the GPU less 2 GiB."
    if job.settings.data.cache_dir:
        yield f"in main memory: {PENDING_BYTES / GIB:.1f} GiB of latents a rank on their way to data.cache_dir."
    else:
        yield f"in main memory: {MEMORY_BYTES / GIB:.1f} GiB of cached latents a rank."
    yield "not estimated: fragmentation beyond that, the VAE's and the visual tower's passes, pictures on rank 0."
