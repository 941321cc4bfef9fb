"""A run's folder in a bucket: what is brought when, what a resume fetches, and who may write."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from deepgen.cluster.connect import check_staging
from deepgen.config import load_settings
from deepgen.errors import UserError
from deepgen.storage import mirror as mirror_module
from deepgen.storage.bucket import Bucket, BucketError
from deepgen.storage.mirror import OWNER, Mirror, mirrored
from tests.helpers.bucket_server import BucketProxy


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror_module, "PERIOD_S", 0.05)
    monkeypatch.setattr(mirror_module, "LONGEST_PAUSE_S", 0.1)


def checkpoint(folder: Path, step: int, content: str = "weights") -> None:
    """A checkpoint as the store leaves it: a folder that is there as a whole."""
    unfinished = folder / "checkpoints" / f".writing-step-{step:06d}"
    unfinished.mkdir(parents=True)
    (unfinished / "engine-0.safetensors").write_text(f"{content} of {step}")
    (unfinished / "manifest.json").write_text(json.dumps({"step": step}))
    unfinished.rename(folder / "checkpoints" / f"step-{step:06d}")


def remove(folder: Path, step: int) -> None:
    for file in sorted((folder / "checkpoints" / f"step-{step:06d}").iterdir()):
        file.unlink()
    (folder / "checkpoints" / f"step-{step:06d}").rmdir()


def names(bucket: Bucket) -> set[str]:
    return set(bucket.sizes("")) - {OWNER}


def step_files(step: int) -> set[str]:
    return {f"checkpoints/step-{step:06d}/{name}" for name in ("engine-0.safetensors", "manifest.json")}


def test_changes_are_brought_and_a_manifest_comes_last(bucket: Bucket, server: BucketProxy, tmp_path: Path) -> None:
    run = tmp_path / "run"
    mirror = Mirror(run, bucket)
    (run / "checkpoints" / ".writing-step-000009").mkdir(parents=True)
    (run / "checkpoints" / ".writing-step-000009" / "engine-0.safetensors").write_text("half")
    (run / "metrics.jsonl").write_text("1\n")
    checkpoint(run, 2)
    mirror.bring()
    assert names(bucket) == {"metrics.jsonl"} | step_files(2)
    brought = [name.rpartition("/")[2] for name in server.written() if name.startswith("PUT")]
    assert brought.index("manifest.json") > brought.index("engine-0.safetensors")
    server.asked.clear()
    mirror.bring()
    assert server.written() == []  # nothing has changed
    (run / "metrics.jsonl").write_text("1\n2\n")
    mirror.bring()
    assert bucket.get("metrics.jsonl") == b"1\n2\n"


def test_old_checkpoints_go_when_a_newer_one_is_there(bucket: Bucket, server: BucketProxy, tmp_path: Path) -> None:
    run, mirror = tmp_path / "run", Mirror(tmp_path / "run", bucket)
    checkpoint(run, 2)
    mirror.bring()
    checkpoint(run, 4)
    remove(run, 2)
    server.fault = "500"
    with pytest.raises(BucketError):
        mirror.bring()
    server.fault = ""
    assert names(bucket) == step_files(2)  # the only whole one stays
    server.asked.clear()
    mirror.bring()
    assert names(bucket) == step_files(4)
    gone = [name for name in server.written() if name.startswith("DELETE")]
    assert gone[0].endswith("step-000002/manifest.json")


def test_a_broken_upload_is_no_checkpoint(bucket: Bucket, server: BucketProxy, tmp_path: Path) -> None:
    run, mirror = tmp_path / "run", Mirror(tmp_path / "run", bucket)
    checkpoint(run, 2)
    mirror.bring()
    checkpoint(run, 4)
    server.fault, server.left = "away", 3
    with pytest.raises(BucketError):
        mirror.bring()
    server.fault, server.left = "", None
    assert "checkpoints/step-000004/manifest.json" not in names(bucket)
    other = tmp_path / "other" / "run"
    Mirror(other, bucket)._fetch(bucket.sizes(""), "step-000002")
    assert (other / "checkpoints" / "step-000002" / "manifest.json").exists()
    assert not (other / "checkpoints" / "step-000004").exists()
    mirror.bring()
    assert step_files(4) <= names(bucket)


def test_a_run_goes_on_while_the_bucket_is_away(bucket: Bucket, server: BucketProxy, tmp_path: Path) -> None:
    said: list[str] = []
    run = tmp_path / "run"
    mirror = Mirror(run, bucket, said.append)
    mirror.begin(resume=False)
    server.fault = "away"
    for step in (1, 2, 3):  # nothing here waits
        checkpoint(run, step)
        if step > 1:
            remove(run, step - 1)
    wait(lambda: bool(said))
    server.fault = ""
    wait(lambda: len(said) > 1)
    mirror.end()
    assert "could not" in said[0] and said[0].endswith("the run goes on, and its files are brought later")
    assert "answers again, after" in said[1] and len(said) == 2
    assert names(bucket) == step_files(3) and bucket.get(OWNER) is None


def wait(condition: object, seconds: float = 20) -> None:
    ends = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < ends
        time.sleep(0.02)


def test_what_cannot_be_brought_in_the_end_is_told(
    bucket: Bucket, server: BucketProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_module, "END_S", 0.1)
    run = tmp_path / "run"
    mirror = Mirror(run, bucket, lambda _: None)
    mirror.begin(resume=False)
    server.fault = "500"
    checkpoint(run, 1)
    with pytest.raises(
        UserError, match=r"^run\.dir: not all of the run could be brought .*; it is in .*--resume brings"
    ):
        mirror.end()


def test_a_resume_fetches_what_another_machine_has_left(bucket: Bucket, tmp_path: Path) -> None:
    first, second = tmp_path / "1" / "run", tmp_path / "2" / "run"
    one = Mirror(first, bucket, lambda _: None)
    one.begin(resume=False)
    for step in (2, 4):
        checkpoint(first, step, "first")
    (first / "metrics.jsonl").write_text("1\n2\n3\n4\n")
    one.end()
    said: list[str] = []
    two = Mirror(second, bucket, said.append)
    two.begin(resume=True)
    assert said == [f"fetching the run from {bucket.address}: step-000004"]
    assert [path.name for path in (second / "checkpoints").iterdir()] == ["step-000004"]
    assert (second / "checkpoints" / "step-000004" / "engine-0.safetensors").read_text() == "first of 4"
    assert (second / "metrics.jsonl").read_text() == "1\n2\n3\n4\n"
    checkpoint(second, 6, "second")
    two.end()
    assert step_files(6) <= names(bucket)
    # Back on the first machine, whose copy is older.
    three = Mirror(first, bucket, lambda _: None)
    three.begin(resume=True)
    assert (first / "checkpoints" / "step-000006" / "engine-0.safetensors").read_text() == "second of 6"
    checkpoint(first, 8, "third")  # and dies before it is brought
    three._ending.set()
    three._thread.join()
    four = Mirror(first, bucket, lambda _: None)
    four.begin(resume=True)  # this machine's copy is newer
    assert (first / "checkpoints" / "step-000008").exists()
    four.end()
    assert step_files(8) <= names(bucket)


def test_a_new_run_does_not_mix_with_one_that_is_there(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("metrics.jsonl", b"1\n")
    with pytest.raises(
        UserError, match=r"^run\.dir: s3://.* holds a run already; allowed: another run\.name, or --resume"
    ):
        Mirror(tmp_path / "run", bucket).begin(resume=False)
    assert bucket.get(OWNER) is None


@pytest.mark.parametrize(
    ("age", "host", "refused"), [(1, "elsewhere", True), (1000, "elsewhere", False), (1, "here", False)]
)
def test_only_one_program_writes_a_run(
    bucket: Bucket, tmp_path: Path, age: float, host: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_module.socket, "gethostname", lambda: "here")
    gone = {"host": host, "pid": 2**22 + 1, "time": time.time() - age}  # no process of this machine has that number
    bucket.put(OWNER, json.dumps(gone).encode())
    mirror = Mirror(tmp_path / "run", bucket, lambda _: None)
    if refused:
        with pytest.raises(UserError, match="is written by process 4194305 on elsewhere, which said so 1 s ago"):
            mirror.begin(resume=False)
    else:
        mirror.begin(resume=False)
        mirror.end()


def test_a_run_in_a_folder_has_no_mirror(tmp_path: Path) -> None:
    with mirrored(tmp_path / "run", resume=False):
        assert not list(tmp_path.iterdir())


def test_several_nodes_need_a_staging_folder_that_all_see(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DEEPGEN_STAGING", raising=False)
    settings = load_settings(None, ["run.dir=s3://bucket/runs"])
    check_staging(settings, several=False)
    with pytest.raises(
        UserError, match=r"^run\.dir: got 's3://bucket/runs' on a cluster with several nodes; allowed: DEEP"
    ):
        check_staging(settings, several=True)
    monkeypatch.setenv("DEEPGEN_STAGING", str(tmp_path))
    check_staging(load_settings(None, ["run.dir=s3://bucket/runs"]), several=True)
    check_staging(load_settings(None, [f"run.dir={tmp_path}"]), several=True)
