"""An exported diffusers folder, drawn from by diffusers alone: the same pictures as our own drawing path."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torch import Tensor

from deepgen.data.images import decode_image
from deepgen.data.loading.dataset import image_to_tensor
from deepgen.data.records import Record
from deepgen.diffusion.trajectory import start_group
from deepgen.drawing.painter import Painter
from deepgen.drawing.request import DrawRequest
from deepgen.models.unified import UnifiedModel
from deepgen.seeds import sample_seed
from tests.helpers import color_profiles
from tests.helpers.exported_pipeline import load_pipeline
from tests.models.test_layouts import adapted_model, convert

SEED, STEPS = 3, 3
CLOSE = 1e-5  # largest difference of latents, whose own largest value is about 5
CHANGED = 1e-2  # least difference that another prompt, source or negative prompt makes
PROMPTS = {
    "text": "A red fox at dawn",
    "reasoning": "The animal that gives wool, in the season after winter; think about its colours",
    "edit": "Make it blue",
    "two sources": "Put the hat on her",
}


def png(height: int, width: int, seed: int, mode: str = "RGB", **options: Any) -> bytes:
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 4)).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(data, "PNG", **options)
    return data.getvalue()


def turned(turn: int) -> Any:
    exif = Image.Exif()
    exif[0x0112] = turn
    return exif


SOURCES = {
    "edit": (png(50, 70, 0, "RGBA", exif=turned(6)),),
    "two sources": (png(64, 64, 1), png(90, 40, 2)),
}


class Keeping(Painter):
    """Keeps the latents that it decodes."""

    def _decoded(self, latents: Tensor) -> list[np.ndarray]:
        self.latents = latents
        return super()._decoded(latents)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights")
    adapted_model().save_folder(path / "components")
    return convert(path / "components", path / "diffusers", "diffusers").parent


@pytest.fixture(scope="module")
def model(folder: Path) -> UnifiedModel:
    return UnifiedModel.from_folder(folder / "components")


def load(folder: Path, **options: Any) -> Any:
    return load_pipeline(folder / "diffusers", folder / "code", **options)


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    return load(folder)


def record(name: str) -> Record:
    return Record(name, "edit" if name in SOURCES else "t2i", PROMPTS[name], "", None, SOURCES.get(name, ()), "")


def request(*names: str, samples: int = 2, **options: Any) -> DrawRequest:
    shared: dict[str, Any] = {"seed": SEED, "image_size": 64, "num_steps": STEPS, "shift": 3.0} | options
    return DrawRequest(records=tuple(map(record, names)), samples=tuple(range(samples)), **shared)


def generators(names: Sequence[str], samples: int = 2) -> list[torch.Generator]:
    """Of the start noise of each picture."""
    return [torch.Generator().manual_seed(sample_seed(SEED, name, 0, j)) for name in names for j in range(samples)]


def opened(name: str) -> list[Image.Image]:
    return [Image.open(io.BytesIO(data)) for data in SOURCES.get(name, ())]


def assert_same(pipe: Any, painter: Keeping, name: str, **options: Any) -> Tensor:
    """The latents, which both draw in the same way."""
    painter.draw(request(name, **options))
    given = {"guidance_scale": options.get("guidance_scale", 1.0), "negative_prompt": options.get("negative_prompt")}
    size = dict(zip(("height", "width"), options.get("size", ()), strict=False))
    found = pipe(
        PROMPTS[name],
        image=opened(name) or None,
        num_inference_steps=STEPS,
        num_images_per_prompt=2,
        generator=generators([name]),
        output_type="latent",
        **given,
        **size,
    ).images
    torch.testing.assert_close(found, painter.latents, atol=CLOSE, rtol=0)
    return found


@pytest.mark.parametrize("name", PROMPTS)
def test_same_latents_as_the_painter(model: UnifiedModel, pipe: Any, name: str) -> None:
    painter = Keeping(model, bf16=False)
    plain = assert_same(pipe, painter, name)
    guided = assert_same(pipe, painter, name, guidance_scale=4.0)
    negative = assert_same(pipe, painter, name, guidance_scale=4.0, negative_prompt="blurred, grey")
    for a, b in ((plain, guided), (guided, negative), (plain[0], plain[1])):
        assert (a - b).abs().max() > CHANGED
    assert not torch.equal(assert_same(pipe, painter, name, size=(48, 80))[..., :8], plain[..., :8])


def test_same_pictures_as_the_painter(model: UnifiedModel, pipe: Any) -> None:
    """Prompts of different lengths, which the painter draws together, with masked padding."""
    names = ["text", "reasoning"]
    painter = Keeping(model, bf16=False)
    wanted = np.concatenate(painter.draw(request(*names, guidance_scale=4.0)))
    given: dict[str, Any] = {"num_inference_steps": STEPS, "num_images_per_prompt": 2, "guidance_scale": 4.0}
    prompts = [PROMPTS[name] for name in names]
    pictures = pipe(prompts, generator=generators(names), **given).images
    assert [picture.size for picture in pictures] == [(64, 64)] * 4
    found = np.stack([np.asarray(picture) for picture in pictures])
    assert np.abs(found.astype(int) - wanted).max() <= 1  # where a rounding error crosses from one level to the next
    assert np.mean(found != wanted) < 1e-3
    noise = [start_group((8, 16, 16), run_seed=SEED, prompt_id=n, epoch=0, indices=[0, 1])[0] for n in names]
    latents = pipe(prompts, latents=torch.cat(noise), output_type="latent", **given).images
    torch.testing.assert_close(latents, painter.latents, atol=CLOSE, rtol=0)


def test_padding_that_is_read(folder: Path) -> None:
    """As in the published code, guidance pads prompt and negative prompt to one length, and reads the pads."""
    model = UnifiedModel.from_folder(folder / "components", padding="reference")
    pipe, painter = load(folder, padding="reference"), Keeping(model, bf16=False)
    for name in ("text", "edit"):
        assert_same(pipe, painter, name, guidance_scale=4.0, negative_prompt="x")
    with pytest.raises(AssertionError, match="not close"):
        assert_same(load(folder), painter, "edit", guidance_scale=4.0, negative_prompt="x")


def test_long_prompts_lose_their_beginning(model: UnifiedModel, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    painter = Keeping(model, bf16=False)
    monkeypatch.setitem(PROMPTS, "edit", PROMPTS["reasoning"])
    whole = {name: assert_same(pipe, painter, name, guidance_scale=4.0) for name in ("reasoning", "edit")}
    monkeypatch.setattr(model, "architecture", replace(model.architecture, max_prompt_tokens=40))
    monkeypatch.setattr(pipe.connector.config, "max_prompt_tokens", 40)
    assert model.cut_prompts([PROMPTS["reasoning"]]) == 1
    for name, before in whole.items():
        assert (assert_same(pipe, painter, name, guidance_scale=4.0) - before).abs().max() > CHANGED


def jpeg(mode: str, **options: Any) -> bytes:
    data = io.BytesIO()
    Image.open(io.BytesIO(png(40, 90, 5))).convert(mode).save(data, "JPEG", **options)
    return data.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        *(png(50, 70, 4, mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        png(50, 70, 4, "P", transparency=3),
        *(png(50, 70, 4, mode, icc_profile=color_profiles.adobe_rgb()) for mode in ("RGB", "RGBA", "P", "L")),
        *(png(50, 70, 4, mode, icc_profile=color_profiles.grey(1.0)) for mode in ("L", "LA", "RGB")),
        png(50, 70, 4, icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
        png(50, 70, 4, icc_profile=b"damaged"),
        jpeg("CMYK"),
        jpeg("CMYK", icc_profile=color_profiles.press()),
        jpeg("CMYK", icc_profile=color_profiles.adobe_rgb()),
        *(jpeg("RGB", exif=turned(turn)) for turn in range(1, 10)),
        *(png(height, width, 4) for height, width in ((64, 64), (1260, 2240), (599, 600), (20, 1000))),
    ],
)
def test_sources_are_prepared_as_for_the_painter(pipe: Any, data: bytes) -> None:
    scale = sys.modules[type(pipe).__module__].scale
    for size in (64, 512):
        found = scale(Image.open(io.BytesIO(data)), size)
        torch.testing.assert_close(found, image_to_tensor(decode_image(data), size), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "a <|im_end|> b"}, r"prompt 'a <\|im_end\|> b': contains the reserved token <\|im_end\|>; remove"),
        ({"prompt": []}, "0 pictures in 1 steps; allowed: 1 or more"),
        ({"num_inference_steps": 0}, "1 pictures in 0 steps; allowed: 1 or more"),
        ({"prompt": None}, "prompt: NoneType given; allowed: texts"),
        ({"negative_prompt": [None]}, "prompt: NoneType given; allowed: texts"),
        ({"guidance_scale": float("nan")}, "guidance_scale and output_type: nan and 'pil' given"),
        ({"output_type": "foo"}, "allowed: a number, and one of pil, np, pt, latent"),
        ({"generator": (torch.Generator(),) * 2}, "generator: 2 given for 1 pictures"),
        ({"negative_prompt": ("a", "b")}, "negative_prompt: 2 given for 1 prompts"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt: 2 given for 1 prompts"),
        ({"height": 64}, "height and width: 64 and None given; allowed: both or none"),
        ({"height": 60, "width": 64}, "height and width: 60 and 64 given; allowed: multiples of 8"),
        ({"height": 0, "width": 64}, "height and width: 0 and 64 given; allowed: multiples of 8"),
        ({"image": "a.png"}, "image: str given; allowed: PIL images"),
        ({"image": [Image.new("F", (64, 64))]}, "image: greys of mode F given"),
        ({"prompt": ["a", "b"], "image": [[Image.new("RGB", (64, 64))]]}, "image: sources of 1 prompts given for 2"),
        (
            {"latents": torch.zeros(1, 8, 8, 8)},
            r"latents: \[1, 8, 8, 8\] given for pictures that need \[1, 8, 16",
        ),
        ({"generator": [torch.Generator()] * 2}, "generator: 2 given for 1 pictures"),
    ],
)
def test_arguments_that_do_not_fit(pipe: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(**({"prompt": "a", "num_inference_steps": 1} | options))


ALONE = """
import sys
sys.modules["deepgen"] = sys.modules["peft"] = None  # neither can be imported
import torch
from diffusers import DiffusionPipeline
from PIL import Image
folder, source, seed, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
generator = torch.Generator().manual_seed(int(seed))
options = {"num_inference_steps": 3, "guidance_scale": 4.0, "generator": generator, "output_type": "latent"}
torch.save(pipe("Make it blue", image=[Image.open(source)], **options).images, out)
"""


@pytest.mark.processes
def test_folder_is_enough(model: UnifiedModel, folder: Path, tmp_path: Path) -> None:
    """A process without this package, in another folder, draws the edit."""
    painter = Keeping(model, bf16=False)
    painter.draw(request("edit", samples=1, guidance_scale=4.0))
    (tmp_path / "source.png").write_bytes(SOURCES["edit"][0])
    seed, out = sample_seed(SEED, "edit", 0, 0), tmp_path / "latents.pt"
    arguments = [str(folder / "diffusers"), str(tmp_path / "source.png"), str(seed), str(out)]
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "code")},
    )
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(out), painter.latents, atol=CLOSE, rtol=0)
