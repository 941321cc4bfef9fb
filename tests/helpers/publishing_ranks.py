"""Learner ranks that take one optimizer step and publish, for tests of what rollout actors must find."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.helpers.forked import run_ranks


def publish_from_ranks(folder: Path, world: int, runs: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """What rank 0 would publish in each run (a list of overrides): weights, log_prob, kernels; and what changed."""
    rendezvous = f"file://{folder / f'rendezvous-{world}'}"
    exit_codes, outputs = run_ranks(_work, world, rendezvous, [list(run) for run in runs], folder)
    assert exit_codes == [0] * world, "\n".join(outputs)
    found: list[dict[str, Any]] = torch.load(folder / f"published-{world}.pt")
    return found


def _work(rank: int, world: int, rendezvous: str, runs: list[list[str]], folder: Path) -> None:
    import torch.distributed as dist

    from actors.learner.worker import prepare_process
    from deepgen.config import load_settings

    prepare_process(load_settings(None, runs[0]))
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    found = [_publish(load_settings(None, run)) for run in runs]
    if rank == 0:
        torch.save(found, folder / f"published-{world}.pt")
    dist.destroy_process_group()


def _publish(settings: Any) -> dict[str, Any]:
    from actors.experience.policy.canary import canary_log_prob, known_kernels
    from actors.learner.engine import TrainingEngine
    from deepgen.models.unified import UnifiedModel

    model, device = UnifiedModel.from_folder(settings.model.weights), torch.device("cpu")
    engine = TrainingEngine(settings, model, model.trainable_parameters("rl"), device)
    model.train()
    torch.manual_seed(5)
    engine.backward(engine.run(functools.partial(_loss, model.architecture)))
    engine.step(1e-3)
    before = torch.get_rng_state()
    with torch.no_grad():
        log_prob = float(engine.run(canary_log_prob, settings.rollout))
    untouched = torch.equal(before, torch.get_rng_state()) and model.training and model.transformer.training
    weights = {name: tensor.clone() for name, tensor in engine.weights().items()}
    return {"weights": weights, "log_prob": log_prob, "kernels": known_kernels(device), "untouched": untouched}


def _loss(sizes: Any, model: Any) -> torch.Tensor:
    context, pooled = torch.randn(1, 5, sizes.context_dim), torch.randn(1, sizes.pooled_dim)
    velocity: torch.Tensor = model.transformer(torch.randn(1, 8, 8, 8), torch.full([1], 500.0), context, pooled)
    return velocity.float().square().mean()
