"""Checkpoints of every published layout: reading, writing, and rejected files."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from pickle import UnpicklingError

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum
from safetensors.torch import load_file, save_file

from deepgen.errors import UserError
from deepgen.models.unified import UnifiedModel
from deepgen.models.vlm import LoraSettings, add_lora, lora_parameters
from deepgen.models.weights_io.layout_reader import read_weights
from deepgen.models.weights_io.layout_writer import Bases, check_weights, complete, find_architecture, write
from deepgen.models.weights_io.tensor_files import _only_tensors
from stages import export
from tests.helpers.deepspeed_writer import write_deepspeed
from tests.helpers.factories import make_tiny_model

ROOT = Path(__file__).resolve().parents[2]


def adapted_model(alpha: float = 8) -> UnifiedModel:
    """A model as after stage 2, with a nonzero LoRA on every module."""
    model = make_tiny_model()
    settings = LoraSettings(rank=4, alpha=alpha, dropout=0.0, modules="all")
    add_lora(model.vlm, settings, model.architecture.fusion_layers[0])
    torch.manual_seed(1)
    for parameter in lora_parameters(model.vlm).values():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return adapted_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "components"
    model.save_folder(path)
    return path


@pytest.fixture(scope="module")
def bases(folder, tmp_path_factory):
    """Public base weights: a VLM folder and a DiT folder, without bridge and LoRA."""
    path = tmp_path_factory.mktemp("bases")
    shutil.copytree(folder / "vlm", path / "vlm")
    for part in ("transformer", "vae"):
        shutil.copytree(folder / part, path / "dit" / part)
    return path


def native_state(model, layout: str = "new", *, lora: bool = True, frozen: bool = False) -> dict[str, torch.Tensor]:
    """A state dict as the published training code writes it (M6.2), under transformers of either layout."""
    state = {name: t.clone() for name, t in model.bridge_state().items()}
    state |= {f"transformer.{name}": t.clone() for name, t in model.transformer.state_dict().items()}
    for name, tensor in model.vlm.state_dict().items():
        if (".lora_" in name and lora) or (".lora_" not in name and frozen):
            if layout == "old":
                name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
            state[f"lmm.{name}"] = tensor.clone()
    return state


def convert(source: Path, out: Path, target: str = "components", bases: Bases | None = None, **options) -> Path:
    bases = bases or Bases()
    weights = complete(read_weights(source), bases, without_lora=options.get("without_lora", False))
    architecture = find_architecture(weights, bases, "tiny")
    check_weights(weights, architecture)
    write(weights, architecture, bases, target, out, options.get("dtype", "keep"))
    return out


@torch.no_grad()
def velocity(model: UnifiedModel) -> torch.Tensor:
    image = torch.linspace(-1, 1, 3 * 64 * 64).reshape(3, 64, 64)
    cond = model.encode_prompts(["a red cat", "make it blue"], [[], [image]])
    latents = torch.linspace(-2, 2, 2 * 8 * 16 * 16).reshape(2, 8, 16, 16)
    result = model.velocity(latents, torch.tensor([300.0, 700.0]), cond, [[], model.encode_images([image])])
    assert isinstance(result, torch.Tensor)
    return result


def same(a: UnifiedModel, b: UnifiedModel) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


@pytest.mark.parametrize("transformers", ["new", "old"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_native_files_of_both_vlm_layouts(model, folder, tmp_path, transformers, wrapped):
    state = native_state(model, transformers)
    content = {"state_dict": state, "meta": {"iter": 3}} if wrapped else state
    torch.save(content, tmp_path / "model.pth", _use_new_zipfile_serialization=wrapped)  # False: as torch before 1.6
    out = convert(tmp_path / "model.pth", tmp_path / "out", bases=Bases(base=folder))
    assert same(UnifiedModel.from_folder(out), UnifiedModel.from_folder(folder))


def test_every_layout_comes_back_to_the_bit(model, folder, tmp_path):
    """components -> native -> components, with LoRA, keeps values, names and adapter scale."""
    native = convert(folder, tmp_path / "native", "native")
    names = set(load_file(native / "model.safetensors"))
    assert "meta_queries" in names
    assert "lmm.model.language_model.layers.0.self_attn.q_proj.lora_A.default.weight" in names
    again = UnifiedModel.from_folder(convert(native, tmp_path / "again", bases=Bases(base=folder)))
    assert same(again, UnifiedModel.from_folder(folder))
    assert torch.equal(velocity(again), velocity(UnifiedModel.from_folder(folder)))


def test_diffusers_folder_has_the_lora_merged(model, folder, tmp_path):
    out = convert(folder, tmp_path / "diffusers", "diffusers")
    assert {path.name for path in out.iterdir()} == {
        *("connector", "model_index.json", "pipeline.py", "scheduler", "tokenizer", "transformer", "vae", "vlm")
    }
    assert not any("lora" in name for name in load_file(out / "vlm" / "model.safetensors"))
    merged = UnifiedModel.from_folder(convert(out, tmp_path / "merged"))
    assert not lora_parameters(merged.vlm)
    torch.testing.assert_close(velocity(merged), velocity(UnifiedModel.from_folder(folder)), rtol=1e-4, atol=1e-5)
    assert same(UnifiedModel.from_folder(convert(merged_again(out, tmp_path), tmp_path / "third")), merged)


def merged_again(out: Path, tmp_path: Path) -> Path:
    """diffusers -> native (the merged VLM goes along) -> diffusers."""
    native = convert(out, tmp_path / "native-merged", "native")
    weights_folder = convert(native, tmp_path / "back", "components", Bases(base=tmp_path / "merged"))
    return convert(weights_folder, tmp_path / "diffusers-again", "diffusers")


def test_sharded_safetensors_are_read_whole(model, folder, tmp_path):
    state, path = native_state(model), tmp_path / "rl"
    path.mkdir()
    names = sorted(state)
    save_file({name: state[name] for name in names[::2]}, path / "model-00001-of-00002.safetensors")
    save_file({name: state[name] for name in names[1::2]}, path / "model-00002-of-00002.safetensors")
    out = convert(path, tmp_path / "out", bases=Bases(base=folder))
    assert same(UnifiedModel.from_folder(out), UnifiedModel.from_folder(folder))


def test_bases_as_published(model, folder, bases, tmp_path):
    """A native file and the two public folders. The bridge's sizes come from the preset."""
    torch.save(native_state(model), tmp_path / "sft.pt")
    where = Bases(vlm=bases / "vlm", dit=bases / "dit")
    weights = complete(read_weights(tmp_path / "sft.pt"), where, without_lora=False)
    with pytest.raises(UserError, match=r"bridge: the weights do not fit the model; .* mis-shaped"):
        check_weights(weights, find_architecture(weights, where, "tiny"))  # these test weights are narrower than tiny


