"""Joining clusters of others: with tokens, without, and what is no cluster."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import psutil
import pytest
from ray.core.generated import gcs_service_pb2

ROOT = Path(__file__).resolve().parents[2]
CHOOSE = """import os
from deepgen.cluster.authentication import check_reachable, use_what_it_takes
from deepgen.config import run_program
def main():
    check_reachable({address!r})
    use_what_it_takes({address!r})
    print(os.environ.get("RAY_AUTH_MODE"))
run_program(main)
"""
JOIN = """import ray
from deepgen.cluster.connect import connect
from deepgen.config import load_settings, run_program
def main():
    connect(load_settings(None, ["train.workers=1"]), lambda settings, gpus: [])
    print("joined", ray.get(ray.remote(num_cpus=0.1)(lambda: 7).remote(), timeout=60))
run_program(main)
"""


class Head(grpc.GenericRpcHandler):
    """What a head node says when asked whether it lives, with or without the token that it wants."""

    def __init__(self, token: str | None) -> None:
        self._token = token

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        given = dict(details.invocation_metadata).get("authorization")

        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            if self._token and given != f"Bearer {self._token}":
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return bytes(gcs_service_pb2.CheckAliveReply().SerializeToString())

        return grpc.unary_unary_rpc_method_handler(answer)


@contextmanager
def head(token: str | None) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(1), handlers=[Head(token)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0)


def run(code: str, **given: str) -> subprocess.CompletedProcess[str]:
    """Without a home, so without a token file; through a proxy that is not there."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "RAY_TMPDIR": os.environ["RAY_TMPDIR"]}
    environment |= {"HOME": "/dev/null", "http_proxy": "http://127.0.0.1:1", **given}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.processes
@pytest.mark.parametrize("given", [{}, {"RAY_AUTH_MODE": "token"}, {"RAY_AUTH_MODE": "disabled"}], ids=str)
def test_a_cluster_that_takes_no_tokens_gets_none(given: dict[str, str]) -> None:
    with head(None) as address:
        done = run(CHOOSE.format(address=address), **given)
    assert (done.returncode, done.stdout) == (0, "disabled\n"), done.stderr


@pytest.mark.processes
@pytest.mark.parametrize("given", [{}, {"RAY_AUTH_MODE": "disabled"}], ids=str)
def test_a_cluster_that_wants_a_token_gets_it(given: dict[str, str]) -> None:
    token = "ab" * 32
    with head(token) as address:
        done = run(CHOOSE.format(address=address), RAY_AUTH_TOKEN=token, **given)
        assert (done.returncode, done.stdout) == (0, "token\n"), done.stderr
        without = run(CHOOSE.format(address=address), **given)
        wrong = run(CHOOSE.format(address=address), RAY_AUTH_TOKEN="cd" * 32, **given)
    assert without.returncode == wrong.returncode == 2
    said = f"error: cluster.address: the Ray cluster at {address}"
    assert without.stderr.startswith(
        f"{said} wants a token (RAY_AUTH_MODE=token), here is none; allowed: its token in RAY_AUTH_TOKEN,"
    )
    assert wrong.stderr.startswith(f"{said} refuses the token that is here (RAY_AUTH_MODE=token); allowed: ")
    assert without.stderr.count("\n") == wrong.stderr.count("\n") == 1


@pytest.mark.processes
def test_what_is_no_ray_cluster_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        done = run(CHOOSE.format(address=address))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: cluster.address: what answers at {address} is no Ray cluster (")


@pytest.mark.ray
def test_a_plain_cluster_is_joined(tmp_path: Path) -> None:
    """One that `ray start --head` started without tokens, from a shell whose RAY_AUTH_MODE asks for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}"]
    command += ["--include-dashboard=false", "--num-cpus=1", "--object-store-memory=100000000"]
    plain = os.environ | {"RAY_AUTH_MODE": "disabled"}
    del plain["RAY_AUTH_TOKEN"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, env=plain, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path)
    family = psutil.Process(process.pid)
    try:
        wait_until_it_listens(process, port, tmp_path / "log")
        done = run(JOIN, RAY_ADDRESS=f"127.0.0.1:{port}", RAY_AUTH_MODE="token")
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "joined 7"
    finally:
        alive = [family, *family.children(recursive=True)]
        process.terminate()
        for one in psutil.wait_procs(alive, timeout=20)[1]:
            one.kill()
        process.wait(timeout=20)


def wait_until_it_listens(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if "Ray runtime started" in log.read_text(encoding="utf-8", errors="replace"):
            return
        time.sleep(0.2)
    pytest.fail(f"the cluster did not start at port {port}:\n{log.read_text()[-3000:]}")
