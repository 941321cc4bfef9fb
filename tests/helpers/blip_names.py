"""ImageReward's model with its own names and formula, of any width: to write its files and to compare with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """[B, N, D], [B, M, D], [B, M, D] -> [B, N, D]. mask: [B, M], True where there is something to look at."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    seen = None if mask is None else mask[:, None, None]
    return scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)


class VisionBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn["qkv"](self.norm1(x)).chunk(3, dim=-1)
        x = x + self.attn["proj"](attend(q, k, v, x.shape[-1] // 64))
        changed: Tensor = x + self.mlp["fc2"](gelu(self.mlp["fc1"](self.norm2(x))))
        return changed


class VisionTower(nn.Module):
    """Patches of 16, heads of 64."""

    def __init__(self, width: int, layers: int, size: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, (size // 16) ** 2 + 1, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 16, stride=16)})
        self.blocks = nn.ModuleList(VisionBlock(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        normal: Tensor = self.norm(x)
        return normal


class Attention(nn.Module):
    """BERT's: the result is added to its input, then normalised."""

    def __init__(self, width: int, seen: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.self = nn.ModuleDict(
            {"query": nn.Linear(width, width), "key": nn.Linear(seen, width), "value": nn.Linear(seen, width)}
        )
        self.output = nn.ModuleDict({"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)})

    def forward(self, x: Tensor, seen: Tensor, mask: Tensor | None = None) -> Tensor:
        found = attend(self.self["query"](x), self.self["key"](seen), self.self["value"](seen), self.heads, mask)
        normal: Tensor = self.output["LayerNorm"](self.output["dense"](found) + x)
        return normal


class TextLayer(nn.Module):
    def __init__(self, width: int, seen: int, heads: int) -> None:
        super().__init__()
        self.attention, self.crossattention = Attention(width, width, heads), Attention(width, seen, heads)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, 4 * width)})
        self.output = nn.ModuleDict({"dense": nn.Linear(4 * width, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)})

    def forward(self, x: Tensor, mask: Tensor, patches: Tensor) -> Tensor:
        x = self.crossattention(self.attention(x, x, mask), patches)
        normal: Tensor = self.output["LayerNorm"](self.output["dense"](gelu(self.intermediate["dense"](x))) + x)
        return normal


class TextEncoder(nn.Module):
    def __init__(self, vocabulary: int, width: int, layers: int, seen: int, heads: int) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(vocabulary, width),
                "position_embeddings": nn.Embedding(64, width),
                "LayerNorm": nn.LayerNorm(width, eps=1e-12),
            }
        )
        self.embeddings.register_buffer("position_ids", torch.arange(64)[None])
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(TextLayer(width, seen, heads) for _ in range(layers))})

    def forward(self, ids: Tensor, mask: Tensor, patches: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1])
        x = self.embeddings["word_embeddings"](ids) + self.embeddings["position_embeddings"](places)
        x = self.embeddings["LayerNorm"](x)
        for layer in self.encoder["layer"].children():
            x = layer(x, mask, patches)
        return x


class Blip(nn.Module):
    """Vision tower 128 wide (two heads) for 48 pixels, text encoder 48 wide with three heads, the published stack."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blip = nn.ModuleDict(
            {
                "visual_encoder": VisionTower(128, 2, 48),
                "text_encoder": TextEncoder(vocabulary, 48, 2, 128, 3),
                "vision_proj": nn.Linear(128, 8),
                "text_proj": nn.Linear(48, 8),
            }
        )
        widths = [(48, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)]
        first, second, third, fourth, last = (nn.Linear(a, b) for a, b in widths)
        drop = nn.Dropout
        self.mlp = nn.ModuleDict(
            {"layers": nn.Sequential(first, drop(0.2), second, drop(0.2), third, drop(0.1), fourth, last)}
        )
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        self.eval()

    @torch.inference_mode()
    def score(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """[B, 3, S, S], ids [B, N] and mask [B, N] -> normalised scores [B]."""
        patches = self.blip["visual_encoder"](pixels)
        first = self.blip["text_encoder"](ids, mask.bool(), patches)[:, 0]
        score: Tensor = (self.mlp["layers"](first).squeeze(-1) - 0.16717362830052426) / 1.0333394966054072
        return score
