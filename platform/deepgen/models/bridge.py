"""Stacked Channel Bridging: from hidden states of the VLM to the conditioning of the DiT (M1.5)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepgen.models.attention import attend
from deepgen.models.presets import Architecture

BRIDGE_PREFIXES = ("meta_queries", "projector_1.", "projector_2.", "projector_3.", "connector.")
LAYER_NORM_EPS = 1e-6


class ConnectorAttention(nn.Module):
    """Bidirectional multi-head self-attention with biases everywhere."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(hidden, hidden)
        self.v_proj = nn.Linear(hidden, hidden)
        self.q_proj = nn.Linear(hidden, hidden)
        self.out_proj = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        query, key, value = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, L, d]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(attend(query, key, value, key_mask))


class ConnectorMLP(nn.Module):
    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, intermediate)
        self.fc2 = nn.Linear(intermediate, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class ConnectorLayer(nn.Module):
    """Pre-LayerNorm block: x += Attn(LN1 x); x += MLP(LN2 x)."""

    def __init__(self, hidden: int, intermediate: int, heads: int) -> None:
        super().__init__()
        self.self_attn = ConnectorAttention(hidden, heads)
        self.layer_norm1 = nn.LayerNorm(hidden, eps=LAYER_NORM_EPS)
        self.mlp = ConnectorMLP(hidden, intermediate)
        self.layer_norm2 = nn.LayerNorm(hidden, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), key_mask)
        return x + self.mlp(self.layer_norm2(x))


class Connector(nn.Module):
    """A stack of encoder blocks without positions and without a final norm (M1.5)."""

    def __init__(self, hidden: int, intermediate: int, layers: int, heads: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ConnectorLayer(hidden, intermediate, heads) for _ in range(layers))
        self.apply(_init_connector)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, L, hidden]; mask bool [B, L], True = valid, hides padded keys; None hides nothing."""
        key_mask = None if mask is None or bool(mask.all()) else mask[:, None, None, :]
        for layer in self.layers:
            x = layer(x, key_mask)
        return x


def _init_connector(module: nn.Module) -> None:
    """Xavier-uniform matrices, zero attention biases, MLP biases N(0, 1e-6) (M1.5)."""
    if isinstance(module, ConnectorAttention):
        for projection in (module.q_proj, module.k_proj, module.v_proj, module.out_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)
    elif isinstance(module, ConnectorMLP):
        for linear in (module.fc1, module.fc2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=1e-6)


class Bridge(nn.Module):
    """Think tokens, projectors and connector, with the parameter names of the published checkpoints (M6.2)."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        hidden, width = architecture.vlm_hidden, architecture.connector_hidden
        self.meta_queries = nn.Parameter(torch.empty(architecture.num_queries, hidden))
        self.projector_1 = nn.Linear(hidden * len(architecture.fusion_layers), width)
        self.connector = Connector(
            width, architecture.connector_mlp, architecture.connector_layers, architecture.connector_heads
        )
        self.projector_2 = nn.Linear(width, architecture.pooled_dim)
        self.projector_3 = nn.Linear(width, architecture.context_dim)
        self.reset_bridge()

    @torch.no_grad()
    def reset_bridge(self) -> None:
        """Fresh weights for alignment pretraining, where the DiT starts with all-zero conditioning (M1.3, M1.5)."""
        nn.init.normal_(self.meta_queries, std=1 / math.sqrt(self.meta_queries.shape[1]))
        self.projector_1.reset_parameters()
        self.connector.apply(_reset_norm)
        self.connector.apply(_init_connector)
        for projector in (self.projector_2, self.projector_3):
            nn.init.zeros_(projector.weight)
            nn.init.zeros_(projector.bias)

    def fuse(self, states: Sequence[Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Stack the selected hidden states on the channel axis and turn them into conditioning.

        Args:
            states: [B, L, vlm_hidden] each, deepest layer first.
            mask: bool [B, L], True = valid: pads are hidden from the connector and left out of the mean. None treats
                every position as valid, which is what the published model was trained with (M1.5, padding leak).

        Returns:
            context [B, L, joint_attention_dim] and pooled [B, pooled_projection_dim].
        """
        x = self.connector(self.projector_1(torch.cat(list(states), dim=-1)), mask)  # [B, L, connector_hidden]
        if mask is None:
            mean = x.mean(dim=1)
        else:
            valid = mask[..., None].to(x.dtype)
            mean = (x * valid).sum(dim=1) / valid.sum(dim=1)
        return self.projector_3(x), self.projector_2(mean)

    def bridge_state(self) -> dict[str, Tensor]:
        """The bridge's own tensors, without those that a subclass adds."""
        return {name: tensor for name, tensor in self.state_dict().items() if name.startswith(BRIDGE_PREFIXES)}


def _reset_norm(module: nn.Module) -> None:
    if isinstance(module, nn.LayerNorm):
        module.reset_parameters()
