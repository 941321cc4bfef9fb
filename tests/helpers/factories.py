"""Small random models for tests: the shipped classes at the narrowest widths that still work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deepgen.models.chat_template import SPECIAL_TOKENS, TEXT_END, TURN_END
from deepgen.models.presets import TINY, Architecture
from deepgen.models.unified import UnifiedModel


def make_tokenizer() -> Any:
    """A byte-level tokenizer: one token per byte, plus Qwen's special tokens (ids 0-6)."""
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


def narrow_architecture(
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    transformer: Mapping[str, Any] | None = None,
    **others: Any,
) -> Architecture:
    """An architecture for 64 px images and latents [8, 16, 16] like `tiny`. All sizes not given are minimal."""
    texts = dict(TINY.vlm["text_config"])
    texts |= {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    texts |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    texts["rope_parameters"] = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    visions = dict(TINY.vlm["vision_config"])
    visions |= {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    visions["fullatt_block_indexes"] = [1]
    transformers = dict(TINY.transformer) | {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
    transformers |= {"joint_attention_dim": 48, "caption_projection_dim": 32, "pooled_projection_dim": 40}
    sizes: dict[str, Any] = {
        "vae": dict(TINY.vae) | {"block_out_channels": (8, 8, 8), "norm_num_groups": 4},
        "num_queries": 4,
        "connector_hidden": 32,
        "connector_mlp": 48,
        "connector_layers": 1,
        "connector_heads": 2,
    }
    return replace(
        TINY,
        vlm={**TINY.vlm, "text_config": texts | dict(text or {}), "vision_config": visions | dict(vision or {})},
        transformer=transformers | dict(transformer or {}),
        **(sizes | others),
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
