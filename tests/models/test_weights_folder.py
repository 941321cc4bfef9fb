"""Component folders: loading returns the saved model, and errors name what does not fit."""

import json
import re
import shutil

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from deepgen.errors import UserError
from deepgen.models.unified import UnifiedModel
from deepgen.models.vlm import LoraSettings, add_lora, lora_parameters
from deepgen.models.weights_io.folder import save_lora, weights_checksum
from deepgen.models.weights_io.layout_reader import read_weights
from deepgen.models.weights_io.layout_writer import Bases, find_architecture
from tests.helpers.factories import make_tiny_folder, make_tiny_model


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return make_tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "model")


def edit(path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_round_trip(folder):
    model, wanted = UnifiedModel.from_folder(folder, preset="tiny"), make_tiny_model()
    assert weights_checksum(model.state_dict().items()) == weights_checksum(wanted.state_dict().items())
    assert model.architecture.bridge_config() == wanted.architecture.bridge_config()
    with torch.no_grad():
        assert torch.equal(model.encode_prompts(["a cat"]).context, wanted.encode_prompts(["a cat"]).context)


def test_other_libraries_open_the_folder(folder):
    SD3Transformer2DModel.from_pretrained(folder / "transformer")
    assert json.loads((folder / "transformer/config.json").read_text())["_class_name"] == "SD3Transformer2DModel"
    config = json.loads((folder / "vlm/config.json").read_text())
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "vlm")


def test_dtype(folder):
    model = UnifiedModel.from_folder(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        cond = model.encode_prompts(["a cat"])
        velocity = model.velocity(torch.randn(1, 8, 16, 16), torch.tensor([500.0]), cond)
    assert cond.context.dtype == torch.bfloat16
    assert isinstance(velocity, torch.Tensor)
    assert velocity.dtype == torch.float32


def test_lora_round_trip(folder, tmp_path):
    model = UnifiedModel.from_folder(folder, lora=LoraSettings(rank=4, alpha=8))
    for p in lora_parameters(model.vlm).values():
        torch.nn.init.normal_(p, std=0.1)
    model.save_folder(tmp_path / "saved")
    again = UnifiedModel.from_folder(tmp_path / "saved", lora=LoraSettings(rank=4, alpha=8, dropout=0.2))
    assert again.vlm.peft_config["default"].lora_dropout == 0.2  # from this training, not from the adapter's
    assert weights_checksum(again.state_dict().items()) == weights_checksum(model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model.encode_prompts(["a cat"]).context, again.encode_prompts(["a cat"]).context)
    with pytest.raises(UserError, match=r"model.lora_rank: 8 given, but the adapter in .* has rank 4"):
        UnifiedModel.from_folder(tmp_path / "saved", lora=LoraSettings(rank=8))
    with pytest.raises(UserError, match=r"model.lora_alpha: 16 given, but the adapter in .* has 8"):
        UnifiedModel.from_folder(tmp_path / "saved", lora=LoraSettings(rank=4, alpha=16))


def test_full_adapters_are_accepted(folder):
    """An adapter with 416 modules keeps its dead modules. They are loaded but never trained."""
    model = make_tiny_model()
    add_lora(model.vlm, LoraSettings(rank=2, modules="all"), model.architecture.fusion_layers[0])
    save_lora(model.vlm, folder / "vlm_lora")
    again = UnifiedModel.from_folder(folder)
    assert lora_parameters(again.vlm).keys() == lora_parameters(model.vlm).keys()
    trained = [name for name, _ in again.trainable_parameters("sft") if ".lora_" in name]
    assert len({name.split(".lora_")[0] for name in trained}) == 3 * 7 + 1


def test_truncated_lora_is_refused(folder, tmp_path):
    model = UnifiedModel.from_folder(folder, lora=LoraSettings(rank=4))
    model.save_folder(tmp_path / "saved")
    edit(tmp_path / "saved/vlm_lora/adapter_model.safetensors", lambda t: t.popitem())
    with pytest.raises(UserError, match="1 missing"):
        UnifiedModel.from_folder(tmp_path / "saved")


def test_missing_and_unexpected_tensors_are_named(folder):
    def change(tensors):
        tensors.pop("proj_out.bias")
        tensors["extra.weight"] = torch.zeros(2)

    edit(folder / "transformer/diffusion_pytorch_model.safetensors", change)
    with pytest.raises(UserError, match=r"transformer: .* 1 missing: proj_out.bias; 1 unexpected: extra.weight"):
        UnifiedModel.from_folder(folder)


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("vlm/model.safetensors", "model.language_model.layers.0.mlp.up_proj.weight"),
        ("transformer/diffusion_pytorch_model.safetensors", "context_embedder.weight"),
        ("vae/diffusion_pytorch_model.safetensors", "encoder.conv_in.weight"),
        ("bridge/bridge.safetensors", "projector_1.weight"),
    ],
)
def test_mis_shaped_tensors_are_named(folder, file, key):
    edit(folder / file, lambda tensors: tensors.update({key: torch.zeros(7, 5)}))
    with pytest.raises(UserError, match=rf"1 mis-shaped: {key} \(\(7, 5\) in the file, \("):
        UnifiedModel.from_folder(folder)


