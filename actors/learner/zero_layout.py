"""Where a worker keeps the fp32 weight and AdamW's moments of a parameter, by ZeRO stage.

Without ZeRO the optimizer updates the parameter itself; stages 1 and 2 give each worker a stretch of a flat buffer that
holds parts of many parameters, stage 3 an equal share of every parameter, the last ones padded. Here they all look the
same: a ``Stretch``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Read = Callable[[str, int, int], Tensor]  # (key, first element, count) -> values, as `ShardReader.read`
WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Stretch:
    """Elements ``start`` to ``start + count`` of a parameter seen flat, which this worker updates."""

    owner: Tensor  # what the optimizer updates, and the key of its state; fp32
    offset: int  # where the stretch begins in the owner
    start: int
    count: int

    def of(self, tensor: Tensor) -> Tensor:
        """View [count] of the owner, or of a tensor like it."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.count)


def stretch_of(parameter: nn.Parameter, optimizer: Any, zero_stage: int) -> Stretch | None:
    """What this worker updates of a trainable parameter; None if nothing. ``optimizer`` is the DeepSpeed engine's."""
    if zero_stage == 0:
        return Stretch(parameter, 0, 0, parameter.numel())
    if zero_stage < 3:
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]  # set by ZeRO-1 and 2
        if mapping is None:
            return None
        owner = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        address = mapping.hp_fragment_address
        return Stretch(owner, address.start, mapping.lp_fragment_address.start, address.numel)
    group, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = torch.distributed.get_rank() * padded
    count = min(padded, parameter.ds_numel - start)  # type: ignore[attr-defined]  # set by ZeRO-3
    return Stretch(optimizer.fp32_partitioned_groups_flat[group], offset, start, count) if count > 0 else None


def pieces(name: str, stretch: Stretch, state: dict[str, Any]) -> Iterator[tuple[str, int, Tensor]]:
    """Weight and moments of a stretch, as ``write_shard`` takes them. ``state``: the optimizer's, of the owner."""
    yield f"{WEIGHT}:{name}", stretch.start, stretch.of(stretch.owner)
    for key in MOMENTS:
        yield f"{key}:{name}", stretch.start, stretch.of(state[key])


def restore(read: Read, name: str, stretch: Stretch, state: dict[str, Any], step: int) -> None:
    """Put back weight and moments of a stretch, which ``step`` optimizer steps made. UserError if they are gone."""
    state["step"] = torch.tensor(float(step))  # AdamW's form of it
    stretch.of(stretch.owner).copy_(read(f"{WEIGHT}:{name}", stretch.start, stretch.count))
    for key in MOMENTS:
        if key not in state:
            state[key] = torch.zeros_like(stretch.owner)
        stretch.of(state[key]).copy_(read(f"{key}:{name}", stretch.start, stretch.count))
