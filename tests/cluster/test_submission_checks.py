"""What is checked before a job is sent to a cluster."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray

from clusters.submit import parse
from deepgen.cluster.submission import check_dashboard, git_commit, package_size, read_environment
from deepgen.errors import UserError

TOKEN = "a" * 64
Answer = Callable[[str], tuple[int, bytes]]


@contextmanager
def serving(answer: Answer) -> Iterator[str]:
    """A server that answers every GET by its Authorization header. Yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answer(self.headers.get("Authorization", ""))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def version(ray_version: str = ray.__version__) -> bytes:
    return json.dumps({"version": "4", "ray_version": ray_version}).encode()


def with_token(header: str) -> tuple[int, bytes]:
    return (200, version()) if header == f"Bearer {TOKEN}" else (403 if header else 401, b"no")


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets the token of this process, or none."""
    from deepgen.cluster.private import reread_authentication

    def use(given: str) -> None:
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        monkeypatch.setenv("HOME", "/dev/null")
        monkeypatch.setenv("RAY_AUTH_TOKEN", given) if given else monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
        monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
        reread_authentication()

    yield use
    monkeypatch.undo()
    reread_authentication()


@pytest.mark.parametrize(
    ("answer", "given", "says"),
    [
        (lambda _: (200, version("2.9.0")), "", rf"has Ray 2\.9\.0, here is {ray.__version__}; allowed: the same$"),
        (lambda _: (200, b"<html>"), "", r"is no dashboard of Ray \(status 200\)$"),
        (lambda _: (200, b"[]"), "", r"is no dashboard of Ray \(status 200\)$"),
        (lambda _: (404, b"no"), "", r"is no dashboard of Ray \(status 404\)$"),
        (with_token, "", r"wants a token, here is none; allowed: its token in RAY_AUTH_TOKEN"),
        (with_token, "b" * 64, r"refuses the token that is here; allowed: its own$"),
    ],
)
def test_a_dashboard_that_takes_no_job_is_one_line(
    answer: Answer, given: str, says: str, token: Callable[[str], None]
) -> None:
    token(given)
    with serving(answer) as address, pytest.raises(UserError, match=rf"^--address: .*{says}") as caught:
        check_dashboard(address)
    assert "\n" not in str(caught.value) and TOKEN not in str(caught.value) and "bbbb" not in str(caught.value)


def test_a_dashboard_gets_a_token_if_it_wants_one(token: Callable[[str], None]) -> None:
    token(TOKEN)
    for answer in (with_token, lambda _: (200, version())):
        with serving(answer) as address:
            assert check_dashboard(f"{address}/") == address


@pytest.mark.parametrize("address", ["10.0.0.7:6379", "ray://10.0.0.7:10001", "10.0.0.7", "auto"])
def test_the_address_of_the_head_is_not_that_of_its_dashboard(address: str) -> None:
    host = "auto" if address == "auto" else "10.0.0.7"
    with pytest.raises(UserError, match=rf"got '{address}'; allowed: .* http://{host}:8265 \("):
        check_dashboard(address)


def test_nobody_there() -> None:
    with pytest.raises(UserError, match=r"no dashboard of Ray answers at http://127\.0\.0\.1:1 \(ConnectionError\)"):
        check_dashboard("http://127.0.0.1:1")


def test_a_folder_that_is_too_large_is_refused_with_its_largest_files(tmp_path: Path) -> None:
    noise = bytes((n * n + n // 251) % 256 for n in range(300_000))
    for name in ("small.py", "large.bin", "left-out.bin"):
        (tmp_path / name).write_bytes(noise[: 1000 if name == "small.py" else None])
    environment = {"working_dir": str(tmp_path), "excludes": ["left-out.bin"]}
    size = package_size(environment)
    assert package_size(environment, limit=size + 1) == size
    with pytest.raises(
        UserError, match=r"is \d+ MiB as a zip; allowed: .*; the largest: large\.bin \(.*small\.py"
    ) as caught:
        package_size(environment, limit=size)
    assert "left-out" not in str(caught.value)


@pytest.mark.processes
def test_this_checkout_is_small_enough(root: Path) -> None:
    environment = read_environment(root / "clusters" / "runtime_env.yaml", root)
    assert package_size(environment) < 64 << 20
    assert environment["env_vars"]["OMP_NUM_THREADS"] == "1"


@pytest.mark.processes
def test_the_commit_travels_with_the_copy(tmp_path: Path) -> None:
    assert git_commit(tmp_path) == ""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("1")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    clean = git_commit(tmp_path)
    assert len(clean) == 40
    (tmp_path / "file").write_text("2")
    assert git_commit(tmp_path) == f"{clean}-dirty"
    environment = tmp_path / "environment.yaml"
    environment.write_text("env_vars: {A: b}\nexcludes: [x]\n")
    assert read_environment(environment, tmp_path) == {
        "env_vars": {"A": "b", "DEEPGEN_GIT_COMMIT": f"{clean}-dirty"},
        "excludes": ["x"],
        "working_dir": str(tmp_path),
    }
    environment.write_text("[]")
    with pytest.raises(UserError, match="holds no mapping"):
        read_environment(environment, tmp_path)


def test_what_follows_the_dashes_is_the_program(tmp_path: Path) -> None:
    args = parse(
        ["--no-wait", "--working-dir", str(tmp_path), "--", "python", "stages/rl.py", "--resume", "run.name=a"]
    )
    assert args.command == ["python", "stages/rl.py", "--resume", "run.name=a"] and args.no_wait
    with pytest.raises(UserError, match="no such folder"):
        parse(["--working-dir", str(tmp_path / "x"), "--", "python"])
