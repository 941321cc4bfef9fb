"""Seeds of everything random: derived from what a number is for, never from the order of calls."""

from __future__ import annotations

import hashlib
import json


def stable_seed(*parts: int | str) -> int:
    """63-bit seed from the parts, the same in every process and Python version (unlike `hash`).

    Torch's CPU generator uses the low 32 bits: two of a million samples may well draw the same noise, two of one group
    will not.
    """
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
