"""Writes a checkpoint in another layout, tensor by tensor: memory holds only the shard being written.

`complete` adds missing parts from base folders, `check_weights` compares names and shapes with the model's, `write`
makes the folder. Left out: pickled files (everything is safetensors) and the code of third-party pipelines.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from huggingface_hub import split_torch_state_dict_into_shards
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2_5_VLConfig

from deepgen.errors import UserError
from deepgen.models.presets import PRESETS, Architecture
from deepgen.models.unified import UnifiedModel
from deepgen.models.vlm import lora_modules
from deepgen.models.weights_io.folder import (
    BRIDGE_WEIGHTS,
    LORA_FOLDER,
    LORA_WEIGHTS,
    read_bridge_config,
    read_part_config,
    report_keys,
    save_scheduler,
)
from deepgen.models.weights_io.layout_reader import (
    ALPHA_KEY,
    MERGED_KEY,
    PEFT_PREFIX,
    Weights,
    read_adapter,
    renamed,
    vlm_name,
)
from deepgen.models.weights_io.tensor_files import LazyTensor, State, read_json

MAX_SHARD, WHOLE = "5GB", "1000GB"
ALPHA_PER_RANK = 2.0  # alpha / rank of the published adapters, whose native files lack alpha (M1.10)
DTYPES = {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOKENIZER_FILES = (  # files of tokenizer, processors and chat template, as the libraries name them
    "added_tokens.json",
    "chat_template.*",
    "merges.txt",
    "*processor_config.json",
    "special_tokens_map.json",
    "tokenizer.*",
    "tokenizer_config.json",
    "vocab.*",
)
# Code in a diffusers folder: diffusers looks for a component's class in the component's own folder.
_PUBLISHED_CODE = {
    "published_pipeline.py": "pipeline.py",
    "published_connector.py": "connector/deepgen_connector.py",
}
# Type of a pipeline that is loaded without torch_dtype: diffusers' parts are fp32 then, transformers' what config says.
_LOADED_AS = {"dtype": "float32"}
_PARTS = ("transformer", "vae", "vlm", "bridge")
_HEAD, _EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"


@dataclass(frozen=True)
class Bases:
    """Folders that supply what the checkpoint itself lacks; each may be None.

    base: a component folder. vlm: Qwen2.5-VL as published. dit: transformer/ and vae/ as published (UniPic2).
    """

    base: Path | None = None
    vlm: Path | None = None
    dit: Path | None = None

    def folders(self, part: str) -> list[Path]:
        """Folders that may hold `part` (vlm, transformer, vae, bridge, tokenizer), the preferred one first."""
        special = {"vlm": self.vlm, "tokenizer": self.vlm}.get(part) or (
            self.dit / part if self.dit and part in ("transformer", "vae") else None
        )
        return [*([special] if special else []), *([self.base / part] if self.base else [])]


# ---------------------------------------------------------------- preparing


def find_architecture(weights: Weights, bases: Bases, preset: str) -> Architecture:
    """Sizes from the nearest config.json of each part. A bridge without one has the sizes of `preset`.

    Raises UserError naming the config.json that is missing or describes no valid part.
    """

    def read(part: str) -> dict[str, Any]:
        path = _config_path(part, weights, bases)
        if path is None:
            option = "--vlm" if part == "vlm" else "--dit"
            raise UserError(f"{weights.where} has no {part}/config.json; give {option} FOLDER or --base FOLDER")
        return read_part_config(part, path)

    vlm, transformer, vae = read("vlm"), read("transformer"), read("vae")
    return Architecture(vlm=vlm, transformer=transformer, vae=vae, **_bridge_sizes(weights, bases, preset))


def _bridge_sizes(weights: Weights, bases: Bases, preset: str) -> dict[str, int]:
    path, known = _config_path("bridge", weights, bases), PRESETS[preset].bridge_config()
    if path is None or not read_json(path).keys() & known.keys():
        return known  # no file, or another program's; tensor shapes are compared anyway
    return read_bridge_config(path, more=path.parent.name == "connector")


def _config_path(part: str, weights: Weights, bases: Bases) -> Path | None:
    own = [weights.where / ("connector" if part == "bridge" and weights.layout == "diffusers" else part)]
    folders = (own if weights.where.is_dir() else []) + bases.folders(part)
    return next((folder / "config.json" for folder in folders if (folder / "config.json").exists()), None)


def complete(weights: Weights, bases: Bases, *, without_lora: bool) -> Weights:
    """Fill the parts that the checkpoint lacks from the bases. The VLM of `base` brings its LoRA along.

    Raises UserError if a part is found nowhere, or if the VLM is a base one and no LoRA is found: without its LoRA, a
    model of stage 2 or 3 draws badly, and nothing reports it (M6.3). `without_lora` says that there never was one
    (stage 1).
    """
    for option, given in (("--base", bases.base), ("--vlm", bases.vlm), ("--dit", bases.dit)):
        if given is not None and not given.is_dir():
            raise UserError(f"{option}: {given} {'is not a folder' if given.exists() else 'does not exist'}")
    for part in _PARTS:
        if getattr(weights, part):
            continue
        folder = next((f for f in bases.folders(part) if f.is_dir()), None)
        if folder is None:
            raise UserError(f"{weights.where}: no {part} in it; give a folder that has one ({_options(part)})")
        state = weights.take(folder)
        setattr(weights, part, renamed(folder, state, vlm_name) if part == "vlm" else state)
        if part == "vlm" and bases.base and not bases.vlm and not weights.lora:
            _take_lora(weights, bases.base / LORA_FOLDER, without_lora)
    if weights.variant and not weights.variant_found:
        raise UserError(
            f"--variant: got {weights.variant}, but no folder that is read has a file x.{weights.variant}.safetensors"
        )
    if without_lora and weights.lora:
        raise UserError(f"{weights.where}: has a LoRA of {len(weights.lora)} tensors; leave out --without-lora")
    if not weights.lora and not weights.merged and not without_lora:
        raise UserError(
            f"{weights.where}: no LoRA in it and no merged VLM. A model of stage 2 or 3 needs one: take model.pt or "
            "the SFT checkpoint (M6.3), or give the SFT weights as --base without --vlm. If it is of stage 1 and never "
            "had one, say --without-lora"
        )
    return weights


def _take_lora(weights: Weights, adapter: Path, without_lora: bool) -> None:
    """Take the LoRA of the base that the VLM came from, if it has one."""
    if not adapter.is_dir():
        return
    if without_lora:
        raise UserError(f"--without-lora: {adapter} is the LoRA of the VLM taken from --base; leave out --without-lora")
    weights.lora, weights.lora_alpha = read_adapter(adapter)


def _options(part: str) -> str:
    return {"vlm": "--vlm or --base", "bridge": "--base"}.get(part, "--dit or --base")


def check_weights(weights: Weights, architecture: Architecture) -> None:
    """Compare every name and shape with the model's. Raises one UserError that names everything that does not fit."""
    for part in (*_PARTS, "lora", "dit_lora"):
        for name, tensor in getattr(weights, part).items():
            if not tensor.dtype.is_floating_point:
                raise UserError(f"{weights.where}, {part}: {name} is {tensor.dtype}, expected floating-point weights")
    try:
        model = UnifiedModel.from_architecture(architecture, "meta")
        architecture.describe()
    except Exception as error:  # valid files whose sizes do not fit together
        raise UserError(f"{weights.where}: the config.json files describe no model ({error!r})") from error
    tied = architecture.vlm.get("tie_word_embeddings", False)
    vlm = {name: tuple(t.shape) for name, t in model.vlm.state_dict().items()}
    if tied and _HEAD not in weights.vlm:
        del vlm[_HEAD]
    wanted = {
        "bridge": {name: tuple(t.shape) for name, t in model.bridge_state().items()},
        "transformer": {name: tuple(t.shape) for name, t in model.transformer.state_dict().items()},
        "vae": {name: tuple(t.shape) for name, t in model.vae.state_dict().items()},
        "vlm": vlm,
        "lora": _lora_shapes(model, weights, architecture) if weights.lora else {},
        "dit_lora": _dit_lora_shapes(model, weights) if weights.dit_lora else {},
    }
    for part, names in wanted.items():
        found = {name: tensor.shape for name, tensor in getattr(weights, part).items()}
        mismatched = {
            name: f"{found[name]} in the file, {names[name]} in the model"
            for name in found.keys() & names.keys()
            if found[name] != names[name]
        }
        report_keys(f"{weights.where}, {part}", names.keys() - found.keys(), found.keys() - names.keys(), mismatched)


