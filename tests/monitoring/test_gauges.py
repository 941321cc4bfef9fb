"""A run's metrics for Prometheus: what is set, when, and with which labels; the dashboard that shows them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deepgen.monitoring.gauges import DECLARED, Gauges

Said = list[tuple[str, float, dict[str, str]]]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Said:
    """Everything that is told to Ray."""
    import ray.util.metrics

    calls: Said = []

    class Metric:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            self.name, self.keys = name, tag_keys

        def set(self, value: float, tags: dict[str, str]) -> None:
            assert tags.keys() == set(self.keys)
            calls.append((self.name, value, tags))

        inc = set

    monkeypatch.setattr(ray.util.metrics, "Gauge", Metric)
    monkeypatch.setattr(ray.util.metrics, "Counter", Metric)
    return calls


def test_a_step_tells_its_number_images_phases_and_staleness(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPGEN_METRICS", "1")
    gauges = Gauges("tiny")
    gauges.step(3, 16.0, {"time/update_s": 1.5, "time/rollout_s": 4.0, "reward/total": 0.3, "policy/staleness_max": 1})
    gauges.step(4, 0.0, {})
    run = {"run": "tiny"}
    assert said == [
        ("deepgen_step", 3, run),
        ("deepgen_images_total", 16.0, run),
        ("deepgen_staleness_versions", 1, run),
        ("deepgen_step_seconds", 1.5, run | {"phase": "update"}),
        ("deepgen_step_seconds", 4.0, run | {"phase": "rollout"}),
        ("deepgen_step", 4, run),
    ]


def test_gauges_are_set_again_and_counters_are_not_counted_again(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPGEN_METRICS", "1")
    gauges = Gauges("tiny")
    gauges.step(3, 16.0, {"time/update_s": 1.5})
    gauges.step(4, 16.0, {"time/update_s": 2.5})
    said.clear()
    gauges.refresh()
    run = {"run": "tiny"}
    assert said == [("deepgen_step", 4, run), ("deepgen_step_seconds", 2.5, run | {"phase": "update"})]


def test_missing_rewards_are_counted_by_what_is_new(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPGEN_METRICS", "1")
    gauges = Gauges("tiny")
    counters = {"pool/ocr/missing/late": 2.0, "pool/ocr/missing": 2.0, "pool/clip/missing/late": 0.0}
    for total in (2.0, 2.0, 5.0, 1.0):  # the last one: of a stream that has started again
        gauges.pools(counters | {"pool/ocr/missing/late": total}, {"ocr": 4, "clip": 0})
    missing = [(value, tags) for name, value, tags in said if name == "deepgen_missing_rewards_total"]
    assert missing == [(n, {"run": "tiny", "reward": "ocr", "reason": "late"}) for n in (2.0, 3.0, 1.0)]
    waiting = [(value, tags["reward"]) for name, value, tags in said if name == "deepgen_open_requests"]
    assert waiting == [(4, "ocr"), (0, "clip")] * 4


def test_without_a_cluster_of_others_nothing_is_told(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEEPGEN_METRICS", raising=False)
    Gauges("tiny").step(1, 8.0, {"time/update_s": 1.0})
    assert said == []


# -- the dashboard ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dashboard(root: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((root / "clusters" / "grafana" / "deepgen.json").read_text(encoding="utf-8"))
    return content


def expressions(dashboard: dict[str, Any]) -> Iterator[str]:
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield target["expr"]


def test_the_dashboard_shows_each_metric_of_ours_and_no_other(dashboard: dict[str, Any]) -> None:
    shown = {name for text in expressions(dashboard) for name in re.findall(r"\bray_(deepgen_\w+)", text)}
    assert shown == DECLARED.keys()
    labels = {label for text in expressions(dashboard) for label in re.findall(r"by \(([\w, ]+)\)", text)}
    known = {"run", "instance", *(label for declared in DECLARED.values() for label in declared.labels)}
    assert {one.strip() for label in labels for one in label.split(",")} <= known | {"GpuIndex", "Location"}


def test_every_panel_asks_the_chosen_data_source_and_has_its_own_place(dashboard: dict[str, Any]) -> None:
    assert dashboard["uid"] == "deepgen"
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and variables["run"]["multi"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    places = set[tuple[int, int]]()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & places and at["x"] + at["w"] <= 24, panel["title"]
        places |= cells
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert panel["targets"] and panel["fieldConfig"]["defaults"]["unit"]


def test_prometheus_asks_all_nodes_that_ray_names(root: Path) -> None:
    import yaml

    (job,) = yaml.safe_load((root / "clusters" / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
    assert job["file_sd_configs"] == [{"files": ["/tmp/ray/prom_metrics_service_discovery.json"]}]