def test_vlm_missing_tensors_are_named(folder):
    edit(folder / "vlm/model.safetensors", lambda t: [t.pop(k) for k in list(t) if "visual.blocks.0" in k])
    with pytest.raises(UserError, match=r"vlm: .* missing: model.visual.blocks.0.*, …"):
        UnifiedModel.from_folder(folder)


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("vlm/config.json", "vlm/config.json does not exist"),
        ("vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors does not exist"),
        ("bridge/bridge.safetensors", "bridge.safetensors does not exist"),
        ("tokenizer/tokenizer_config.json", "tokenizer_config.json does not exist"),
    ],
)
def test_absent_files_are_named(folder, gone, message):
    (folder / gone).unlink()
    with pytest.raises(UserError, match=re.escape(message)):
        UnifiedModel.from_folder(folder)


def test_absent_shard(folder):
    transformer = UnifiedModel.from_folder(folder).transformer
    (folder / "transformer/diffusion_pytorch_model.safetensors").unlink()
    transformer.save_pretrained(folder / "transformer", max_shard_size="100KB")
    UnifiedModel.from_folder(folder)
    next(folder.glob("transformer/*-00002-of-*.safetensors")).unlink()
    with pytest.raises(UserError, match=r"-00002-of-\d+\.safetensors does not exist"):
        UnifiedModel.from_folder(folder)


def test_absent_folder(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        UnifiedModel.from_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("file", ["bridge/bridge.safetensors", "transformer/diffusion_pytorch_model.safetensors"])
def test_damaged_weights(folder, file):
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="damaged weights file"):
        UnifiedModel.from_folder(folder)


def test_damaged_config(folder):
    (folder / "vae/config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not JSON"):
        UnifiedModel.from_folder(folder)


def read_to_load(folder) -> None:
    UnifiedModel.from_folder(folder)


def read_to_convert(folder) -> None:
    find_architecture(read_weights(folder), Bases(), "tiny")


@pytest.mark.parametrize("read", [read_to_load, read_to_convert])
@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl", "llava", "gemma3", "internvl", "mllama", "paligemma"])
def test_a_foreign_vlm(folder, read, kind):
    (folder / "vlm/config.json").write_text(AutoConfig.for_model(kind).to_json_string(use_diff=False))
    with pytest.raises(UserError, match=rf"vlm/config\.json: model_type is '{kind}', expected 'qwen2_5_vl'"):
        read(folder)


@pytest.mark.parametrize("read", [read_to_load, read_to_convert])
@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("vlm", {"model_type": None}, "model_type is None, expected 'qwen2_5_vl'"),
        ("vlm", {"text_config": []}, "no vlm has this configuration"),
        ("vlm", {"vision_config": {"depth": "x"}}, "no vlm has this configuration"),
        ("vlm", {"dtype": "float12"}, "no vlm has this configuration"),
        ("transformer", {"num_single_layers": 38, "guidance_embeds": True}, "no transformer has this configuration"),
        ("transformer", {"in_channels": None}, "no transformer has this configuration"),
        ("vae", {"base_dim": 96}, "no vae has this configuration"),
        ("bridge", {"num_queries": "4"}, "num_queries is '4', expected a whole number from 1 on"),
        ("bridge", {"hidden_size": 4}, "'hidden_size' is no size of the bridge"),
    ],
)
def test_configurations_of_nothing_we_know(folder, read, part, changes, message):
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=rf"{part}/config\.json: {message}"):
        read(folder)


def test_preset_mismatch_is_one_clear_line(folder):
    with pytest.raises(UserError) as caught:
        UnifiedModel.from_folder(folder, preset="deepgen-5b")
    assert "does not hold a 'deepgen-5b' model" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_5b_folder_as_tiny_needs_no_weights_to_be_refused(folder):
    config = json.loads((folder / "vlm/config.json").read_text())
    config["text_config"]["hidden_size"] = 2048
    (folder / "vlm/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not hold a 'tiny' model"):
        UnifiedModel.from_folder(folder, preset="tiny")


def test_fresh_bridge(folder):
    """Base weights without a bridge can start pretraining with fresh_bridge; without that setting they are rejected."""
    kept = UnifiedModel.from_folder(folder, fresh_bridge=True)
    assert not kept.projector_3.weight.any()
    shutil.rmtree(folder / "bridge")
    with pytest.raises(UserError, match=r"bridge/config\.json does not exist"):
        UnifiedModel.from_folder(folder)
    model = UnifiedModel.from_folder(folder, fresh_bridge=True, preset="tiny")
    assert model.meta_queries.shape[0] == 16


def test_checksum_sees_names_values_and_nothing_else():
    a, b = torch.randn(3, 4), torch.randn(2).to(torch.bfloat16)
    base = weights_checksum([("a", a), ("b", b)])
    assert base == weights_checksum([("b", b.clone()), ("a", a.t().contiguous().t())])
    assert base != weights_checksum([("a", a), ("c", b)])
    changed = a.clone()
    changed[0, 0] = torch.nextafter(changed[0, 0], torch.tensor(9.0))
    assert base != weights_checksum([("a", changed), ("b", b)])
    assert weights_checksum([("s", torch.tensor(1.0))]) != weights_checksum([("s", torch.tensor([1.0]))])
