"""Decides which prompt group n of a run uses."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deepgen.config import Settings, UserError
from deepgen.data.records import Record


@dataclass
class PromptOrder:
    """Visits every prompt once per epoch, in an order that depends only on (seed, epoch)."""

    records: Sequence[Record]
    seed: int
    _orders: dict[int, list[int]] = field(default_factory=dict)

    def at(self, number: int) -> tuple[int, Record]:
        """Epoch and prompt of group `number` of the run."""
        epoch, position = divmod(number, len(self.records))
        if epoch not in self._orders:
            order = list(range(len(self.records)))
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            # Keep this order and the previous one: steps in flight may lie on both sides of an epoch boundary.
            self._orders = {epoch: order, **{e: o for e, o in self._orders.items() if e == epoch - 1}}
        return epoch, self.records[self._orders[epoch][position]]

    def fingerprint(self) -> str:
        """Hash that changes when the prompts or their order change."""
        content = json.dumps([self.seed, [record.id for record in self.records]])
        return hashlib.blake2b(content.encode(), digest_size=6).hexdigest()


def check_state(settings: Settings, prompts: Sequence[Record], state: Mapping[str, Any]) -> None:
    """Raise UserError if a stream with these prompts cannot continue from a saved state."""
    if "cursor" not in state:
        raise UserError(
            f"--resume: the newest checkpoint of {settings.run.name!r} is of a run with --train-only; allowed: another "
            "run.name"
        )
    per_step = settings.rollout.prompts_per_step
    if state["cursor"]["group"] != state["step"] * per_step:
        raise UserError(
            f"rollout.prompts_per_step: got {per_step}, but the checkpoint has used {state['cursor']['group']} prompts "
            f"in {state['step']} steps; allowed: the value it was written with"
        )
    if state["prompts"] != PromptOrder(prompts, settings.run.seed).fingerprint():
        raise UserError("data.prompts: other prompts than the checkpoint was written with; allowed: the same")
