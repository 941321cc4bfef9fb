"""Moves policy weights from the learner to the rollout actors, once per version, and checks them on both sides.

The learner's rank 0 puts the arrays into the object store, and every rollout node copies them once, however many actors
it has. With `experience.transport=nixl` they stay in rank 0's memory, and every actor reads them there (Ray Direct
Transport): by RDMA where the network has it, else by shared memory or TCP. Only `_put` and `_received` know the
difference. The objects belong to the learner's process, so a node (with nixl, an actor) fetches a version when it is
published, not when a group needs it.

Weights travel as fp32, whatever `model.precision` is: the DiT's parameters are fp32 on both sides, and autocast rounds
only some of them (docs/log.md).

Left out: transfer out of the learner's GPU memory, which would have to hold a copy of the policy for each version that
is still needed; and sending only the weights that changed.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.messages import NIXL, OBJECT_STORE, Arrays, Canary, PolicyWeights
from deepgen.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 512 << 20  # several objects of this size travel better than one of many gigabytes
FIRST_WAIT = 12  # share of the deadline after which Ray is asked anew: twice within the deadline of a `prefetch`


class WeightsMismatchError(RuntimeError):
    """An actor's weights are not the published ones."""


def check_transport(transport: str) -> None:
    """Raise UserError unless this machine can send and receive with `experience.transport`."""
    if transport == NIXL and importlib.util.find_spec("nixl") is None:
        raise UserError(f"experience.transport={NIXL}: the package nixl is missing; `pip install nixl` on every node")


def publish_weights(
    version: int, weights: Mapping[str, Tensor], canary: Canary, transport: str = OBJECT_STORE
) -> PolicyWeights:
    """Make the policy's weights (name -> tensor, complete on this rank) readable for the actors.

    transport: as in `experience.transport`. With nixl, tensors that are fp32 on the CPU are not copied: they must not
    change any more.
    """
    ready = {name: tensor.detach().cpu().float().contiguous() for name, tensor in weights.items()}
    refs = tuple(_put(shard, transport) for shard in _shards(ready))
    checksum = policy_checksum(version, weights.items())
    return PolicyWeights(version, checksum, tuple(weights), refs, canary, transport)


def _put(shard: dict[str, Tensor], transport: str) -> Any:
    import ray

    if transport == NIXL:
        return ray.put(shard, _tensor_transport=NIXL)
    return ray.put({name: tensor.numpy() for name, tensor in shard.items()})


def _received(shard: Mapping[str, Any]) -> Arrays:
    return {name: value if isinstance(value, np.ndarray) else value.numpy() for name, value in shard.items()}


def policy_checksum(version: int, weights: Iterable[tuple[str, Tensor]]) -> str:
    """Hex digest (128 bit) of a version and its weights, so that weights under another number do not pass."""
    from deepgen.models.weights_io.folder import weights_checksum

    return hashlib.blake2b(f"{version}:{weights_checksum(weights)}".encode(), digest_size=16).hexdigest()


def fetch_weights(published: PolicyWeights, deadline_s: float) -> Arrays:
    """Arrays of a version: read-only views into this node's object store, or this process's own copy (nixl).

    Raises GetTimeoutError after the deadline. Ray asks an object's owner once about it, when a process gets its
    reference. If another thread lets go of the process's last one just then, the answer is lost, and every `ray.get`
    waits for ever (ray 2.60; 1 of 16,000 calls that were made to meet like this). A reference that comes out of an
    object asks anew. The first wait is long enough for what is only slow, as a wait that ends may end a transfer.
    """
    import ray
    from ray.exceptions import GetTimeoutError

    refs, left, wait = list(published.refs), deadline_s, deadline_s / FIRST_WAIT
    while True:
        try:
            shards = ray.get(refs, timeout=min(wait, left) if published.transport == OBJECT_STORE else left)
            break
        except GetTimeoutError:
            left -= wait
            if left <= 0 or published.transport != OBJECT_STORE:
                raise
            refs, wait = ray.get(ray.put(refs), timeout=left), 2 * wait
    arrays: Arrays = {}
    for shard in shards:
        arrays.update(_received(shard))
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


def _shards(weights: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in weights.items():
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard
