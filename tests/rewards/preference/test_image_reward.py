"""ImageReward from files of the published layout, against the project's formula, at a small width."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from deepgen.config.schema.pools import make_pool
from deepgen.errors import UserError
from rewards import RewardRequest, applies, build_reward, text_limit
from rewards.clip_encoder import preprocess
from tests.helpers.blip_names import Blip

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "apple", "cat", "the", "green", "sign")
CONFIG = {
    "hidden_act": "gelu",
    "hidden_size": 48,
    "intermediate_size": 192,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 64,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "vocab_size": len(WORDS) + 2,  # the project adds two tokens, which the score does not use
    "encoder_width": 768,
    "add_cross_attention": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("image_reward")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "med_config.json").write_text(json.dumps(CONFIG))
    torch.save(Blip(len(WORDS) + 2).state_dict(), folder / "ImageReward.pt")
    return folder


def image_reward(folder: Path, **options: Any) -> Any:
    return build_reward(make_pool("image_reward", {"path": folder, **options}))


def requests() -> list[RewardRequest]:
    generator = np.random.default_rng(0)
    texts = ["a red apple", "cat", "", "the green sign " * 20]
    shapes = [(48, 48), (60, 96), (91, 50), (48, 49)]
    images = [generator.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    answers = ["", "", "a green cat", ""]
    asked = zip(texts, answers, images, strict=True)
    return [RewardRequest(text, answer, "t2i", image) for text, answer, image in asked]


def test_scores_are_the_published_ones(folder: Path) -> None:
    model, tokenizer = Blip(len(WORDS) + 2), Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(35)
    wanted = []
    for request in requests():
        encoded = tokenizer.encode(request.target)  # without padding: what is masked does not count
        ids, mask = torch.tensor([encoded.ids]), torch.tensor([encoded.attention_mask])
        wanted += model.score(preprocess(request.image, 48)[None], ids, mask).tolist()
    scores = image_reward(folder, batch_size=3).score(requests())
    assert scores == pytest.approx(wanted, abs=1e-4)
    assert len({round(score, 3) for score in scores}) == 4
    assert image_reward(folder).score([]) == []


def test_35_tokens_are_read(folder: Path) -> None:
    limit = text_limit(make_pool("image_reward", {"path": folder}))
    assert limit is not None and (limit.folder, limit.tokens) == (folder, 35)
    image = requests()[0].image

    def score(words: int, last: str) -> float:
        request = RewardRequest(f"{'cat ' * (words - 1)}{last}", "", "t2i", image)
        return float(image_reward(folder).score([request])[0])

    assert score(33, "apple") != score(33, "sign")
    assert score(34, "apple") == score(34, "sign")
    assert not applies(make_pool("image_reward", {"path": folder}), RewardRequest(" ", "", "t2i", image))


def test_files_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    weights = torch.load(folder / "ImageReward.pt", weights_only=True)

    def refusal(change: dict[str, Any], left_out: str = "", **config: Any) -> str:
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        kept = {name: value for name, value in weights.items() if not (left_out and name.startswith(left_out))}
        torch.save({**kept, **change}, copy / "ImageReward.pt")
        given = {name: value for name, value in {**CONFIG, **config}.items() if value is not None}
        (copy / "med_config.json").write_text(json.dumps(given))
        with pytest.raises(UserError, match=r"^rewards\.image_reward\.path: ") as caught:
            image_reward(copy)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "it has no weights mlp.*" in refusal({}, "mlp.")
    assert "layers.7.bias must be [1], is none" in refusal({}, "mlp.layers.7.bias")
    assert "layers.0.weight must be [1024, 48], is [8, 48]" in refusal({"mlp.layers.0.weight": torch.zeros(8, 48)})
    assert "no patches, positions or blocks" in refusal({}, "blip.visual_encoder.pos_embed")
    assert "has no post_layernorm.bias" in refusal({}, "blip.visual_encoder.norm.bias")
    assert "it has blip.visual_encoder.head.weight" in refusal({"blip.visual_encoder.head.weight": torch.zeros(1)})
    assert "word_embeddings.weight has another shape" in refusal({}, vocab_size=11)
    assert "has no vocab_size" in refusal({}, vocab_size=None)
    assert "for which its model has no place" in refusal({}, num_hidden_layers=1)
    small = {"blip.text_encoder.embeddings.word_embeddings.weight": torch.zeros(9, 48)}
    assert "has 11 tokens, the model 9" in refusal(small, vocab_size=9)
    with pytest.raises(UserError, match=r"holds no ImageReward\.pt"):
        image_reward(tmp_path)
