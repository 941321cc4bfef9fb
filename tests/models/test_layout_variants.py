"""Folders in which the same tensors lie several times: x.safetensors, and x.fp16.safetensors beside it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deepgen.errors import UserError
from deepgen.models.weights_io.layout_reader import Weights, read_weights
from deepgen.models.weights_io.layout_writer import Bases, complete

PLAIN, HALF = torch.float32, torch.float16


def write(file: Path, dtype: torch.dtype, *names: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.ones(2, dtype=dtype) for name in names or ("transformer.a", "transformer.b")}, file)


def index(file: Path, **files: str) -> None:
    file.write_text(json.dumps({"metadata": {}, "weight_map": {f"transformer.{key}": files[key] for key in files}}))


def types(weights: Weights) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in weights.transformer.items()}


def sharded(folder: Path, dtype: torch.dtype, names: str, index_name: str) -> None:
    """Two shards and their index. names: a pattern with {} for the number of the shard."""
    files = {"a": names.format("-00001-of-00002"), "b": names.format("-00002-of-00002")}
    for key, file in files.items():
        write(folder / file, dtype, f"transformer.{key}")
    index(folder / index_name, **files)


def test_the_file_without_variant_is_taken(tmp_path):
    write(tmp_path / "x.safetensors", PLAIN)
    write(tmp_path / "x.fp16.safetensors", HALF)
    write(tmp_path / "x.non_ema.safetensors", PLAIN)
    assert types(read_weights(tmp_path)) == {"a": PLAIN, "b": PLAIN}
    assert types(read_weights(tmp_path, "fp16")) == {"a": HALF, "b": HALF}


@pytest.mark.parametrize(
    ("names", "index_name"),
    [
        ("x.fp16{}.safetensors", "x.safetensors.index.fp16.json"),  # as diffusers and transformers write them
        ("x{}.fp16.safetensors", "x.safetensors.index.fp16.json"),  # as diffusers did before
        ("x.fp16{}.safetensors", "x.fp16.safetensors.index.json"),  # as huggingface_hub does
    ],
)
def test_shards_of_a_variant(tmp_path, names, index_name):
    sharded(tmp_path, HALF, names, index_name)
    assert types(read_weights(tmp_path)) == {"a": HALF, "b": HALF}  # nothing else to take
    sharded(tmp_path, PLAIN, "x{}.safetensors", "x.safetensors.index.json")
    assert types(read_weights(tmp_path)) == {"a": PLAIN, "b": PLAIN}
    assert types(read_weights(tmp_path, "fp16")) == {"a": HALF, "b": HALF}


def test_one_file_beside_shards_of_the_other_type(tmp_path):
    write(tmp_path / "x.fp16.safetensors", HALF)
    sharded(tmp_path, PLAIN, "x{}.safetensors", "x.safetensors.index.json")
    assert types(read_weights(tmp_path)) == {"a": PLAIN, "b": PLAIN}
    assert types(read_weights(tmp_path, "fp16")) == {"a": HALF, "b": HALF}


def test_a_word_that_no_library_uses(tmp_path):
    """Such a file may be a part of its own, so it counts as a variant only if it is asked for."""
    write(tmp_path / "x.safetensors", PLAIN, "transformer.a")
    write(tmp_path / "x.head.safetensors", HALF, "transformer.b")
    assert types(read_weights(tmp_path)) == {"a": PLAIN, "b": HALF}
    write(tmp_path / "x.best.safetensors", HALF)
    with pytest.raises(
        UserError, match=r"transformer\.[ab] stands in another file of the folder too; .* --variant WORD"
    ):
        read_weights(tmp_path)
    (tmp_path / "x.head.safetensors").unlink()
    assert types(read_weights(tmp_path, "best")) == {"a": HALF, "b": HALF}


def test_several_variants_and_nothing_to_choose_by(tmp_path):
    write(tmp_path / "x.fp16.safetensors", HALF)
    write(tmp_path / "x.bf16.safetensors", torch.bfloat16)
    with pytest.raises(UserError, match=r"--variant: got nothing for .*x\.safetensors; allowed: fp16, bf16"):
        read_weights(tmp_path)
    with pytest.raises(UserError, match=r"--variant: got fp32 for .*x\.safetensors; allowed: fp16, bf16"):
        read_weights(tmp_path, "fp32")
    write(tmp_path / "x.safetensors", PLAIN)
    with pytest.raises(UserError, match=r"--variant: got fp32 for .*; allowed: fp16, bf16, to leave it out"):
        read_weights(tmp_path, "fp32")


@pytest.fixture
def parts(tmp_path):
    """A component folder in small: two parts of it have a variant, the others do not."""
    for part, name in (("vlm", "model"), ("transformer", "diffusion_pytorch_model")):
        write(tmp_path / "m" / part / f"{name}.safetensors", PLAIN)
        write(tmp_path / "m" / part / f"{name}.fp16.safetensors", HALF)
    write(tmp_path / "m" / "vae" / "diffusion_pytorch_model.safetensors", PLAIN)
    write(tmp_path / "m" / "bridge" / "bridge.safetensors", PLAIN)
    return tmp_path / "m"


def test_parts_without_variants_are_read_as_they_are(parts):
    weights = read_weights(parts, "fp16")
    found = {
        part: next(iter(getattr(weights, part).values())).dtype for part in ("vlm", "transformer", "vae", "bridge")
    }
    assert found == {"vlm": HALF, "transformer": HALF, "vae": PLAIN, "bridge": PLAIN}


def test_a_variant_of_the_base(parts, tmp_path):
    write(tmp_path / "rl" / "model.safetensors", PLAIN, "meta_queries", "transformer.a", "transformer.b")
    weights = complete(read_weights(tmp_path / "rl", "fp16"), Bases(base=parts), without_lora=True)
    assert {tensor.dtype for tensor in weights.vlm.values()} == {HALF}
    assert {tensor.dtype for tensor in weights.transformer.values()} == {PLAIN}


@pytest.mark.parametrize("wanted", ["fp61", "x", "../fp16", "fp16.safetensors"])
def test_a_variant_that_is_nowhere(parts, tmp_path, wanted):
    write(tmp_path / "rl.safetensors", PLAIN, "meta_queries", "transformer.a", "lmm.norm.weight", "vae.a")
    with pytest.raises(
        UserError, match=rf"--variant: got {wanted}, but no folder that is read has a file x\.{wanted}\."
    ):
        complete(read_weights(tmp_path / "rl.safetensors", wanted), Bases(base=parts), without_lora=True)
    with pytest.raises(UserError, match=rf"--variant: got {wanted} for .*; allowed: fp16, to leave it out"):
        read_weights(parts, wanted)
