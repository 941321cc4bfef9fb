"""The diffusion transformer: SD3 joint blocks over target and reference latents of any size (M1.6).

The parameters are exactly those of diffusers' `SD3Transformer2DModel`, so its checkpoints load unchanged. `forward` can
do more: a batch may hold targets of different sizes, each with its own reference latents, and contexts with padding.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor

from deepgen.models.attention import attend

LatentBatch = Tensor | Sequence[Tensor]
References = Sequence[Sequence[Tensor]]


class MaskedJointAttnProcessor:
    """SD3 joint attention over [image ‖ context] that can hide padded keys.

    `key_mask` is bool [B, 1, 1, S_image + L], True = valid, or None if nothing is padded. It hides keys only. A padded
    query still computes a finite result, but no valid token ever reads it. Valid tokens therefore get exactly what the
    outer product of validities (M1.6) would give them, with a mask S times smaller.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,  # [B, S_image, D]
        encoder_hidden_states: Tensor | None = None,  # [B, L, D]; None in the image-only second attention
        attention_mask: Tensor | None = None,
        key_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        image_length = hidden_states.shape[1]
        query = _heads(attn.to_q(hidden_states), attn.heads, attn.norm_q)
        key = _heads(attn.to_k(hidden_states), attn.heads, attn.norm_k)
        value = _heads(attn.to_v(hidden_states), attn.heads)
        if encoder_hidden_states is None:
            mask = None if key_mask is None else key_mask[..., :image_length]
            return _image_out(attn, attend(query, key, value, mask))

        context_query = _heads(attn.add_q_proj(encoder_hidden_states), attn.heads, attn.norm_added_q)
        context_key = _heads(attn.add_k_proj(encoder_hidden_states), attn.heads, attn.norm_added_k)
        context_value = _heads(attn.add_v_proj(encoder_hidden_states), attn.heads)
        joined = attend(
            torch.cat([query, context_query], dim=2),
            torch.cat([key, context_key], dim=2),
            torch.cat([value, context_value], dim=2),
            key_mask,
        )
        image, context = joined[:, :image_length], joined[:, image_length:]
        if not attn.context_pre_only:
            context = attn.to_add_out(context)
        return _image_out(attn, image), context


def _heads(x: Tensor, heads: int, norm: Any = None) -> Tensor:
    """[B, S, D] -> [B, heads, S, D / heads], normalised per head if the layer has a norm."""
    x = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    return x if norm is None else norm(x)


def _image_out(attn: Attention, x: Tensor) -> Tensor:
    return attn.to_out[1](attn.to_out[0](x))


