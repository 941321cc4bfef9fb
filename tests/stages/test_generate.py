"""`stages/generate.py`: what it refuses before anything starts, and a whole run of it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from deepgen.config import UserError
from deepgen.data.images import decode_image
from deepgen.data.records import Record
from deepgen.drawing.painter import Painter
from deepgen.drawing.picture_files import PictureFolder
from deepgen.drawing.pixels import no_picture
from deepgen.drawing.prompts import Reader, read_wanted
from deepgen.drawing.request import DrawRequest
from deepgen.models.unified import UnifiedModel
from stages import generate
from tests.helpers.factories import make_tiny_folder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--size", "500"], "--size: got '500'; allowed: from 32 to 4096, a multiple of 16"),
        (["--size", "64x64x64"], "--size: got '64x64x64'; allowed: a side, as 512, or WIDTHxHEIGHT"),
        (["--aspect", "1:99"], "--aspect: got '1:99'; allowed: as 16:9, from 1:8 to 8:1"),
        (["--aspect", "1:1", "--size", "64"], "--aspect: got with --size; allowed: one of them"),
        (["--area", "100"], "--area: got '100'; allowed: from 32 to 4096, a multiple of 16"),
        (["--size", "64x144"], "--size: got 64x144 px; allowed: sides of at most 128 px, for which this model has"),
        (["--aspect", "4:1", "--area", "128"], "--area: got 256x64 px; allowed: sides of at most 128 px"),
        (["--samples", "0"], "--samples: got '0'; allowed: a whole number from 1 to 2147483647"),
        (["--guidance", "nan"], "--guidance: got 'nan'; allowed: a number from 1 (off) to 100"),
        (["--sampler", "euler"], "--sampler: got 'euler'; allowed: "),
        (["--shift", "inf"], "--shift: got inf; allowed: a number above 0, at most 100"),
        (["--sampler", "cps", "--eta", "5"], "--eta: got 5 with cps; allowed: a number above 0, at most 1"),
        (
            ["--sampler", "flow_sde", "--eta", "nan"],
            "--eta: got nan with flow_sde; allowed: a number above 0, at most 100",
        ),
        (["--negative", "<|im_end|>"], "--negative: it contains the reserved token <|im_end|>; remove it"),
        (["--negative", "\udcff"], "--negative: it is no UTF-8 text"),
        (["--negative", "grey " * 2000], "the model reads"),
        (["--out", str(ROOT / "docs")], "docs is there and has no drawing.json"),
        (["--weights", "nowhere"], "--weights: nowhere is no folder"),
        (["--weights", str(ROOT / "docs")], "is no component folder (no bridge/)"),
        (["--prompts", ""], "--prompts: the prompt is empty"),
        (["--images", "nowhere.png"], "nowhere.png: No such file"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], said: str
) -> None:
    given = ["--weights", str(model), "--prompts", "a cat", "--out", str(tmp_path / "out"), *options]
    monkeypatch.setattr(sys, "argv", ["generate.py", *given])
    with pytest.raises(UserError) as caught:
        generate.main()
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("ratio", "expected"), [(1.0, (512, 512)), (16 / 9, (384, 688)), (1 / 2, (720, 368))])
def test_sides_of_an_aspect(ratio: float, expected: tuple[int, int]) -> None:
    assert generate.sides(512, ratio) == expected


@pytest.mark.processes  # a font for the sheet is looked for
def test_a_picture_that_is_not_finite_is_not_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = [no_picture(64, 64), np.zeros((64, 64, 3), dtype=np.uint8)]
    monkeypatch.setattr("deepgen.cluster.connect.connect", lambda *_, **__: False)
    monkeypatch.setattr(
        "actors.draw_pool.draw_all",
        lambda jobs, *_, **__: ((job.records[0], n, drawn[n]) for job in jobs for n in job.samples),
    )
    given = ["--weights", str(model), "--prompts", "a cat", "--samples", "2", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["generate.py", *given])
    with pytest.raises(UserError, match="--weights: 1 pictures were not drawn, because their numbers are not finite"):
        generate.main()
    assert len(list((tmp_path / "out").glob("a-cat-*-1.png"))) == 1 == len(list((tmp_path / "out").glob("a-*.png")))
    assert "1 of 2 pictures are in" in capsys.readouterr().out


def test_many_samples_are_several_jobs(tmp_path: Path) -> None:
    records = [Record(name, "t2i", name, "", None, (), "") for name in ("a", "b", "c")]
    request = DrawRequest((), tuple(range(10)), 0, 64, 3, 3.0)
    with (pictures := PictureFolder(tmp_path)).opened({"seed": 0}):
        pictures.save(records[1], 0, np.zeros((8, 8, 3), dtype=np.uint8))
        jobs = list(generate.jobs_of(request, records, pictures, 4))
    pairs = [(record.id, sample) for job in jobs for record in job.records for sample in job.samples]
    assert len(pairs) == len(set(pairs)) == 29 and ("b", 0) not in pairs
    assert max(len(job.records) * len(job.samples) for job in jobs) == 4


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_draws_what_the_painter_draws_and_goes_on_after_ctrl_c(model: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "my pictures"
    prompts.write_text("a cat\n<|im_end|>\na dog\n")
    options = ["--prompts", str(prompts), "--samples", "12", "--steps", "20", "--guidance", "2", "--seed", "5"]
    command = [sys.executable, str(ROOT / "stages" / "generate.py"), "--weights", str(model), *options, "--batch", "1"]
    command += ["--out", str(out)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as first:  # type: ignore[call-overload]
        deadline = time.monotonic() + 300
        while len(list(out.glob("a-*.png"))) < 2:
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        first.send_signal(signal.SIGINT)
        said, complained = first.communicate(timeout=120)
    assert first.returncode == 130, said + complained
    assert f"left out: {prompts}, row 2: the prompt: it contains the reserved token <|im_end|>" in said
    assert "stopped; to continue, run the same command again: " in complained and "Traceback" not in complained
    drawn = {file.name: file.stat().st_mtime_ns for file in out.glob("a-*.png")}
    assert 2 <= len(drawn) < 24 and f"{len(drawn)} of 24 pictures are in {out}" in said
    assert len(pq.read_table(out / "pictures.parquet")) == len(drawn) and (out / "sheet.png").is_file()

    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 0 and "24 of 24 pictures" in second.stdout, second.stdout + second.stderr
    assert all((out / name).stat().st_mtime_ns == then for name, then in drawn.items())
    rows = pq.read_table(out / "pictures.parquet").to_pylist()
    assert [row["prompt"] for row in rows] == ["a cat"] * 12 + ["a dog"] * 12
    painter = Painter(UnifiedModel.from_folder(model).requires_grad_(False), bf16=False)
    records, _ = read_wanted(str(prompts), [], Reader(model / "tokenizer", 100, 128, 64))
    for number in (0, 11, 12, 23):
        record, sample = records[number // 12], number % 12
        request = DrawRequest((record,), (sample,), 5, 64, 20, 3.0, guidance_scale=2.0)
        found = decode_image((out / rows[number]["file"]).read_bytes())
        assert np.abs(found.astype(int) - painter.draw(request)[0][0]).max() <= 1
