"""Interfaces between the learner's loop and the parts that a stage gives it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
# (model, context, suffix of the metric names) -> metrics; see `Evaluator.evaluation`
Evaluate = Callable[["UnifiedModel", "StepContext", str], dict[str, float]]


@dataclass(frozen=True)
class StepContext:
    """Which worker processes which step: everything that random numbers may depend on.

    ``seed`` is run.seed, ``step`` counts batches from 0, ``rank`` is one of ``world`` data-parallel workers.
    """

    seed: int
    step: int
    rank: int
    world: int
    device: torch.device


@dataclass(frozen=True)
class WorkerContext:
    """Everything a stage may use to make its source and objective inside one learner worker.

    ``model`` is the loaded model before DeepSpeed wraps it (an objective that needs a frozen reference copies it now).
    ``tracker`` exists on rank 0 only; sources and objectives may log images through it. ``say`` prints a line on the
    console that started the run (rank 0; elsewhere it does nothing).
    """

    stage: str
    settings: Settings
    model: UnifiedModel
    rank: int
    world: int
    device: torch.device
    tracker: Tracker | None
    say: Callable[[str], None]


@dataclass
class Arriving:
    """A batch that arrives in pieces while the learner works on it; always the same pieces in the same order.

    Each of ``pieces`` is a batch for ``Objective.prepare``. ``factor``, known after the last piece, is what the
    gradients of every ``HeldLoss`` are multiplied by.
    """

    pieces: Iterator[Any]
    factor: float = 1.0


@dataclass
class Held:
    """A loss, and metrics, that still lack the batch's ``factor``."""

    loss: Tensor
    metrics: Metrics


class HeldLoss(NamedTuple):
    """A loss in two parts, each scaled like a whole one (see ``Objective.loss``).

    ``now`` is complete (None: there is only the other). DeepSpeed looks for losses in tuples and expects a backward
    pass of its own for each; ``held`` is none of its business, so it is hidden in an object.
    """

    now: Tensor | None
    held: Held


class TrainedModel(Protocol):
    """The part of the engine that a source may use to publish. Both methods are collective: on all ranks or on none."""

    def weights(self) -> Weights:
        """On rank 0 the trainable parameters by name (full fp32 tensors, not copies: read them before returning).

        Elsewhere an empty dict.
        """

    def run(self, compute: Callable[..., Any], *arguments: Any) -> Any:
        """``compute(model, *arguments)`` inside the engine's forward, see `TrainingEngine.run`."""


class BatchSource(Protocol):
    """Gives every rank its batch of a step, and receives new weights.

    Order of calls in a run: ``load_state_dict`` and ``load`` (only on resume), ``publish(policy, start)``; then for
    each step ``next(step, rank, world)``, the update, ``publish(policy, step + 1)``, and ``state_dict(step + 1)`` and
    ``writer(step + 1)`` when a checkpoint is due; ``close()`` at the end, also after an error. Every rank calls all
    methods in the same order.
    """

    def next(self, step: int, rank: int, world: int) -> Any:
        """This rank's batch for optimizer step ``step``, whole or ``Arriving``; equally many micro-batches a rank."""

    def publish(self, policy: TrainedModel, version: int) -> None:
        """Receive the weights after ``version`` batches."""

    def metrics(self) -> dict[str, float]:
        """Metrics of the last batch that do not come from the update (rewards, staleness, ...). Rank 0's are logged."""

    def state_dict(self, step: int) -> dict[str, Any]:
        """JSON-able state that continues the stream exactly before ``step``. The checkpoint stores rank 0's."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state. Every rank gets the state that rank 0 saved."""

    def writer(self, step: int) -> Callable[[Path], None] | None:
        """A function that writes into a checkpoint's folder what ``state_dict(step)`` cannot hold; None if nothing.

        A thread of rank 0 calls it during the next steps. It must write the state as it is now.
        """

    def load(self, folder: Path) -> None:
        """Read what ``writer`` has written; called after ``load_state_dict``, on every rank."""

    def keep(self, folder: Path, step: int) -> str:
        """Write this rank's batch of ``step``, which has failed, into ``folder``, from where it can be replayed.

        Returns what a person should know about it, on rank 0 with the command that replays it; "" if there is nothing
        to write. Raises OSError or SafetensorError.
        """

    def close(self) -> None: ...


