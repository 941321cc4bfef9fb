"""Ray's fake provider, with a folder of each node's own for what jobs bring along. For `clusters/local.yaml`."""

from __future__ import annotations

from typing import Any

from ray._private import ray_constants
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider

_FOLDER = ray_constants.DEFAULT_RUNTIME_ENV_DIR_NAME


class LocalNodes(FakeMultiNodeProvider):
    """Nodes that are processes of this machine.

    In Ray's own provider they share one folder for unpacked submissions. A new node begins by removing what lies there
    and unpacking it again; the driver and the workers of other nodes then have no working folder any more.
    """

    def _create_node_with_resources_and_labels(self, *args: Any, **options: Any) -> None:
        with self.lock:
            # Read when the base class fills in the node's parameters; there is no option for it.
            ray_constants.DEFAULT_RUNTIME_ENV_DIR_NAME = f"{_FOLDER}_{self._next_node_id + 1}"
            try:
                super()._create_node_with_resources_and_labels(*args, **options)
            finally:
                ray_constants.DEFAULT_RUNTIME_ENV_DIR_NAME = _FOLDER
