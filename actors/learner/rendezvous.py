"""Where the learner's workers meet. torch's store for that listens on every address and lets anybody write.

So on a cluster that listens on 127.0.0.1 only, the workers meet in a file of Ray's session folder instead.
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import ray
from ray._common.network_utils import is_localhost
from ray._private.worker import global_worker
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend


def torch_config(*, gpus: bool) -> TorchConfig:
    """The configuration of torch's process group for the cluster that this process is connected to."""
    backend = "nccl" if gpus else "gloo"
    return _InAFile(backend) if is_localhost(ray.util.get_node_ip_address()) else TorchConfig(backend)


class _InAFile(TorchConfig):
    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _FileBackend


class _FileBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        meeting = Path(global_worker.node.get_session_dir_path()) / f"rendezvous-{uuid.uuid4().hex}"
        worker_group.execute(_set_torch_distributed_env_vars)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank,
                    _setup_torch_process_group,
                    backend=backend_config.backend,
                    world_rank=rank,
                    world_size=len(worker_group),
                    init_method=meeting.as_uri(),
                    timeout_s=backend_config.timeout_s,
                )
                for rank in range(len(worker_group))
            ]
        )
