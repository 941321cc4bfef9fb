"""What the learner's loop and the parts that a stage gives it promise each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from deepgen.config.settings import Settings
    from deepgen.models.unified import UnifiedModel
    from deepgen.tracking.tracker import Tracker

Weights = dict[str, Tensor]  # trained parameters by name
NamedParameters = list[tuple[str, nn.Parameter]]
Metrics = Mapping[str, float | Tensor]
# (model, context, suffix of the names) -> figures; see `Evaluator.evaluation`
Evaluate = Callable[["UnifiedModel", "StepContext", str], dict[str, float]]


@dataclass(frozen=True)
class StepContext:
    """Where and when a batch is worked on: everything random numbers may depend on.

    ``seed`` is run.seed, ``step`` counts optimizer steps from 0, ``rank`` of ``world`` data-parallel workers.
    """

    seed: int
    step: int
    rank: int
    world: int
    device: torch.device


@dataclass(frozen=True)
class WorkerContext:
    """What a stage may use to make its source and objective inside one learner worker.

    ``model`` is the loaded model before DeepSpeed wraps it (an objective that needs a frozen reference copies it now).
    ``tracker`` exists on rank 0 only; sources and objectives may log images through it. ``say`` shows a line on the
    console of the person who started the run (rank 0; elsewhere it does nothing).
    """

    stage: str
    settings: Settings
    model: UnifiedModel
    rank: int
    world: int
    device: torch.device
    tracker: Tracker | None
    say: Callable[[str], None]


class BatchSource(Protocol):
    """Gives every rank its batch of a step and is told about new weights.

    Order of calls in a run: ``load_state_dict`` (only on resume), ``publish(weights, start)``, then for each step
    ``next(step, rank, world)``, the update, ``publish(weights, step + 1)``, ``state_dict(step + 1)`` when a checkpoint
    is due; ``close()`` at the end, also after an error. All methods are called on every rank and in the same order.
    """

    def next(self, step: int, rank: int, world: int) -> Any:
        """Batch of this rank for optimizer step ``step``. All ranks must get the same number of micro-batches."""

    def publish(self, weights: Callable[[], Weights], version: int) -> None:
        """Weights after ``version`` optimizer steps. ``weights()`` is collective: call it on all ranks or on none.

        It returns on rank 0 the trainable parameters by name (full tensors, fp32, not copies: read them before
        returning) and an empty dict elsewhere.
        """

    def metrics(self) -> dict[str, float]:
        """Figures of the last batch that do not come from the update (rewards, staleness, ...); rank 0's are logged."""

    def state_dict(self, step: int) -> dict[str, Any]:
        """State that continues the stream exactly before ``step``; JSON-able. Rank 0's goes into the checkpoint."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; every rank gets the one of rank 0."""

    def close(self) -> None: ...


class Objective(Protocol):
    """Turns a batch into losses. What computes runs inside the DeepSpeed engine's forward, so that ZeRO hooks fire.

    ``prepare`` runs under ``torch.no_grad`` once a batch (encode prompts and images, reference velocities) and returns
    the micro-batches; ``loss`` is then called once for each. Autocast (model.precision) is already on in both.
    Before each call torch's global generator is seeded from (seed, step, rank, micro-batch), so dropout and
    ``torch.rand`` are the same in a resumed run.
    """

    def prepare(self, model: UnifiedModel, batch: Any, context: StepContext) -> Sequence[Any]:
        """Micro-batches of ``batch``, at least one and as many on every rank (checked: ZeRO would hang)."""

    def loss(self, model: UnifiedModel, micro: Any, context: StepContext) -> tuple[Tensor, Metrics]:
        """Scalar loss to send backward, ALREADY scaled so that the sum over micro-batches is the loss of the batch.

        Gradients are averaged over ranks, so a mean over the global batch needs no factor for the world size when
        ranks hold equal shares. Metric keys: plain keys are averaged over the micro-batches and ranks that report them,
        ``*_max`` take the maximum, ``*_sum`` are added. ``images_sum``, the number of images, gives images per second.
        """


class Evaluator(Protocol):
    """What is looked at beside training, the same way in all stages. All methods are called on every rank."""

    def evaluation(self, step: int) -> Evaluate | None:
        """What to compute with the weights after ``step`` steps, None for nothing; on all ranks alike.

        It is called without gradients and dropout, for the weights with suffix "" and for their averages with "_ema".
        An evaluator whose pictures are drawn elsewhere, by rollout actors, orders them here and returns None.
        """

    def close(self) -> None:
        """At the end, also after an error."""


class Parts(NamedTuple):
    """What a stage gives to the loop."""

    source: BatchSource
    objective: Objective
    evaluator: Evaluator | None


class ShardedModel(Protocol):
    """What checkpoints and averages need of the engine: where a worker holds which parameters."""

    zero_stage: int
    parameters: NamedParameters

    @property
    def rank(self) -> int: ...

    def split(self) -> AbstractContextManager[None]:
        """For writing into parameters, see `TrainingEngine.split`."""

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path, step: int) -> None: ...


class SavedBeside(Protocol):
    """State that is saved beside the engine's (the averages)."""

    def save(self, folder: Path, engine: ShardedModel) -> None: ...

    def load(self, folder: Path, engine: ShardedModel) -> None: ...