class DeepGenTransformer(SD3Transformer2DModel):
    """SD3 transformer whose image tokens are `[target ‖ reference 1 ‖ reference 2 …]` (M1.6).

    References use the same patch embedding and the same centre-cropped position embedding as targets; nothing else
    marks them. Samples are right-padded to the longest. If neither images nor context are padded, no attention mask is
    built, so that the fastest attention kernels can run.
    """

    # diffusers matches the keys of config.json against this signature
    @functools.wraps(SD3Transformer2DModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.set_attn_processor(MaskedJointAttnProcessor())

    def forward(
        self,
        hidden_states: LatentBatch,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        cond_hidden_states: References | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor | list[Tensor]:
        """Predict the velocity of every target.

        Args:
            hidden_states: noisy targets, [B, c, h, w], or B tensors [c, h, w] whose sizes may differ (multiples of
                the patch size).
            timestep: [B], in 0..1000.
            encoder_hidden_states: context [B, L, joint_attention_dim].
            pooled_projections: [B, pooled_projection_dim].
            cond_hidden_states: per sample, its clean reference latents [c, h', w'] (any number, any size).
            encoder_attention_mask: bool [B, L], True where the context is not padding; None = no padding.

        Returns:
            Velocities shaped like the targets and in their dtype: a tensor for a tensor, a list for a list.
        """
        dtype = self.pos_embed.proj.weight.dtype
        tokens, lengths = self._embed_images(hidden_states, cond_hidden_states)  # [B, S, D]
        key_mask = _key_mask(tokens, lengths, encoder_hidden_states, encoder_attention_mask)
        temb = self.time_text_embed(timestep, pooled_projections.to(dtype))  # [B, D]
        context = self.context_embedder(encoder_hidden_states.to(dtype))  # [B, L, D]

        kwargs = {"key_mask": key_mask}
        for block in self.transformer_blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                context, tokens = self._gradient_checkpointing_func(block, tokens, context, temb, kwargs)
            else:
                context, tokens = block(tokens, context, temb, kwargs)

        return self._unpatchify(tokens, temb, hidden_states)

    def _embed_images(self, targets: LatentBatch, references: References | None) -> tuple[Tensor, list[int] | None]:
        """Image tokens [B, S, D], right-padded to the longest, and lengths per sample (None if nothing is padded)."""
        references = references if references is not None and any(references) else None
        if references is not None and len(references) != len(targets):
            raise ValueError(f"{len(references)} lists of references for {len(targets)} targets")
        parts = [[target, *(references[i] if references else ())] for i, target in enumerate(targets)]
        shapes = {tuple(part.shape for part in sample) for sample in parts}
        if len(shapes) == 1:  # one layout for the whole batch: embed column by column
            columns = [targets if isinstance(targets, Tensor) else torch.stack(list(targets))]
            columns += [torch.stack([sample[j] for sample in parts]) for j in range(1, len(parts[0]))]
            embedded = [self._patch(column) for column in columns]
            return torch.cat(embedded, dim=1) if len(embedded) > 1 else embedded[0], None

        sequences = self._embed_ragged(parts)
        lengths = [sequence.shape[0] for sequence in sequences]
        padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        return padded, None if len(set(lengths)) == 1 else lengths

    def _embed_ragged(self, parts: list[list[Tensor]]) -> list[Tensor]:
        """Token sequences [S_i, D] of samples with different layouts; one patch embedding call per distinct size."""
        flat = [part for sample in parts for part in sample]
        by_shape: dict[torch.Size, list[int]] = {}
        for index, part in enumerate(flat):
            by_shape.setdefault(part.shape, []).append(index)
        tokens: list[Tensor] = [flat[0]] * len(flat)  # placeholders, all replaced below
        for indices in by_shape.values():
            embedded = self._patch(torch.stack([flat[i] for i in indices]))
            for i, sequence in zip(indices, embedded.unbind(0), strict=True):
                tokens[i] = sequence
        iterator = iter(tokens)
        return [torch.cat([next(iterator) for _ in sample]) for sample in parts]

    def _patch(self, latents: Tensor) -> Tensor:
        """Embed [B, c, h, w] as [B, (h / patch) · (w / patch), D], including positions."""
        return self.pos_embed(latents.to(self.pos_embed.proj.weight.dtype)).contiguous()

    def _unpatchify(self, tokens: Tensor, temb: Tensor, targets: LatentBatch) -> Tensor | list[Tensor]:
        """Tokens [B, S, D] -> velocities; only each sample's leading target tokens are read."""
        patch = self.config.patch_size
        sizes = [(target.shape[-2] // patch, target.shape[-1] // patch) for target in targets]
        longest = max(h * w for h, w in sizes)
        out = self.proj_out(self.norm_out(tokens[:, :longest], temb))  # [B, longest, patch·patch·c]
        if isinstance(targets, Tensor):
            return self._to_image(out, *sizes[0]).to(targets.dtype)
        return [self._to_image(out[i : i + 1, : h * w], h, w)[0].to(targets[i].dtype) for i, (h, w) in enumerate(sizes)]

    def _to_image(self, out: Tensor, height: int, width: int) -> Tensor:
        """[B, height·width, patch·patch·c] -> [B, c, height·patch, width·patch]."""
        patch = self.config.patch_size
        out = out.view(-1, height, width, patch, patch, self.out_channels)
        return out.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, height * patch, width * patch)


def _key_mask(tokens: Tensor, lengths: list[int] | None, context: Tensor, context_mask: Tensor | None) -> Tensor | None:
    """Validity of keys, bool [B, 1, 1, S + L], or None if every key is valid."""
    if context_mask is not None and bool(context_mask.all()):
        context_mask = None
    if lengths is None and context_mask is None:
        return None
    batch, longest = tokens.shape[:2]
    image = torch.ones(batch, longest, dtype=torch.bool, device=tokens.device)
    if lengths is not None:
        limits = torch.tensor(lengths, device=tokens.device)
        image = torch.arange(longest, device=tokens.device) < limits[:, None]
    if context_mask is None:
        context_mask = torch.ones(context.shape[:2], dtype=torch.bool, device=tokens.device)
    return torch.cat([image, context_mask.to(tokens.device, torch.bool)], dim=1)[:, None, None]
