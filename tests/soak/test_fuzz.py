"""A short sample of the fuzz run of `make soak`, and proof that its guard sees what it looks for."""

from __future__ import annotations

import os
import random
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from deepgen.errors import UserError
from soak import fuzz, fuzz_readers

pytestmark = [pytest.mark.processes, pytest.mark.timeout(600)]


@pytest.mark.parametrize("kind", fuzz.SHARES)
def test_readers_take_or_refuse_whatever_they_are_given(kind: str) -> None:
    outcome = fuzz.run_fuzz(kind, 6 * fuzz.SHARES[kind])
    assert outcome.faults == []
    assert outcome.taken and outcome.refused
    assert outcome.peak_mib < 1024


def test_every_kind_of_fault_is_seen() -> None:
    """One input after another, each with a fault of its own; a hang or a death does not end the run."""
    outcome = fuzz.run_fuzz("faulty", 8, readers="tests.soak.test_fuzz", deadline_s=5.0)
    found = dict(outcome.faults)
    assert (outcome.taken, outcome.refused) == (1, 1)
    assert found[2].startswith("program started: subprocess.Popen")
    assert found[3] == f"written: {Path('/tmp/fuzz-outside').resolve()}"
    assert found[4] == "connection to 127.0.0.1"
    assert found[5] == "ZeroDivisionError: division by zero"
    assert found[6] == "no answer within 5 s"
    assert found[7] == "the process ended with 3"


def faulty(chance: random.Random, folder: Path) -> bool:
    """Stands in for a reader. Which fault it has is told by the random numbers, which are the input's own."""
    number = next((n for n in range(8) if random.Random(f"faulty/0/{n}").getstate() == chance.getstate()), 0)
    if number == 1:
        raise UserError("refused")
    if number == 2:
        subprocess.run(["true"], check=True)
    elif number == 3:
        Path("/tmp/fuzz-outside").write_text("x")
    elif number == 4:
        with pytest.raises(OSError, match="no connection"):
            urllib.request.urlopen("http://localhost:1/", timeout=1)
    elif number == 5:
        raise ZeroDivisionError("division by zero")
    elif number == 6:
        time.sleep(600)
    elif number == 7:
        os._exit(3)
    (folder / "mine").touch()
    return True


def test_kinds_have_readers() -> None:
    assert all(callable(getattr(fuzz_readers, kind)) for kind in fuzz.SHARES)
