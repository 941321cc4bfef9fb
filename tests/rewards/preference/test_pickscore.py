"""PickScore on a tiny random CLIP, against its published formula."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from deepgen.config.schema.pools import make_pool
from deepgen.errors import UserError
from rewards import RewardRequest, applies, build_reward, text_limit
from rewards.clip_encoder import preprocess
from tests.helpers.reward_models import make_clip_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_clip_folder(tmp_path_factory.mktemp("pickscore"))
    model = CLIPModel.from_pretrained(folder)
    with torch.no_grad():
        model.logit_scale.fill_(4.6)
    model.save_pretrained(folder)
    return folder


def requests() -> list[RewardRequest]:
    generator = np.random.default_rng(0)
    texts = ["a red apple", "cat", "a red apple", "the green sign " * 9]
    shapes = [(32, 32), (40, 64), (91, 50), (32, 33)]
    images = [generator.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    return [RewardRequest(text, "", "t2i", image) for text, image in zip(texts, images, strict=True)]


@torch.inference_mode()
def published(folder: Path, request: RewardRequest) -> float:
    """The project's example: unit-length embeddings, their product, times the exponential of the logit scale."""
    model, tokenizer = CLIPModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = tokenizer([request.prompt], padding=True, truncation=True, max_length=12, return_tensors="pt")
    image = preprocess(request.image, 32)[None]
    out = model(pixel_values=image, **text)
    return float(out.logits_per_image[0, 0])


def test_scores_are_the_published_ones(folder: Path) -> None:
    reward = build_reward(make_pool("pickscore", {"path": folder, "batch_size": 3}))
    scores = reward.score(requests())
    assert scores == pytest.approx([published(folder, request) for request in requests()], abs=1e-4)
    assert len({round(float(score), 3) for score in scores}) == 4  # type: ignore[arg-type]
    assert reward.score([]) == []


def test_preprocessing_is_that_of_the_processor() -> None:
    """Smooth pictures: on noise Pillow's rounding after each pass is all there is to see."""
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for height, width in ((64, 64), (100, 60), (61, 97), (47, 32), (20, 33)):
        noise = np.random.default_rng(height).integers(0, 256, (5, 6, 3), dtype=np.uint8)
        smooth = np.array(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))
        wanted = processor(smooth, return_tensors="pt").pixel_values[0]
        assert float((preprocess(smooth, 32) - wanted).abs().max()) < 2.5 / 255 / 0.26


def test_texts_beyond_its_limit_are_told_and_prompts_without_words_are_not_its_business(folder: Path) -> None:
    pool = make_pool("pickscore", {"path": folder})
    limit = text_limit(pool)
    assert limit is not None and (limit.folder, limit.tokens) == (folder, 12)
    assert [applies(pool, RewardRequest(text, "", "t2i", requests()[0].image)) for text in ("cat", " ")] == [
        True,
        False,
    ]


def test_weights_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    def with_weights(name: str, change: dict[str, torch.Tensor], *left_out: str) -> Path:
        copy = shutil.copytree(folder, tmp_path / name)
        weights = {key: value for key, value in load_file(copy / "model.safetensors").items() if key not in left_out}
        save_file({**weights, **change}, copy / "model.safetensors", {"format": "pt"})
        return copy

    def refusal(path: Path) -> str:
        with pytest.raises(UserError, match=r"^rewards\.pickscore\.path: ") as caught:
            build_reward(make_pool("pickscore", {"path": path}))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "has no logit_scale" in refusal(with_weights("scaleless", {}, "logit_scale"))
    name = "visual_projection.weight"
    assert f"{name} has another shape" in refusal(with_weights("wide", {name: torch.zeros(16, 8)}))
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    assert "holds no weights of a CLIPModel" in refusal(bare)
    (bare / "model.safetensors").unlink()
    assert "holds no weights of a CLIPModel" in refusal(bare)
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert "holds a 'bert' model; wanted a 'clip'" in refusal(other)
    (other / "config.json").write_text(json.dumps({"model_type": "no_such_kind"}))
    assert "is no model's config" in refusal(other)
    (bare / "tokenizer.json").unlink()
    assert "holds no tokenizer.json" in refusal(bare)
    assert "no such folder" in refusal(tmp_path / "nowhere")
