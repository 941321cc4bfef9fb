"""Rollout actors on nodes that come, drain and die."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.ray
@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.soak  # six nodes, one after the other: on two cores beside other tests Ray misses its own deadlines
@pytest.mark.timeout(900)
def test_actors_follow_the_nodes_and_no_group_is_lost(root: Path) -> None:
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-m", "tests.helpers.changing_cluster"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=850, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "at the start": 2,
        "drain accepted": True,
        "drawn there": True,
        "after it": [],
        "on the new node": True,
        "drawn by the other": True,
        "in the end": 3,
    }
