"""The conditioning pass through Qwen2.5-VL: prompt, reference images and think tokens to hidden states (M1.3, M1.4).

No text is generated. One causal pass reads the prompt and the think tokens after it. It runs only the decoder layers
that the bridge needs: never the last layer, the final norm or the language-model head.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.masking_utils import create_causal_mask

from deepgen.errors import UserError
from deepgen.models.chat_template import TokenBatch

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PIXEL_UNIT = 32  # image sides are multiples of it; the VLM sees 28 pixels for every 32 (M1.4)
VISUAL_UNIT = 28


@dataclass(frozen=True)
class LoraSettings:
    """LoRA on the VLM (M1.10). `modules` is "live" (can receive a gradient) or "all" (every Linear and Embedding)."""

    rank: int = 64
    alpha: float = 128.0
    dropout: float = 0.05
    modules: str = "live"


@dataclass(frozen=True)
class SeenImage:
    """Visual-tower features of one reference image [3, H, W], encoded alone: [H / 32, W / 32, vlm_hidden]."""

    features: Tensor


def image_token_count(image: Tensor | SeenImage) -> int:
    """Number of tokens that a reference image [3, H, W] takes in the prompt: (H / 32)·(W / 32)."""
    if isinstance(image, SeenImage):
        return image.features.shape[0] * image.features.shape[1]
    height, width = image.shape[-2:]
    if height % PIXEL_UNIT or width % PIXEL_UNIT or not height or not width:
        raise UserError(f"reference image: {height} x {width} pixels; both sides must be multiples of {PIXEL_UNIT}")
    return (height // PIXEL_UNIT) * (width // PIXEL_UNIT)


def vision_inputs(images: Sequence[Tensor], patch: int = 14, merge: int = 2) -> tuple[Tensor, Tensor]:
    """Patches in the layout of Hugging Face's Qwen2-VL processor, without the processor's rescaling.

    Args:
        images: [3, H, W] in [-1, 1], sides multiples of 32; they are resized bilinearly by 28/32.

    Returns:
        patches [sum of grid cells, 3·2·patch·patch], grouped in merge x merge cells, the frame doubled along time,
        and grid_thw int64 [N, 3].
    """
    by_shape: dict[torch.Size, list[int]] = {}
    for index, image in enumerate(images):
        by_shape.setdefault(image.shape, []).append(index)
    patches: list[Tensor] = [images[0]] * len(images)
    grids = torch.empty(len(images), 3, dtype=torch.long)
    for shape, indices in by_shape.items():
        size = (shape[1] * VISUAL_UNIT // PIXEL_UNIT, shape[2] * VISUAL_UNIT // PIXEL_UNIT)
        rows, columns = size[0] // patch, size[1] // patch
        batch = F.interpolate(torch.stack([images[i] for i in indices]).float(), size=size, mode="bilinear")
        mean, std = (batch.new_tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        batch = ((batch + 1) / 2 - mean) / std
        batch = batch.view(-1, 3, rows // merge, merge, patch, columns // merge, merge, patch)
        batch = batch.permute(0, 2, 5, 3, 6, 1, 4, 7)  # [n, rows/m, columns/m, m, m, 3, patch, patch]
        batch = batch.unsqueeze(6).expand(*batch.shape[:6], 2, patch, patch).flatten(5).flatten(1, 4)
        grids[indices] = torch.tensor([1, rows, columns])
        for i, sequence in zip(indices, batch.unbind(0), strict=True):
            patches[i] = sequence
    return torch.cat(patches), grids.to(images[0].device)


@torch.no_grad()
def visual_features(vlm: Qwen2_5_VLForConditionalGeneration, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Features [sum of image tokens, vlm_hidden] of all images in one call, and grid_thw [N, 3]. Without a gradient."""
    visual = vlm.model.visual
    patches, grids = vision_inputs(images, visual.patch_size, visual.spatial_merge_size)
    weight = visual.patch_embed.proj.weight
    features = visual(patches.to(weight.device, weight.dtype), grid_thw=grids.to(weight.device)).pooler_output
    return features, grids


def see(vlm: Qwen2_5_VLForConditionalGeneration, image: Tensor) -> SeenImage:
    """Encode one image [3, H, W] in [-1, 1], sides multiples of 32, with the visual tower, which is never trained."""
    rows = image.shape[-2] // PIXEL_UNIT
    features, _ = visual_features(vlm, [image])
    return SeenImage(features.unflatten(0, (rows, -1)))


def reference_features(
    vlm: Qwen2_5_VLForConditionalGeneration, images: Sequence[Tensor | SeenImage]
) -> tuple[Tensor, Tensor]:
    """Like `visual_features`, for images or for the features of images that `see` encoded before."""
    seen = [image.features for image in images if isinstance(image, SeenImage)]
    if not seen:
        return visual_features(vlm, [image for image in images if isinstance(image, Tensor)])
    if len(seen) < len(images):
        raise ValueError(f"{len(seen)} of {len(images)} images have been seen; all or none")
    merge = vlm.model.visual.spatial_merge_size
    grids = torch.tensor([[1, one.shape[0] * merge, one.shape[1] * merge] for one in seen], device=seen[0].device)
    return torch.cat([one.flatten(0, 1) for one in seen]), grids


