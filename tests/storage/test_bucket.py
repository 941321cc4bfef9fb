"""A folder of a bucket, and the staging folder of its address."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepgen.config import UserError, load_settings, settings_from_dict
from deepgen.config.recipes import find_recipe
from deepgen.storage import bucket as bucket_module
from deepgen.storage.bucket import Bucket, BucketError
from deepgen.storage.staging import address_of, staged
from tests.helpers.bucket_server import NAME, BucketProxy

# -- staging folders -------------------------------------------------------------------------------------------------


def test_an_address_and_its_staging_folder_stand_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPGEN_STAGING", str(tmp_path))
    assert staged("s3://my-bucket/a/b/") == tmp_path / "s3" / "my-bucket" / "a" / "b"
    assert address_of(tmp_path / "s3" / "my-bucket" / "a" / "b") == "s3://my-bucket/a/b"
    assert address_of(staged("gs://x.y")) == "gs://x.y"
    assert address_of(tmp_path / "s3") is None and address_of(Path("/elsewhere/s3/b")) is None
    settings = load_settings(find_recipe("tiny-rl"), ["run.dir=s3://my-bucket/runs", "run.name=a"])
    assert settings.run.folder == tmp_path / "s3" / "my-bucket" / "runs" / "a"
    dumped = settings.model_dump()
    assert dumped["run"]["dir"] == "s3://my-bucket/runs"
    assert settings_from_dict(dumped).run.folder == settings.run.folder


@pytest.mark.parametrize(
    "given",
    ["s3://", "s3:///runs", "s3://a/../b", "s3://key:secret@bucket/runs", "s3://bucket/runs?region=x", "gs://a b"],
)
def test_an_address_that_names_no_folder_is_one_line(given: str) -> None:
    with pytest.raises(
        UserError, match=r"^run\.dir: got .*, which names no folder of a bucket; allowed: ..://B"
    ) as caught:
        load_settings(find_recipe("tiny-rl"), [f"run.dir={given}"])
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value).replace("AWS_SECRET", "")


# -- objects ---------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(bucket: Bucket, tmp_path: Path) -> None:
    assert bucket.get("none") is None and bucket.sizes("") == {}
    bucket.put("a/small", b"1234")
    assert bucket.get("a/small") == b"1234"
    large = tmp_path / "large"
    large.write_bytes(bytes(range(256)) * 80_000)  # 20 MB, in several parts
    bucket.upload(large, "a/b/large")
    assert bucket.sizes("") == {"a/small": 4, "a/b/large": 20_480_000}
    assert bucket.sizes("a/b") == {"large": 20_480_000}
    bucket.download("a/b/large", tmp_path / "new" / "copy", 20_480_000)
    assert (tmp_path / "new" / "copy").read_bytes() == large.read_bytes()
    bucket.delete(["a/small", "a/small", "a/b/large"])
    assert bucket.sizes("") == {}
    with pytest.raises(FileNotFoundError):
        bucket.upload(tmp_path / "gone", "gone")


@pytest.mark.parametrize("fault", ["500", "cut", "away"])
def test_a_bucket_that_does_not_answer_is_one_line(bucket: Bucket, server: BucketProxy, fault: str) -> None:
    bucket.put("small", b"1234" * 1000)
    server.fault = fault
    for call in (lambda: bucket.get("small"), lambda: bucket.sizes("")):
        with pytest.raises(BucketError, match=rf"^s3://{NAME}/runs/.*: could not ") as caught:
            call()
        assert "\n" not in str(caught.value) and "secret" not in str(caught.value)
    server.fault = ""
    assert bucket.get("small") == b"1234" * 1000


def test_each_call_has_a_deadline(bucket: Bucket, server: BucketProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_module, "CALL_S", 0.1)
    server.fault = "slow"
    with pytest.raises(BucketError, match="could not read small within 0 s"):
        bucket.get("small")


def test_a_download_that_is_too_short_is_refused(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("small", b"1234")
    with pytest.raises(BucketError, match="4 of 5 bytes have arrived"):
        bucket.download("small", tmp_path / "small", 5)
