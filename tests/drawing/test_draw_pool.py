"""Processes that draw: what they draw is what a painter draws here, whoever dies; what they cannot do is one line."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from actors import draw_pool
from actors.draw_pool import Model, draw_all
from deepgen.data.records import Record
from deepgen.drawing.painter import Painter
from deepgen.drawing.request import DrawRequest
from deepgen.errors import UserError
from deepgen.models.unified import UnifiedModel
from tests.helpers.factories import make_tiny_folder

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
RECORDS = [Record(name, "t2i", f"a {name}", "", None, (), "") for name in ("cat", "dog", "fox", "owl", "ant")]
JOBS = [DrawRequest((record,), (0, 1), 3, 64, 3, 3.0, guidance_scale=2.0) for record in RECORDS]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("model"))


def test_all_is_drawn_though_a_process_dies(
    ray_local: ModuleType, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draw_pool, "_shares", lambda *_, **__: (2, {"num_cpus": 1}))
    pool = draw_pool._Pool(JOBS, Model(weights, "masked", "fp32", 2), gpus=False)
    found = dict[int, list[np.ndarray]]()
    for number, pictures in pool.results():
        if not found:
            ray_local.kill(next(process for process, job in pool._doing.values() if job is not None))
        found[number] = pictures
    assert sum(pool._deaths.values()) == 1 and sorted(found) == [0, 1, 2, 3, 4]
    painter = Painter(UnifiedModel.from_folder(weights).requires_grad_(False), bf16=False)
    for number, job in enumerate(JOBS):
        for ours, wanted in zip(found[number], painter.draw(job), strict=True):
            assert np.abs(ours.astype(int) - wanted).max() <= 1


def test_processes_that_keep_dying_are_an_error(ray_local: ModuleType, weights: Path) -> None:
    pool = draw_pool._Pool(JOBS[:1], Model(weights, "masked", "fp32", 2), gpus=False)
    with pytest.raises(RuntimeError, match=r"3 processes for drawing have died while they load the model"):
        kill_each(ray_local, pool)


def kill_each(ray: ModuleType, pool: draw_pool._Pool) -> None:
    """Kill the pool's only process while it starts, and each one that takes its place."""
    for _ in range(10):
        ((reference, (process, _)),) = pool._doing.items()
        ray.kill(process)
        with pytest.raises(ray.exceptions.RayActorError) as died:
            ray.get(reference, timeout=60)
        pool._doing.clear()
        pool._replace(None, died.value)


def test_weights_that_do_not_fit_are_one_line(ray_local: ModuleType, weights: Path) -> None:
    with pytest.raises(UserError) as caught:
        list(draw_all(JOBS[:1], Model(weights / "nowhere", "masked", "fp32", 2), gpus=False))
    assert "nowhere" in str(getattr(caught.value, "cause", caught.value))


def test_a_wait_for_processes_has_an_end(ray_local: ModuleType, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw_pool, "START_S", 0.01)
    with pytest.raises(UserError, match=r"--address: in 0 s no process for drawing has started with \{'num_cpus': "):
        list(draw_all(JOBS[:1], Model(weights, "masked", "fp32", 2), gpus=False))


def test_nothing_to_draw_starts_nothing(ray_local: ModuleType, weights: Path) -> None:
    assert not list(draw_all([], Model(weights, "masked", "fp32", 2), gpus=False))
