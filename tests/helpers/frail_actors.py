"""Rollout actors that do not do their work. Light to import: their processes load nothing else."""

from __future__ import annotations

import os
import signal
import time
from typing import Any


class Slow:
    """Never finishes a group."""

    def ready(self) -> None: ...

    def sample_group(self, request: Any, weights: None) -> None:
        time.sleep(600)


class Frail(Slow):
    """Its process ends when it is asked for a group."""

    def sample_group(self, request: Any, weights: None) -> None:
        os.kill(os.getpid(), signal.SIGKILL)
