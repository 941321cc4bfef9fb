"""Both presets use the same classes, and the 5B preset has the published numbers of parameters (M0.4)."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deepgen.errors import UserError
from deepgen.models.bridge import BRIDGE_PREFIXES
from deepgen.models.presets import DEEPGEN_5B, PRESETS, TINY, check_preset, check_width
from deepgen.models.unified import UnifiedModel
from deepgen.models.vlm import LoraSettings, add_lora, lora_parameters
from deepgen.models.weights_io.folder import parameter_count
from tests.helpers.factories import narrow_architecture


@pytest.fixture(scope="module")
def big():
    return UnifiedModel.from_architecture(DEEPGEN_5B, "meta")


def test_5b_parameter_counts(big):
    bridge = sum(p.numel() for name, p in big.named_parameters() if name.startswith(BRIDGE_PREFIXES))
    assert parameter_count(big.vlm) == 3_754_622_976
    assert bridge == 432_449_532
    assert parameter_count(big.transformer) == 2_243_171_520
    assert big.transformer.pos_embed.pos_embed.numel() == 226_492_416
    assert parameter_count(big.vae) == 83_819_683
    assert all(p.is_meta for p in big.parameters())


def test_5b_bridge_parts(big):
    """Sizes of M1.5, and shapes of M6.2."""
    assert parameter_count(big.projector_1) == 25_167_872
    assert parameter_count(big.connector) == 394_430_460
    assert parameter_count(big.projector_2) == 4_196_352
    assert parameter_count(big.projector_3) == 8_392_704
    shapes = {name: tuple(tensor.shape) for name, tensor in big.bridge_state().items()}
    assert shapes["meta_queries"] == (128, 2048)
    assert shapes["projector_1.weight"] == (2048, 12288)
    assert shapes["connector.layers.5.mlp.fc1.weight"] == (11946, 2048)
    assert shapes["connector.layers.0.self_attn.out_proj.bias"] == (2048,)
    assert DEEPGEN_5B.fusion_layers == (35, 29, 23, 17, 11, 5)


def test_5b_transformer_shapes(big):
    state = {name: tuple(tensor.shape) for name, tensor in big.transformer.state_dict().items()}
    assert len(state) == 909
    assert state["pos_embed.pos_embed"] == (1, 147456, 1536)
    assert state["transformer_blocks.12.norm1.linear.weight"] == (13824, 1536)
    assert state["transformer_blocks.13.norm1.linear.weight"] == (9216, 1536)
    assert state["transformer_blocks.23.norm1_context.linear.weight"] == (3072, 1536)
    assert "transformer_blocks.23.attn.to_add_out.weight" not in state
    assert "transformer_blocks.13.attn2.to_q.weight" not in state
    assert state["transformer_blocks.0.attn2.norm_q.weight"] == (64,)
    assert state["proj_out.weight"] == (64, 1536)


def test_5b_full_lora():
    """416 adapters, 185,163,776 parameters, under the names of M6.2."""
    vlm = UnifiedModel.from_architecture(DEEPGEN_5B, "meta").vlm
    with torch.device("meta"):
        add_lora(vlm, LoraSettings(modules="all"), DEEPGEN_5B.fusion_layers[0])
    parameters = lora_parameters(vlm)
    modules = {re.sub(r"\.lora_.*", "", name) for name in parameters}
    assert len(modules) == 416
    assert len(parameters) == 2 * 416
    assert sum(p.numel() for p in parameters.values()) == 185_163_776
    assert sum(p.numel() for n, p in parameters.items() if n.startswith("model.visual.")) == 45_719_552
    assert "model.language_model.layers.35.mlp.down_proj.lora_B.default.weight" in parameters
    assert "model.language_model.embed_tokens.lora_embedding_A.default" in parameters
    assert "lm_head.lora_A.default.weight" in parameters
    assert "model.visual.merger.mlp.2.lora_A.default.weight" in parameters


def test_5b_live_lora():
    """By default only modules that can receive a gradient: 35 layers of 7 linears, and the embedding (M8.12)."""
    vlm = UnifiedModel.from_architecture(DEEPGEN_5B, "meta").vlm
    with torch.device("meta"):
        add_lora(vlm, LoraSettings(), DEEPGEN_5B.fusion_layers[0])
    modules = {re.sub(r"\.lora_.*", "", name) for name in lora_parameters(vlm)}
    assert len(modules) == 246
    assert not any("layers.35." in name or "visual" in name or "lm_head" in name for name in modules)


def test_5b_stages(big):
    def count(stage: str) -> int:
        return sum(p.numel() for _, p in big.trainable_parameters(stage))

    assert count("pretrain") == 432_449_532
    assert count("sft") == 432_449_532 + 2_243_171_520
    assert count("rl") == 2_243_171_520


def test_tiny_builds_and_is_tiny():
    model = UnifiedModel.from_architecture(TINY, "meta")
    assert TINY.fusion_layers == (5, 3, 1)
    assert TINY.vae_downsample == 4
    assert parameter_count(model) < 15_000_000
    assert parameter_count(model.transformer) < 9_000_000


def test_architecture_survives_json():
    config = json.loads(json.dumps(TINY.bridge_config()))
    assert replace(TINY, **config) == TINY


def test_preset_check():
    for name, architecture in PRESETS.items():
        check_preset(name, architecture, "there")
    check_preset("tiny", narrow_architecture(), "there")
    with pytest.raises(UserError, match=r"there does not hold a 'tiny' model \(found: VLM 36 layers x 2048"):
        check_preset("tiny", DEEPGEN_5B, "there")
    with pytest.raises(UserError, match="does not hold a 'deepgen-5b' model"):
        check_preset("deepgen-5b", TINY, "there")
    with pytest.raises(UserError, match="allowed: tiny, deepgen-5b"):
        check_preset("huge", TINY, "there")


def test_the_width_of_the_dit_gives_another_preset_away(tmp_path: Path) -> None:
    config = tmp_path / "transformer" / "config.json"
    config.parent.mkdir()
    for name, architecture in (("tiny", TINY), ("deepgen-5b", DEEPGEN_5B)):
        config.write_text(json.dumps(dict(architecture.transformer)))
        check_width(name, tmp_path)
    with pytest.raises(
        UserError, match=r"model\.preset: got 'tiny', but the DiT in .* is 1536 wide; allowed.*: deepgen"
    ):
        check_width("tiny", tmp_path)
    config.write_text("{")
    with pytest.raises(UserError, match=r"model\.weights: .*config\.json is not the configuration of a DiT"):
        check_width("tiny", tmp_path)
