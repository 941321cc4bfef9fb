"""A reward whose library clashes with the one that is installed here runs in a virtual environment of its own."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import prettytable
import pytest

from actors.experience.journal.origin import scorer_hash
from actors.experience.scoring.reward_pool import RewardPool
from actors.reward_service import make_environments
from deepgen.cluster.own_environment import own_environment
from deepgen.config import PoolSettings
from deepgen.config.schema.pools import make_pool
from deepgen.errors import UserError
from rewards import RewardRequest
from tests.helpers.pool_calls import score

NEW = "def brightness(image):\n    return float(image.mean()) / 255\n"


class Brightness:
    """Uses a prettytable of the future, which has other functions than the one that is installed here."""

    def __init__(self) -> None:
        import prettytable

        self._brightness = prettytable.brightness

    def score(self, requests: Sequence[RewardRequest]) -> list[float]:
        return [self._brightness(request.image) for request in requests]


def wheel(folder: Path, code: str = NEW) -> Path:
    """A package file of prettytable 99."""
    info = "prettytable-99.0.dist-info"
    files = {
        "prettytable/__init__.py": code,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: prettytable\nVersion: 99.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = [f"{name},{_digest(text)},{len(text)}\n" for name, text in files.items()]
    file = folder / "prettytable-99.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in (files | {f"{info}/RECORD": "".join([*rows, f"{info}/RECORD,,\n"])}).items():
            archive.writestr(name, text)
    return file


def _digest(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256={base64.urlsafe_b64encode(digest).decode().rstrip('=')}"


def pool_of(*lines: str) -> PoolSettings:
    return make_pool("light", {"class": f"{__name__}:Brightness", "environment": list(lines)})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.ray
def test_a_reward_uses_another_version_than_the_run(ray_local: ModuleType, tmp_path: Path) -> None:
    assert not hasattr(prettytable, "brightness")
    settings = pool_of("--no-index", str(wheel(tmp_path)))

    async def work() -> list[float | None]:
        pool = RewardPool(settings, start_deadline_s=120)
        await pool.start()
        try:
            pictures = [np.full((2, 2, 3), 51 * level, dtype=np.uint8) for level in range(6)]
            return (await score(pool, [RewardRequest(f"{n}", "", "t2i", p) for n, p in enumerate(pictures)])).values
        finally:
            pool.stop()

    assert asyncio.run(work()) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    own = own_environment(settings)
    assert own and (own.folder / "lib").is_dir() and not own.is_here()


@pytest.mark.ray
def test_an_environment_that_cannot_be_made_is_one_line(ray_local: ModuleType, cache: Path) -> None:
    with pytest.raises(UserError) as caught:
        make_environments([pool_of("--no-index", "prettytable==98"), make_pool("ocr", {})], 60)
    said = str(caught.value)
    assert said.startswith(
        "rewards.light.environment: pip could not install --no-index, prettytable==98: it ended with"
    )
    assert "No matching distribution found for prettytable==98" in said and "\n" not in said
    assert not [found for found in cache.rglob("*") if found.is_dir() and found.name == "lib"]


def test_the_folder_tells_environments_apart(tmp_path: Path) -> None:
    def folder(*lines: str) -> str:
        own = own_environment(pool_of(*lines))
        return own.folder.name if own else ""

    file = wheel(tmp_path)
    first = folder(str(file))
    assert folder() == "" and first == folder(str(file)) != folder("--no-deps", str(file))
    before = scorer_hash(pool_of(str(file)))
    wheel(tmp_path, NEW + "x = 1\n")
    assert folder(str(file)) != first
    assert scorer_hash(pool_of(str(file))) != before
    with pytest.raises(UserError, match=r"^rewards\.light\.environment: got '-r \"a': No closing quotation; allowed"):
        folder('-r "a')


def test_a_folder_that_cannot_be_written_is_one_line(cache: Path) -> None:
    cache.write_text("a file, no folder")
    own = own_environment(pool_of("anything"))
    assert own
    with pytest.raises(UserError, match=r"^rewards\.light\.environment: cannot make .*: Not a directory"):
        own.make(1)


@pytest.mark.processes
def test_pip_has_a_deadline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = own_environment(pool_of("anything"))
    assert own and own.python == Path(sys.executable)
    with pytest.raises(UserError, match=r"it was not done in time \(cluster\.start_deadline_s\)"):
        own.make(0)
