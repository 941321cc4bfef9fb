"""Measures a real engine's memory on this worker: bytes of weights, copies, gradients and moments."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from actors.learner.ema import Ema
from actors.learner.engine import TrainingEngine
from tests.helpers.factories import make_tiny_model


def measure(settings: Any) -> dict[str, int]:
    """Train the tiny DiT for two steps, then measure every part before and after a third step."""
    before = _everything()  # an engine measured earlier in this process, which DeepSpeed never frees
    model = make_tiny_model()
    engine = TrainingEngine(settings, model, model.trainable_parameters("rl"), torch.device("cpu"))
    ema = Ema(engine.parameters, 0.9)
    for _ in range(2):
        _backward(engine)
        engine.step(1e-3)
    rest = _everything() - before
    _backward(engine)
    optimizer = engine._engine.optimizer
    trained = [p for _, p in engine.parameters]
    chosen = {id(p) for p in trained}
    vae: nn.Module = model.vae  # ZeRO-3 hides it from model.parameters()
    frozen = [p for p in {*model.parameters(), *vae.parameters()} if id(p) not in chosen]
    found = {
        "weights": _bytes(_held(p) for p in trained),
        "frozen": _bytes(_held(p) for p in frozen) + _bytes({*model.buffers(), *vae.buffers()}),
        "master": _bytes(_master(optimizer, engine.zero_stage)),
        "gradients": _bytes(_gradients(optimizer, trained, engine.zero_stage)),
        "moments": _bytes(_moments(optimizer, engine.zero_stage)),
        "ema": _bytes(ema.parts.values()),
        "rest": rest,
    }
    engine.step(1e-3)
    return found


def _backward(engine: TrainingEngine) -> None:
    def compute(model: Any) -> Tensor:
        sizes = model.architecture
        context, pooled = torch.randn(1, 5, sizes.context_dim), torch.randn(1, sizes.pooled_dim)
        velocity: Tensor = model.transformer(torch.randn(1, 8, 8, 8), torch.full([1], 500.0), context, pooled)
        return velocity.square().mean()

    engine.backward(engine.run(compute))


def _held(parameter: nn.Parameter) -> Tensor:
    shard = getattr(parameter, "ds_tensor", None)
    return parameter.data if shard is None else shard.data


def _master(optimizer: Any, stage: int) -> list[Tensor]:
    if stage == 0:
        return []
    return list(optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups)


def _moments(optimizer: Any, stage: int) -> list[Tensor]:
    state = (optimizer if stage == 0 else optimizer.optimizer).state
    return [
        tensor for own in state.values() for tensor in own.values() if torch.is_tensor(tensor) and tensor.numel() > 1
    ]


def _gradients(optimizer: Any, trained: list[nn.Parameter], stage: int) -> list[Tensor]:
    if stage < 2:
        return [p.grad for p in trained if p.grad is not None]
    if stage == 3:
        return [optimizer.grad_partitions_flat_buffer]
    return [tensor for group in optimizer.all_grad_tensors.values() for tensor in group]


def _everything() -> int:
    """Bytes of all float tensors in this process between two batches, except DeepSpeed's bucket."""
    gc.collect()
    tensors = [
        t for t in gc.get_objects() if isinstance(t, Tensor) and t.device.type == "cpu" and t.is_floating_point()
    ]
    return _bytes(t for t in tensors if t.untyped_storage().nbytes() < 1 << 30)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' distinct storages."""
    storages = [tensor.detach().untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
