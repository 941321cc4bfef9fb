"""Alarms: when they begin and end, and that healthy runs raise none."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepgen.config.schema.sections import ALARMS, TrackingSettings
from deepgen.tracking.alarms import BASE_STEPS, EXPLODED, PATIENCE, RULES, Alarms, last_words
from deepgen.tracking.journal import read_steps

HEALTHY = {
    "advantage/zero_spread/ocr": 0.55,
    "advantage/zero_spread/clip": 0.0,
    "reward_missing_share/judge": 0.01,
    "policy/clip_share": 0.2,
    "policy/ratio_deviation_max": 5e-4,
    "policy/kl": 0.03,
    "rollout/diversity": 0.4,
    "object_store/used_share": 0.3,
    "reward/judge": 0.5,
    "reward_spread/judge": 0.1,
    "agreement/judge/clip": 0.3,
    "hacking/chance": 1.0,
}
SICK = {
    "zero_spread": {"advantage/zero_spread/ocr": 0.9},
    "missing": {"reward_missing_share/judge": 0.5},
    "clip_share": {"policy/clip_share": 0.8},
    "ratio": {"policy/ratio_deviation_max": 0.5},
    "kl": {"policy/kl": 3.0},
    "diversity": {"rollout/diversity": 0.1},
    "object_store": {"object_store/used_share": 0.9},
    "saturation": {"reward/judge": 0.9, "reward_spread/judge": 0.01},
    "hacking": {"hacking/chance": 0.01},
}
ITS_OWN = {"disagreement"}  # looks at many steps at once


def alarms_of(**limits: Any) -> Alarms:
    return Alarms(TrackingSettings(alarms=limits))


def feed(alarms: Alarms, steps: Iterable[Mapping[str, float]], first: int = 1) -> list[str]:
    """The console lines of some steps."""
    return [news.line for step, metrics in enumerate(steps, first) for news in alarms.step(step, metrics)[1]]


def test_every_rule_has_a_limit() -> None:
    assert RULES.keys() == ALARMS.keys() == SICK.keys() | ITS_OWN


def test_a_healthy_run_has_none() -> None:
    alarms = alarms_of()
    assert feed(alarms, [HEALTHY] * 30) == []
    assert alarms.step(31, HEALTHY)[0] == dict.fromkeys((f"alarm/{name}" for name in RULES), 0.0)


@pytest.mark.parametrize("name", SICK)
def test_an_alarm_is_said_once_when_it_begins_and_once_when_it_ends(name: str) -> None:
    alarms, sick = alarms_of(), HEALTHY | SICK[name]
    patience = RULES[name].patience
    assert feed(alarms, [HEALTHY] * 10) == []
    assert feed(alarms, [sick] * (patience - 1), 11) == []
    shown, (begun,) = alarms.step(10 + patience, sick)
    assert (shown[f"alarm/{name}"], sum(shown.values())) == (1, 1)
    assert begun.name == name and begun.line.startswith(f"ALARM {name} since step 11: ")
    assert begun.line.endswith(f"{ALARMS[name]:g} is expected") and begun.tag == "since step 11"
    assert feed(alarms, [sick] * 5, 14) == []
    assert feed(alarms, [HEALTHY] * (patience - 1), 19) == []
    shown, (ended,) = alarms.step(18 + patience, HEALTHY)
    assert sum(shown.values()) == 0
    assert ended.line.startswith(f"alarm {name} is over, it lasted from step 11 to 18: ")
    assert ended.tag == "from step 11 to 18"


def test_single_odd_steps_are_none() -> None:
    odd = HEALTHY | SICK["kl"]
    assert feed(alarms_of(), [HEALTHY, odd, odd, HEALTHY] * 5) == []


def test_the_worst_reward_counts() -> None:
    steps = [{"advantage/zero_spread/ocr": 0.1, "advantage/zero_spread/judge": 0.9}] * PATIENCE
    assert len(feed(alarms_of(), steps)) == 1


def test_what_a_step_does_not_have_changes_nothing() -> None:
    alarms, sick = alarms_of(), SICK["kl"]
    assert alarms.step(1, {"policy/kl": math.nan}) == ({}, [])
    assert feed(alarms, [sick, {}, sick, {}], 2) == []
    assert [news.tag for news in alarms.step(6, sick)[1]] == ["since step 2"]
    assert alarms.step(7, {})[0] == {}


def test_diversity_is_compared_with_the_first_steps() -> None:
    for start in (0.01, 10.0):
        steps = [{"rollout/diversity": start}] * BASE_STEPS
        assert feed(alarms_of(), [*steps, *[{"rollout/diversity": start * 0.4}] * 9]) == []
        assert len(feed(alarms_of(), [*steps, *[{"rollout/diversity": start * 0.2}] * 9])) == 1
    assert feed(alarms_of(), [{"rollout/diversity": 0.0}] * 9) == []  # nothing to compare with


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-400.0, 20.0)])
def test_a_reward_is_saturated_when_it_has_risen_and_tells_images_apart_no_more(low: float, high: float) -> None:
    def steps(end: float, spread: float) -> list[dict[str, float]]:
        """Ten steps from a quarter of the range to `end`, with the spread that is left."""
        places = [0.25 + (end - 0.25) * n / 9 for n in range(10)]
        sizes = [0.2 * (1 + (spread - 1) * n / 9) for n in range(10)]
        named = zip(places, sizes, strict=True)
        span = high - low
        return [{"reward/x": low + span * mean, "reward_spread/x": span * size} for mean, size in named]

    top, collapsed = steps(0.99, 0.05), steps(0.2, 0.05)
    assert [line.split()[1] for line in feed(alarms_of(), [*top, top[-1], top[-1]])] == ["saturation"]
    assert feed(alarms_of(), [*collapsed, collapsed[-1], collapsed[-1]]) == []  # the alarm for that is diversity
    assert feed(alarms_of(), steps(0.99, 0.5) * 2) == []


def test_rewards_that_rank_images_the_other_way_round_disagree() -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 40)

    def steps(*means: float) -> list[dict[str, float]]:
        return [{"agreement/a/x": 0.5, "agreement/b/x": mean + noise[n]} for n, mean in enumerate(means)]

    assert feed(alarms_of(), steps(*[0.3] * 20, *[0.05] * 20)) == []
    (line,) = feed(alarms_of(), steps(*[0.3] * 10, *[-0.3] * 20))
    assert line.startswith("ALARM disagreement since step 1") and "rank correlation" in line
    assert feed(alarms_of(), steps(*[-0.9] * 5)) == []  # too few to say


def test_limits_can_be_replaced_and_turned_off() -> None:
    steps = [HEALTHY | SICK["kl"] | SICK["missing"]] * PATIENCE
    assert len(feed(alarms_of(), steps)) == 2
    assert [line.split()[1] for line in feed(alarms_of(kl=5.0), steps)] == ["missing"]
    off = alarms_of(kl=None, missing=None)
    assert feed(off, steps) == [] and "alarm/kl" not in off.step(9, steps[0])[0]


def test_a_resumed_run_knows_its_first_steps_and_what_is_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_steps(path, 9) == []
    values = [0.4, 0.4, 0.4, 0.1, 0.1, 0.1, 0.1, 0.4]
    lines = [f'{{"step": {n}, "time": 0, "metrics": {{"rollout/diversity": {v}}}}}' for n, v in enumerate(values, 1)]
    path.write_text("\n".join(lines))
    alarms = alarms_of()
    alarms.resume(read_steps(path, 7))  # the eighth step is done again
    assert feed(alarms, [{"rollout/diversity": 0.4}] * PATIENCE, 8)[0].startswith("alarm diversity is over")


def losses(*values: float, name: str = "loss/flow_matching") -> list[tuple[int, dict[str, float]]]:
    return [(step, {name: value}) for step, value in enumerate(values, 1)]


def test_a_run_whose_loss_exploded_says_so_at_its_end() -> None:
    (line,) = last_words(losses(0.3, 0.31, 4.0, 6.6e13))
    assert line.startswith("WARNING: loss/flow_matching was 0.305 in the first steps and is 3.3e+13 in the last")
    assert len(last_words(losses(*[0.3] * 20, *[0.3 * EXPLODED + 0.1] * 5))) == 1
    assert len(last_words(losses(*[0.01] * 10, *[-80.0] * 10, name="loss/total"))) == 1


def test_a_healthy_end_says_nothing() -> None:
    assert last_words([]) == last_words(losses(0.3)) == last_words(losses(0.3, 0.29, 0.1, 0.05)) == []
    assert last_words(losses(*[0.3] * 20, 50.0, 0.3, 0.3)) == []  # one odd step
    assert last_words(losses(1e-9, -0.4, 0.02, 0.9, name="loss/total")) == []  # a policy loss


def test_updates_that_were_left_out_are_said_at_the_end() -> None:
    steps = [(1, {"train/skipped_updates": 0.0}), (2, {"train/skipped_updates": 3.0}), (3, {"eval/total": 0.5})]
    assert last_words(steps) == ["WARNING: 3 updates were left out, because they were not finite"]
