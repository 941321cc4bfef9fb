"""ImageReward's model: BLIP with a linear stack on top.

The text encoder, a BERT whose layers also look at the patches of the picture (a ViT at 224 pixels), reads the prompt.
The stack turns the features of its first token into the raw score. The folder has the two files of THUDM/ImageReward,
ImageReward.pt and med_config.json, and tokenizer.json of bert-base-uncased.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from deepgen.errors import UserError
from rewards.base import existing_folder
from rewards.clip_encoder import preprocess
from rewards.published_weights import load_linear, load_model, read_checkpoint, tensors_in

FILE, CONFIG, TOKENIZER = "ImageReward.pt", "med_config.json", "tokenizer.json"
HEAD_WIDTH = 64  # of one attention head in each of BLIP's vision towers
STACK = (1024, 128, 64, 16, 1)  # widths after each linear layer; there are no activations between them
STACK_PLACES = (0, 2, 4, 6, 7)  # of these layers in the project's Sequential, which has dropouts as well

# Names in BLIP's vision tower, and in transformers. The text encoder has the same in both.
_VISION = (
    (r"cls_token$", "embeddings.class_embedding"),
    (r"pos_embed$", "embeddings.position_embedding"),
    (r"patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"blocks\.(\d+)\.norm(1|2)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
    (r"norm\.", "post_layernorm."),
)
_CONFIG = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "pad_token_id",
)


class BlipScorer:
    """Pictures and texts to raw scores.

    Args:
        path: the folder.
        tokens: a longer text is cut to this many, its end token included.
        batch_size: pictures per forward pass.
        key: setting that error messages name, such as rewards.image_reward.path.

    Raises:
        UserError: a file is missing, or the weights are not those of an ImageReward.
    """

    def __init__(self, path: str | Path, tokens: int, batch_size: int = 64, *, key: str) -> None:
        folder = existing_folder(key, path, FILE, CONFIG, TOKENIZER)
        file = folder / FILE
        parts = _parts(tensors_in(read_checkpoint(file, key=key), file, key=key), file, key)
        self.batch_size = batch_size
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.vision = _vision(parts["blip.visual_encoder."], file, key).to(self.device)
        self.text = _text(parts["blip.text_encoder."], file, self.vision.config.hidden_size, key).to(self.device)
        layers = zip(STACK_PLACES, pairwise((self.text.config.hidden_size, *STACK)), strict=True)
        self.stack = nn.Sequential(
            *(load_linear(parts["mlp."], f"layers.{place}", a, b, file, key=key) for place, (a, b) in layers)
        ).to(self.device)
        self.tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        self.tokenizer.enable_truncation(tokens)
        self.tokenizer.enable_padding(length=tokens, pad_id=self.text.config.pad_token_id)
        known, size = self.text.config.vocab_size, self.tokenizer.get_vocab_size()
        if size > known:
            raise UserError(f"{key}: the tokenizer in {str(folder)!r} has {size:,} tokens, the model {known:,}")

    @torch.inference_mode()
    def raw_scores(self, images: Sequence[np.ndarray], texts: Sequence[str]) -> list[float]:
        """The score of each uint8 [H, W, 3] image with the text at the same place, before it is normalised."""
        scores: list[float] = []
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            pixels = [preprocess(image, self.vision.config.image_size) for image in images[part]]
            patches = self.vision(pixel_values=torch.stack(pixels).to(self.device)).last_hidden_state  # [b, 1 + P, D]
            encoded = self.tokenizer.encode_batch(list(texts[part]))
            read = self.text(
                input_ids=torch.tensor([one.ids for one in encoded], device=self.device),  # [b, tokens]
                attention_mask=torch.tensor([one.attention_mask for one in encoded], device=self.device),
                encoder_hidden_states=patches,
            ).last_hidden_state
            scores += self.stack(read[:, 0]).squeeze(-1).tolist()
        return scores


def _parts(weights: Mapping[str, Tensor], file: Path, key: str) -> dict[str, dict[str, Tensor]]:
    """The weights by the prefix of their names, without it. BLIP's two projections play no part in the score."""
    prefixes = ("blip.visual_encoder.", "blip.text_encoder.", "mlp.")
    parts = {
        prefix: {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        for prefix in prefixes
    }
    if empty := [prefix for prefix, part in parts.items() if not part]:
        raise UserError(f"{key}: {str(file)!r} is no ImageReward: it has no weights {empty[0]}*")
    return parts


def _vision(weights: Mapping[str, Tensor], file: Path, key: str) -> Any:
    """BLIP's vision tower, of the size that its weights have."""
    from transformers import BlipVisionConfig, BlipVisionModel

    renamed = {}
    for name, value in weights.items():
        fits = [re.sub(old, new, name, count=1) for old, new in _VISION if re.match(old, name)]
        if not fits:
            raise UserError(f"{key}: {str(file)!r} is no ImageReward: it has blip.visual_encoder.{name}")
        renamed[fits[0]] = value
    patches, positions = weights.get("patch_embed.proj.weight"), weights.get("pos_embed")
    widened = weights.get("blocks.0.mlp.fc1.weight")
    if patches is None or positions is None or widened is None or (patches.dim(), positions.dim()) != (4, 3):
        raise UserError(f"{key}: {str(file)!r} is no ImageReward: its vision tower has no patches, positions or blocks")
    config = BlipVisionConfig(
        hidden_size=patches.shape[0],
        intermediate_size=widened.shape[0],
        num_hidden_layers=len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
        num_attention_heads=max(1, patches.shape[0] // HEAD_WIDTH),
        image_size=round((positions.shape[1] - 1) ** 0.5) * patches.shape[-1],
        patch_size=patches.shape[-1],
        layer_norm_eps=1e-6,  # BLIP's; transformers' default is 1e-5
    )
    return load_model(BlipVisionModel, config, file, key=key, state=renamed)


def _text(weights: dict[str, Tensor], file: Path, vision_width: int, key: str) -> Any:
    """BLIP's text encoder, as med_config.json describes it."""
    from transformers import BlipTextConfig, BlipTextModel

    given = json.loads((file.parent / CONFIG).read_text(encoding="utf-8"))
    if missing := [name for name in _CONFIG if name not in given]:
        raise UserError(f"{key}: {str(file.parent / CONFIG)!r} has no {missing[0]}")
    config = BlipTextConfig(
        **{name: given[name] for name in _CONFIG},
        encoder_hidden_size=vision_width,  # the project, too, takes it from the tower and not from the file
        is_decoder=True,  # transformers' name for layers that look at the picture
    )
    weights.pop("embeddings.position_ids", None)  # 0, 1, 2, …
    return load_model(BlipTextModel, config, file, key=key, state=weights, add_pooling_layer=False)
