"""Workers that write a DeepSpeed checkpoint like the published training code, for tests that read it."""

from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from tests.helpers.forked import run_ranks


def write_deepspeed(out: Path, stage: int, world: int) -> None:
    """Write a checkpoint from `world` workers. Rank 0 also writes the full parameters to `out`/truth.safetensors.

    Names are the native ones (M6.2). Sizes are odd, so that partitions need padding. One parameter is frozen.
    """
    exit_codes, outputs = run_ranks(write, world, stage, f"file://{out / 'meet'}", out)
    assert exit_codes == [0] * world, "\n".join(outputs)


class Native(torch.nn.Module):
    """A few tensors with names of the released model."""

    def __init__(self) -> None:
        super().__init__()
        self.meta_queries = torch.nn.Parameter(torch.randn(3, 7))
        self.projector_1 = torch.nn.Linear(7, 5)
        self.transformer = torch.nn.ModuleDict({"proj_out": torch.nn.Linear(5, 3)})
        self.transformer["proj_out"].bias.requires_grad_(False)

    def forward(self) -> torch.Tensor:
        return self.transformer["proj_out"](self.projector_1(self.meta_queries)).square().mean()


def write(rank: int, world: int, stage: int, rendezvous: str, out: Path) -> None:
    """The work of one rank."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    torch.manual_seed(4)
    model = Native()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
    }
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    engine.backward(engine())
    engine.step()
    engine.save_checkpoint(str(out), tag="iter_3.pth")
    truth = {}
    for name, parameter in model.named_parameters():
        full = deepspeed.utils.safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        if full is None:  # frozen: no master copy
            with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
                full = parameter.detach().float().clone()
        truth[name] = full.clone()
    if rank == 0:
        save_file(truth, out / "truth.safetensors")
    dist.barrier()
    dist.destroy_process_group()
