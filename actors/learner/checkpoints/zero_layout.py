"""Where a worker keeps the fp32 weight and AdamW's moments of a parameter, by ZeRO stage.

- Stage 0: the optimizer updates the parameter itself, on every worker.
- Stages 1 and 2: all parameters lie end to end in flat buffers, and each worker updates one section of each buffer. The
  section holds all, a part or nothing of a given parameter.
- Stage 3: each worker updates an equal share of every parameter; the last shares are padded.

A ``Stretch`` describes all three cases in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Read = Callable[[str, int, int], Tensor]  # (key, first element, count) -> values, like `ShardReader.read`
WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Stretch:
    """Elements ``start`` to ``start + count`` of a flattened parameter, which this worker updates."""

    owner: Tensor  # the fp32 tensor that the optimizer updates, and the key of its state
    offset: int  # first element inside the owner
    start: int
    count: int

    def of(self, tensor: Tensor) -> Tensor:
        """View [count] of this stretch in the owner, or in a tensor laid out like the owner."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.count)


def stretch_of(parameter: nn.Parameter, optimizer: Any, zero_stage: int) -> Stretch | None:
    """The stretch of a trainable parameter that this worker updates, or None. ``optimizer`` is DeepSpeed's."""
    if zero_stage == 0:
        return Stretch(parameter, 0, 0, parameter.numel())
    if zero_stage < 3:
        # hp ("high precision") is this worker's fp32 section, lp ("low precision") the parameter that forward reads.
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]  # set by ZeRO-1 and 2
        if mapping is None:
            return None
        owner = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        address = mapping.hp_fragment_address
        return Stretch(owner, address.start, mapping.lp_fragment_address.start, address.numel)
    # Every share has `padded` elements, and the shares together may exceed the parameter. The excess is padding, so the
    # last share is cut, and a worker whose share is all padding updates nothing.
    group, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = torch.distributed.get_rank() * padded
    count = min(padded, parameter.ds_numel - start)  # type: ignore[attr-defined]  # set by ZeRO-3
    return Stretch(optimizer.fp32_partitioned_groups_flat[group], offset, start, count) if count > 0 else None


def pieces(name: str, stretch: Stretch, state: dict[str, Any]) -> Iterator[tuple[str, int, Tensor]]:
    """Weight and moments of a stretch, as ``write_shard`` takes them. ``state``: the optimizer's, of the owner.

    Before the first step, the optimizer has no moments yet: they are 0.
    """
    yield f"{WEIGHT}:{name}", stretch.start, stretch.of(stretch.owner)
    for key in MOMENTS:
        yield f"{key}:{name}", stretch.start, stretch.of(state[key]) if key in state else torch.zeros(stretch.count)


def restore(read: Read, name: str, stretch: Stretch, state: dict[str, Any], step: int) -> None:
    """Restore weight and moments of a stretch as they were after ``step`` steps. UserError if some are missing."""
    state["step"] = torch.tensor(float(step))  # AdamW keeps it as a tensor
    stretch.of(stretch.owner).copy_(read(f"{WEIGHT}:{name}", stretch.start, stretch.count))
    for key in MOMENTS:
        if key not in state:
            state[key] = torch.zeros_like(stretch.owner)
        stretch.of(state[key]).copy_(read(f"{key}:{name}", stretch.start, stretch.count))