def test_missing_lora_is_an_error(model, folder, bases, tmp_path):
    torch.save(native_state(model, lora=False), tmp_path / "rl.pt")
    where = Bases(vlm=bases / "vlm", dit=bases / "dit")
    with pytest.raises(UserError, match=r"rl.pt: no LoRA in it and no merged VLM.*--without-lora"):
        convert(tmp_path / "rl.pt", tmp_path / "out", bases=where)
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_named(model, folder, tmp_path):
    state = native_state(model)
    state["transformer.proj_out.weight"] = state["transformer.proj_out.weight"][:-1]
    del state["transformer.proj_out.bias"]
    state["transformer.new_thing"] = torch.zeros(1)
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(UserError) as error:
        convert(tmp_path / "bad.pt", tmp_path / "out", bases=Bases(base=folder))
    text = str(error.value)
    assert re.search(r"transformer: .*1 missing: proj_out.bias; 1 unexpected: new_thing; 1 mis-shaped: proj_out", text)


def test_code_in_a_pickle_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    torch.save({"state_dict": {"meta_queries": Bomb()}}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match=r"evil\.pt: not a file of weights"):
        read_weights(tmp_path / "evil.pt")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.safetensors", b"\x00" * 20, "damaged weights file"),
        ("cut.pt", b"PK\x03\x04 no archive", "not a file of weights"),
        ("notes.txt", b"hello", "ends in .pt"),
    ],
)
def test_damaged_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_weights(tmp_path / name)


@pytest.mark.processes
def test_export_program(folder, tmp_path, monkeypatch):
    command = [sys.executable, str(ROOT / "stages/export.py"), str(folder), str(tmp_path / "out"), "--dtype", "bf16"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "LoRA of rank 4" in done.stdout
    tensors = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    monkeypatch.setattr(sys, "argv", command[1:])
    with pytest.raises(UserError, match=r"^.*exists already.*$"):
        export.main()


def test_large_parts_are_sharded(folder, tmp_path, monkeypatch):
    from deepgen.models.weights_io import layout_writer as export

    monkeypatch.setattr(export, "MAX_SHARD", "50KB")
    out = convert(folder, tmp_path / "out")
    index = json.loads((out / "vlm" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert same(UnifiedModel.from_folder(out), UnifiedModel.from_folder(folder))


@pytest.mark.processes
@pytest.mark.parametrize(("stage", "world"), [(0, 2), (1, 2), (2, 2), (3, 2)])
def test_deepspeed_folders(tmp_path, stage, world):
    """Two workers' folders give bit-identical fp32 masters (ZeRO 0: the weights), by the folder *.pth or its parent."""
    write_deepspeed(tmp_path, stage, world)
    truth = load_file(tmp_path / "truth.safetensors")
    for path in (tmp_path, tmp_path / "iter_3.pth"):
        weights = read_weights(path)
        assert weights.layout == "deepspeed"
        found = weights.bridge | {f"transformer.{name}": t for name, t in weights.transformer.items()}
        assert found.keys() == truth.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor.read().float(), truth[name]), name


class Looked:
    """Pickles as getattr(ZeroStageEnum, name), as Python 3.11.2 pickles a member of an enum."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self):
        return getattr, (ZeroStageEnum, self.name)


def test_only_zero_stages_can_be_looked_up(tmp_path):
    """The enum is readable whichever Python wrote the DeepSpeed folder, and getattr works for nothing else."""
    torch.save({"zero_stage": Looked("weights")}, tmp_path / "good.pt")
    torch.save({"zero_stage": Looked("__class__")}, tmp_path / "bad.pt")
    with _only_tensors():
        assert torch.load(tmp_path / "good.pt") == {"zero_stage": ZeroStageEnum.weights}
        with pytest.raises(UnpicklingError, match="getattr of '__class__' is not allowed"):
            torch.load(tmp_path / "bad.pt")
