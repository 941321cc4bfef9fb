"""Scaled dot-product attention for all our transformers."""

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention over [B, heads, S, d] heads, returned as [B, S, heads·d] in the dtype of `value`.

    `mask` is bool, True where a key may be read, broadcastable to [B, heads, S, S]; None hides nothing.
    On a CPU, attention always runs in fp32, because the bf16 backward kernel takes three times as long there.
    """
    dtype = value.dtype
    if value.device.type != "cpu":
        out = F.scaled_dot_product_attention(query.to(dtype), key.to(dtype), value, attn_mask=mask)
    else:
        wide = torch.promote_types(dtype, torch.float32)
        with torch.autocast("cpu", enabled=False):
            out = F.scaled_dot_product_attention(query.to(wide), key.to(wide), value.to(wide), attn_mask=mask)
    return out.transpose(1, 2).flatten(2).to(dtype)
