"""CLIP reward and its encoder, on a tiny random CLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deepgen.config.schema.pools import make_pool, reward_class
from deepgen.errors import UserError
from deepgen.registry import REWARDS
from rewards import RewardRequest, build_reward, text_limit
from rewards.clip import ClipReward, clip_text_limit
from rewards.clip_encoder import CLIP_MEAN, CLIP_STD, ClipEncoder, preprocess
from tests.helpers.reward_models import make_clip_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def encoder(folder: Path) -> ClipEncoder:
    return ClipEncoder(folder, batch_size=4)


def pictures(count: int, height: int = 32, width: int = 32) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(count)]


def request(image: np.ndarray, prompt: str = "a red apple", answer: str = "") -> RewardRequest:
    return RewardRequest(prompt=prompt, answer=answer, task="t2i", image=image)


def clip_reward(folder: Path, **options: Any) -> ClipReward:
    return ClipReward(make_pool("clip", {"path": folder, **options}))  # type: ignore[arg-type]


def test_registry_names_import_and_unknown_name_is_refused(folder: Path) -> None:
    kinds = [reward_class(name, "k") for name in REWARDS]
    assert all(callable(getattr(kind, "score", None) or getattr(kind, "score_groups", None)) for kind in kinds)
    assert isinstance(build_reward(make_pool("clip", {"path": folder, "batch_size": 4, "replicas": 2})), ClipReward)
    with pytest.raises(UserError, match=r"^k: got 'clipp'.*'clip'.*allowed: judge, ocr, clip, aesthetic"):
        reward_class("clipp", "k")


def test_preprocess_resizes_crops_and_normalises() -> None:
    smooth = np.asarray(Image.fromarray(pictures(1, 12, 20)[0]).resize((100, 60), Image.Resampling.BICUBIC))
    wanted = Image.fromarray(smooth).resize((53, 32), Image.Resampling.BICUBIC).crop((10, 0, 42, 32))
    pixels = preprocess(smooth, 32)  # [3, 32, 32]
    shown = (pixels.permute(1, 2, 0) * torch.tensor(CLIP_STD) + torch.tensor(CLIP_MEAN)) * 255
    assert pixels.shape == (3, 32, 32)
    # Pillow rounds to whole levels after each of its two passes.
    assert np.abs(shown.numpy() - np.asarray(wanted, dtype=np.float32)).max() < 2.0


def test_preprocess_does_not_touch_a_read_only_image_of_the_right_size() -> None:
    image = pictures(1)[0]
    image.setflags(write=False)
    shown = (preprocess(image, 32).permute(1, 2, 0) * torch.tensor(CLIP_STD) + torch.tensor(CLIP_MEAN)) * 255
    np.testing.assert_allclose(shown.numpy(), image, atol=1e-3)


def test_a_line_of_pixels_takes_no_gigabytes() -> None:
    """Resized to the model's height it would be 32 million pixels long, of which the middle 32 are read."""
    line = np.arange(1_000_001, dtype=np.uint32).astype(np.uint8)[None, :, None].repeat(3, axis=2)
    middle = line[:, 499_992:500_008]
    torch.testing.assert_close(preprocess(line, 32), preprocess(middle, 32))
    assert preprocess(line.transpose(1, 0, 2), 32).shape == (3, 32, 32)


@pytest.mark.parametrize("content", ["{", "[]", '{"text_config": {"max_position_embeddings": null}}'])
def test_a_damaged_config_is_left_to_the_loading_of_the_model(tmp_path: Path, content: str) -> None:
    """Every run asks for the limit before it starts anything."""
    (tmp_path / "config.json").write_text(content)
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 77}')
    assert clip_text_limit(tmp_path) is None


def test_features_are_of_unit_length_and_do_not_depend_on_the_batch(encoder: ClipEncoder) -> None:
    images = [*pictures(5), *pictures(1, 40, 64)]
    together = encoder.embed_images(images)
    alone = torch.cat([encoder.embed_images([image]) for image in images])
    assert together.shape == (6, 16)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(6))
    texts = ["a red apple", "cat", "the green sign image show", "car", "a blue car"]
    torch.testing.assert_close(
        encoder.embed_texts(texts), torch.cat([encoder.embed_texts([text]) for text in texts]), atol=1e-5, rtol=1e-5
    )


def test_scores_are_cosines_with_answer_or_prompt(folder: Path, encoder: ClipEncoder) -> None:
    reward = clip_reward(folder, batch_size=4)
    images = pictures(3)
    scores = reward.score(
        [
            request(images[0]),
            request(images[1], answer="blue car"),
            request(images[2], prompt="make it blue", answer="cat"),
        ]
    )
    words = encoder.embed_texts(["a red apple", "blue car", "cat"])
    assert scores == pytest.approx((encoder.embed_images(images) * words).sum(-1).tolist(), abs=1e-5)
    assert reward.score([]) == []
    assert len(set(scores)) == 3


def test_long_texts_are_cut_and_keep_their_end_token(encoder: ClipEncoder) -> None:
    ids = encoder.tokenizer("red " * 50, truncation=True, max_length=encoder.max_length).input_ids
    assert len(ids) == encoder.max_length == 12
    assert ids[-1] == encoder.tokenizer.eos_token_id
    torch.testing.assert_close(encoder.embed_texts(["red " * 50]), encoder.embed_texts(["red " * 90]))


def test_unusable_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rewards\.clip\.path: no such folder"):
        clip_reward(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no config\.json"):
        clip_reward(tmp_path)
    with pytest.raises(UserError, match="does not end texts with an end token"):
        clip_reward(make_clip_folder(tmp_path / "endless", end_token=False))


def test_with_a_batch_size_of_1_scores_do_not_depend_on_others(folder: Path) -> None:
    reward = clip_reward(folder, batch_size=1)
    asked = [request(image, f"a red apple number {n % 3}") for n, image in enumerate(pictures(7))]
    alone = [reward.score([one])[0] for one in asked]
    assert reward.score(asked) == reward.score(asked[::-1])[::-1] == alone  # to the bit


def test_the_limit_of_texts_is_that_of_the_encoder(tmp_path: Path, folder: Path, encoder: ClipEncoder) -> None:
    limit = text_limit(make_pool("clip", {"path": str(folder)}))
    assert limit is not None and (limit.folder, limit.tokens) == (folder, encoder.max_length) == (folder, 12)
    assert text_limit(make_pool("clip", {"path": str(tmp_path)})) is None
    assert text_limit(make_pool("ocr", {})) is None
