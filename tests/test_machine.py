"""What a program does where home, user name, temporary folder or a way round the proxy are missing."""

from __future__ import annotations

import getpass
import os
import pwd
import stat
from pathlib import Path

import pytest

from deepgen.errors import UserError
from deepgen.machine import prepare_process, private_folder

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder, in a process without proxies."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    for name in (*PROXIES, "no_proxy"):
        for each in (name, name.upper()):
            monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv("HOME", os.environ.get("HOME", ""))  # restored after the test, like USER
    monkeypatch.setenv("USER", "somebody")
    return tmp_path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_private_folder_is_for_this_user_alone(place: Path) -> None:
    before = os.umask(0)
    try:
        folder = private_folder()
    finally:
        os.umask(before)
    assert folder == place / f"deepgen-{os.geteuid()}"
    assert mode(folder) == 0o700
    folder.chmod(0o777)
    assert private_folder() == folder
    assert mode(folder) == 0o700


def test_a_folder_that_another_user_has_made_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, other = os.geteuid(), os.geteuid() + 1
    (place / f"deepgen-{other}").mkdir(mode=0o777)
    monkeypatch.setattr("deepgen.machine.os.geteuid", lambda: other)
    with pytest.raises(UserError, match=rf"deepgen-{other}: is user {owner}'s or no folder, .* set RAY_TMPDIR"):
        private_folder()


@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_is_no_folder_of_ours_is_refused(place: Path, kind: str) -> None:
    folder = place / f"deepgen-{os.geteuid()}"
    if kind == "link":
        (place / "elsewhere").mkdir()
        folder.symlink_to(place / "elsewhere")
    else:
        folder.touch()
    with pytest.raises(UserError, match="set RAY_TMPDIR to"):
        private_folder()


def test_a_temporary_folder_that_cannot_be_had_is_one_line(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/dev/null/x")
    with pytest.raises(UserError, match=r"^/dev/null/x/deepgen-\d+: cannot be made or used \(Not a dir"):
        private_folder()
    monkeypatch.setenv("RAY_TMPDIR", f"/tmp/{'x' * 40}")
    with pytest.raises(UserError, match=r"^RAY_TMPDIR: /tmp/x+ has 45 characters, but Ray's sockets leave room for"):
        private_folder(40)


def test_a_long_temporary_folder_that_nobody_chose_is_passed_over(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setattr("tempfile.tempdir", f"/tmp/{'x' * 40}")
    made: list[Path] = []
    monkeypatch.setattr(Path, "mkdir", lambda path, **_: made.append(path))
    monkeypatch.setattr(Path, "lstat", lambda path: place.stat())
    monkeypatch.setattr(Path, "chmod", lambda path, mode: None)
    assert private_folder(40) == made[-1] == Path(f"/tmp/deepgen-{os.geteuid()}")


@pytest.mark.parametrize("home", ["/dev/null", "/no/such/home", "/proc"])
def test_without_a_home_that_can_be_written_there_is_a_private_one(
    place: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    monkeypatch.setenv("HOME", home)
    prepare_process()
    assert Path.home() == place / f"deepgen-{os.geteuid()}" / "home"
    assert mode(Path.home()) == 0o700
    prepare_process()
    assert Path.home() == place / f"deepgen-{os.geteuid()}" / "home"


def test_a_user_id_without_an_entry_has_a_home_and_a_name(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    prepare_process()
    assert getpass.getuser() == f"user-{os.geteuid()}"
    assert Path.home() == place / f"deepgen-{os.geteuid()}" / "home"
    del os.environ["HOME"], os.environ["USER"]


def test_a_home_that_can_be_written_stays(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(place))
    prepare_process()
    assert os.environ["HOME"] == str(place)
    assert os.environ["USER"] == "somebody"
    assert not list(place.iterdir())


@pytest.mark.parametrize("proxy", [*PROXIES, *map(str.upper, PROXIES)])
def test_calls_to_this_machine_go_round_the_proxy(place: Path, monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.setenv(proxy, "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "example.org,127.0.0.1")
    prepare_process()
    assert os.environ["no_proxy"] == "example.org,127.0.0.1,localhost,::1"
    assert os.environ["NO_PROXY"] == "localhost,127.0.0.1,::1"
    del os.environ["NO_PROXY"]


def test_without_a_proxy_nothing_is_set(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(place))
    prepare_process()
    assert "no_proxy" not in os.environ and "NO_PROXY" not in os.environ
