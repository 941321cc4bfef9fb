"""DeepSpeed behind four verbs: run, backward, step, load; and access to the weights, full or in pieces.

DeepSpeed wraps the whole model, so ZeRO-3 shards the frozen parts too. Every computation goes through the engine's
forward (``run``), because ZeRO gathers parameters there. DeepSpeed's own accumulation counter is off
(``managed_gradient_accumulation: false``): a call of ``step`` ends the batch, however many backward passes came before.

Checkpoints have a format of our own (``checkpoint_shards``). DeepSpeed's checkpoints load only with the number of
workers and the ZeRO stage that wrote them, and its universal format lacks stage 0 and requires a conversion of every
file.

Left out on purpose: fp16, parameter offload, pipeline and tensor parallelism.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from actors.learner.checkpoints.background import fail_together
from actors.learner.checkpoints.checkpoint_shards import ENGINE, Pieces, ShardReader
from actors.learner.checkpoints.zero_layout import WEIGHT, Stretch, pieces, restore, stretch_of
from actors.learner.collectives import gather
from actors.learner.protocols import NamedParameters, Weights

if TYPE_CHECKING:
    from deepgen.config.settings import Settings
    from deepgen.models.unified import UnifiedModel

_COUNTS = "counts"  # key of a piece that every rank saves: optimizer steps taken, and left out in a row


def parameter_groups(parameters: NamedParameters, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: weight decay for tensors of two or more dimensions, none for biases and norms (M2.2)."""
    decayed = [parameter for _, parameter in parameters if parameter.dim() >= 2]
    plain = [parameter for _, parameter in parameters if parameter.dim() < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class _AdamW(torch.optim.AdamW):
    """AdamW that asks before each step whether to take it. DeepSpeed clears up after it in either case."""

    wanted: Callable[[], bool]

    def step(self, closure: Any = None) -> Any:
        return super().step(closure) if self.wanted() else None


class _Computed(nn.Module):
    """Wraps the model so that forward calls any function of the model, under autocast if ``bf16``."""

    def __init__(self, model: UnifiedModel, device: torch.device, bf16: bool) -> None:
        super().__init__()
        self.model = model
        self._device_type = device.type
        self._bf16 = bf16

    def forward(self, compute: Callable[..., Any], *arguments: Any) -> Any:
        with torch.autocast(self._device_type, dtype=torch.bfloat16, enabled=self._bf16):
            return compute(self.model, *arguments)


class TrainingEngine:
    """The model, its optimizer and its ZeRO stage on this worker. Every method is collective over all workers."""

    def __init__(
        self, settings: Settings, model: UnifiedModel, trainable: NamedParameters, device: torch.device
    ) -> None:
        import deepspeed

        deepspeed.utils.logger.setLevel("WARNING")
        # DeepSpeed compiles this extension on first use (half a minute, needs g++). It serves inference collectives
        # that training never calls.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        train = settings.train
        self.zero_stage: int = train.zero_stage
        self.model = model
        self.parameters, self._device = trainable, device
        # DeepSpeed's AdamW for offloading compiles an extension; torch's fused AdamW is vectorised on the CPU too.
        self._adam = optimizer = _AdamW(
            parameter_groups(trainable, train.weight_decay),
            lr=train.learning_rate,
            betas=(train.beta1, train.beta2),
            fused=train.offload_optimizer or None,
        )
        optimizer.wanted = self._wanted
        self._grad_clip, self._plain_norm, self._leave_out = train.grad_clip, 0.0, False
        self.steps, self.skipped, self.skipped_in_a_row = 0, 0, 0  # optimizer steps taken, and left out
        self._held: dict[str, Tensor] = {}  # gradients held back, by parameter
        if self.zero_stage == 3:
            _keep_whole(model, "vae")
        module = _Computed(model, device, settings.model.precision == "bf16")
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=_configuration(settings, device), dist_init_required=False
        )

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world(self) -> int:
        return dist.get_world_size()

    def run(self, compute: Callable[..., Any], *arguments: Any) -> Any:
        """``compute(model, *arguments)`` inside the engine's forward. Outputs must be tensors or plain containers."""
        return self._engine(compute, *arguments)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch's loss. The loss is already scaled."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def hold(self, loss: Tensor, *, keep_graph: bool) -> None:
        """Add the gradient of one micro-batch's loss to those held back until ``release``.

        ``keep_graph``: the same forward has another backward pass to come. Costs one fp32 copy of all gradients, which
        is this worker's own until then. Not for ZeRO-3, which splits the parameters themselves.
        """
        trained = [parameter for _, parameter in self.parameters]
        gradients = torch.autograd.grad(loss, trained, retain_graph=keep_graph, allow_unused=True)
        for (name, _), gradient in zip(self.parameters, gradients, strict=True):
            if gradient is None:
                continue
            if name in self._held:
                self._held[name].add_(gradient)
            else:
                self._held[name] = gradient.detach().clone()

    def release(self, factor: float) -> None:
        """Add the gradients held back, times ``factor``, to those of this step."""
        held, self._held = self._held, {}
        for gradient in held.values():
            gradient.mul_(factor)
        pairs = [(parameter, held[name]) for name, parameter in self.parameters if name in held]
        if pairs:
            self.backward(self.run(_inner_product, pairs))

    def step(self, rate: float, *, leave_out: bool = False) -> float:
        """Average gradients over workers, clip, take one optimizer step, clear. Returns the norm before clipping.

        If that norm is not finite, or with ``leave_out``, the gradients are dropped and `skipped` counts the step, on
        all ranks alike; weights and moments, AdamW's count of steps included, stay as they were.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        self._leave_out = leave_out
        self._engine.step()  # stages 1 to 3 see by themselves what is not finite, and report infinity
        norm = self._plain_norm if self.zero_stage == 0 else float(self._engine.get_global_grad_norm())
        if leave_out or not math.isfinite(norm):
            self.skipped += 1
            self.skipped_in_a_row += 1
        else:
            self.steps += 1
            self.skipped_in_a_row = 0
        return norm

    def not_finite(self, pieces: Pieces | None = None) -> str:
        """Name of a trained weight with an element that is not finite; "" if there is none. The same on all ranks.

        pieces: what to look at instead, of this rank.
        """
        found = ""
        if pieces is None:
            pieces = (piece for piece in self.pieces() if piece[0].startswith(WEIGHT))
        mine = [(key, values.detach()) for key, _, values in pieces if values.numel()]
        if mine:
            # One look at the device for all of them: this is asked at every step.
            peaks = torch.stack([torch.linalg.vector_norm(values, math.inf).to(self._device) for _, values in mine])
            bad = (~peaks.isfinite()).nonzero()
            found = mine[int(bad[0])][0].removeprefix(f"{WEIGHT}:") if len(bad) else ""
        return next((name for name in gather(found, self.world) if name), "")

    def weights(self) -> Weights:
        """Full trainable parameters by name on rank 0, {} elsewhere. They are copies only under ZeRO-3."""
        weights = {}
        for name, parameter in self.parameters:
            with self._gathered([parameter]):
                if self.rank == 0:
                    weights[name] = parameter.detach().clone() if self.zero_stage == 3 else parameter.detach()
        return weights

    def pieces(self) -> Iterator[tuple[str, int, Tensor]]:
        """Views of the weights and moments that this worker saves: those it updates. Frozen weights are not saved."""
        if self.zero_stage == 0 and self.rank > 0:
            return  # all ranks hold the same state; rank 0 writes it
        yield _COUNTS, 0, torch.tensor([float(self.steps), float(self.skipped_in_a_row)])
        for name, parameter in self.parameters:
            stretch = stretch_of(parameter, self._engine.optimizer, self.zero_stage)
            if stretch:
                yield from pieces(name, stretch, self._adam.state[stretch.owner])

    def load(self, folder: Path, step: int) -> None:
        """Restore the ``pieces`` saved after ``step`` optimizer steps, by any number of workers at any ZeRO stage.

        ``step`` counts those left out, too.

        A worker reads the elements it updates. If the layout has not changed, its own file has them, bit for bit.
        Raises UserError if some are missing.
        """
        reader, zero = ShardReader(folder, ENGINE, self.rank), self._engine.optimizer
        self.steps, self.skipped_in_a_row = step, 0
        if reader.has(_COUNTS):  # else it is from before steps were left out
            self.steps, self.skipped_in_a_row = (int(count) for count in reader.read(_COUNTS, 0, 2))
        self.skipped = step - self.steps
        with self.split():
            for name, parameter in self.parameters:
                stretch = stretch_of(parameter, zero, self.zero_stage)
                if stretch:
                    restore(reader.read, name, stretch, self._adam.state[stretch.owner], self.steps)
                self._show(parameter, stretch)

    def _show(self, parameter: nn.Parameter, stretch: Stretch | None) -> None:
        """Copy the restored fp32 weight to the tensor that forward reads. Collective for stages 1 and 2."""
        if self.zero_stage == 3 and stretch:
            shard: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]  # set by ZeRO-3
            shard.data[: stretch.count].copy_(stretch.of(stretch.owner))
        elif self.zero_stage in (1, 2):
            from deepspeed.utils import safe_get_full_fp32_param

            parameter.data.copy_(safe_get_full_fp32_param(parameter))

    def export(self, folder: Path, replaced: Weights | None = None) -> None:
        """Write a component folder, replacing an older one. Rank 0 may pass ``replaced``, weights to write instead.

        Raises UserError on all ranks if it cannot be written.
        """
        unfinished, failure = folder.with_name(f".{folder.name}.writing"), None
        with self._gathered(list(self.model.parameters())):
            if self.rank == 0:
                try:
                    shutil.rmtree(unfinished, ignore_errors=True)
                    with _swapped(self.parameters, replaced or {}):
                        self.model.save_folder(unfinished)
                    if folder.exists():
                        shutil.rmtree(folder)
                    unfinished.rename(folder)
                except (OSError, SafetensorError) as error:
                    failure = error
                    shutil.rmtree(unfinished, ignore_errors=True)  # half a result is of no use, and its room is
        fail_together(failure, self.world, f"the result to {folder}")

    @contextmanager
    def split(self) -> Iterator[None]:
        """Allow writes into parameters: ZeRO-3 releases the small ones it keeps gathered, then gathers them again."""
        if self.zero_stage < 3:
            yield
            return
        self._engine.optimizer.checkpoint_event_prologue()
        yield
        self._engine.optimizer.checkpoint_event_epilogue()

    @contextmanager
    def _gathered(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        if self.zero_stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=None):
            yield

    def _wanted(self) -> bool:
        """Whether AdamW shall take its step. With ZeRO it asks once for each group of parameters."""
        if self.zero_stage == 0:
            # Without ZeRO, DeepSpeed clips but does not report the norm, so we clip here.
            parameters = [parameter for _, parameter in self.parameters]
            self._plain_norm = float(nn.utils.clip_grad_norm_(parameters, self._grad_clip))
            return not self._leave_out and math.isfinite(self._plain_norm)
        return not self._leave_out


def _inner_product(model: nn.Module, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Sum of parameter * gradient: a loss whose backward pass hands each parameter exactly that gradient."""
    return torch.stack([(parameter * gradient).sum() for parameter, gradient in pairs]).sum()