def position_ids(
    vlm: Qwen2_5_VLForConditionalGeneration, ids: Tensor, mask: Tensor, grids: Tensor | None, think_tokens: int
) -> Tensor:
    """mRoPE positions [3, B, T + think_tokens]. Think tokens follow the prompt like text; pads get 1 (M1.3)."""
    batch = ids.shape[0]
    full_mask = torch.cat([mask, mask.new_ones(batch, think_tokens)], dim=1)
    if grids is None:
        positions = (full_mask.long().cumsum(dim=1) - 1).expand(3, -1, -1)
    else:
        text = ids.new_zeros(batch, think_tokens)
        types = torch.cat([(ids == vlm.config.image_token_id).long(), text], dim=1)
        positions, _ = vlm.model.get_rope_index(
            torch.cat([ids, text], dim=1), mm_token_type_ids=types, image_grid_thw=grids, attention_mask=full_mask
        )
    return positions.masked_fill(~full_mask, 1)


def conditioning_states(
    vlm: Qwen2_5_VLForConditionalGeneration,
    tokens: TokenBatch,
    images: Sequence[Tensor | SeenImage],
    think_tokens: Tensor,
    layers: Sequence[int],
    max_length: int,
) -> tuple[list[Tensor], Tensor]:
    """Run the decoder over [prompt ‖ think tokens] and return the hidden states that the bridge reads.

    Args:
        tokens: left-padded prompts; the features of `images` replace their `<|image_pad|>` tokens, in order.
        think_tokens: [N, vlm_hidden], the same for every sample, always last.
        layers: indices of the wanted hidden states (i = output of decoder layer i, 0 = embeddings), in order.
        max_length: longer sequences lose their beginning, as in training (M1.3).

    Returns:
        states [B, L, vlm_hidden] per index, and their validity, bool [B, L].
    """
    device = think_tokens.device
    ids, mask = tokens.ids.to(device), tokens.mask.to(device)
    embeds = vlm.get_input_embeddings()(ids)  # [B, T, vlm_hidden]
    grids = None
    if images:
        features, grids = reference_features(vlm, images)
        places = (ids == vlm.config.image_token_id)[..., None]
        embeds = embeds.masked_scatter(places, features.to(embeds.dtype))
    count = think_tokens.shape[0]
    positions = position_ids(vlm, ids, mask, grids, count)
    thoughts = think_tokens.to(embeds.dtype).expand(ids.shape[0], -1, -1)
    embeds = torch.cat([embeds, thoughts], dim=1)
    mask = torch.cat([mask, mask.new_ones(mask.shape[0], count)], dim=1)
    embeds, mask, positions = embeds[:, -max_length:], mask[:, -max_length:], positions[..., -max_length:]
    return _decode(vlm.model.language_model, embeds, mask, positions, layers), mask


def _decode(decoder: Any, embeds: Tensor, mask: Tensor, positions: Tensor, layers: Sequence[int]) -> list[Tensor]:
    """Run the decoder layers up to the deepest wanted state. Returns the states in the order of `layers`."""
    # Without padding, the attention kernels can use their "causal" flag instead of a mask.
    padding = None if bool(mask.all()) else mask
    causal = create_causal_mask(decoder.config, inputs_embeds=embeds, attention_mask=padding, past_key_values=None)
    rotary = decoder.rotary_emb(embeds, positions)
    states = {0: embeds}
    hidden = embeds
    for index, layer in enumerate(decoder.layers[: max(layers)], start=1):
        hidden = layer(hidden, attention_mask=causal, position_embeddings=rotary, use_cache=False)
        states[index] = hidden
    return [states[index] for index in layers]


def lora_modules(vlm: nn.Module, scope: str, deepest_state: int) -> list[str]:
    """Names of the modules that LoRA adapts (M1.10).

    scope "all": every Linear and Embedding of the VLM, including visual tower and head. "live": the embedding and the
    decoder layers up to the deepest hidden state that the bridge reads; other modules can never receive a gradient
    (M8.12).
    """
    names = [name for name, module in vlm.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
    if scope == "all":
        return names
    if scope != "live":
        raise UserError(f"LoRA modules: {scope!r} given; allowed: live, all")
    return [name for name in names if is_live(name, deepest_state)]


def is_live(name: str, deepest_state: int) -> bool:
    """Whether a module or parameter of the VLM takes part in the conditioning pass and can receive a gradient."""
    decoder = "model.language_model."
    if not name.startswith(decoder):
        return False
    parts = name.removeprefix(decoder).split(".")
    return parts[0] == "embed_tokens" or (parts[0] == "layers" and int(parts[1]) < deepest_state)


def add_lora(vlm: Qwen2_5_VLForConditionalGeneration, settings: LoraSettings, deepest_state: int) -> None:
    """Attach a fresh adapter called "default": Gaussian A, zero B, scale alpha / rank (M1.10)."""
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        init_lora_weights="gaussian",
        target_modules=lora_modules(vlm, settings.modules, deepest_state),
    )
    with warnings.catch_warnings():
        # In the 3B VLM the head shares the embedding's weights, but it is never called and never merged.
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings=True")
        vlm.add_adapter(config)


def lora_parameters(vlm: nn.Module) -> dict[str, nn.Parameter]:
    """All adapter parameters of the VLM by name."""
    return {name: parameter for name, parameter in vlm.named_parameters() if ".lora_" in name}