def _lora_shapes(model: UnifiedModel, weights: Weights, architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Shapes of the expected adapter parameters, for all modules or for those that can receive a gradient."""
    scope = "all" if any("lm_head" in name or ".visual." in name for name in weights.lora) else "live"
    modules = dict(model.vlm.named_modules())
    wanted = lora_modules(model.vlm, scope, architecture.fusion_layers[0])
    return _adapter_shapes({name: modules[name] for name in wanted}, weights.lora_rank)


def _dit_lora_shapes(model: UnifiedModel, weights: Weights) -> dict[str, tuple[int, ...]]:
    """Shapes of the expected adapter parameters, for the linear layers that the adapter has chosen."""
    adapted = {name.split(".lora_")[0] for name in weights.dit_lora}
    modules = {name: module for name, module in model.transformer.named_modules() if name in adapted}
    linear = {name: module for name, module in modules.items() if isinstance(module, torch.nn.Linear)}
    return _adapter_shapes(linear, weights.dit_rank)


def _adapter_shapes(modules: Mapping[str, Any], rank: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in modules.items():
        out, into = module.weight.shape
        if isinstance(module, torch.nn.Embedding):
            shapes[f"{name}.lora_embedding_A.default"] = (rank, int(out))
            shapes[f"{name}.lora_embedding_B.default"] = (int(into), rank)
        else:
            shapes[f"{name}.lora_A.default.weight"] = (rank, int(into))
            shapes[f"{name}.lora_B.default.weight"] = (int(out), rank)
    return shapes


def merged_vlm(weights: Weights, dtype: torch.dtype | None = None) -> State:
    """The VLM with every adapted W replaced by W + alpha/rank · B·A (the embedding's delta is transposed, as in peft).

    The sum is rounded once, from fp32 to `dtype`, or to W's own type.
    """
    if not weights.lora:
        return weights.vlm
    state = dict(weights.vlm)
    if f"{_HEAD.removesuffix('.weight')}.lora_A.default.weight" in weights.lora:
        state.setdefault(_HEAD, weights.vlm[_EMBEDDING])  # tied to the embedding until now; its own delta unties it
    return _with_lora("vlm", state, weights.lora, _alpha(weights) / weights.lora_rank, dtype)


def merged_transformer(weights: Weights, dtype: torch.dtype | None = None) -> State:
    """The transformer with its LoRA, in the same way as `merged_vlm`."""
    if not weights.dit_lora:
        return weights.transformer
    scale = weights.dit_alpha / weights.dit_rank
    return _with_lora("transformer", weights.transformer, weights.dit_lora, scale, dtype)


def _with_lora(part: str, state: State, lora: State, scale: float, dtype: torch.dtype | None) -> State:
    state = dict(state)
    for name, a in lora.items():
        if ".lora_A." in name:
            b, target = lora[name.replace(".lora_A.", ".lora_B.")], name.split(".lora_A.")[0]
        elif ".lora_embedding_A." in name:
            b = lora[name.replace("_embedding_A.", "_embedding_B.")]
            target = name.split(".lora_embedding_A.")[0]
        else:
            continue
        weight = f"{target}.weight"
        delta = _delta(a, b, scale, transposed=".lora_embedding_A." in name)
        state[weight] = _merged(f"{part}: merged {weight}", state[weight], delta, dtype)
    return state


def _delta(a: LazyTensor, b: LazyTensor, scale: float, *, transposed: bool) -> Callable[[], Tensor]:
    def read() -> Tensor:
        delta = b.read().float() @ a.read().float() * scale
        return delta.T if transposed else delta

    return read


def _merged(what: str, base: LazyTensor, delta: Callable[[], Tensor], dtype: torch.dtype | None) -> LazyTensor:
    total = LazyTensor(base.shape, torch.float32, lambda: base.read().float() + delta())
    return _cast(what, total, dtype or base.dtype)


def _alpha(weights: Weights) -> float:
    return weights.lora_alpha if weights.lora_alpha is not None else ALPHA_PER_RANK * weights.lora_rank


# ---------------------------------------------------------------- writing


def write(weights: Weights, architecture: Architecture, bases: Bases, target: str, out: Path, dtype: str) -> None:
    """Write `out` (which must not exist) as components, diffusers or native. It appears when it is complete."""
    if os.path.lexists(out):  # also true for a broken link
        raise UserError(f"{out} exists already; give another folder or remove it")
    tokenizer = [] if target == "native" else _tokenizer_files(weights, bases)
    if target != "native" or architecture.vlm.get("tie_word_embeddings", False):  # native files have no config
        weights = _tied_once(weights)
    weights = replace(weights, transformer=merged_transformer(weights, DTYPES[dtype]), dit_lora={})
    if target == "diffusers":
        weights = replace(weights, vlm=merged_vlm(weights, DTYPES[dtype]), lora={}, merged=True)
        architecture = replace(architecture, vlm={**architecture.vlm, **_LOADED_AS})
    weights = _cast_all(weights, DTYPES[dtype])
    unfinished = out.with_name(f".{out.name}.writing")  # our own name, so a failed run's leftovers may be removed
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        if target == "native":
            _write_native(weights, unfinished)
        else:
            _write_common(weights, architecture, tokenizer, unfinished)
            {"components": _write_components, "diffusers": _write_diffusers}[target](weights, architecture, unfinished)
        unfinished.rename(out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _tied_once(weights: Weights) -> Weights:
    """Leave out a head that is the embedding: without it, the VLM that is written is tied."""
    head, embedding = weights.vlm.get(_HEAD), weights.vlm[_EMBEDDING]
    if head is None or (head.shape, head.dtype) != (embedding.shape, embedding.dtype):
        return weights
    if not torch.equal(head.read(), embedding.read()):
        return weights
    return replace(weights, vlm={name: tensor for name, tensor in weights.vlm.items() if name != _HEAD})


def _write_components(weights: Weights, architecture: Architecture, out: Path) -> None:
    _write_json(out / "bridge" / "config.json", architecture.bridge_config())
    _write_state(weights.bridge, out / "bridge", BRIDGE_WEIGHTS, whole=True)
    if weights.lora:
        alpha = _alpha(weights)
        config = LoraConfig(
            r=weights.lora_rank,
            lora_alpha=int(alpha) if alpha.is_integer() else alpha,  # peft writes whole numbers as int
            target_modules=sorted({name.split(".lora_")[0] for name in weights.lora}),
        )
        (out / LORA_FOLDER).mkdir()
        config.save_pretrained(str(out / LORA_FOLDER))
        adapter = {PEFT_PREFIX + name.replace(".default", ""): tensor for name, tensor in weights.lora.items()}
        _write_state(adapter, out / LORA_FOLDER, LORA_WEIGHTS, whole=True)


def _write_diffusers(weights: Weights, architecture: Architecture, out: Path) -> None:
    """Write the layout of DeepGen-1.0-diffusers (M6.1): connector/ holds the bridge; vlm/ already includes the LoRA.

    The code that draws with it lies beside it, so that diffusers can use the folder without this package.
    """
    _write_json(out / "connector" / "config.json", {**architecture.connector_config(), **_LOADED_AS})
    _write_state(weights.bridge, out / "connector", "model.safetensors", whole=True)
    for source, file in _PUBLISHED_CODE.items():
        shutil.copyfile(Path(__file__).with_name(source), out / file)
    tokenizer = read_json(out / "tokenizer" / "tokenizer_config.json").get("tokenizer_class") or "Qwen2TokenizerFast"
    index = {
        "_class_name": ["pipeline", "DeepGenPipeline"],
        "connector": ["deepgen_connector", "DeepGenConnector"],
        "padding": weights.padding,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "tokenizer": ["transformers", tokenizer],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "vlm": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    }
    _write_json(out / "model_index.json", index)


def _write_native(weights: Weights, out: Path) -> None:
    """Write the training code's names (M6.2): bridge, `transformer.`, LoRA under `lmm.`. Frozen parts are left out."""
    metadata = {ALPHA_KEY: repr(_alpha(weights))} if weights.lora else {}
    state = dict(weights.bridge) | {f"transformer.{name}": t for name, t in weights.transformer.items()}
    state |= {f"lmm.{name}": t for name, t in weights.lora.items()}
    if weights.merged and not weights.lora:
        state |= {f"lmm.{name}": t for name, t in weights.vlm.items()}  # no base has the merged VLM
        metadata = {MERGED_KEY: "true"}
    _write_state(state, out, "model.safetensors", metadata=metadata)


def _write_common(weights: Weights, architecture: Architecture, tokenizer: list[Path], out: Path) -> None:
    """Write the files that components and diffusers have in common."""
    config = Qwen2_5_VLConfig(**architecture.vlm)
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    config.tie_word_embeddings = _HEAD not in weights.vlm
    config.save_pretrained(out / "vlm")
    _write_state(weights.vlm, out / "vlm", "model.safetensors")
    _write_json(out / "transformer" / "config.json", dict(architecture.transformer), "SD3Transformer2DModel")
    _write_state(weights.transformer, out / "transformer", "diffusion_pytorch_model.safetensors")
    with torch.device("meta"):
        AutoencoderKL(**architecture.vae).save_config(out / "vae")
    _write_state(weights.vae, out / "vae", "diffusion_pytorch_model.safetensors")
    save_scheduler(out / "scheduler")
    (out / "tokenizer").mkdir()
    for file in tokenizer:
        for folder in ("tokenizer", "vlm"):
            shutil.copyfile(file, out / folder / file.name)


def _tokenizer_files(weights: Weights, bases: Bases) -> list[Path]:
    """Files of the nearest tokenizer, without other files that a download left in its folder."""
    own = [weights.where / name for name in ("tokenizer", "vlm")] if weights.where.is_dir() else []
    for folder in [*own, *bases.folders("tokenizer"), *bases.folders("vlm")]:
        if (folder / "tokenizer_config.json").exists():
            found = {file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()}
            return sorted(found)
    raise UserError(f"{weights.where}: no tokenizer in it; give --vlm FOLDER or --base FOLDER")


def _write_state(
    state: State, folder: Path, name: str, *, whole: bool = False, metadata: Mapping[str, str] | None = None
) -> None:
    """Write one .safetensors file, or shards with an index above MAX_SHARD. One shard is in memory at a time.

    `whole`: one file whatever its size, for small parts that are read in one piece (bridge, adapter).
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = name.removesuffix(".safetensors")
    shapes = {key: torch.empty(t.shape, dtype=t.dtype, device="meta") for key, t in sorted(state.items())}
    plan = split_torch_state_dict_into_shards(
        shapes, filename_pattern=stem + "{suffix}.safetensors", max_shard_size=WHOLE if whole else MAX_SHARD
    )
    for file, keys in plan.filename_to_tensors.items():
        # Copies, because tensors of a torch file may share memory, which safetensors refuses to write.
        tensors = {key: state[key].read().clone(memory_format=torch.contiguous_format) for key in keys}
        for key, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise UserError(f"{folder.name}: {key} is not finite; allowed: weights of a training that went well")
        save_file(tensors, folder / file, metadata={"format": "pt", **(metadata or {})})
    if plan.is_sharded:
        _write_json(
            folder / f"{stem}.safetensors.index.json",
            {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename},
        )


def _cast_all(weights: Weights, dtype: torch.dtype | None) -> Weights:
    """Convert every tensor to `dtype`; None keeps them as they are."""
    if dtype is None:
        return weights
    changed: dict[str, Any] = {
        part: {name: _cast(f"{part}: {name}", tensor, dtype) for name, tensor in getattr(weights, part).items()}
        for part in (*_PARTS, "lora")
    }
    return replace(weights, **changed)


def _cast(what: str, tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    """The tensor in `dtype`. Reading it raises UserError if the type is too narrow for a value."""

    def read() -> Tensor:
        before = tensor.read()
        after = before.to(dtype)
        if bool((before.isfinite() & ~after.isfinite()).any()):
            raise UserError(f"{what} has values too large for {dtype} (largest: {before.abs().max():.4g})")
        return after

    return LazyTensor(tensor.shape, dtype, read)


def _write_json(path: Path, content: Mapping[str, Any], class_name: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    named = {"_class_name": class_name, **content} if class_name else content
    path.write_text(json.dumps(named, indent=2) + "\n", encoding="utf-8")
