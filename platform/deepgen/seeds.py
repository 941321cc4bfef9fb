"""Seeds for all random numbers. A seed depends on the purpose of the numbers, never on the order of calls."""

from __future__ import annotations

import hashlib
import json


def stable_seed(*parts: int | str) -> int:
    """63-bit seed from the parts, the same in every process and Python version (unlike `hash`).

    Torch's CPU generator uses only the low 32 bits. So among a million samples two may well draw the same noise, but
    two samples of one group practically never do.
    """
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def sample_seed(run_seed: int, prompt_id: str, epoch: int, index: int) -> int:
    """Seed of sample `index` of the group drawn for this prompt in this epoch."""
    return stable_seed("sample", run_seed, prompt_id, epoch, index)
