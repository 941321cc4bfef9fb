"""Moves policy weights from the learner to the rollout actors, once per version, and checks them on both sides.

The learner's rank 0 puts the arrays into the object store, and every rollout node copies them once, however many actors
it has. The objects belong to the learner's process, so actors fetch a version when it is published, not when they need
it.

Left out: direct GPU-to-GPU transfer, and sending only the weights that changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from actors.messages import PolicyWeights

if TYPE_CHECKING:
    from torch import Tensor, nn

SHARD_BYTES = 512 << 20  # several objects of this size travel better than one of many gigabytes


class WeightsMismatchError(RuntimeError):
    """An actor's weights are not the published ones."""


def publish_weights(version: int, weights: Mapping[str, Tensor]) -> PolicyWeights:
    """Put the policy's weights (name -> tensor, complete on this rank) into the object store."""
    import ray

    from deepgen.models.weights_io.folder import weights_checksum

    arrays = {name: tensor.detach().cpu().float().numpy() for name, tensor in weights.items()}
    refs = tuple(ray.put(shard) for shard in _shards(arrays))
    return PolicyWeights(version, weights_checksum(weights.items()), tuple(weights), refs)


def fetch_weights(published: PolicyWeights, deadline_s: float) -> dict[str, np.ndarray]:
    """Arrays of a version, as read-only views into this node's object store."""
    import ray

    arrays: dict[str, np.ndarray] = {}
    for shard in ray.get(list(published.refs), timeout=deadline_s):
        arrays.update(shard)
    return arrays


def load_weights(model: nn.Module, arrays: Mapping[str, np.ndarray], published: PolicyWeights) -> None:
    """Copy fetched arrays into the model's parameters of the same names, then compare checksums."""
    import torch

    parameters = dict(model.named_parameters())
    unknown = [name for name in arrays if name not in parameters]
    if unknown:
        raise WeightsMismatchError(f"weights of version {published.version}: the policy has no parameter {unknown[0]}")
    for name, array in arrays.items():
        parameters[name].data.copy_(torch.tensor(array))
    verify_weights(model, published)


def verify_weights(model: nn.Module, published: PolicyWeights) -> None:
    """Raise WeightsMismatchError, naming both checksums, unless the model holds exactly the published version."""
    from deepgen.models.weights_io.folder import weights_checksum

    parameters = dict(model.named_parameters())
    here = weights_checksum((name, parameters[name]) for name in published.names)
    if here != published.checksum:
        raise WeightsMismatchError(
            f"weights of version {published.version}: the learner published checksum {published.checksum}, "
            f"but the rollout policy has {here}"
        )


def _shards(arrays: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, array in arrays.items():
        if shard and size + array.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = array
        size += array.nbytes
    yield shard
