"""A LoRA in a peft folder of its own: of the DiT, as other RL trainers save it, or of the VLM."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from deepgen.errors import UserError
from deepgen.models.unified import UnifiedModel
from deepgen.models.vlm import lora_parameters
from deepgen.models.weights_io.layout_reader import read_weights
from deepgen.models.weights_io.layout_writer import Bases
from tests.models.test_layouts import adapted_model, convert, same, velocity

FILE = "adapter_model.safetensors"
ADAPTED = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "ff.net.2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "components"
    adapted_model().save_folder(path)
    return path


@pytest.fixture(scope="module")
def adapted(folder, tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """A folder with a nonzero LoRA on the DiT, written by peft, and the velocity of the model that it adapts."""
    model = UnifiedModel.from_folder(folder)
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights="gaussian", target_modules=ADAPTED)
    wrapped = get_peft_model(model.transformer, config)
    torch.manual_seed(2)
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    path = tmp_path_factory.mktemp("checkpoint-100") / "lora"
    wrapped.save_pretrained(str(path))
    return path, velocity(model.eval())


@pytest.fixture
def copied(adapted, tmp_path) -> Path:
    return Path(shutil.copytree(adapted[0], tmp_path / "checkpoint-100" / "lora"))


def change(folder: Path, **keys: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def rename(folder: Path, old: str, new: str) -> None:
    tensors = load_file(folder / FILE)
    save_file({name.replace(old, new): tensor for name, tensor in tensors.items()}, folder / FILE)


def transformer(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def test_a_lora_of_the_dit_is_merged(folder, adapted, tmp_path):
    lora, wanted = adapted
    out = UnifiedModel.from_folder(convert(lora, tmp_path / "out", bases=Bases(base=folder)))
    torch.testing.assert_close(velocity(out), wanted, rtol=1e-4, atol=1e-5)
    before = UnifiedModel.from_folder(folder)
    assert not torch.allclose(velocity(before), wanted, atol=1e-2)
    assert lora_parameters(out.vlm).keys() == lora_parameters(before.vlm).keys() != set()  # the base's own LoRA stays


@pytest.mark.parametrize("target", ["diffusers", "native"])
def test_other_layouts_get_it_merged_too(folder, adapted, tmp_path, target):
    exact = transformer(convert(adapted[0], tmp_path / "exact", bases=Bases(base=folder)))
    out = convert(adapted[0], tmp_path / "out", target, Bases(base=folder))
    tensors = transformer(out) if target == "diffusers" else load_file(out / "model.safetensors")
    found = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert all(torch.equal(found[name], exact[name]) for name in exact)


def test_it_is_merged_before_the_cast(folder, adapted, tmp_path):
    exact = transformer(convert(adapted[0], tmp_path / "fp32", bases=Bases(base=folder)))
    short = transformer(convert(adapted[0], tmp_path / "bf16", bases=Bases(base=folder), dtype="bf16"))
    assert all(torch.equal(short[name], exact[name].to(torch.bfloat16)) for name in exact)


def test_a_lora_of_a_wrapper_around_the_dit(folder, adapted, copied, tmp_path):
    rename(copied, "base_model.model.", "base_model.model.transformer.")
    out = convert(copied, tmp_path / "out", bases=Bases(base=folder))
    exact = transformer(convert(adapted[0], tmp_path / "exact", bases=Bases(base=folder)))
    assert all(torch.equal(tensor, exact[name]) for name, tensor in transformer(out).items())


def test_a_lora_of_the_vlm(folder, tmp_path):
    """It takes the place of the base's."""
    base = Path(shutil.copytree(folder, tmp_path / "base"))
    lora = base / "vlm_lora"
    tensors = load_file(lora / FILE)
    save_file({name: tensor * 0 for name, tensor in tensors.items()}, lora / FILE)
    out = convert(folder / "vlm_lora", tmp_path / "out", bases=Bases(base=base))
    assert same(UnifiedModel.from_folder(out), UnifiedModel.from_folder(folder))


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_rslora", True),
        ("rank_pattern", {"to_q": 1}),
        ("modules_to_save", ["proj_out"]),
        ("lora_bias", True),
        ("target_parameters", ["w"]),
        ("peft_type", "LOHA"),
        ("bias", "all"),
        ("init_lora_weights", "pissa"),  # the base has changed too
        ("init_lora_weights", "olora"),
        ("r", 8),
    ],
)
def test_what_is_no_plain_lora(copied, key, value):
    change(copied, **{key: value})
    with pytest.raises(UserError, match=rf"adapter_config\.json: {key} is .*(only plain LoRA can be read|have rank 4)"):
        read_weights(copied)


def test_a_lora_of_another_model(copied):
    rename(copied, "transformer_blocks", "single_transformer_blocks")
    with pytest.raises(
        UserError, match=r"tensors adapt no part of the model: base_model\.model\.single_.* a LoRA of the"
    ):
        read_weights(copied)


def test_a_lora_of_a_larger_dit(folder, copied, tmp_path):
    rename(copied, "transformer_blocks.1.", "transformer_blocks.7.")
    with pytest.raises(
        UserError, match=r"dit_lora: the weights do not fit the model; \d+ unexpected: transformer_blocks\.7"
    ):
        convert(copied, tmp_path / "out", bases=Bases(base=folder))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_half_of_a_pair(folder, copied, tmp_path, half):
    tensors = load_file(copied / FILE)
    name = next(name for name in tensors if half in name)
    save_file({other: tensor for other, tensor in tensors.items() if other != name}, copied / FILE)
    with pytest.raises(UserError, match=rf"dit_lora: the weights do not fit the model; 1 missing: .*{half}\.default"):
        convert(copied, tmp_path / "out", bases=Bases(base=folder))


def test_a_lora_of_a_convolution(folder, copied, tmp_path):
    tensors = load_file(copied / FILE)
    for letter in "AB":
        tensors[f"base_model.model.pos_embed.proj.lora_{letter}.weight"] = torch.ones(4, 4, 1, 1)
    save_file(tensors, copied / FILE)
    with pytest.raises(UserError, match=r"2 unexpected: pos_embed\.proj\.lora_A"):
        convert(copied, tmp_path / "out", bases=Bases(base=folder))


@pytest.mark.parametrize("prefix", ["transformer.", "module.transformer."])
def test_a_lora_without_its_alpha(copied, tmp_path, prefix):
    """As diffusers' LoRA loaders save it, or within the state of the whole model."""
    tensors = load_file(copied / FILE)
    save_file({name.replace("base_model.model.", prefix): t for name, t in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(
        UserError, match=r"a\.safetensors: 28 tensors are a LoRA of the DiT \(.*alpha is not there; give the"
    ):
        read_weights(tmp_path / "a.safetensors")


def test_the_file_without_its_folder(copied):
    with pytest.raises(
        UserError, match=r"belong to no part of the model: .*; a LoRA is read with its adapter_config\.json"
    ):
        read_weights(copied / FILE)


def test_one_folder_too_high(copied):
    with pytest.raises(UserError, match=r"checkpoint-100: not a checkpoint, but lora/ in it is one"):
        read_weights(copied.parent)


def test_values_that_become_too_large(folder, copied, tmp_path):
    tensors = load_file(copied / FILE)
    save_file({name: tensor * 1e5 for name, tensor in tensors.items()}, copied / FILE)
    with pytest.raises(
        UserError, match=r"transformer: merged transformer_blocks.* has values too large for torch\.float16"
    ):
        convert(copied, tmp_path / "out", bases=Bases(base=folder), dtype="fp16")
    assert not (tmp_path / "out").exists()
