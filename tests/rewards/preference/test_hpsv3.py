"""HPS v3 from files of the published layout, at a small width."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import linear, relu
from transformers import (
    AutoProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
)

from deepgen.config.schema.pools import make_pool
from deepgen.errors import UserError
from rewards import Missing, RewardRequest, build_reward
from rewards.preference import qwen_scorer
from tests.helpers.reward_models import VISION_TOKENS, WORDS

SOURCE = '''
import a_library_that_is_not_here

INSTRUCTION = """Rate the picture.
Words - {text_prompt}

"""
prompt_with_special_token = """
The rating: <|Reward|>

END
"""
raise SystemExit("this file is not run")
'''
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PIXELS = 112 * 112


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hpsv3")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", *VISION_TOKENS, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<|im_end|>",
        additional_special_tokens=list(VISION_TOKENS),
    )  # fmt: skip
    # The files of Qwen's folder; newer versions of transformers would write one processor_config.json.
    fast.save_pretrained(folder)
    Qwen2VLImageProcessor().save_pretrained(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    token = vocabulary.__getitem__
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 152, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
            "bos_token_id": None, "eos_token_id": token("<|im_end|>"), "pad_token_id": 0, "initializer_range": 0.2,
        },
        vision_config={
            "depth": 2, "embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 2, "patch_size": 14,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "initializer_range": 0.2,
        },
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(folder)  # with its own number of tokens, as in Qwen's folder
    model = Qwen2VLForConditionalGeneration(config)
    model.resize_token_embeddings(len(vocabulary) + 1)  # the project's training adds one
    weights = {name.replace("model.language_model.", "model."): value for name, value in model.state_dict().items()}
    weights = {name.replace("model.visual.", "visual."): value.contiguous() for name, value in weights.items()}
    for place, out, inside in ((0, 1024, 64), (3, 16, 1024), (5, 2, 16)):
        weights[f"rm_head.{place}.weight"] = torch.randn(out, inside) / inside**0.5
        weights[f"rm_head.{place}.bias"] = torch.randn(out)
    save_file(weights, folder / qwen_scorer.FILE)
    (folder / qwen_scorer.TEXTS).write_text(SOURCE)
    return folder


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qwen_scorer, "PIXELS", PIXELS)


def hpsv3(folder: Path) -> Any:
    return build_reward(make_pool("hpsv3", {"path": folder}))


def requests() -> list[RewardRequest]:
    generator = np.random.default_rng(0)
    texts = ["a red apple", "cat", "the green sign the red car an apple"]
    shapes = [(112, 112), (60, 150), (300, 200)]
    images = [generator.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    return [RewardRequest(text, "", "t2i", image) for text, image in zip(texts, images, strict=True)]


@torch.inference_mode()
def published(folder: Path, request: RewardRequest) -> float:
    """The last hidden state at the added token, through the head; the first of its two numbers."""
    weights = load_file(folder / qwen_scorer.FILE)
    config = Qwen2VLConfig.from_pretrained(folder)
    model = Qwen2VLForConditionalGeneration(config).eval()
    model.resize_token_embeddings(len(weights["model.embed_tokens.weight"]))
    names = {name: name for name in weights if not name.startswith("rm_head")}
    for name in names:
        new = f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1)
        names[name] = new
    model.load_state_dict({new: weights[name] for name, new in names.items()})
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    text = (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Rate the picture.\nWords - "
        f"{request.prompt}\n\n\nThe rating: <|Reward|>\n\nEND\n<|im_end|>\n<|im_start|>assistant\n"
    )
    size = {"shortest_edge": PIXELS, "longest_edge": PIXELS}
    batch = processor(text=[text], images=[request.image], images_kwargs={"size": size}, return_tensors="pt")
    hidden = model(**batch, output_hidden_states=True).hidden_states[-1][0]
    place = batch["input_ids"][0].tolist().index(len(weights["model.embed_tokens.weight"]) - 1)
    out = hidden[place]
    for number in (0, 3, 5):
        out = linear(out, weights[f"rm_head.{number}.weight"], weights[f"rm_head.{number}.bias"])
        out = out if number == 5 else relu(out)
    return float(out[0])


def test_scores_are_the_published_ones(folder: Path) -> None:
    scores = hpsv3(folder).score(requests())
    assert scores == pytest.approx([published(folder, request) for request in requests()], abs=1e-3)
    assert len({round(score, 2) for score in scores}) == 3
    assert hpsv3(folder).score([]) == []


def test_names_of_newer_transformers_are_read_too(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    renamed = {}
    for name, value in load_file(folder / qwen_scorer.FILE).items():
        new = name.replace("model.", "model.language_model.", 1)
        renamed[f"model.{name}" if name.startswith("visual.") else new] = value
    save_file(renamed, copy / qwen_scorer.FILE)
    assert hpsv3(copy).score(requests()) == hpsv3(folder).score(requests())


@pytest.mark.parametrize("token", ["<|Reward|>", "<|im_end|>"])
def test_a_description_with_a_token_of_the_models_own_is_refused(folder: Path, token: str) -> None:
    first, second, _ = requests()
    bad = RewardRequest(f"a cat {token}", "", "t2i", first.image)
    scores = hpsv3(folder).score([first, bad, second])
    assert scores[1] == Missing("refused", f"a description contains the reserved token {token}")
    assert scores[::2] == pytest.approx(hpsv3(folder).score([first, second]), abs=1e-4)


def test_a_strip_costs_no_other_picture_its_score(folder: Path) -> None:
    first, second, _ = requests()
    strip = RewardRequest("a cat", "", "t2i", np.zeros((1, 201, 3), np.uint8))
    scores = hpsv3(folder).score([first, strip, second])
    assert scores[1] == Missing("refused", "an image of 201 x 1; allowed: sides in a ratio up to 200")
    assert None not in scores


def test_files_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = load_file(folder / qwen_scorer.FILE)

    def refusal() -> str:
        with pytest.raises(UserError, match=r"^rewards\.hpsv3\.path: ") as caught:
            hpsv3(copy)
        return str(caught.value)

    save_file({**weights, "rm_head.3.weight": torch.zeros(4, 4)}, copy / qwen_scorer.FILE)
    assert "rm_head.3.weight must be [16, 1024], is [4, 4]" in refusal()
    save_file({**weights, "model.embed_tokens.weight": torch.zeros(152, 64)}, copy / qwen_scorer.FILE)
    assert "has embeddings of 152 tokens" in refusal()
    (copy / qwen_scorer.FILE).write_text("version https://git-lfs.github.com/spec/v1")
    assert "is no file of weights" in refusal()
    (copy / qwen_scorer.TEXTS).write_text(SOURCE.replace("{text_prompt}", ""))
    assert "has no text INSTRUCTION with {text_prompt}" in refusal()
    (copy / qwen_scorer.TEXTS).write_text("INSTRUCTION = ")
    assert "is no Python source" in refusal()
    (copy / qwen_scorer.TEXTS).unlink()
    assert "holds no data_collator_qwen.py" in refusal()
