"""A bucket that can be made to fail, one folder in it for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deepgen.storage import bucket as bucket_module
from deepgen.storage.bucket import Bucket
from tests.helpers.bucket_server import NAME, BucketProxy, bucket_server, variables


@pytest.fixture(scope="module")
def server() -> Iterator[BucketProxy]:
    with bucket_server() as proxy:
        yield proxy


@pytest.fixture
def bucket(server: BucketProxy, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Bucket:
    for name, value in variables(server).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(bucket_module, "_ATTEMPTS", 1)
    server.fault, server.left = "", None
    server.asked.clear()
    return Bucket(f"s3://{NAME}/runs/{request.node.name}")
