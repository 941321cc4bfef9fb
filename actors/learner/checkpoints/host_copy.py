"""Copies in host memory of what a checkpoint holds, so that the next step may change the originals at once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from actors.learner.checkpoints.checkpoint_shards import Pieces


class HostCopies:
    """Host memory that one checkpoint after another uses: as much as this rank writes.

    Do not call ``take`` while something still reads what it returned before. Copies of GPU tensors are in pinned
    memory, which the GPU writes without help of the CPU.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str, int], Tensor] = {}

    def take(self, shards: Mapping[str, Pieces]) -> dict[str, list[tuple[str, int, Tensor]]]:
        """The pieces of each shard as they are now, without empty ones."""
        on_gpu, copies = False, dict[str, list[tuple[str, int, Tensor]]]()
        for name, pieces in shards.items():
            copies[name] = []
            for key, start, values in pieces:
                if values.numel():
                    on_gpu |= values.is_cuda
                    copies[name].append((key, start, self._copy((name, key, start), values.detach())))
        if on_gpu:
            torch.cuda.synchronize()
        return copies

    def _copy(self, place: tuple[str, str, int], values: Tensor) -> Tensor:
        if place not in self._buffers:
            self._buffers[place] = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        return self._buffers[place].copy_(values, non_blocking=True)
