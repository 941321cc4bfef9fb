"""A model, a source and an objective small enough to compute by hand, for tests of the learner loop."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from actors.learner.protocols import Arriving, Held, HeldLoss
from deepgen.config import load_settings
from deepgen.models.presets import DEEPGEN_5B

WIDTH = 6
MICRO_BATCHES = 3
FACTOR = 0.3  # of the losses held back in `ToyHeld`
STEPS = 6
TOY = [
    f"train.steps={STEPS}",
    "train.warmup_steps=2",
    "train.learning_rate=0.01",
    "train.schedule=cosine",
    "train.weight_decay=0.1",
    "train.grad_clip=0.5",
    "train.checkpoint_every=2",
    "train.workers=1",
    "model.precision=fp32",
]


class ToyModel(nn.Module):
    """A frozen layer, then trainable ones; one of them is never used, like the dead LoRA adapters of method 1.10."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.frozen, self.hidden, self.out = nn.Linear(WIDTH, 16), nn.Linear(16, 16), nn.Linear(16, 1)
        self.unused = nn.Linear(4, 4)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(torch.tanh(self.frozen(x)))))

    def trainable_parameters(self, stage: str) -> list[tuple[str, nn.Parameter]]:
        self.frozen.requires_grad_(False)
        return [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]

    def save_folder(self, path: Path) -> None:
        (path / "transformer").mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, path / "transformer" / "toy.safetensors")


