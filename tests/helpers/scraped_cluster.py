"""A cluster whose metrics a real Prometheus scrapes. Prints what each expression of the dashboard gets, as JSON.

`python -m tests.helpers.scraped_cluster`: in a process of its own, because the cluster is its own, too. Everything is
written to RAY_TMPDIR.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import ray
import yaml
from ray.cluster_utils import Cluster

from deepgen.monitoring.gauges import Gauges
from deepgen.tracking.status import Status
from tests.helpers.servers import free_port

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 120.0
LONG_STEP_S = 25.0  # longer than Ray keeps a gauge that is not set


class Reports:
    """Says twice what a learner and an experience stream say."""

    def __init__(self, folder: str) -> None:
        self._gauges, self._folder = Gauges("tiny"), folder

    def say(self, step: int) -> None:
        from types import SimpleNamespace

        from actors.experience.watch import Watch
        from deepgen.config import load_settings
        from deepgen.tracking.timeline import Recorder

        counters = {"pool/ocr/missing/late": float(step), "pool/ocr/missing": float(step), "pool/ocr/restarts": 0.0}
        rewards: Any = SimpleNamespace(names=("ocr",), counters=lambda: counters, open_requests=lambda: {"ocr": 4})
        settings = load_settings(None, [f"run.dir={self._folder}", "run.name=tiny"])
        fleet: Any = SimpleNamespace(working=2, restarts=0)
        watch = Watch(settings, Recorder(), fleet, rewards)
        for number in (step, step + 1):
            watch.asked(number, 0)
            watch.handed_out(number, 0)
        status: Status = watch._status(7)
        watch._show(status)
        self._gauges.step(step, 16.0, {"time/update_s": 1.5, "policy/staleness_max": 1.0})


def prometheus(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """Start a server with the cluster's configuration, but for the folder of its file and a shorter interval."""
    config = yaml.safe_load((ROOT / "clusters" / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"]["scrape_interval"] = "1s"
    files = config["scrape_configs"][0]["file_sd_configs"][0]
    (name,) = files["files"]
    files |= {"files": [str(folder / "ray" / Path(name).name)], "refresh_interval": "1s"}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    return subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"])


def answers(port: int, expressions: list[str]) -> dict[str, Any]:
    """What the server says to each expression: its series, or the error."""
    found = {}
    for text in expressions:
        asked = text.replace("$run", ".*")
        reply = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params={"query": asked}, timeout=10).json()
        found[text] = reply["data"]["result"] if reply["status"] == "success" else reply["error"]
    return found


def main(folder: Path) -> dict[str, Any]:
    dashboard = json.loads((ROOT / "clusters" / "grafana" / "deepgen.json").read_text(encoding="utf-8"))
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    head = {"num_cpus": 1, "include_dashboard": True, "dashboard_port": free_port()}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, log_to_driver=False, runtime_env={"env_vars": {"DEEPGEN_METRICS": "1"}})
    actor = ray.remote(Reports).options(num_cpus=0.1).remote(str(folder / "runs"))
    port = free_port()
    server = prometheus(folder, port)
    found: dict[str, Any] = {}
    ends, step = time.monotonic() + WAIT_S, 0
    try:
        while time.monotonic() < ends and not all(found.get(text) for text in expressions if "deepgen" in text):
            ray.get(actor.say.remote(step := step + 1), timeout=60)
            time.sleep(2)
            with suppress(httpx.TransportError):  # it is still starting
                found = answers(port, expressions)
        time.sleep(LONG_STEP_S)
        found = answers(port, expressions)
    finally:
        server.terminate()
        server.wait(30)
        ray.shutdown()
        cluster.shutdown()
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(os.environ["RAY_TMPDIR"]))))
    sys.exit(0)
