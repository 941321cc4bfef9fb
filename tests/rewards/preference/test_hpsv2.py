"""HPS v2 from a file of the published layout, against open_clip's formula, at a small width."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from deepgen.config.schema.pools import make_pool
from deepgen.errors import UserError
from rewards import RewardRequest, build_reward, text_limit
from rewards.clip_encoder import CLIP_MEAN, CLIP_STD, preprocess_whole
from rewards.preference.hpsv2 import FILES
from tests.helpers.open_clip_names import OpenClip
from tests.helpers.reward_models import make_clip_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.json and tokenizer of a transformers CLIP, and the weights of both versions in open_clip's names."""
    folder = make_clip_folder(tmp_path_factory.mktemp("hpsv2"), end_last=True)
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    size = {"num_hidden_layers": 3, "hidden_size": 24, "intermediate_size": 96, "num_attention_heads": 2}
    config["text_config"] |= {**size, "hidden_act": "gelu"}
    config["vision_config"] |= {"intermediate_size": 128, "hidden_act": "gelu"}
    (folder / "config.json").write_text(json.dumps(config))
    for file in FILES.values():
        model = open_clip(folder)
        if file == FILES["v2.0"]:
            model.visual.proj.data.mul_(torch.linspace(-1, 1, 16))
        torch.save({"epoch": 1, "state_dict": model.half().state_dict()}, folder / file)
    return folder


def open_clip(folder: Path) -> OpenClip:
    return OpenClip(vocabulary=json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"])


def hpsv2(folder: Path, **options: Any) -> Any:
    return build_reward(make_pool("hpsv2", {"path": folder, **options}))


def requests() -> list[RewardRequest]:
    generator = np.random.default_rng(0)
    texts = ["a red apple", "cat", "a red apple", "the green sign " * 9]
    shapes = [(32, 32), (40, 64), (91, 50), (32, 33)]
    images = [generator.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    return [RewardRequest(text, "", "t2i", image) for text, image in zip(texts, images, strict=True)]


@pytest.mark.parametrize("version", FILES)
def test_scores_are_those_of_open_clip(folder: Path, version: str) -> None:
    model = open_clip(folder)
    model.load_state_dict(torch.load(folder / FILES[version], weights_only=True)["state_dict"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    wanted = []
    for request in requests():
        ids = tokenizer([request.prompt], truncation=True, max_length=12, padding="max_length", return_tensors="pt")
        wanted += model.cosine(preprocess_whole(request.image, 32)[None], ids.input_ids).tolist()
    scores = hpsv2(folder, version=version, batch_size=3).score(requests())
    assert scores == pytest.approx(wanted, abs=1e-5)
    assert len({round(score, 3) for score in scores}) == 4


def test_nothing_of_a_picture_is_cropped_and_black_fills_the_square() -> None:
    """The project resizes floats, so unlike Pillow it does not cut what bicubic shoots beyond black and white."""
    noise = np.random.default_rng(0).integers(60, 200, (5, 6, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(noise).resize((97, 60), Image.Resampling.BICUBIC))
    shown = preprocess_whole(smooth, 32).permute(1, 2, 0) * torch.tensor(CLIP_STD) + torch.tensor(CLIP_MEAN)
    wanted = np.zeros((32, 32, 3), np.float32)
    wanted[6:26] = np.asarray(Image.fromarray(smooth).resize((32, 20), Image.Resampling.BICUBIC))
    assert np.abs(shown.numpy() * 255 - wanted).max() < 2.0
    assert preprocess_whole(smooth[:32, :7], 32).shape == (3, 32, 32)
    assert preprocess_whole(smooth[:1], 32).shape == (3, 32, 32)


def test_the_limit_of_texts_is_that_of_the_clip(folder: Path) -> None:
    limit = text_limit(make_pool("hpsv2", {"path": folder}))
    assert limit is not None and (limit.folder, limit.tokens) == (folder, 12)


def test_files_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    weights = torch.load(folder / FILES["v2.1"], weights_only=True)["state_dict"]

    def refusal(content: object) -> str:
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        (copy / FILES["v2.1"]).unlink()
        if isinstance(content, bytes):
            (copy / FILES["v2.1"]).write_bytes(content)
        elif content is not None:
            torch.save(content, copy / FILES["v2.1"])
        with pytest.raises(UserError, match=r"^rewards\.hpsv2\.path: ") as caught:
            hpsv2(copy)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def changed(name: str, value: object) -> dict[str, object]:
        return {"state_dict": {**weights, name: value}}

    assert "holds no HPS_v2.1_compressed.pt" in refusal(None)
    assert "is no file of weights" in refusal(b"version https://git-lfs.github.com/spec/v1")
    assert "is no file of weights" in refusal({"state_dict": weights, "args": re.compile("a")})  # code could hide there
    assert "holds a list" in refusal([weights])
    assert "holds no weights by name" in refusal(weights)
    assert "'logit_scale' is no tensor" in refusal(changed("logit_scale", 4.6))
    assert "it has visual.attnpool.c_proj" in refusal(changed("visual.attnpool.c_proj", torch.zeros(1)))
    assert "ln_3" in refusal(changed("transformer.resblocks.0.ln_3.weight", torch.zeros(24)))
    assert "text_projection.weight has another shape" in refusal(changed("text_projection", torch.zeros(24, 8)))
    surplus = {name.replace("blocks.2.", "blocks.3."): value for name, value in weights.items() if "blocks.2." in name}
    assert "for which its model has no place" in refusal({"state_dict": weights | surplus})
    without = {name: value for name, value in weights.items() if name != "ln_final.bias"}
    assert "has no text_model.final_layer_norm.bias" in refusal({"state_dict": without})