def toy_batch(step: int, rank: int, world: int, rows: int = 8) -> list[tuple[Tensor, Tensor]]:
    """This rank's rows of a step's micro-batches; the union over ranks does not depend on the number of ranks."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(MICRO_BATCHES, rows, WIDTH, generator=generator)
    share = rows // world
    mine = x[:, rank * share : (rank + 1) * share]
    return [(part, part.sin().sum(dim=1, keepdim=True)) for part in mine]


class ToySource:
    def __init__(self) -> None:
        self.published: list[int] = []

    def next(self, step: int, rank: int, world: int) -> list[tuple[Tensor, Tensor]]:
        return toy_batch(step, rank, world)

    def publish(self, policy: Any, version: int) -> None:
        self.published.append(version)

    def metrics(self) -> dict[str, float]:
        return {"source/published": float(len(self.published))}

    def state_dict(self, step: int) -> dict[str, Any]:
        return {"step": step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.published = []

    def writer(self, step: int) -> None: ...

    def load(self, folder: Path) -> None: ...

    def keep(self, folder: Path, step: int) -> str:
        (folder / "batch").write_text(str(step))
        return "kept"

    def close(self) -> None: ...


class ToyPieces(ToySource):
    """The same batches, one micro-batch at a time, and their losses in two parts (`ToyHeld`)."""

    def next(self, step: int, rank: int, world: int) -> Any:
        arriving = Arriving(iter(()))

        def pieces() -> Iterator[Any]:
            for micro in toy_batch(step, rank, world):
                yield [micro]
            arriving.factor = FACTOR

        arriving.pieces = pieces()
        return arriving


class ToyObjective:
    """Squared error. Its noise comes from torch's global generator, which the loop seeds.

    updates: optimizer steps on each batch, on equally many micro-batches.
    """

    def __init__(self, noise: float = 0.0, updates: int = 1) -> None:
        self.noise, self.size = noise, MICRO_BATCHES // updates
        self.arrivals: dict[int, dict[str, float]] = {}  # what evaluations bring, by the step at whose end they do
        self.back: frozenset[int] = frozenset()
        self.step = 0

    def prepare(self, model: Any, batch: Any, context: Any) -> Any:
        assert not torch.is_grad_enabled()
        return batch

    def mini_batches(self, micros: Sequence[Any]) -> list[Sequence[Any]]:
        return [micros[start : start + self.size] for start in range(0, len(micros), self.size)]

    def evaluation(self, step: int) -> Any:
        """The error on the first batch of step 0, measured every other step."""

        def measure(model: Any, context: Any, suffix: str) -> dict[str, float]:
            assert not torch.is_grad_enabled() and not model.training
            x, y = toy_batch(0, 0, 1)[0]
            return {f"heldout{suffix}/error": float(((model(x) - y) ** 2).mean())}

        self.step = step
        return measure if step % 2 == 0 else None

    def arrived(self) -> dict[str, float]:
        return self.arrivals.get(self.step, {})

    def needed(self) -> frozenset[int]:
        return self.back

    def close(self) -> None: ...

    def loss(self, model: Any, micro: tuple[Tensor, Tensor], context: Any) -> tuple[Tensor, dict[str, Any]]:
        x, y = micro
        error = ((model(x + self.noise * torch.randn_like(x)) - y) ** 2).mean()
        return error / self.size, {"loss/toy": error.detach(), "images_sum": len(x), "row_max": x.max()}


class ToyFailing(ToyObjective):
    """In these steps, something is not finite on the last rank alone: see `FAILURES`."""

    def __init__(self, steps: Sequence[int], what: str, updates: int = 1) -> None:
        super().__init__(updates=updates)
        self.steps, self.what = steps, what

    def loss(self, model: Any, micro: tuple[Tensor, Tensor], context: Any) -> tuple[Tensor, dict[str, Any]]:
        loss, metrics = super().loss(model, micro, context)
        failing = context.step in self.steps and context.rank == context.world - 1
        return FAILURES[self.what](loss) if failing else loss, metrics


FAILURES = {
    "loss": lambda loss: loss * torch.nan,
    "only the loss": lambda loss: loss + torch.nan,  # with the right gradient
    "gradient": lambda loss: loss + (0 * loss).sqrt(),  # a finite loss, with slope 0 / 0
    "norm": lambda loss: loss + 1e30 * (loss - loss.detach()),  # each element is finite, but not its square
}


class ToyHeld(ToyObjective):
    """Three quarters of the error are held back, without their factor."""

    def loss(self, model: Any, micro: tuple[Tensor, Tensor], context: Any) -> tuple[Any, dict[str, Any]]:
        loss, metrics = super().loss(model, micro, context)
        late = {"loss/toy": metrics.pop("loss/toy") / FACTOR}
        return HeldLoss(0.25 * loss, Held(0.75 * loss / FACTOR, late)), metrics


# -- runs of it, and what they must come to --------------------------------------------------------------------------


def toy_run(folder: Path, name: str, *overrides: str, **more: Any) -> dict[str, Any]:
    """A run for `run_workers`."""
    weights = folder / "weights"
    weights.mkdir(parents=True, exist_ok=True)
    (weights / "frozen").write_text("the same for all runs")
    return {"overrides": [*TOY, f"run.dir={folder}", f"run.name={name}", f"model.weights={weights}", *overrides]} | more


def toy_result(folder: Path, name: str, part: str = "model") -> dict[str, Tensor]:
    return load_file(folder / name / part / "transformer" / "toy.safetensors")


@dataclass(frozen=True)
class Expected:
    """The same training in plain PyTorch: the state after STEPS steps, and figures of each step."""

    weights: dict[str, Tensor]
    average: dict[str, Tensor]
    norms: list[float]  # mean over the optimizer steps of a batch
    losses: list[float]
    evaluations: list[dict[str, float]]  # figures of `ToyObjective.evaluation` after every other step, from 0


def plain_torch(overrides: Sequence[str] = (), left_out: Sequence[int] = ()) -> Expected:
    """The run with these settings. left_out: steps whose updates are not made."""
    from actors.learner.engine import parameter_groups
    from actors.learner.lr_schedule import learning_rate

    settings = load_settings(None, [*TOY, *overrides])
    model: Any = ToyModel()
    parameters = model.trainable_parameters("rl")
    optimizer = torch.optim.AdamW(parameter_groups(parameters, 0.1), betas=(0.9, 0.999))
    average = {name: p.detach().clone() for name, p in parameters}
    norms, losses, evaluations = [], [], [_evaluate(model, None)]
    updates = settings.algorithm.updates_per_batch
    toy = ToyObjective(updates=updates)
    for step in range(STEPS):
        losses.append(0.0)
        norms.append(0.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        for micros in toy.mini_batches(toy_batch(step, 0, 1)):
            for micro in micros:
                loss = toy.loss(model, micro, None)[0]
                loss.backward()
                losses[-1] += float(loss.detach()) / updates
            for parameter in model.unused.parameters():
                parameter.grad = torch.zeros_like(parameter)  # DeepSpeed's view of a parameter without gradient
            norms[-1] += float(torch.nn.utils.clip_grad_norm_([p for _, p in parameters], 0.5)) / updates
            if step not in left_out:
                optimizer.step()
            optimizer.zero_grad()
        decay = min(0.9, (1 + step) / (10 + step))
        for name, p in parameters:
            average[name] = decay * average[name] + (1 - decay) * p.detach()
        if step % 2:
            evaluations.append(_evaluate(model, average))
    return Expected(model.state_dict(), average, norms, losses, evaluations)


@torch.no_grad()
def _evaluate(model: ToyModel, average: dict[str, Tensor] | None) -> dict[str, float]:
    measure = ToyObjective().evaluation(0)
    model.eval()
    figures: dict[str, float] = measure(model, None, "")
    if average is not None:
        averaged = ToyModel().eval()
        averaged.load_state_dict(average, strict=False)
        figures |= measure(averaged, None, "_ema")
    model.train()
    return figures


def check_toy(folder: Path, name: str, expected: Expected) -> None:
    """Check that weights and averages of a finished run (train.ema_decay 0.9) match plain PyTorch, within rounding."""
    for part, tensors in (("model", expected.weights), ("model-ema", expected.average)):
        result = toy_result(folder, name, part)
        for key, value in tensors.items():
            torch.testing.assert_close(result[key], value, rtol=1e-5, atol=1e-6, msg=f"{name}, {part}: {key}")


def start(tmp_path: Path, *overrides: str) -> Any:
    """Settings of a run whose weights folder holds only a config, for tests of the steps before weights are read."""
    (tmp_path / "weights" / "transformer").mkdir(parents=True, exist_ok=True)
    (tmp_path / "weights" / "transformer" / "config.json").write_text(json.dumps(dict(DEEPGEN_5B.transformer)))
    own = [f"run.dir={tmp_path / 'runs'}", "run.name=a", f"model.weights={tmp_path / 'weights'}"]
    return load_settings(None, [*own, *overrides])
