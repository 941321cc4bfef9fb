"""What lies between VLM and DiT in an exported diffusers folder: think tokens, projectors and connector (M1.3, M1.5).

`stages/export.py --layout diffusers` of the DeepGen platform copies this file into the folder that it writes. There it
needs nothing else of the platform. Numbers like M1.4 are sections of the platform's docs/method.md.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoder


class DeepGenConnectorConfig(PretrainedConfig):
    """Sizes, and which hidden states of the VLM are read, in order (0: embeddings, i: output of decoder layer i)."""

    model_type = "deepgen_connector"

    def __init__(
        self,
        num_queries: int = 128,
        vlm_hidden: int = 2048,
        fusion_layers: tuple[int, ...] = (35, 29, 23, 17, 11, 5),
        connector_hidden: int = 2048,
        connector_mlp: int = 11946,
        connector_layers: int = 6,
        connector_heads: int = 32,
        context_dim: int = 4096,
        pooled_dim: int = 2048,
        max_prompt_tokens: int = 1024,
        **others: Any,
    ) -> None:
        self.num_queries, self.vlm_hidden, self.fusion_layers = num_queries, vlm_hidden, tuple(fusion_layers)
        self.connector_hidden, self.connector_mlp = connector_hidden, connector_mlp
        self.connector_layers, self.connector_heads = connector_layers, connector_heads
        self.context_dim, self.pooled_dim, self.max_prompt_tokens = context_dim, pooled_dim, max_prompt_tokens
        super().__init__(**others)


class DeepGenConnector(PreTrainedModel):
    """From hidden states of the VLM to the conditioning of the DiT. The connector's layers are SigLIP's."""

    config_class = DeepGenConnectorConfig

    def __init__(self, config: DeepGenConnectorConfig) -> None:
        super().__init__(config)
        layers = SiglipVisionConfig(
            hidden_size=config.connector_hidden,
            intermediate_size=config.connector_mlp,
            num_hidden_layers=config.connector_layers,
            num_attention_heads=config.connector_heads,
            attn_implementation="sdpa",
        )
        self.meta_queries = nn.Parameter(torch.zeros(config.num_queries, config.vlm_hidden))
        self.projector_1 = nn.Linear(config.vlm_hidden * len(config.fusion_layers), config.connector_hidden)
        self.connector = SiglipEncoder(layers)
        self.projector_2 = nn.Linear(config.connector_hidden, config.pooled_dim)
        self.projector_3 = nn.Linear(config.connector_hidden, config.context_dim)
        self.post_init()

    def forward(self, states: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Hidden states [B, L, vlm_hidden], as `fusion_layers` says -> context [B, L, context_dim], pooled [B, d]."""
        stacked = torch.cat(states, dim=-1).to(self.dtype)
        x = self.connector(inputs_embeds=self.projector_1(stacked)).last_hidden_state
        return self.projector_3(x), self.projector_2(x.mean(dim=1))
