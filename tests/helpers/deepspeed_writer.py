"""One worker that writes a DeepSpeed checkpoint as the published training code did; for tests of reading it.

    python tests/helpers/deepspeed_writer.py STAGE RANK WORLD RENDEZVOUS OUT

Rank 0 also writes the parameters in full to OUT/truth.safetensors. Names are native ones (M6.2), sizes are odd so that
partitions need padding, and one parameter is frozen.
"""

import os
import sys
from pathlib import Path

STAGE, RANK, WORLD, RENDEZVOUS, OUT = (
    int(sys.argv[1]),
    int(sys.argv[2]),
    int(sys.argv[3]),
    sys.argv[4],
    Path(sys.argv[5]),
)
os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(RANK), "LOCAL_RANK": str(RANK), "WORLD_SIZE": str(WORLD)}

import deepspeed  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from safetensors.torch import save_file  # noqa: E402


class Native(torch.nn.Module):
    """A few tensors under the names of the released model."""

    def __init__(self) -> None:
        super().__init__()
        self.meta_queries = torch.nn.Parameter(torch.randn(3, 7))
        self.projector_1 = torch.nn.Linear(7, 5)
        self.transformer = torch.nn.ModuleDict({"proj_out": torch.nn.Linear(5, 3)})
        self.transformer["proj_out"].bias.requires_grad_(False)

    def forward(self) -> torch.Tensor:
        return self.transformer["proj_out"](self.projector_1(self.meta_queries)).square().mean()


def main() -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dist.init_process_group("gloo", init_method=f"file://{RENDEZVOUS}", rank=RANK, world_size=WORLD)
    torch.manual_seed(4)
    model = Native()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": STAGE},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
    }
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    engine.backward(engine())
    engine.step()
    engine.save_checkpoint(str(OUT), tag="iter_3.pth")
    truth = {}
    for name, parameter in model.named_parameters():
        full = deepspeed.utils.safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        if full is None:  # frozen: no master copy
            with deepspeed.zero.GatheredParameters([parameter], enabled=STAGE == 3):
                full = parameter.detach().float().clone()
        truth[name] = full.clone()
    if RANK == 0:
        save_file(truth, OUT / "truth.safetensors")
    dist.barrier()
    dist.destroy_process_group()


main()
