"""Phase times: estimates, and those of a run's timeline."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from deepgen.config import load_settings
from deepgen.errors import UserError
from deepgen.models.presets import DEEPGEN_5B
from deepgen.planning.scale.estimates import Machine, dit_flops, estimate
from deepgen.planning.scale.phases import ASSUMED, CallTime
from deepgen.planning.scale.run_phases import measured_phases


def test_a_forward_is_as_long_as_one_was_on_an_h200() -> None:
    """0.840 s for 80 forwards of 512 px with 192 context tokens, docs/performance.md; here at 20 % of its peak."""
    assert 80 * dit_flops(DEEPGEN_5B, 1024, 192) / Machine().flops_s == pytest.approx(0.840, rel=0.1)


def test_estimates_scale_with_the_recipe(root: Path) -> None:
    recipe = root / "stages" / "recipes" / "deepgen-5b-rl.yaml"
    usual = estimate(load_settings(recipe), Machine(), 8).phases()
    twice = load_settings(
        recipe, ["rollout.group_size=16", "rollout.sde_steps=15", "rewards.preference.max_tokens=8192"]
    )
    changed = estimate(twice, Machine(tflops=2 * Machine().tflops), 16).phases()
    assert changed.sample_s == pytest.approx(usual.sample_s, rel=0.1)  # twice the images at twice the speed
    assert changed.update_s == pytest.approx(usual.update_s / 2)
    assert changed.checkpoint_s == pytest.approx(usual.checkpoint_s / 2)
    # Each image meets 15 others instead of 7, and answers are twice as long.
    assert changed.score_s["preference"].image_s == pytest.approx(usual.score_s["preference"].image_s * 15 / 7 * 2)
    assert estimate(twice, Machine(), 8).scores["preference"].source == ASSUMED


def test_a_timeline_tells_the_phases(tmp_path: Path) -> None:
    write_timeline(tmp_path)
    figures = measured_phases(tmp_path)
    numbers = {name: figure.value for name, figure in figures.numbers.items()}
    assert numbers == pytest.approx(
        {
            "sample_s": 2.0,
            "load_s": 0.5,
            "update_s": 0.25,
            "step_s": 0.0,
            "publish_s": 0.1,
            "sync_s": 0.3,
            "checkpoint_s": 0.7,
            "revive_s": 9.0,
        }
    )
    score = figures.scores["clip"].value
    assert (score.call_s, score.image_s) == pytest.approx((1.0, 0.125))


def test_groups_taken_one_by_one_are_told_from_the_rest(tmp_path: Path) -> None:
    """Four waits for a group, of 1 s, 0.25 s of work after each; a wait for the whole batch; 0.75 s for the step."""
    spans: list[dict[str, Any]] = []
    for step in range(3):
        t = 100.0 * step
        waits = [(t + 1.25 * number, t + 1.25 * number + 1) for number in range(5)]
        spans += [span("learner 0", "learner", "wait", *wait, step=step) for wait in waits]
        spans.append(span("learner 0", "learner", "update", t, waits[-1][1] + 0.75, step=step))
        spans += [span("rollout-0", "rollout", "sample", t + n, t + n + 1, step=step, version=step) for n in range(4)]
    write(tmp_path, spans)
    numbers = measured_phases(tmp_path).numbers
    assert (numbers["update_s"].value, numbers["step_s"].value) == pytest.approx((0.25, 0.75))


def test_scores_of_one_size_are_by_image(tmp_path: Path) -> None:
    write_timeline(tmp_path, sizes=(4, 4))
    assert measured_phases(tmp_path).scores["clip"].value == CallTime(0.0, 1.5 / 4)


def test_a_run_without_whole_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--simulate: from=.*: no step after the first one in its timeline"):
        measured_phases(tmp_path)


def write_timeline(folder: Path, sizes: tuple[int, int] = (4, 8)) -> None:
    """Three steps of four groups on one actor and one rank; the update of a step waits once, inside, for 1 s."""
    spans: list[dict[str, Any]] = [span("rollout-0", "rollout", "start", 0.0, 9.0)]
    for step in range(3):
        t = 100.0 * step
        begins = [t, t + 2.5, t + 4.5, t + 6.5, t + 8.5]
        spans += [
            span("rollout-0", "rollout", "sample", begin, end, step=step, version=step)
            for begin, end in itertools.pairwise(begins)
        ]
        for number, size in enumerate(sizes):
            begin = t + 20 + 5 * number
            spans.append(span("clip #0", "clip", "score", begin, begin + 1 + size / 8, call=f"score of {size} images"))
        spans.append(span("learner 0", "learner", "wait", t, t + 30, step=step))
        spans.append(span("learner 0", "learner", "update", t + 30, t + 32, step=step))
        spans.append(span("learner 0", "learner", "wait", t + 30.5, t + 31.5, step=step))
        spans.append(span("learner 0", "learner", "publish", t + 32, t + 32.1, step=step))
        spans.append(span("rollout-0", "rollout", "fetch weights", t + 32.2, t + 32.4, version=step + 1))
        spans.append(span("learner 0", "learner", "checkpoint", t + 32.1, t + 32.8, step=step))
    write(folder, spans)


def write(folder: Path, spans: list[dict[str, Any]]) -> None:
    (folder / "timeline-stream.jsonl").write_text("".join(json.dumps(one) + "\n" for one in spans), encoding="utf-8")


def span(actor: str, role: str, what: str, begin: float, end: float, **more: Any) -> dict[str, Any]:
    return {"actor": actor, "role": role, "what": what, "begin": begin, "end": end, **more}
