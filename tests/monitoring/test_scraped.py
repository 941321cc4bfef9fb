"""A real Prometheus asks a real cluster for everything that the dashboard shows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest


@pytest.mark.ray
@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs the program prometheus (Debian: prometheus)")
def test_prometheus_gets_every_metric_of_the_dashboard(root: Path) -> None:
    folder = Path(tempfile.mkdtemp(prefix="p", dir="/tmp"))
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": str(folder)}
    command = [sys.executable, "-m", "tests.helpers.scraped_cluster"]
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=280, check=False
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert not [(text, answer) for text, answer in found.items() if isinstance(answer, str)]  # errors
    without = [text for text, series in found.items() if not series]
    assert not [text for text in without if "_gpus_" not in text and "_gram_" not in text]
    assert all(s["metric"]["run"] == "tiny" for text, series in found.items() if "deepgen" in text for s in series)
    (late,) = (series for text, series in found.items() if "missing" in text)
    assert late[0]["metric"] == {"run": "tiny", "reward": "ocr", "reason": "late"}
