"""`stages/generate.py`: what it refuses before anything starts, and a whole run of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from deepgen.config import UserError
from deepgen.data.images import decode_image
from deepgen.drawing.painter import Painter
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
        (["--samples", "0"], "--samples: got '0'; allowed: a whole number from 1 on"),
        (["--guidance", "nan"], "--guidance: got 'nan'; allowed: a number from 1 (off) to 100"),
        (["--sampler", "euler"], "--sampler: got 'euler'; allowed: "),
        (["--shift", "0"], "--shift: got 0; allowed: a number above 0"),
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


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_draws_what_the_painter_draws_and_goes_on(model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n<|im_end|>\na dog\n")
    options = ["--prompts", str(prompts), "--samples", "2", "--steps", "3", "--guidance", "2", "--seed", "5"]
    command = [sys.executable, str(ROOT / "stages" / "generate.py"), "--weights", str(model), *options]
    first = subprocess.run([*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout + first.stderr
    assert f"left out: {prompts}, row 2: prompt contains the reserved token <|im_end|>" in first.stdout
    rows = pq.read_table(tmp_path / "out" / "pictures.parquet").to_pylist()
    assert [(row["prompt"], row["sample"]) for row in rows] == [("a cat", 0), ("a cat", 1), ("a dog", 0), ("a dog", 1)]

    painter = Painter(UnifiedModel.from_folder(model).requires_grad_(False), bf16=False)
    reader = Reader(model / "tokenizer", 100, 128, 64)
    records, _ = read_wanted(str(prompts), [], (), reader)
    request = DrawRequest(tuple(records), (0, 1), 5, 64, 3, 3.0, guidance_scale=2.0)
    wanted = [picture for own in painter.draw(request) for picture in own]
    files = [tmp_path / "out" / row["file"] for row in rows]
    for file, picture in zip(files, wanted, strict=True):
        assert np.abs(decode_image(file.read_bytes()).astype(int) - picture).max() <= 1

    kept = files[0].stat().st_mtime_ns
    files[3].unlink()
    second = subprocess.run([*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert second.returncode == 0 and "4 of 4 pictures" in second.stdout, second.stdout + second.stderr
    assert files[0].stat().st_mtime_ns == kept
    assert np.abs(decode_image(files[3].read_bytes()).astype(int) - wanted[3]).max() <= 1
