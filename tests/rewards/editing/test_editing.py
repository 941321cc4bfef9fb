"""Rewards that compare the result of an edit with its source, on tiny random encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from deepgen.config.schema.pools import make_pool
from deepgen.errors import UserError
from rewards import RewardRequest, applies, build_reward, text_limit
from rewards.clip_encoder import ClipEncoder
from rewards.editing.dino_encoder import DinoEncoder, squeeze
from rewards.editing.sources import distinct_sources
from tests.helpers.reward_models import make_clip_folder

SIDE = 64  # 16 patches of 4


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Positions of a grid of 20 x 20, so that they are fitted to ours of 16 x 16 as in the published model."""
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = Dinov2Model(Dinov2Config(**sizes, image_size=80, patch_size=4, initializer_range=0.2))
    model.save_pretrained(folder)
    return folder


def pictures(count: int, height: int = SIDE, width: int = SIDE) -> list[np.ndarray]:
    generator = np.random.default_rng(height)
    return [generator.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(count)]


def edit(image: np.ndarray, source: np.ndarray, prompt: str = "make it blue", answer: str = "") -> RewardRequest:
    return RewardRequest(prompt, answer, "edit", image, (source,))


def reward(name: str, folder: Path, **options: Any) -> Any:
    return build_reward(make_pool(name, {"path": folder, "batch_size": 3, **options}))


def test_direction_is_the_cosine_of_two_changes(clip: Path) -> None:
    encoder = ClipEncoder(clip)
    a, b, c, d = pictures(4)
    asked = [edit(a, d, answer="a red apple"), edit(b, d, "a blue car"), edit(c, a, answer="a red apple")]
    scores = reward("clip_direction", clip, source_text="cat").score(asked)
    moved = encoder.embed_images([a, b, c]) - encoder.embed_images([d, d, a])
    wanted = encoder.embed_texts(["a red apple", "a blue car", "a red apple"]) - encoder.embed_texts(["cat"])
    cosines = (moved * wanted).sum(-1) / moved.norm(dim=-1) / wanted.norm(dim=-1)
    assert scores == pytest.approx(cosines.tolist(), abs=1e-5)
    assert len(set(scores)) == 3


def test_a_result_that_is_the_source_has_no_direction(clip: Path) -> None:
    """Not even that of rounding: features of one picture differ by 1e-7 between batches."""
    a, b = pictures(2)
    scores = reward("clip_direction", clip, batch_size=1).score([edit(a, a), edit(b, a)])
    assert abs(scores[0]) < 1e-3 < abs(scores[1])


def test_likeness_to_the_source(clip: Path) -> None:
    encoder = ClipEncoder(clip)
    a, b = pictures(2)
    scores = reward("clip_source", clip).score([edit(a, a), edit(b, a)])
    features = encoder.embed_images([a, b])
    assert scores == pytest.approx([1.0, float((features[0] * features[1]).sum())], abs=1e-5)
    assert scores[1] < 0.999


def test_kept_is_the_mean_over_the_patches_that_changed_least(dino: Path) -> None:
    encoder = DinoEncoder(dino, key="k")
    a, b = pictures(2)
    cosines = (encoder.embed_patches([a])[0] * encoder.embed_patches([b])[0]).sum(-1).sort().values
    assert len(cosines) == 256
    for share, left_out in ((0.0, 0), (0.25, 64), (0.999, 255)):
        (score,) = reward("kept", dino, may_change=share).score([edit(b, a)])
        assert score == pytest.approx(float(cosines[left_out:].mean()), abs=1e-5)


def test_kept_falls_with_what_an_edit_changes_beyond_its_share(dino: Path) -> None:
    (source,) = pictures(1)
    changed = []
    for rows in (0, 8, 32, 64):
        result = source.copy()
        result[:rows] = 255 - result[:rows]
        changed.append(edit(result, source))
    scores = reward("kept", dino).score(changed)
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == pytest.approx(1.0, abs=1e-5)
    assert scores[2] < scores[1] - 0.01


def test_pictures_of_any_shape_are_compared_at_the_same_places() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    smooth = np.array(Image.fromarray(noise).resize((90, 70), Image.Resampling.BICUBIC))
    processor = BitImageProcessor(
        size={"height": SIDE, "width": SIDE}, do_center_crop=False,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    wanted = processor(smooth, return_tensors="pt").pixel_values[0]
    assert float((squeeze(smooth, SIDE) - wanted).abs().max()) < 2.5 / 255 / 0.22


def test_each_source_is_encoded_once() -> None:
    a, b, wide = *pictures(2), pictures(1, 32, 128)[0]
    same_bytes = wide.reshape(SIDE, SIDE, 3)
    asked = [edit(a, a), edit(b, a.copy()), edit(a, b), edit(a, wide), edit(a, same_bytes)]
    sources, rows = distinct_sources(asked)
    assert rows == [0, 0, 1, 2, 3]
    assert [source.shape for source in sources] == [a.shape, b.shape, wide.shape, same_bytes.shape]


@pytest.mark.parametrize("name", ["clip_direction", "clip_source", "kept"])
def test_only_edits_are_scored(name: str, clip: Path, dino: Path) -> None:
    folder = dino if name == "kept" else clip
    pool = make_pool(name, {"path": folder})
    (image,) = pictures(1)
    assert applies(pool, edit(image, image))
    assert not applies(pool, RewardRequest("a cat", "", "t2i", image))
    assert applies(pool, edit(image, image, " ")) == (name != "clip_direction")
    assert reward(name, folder).score([]) == []
    limit = text_limit(pool)
    assert (limit.tokens if limit else 0) == (12 if name == "clip_direction" else 0)


@pytest.mark.parametrize("name", ["clip_direction", "clip_source", "kept"])
def test_folders_of_other_models_are_refused(name: str, clip: Path, dino: Path, tmp_path: Path) -> None:
    wrong, kind = (clip, "clip") if name == "kept" else (dino, "dinov2")
    (tmp_path / "tokenizer.json").touch()
    (tmp_path / "config.json").write_bytes((wrong / "config.json").read_bytes())
    with pytest.raises(UserError, match=rf"^rewards\.{name}\.path: .* holds a '{kind}' model; wanted a "):
        reward(name, tmp_path)
    with pytest.raises(UserError, match=rf"^rewards\.{name}\.path: no such folder"):
        reward(name, tmp_path / "nowhere")
