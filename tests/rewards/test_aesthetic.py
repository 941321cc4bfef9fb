"""The aesthetic head and reward, on a tiny random CLIP."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPModel

from deepgen.config.schema.pools import make_pool
from deepgen.errors import UserError
from rewards import RewardRequest
from rewards.aesthetic import AestheticReward
from rewards.aesthetic_head import AestheticHead, load_head
from tests.helpers.reward_models import make_clip_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of assets/tiny/rewards: clip/ and aesthetic/ side by side."""
    root = tmp_path_factory.mktemp("rewards")
    make_clip_folder(root / "clip")
    head = AestheticHead(16, hidden=[8], activation="gelu")
    with torch.no_grad():
        dict(head.named_parameters())["layers.1.bias"].fill_(5.0)
    head.save(root / "aesthetic", clip="../clip")
    return root / "aesthetic"


def aesthetic(folder: Path, **options: Any) -> AestheticReward:
    return AestheticReward(make_pool("aesthetic", {"path": folder, **options}))  # type: ignore[arg-type]


def requests(count: int) -> list[RewardRequest]:
    generator = np.random.default_rng(1)
    images = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return [RewardRequest(prompt="", answer="", task="t2i", image=image) for image in images]


def test_linear_head_is_laions() -> None:
    head = AestheticHead()
    assert {key: tuple(value.shape) for key, value in head.state_dict().items()} == {
        "layers.0.weight": (1, 768),
        "layers.0.bias": (1,),
    }
    assert head(torch.zeros(3, 768)).shape == (3,)


def test_saved_head_is_loaded_with_its_clip(folder: Path) -> None:
    head, clip = load_head(folder)
    assert head.config == {"in_features": 16, "hidden": [8], "activation": "gelu"}
    assert clip == folder.parent / "clip"


def test_scores_are_the_heads_and_stay_on_the_scale(folder: Path) -> None:
    reward = aesthetic(folder, batch_size=4)
    batch = requests(6)
    features = reward.predictor.encoder.embed_images([request.image for request in batch])
    scores = reward.score(batch)
    raw = reward.predictor.head(features).clamp(1, 10)
    assert scores == pytest.approx(((raw - 1) / 9).tolist(), abs=1e-5)
    assert len(set(scores)) == 6
    assert reward.score([]) == []
    with torch.no_grad():
        dict(reward.predictor.head.named_parameters())["layers.1.bias"].fill_(50.0)
    assert reward.score(batch) == [1.0] * 6


def test_unusable_heads_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no head\.safetensors"):
        load_head(folder.parent / "clip")
    broken = tmp_path / "broken"
    AestheticHead(16).save(broken, clip=str(folder.parent / "clip"))
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "hidden": [4]}))
    with pytest.raises(UserError, match="does not fit its config"):
        load_head(broken)
    AestheticHead(8).save(broken, clip=str(folder.parent / "clip"))
    with pytest.raises(UserError, match=r"width 8, the CLIP .* gives 16"):
        aesthetic(broken)


def test_a_clip_saved_in_bf16_serves_a_head_in_fp32(folder: Path, tmp_path: Path) -> None:
    """The shipped CLIP is in bf16. Features are always float32."""
    half = tmp_path / "clip"
    shutil.copytree(folder.parent / "clip", half)
    CLIPModel.from_pretrained(half).to(torch.bfloat16).save_pretrained(half)
    load_head(folder)[0].save(tmp_path / "aesthetic", clip="../clip")
    reward = aesthetic(tmp_path / "aesthetic")
    assert reward.predictor.encoder.embed_images([requests(1)[0].image]).dtype == torch.float32
    scores, wanted = (np.array(r.score(requests(3)), dtype=float) for r in (reward, aesthetic(folder)))
    np.testing.assert_allclose(scores, wanted, atol=0.01)


def test_with_a_batch_size_of_1_scores_do_not_depend_on_others(folder: Path) -> None:
    reward, asked = aesthetic(folder, batch_size=1), requests(7)
    alone = [reward.score([one])[0] for one in asked]
    assert reward.score(asked) == reward.score(asked[::-1])[::-1] == alone  # to the bit
