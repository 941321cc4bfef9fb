"""The training stages and the parts that each of them trains (M1.11)."""

from __future__ import annotations

from typing import Literal

Stage = Literal["pretrain", "sft", "rl"]
Part = Literal["bridge", "transformer", "vlm_lora"]  # folder names; the bridge includes the think tokens

TRAINED_PARTS: dict[str, tuple[Part, ...]] = {
    "pretrain": ("bridge",),
    "sft": ("bridge", "transformer", "vlm_lora"),
    "rl": ("transformer",),
}
