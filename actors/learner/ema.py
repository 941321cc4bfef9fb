"""An averaged copy of the trained weights, updated after every optimizer step, saved and exported.

Each worker averages what it stores: its shard of a parameter under ZeRO-3, otherwise the whole parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from actors.learner.checkpoints.checkpoint_shards import AVERAGES, ShardReader
from actors.learner.protocols import NamedParameters, ShardedModel, Weights


def local_part(parameter: nn.Parameter) -> Tensor:
    """The part of a parameter that this worker stores: the ZeRO-3 shard [padded numel / world], otherwise all of it."""
    shard = getattr(parameter, "ds_tensor", None)
    return parameter.data if shard is None else shard.data


class Ema:
    """average += (1 - d) (parameter - average), with d = min(decay, (1 + n) / (10 + n)) at step n.

    d is small at first, so the averages soon forget the weights that the run started from.
    """

    def __init__(self, parameters: NamedParameters, decay: float) -> None:
        self.decay = decay
        self.parts: dict[str, Tensor] = {name: local_part(p).detach().float().clone() for name, p in parameters}

    def update(self, parameters: NamedParameters, step: int) -> None:
        """Add the weights after optimizer step ``step`` (from 0) to the averages."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in parameters:
            self.parts[name].lerp_(local_part(parameter).detach().float(), 1 - decay)

    @contextmanager
    def in_place(self, engine: ShardedModel) -> Iterator[None]:
        """Swap the averages into the model for the context; afterwards both are as before, to the bit. Collective."""
        with engine.split():
            self._exchange(engine.parameters)
        try:
            yield
        finally:
            with engine.split():
                self._exchange(engine.parameters)

    def _exchange(self, parameters: NamedParameters) -> None:
        for name, parameter in parameters:
            own, average = local_part(parameter), self.parts[name]
            held = own.clone()
            own.copy_(average)
            average.copy_(held)

    def full(self, engine: ShardedModel) -> Weights:
        """Full averages by name on rank 0, {} elsewhere. Collective."""
        if engine.zero_stage < 3:
            return dict(self.parts) if engine.rank == 0 else {}
        whole: Weights = {}
        for name, parameter in engine.parameters:
            shards = [torch.empty_like(self.parts[name]) for _ in range(dist.get_world_size())]
            dist.all_gather(shards, self.parts[name])
            if engine.rank == 0:
                shape = parameter.ds_shape  # type: ignore[attr-defined]  # set by ZeRO-3
                whole[name] = torch.cat(shards)[: shape.numel()].view(shape)
        return whole

    def pieces(self, engine: ShardedModel) -> Iterator[tuple[str, int, Tensor]]:
        """Views of the averages that this worker saves. Below ZeRO-3 all ranks hold the same, so only rank 0 does."""
        if engine.zero_stage == 3 or engine.rank == 0:
            yield from self._stretches(engine)

    def load(self, folder: Path, engine: ShardedModel) -> None:
        """Read averages that any number of workers wrote, at any ZeRO stage. Raises UserError if some are missing."""
        reader = ShardReader(folder, AVERAGES, engine.rank)
        for name, start, part in self._stretches(engine):
            part.copy_(reader.read(name, start, part.numel()))

    def _stretches(self, engine: ShardedModel) -> Iterator[tuple[str, int, Tensor]]:
        """(name, first element, view [n]) of each part that this worker averages, without ZeRO-3's padding."""
        for name, parameter in engine.parameters:
            part = self.parts[name].view(-1)
            start = engine.rank * part.numel() if engine.zero_stage == 3 else 0
            whole: int = getattr(parameter, "ds_numel", parameter.numel())
            yield name, start, part[: max(0, whole - start)]