class Objective(Protocol):
    """Turns a batch into losses. ``prepare`` and ``loss`` run inside the DeepSpeed engine's forward, for ZeRO's hooks.

    ``prepare`` runs under ``torch.no_grad`` once per batch (encode prompts and images, reference velocities) and
    returns the micro-batches; ``loss`` is then called once for each. Autocast (model.precision) is already on in both.
    Before each call, torch's global generator is seeded from (seed, step, rank, micro-batch), so dropout and
    ``torch.rand`` are the same in a resumed run.
    """

    def prepare(self, model: UnifiedModel, batch: Any, context: StepContext) -> Sequence[Any]:
        """Micro-batches of ``batch``: at least one, and equally many on every rank (checked: ZeRO would hang)."""

    def mini_batches(self, micros: Sequence[Any]) -> Sequence[Sequence[Any]]:
        """The micro-batches in order, split: one optimizer step follows each part. The same sizes on every rank."""

    def loss(self, model: UnifiedModel, micro: Any, context: StepContext) -> tuple[Tensor | HeldLoss, Metrics]:
        """Scalar loss for the backward pass, ALREADY scaled: the sum over a mini-batch is the loss of its step.

        Gradients are averaged over ranks, so a mean over the global batch needs no factor for the world size if ranks
        hold equal shares. Metrics: plain keys are averaged over the micro-batches and ranks that report them, ``*_max``
        take the maximum, ``*_sum`` are added. ``images_sum``, the number of images, gives images per second.
        """


class Evaluator(Protocol):
    """Evaluates the model during training, in the same way in all stages. Every rank calls all methods."""

    def evaluation(self, step: int) -> Evaluate | None:
        """The function that evaluates the weights after ``step`` steps, or None. All ranks must agree.

        The loop calls it without gradients and dropout, with suffix "" for the weights and "_ema" for their averages.
        An evaluator whose pictures are drawn by rollout actors requests them here and returns None.
        """

    def arrived(self) -> dict[str, float]:
        """Metrics that evaluations ordered before have brought since the last call; rank 0's are logged."""

    def needed(self) -> frozenset[int]:
        """Steps that the run may have to go back to: the newest checkpoint until each is kept. Rank 0's count."""

    def close(self) -> None:
        """Called at the end, also after an error."""


class Replayed(NamedTuple):
    """Recorded steps that a run trains on in the place of its own."""

    steps: range
    state: Path | None  # folder with the engine's state before the first of them; None: it is model.weights


class Parts(NamedTuple):
    """The parts that a stage gives to the loop."""

    source: BatchSource
    objective: Objective
    evaluator: Evaluator | None
    replayed: Replayed | None = None


class ShardedModel(Protocol):
    """The part of the engine that checkpoints and averages need: which parameters a worker holds."""

    zero_stage: int
    parameters: NamedParameters

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def split(self) -> AbstractContextManager[None]:
        """Allow writes into parameters, see `TrainingEngine.split`."""

    def pieces(self) -> Iterator[tuple[str, int, Tensor]]:
        """What this worker saves, as views: (key, first element, values [n])."""

    def load(self, folder: Path, step: int) -> None: ...


class SavedBeside(Protocol):
    """State that is saved next to the engine's own (the averages)."""

    def pieces(self, engine: ShardedModel) -> Iterator[tuple[str, int, Tensor]]:
        """What this worker saves, like `ShardedModel.pieces`."""

    def load(self, folder: Path, engine: ShardedModel) -> None: ...
