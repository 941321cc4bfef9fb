"""Rollout actors that fail to work. The module is light, so their processes load little."""

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
    """Ends its process when it is asked for a group."""

    def sample_group(self, request: Any, weights: None) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Deaf(Slow):
    """Never fetches weights."""

    def process(self) -> int:
        return os.getpid()

    def prefetch(self, published: Any) -> None:
        time.sleep(600)

    def sample_group(self, request: Any, weights: Any) -> None: ...


class Quick(Slow):
    """Answers at once."""

    def prefetch(self, published: Any) -> None: ...

    def sample_group(self, request: Any, weights: Any) -> None: ...
