"""Results of an evaluation on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from deepgen.evaluation.results import Evaluation
from tests.helpers.rl_world import make_records


def test_a_damaged_file_counts_as_none(tmp_path: Path) -> None:
    """It is then drawn and scored again, with the same result."""
    records, images = tuple(make_records(2, "x")), np.arange(2 * 3 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 4, 3)
    scores = np.arange(6, dtype=np.float32).reshape(2, 3, 1)
    saved = Evaluation(records, tuple(images), ("clip",), scores, np.ones((2, 1), np.float32), 0)
    path = tmp_path / "evaluation-before.npz"
    saved.save(path)
    loaded = Evaluation.load(path, records)
    assert loaded is not None and np.array_equal(loaded.scores, scores)
    assert Evaluation.load(path, records[:1]) is None
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:80] + bytes(byte ^ 255 for byte in whole[80:middle]) + whole[middle:]
    for damaged in (b"", whole[:100], whole[:middle], whole[:-3], bytes(len(whole)), flipped):
        path.write_bytes(damaged)
        assert Evaluation.load(path, records) is None
