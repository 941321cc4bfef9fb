"""Stacked Channel Bridging: parity, initialisation, masks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deepgen.models.bridge import Bridge
from deepgen.models.presets import TINY, Architecture
from tests.helpers.factories import narrow_architecture

GOLDEN = Path(__file__).parents[1] / "golden" / "bridge.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN, allow_pickle=False) as arrays:
        return {k.removeprefix("scb/"): torch.from_numpy(arrays[k]) for k in arrays.files if k.startswith("scb/")}


def golden_architecture() -> Architecture:
    text = {**TINY.vlm["text_config"], "hidden_size": 24, "num_hidden_layers": 12}
    return replace(
        TINY,
        vlm={**TINY.vlm, "text_config": text},
        transformer={**TINY.transformer, "joint_attention_dim": 48, "pooled_projection_dim": 40},
        connector_hidden=32,
        connector_mlp=72,
        connector_layers=2,
        connector_heads=4,
        fusion_stride=6,
    )


@torch.no_grad()
def test_parity(golden):
    architecture = golden_architecture()
    assert list(architecture.fusion_layers) == golden["selected"].tolist()
    bridge = Bridge(architecture)
    weights = {k.removeprefix("sd/"): v for k, v in golden.items() if k.startswith("sd/")}
    missing, unexpected = bridge.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["meta_queries"], [])
    context, pooled = bridge.fuse([golden[f"hidden{i}"] for i in architecture.fusion_layers], None)
    torch.testing.assert_close(context, golden["seq"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pooled, golden["pooled"], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_fresh_bridge_gives_zero_conditioning_and_the_inits_of_the_paper():
    torch.manual_seed(0)
    architecture = replace(narrow_architecture(), num_queries=64)
    bridge = Bridge(architecture)
    states = [torch.randn(2, 5, architecture.vlm_hidden) for _ in architecture.fusion_layers]
    context, pooled = bridge.fuse(states, None)
    assert not context.any()
    assert not pooled.any()
    assert bridge.meta_queries.std().item() == pytest.approx(architecture.vlm_hidden**-0.5, rel=0.1)
    state = bridge.bridge_state()
    assert not state["connector.layers.0.self_attn.q_proj.bias"].any()
    assert 0 < state["connector.layers.0.mlp.fc1.bias"].abs().max() < 1e-5


def test_first_step_trains_the_zero_projectors():
    torch.manual_seed(0)
    architecture = narrow_architecture()
    bridge = Bridge(architecture)
    states = [torch.randn(2, 5, architecture.vlm_hidden) for _ in architecture.fusion_layers]
    context, pooled = bridge.fuse(states, None)
    (context.sum() + pooled.sum()).backward()
    for projector in (bridge.projector_2, bridge.projector_3):
        assert projector.weight.grad is not None
        assert projector.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_mask_makes_padding_invisible():
    torch.manual_seed(0)
    architecture = narrow_architecture()
    bridge = Bridge(architecture)
    for projector in (bridge.projector_2, bridge.projector_3):
        torch.nn.init.normal_(projector.weight)
    states = [torch.randn(1, 9, architecture.vlm_hidden) for _ in architecture.fusion_layers]
    mask = torch.tensor([[False] * 3 + [True] * 6])
    context, pooled = bridge.fuse(states, mask)
    short_context, short_pooled = bridge.fuse([state[:, 3:] for state in states], None)
    torch.testing.assert_close(context[:, 3:], short_context)
    torch.testing.assert_close(pooled, short_pooled)
    leaked, _ = bridge.fuse(states, None)  # padding="reference" keeps this leak (M1.5)
    assert not torch.allclose(leaked[:, 3:], short_context, rtol=1e-3)
