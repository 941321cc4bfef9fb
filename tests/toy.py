"""A model, a source and an objective small enough to compute by hand, for tests of the learner loop itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

WIDTH = 6
MICRO_BATCHES = 3


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

    def publish(self, weights: Any, version: int) -> None:
        self.published.append(version)

    def metrics(self) -> dict[str, float]:
        return {"source/published": float(len(self.published))}

    def state_dict(self, step: int) -> dict[str, Any]:
        return {"step": step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.published = []

    def close(self) -> None: ...


class ToyObjective:
    """Squared error; the noise comes from torch's global generator, which the loop seeds."""

    def __init__(self, noise: float = 0.0) -> None:
        self.noise = noise

    def prepare(self, model: Any, batch: Any, context: Any) -> Any:
        assert not torch.is_grad_enabled()
        return batch

    def loss(self, model: Any, micro: tuple[Tensor, Tensor], context: Any) -> tuple[Tensor, dict[str, Any]]:
        x, y = micro
        error = ((model(x + self.noise * torch.randn_like(x)) - y) ** 2).mean()
        return error / MICRO_BATCHES, {"loss/toy": error.detach(), "images_sum": len(x), "row_max": x.max()}
