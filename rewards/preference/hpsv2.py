"""HPS v2 and v2.1: how well people like a picture for its prompt (Wu et al. 2023, arXiv 2306.09341; M3.8 f).

A CLIP ViT-H-14 of open_clip, fine-tuned on choices between pictures. The folder has three things: the published file
(HPS_v2.1_compressed.pt or HPS_v2_compressed.pt of xswu/HPSv2), and of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, from which
it was fine-tuned, config.json and the tokenizer (tokenizer.json, tokenizer_config.json).

Left out: the project's cleaning of texts (ftfy, HTML entities), which changes nothing in an ordinary prompt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

from deepgen.config import InputPath, PoolSettings, Share, setting
from deepgen.errors import UserError
from rewards.base import RewardRequest, Score, TextLimit, existing_folder
from rewards.clip import ClipReward, clip_text_limit

FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}

# open_clip's name -> that of transformers, without ".weight" and ".bias" where both have them.
_NAMES = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding": "text_model.embeddings.token_embedding",
    "ln_final": "text_model.final_layer_norm",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1": "vision_model.embeddings.patch_embedding",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
}
_TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_IN_BLOCKS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")


class HpsV2Reward:
    """Cosine of image and description, as published: about 0.15..0.35; v2.0 and v2.1 have scales of their own.

    Published tables show it times 100. The reference doubles it, which a weight can do as well (see `PickScoreReward`).
    """

    class Options(PoolSettings):
        path: InputPath = setting("weights/hpsv2", "Folder with HPS_v2.1_compressed.pt and the tokenizer of its CLIP.")
        version: Literal["v2.0", "v2.1"] = setting("v2.1", "Which of the two published files to read.")
        gpus: Share = setting(0.1, "GPUs of one replica; on a cluster without any none are asked for.", unit="GPUs")

    def __init__(self, options: Options) -> None:
        from rewards.clip_encoder import ClipEncoder, preprocess_whole
        from rewards.published_weights import read_checkpoint, tensors_in

        key = options.dotted("path")
        file = existing_folder(key, options.path, FILES[options.version]) / FILES[options.version]
        content = tensors_in(read_checkpoint(file, key=key).get("state_dict"), file, key=key)
        try:
            state = transformers_names(content)
        except KeyError as error:
            raise UserError(f"{key}: {str(file)!r} is no CLIP of open_clip: it has {error.args[0]}") from error
        self.encoder = ClipEncoder(options.path, options.batch_size, key=key, state=state, prepare=preprocess_whole)

    applies = staticmethod(ClipReward.applies)

    @staticmethod
    def text_limit(options: Options) -> TextLimit | None:
        """As in `ClipEncoder`, from files alone; None without them, which `ClipEncoder` reports."""
        return clip_text_limit(options.path)

    def score(self, requests: Sequence[RewardRequest]) -> Sequence[Score]:
        """Cosine of each image with its answer, or with its prompt if the answer is empty."""
        return self.encoder.similarities([r.image for r in requests], [r.target for r in requests])


def transformers_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an open_clip CLIP with transformers' names. Raises KeyError with a name that is none of them."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if found := _BLOCK.fullmatch(name):
            tower, number, part = found.groups()
            block = f"{'vision' if tower else 'text'}_model.encoder.layers.{number}"
            renamed |= _in_block(block, part, value, name)
        elif name in _TRANSPOSED:
            renamed[_TRANSPOSED[name]] = value.T.contiguous()
        else:
            renamed[_renamed(name, _NAMES, name)] = value
    return renamed


def _in_block(block: str, part: str, value: Tensor, name: str) -> dict[str, Tensor]:
    """One weight of a block; the joint matrix of queries, keys and values becomes three."""
    if part in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = part.rpartition("_")[2]
        return {
            f"{block}.self_attn.{which}_proj.{kind}": third.contiguous()
            for which, third in zip("qkv", value.chunk(3), strict=True)
        }
    return {f"{block}.{_renamed(part, _IN_BLOCKS, name)}": value}


def _renamed(part: str, names: dict[str, str], whole: str) -> str:
    stem, dot, kind = part.rpartition(".")
    if part in names:
        return names[part]
    if kind in ("weight", "bias") and stem in names:
        return f"{names[stem]}{dot}{kind}"
    raise KeyError(whole)
