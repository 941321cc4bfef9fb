"""The sections of the settings: every key with its default, meaning, unit and limits.

Defaults are the paper's values for the 5B model and its RL stage (method M3.1), also where the reference differs (M7).
Left out on purpose: facts that the weights folder holds, such as widths, layers and the VAE's scale.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import (
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    model_serializer,
    model_validator,
)

from deepgen.algorithms.rules import WHITEN, check_noise
from deepgen.config.schema.choices import OneOf, Replicas, limits
from deepgen.config.schema.paths import InputPath, OptionalOutputPath, RunFolder
from deepgen.config.schema.pools import PoolSettings, make_pools
from deepgen.config.schema.reward_weights import (
    BY_SOURCE,
    RewardWeight,
    WeightRule,
    check_row,
    ever_positive,
    weight_at,
)
from deepgen.config.schema.roles import RoleSettings
from deepgen.config.schema.section import Section, setting
from deepgen.errors import nearest
from deepgen.models.presets import PADDINGS, PRESETS
from deepgen.reading import reach
from deepgen.registry import ADVANTAGES, KL_FORMS, POLICY_LOSSES, REWARDS, SAMPLERS, SDE_WINDOWS

TASKS = ("t2i", "reasoning", "text", "edit")
HELD_OUT = "held_out"  # a row of rewards.weights: rewards that are watched and never trained on
Weight = Annotated[float, Field(ge=0, le=1e6)]
MAX_NAME = 100  # files and folders have up to 255 bytes, and longer names are made of this one
_TAKEN = ("mlflow.db", "mlflow.db-journal", "mlflow.db-shm", "mlflow.db-wal", "mlartifacts")
_DEVICE = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")  # no folder can be called so over SMB


class RunSettings(Section):
    about: ClassVar[str] = "one run and its folder"
    name: str = setting(
        "deepgen",
        "Name of the run and of its folder under run.dir.",
        pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9_-])?$",
        max_length=MAX_NAME,
        allowed=f"letters, digits, dots, dashes and underscores, {MAX_NAME} at most, with a letter or digit first and "
        "no dot last",
    )
    dir: RunFolder = setting(
        "runs",
        "Folder of all runs, also in a bucket; on a cluster every node has to see it. Relative to the current folder.",
        allowed="path, or s3://BUCKET/FOLDER or gs://BUCKET/FOLDER",
    )
    seed: int = setting(42, "Seed of everything random: data order, noise, dropout.", ge=0, lt=2**31)
    resume: bool = setting(False, "Continue run.name from its last checkpoint; the flag --resume sets it.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name.lower() in _TAKEN or _DEVICE.fullmatch(self.name):
            raise ValueError(
                f"run.name: got {self.name!r}, which is the name of a file in run.dir or of a device on a network "
                "folder; allowed: another name"
            )
        return self

    @property
    def folder(self) -> Path:
        """The folder for everything that the run writes."""
        return self.dir / self.name


class ModelSettings(Section):
    about: ClassVar[str] = "architecture, weights and precision"
    preset: Annotated[str, OneOf(PRESETS)] = setting("deepgen-5b", "Architecture the weights must have.")
    weights: InputPath = setting("weights/deepgen-5b", "Component folder, or a checkpoint of an earlier stage.")
    padding: Annotated[str, OneOf(PADDINGS)] = setting(
        "masked", "Left padding of prompts: masked, or attended to as the reference implementation does."
    )
    precision: Literal["fp32", "bf16"] = setting("bf16", "fp32, or bf16 autocast. Log-probabilities are fp32 in both.")
    gradient_checkpointing: bool = setting(True, "Recompute DiT activations in the backward pass to save memory.")
    lora_rank: int = setting(64, "Rank of the LoRA on the VLM in sft; 0 trains none.", ge=0, le=1024)
    lora_alpha: float = setting(128.0, "LoRA scale times rank.", gt=0)
    lora_dropout: float = setting(0.05, "Dropout on LoRA inputs.", ge=0, lt=1)
    fresh_bridge: bool = setting(False, "Start with new think tokens and bridge, as pretrain does; ignore saved ones.")


class DataSettings(Section):
    about: ClassVar[str] = "records and how they are mixed"
    train: InputPath = setting(
        "data/train.parquet", "Training records, a parquet file or a folder of them; in rl for the auxiliary loss."
    )
    prompts: InputPath = setting(
        "data/rl_prompts.parquet", "RL prompts: parquet, a folder, or a .txt with one prompt a line."
    )
    heldout: InputPath = setting("data/heldout.parquet", "Records never trained on, for evaluation.")
    image_size: int = setting(
        512, "Images have about this side squared as area, their own aspect.", unit="px", ge=32, le=4096, multiple_of=32
    )
    edit_per_cycle: int = setting(1, "Editing micro-batches in one optimizer step.", unit="micro-batches", ge=0)
    t2i_per_cycle: int = setting(
        2, "Generation micro-batches in one optimizer step (paper: pretrain 3, sft 2).", unit="micro-batches", ge=0
    )
    micro_batch: int = setting(4, "Records per forward and backward on one learner rank.", unit="records", ge=1)
    caption_drop: float = setting(
        0.1, "Share of generation captions replaced by an empty one, for guidance.", ge=0, le=1
    )
    temperature: float = setting(
        1.0,
        "Within editing and within generation a source (column source) of n records is drawn in proportion to "
        "n^(1/temperature): 1 by size, more evens out.",
        ge=1,
    )
    weights: dict[str, Weight] = setting(
        {},
        "How often each source is drawn instead, as {name: weight} with every source; empty is by temperature.",
        allowed="a weight >= 0, at most 1e6, for each source, as in {photos: 2, posters: 1}",
    )
    max_bad_share: float = setting(
        0.01,
        "Largest share of records or prompts that cannot be used; above it the run stops, at 0 at once.",
        ge=0,
        le=1,
    )
    threads: int = setting(
        2, "Threads of a learner rank that read the next step's records during this one; 0 reads when needed.", ge=0
    )
    allow: list[str] = setting(
        [],
        "What records may name besides files in the folder of their data and public addresses: folders, and hosts, "
        "addresses or networks that are private or are the endpoint of a bucket.",
        allowed=f"a list of {reach.ALLOWED}",
    )
    cache_dir: OptionalOutputPath = setting(
        "",
        "Folder that keeps what VAE and visual tower make of the images, for all ranks and later runs; empty keeps "
        "some of it in memory. On a cluster a folder every node sees, or each node's own.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.edit_per_cycle + self.t2i_per_cycle == 0:
            raise ValueError("data.edit_per_cycle and data.t2i_per_cycle: got 0 and 0; allowed: at least one above 0")
        for entry in self.allow:
            try:
                reach.check_allowed(entry)
            except ValueError as error:
                raise ValueError(f"data.allow: {error}") from error
        if self.weights and self.temperature != 1:
            raise ValueError(f"data.temperature: got {self.temperature:g} beside data.weights; allowed: one of the two")
        return self


class TrainSettings(Section):
    about: ClassVar[str] = "the learner: optimizer, ranks, checkpoints"
    steps: int = setting(
        1500, "Optimizer steps in all; in rl batches of rollouts, whatever algorithm.updates_per_batch.", ge=1
    )
    learning_rate: float = setting(2e-6, "Peak learning rate (paper: pretrain 1e-4, sft 5e-5, rl 2e-6).", gt=0, le=1)
    min_learning_rate: float = setting(0.0, "Where the cosine schedule ends.", ge=0)
    beta1: float = setting(0.9, "AdamW decay of the first moment.", ge=0, lt=1)
    beta2: float = setting(0.999, "AdamW decay of the second moment (paper: pretrain and sft 0.95).", ge=0, lt=1)
    weight_decay: float = setting(
        0.0, "AdamW weight decay of tensors with 2 or more dimensions (paper: pretrain, sft 0.05).", ge=0
    )
    warmup_steps: int = setting(20, "Steps of linear warm-up.", unit="steps", ge=0)
    schedule: Literal["cosine", "constant"] = setting("constant", "Learning rate after the warm-up.")
    grad_clip: float = setting(1.0, "Largest global norm of the gradient.", gt=0)
    workers: int = setting(8, "Learner ranks under Ray Train.", ge=1)
    threads: int = setting(1, "CPU threads of a learner rank.", ge=1)
    zero_stage: Literal[0, 1, 2, 3] = setting(
        2, "DeepSpeed ZeRO: 0 plain data parallel, 1 optimizer states split, 2 + gradients, 3 + weights."
    )
    offload_optimizer: bool = setting(
        False, "Keep optimizer states in the host's memory and step there; needs zero_stage 1 or more."
    )
    ema_decay: float = setting(
        0.0, "Decay of an averaged copy of the trained weights, evaluated beside them; 0 keeps none.", ge=0, lt=1
    )
    checkpoint_every: int = setting(50, "Steps between checkpoints; the last step always writes one.", ge=1)
    keep_checkpoints: int = setting(5, "Newest checkpoints kept.", ge=1)
    max_failures: int = setting(
        3,
        "How often in a row, without a newer checkpoint in between, workers start again from the last one after one "
        "failed; -1 is no limit, 0 never.",
        ge=-1,
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.warmup_steps > self.steps:
            raise ValueError(
                f"train.warmup_steps: got {self.warmup_steps} with train.steps {self.steps}; allowed: 0 to {self.steps}"
            )
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"train.min_learning_rate: got {self.min_learning_rate:g}; "
                f"allowed: at most train.learning_rate, {self.learning_rate:g}"
            )
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError(
                "train.offload_optimizer: got true with train.zero_stage 0; allowed: false, or train.zero_stage 1, 2, 3"
            )
        return self


class RolloutSettings(Section):
    about: ClassVar[str] = "sampling of images in rl"
    sampler: Annotated[str, OneOf(SAMPLERS)] = setting(
        "cps", "Sampler step. ode draws no noise and has no log-probabilities; rl takes it only with diffusion_nft."
    )
    eta: float = setting(1.0, "Noise level of the SDE samplers; for cps 1 is complete re-noising.", ge=0, le=2)
    num_steps: int = setting(50, "Denoising steps of a rollout.", unit="steps", ge=2, le=1000)
    shift: float = setting(3.0, "Shift of the noise schedule towards high noise; 1 is none.", gt=0)
    guidance_scale: float = setting(1.0, "Classifier-free guidance scale; 1 is off and halves the cost.", ge=1)
    sde_steps: int = setting(
        30,
        "Steps that are trained (diffusion_nft: their noise levels); never the last one, which adds no noise.",
        unit="steps",
        ge=1,
    )
    sde_window: Annotated[str, OneOf(SDE_WINDOWS)] = setting(
        "all",
        "all: every step draws noise and random ones are trained; window: noise only in a random run of neighbouring "
        "steps, all trained; first: that run at the beginning.",
    )
    group_size: int = setting(8, "Images sampled for one prompt, compared with each other.", unit="images", ge=1)
    prompts_per_step: int = setting(32, "Groups in one batch.", unit="prompts", ge=1)
    actors: Replicas = setting(
        8, "Rollout actors; with 2..8 the run begins with 2, and more join it and leave it with the cluster's nodes."
    )
    same_noise: bool = setting(True, "The images of a group start from the same noise.")
    threads: int = setting(1, "CPU threads of a rollout actor.", ge=1)

    @property
    def least_actors(self) -> int:
        """Rollout actors without which a run does not begin."""
        return limits(self.actors)[0]

    @property
    def most_actors(self) -> int:
        """Rollout actors that there are at most."""
        return limits(self.actors)[1]

    @model_validator(mode="after")
    def _check(self) -> Self:
        usable = self.num_steps - 1  # the last step adds no noise (M3.4)
        if self.sde_steps > usable:
            raise ValueError(
                f"rollout.sde_steps: got {self.sde_steps} with rollout.num_steps {self.num_steps}; "
                f"allowed: 1 to {usable} (the last step is never trained)"
            )
        check_noise(self.sampler, self.eta)
        return self


class AlgorithmSettings(Section):
    about: ClassVar[str] = "MR-GRPO: advantages and loss"
    advantage: Annotated[str, OneOf(ADVANTAGES)] = setting(
        "gdpo", "gdpo normalises each reward in its group, then mixes; the others mix raw rewards first."
    )
    whiten: Annotated[str, OneOf(WHITEN)] = setting(
        "global", "gdpo: advantages get mean 0 and deviation 1 over the whole batch, over a rank's share, or not."
    )
    advantage_clip: float = setting(5.0, "Advantages are clamped to plus and minus this.", gt=0)
    policy_loss: Annotated[str, OneOf(POLICY_LOSSES)] = setting(
        "clipped_ratio",
        "clipped_ratio: probability ratios of the sampler steps (paper); diffusion_nft: flow matching towards good "
        "samples and away from bad ones, with any sampler.",
    )
    clip_range: float = setting(1e-4, "The probability ratio is clipped to 1 plus and minus this.", gt=0, lt=1)
    kl: Annotated[str, OneOf(KL_FORMS, "none")] = setting(
        "velocity",
        "Distance to the initial model: of velocities (paper), of velocities over twice the squared noise scale "
        "(reference), of step means over twice the step's variance, or none. kl_beta does not transfer between them.",
    )
    kl_beta: float = setting(5e-7, "Weight of the KL term.", ge=0)
    sft_coef: float = setting(
        1e-4, "Lambda: (1 - lambda) of the RL loss plus lambda of the flow-matching loss.", ge=0, le=1
    )
    sft_batch: int = setting(
        32, "Records of data.train in the auxiliary loss, per learner rank and step.", unit="records", ge=1
    )
    update_micro_batch: int = setting(
        32, "Samples per forward and backward of the policy loss on a learner rank.", unit="samples", ge=1
    )
    updates_per_batch: int = setting(
        1, "Optimizer steps on one batch: its groups are split in order into so many mini-batches.", ge=1
    )
    decoupled_loss: bool = setting(
        False,
        "Ratio and clip against the policy that the step started from instead of the one that drew the samples; "
        "truncated importance weights make up for what lies between (decoupled PPO). On-policy it changes nothing.",
    )
    importance_cap: float = setting(2.0, "Largest importance weight of algorithm.decoupled_loss.", ge=1)
    off_policy_min_sigma: float = setting(
        0.0,
        "Of off-policy samples, transitions to a noise level below this are left out (OP-GRPO); 0 leaves out none.",
        ge=0,
        lt=1,
    )


_GENERAL = {"judge": 0.7, "clip": 0.3}
_TEXT = {"judge": 0.2, "clip": 0.1, "ocr": 0.7}


class RewardSettings(Section):
    """`weights` and any number of pools. Recipes and `model_dump()` list each pool by name, beside `weights`."""

    about: ClassVar[str] = "the pools of rewards, and their weights by task"
    weights: dict[str, dict[str, RewardWeight]] = setting(
        {"t2i": _GENERAL, "reasoning": _GENERAL, "text": _TEXT, "edit": _GENERAL},
        "Weight of each pool's reward for the prompts of each task; absent or 0 is never called. [0, 0.5, 200] rises "
        "from 0 at step 0 to 0.5 at step 200. A row source:NAME is for the prompts of that data set, whatever their "
        "task; the row held_out is of rewards that score all pictures and are never trained on. A recipe replaces "
        "whole rows; one weight is set as rewards.weights.text.ocr=0.5.",
        allowed=f"{WeightRule.allowed}, for each pool ({', '.join(REWARDS)}, or one of your own) of a task "
        f"({', '.join(TASKS)}), of {BY_SOURCE}NAME or of {HELD_OUT}",
    )
    pools: dict[str, SerializeAsAny[PoolSettings]] = Field(default_factory=dict)  # filled by `_gather_pools`

    @model_validator(mode="before")
    @classmethod
    def _gather_pools(cls, content: Any, info: ValidationInfo) -> Any:
        if not isinstance(content, Mapping):
            return content
        rest = {name: value for name, value in content.items() if name != "weights"}
        weights = {"weights": content["weights"]} if "weights" in content else {}
        return weights | {"pools": make_pools(rest, info.context)}

    @model_serializer(mode="wrap")
    def _spread_pools(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content = dump(self)
        return {"weights": content["weights"], **content["pools"]}

    @model_validator(mode="after")
    def _check(self) -> Self:
        for title, row in self.weights.items():
            key = f"rewards.weights.{title}"
            if not title.startswith(BY_SOURCE):
                more = f"; for the prompts of a data set: {BY_SOURCE}NAME"
                _require_known(key, "task", title, (*TASKS, HELD_OUT), more)
            for name in row:
                own = f"; a new one: rewards.{name}.class=package.module:Class"
                _require_known(f"{key}.{name}", "reward", name, tuple(self.pools), own)
            check_row(key, row)
        for name in self.held_out():
            if rows := self._rows_of(name):
                raise ValueError(
                    f"rewards.weights.{HELD_OUT}.{name}: {name} is trained on, by rewards.weights.{rows[0]}; "
                    "allowed: one of the two, as a held-out reward says nothing if it is optimised"
                )
        return self

    def row_of(self, task: str, source: str) -> str:
        """Name of the row with the weights of a prompt: that of its data set, if there is one, or else of its task."""
        return BY_SOURCE + source if BY_SOURCE + source in self.weights else task

    def weights_of(self, task: str, source: str) -> dict[str, RewardWeight]:
        """Weights of the rewards, by pool, for a prompt of a task from a data set."""
        return self.weights.get(self.row_of(task, source), {})

    def used(self) -> tuple[str, ...]:
        """Pools with a weight above 0 for some prompts in some step, or held out."""
        return tuple(n for n in self.pools if self._rows_of(n) or n in self.held_out())

    def tasks_of(self, name: str) -> tuple[str, ...]:
        """Tasks on whose prompts a reward may be trained; all of them if a data set has a weight for it."""
        rows = self._rows_of(name)
        return TASKS if any(title.startswith(BY_SOURCE) for title in rows) else tuple(rows)

    def _rows_of(self, name: str) -> list[str]:
        rows = self.weights.items()
        return [title for title, row in rows if title != HELD_OUT and name in row and ever_positive(row[name])]

    def held_out(self) -> dict[str, float]:
        """Weight, above 0, of each reward that is watched and never trained on."""
        row = {name: weight_at(weight, None) for name, weight in self.weights.get(HELD_OUT, {}).items()}
        return {name: weight for name, weight in row.items() if weight > 0}


class ExperienceSettings(Section):
    about: ClassVar[str] = "the stream of groups between rollout and learner"
    max_staleness: int = setting(
        0,
        "Policy versions by which samples are older than the update that uses them, exactly; 0 is on-policy.",
        unit="versions",
        ge=0,
    )
    overlap: Literal["auto", "on", "off"] = setting(
        "auto",
        "On-policy, let the learner start on a group once it is scored, while others are still drawn: auto where that "
        "costs nothing, on also where it costs a second backward pass (whitened advantages beside a KL), or off.",
    )
    transport: Literal["object_store", "nixl"] = setting(
        "object_store",
        "How the policy's weights reach the actors: once a node, through Ray's object store; or each actor reads them "
        "from the learner's memory, with RDMA where the network has it (nixl, a package that every node needs).",
    )
    deadline_s: float = setting(1800.0, "Longest wait of the learner for one batch.", unit="s", gt=0)
    silence_s: float = setting(
        300.0, "When nothing has moved for so long, a console line says who waits for whom.", unit="s", gt=0
    )
    journal: float = setting(
        0.0,
        "Most finished groups kept beside the run since its last checkpoint, with their scores, so that a resume draws "
        "them no second time; 0 keeps none.",
        unit="GiB",
        ge=0,
    )


class ClusterSettings(Section):
    about: ClassVar[str] = "the Ray cluster"
    address: str = setting(
        "auto-local",
        "auto-local joins the cluster of RAY_ADDRESS or of the submitted job, else starts one here; or a Ray address.",
        min_length=1,
    )
    num_cpus: int = setting(0, "CPUs of a cluster started here; 0 is all.", unit="CPUs", ge=0)
    start_deadline_s: float = setting(
        300.0, "Longest wait until every actor of the run is ready, with the start of nodes.", unit="s", gt=0
    )
    roles: dict[str, RoleSettings] = setting(
        {},
        "What one process asks of a node, by role (learner, rollout, stream, reward, or one reward's name): cpus (a "
        "share for placement, no limit), gpus (learner, rollout; 1), accelerator (H100), labels of the node.",
        allowed="a mapping for each role, as in {rollout: {gpus: 1, accelerator: H100, labels: {market: spot}}}",
    )


# Limits of the alarms (`deepgen.tracking.alarms`). In 26 steps of tiny-rl the highest values are: 0.55 of the groups
# without spread (ocr), KL 0.03, nothing missing or clipped.
ALARMS = {
    "zero_spread": 0.8,
    "missing": 0.2,
    "clip_share": 0.5,
    "ratio": 0.2,
    "kl": 1.0,
    "diversity": 0.3,
    "saturation": 0.2,
    "disagreement": 0.0,
    "hacking": 0.05,
    "object_store": 0.7,
}
HACKING_PROMPTS = 8  # with scores in two evaluations, that the alarm `hacking` needs at least
Action = Literal["report", "stop", "roll_back"]
ACTIONS: tuple[Action, ...] = get_args(Action)
Reaction = Annotated[tuple[Weight, Action], Field(strict=False)]  # written as a list, which is not strictly a tuple


class TrackingSettings(Section):
    about: ClassVar[str] = "MLflow, and alarms"
    uri: str = setting(
        "", "Tracking server or sqlite address; empty is MLFLOW_TRACKING_URI, else a sqlite file beside the runs."
    )
    experiment: str = setting("deepgen", "Name of the MLflow experiment.", min_length=1)
    grid_every: int = setting(10, "Steps between image grids of fixed prompts; 0 draws none.", unit="steps", ge=0)
    alarms: dict[str, Weight | Reaction | None] = setting(
        {},
        "Limits of alarms in rl that replace the defaults "
        f"{{{', '.join(f'{name}: {limit:g}' for name, limit in ALARMS.items())}}}; null turns one off. "
        "[limit, stop] ends the run, [limit, roll_back] (hacking alone) with the weights from before.",
        allowed=f"a number >= 0, at most 1e6, null, or [number, {' or '.join(ACTIONS)}] for {', '.join(ALARMS)}, as in "
        "{clip_share: 0.9, kl: null, hacking: [0.05, stop]}",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in self.alarms:
            _require_known("tracking.alarms", "alarm", name, tuple(ALARMS))
            if name != "hacking" and self.action(name) == "roll_back":
                raise ValueError(
                    f"tracking.alarms.{name}: got roll_back; allowed: report or stop, as only hacking knows since when"
                )
        return self

    def limit(self, name: str) -> float | None:
        """Limit of an alarm; None if it is off."""
        given = self.alarms.get(name, ALARMS[name])
        return given[0] if isinstance(given, tuple) else given

    def action(self, name: str) -> Action:
        """What follows when an alarm begins."""
        given = self.alarms.get(name)
        return given[1] if isinstance(given, tuple) else "report"


class EvaluationSettings(Section):
    about: ClassVar[str] = "held-out records before, during and after: rewards in rl, else the loss"
    prompts: int = setting(600, "Most held-out records that are looked at; 0 evaluates nothing.", unit="prompts", ge=0)
    samples_per_prompt: int = setting(4, "Images per held-out prompt in rl.", unit="images", ge=1)
    num_steps: int = setting(50, "Denoising steps of an evaluation image, without noise.", unit="steps", ge=1, le=1000)
    guidance_scale: float = setting(
        4.0,
        "Classifier-free guidance scale of evaluation images, apart from rollout.guidance_scale. The default is the "
        "reference's; 1 is off and halves the cost (the tiny recipes).",
        ge=1,
    )
    negative_prompt: str = setting(
        "", "What the guidance of evaluation images steers away from, for all tasks; empty is the empty prompt."
    )
    seed: int = setting(42, "Seed of the evaluation's noise: the same for every run compared.", ge=0, lt=2**31)
    every: int = setting(10, "Steps between evaluations; 0 is only before the first and after the last.", ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.negative_prompt and self.guidance_scale == 1:
            raise ValueError(
                f"evaluation.negative_prompt: got {self.negative_prompt[:60]!r} with evaluation.guidance_scale 1, "
                "which is no guidance; allowed: empty, or evaluation.guidance_scale above 1"
            )
        return self


def _require_known(key: str, what: str, given: str, allowed: Sequence[str], otherwise: str = "") -> None:
    if given not in allowed:
        hint = nearest(given, allowed) or otherwise
        raise ValueError(f"{key}: unknown {what} {given!r}; allowed: {', '.join(allowed)}{hint}")
