"""The two sizes of one architecture: `tiny` for one CPU, `deepgen-5b` for the published weights (M1)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepgen.errors import UserError

LARGEST_TINY_WIDTH = 512


@dataclass(frozen=True)
class Architecture:
    """All sizes of a unified model. The component dicts are constructor arguments of their classes.

    vlm: `Qwen2_5_VLConfig`; transformer: `SD3Transformer2DModel`; vae: `AutoencoderKL`. The rest is the bridge (M1.5).
    """

    vlm: Mapping[str, Any]
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    num_queries: int  # think tokens
    connector_hidden: int
    connector_mlp: int
    connector_layers: int
    connector_heads: int
    fusion_stride: int  # decoder layers from one hidden state that the bridge reads to the next
    max_prompt_tokens: int = 1024  # longer text loses its beginning (M1.3)

    @property
    def vlm_hidden(self) -> int:
        return int(self.vlm["text_config"]["hidden_size"])

    @property
    def vlm_layers(self) -> int:
        return int(self.vlm["text_config"]["num_hidden_layers"])

    @property
    def fusion_layers(self) -> tuple[int, ...]:
        """Hidden states stacked by the bridge, deepest first; 0 is the embedding output, i the output of layer i."""
        return tuple(range(self.vlm_layers - 1, -1, -self.fusion_stride))

    @property
    def context_dim(self) -> int:
        return int(self.transformer["joint_attention_dim"])

    @property
    def pooled_dim(self) -> int:
        return int(self.transformer["pooled_projection_dim"])

    @property
    def vae_downsample(self) -> int:
        """Pixels that one latent cell covers along a side."""
        return int(2 ** (len(self.vae["block_out_channels"]) - 1))

    @property
    def max_side(self) -> int:
        """Pixels of the longest side that the transformer has positions for."""
        return int(self.transformer["pos_embed_max_size"] * self.transformer["patch_size"] * self.vae_downsample)

    def bridge_config(self) -> dict[str, int]:
        """The content of bridge/config.json."""
        names = (
            "num_queries",
            "connector_hidden",
            "connector_mlp",
            "connector_layers",
            "connector_heads",
            "fusion_stride",
            "max_prompt_tokens",
        )
        return {name: getattr(self, name) for name in names}

    def connector_config(self) -> dict[str, Any]:
        """The content of connector/config.json: the same, and what else the bridge's tensors have as sizes."""
        names = ("vlm_hidden", "fusion_layers", "context_dim", "pooled_dim")
        return self.bridge_config() | {name: getattr(self, name) for name in names}

    def describe(self) -> str:
        """A short phrase for messages, with the sizes people recognise a model by."""
        dit = self.transformer
        width = dit["num_attention_heads"] * dit["attention_head_dim"]
        return (
            f"VLM {self.vlm_layers} layers x {self.vlm_hidden}, DiT {dit['num_layers']} layers x {width}, "
            f"{dit['in_channels']} latent channels, {self.num_queries} think tokens"
        )


TINY = Architecture(
    vlm={
        "text_config": {
            "vocab_size": 1500,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 10000.0},
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        "vision_config": {
            "depth": 4,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [1, 3],
            "out_hidden_size": 192,
        },
        "vision_start_token_id": 3,
        "vision_end_token_id": 4,
        "image_token_id": 5,
        "video_token_id": 6,
        "tie_word_embeddings": False,
    },
    transformer={
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 8,
        "out_channels": 8,
        "num_layers": 6,
        "attention_head_dim": 48,
        "num_attention_heads": 4,
        "joint_attention_dim": 192,
        "caption_projection_dim": 192,
        "pooled_projection_dim": 192,
        "pos_embed_max_size": 16,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    },
    vae={
        "block_out_channels": (16, 32, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 1,
        "latent_channels": 8,
        "norm_num_groups": 8,
        "sample_size": 64,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
    },
    num_queries=16,
    connector_hidden=192,
    connector_mlp=512,
    connector_layers=2,
    connector_heads=3,
    fusion_stride=2,
)

DEEPGEN_5B = Architecture(
    vlm={  # Qwen2.5-VL-3B-Instruct
        "text_config": {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1000000.0},
            "bos_token_id": 151643,
            "eos_token_id": 151645,
        },
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "out_hidden_size": 2048,
        },
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "tie_word_embeddings": True,
    },
    transformer={  # UniPic2-SD3.5M-Kontext-2B
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    },
    vae={  # SD3
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 16,
        "norm_num_groups": 32,
        "sample_size": 1024,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
    },
    num_queries=128,
    connector_hidden=2048,
    connector_mlp=11946,
    connector_layers=6,
    connector_heads=32,
    fusion_stride=6,
)

PRESETS: dict[str, Architecture] = {"tiny": TINY, "deepgen-5b": DEEPGEN_5B}
PADDINGS = ("masked", "reference")  # prompt padding is masked, or attended to as in the reference code


def check_preset(preset: str, found: Architecture, where: object) -> None:
    """Raise `UserError` if the weights at `where` do not belong to `preset`.

    `deepgen-5b` is one fixed set of sizes. `tiny` covers everything that a CPU can train: narrow weights of any shape.
    """
    if preset not in PRESETS:
        raise UserError(f"model.preset: {preset!r} given; allowed: {', '.join(PRESETS)}")
    fits = found.vlm_hidden <= LARGEST_TINY_WIDTH if preset == "tiny" else found.describe() == DEEPGEN_5B.describe()
    if not fits:
        raise UserError(
            f"model.weights: {where} does not hold a {preset!r} model (found: {found.describe()}; "
            f"{preset!r} is: {PRESETS[preset].describe()})"
        )


def check_width(preset: str, folder: Path) -> None:
    """Check the DiT's width in a component folder against the preset. A quick look; `check_preset` compares everything.

    Raises UserError if transformer/config.json cannot be read or belongs to another preset.
    """
    path = folder / "transformer" / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        width = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"model.weights: {path} is not the configuration of a DiT ({error!r})") from error
    big = DEEPGEN_5B.transformer
    fits = {
        "tiny": width <= LARGEST_TINY_WIDTH,
        "deepgen-5b": width == big["num_attention_heads"] * big["attention_head_dim"],
    }
    if not fits[preset]:
        allowed = " or ".join(name for name, does in fits.items() if does) or "no preset"
        raise UserError(
            f"model.preset: got {preset!r}, but the DiT in {folder} is {width} wide; allowed with it: {allowed}"
        )
