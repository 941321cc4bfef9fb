"""A sample of `make soak`: damaged weights are refused, undamaged ones are loaded."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from soak.defects import DEFECTS, defect_rows, run_defects
from tests.helpers.rl_world import make_settings, make_world


@pytest.mark.ray
def test_no_damaged_weights_are_used(ray_local: ModuleType, tmp_path: Path) -> None:
    outcomes = run_defects(make_settings(make_world(tmp_path)), 42)
    assert {kind: counts.total() for kind, counts in outcomes.items()} == dict.fromkeys(DEFECTS, 3)
    assert not {kind: counts for kind, counts in outcomes.items() if counts["missed"]}
    seen = {kind for kind, counts in outcomes.items() if counts["canary"]}
    assert seen == {"adapter bound to nothing", "learner uses other weights than it sends"}
    assert outcomes["half a load"]["again"] == 3


def test_the_table_has_a_line_a_kind_and_the_sums() -> None:
    outcomes = {"one": Counter(checksum=2, missed=1), "two": Counter(canary=3)}
    assert list(defect_rows(outcomes)) == [
        "| one | 3 | 2 | 0 | 0 | 1 |",
        "| two | 3 | 0 | 3 | 0 | 0 |",
        "| all | 6 | 2 | 3 | 0 | 1 |",
    ]
