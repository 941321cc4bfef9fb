"""Checkpoints as found in practice: logs beside the tensors, odd names, damaged files, parts in other folders."""

import json
import math
import os
import resource
import shutil
import subprocess
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deepgen.errors import UserError
from deepgen.models.unified import UnifiedModel
from deepgen.models.weights_io import layout_writer as export
from deepgen.models.weights_io.layout_reader import read_weights
from deepgen.models.weights_io.layout_writer import Bases
from deepgen.models.weights_io.tensor_files import _only_tensors, read_deepspeed
from tests.models.test_layouts import ROOT, adapted_model, convert, native_state, same, velocity

ALPHA = 9.5


@pytest.fixture(scope="module")
def model():
    return adapted_model(alpha=ALPHA)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "components"
    model.save_folder(path)
    return path


@pytest.fixture
def copied(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copied"))


def native(model, tmp_path: Path, *, lora: bool = True) -> Path:
    """A .safetensors file as the published training code writes it, without alpha."""
    save_file(native_state(model, lora=lora), tmp_path / "native.safetensors")
    return tmp_path / "native.safetensors"


def alpha_of(folder: Path) -> float:
    return json.loads((folder / "vlm_lora" / "adapter_config.json").read_text())["lora_alpha"]


def change(path: Path, **keys: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


# ---------------------------------------------------------------- what stands beside the tensors


@pytest.fixture
def message_hub(monkeypatch):
    """A pickle like that of mmengine's `message_hub`. mmengine itself is not importable when the file is read."""

    class HistoryBuffer:
        def __init__(self) -> None:
            self._log_history, self._count_history = np.array([1.0, 2.0]), np.array([1, 1])

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = "mmengine.logging.history_buffer", "HistoryBuffer"
    for name in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules["mmengine.logging.history_buffer"], "HistoryBuffer", HistoryBuffer, raising=False)
    return {"log_scalars": OrderedDict({"train/loss": HistoryBuffer()}), "seed": np.int64(5)}


def test_logs_and_numpy_values_are_passed_over(tmp_path, message_hub):
    content = {"state_dict": {"meta_queries": torch.ones(2, 3)}, "message_hub": message_hub, "meta": {"iter": 3}}
    torch.save(content, tmp_path / "iter_3.pth")
    assert torch.equal(read_weights(tmp_path / "iter_3.pth").bridge["meta_queries"].read(), torch.ones(2, 3))
    with _only_tensors():  # as DeepSpeed's tool reads its files
        assert torch.load(tmp_path / "iter_3.pth")["meta"] == {"iter": 3}


def test_a_numpy_array_is_no_tensor(tmp_path):
    torch.save({"meta_queries": np.ones(3)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: 'meta_queries' is a _NotATensor, expected tensors by name"):
        read_weights(tmp_path / "a.pt")


# ---------------------------------------------------------------- LoRA


def test_alpha_goes_along(folder, tmp_path):
    """components -> components and components -> native -> components; in a native file only metadata holds alpha."""
    assert alpha_of(convert(folder, tmp_path / "again")) == ALPHA
    out = convert(folder, tmp_path / "native", "native")
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata()["lora_alpha"] == "9.5"
    back = convert(out, tmp_path / "back", bases=Bases(base=folder))
    assert alpha_of(back) == ALPHA
    assert same(UnifiedModel.from_folder(back), UnifiedModel.from_folder(folder))


def test_alpha_is_twice_the_rank_where_nothing_says_it(model, folder, tmp_path):
    path = native(model, tmp_path)
    assert alpha_of(convert(path, tmp_path / "out", bases=Bases(base=folder))) == 8
    save_file(native_state(model), path, metadata={"lora_alpha": "much"})
    with pytest.raises(UserError, match="lora_alpha in its metadata is 'much', expected a number"):
        read_weights(path)


def test_the_lora_comes_with_the_vlm_of_the_base(model, folder, tmp_path):
    """An RL checkpoint holds no LoRA; it uses the LoRA of the SFT weights."""
    path = native(model, tmp_path, lora=False)
    out = convert(path, tmp_path / "out", bases=Bases(base=folder))
    assert alpha_of(out) == ALPHA
    assert same(UnifiedModel.from_folder(out), UnifiedModel.from_folder(folder))
    with pytest.raises(UserError, match=r"--without-lora: .*vlm_lora is the LoRA of the VLM taken from --base"):
        convert(path, tmp_path / "bare", bases=Bases(base=folder), without_lora=True)
    with pytest.raises(UserError, match="no LoRA in it"):  # a different VLM was given
        convert(path, tmp_path / "bare", bases=Bases(base=folder, vlm=folder / "vlm"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_rslora", True),
        ("use_dora", True),
        ("alpha_pattern", {"q_proj": 1}),
        ("rank_pattern", {"q_proj": 1}),
        ("fan_in_fan_out", True),
    ],
)
def test_other_kinds_of_lora_are_refused(copied, key, value):
    change(copied / "vlm_lora" / "adapter_config.json", **{key: value})
    with pytest.raises(UserError, match=rf"adapter_config\.json: {key} is .*only plain LoRA"):
        read_weights(copied)


def test_half_of_a_lora(model, folder, tmp_path):
    state = {name: t for name, t in native_state(model).items() if "lora_A" not in name and "embedding_A" not in name}
    save_file(state, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=r"lora_B\.default\.weight has no lora_A beside it"):
        convert(tmp_path / "b.safetensors", tmp_path / "out", bases=Bases(base=folder))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_lora_is_merged_before_the_cast(folder, tmp_path, dtype):
    exact = load_file(convert(folder, tmp_path / "fp32", "diffusers") / "vlm" / "model.safetensors")
    short = load_file(convert(folder, tmp_path / dtype, "diffusers", dtype=dtype) / "vlm" / "model.safetensors")
    assert all(torch.equal(short[name], exact[name].to(export.DTYPES[dtype])) for name in exact)


@pytest.mark.parametrize("shard", ["5GB", "50KB"])
def test_a_merged_vlm_in_native_files_is_known(folder, tmp_path, monkeypatch, shard):
    """The base has a LoRA, which is in the VLM already."""
    monkeypatch.setattr(export, "MAX_SHARD", shard)
    merged = convert(folder, tmp_path / "diffusers", "diffusers")
    native = convert(merged, tmp_path / "native", "native")
    back = convert(native, tmp_path / "back", bases=Bases(base=folder))
    assert not (back / "vlm_lora").exists()
    assert same(UnifiedModel.from_folder(back), UnifiedModel.from_folder(convert(merged, tmp_path / "other")))


def test_a_vlm_without_a_word_about_its_lora(folder, tmp_path):
    """The same tensors may be those of a trainer that saved the frozen VLM and no LoRA."""
    native = convert(convert(folder, tmp_path / "diffusers", "diffusers"), tmp_path / "native", "native")
    save_file(load_file(native / "model.safetensors"), tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match=r"bare\.safetensors: no LoRA in it and no merged VLM.*--without-lora"):
        convert(tmp_path / "bare.safetensors", tmp_path / "out", bases=Bases(base=folder))
    convert(tmp_path / "bare.safetensors", tmp_path / "out", bases=Bases(base=folder), without_lora=True)


# ---------------------------------------------------------------- names and types


@pytest.mark.parametrize("prefix", ["module.", "model.", "module.model."])
def test_prefixes_of_wrappers_are_taken_off(model, tmp_path, prefix):
    state = native_state(model)
    save_file({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "a.safetensors")
    save_file(state, tmp_path / "b.safetensors")
    a, b = read_weights(tmp_path / "a.safetensors"), read_weights(tmp_path / "b.safetensors")
    for part in ("bridge", "transformer", "lora"):
        assert getattr(a, part).keys() == getattr(b, part).keys() != set()


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("transformer.x", "module.transformer.x"),
        ("lmm.model.language_model.norm.weight", "lmm.model.norm.weight"),
    ],
)
def test_two_names_of_one_tensor(tmp_path, one, two):
    torch.save({one: torch.zeros(1), two: torch.ones(1)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=f"{one} and {two} are two names of one tensor"):
        read_weights(tmp_path / "a.pt")


def test_integer_weights_are_refused(model, folder, tmp_path):
    state = native_state(model)
    state["transformer.proj_out.bias"] = state["transformer.proj_out.bias"].to(torch.int8)
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"proj_out\.bias is torch\.int8, expected floating-point weights"):
        convert(tmp_path / "a.pt", tmp_path / "out", bases=Bases(base=folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.to(torch.float8_e4m3fn), r"is torch\.float8_e4m3fn; known: torch\.float64, torch\.float32, "),
        (lambda t: t.to(torch.float8_e5m2), r"is torch\.float8_e5m2; known: "),
        (lambda t: t.to_sparse(), r"is a tensor of layout torch\.sparse_coo; allowed: dense tensors"),
        (lambda t: t.to("meta"), r"is a meta tensor, which has no values; allowed: dense tensors"),
    ],
)
def test_tensors_that_cannot_be_read_as_they_are(tmp_path, change, message):
    torch.save({"transformer.a": change(torch.ones(2, 2))}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=rf"a\.pt: transformer\.a {message}"):
        read_weights(tmp_path / "a.pt")


def test_values_too_large_for_fp16(model, folder, tmp_path):
    state = native_state(model)
    state["transformer.proj_out.bias"][0] = 1e6
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"transformer: proj_out\.bias has values too large for torch\.float16"):
        convert(tmp_path / "a.pt", tmp_path / "out", bases=Bases(base=folder), dtype="fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    convert(tmp_path / "a.pt", tmp_path / "out", bases=Bases(base=folder), dtype="bf16")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_not_exported(model, folder, tmp_path, value):
    state = native_state(model)
    state["transformer.proj_out.bias"][0] = value
    torch.save(state, tmp_path / "a.pt")
    for target in ("components", "native"):
        with pytest.raises(UserError, match=r"^\S+: (transformer\.)?proj_out\.bias is not finite"):
            convert(tmp_path / "a.pt", tmp_path / "out", target, bases=Bases(base=folder))
        assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- tensors that share memory


def with_the_vlm(model) -> dict[str, torch.Tensor]:
    """A state dict with the VLM in it, whose head is the embedding, as in Qwen2.5-VL-3B."""
    state = native_state(model, frozen=True)
    state["lmm.lm_head.base_layer.weight"] = state["lmm.model.language_model.embed_tokens.base_layer.weight"]
    return state


@pytest.mark.parametrize(("target", "tied"), [("components", True), ("diffusers", False)])
def test_a_head_that_shares_its_storage_with_the_embedding(model, copied, tmp_path, target, tied):
    """It is written once, unless merging the LoRA gives each of the two a delta of its own."""
    change(copied / "vlm_lora" / "adapter_config.json", lora_alpha=8)  # as read from a file without alpha
    torch.save(with_the_vlm(model), tmp_path / "tied.pt")
    out = convert(tmp_path / "tied.pt", tmp_path / "out", target, Bases(base=copied))
    assert ("lm_head.weight" in load_file(out / "vlm" / "model.safetensors")) == (not tied)
    assert json.loads((out / "vlm" / "config.json").read_text())["tie_word_embeddings"] == tied
    opened = UnifiedModel.from_folder(convert(out, tmp_path / "opened"))
    torch.testing.assert_close(velocity(opened), velocity(UnifiedModel.from_folder(copied)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_equal_to_the_embedding_is_written_once(model, copied, tmp_path, tied):
    """The same in a .safetensors file, where nothing is shared: values tell, not what config.json says."""
    change(copied / "vlm" / "config.json", tie_word_embeddings=tied)
    path = copied / "vlm" / "model.safetensors"
    state = load_file(path)
    state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"].clone()
    save_file(state, path)
    out = convert(copied, tmp_path / "out")
    assert load_file(out / "vlm" / "model.safetensors").keys() == state.keys() - {"lm_head.weight"}
    assert torch.equal(velocity(UnifiedModel.from_folder(out)), velocity(UnifiedModel.from_folder(copied)))


def test_a_head_of_its_own_is_kept(folder, tmp_path):
    out = convert(folder, tmp_path / "out")
    assert "lm_head.weight" in load_file(out / "vlm" / "model.safetensors")
    assert json.loads((out / "vlm" / "config.json").read_text())["tie_word_embeddings"] is False


def test_tensors_that_are_views_of_one_buffer(model, folder, tmp_path):
    """As optimizers with flat buffers leave them; two of them overlap."""
    state = native_state(model)
    bias, weight = state["transformer.proj_out.bias"], state["transformer.proj_out.weight"]
    flat = torch.cat([bias, weight.flatten()])
    state["transformer.proj_out.bias"] = flat[: bias.numel()]
    state["transformer.proj_out.weight"] = flat[: weight.numel()].view(weight.shape)
    torch.save(state, tmp_path / "flat.pt")
    out = convert(tmp_path / "flat.pt", tmp_path / "out", bases=Bases(base=folder))
    written = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
    for name in ("proj_out.bias", "proj_out.weight"):
        assert torch.equal(written[name], state[f"transformer.{name}"])


# ---------------------------------------------------------------- parts that lie elsewhere


@pytest.mark.parametrize("part", ["vae", "transformer", "vlm"])
def test_a_folder_without_a_part_is_completed(folder, copied, tmp_path, part):
    shutil.rmtree(copied / part)
    with pytest.raises(UserError, match=f"no {part} in it; give a folder that has one"):
        convert(copied, tmp_path / "out")
    out = convert(copied, tmp_path / "out", bases=Bases(vlm=folder / "vlm", dit=folder))
    assert same(UnifiedModel.from_folder(out), UnifiedModel.from_folder(folder))


def test_a_published_vlm_is_not_taken_for_a_merged_one(folder, tmp_path):
    merged = convert(folder, tmp_path / "diffusers", "diffusers")
    shutil.rmtree(merged / "vlm")
    with pytest.raises(UserError, match="no LoRA in it and no merged VLM"):
        convert(merged, tmp_path / "out", bases=Bases(vlm=folder / "vlm"))


@pytest.mark.parametrize("option", ["base", "vlm", "dit"])
def test_bases_that_are_not_there(folder, tmp_path, option):
    with pytest.raises(UserError, match=f"--{option}: .*nothing does not exist"):
        convert(folder, tmp_path / "out", bases=Bases(**{option: tmp_path / "nothing"}))


def test_only_the_tokenizer_is_copied(folder, copied, tmp_path):
    """The source is a folder as `hf download --local-dir` leaves it."""
    vlm = copied / "vlm"
    (vlm / ".cache" / "huggingface" / "download").mkdir(parents=True)
    wanted = {*(file.name for file in (folder / "tokenizer").iterdir()), "chat_template.json", "merges.txt"}
    wanted |= {"preprocessor_config.json", "vocab.json"}
    for name in (*wanted, "README.md", "LICENSE", ".gitattributes", "pytorch_model.bin", "generation_config.json"):
        if not (vlm / name).exists():
            (vlm / name).write_text("{}")
    shutil.rmtree(copied / "tokenizer")
    out = convert(copied, tmp_path / "out")
    assert {path.name for path in (out / "tokenizer").iterdir()} == wanted
    assert {path.name for path in (out / "vlm").iterdir()} == wanted | {"config.json", "model.safetensors"}


def test_no_tokenizer_is_said_before_anything_is_written(copied, tmp_path, monkeypatch):
    shutil.rmtree(copied / "tokenizer")
    (copied / "vlm" / "tokenizer_config.json").unlink()
    monkeypatch.setattr(export, "save_file", lambda *_, **__: pytest.fail("written before the tokenizer was found"))
    with pytest.raises(UserError, match="no tokenizer in it"):
        convert(copied, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["copied"]


# ---------------------------------------------------------------- damaged files


@pytest.mark.parametrize("content", [b"hello world\n" * 50, b"<html>", b""])
def test_a_page_of_text_named_pt(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.pt: not a file of weights"):
        read_weights(tmp_path / "a.pt")


def test_names_that_are_no_text(tmp_path):
    torch.save({"meta_queries": torch.zeros(2), 3: torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: 3 is the name of a Tensor"):
        read_weights(tmp_path / "a.pt")


@pytest.mark.parametrize("content", [None, [1], {"a": 1}])
def test_damaged_deepspeed_files(tmp_path, monkeypatch, content):
    step = tmp_path / "step"
    step.mkdir()
    torch.save({"optimizer_state_dict": {}}, step / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    path = step / "mp_rank_00_model_states.pt"
    path.write_bytes(b"") if content is None else torch.save(content, path)
    with pytest.raises(UserError, match="step: DeepSpeed cannot put this checkpoint together"):
        read_weights(step)
    monkeypatch.chdir(step)
    with pytest.raises(UserError, match=r"^\.: DeepSpeed cannot put this checkpoint together"):
        read_weights(Path())


def test_zero_0_of_a_model_that_is_split(tmp_path):
    """Tensor parallelism has a file for each part, and only the training code knows how they go together."""
    for rank in range(2):
        path = tmp_path / "step" / f"mp_rank_0{rank}_model_states.pt"
        path.parent.mkdir(exist_ok=True)
        torch.save({"module": {"meta_queries": torch.ones(2, 3)}, "param_shapes": None}, path)
    with pytest.raises(UserError, match=r"its model is split over 2 files, as mp_rank_01_model_states\.pt"):
        read_weights(tmp_path / "step")


def test_a_deepspeed_folder_whose_partitions_were_removed(tmp_path):
    """The module of ZeRO 1 and 2 is rounded, so it does not stand in for them."""
    content = {"module": {"meta_queries": torch.ones(2, 3)}, "param_shapes": [{"meta_queries": torch.Size([2, 3])}]}
    (tmp_path / "step").mkdir()
    torch.save(content, tmp_path / "step" / "mp_rank_00_model_states.pt")
    with pytest.raises(UserError, match=r"step: DeepSpeed cannot put this checkpoint together"):
        read_weights(tmp_path / "step")


def test_a_deepspeed_folder_is_found_from_within(tmp_path, monkeypatch):
    seen: dict[str, str | None] = {}

    def gather(folder: str, tag: str | None, lazy_mode: bool) -> dict[str, torch.Tensor]:
        seen.update(folder=folder, tag=tag)
        return {}

    monkeypatch.setattr("deepspeed.utils.zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint", gather)
    (tmp_path / "iter_3.pth").mkdir()
    monkeypatch.chdir(tmp_path / "iter_3.pth")
    assert read_deepspeed(Path()) == {}
    assert seen == {"folder": str(tmp_path), "tag": "iter_3.pth"}


@pytest.mark.parametrize(
    "content",
    [
        *("", "{}", "[]", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": ""}}'),
        *('{"weight_map": {"a": "../vae/x.safetensors"}}', '{"weight_map": {"a": "/etc/x.safetensors"}}'),
    ],
)
def test_damaged_index(copied, content):
    (copied / "vlm" / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json: "):
        read_weights(copied)


def test_a_folder_named_safetensors(copied):
    (copied / "vae" / "x.safetensors").mkdir()
    with pytest.raises(UserError, match=r"x\.safetensors: cannot be read"):
        read_weights(copied)


@pytest.mark.parametrize("content", ["{}", "[]", '{"lora_alpha": "8"}'])
def test_damaged_adapter_config(copied, content):
    (copied / "vlm_lora" / "adapter_config.json").write_text(content)
    with pytest.raises(UserError, match=r"adapter_config\.json: (lora_alpha is|holds a list)"):
        read_weights(copied)


@pytest.mark.parametrize(
    ("part", "keys", "message"),
    [
        (
            "bridge",
            {"num_queries": 4, "hidden_size": 8},
            "'hidden_size' is no size of the bridge; known: num_queries, ",
        ),
        ("bridge", {"num_queries": "4"}, "num_queries is '4', expected a whole number"),
        ("transformer", {"new_option": 1}, "new_option"),
        ("transformer", {"num_layers": "x"}, "no transformer has this configuration"),
        ("vae", {"new_option": 1}, "new_option"),
        ("vae", {"block_out_channels": 3}, "no vae has this configuration"),
        ("vlm", {"text_config": 3}, "no vlm has this configuration"),
    ],
)
def test_configurations_of_no_model(copied, tmp_path, part, keys, message):
    change(copied / part / "config.json", **keys)
    with pytest.raises(UserError, match=rf"{part}/config\.json: .*{message}"):
        convert(copied, tmp_path / "out")


@pytest.mark.parametrize("part", ["bridge", "transformer", "vae", "vlm"])
def test_configurations_that_are_lists(copied, tmp_path, part):
    (copied / part / "config.json").write_text("[]")
    with pytest.raises(UserError, match=rf"{part}/config\.json: holds a list, expected an object"):
        convert(copied, tmp_path / "out")


# ---------------------------------------------------------------- places that cannot be written


def test_places_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for out, message in (
        (tmp_path / "file" / "out", "cannot be written"),
        (Path("/proc/nothing/out"), "cannot be written"),
        (tmp_path / "dangling", "exists already"),
    ):
        with pytest.raises(UserError, match=f"{out}:? {message}"):
            convert(folder, out)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "dangling"}


@pytest.mark.processes
def test_a_full_disk(folder, tmp_path):
    """Files cannot grow, as on a full disk: one line of error, exit code 2, no files left."""
    limit = 40_000
    done = subprocess.run(
        [sys.executable, str(ROOT / "stages/export.py"), str(folder), str(tmp_path / "out")],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2, done.stderr
    assert "out: cannot be written" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert os.listdir(tmp_path) == []


def test_a_folder_named_partial_is_the_users(folder, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes").touch()
    (tmp_path / ".out.writing" / "vlm").mkdir(parents=True)  # left by a killed run
    convert(folder, tmp_path / "out", "native")
    assert (tmp_path / "out.partial" / "notes").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.partial"}
