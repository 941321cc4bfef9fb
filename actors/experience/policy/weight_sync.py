"""Moves policy weights from the learner to the rollout actors, once per version, and checks them on both sides.

The learner's rank 0 puts the arrays into the object store, and every rollout node copies them once, however many actors
it has. The objects belong to the learner's process, so actors fetch a version when it is published, not when they need
it.

Weights travel as fp32, whatever `model.precision` is: the DiT's parameters are fp32 on both sides, and autocast rounds
only some of them (docs/log.md).

Left out: direct GPU-to-GPU transfer, and sending only the weights that changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from actors.messages import Arrays, Canary, PolicyWeights

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 512 << 20  # several objects of this size travel better than one of many gigabytes


class WeightsMismatchError(RuntimeError):
    """An actor's weights are not the published ones."""


def publish_weights(version: int, weights: Mapping[str, Tensor], canary: Canary) -> PolicyWeights:
    """Put the policy's weights (name -> tensor, complete on this rank) into the object store."""
    import ray

    arrays = {name: tensor.detach().cpu().float().numpy() for name, tensor in weights.items()}
    refs = tuple(ray.put(shard) for shard in _shards(arrays))
    return PolicyWeights(version, policy_checksum(version, weights.items()), tuple(weights), refs, canary)


def policy_checksum(version: int, weights: Iterable[tuple[str, Tensor]]) -> str:
    """Hex digest (128 bit) of a version and its weights, so that weights under another number do not pass."""
    from deepgen.models.weights_io.folder import weights_checksum

    return hashlib.blake2b(f"{version}:{weights_checksum(weights)}".encode(), digest_size=16).hexdigest()


def fetch_weights(published: PolicyWeights, deadline_s: float) -> Arrays:
    """Arrays of a version, as read-only views into this node's object store."""
    import ray

    arrays: Arrays = {}
    for shard in ray.get(list(published.refs), timeout=deadline_s):
        arrays.update(shard)
    return arrays


def load_weights(parameters: Mapping[str, Tensor], arrays: Arrays, published: PolicyWeights) -> None:
    """Copy fetched arrays into the policy's trained parameters (name -> parameter); `verify_weights` checks the result.

    Raises WeightsMismatchError before anything is copied if names, shapes or dtypes are not the policy's.
    """
    import torch

    _check_names(published, "the learner sent", published.names, parameters)
    _check_names(published, "there arrived", arrays, parameters)
    for name, array in arrays.items():
        arrived, wanted = f"{array.dtype} {list(array.shape)}", f"float32 {list(parameters[name].shape)}"
        if arrived != wanted:
            raise WeightsMismatchError(
                f"weights of version {published.version}: {name} arrived as {arrived}; the policy has {wanted}"
            )
    for name, array in arrays.items():
        parameters[name].data.copy_(torch.tensor(array))


def verify_weights(parameters: Mapping[str, Tensor], published: PolicyWeights) -> None:
    """Raise WeightsMismatchError, naming both sides, unless the policy's trained parameters are the published version.

    The learner must have sent all that the policy trains, and nothing else.
    """
    _check_names(published, "the learner sent", published.names, parameters)
    here = policy_checksum(published.version, parameters.items())
    if here != published.checksum:
        raise WeightsMismatchError(
            f"weights of version {published.version}: the learner published checksum {published.checksum}, "
            f"but the rollout policy has {here}"
        )


def _check_names(published: PolicyWeights, who: str, found: Iterable[str], policy: Iterable[str]) -> None:
    missing, more = sorted({*policy} - {*found}), sorted({*found} - {*policy})
    if missing or more:
        raise WeightsMismatchError(
            f"weights of version {published.version}: of what the policy trains, {who} all but {missing[:3]}, "
            f"and {more[:3]} besides ({len(missing)} missing, {len(more)} unknown)"
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
