"""An alarm that ends a run: where it is, or with the weights from before the held-out rewards fell."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from actors.learner.run_control import Halt, read_halt, write_halt
from tests.helpers.learner_workers import run_workers
from tests.helpers.toy import toy_result, toy_run


def hacked(good_step: int) -> dict[str, float]:
    return {"hacking/chance": 1e-4, "hacking/good_step": float(good_step)}


@pytest.mark.processes
@pytest.mark.slow
def test_stop_ends_a_run_where_it_is_and_roll_back_where_it_was_good(tmp_path: Path) -> None:
    """On two ranks, of which only the first sees evaluations. One checkpoint is kept, and the one to go back to."""
    options = ("train.workers=2", "train.checkpoint_every=1", "train.keep_checkpoints=1")

    def alarm(action: str) -> str:
        return f"tracking.alarms={{hacking: [0.05, {action}]}}"

    stopped = toy_run(tmp_path, "stopped", *options, alarm("stop"), arrivals={2: hacked(0)})
    rolled = toy_run(tmp_path, "rolled", *options, alarm("roll_back"), arrivals={4: hacked(2)}, back=(2,))
    said = toy_run(tmp_path, "said", *options, arrivals={4: hacked(2)})
    output = run_workers(tmp_path, [stopped, rolled, said], world=2)

    # Both ranks of the toy print.
    assert output.count("the run ends after step 2, its result are the weights after step 2\n") == 2
    assert output.count("the run ends after step 4, its result are the weights after step 2, before the held-out") == 2
    assert output.count("ALARM hacking since step 4: 0.0001 is the chance") == 2
    assert [path.name for path in sorted((tmp_path / "rolled" / "checkpoints").iterdir())] == [
        "step-000002",
        "unused-step-000004",
    ]
    halts = {name: read_halt(tmp_path / name) for name in ("stopped", "rolled", "said")}
    assert halts["said"] is None
    assert [(halt.step, halt.action, halt.result_step) for halt in halts.values() if halt] == [
        (2, "stop", 2),
        (4, "roll_back", 2),
    ]
    results = {name: toy_result(tmp_path, name) for name in halts}
    for key, value in results["stopped"].items():
        assert torch.equal(value, results["rolled"][key]), key
    assert not torch.equal(results["said"]["out.weight"], results["rolled"]["out.weight"])


@pytest.mark.processes
def test_workers_that_start_again_after_the_end_only_write_its_result(tmp_path: Path) -> None:
    """As when one dies while the result is written. A person who resumes the run goes on with it."""
    stop = "tracking.alarms={hacking: [0.05, stop]}"
    first = toy_run(tmp_path, "it", stop, arrivals={2: hacked(0)}) | {"attempt": "a"}
    again, on = ({**toy_run(tmp_path, "it", stop, "run.resume=true"), "attempt": attempt} for attempt in "ab")
    run_workers(tmp_path, [first])
    result = toy_result(tmp_path, "it")
    shutil.rmtree(tmp_path / "it" / "model")
    run_workers(tmp_path, [again])
    written, halt = toy_result(tmp_path, "it"), read_halt(tmp_path / "it")
    assert all(torch.equal(written[key], value) for key, value in result.items()) and halt and halt.step == 2
    run_workers(tmp_path, [on])
    assert read_halt(tmp_path / "it") is None
    assert not torch.equal(toy_result(tmp_path, "it")["out.weight"], result["out.weight"])


def test_the_note_of_an_end_is_removed_by_the_next_start(tmp_path: Path) -> None:
    halt = Halt(4, "hacking", "roll_back", "ALARM", 2)
    write_halt(tmp_path, halt)
    assert read_halt(tmp_path) == halt
    write_halt(tmp_path, None)
    assert read_halt(tmp_path) is None
