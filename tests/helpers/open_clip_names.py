"""A CLIP with the names, layers and formula of open_clip, of any width: to write its files and to compare with."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize


class Block(nn.Module):
    """Attention, then two layers with GELU between them, each on normalised input and added to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, 4 * width), gelu=nn.GELU(), c_proj=nn.Linear(4 * width, width))
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        inside = self.ln_1(x)
        x = x + self.attn(inside, inside, inside, need_weights=False, attn_mask=mask)[0]
        changed: Tensor = x + self.mlp(self.ln_2(x))
        return changed


class Transformer(nn.Module):
    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, size: int, patch: int, width: int, heads: int, layers: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((size // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, heads, layers)
        self.proj = nn.Parameter(torch.randn(width, out))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        pooled: Tensor = self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj
        return pooled


class OpenClip(nn.Module):
    """Vision tower 32 wide over patches of 8, text tower 24 wide; random weights, far enough from 0 to matter."""

    def __init__(self, *, vocabulary: int, tokens: int = 12, size: int = 32, out: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.visual = Visual(size, 8, 32, 4, 2, out)
        self.transformer = Transformer(24, 2, 3)
        self.token_embedding = nn.Embedding(vocabulary, 24)
        self.positional_embedding = nn.Parameter(torch.randn(tokens, 24))
        self.ln_final = nn.LayerNorm(24)
        self.text_projection = nn.Parameter(torch.randn(24, out))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))

    @torch.inference_mode()
    def cosine(self, pixels: Tensor, ids: Tensor) -> Tensor:
        """[B, 3, S, S] and token ids [B, N] -> cosines [B]. Text features stand at the highest id of a text."""
        mask = torch.full((ids.shape[1],) * 2, float("-inf")).triu(1)
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        x = self.ln_final(self.transformer(x, mask))
        texts = x[torch.arange(len(x)), ids.argmax(-1)] @ self.text_projection
        return (normalize(self.visual(pixels), dim=-1) * normalize(texts, dim=-1)).sum(-1)