def _keep_whole(model: nn.Module, name: str) -> None:
    """Hide a frozen part from ZeRO-3, which would gather it on each use and hang unless all ranks use it together.

    The VAE is such a part: a rank encodes only the images that it has not cached.
    """
    part = model._modules.pop(name, None)
    if part is not None:
        object.__setattr__(model, name, part)


@contextmanager
def _swapped(parameters: NamedParameters, replaced: Weights) -> Iterator[None]:
    """Put other values into the parameters inside the context, then restore the parameters' own."""
    own = {name: parameter.detach().clone() for name, parameter in parameters if name in replaced}
    by_name = dict(parameters)
    for name in own:
        by_name[name].data.copy_(replaced[name])
    try:
        yield
    finally:
        for name, value in own.items():
            by_name[name].data.copy_(value)


def _configuration(settings: Settings, device: torch.device) -> dict[str, Any]:
    train = settings.train
    zero: dict[str, Any] = {"stage": train.zero_stage, "overlap_comm": False}
    if train.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": 1,  # used in DeepSpeed's reports only
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": train.grad_clip if train.zero_stage else 0.0,
        "zero_allow_untested_optimizer": True,  # torch's AdamW; DeepSpeed's compiles an extension
        "zero_force_ds_cpu_optimizer": False,  # the same when offloading
        "zero_optimization": zero,
        "steps_per_print": None,
    }
