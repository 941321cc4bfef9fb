"""Tiny CLIP and Qwen2.5-VL folders with random weights, for tests of the rewards that load them."""

from __future__ import annotations

from pathlib import Path

import torch

VISION_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
SENTENCES = "Yes No Does this image show Answer or a an the red green blue apple cat sign car user"
WORDS = tuple(SENTENCES.split())


def make_clip_folder(
    folder: Path, *, image_size: int = 32, projection: int = 16, end_token: bool = True, end_last: bool = False
) -> Path:
    """A CLIP of two layers with a word tokenizer; `end_token=False` makes one that does not fit the model.

    end_last: the end token has the highest id and the config calls it 2, as in the folders of OpenAI and LAION.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    words = [word.lower() for word in WORDS]
    words = [*words, "<eot>"] if end_last else ["<eot>", *words]
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "<sot>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if end_token:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<sot> $A <eot>", special_tokens=[("<sot>", 2), ("<eot>", vocabulary["<eot>"])]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<eot>", model_max_length=12
    ).save_pretrained(folder)
    widths = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={
            **widths, "vocab_size": len(vocabulary), "max_position_embeddings": 12,
            "eos_token_id": 2 if end_last else vocabulary["<eot>"], "bos_token_id": 2, "pad_token_id": 0,
        },
        vision_config={**widths, "image_size": image_size, "patch_size": 8},
        projection_dim=projection,
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    return folder


def make_judge_folder(folder: Path, *, words: tuple[str, ...] = WORDS, pixels: int = 112 * 112) -> Path:
    """A Qwen2.5-VL of two layers with a word tokenizer and the image processor; squares become 112 px."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", *VISION_TOKENS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<|im_end|>",
        additional_special_tokens=list(VISION_TOKENS),
    )  # fmt: skip
    fast.save_pretrained(folder)
    size = {"shortest_edge": pixels, "longest_edge": pixels}
    Qwen2VLImageProcessor(size=size).save_pretrained(folder)
    Qwen2VLVideoProcessor(size=size).save_pretrained(folder)
    token = vocabulary.__getitem__
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(vocabulary), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
            "bos_token_id": None, "eos_token_id": token("<|im_end|>"), "pad_token_id": 0,
            "initializer_range": 0.2,  # far from 0, so that Yes and No differ and depend on the picture
        },
        vision_config={
            "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 64,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 56,
            "fullatt_block_indexes": [1], "initializer_range": 0.2,
        },
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    return folder
