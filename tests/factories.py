"""Small random models for tests: the shipped classes at the narrowest widths that still work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deepgen.models.presets import TINY, Architecture
from deepgen.models.prompts import SPECIAL_TOKENS, TEXT_END, TURN_END
from deepgen.models.unified import UnifiedModel


def make_tokenizer() -> Any:
    """A byte-level tokenizer: any text, one token a byte, plus Qwen's special tokens (ids 0-6)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(SPECIAL_TOKENS) + 256,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=TEXT_END,
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        padding_side="left",
    )


def narrow_architecture() -> Architecture:
    """64 px images, latents [8, 16, 16] like `tiny`, everything else as small as it goes."""
    text = dict(TINY.vlm["text_config"])
    text |= {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    vision = dict(TINY.vlm["vision_config"])
    vision |= {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    vision["fullatt_block_indexes"] = [1]
    transformer = dict(TINY.transformer) | {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
    transformer |= {"joint_attention_dim": 48, "caption_projection_dim": 32, "pooled_projection_dim": 40}
    vae = dict(TINY.vae) | {"block_out_channels": (8, 8, 8), "norm_num_groups": 4}
    return replace(
        TINY,
        vlm={**TINY.vlm, "text_config": text, "vision_config": vision},
        transformer=transformer,
        vae=vae,
        num_queries=4,
        connector_hidden=32,
        connector_mlp=48,
        connector_layers=1,
        connector_heads=2,
    )


def make_tiny_model(seed: int = 0, architecture: Architecture | None = None) -> UnifiedModel:
    """A random model whose velocity depends on its prompt (fresh bridges have zero projectors)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = UnifiedModel.from_architecture(architecture or narrow_architecture(), tokenizer=make_tokenizer())
        for projector in (model.projector_2, model.projector_3):
            torch.nn.init.normal_(projector.weight, std=0.1)
    return model


def make_tiny_folder(path: Path, seed: int = 0) -> Path:
    """Write `make_tiny_model(seed)` as a component folder and return its path."""
    make_tiny_model(seed).save_folder(path)
    return path
