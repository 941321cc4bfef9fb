"""Component folders: reads and writes a model's weights, and names exactly what does not fit.

<folder>/{vlm,transformer,vae}/    Hugging Face folders (config.json + safetensors)
<folder>/bridge/                   config.json, bridge.safetensors (M6.2 names)
<folder>/tokenizer/                the VLM's tokenizer
<folder>/vlm_lora/                 peft adapter, if the model has one
<folder>/scheduler/                flow-matching Euler scheduler config
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging as transformers_logging

from deepgen.errors import UserError
from deepgen.models.bridge import Bridge
from deepgen.models.dit import DeepGenTransformer
from deepgen.models.presets import DEEPGEN_5B, PRESETS, Architecture
from deepgen.models.vlm import LoraSettings, lora_parameters
from deepgen.models.weights_io.layout_reader import ADAPTER_CONFIG, PEFT_PREFIX
from deepgen.models.weights_io.tensor_files import open_safetensors, read_json

BRIDGE_WEIGHTS = "bridge.safetensors"
LORA_FOLDER = "vlm_lora"
LORA_WEIGHTS = "adapter_model.safetensors"
NAMES_SHOWN = 3
MAX_HASHERS = 16  # threads of one checksum; each holds a copy of one tensor of a GPU
SHIFT = 3.0  # shift of SD3's flow-matching schedule (M2.1)


# ---------------------------------------------------------------- architecture


def read_architecture(folder: Path, preset: str | None = None) -> Architecture:
    """Sizes of the model in a component folder, from its config.json files.

    If bridge/config.json is missing, the bridge has the sizes of `preset` (a folder of base weights before
    pretraining).
    """
    if not folder.is_dir():
        raise UserError(f"model.weights: {folder} is not a folder")
    parts = {part: read_part_config(part, _config_of(folder / part)) for part in _BUILDERS}
    if not (folder / "bridge" / "config.json").exists() and preset in PRESETS:
        bridge = PRESETS[preset].bridge_config()
    else:
        bridge = read_bridge_config(_config_of(folder / "bridge"))
    return Architecture(vlm=parts["vlm"], transformer=parts["transformer"], vae=parts["vae"], **bridge)


def read_part_config(part: str, path: Path) -> dict[str, Any]:
    """What builds the VLM, transformer or VAE that a config.json describes; of the VLM with all defaults.

    Raises UserError naming the file if it describes none, such as that of another VLM.
    """
    config = {key: value for key, value in read_json(path).items() if not key.startswith("_")}
    if part == "vlm" and config.get("model_type") != Qwen2_5_VLConfig.model_type:
        raise UserError(
            f"{path}: model_type is {config.get('model_type')!r}, expected {Qwen2_5_VLConfig.model_type!r} (Qwen2.5-VL)"
        )
    try:
        with torch.device("meta"):
            _BUILDERS[part](config)
        return Qwen2_5_VLConfig(**config).to_dict() if part == "vlm" else config
    except Exception as error:  # a bad size can make the libraries raise anything
        raise UserError(f"{path}: no {part} has this configuration ({error})") from error


_BUILDERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "vlm": lambda config: Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config)),
    "transformer": lambda config: DeepGenTransformer(**config),
    "vae": lambda config: AutoencoderKL(**config),
}


def read_bridge_config(path: Path, *, more: bool = False) -> dict[str, int]:
    """The sizes in bridge/config.json. Raises UserError naming the key that is none, missing or no size.

    more: other keys may be there, as in connector/config.json.
    """
    known = DEEPGEN_5B.bridge_config()
    sizes = {"max_prompt_tokens": Architecture.max_prompt_tokens} | read_json(path)
    if not more and (strange := sorted(key for key in sizes.keys() - known.keys() if not key.startswith("_"))):
        raise UserError(f"{path}: {strange[0]!r} is no size of the bridge; known: {', '.join(known)}")
    for key in known:
        if type(sizes.get(key)) is not int or sizes[key] < 1:
            raise UserError(f"{path}: {key} is {sizes.get(key)!r}, expected a whole number from 1 on")
    return {key: sizes[key] for key in known}


def _config_of(folder: Path) -> Path:
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"model.weights: {path} does not exist; a component folder is expected")
    return path


# ---------------------------------------------------------------- loading


def load_vlm(folder: Path, dtype: torch.dtype = torch.float32) -> Qwen2_5_VLForConditionalGeneration:
    """Load Qwen2.5-VL from a Hugging Face folder; its tensors must match the model's exactly."""
    transformers_logging.disable_progress_bar()
    return _load_pretrained(Qwen2_5_VLForConditionalGeneration, folder, "model", dtype=dtype)


def load_transformer(folder: Path, dtype: torch.dtype = torch.float32) -> DeepGenTransformer:
    """Load the DiT from a diffusers folder, also from one that names diffusers' own class."""
    return _load_pretrained(DeepGenTransformer, folder, "diffusion_pytorch_model", torch_dtype=dtype)


def load_vae(folder: Path, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    return _load_pretrained(AutoencoderKL, folder, "diffusion_pytorch_model", torch_dtype=dtype)


def _load_pretrained(cls: Any, folder: Path, stem: str, **kwargs: Any) -> Any:
    """`cls.from_pretrained`, but missing, unexpected and mis-shaped tensors raise UserError."""
    _config_of(folder)
    _check_files(folder, stem)
    previous = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its warnings are reported below, as an error
    try:
        model, info = cls.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, local_files_only=True, **kwargs
        )
    finally:
        transformers_logging.set_verbosity(previous)
    mismatched = {
        key: f"{tuple(found)} in the file, {tuple(wanted)} in the model"
        for key, found, wanted in info["mismatched_keys"]
    }
    report_keys(folder, info["missing_keys"], info["unexpected_keys"], mismatched)
    return model


def _check_files(folder: Path, stem: str) -> None:
    """Open the header of every weights file, to name a missing or truncated one before anything is built."""
    index = folder / f"{stem}.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = [f"{stem}.safetensors"]
    for name in names:
        open_safetensors(folder / name)


def load_bridge(bridge: Bridge, folder: Path) -> None:
    """Fill the bridge's parameters from bridge.safetensors."""
    tensors = _read_tensors(folder / BRIDGE_WEIGHTS)
    load_exactly(bridge.bridge_state(), tensors, folder / BRIDGE_WEIGHTS)


def load_lora(vlm: Qwen2_5_VLForConditionalGeneration, folder: Path, wanted: LoraSettings | None = None) -> None:
    """Attach the adapter of a peft folder. Rank and alpha must match `wanted`; None accepts any, without dropout."""
    if not (folder / ADAPTER_CONFIG).exists():
        raise UserError(f"model.weights: {folder / ADAPTER_CONFIG} does not exist")
    config = LoraConfig.from_pretrained(str(folder))
    if wanted is not None and wanted.rank != config.r:
        raise UserError(f"model.lora_rank: {wanted.rank} given, but the adapter in {folder} has rank {config.r}")
    if wanted is not None and wanted.alpha != config.lora_alpha:
        raise UserError(
            f"model.lora_alpha: {wanted.alpha:g} given, but the adapter in {folder} has {config.lora_alpha:g}"
        )
    config.lora_dropout = wanted.dropout if wanted else 0.0
    config.inference_mode = False
    vlm.add_adapter(config)
    path = folder / LORA_WEIGHTS
    state = {_adapter_file_name(name): parameter for name, parameter in lora_parameters(vlm).items()}
    load_exactly(state, {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in _read_tensors(path).items()}, path)


def load_tokenizer(folder: Path) -> Any:
    if not (folder / "tokenizer_config.json").exists():
        raise UserError(f"model.weights: {folder / 'tokenizer_config.json'} does not exist")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@torch.no_grad()
def load_exactly(target: Mapping[str, Tensor], source: Mapping[str, Tensor], where: object) -> None:
    """Copy `source` into `target` in place. Raises `UserError` unless names and shapes are equal."""
    mismatched = {
        name: f"{tuple(source[name].shape)} in the file, {tuple(target[name].shape)} in the model"
        for name in target.keys() & source.keys()
        if source[name].shape != target[name].shape
    }
    report_keys(where, target.keys() - source.keys(), source.keys() - target.keys(), mismatched)
    for name, tensor in target.items():
        tensor.copy_(source[name])


def report_keys(
    where: object, missing: Iterable[str], unexpected: Iterable[str], mismatched: Mapping[str, str]
) -> None:
    """Raise one `UserError` that counts and names the tensors that do not fit, if there are any."""
    problems = []
    for kind, keys in (
        ("missing", sorted(missing)),
        ("unexpected", sorted(unexpected)),
        ("mis-shaped", [f"{key} ({mismatched[key]})" for key in sorted(mismatched)]),
    ):
        if keys:
            more = ", …" if len(keys) > NAMES_SHOWN else ""
            problems.append(f"{len(keys)} {kind}: {', '.join(keys[:NAMES_SHOWN])}{more}")
    if problems:
        raise UserError(f"{where}: the weights do not fit the model; {'; '.join(problems)}")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    return {name: tensor.read() for name, tensor in open_safetensors(path).items()}


# ---------------------------------------------------------------- saving


def save_vlm(vlm: Qwen2_5_VLForConditionalGeneration, folder: Path) -> None:
    """Write the base weights only, under the names they have without LoRA."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name.replace(".base_layer.", "."): t for name, t in vlm.state_dict().items() if ".lora_" not in name}
    if vlm.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    vlm.config.architectures = [type(vlm).__name__]
    vlm.config.save_pretrained(folder)
    save_torch_state_dict(state, folder, filename_pattern="model{suffix}.safetensors", max_shard_size="5GB")


def save_lora(vlm: Qwen2_5_VLForConditionalGeneration, folder: Path) -> None:
    """Write the adapter as a peft folder."""
    folder.mkdir(parents=True, exist_ok=True)
    vlm.peft_config["default"].save_pretrained(str(folder))
    state = {PEFT_PREFIX + _adapter_file_name(name): p.detach() for name, p in lora_parameters(vlm).items()}
    save_file(_plain(state), folder / LORA_WEIGHTS)


def _adapter_file_name(name: str) -> str:
    """An adapter parameter's name in peft's files, which leave out the name of the adapter."""
    return name.replace(".default", "")


def save_transformer(transformer: DeepGenTransformer, folder: Path) -> None:
    """Write a diffusers folder that diffusers' own class can open too."""
    transformer.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"_class_name": "SD3Transformer2DModel"}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def save_bridge(bridge: Bridge, architecture: Architecture, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(architecture.bridge_config(), indent=2) + "\n", encoding="utf-8")
    save_file(_plain(bridge.bridge_state()), folder / BRIDGE_WEIGHTS)


def save_scheduler(folder: Path) -> None:
    FlowMatchEulerDiscreteScheduler(shift=SHIFT).save_pretrained(folder)


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


# ---------------------------------------------------------------- identity


def weights_checksum(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hex digest (128 bit) of names, dtypes, shapes and bytes, independent of order and device.

    Tensors are read side by side: a single core hashes 0.7 GB/s, and every rollout actor waits for this once a version.
    """
    digest = hashlib.blake2b(digest_size=16)
    with ThreadPoolExecutor(min(MAX_HASHERS, len(os.sched_getaffinity(0)))) as pool:
        for part in pool.map(_tensor_digest, sorted(tensors, key=lambda item: item[0])):
            digest.update(part)
    return digest.hexdigest()


def _tensor_digest(named: tuple[str, Tensor]) -> bytes:
    name, tensor = named
    digest = hashlib.blake2b(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode(), digest_size=16)
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def parameter_count(module: nn.Module) -> int:
    """Number of learnable elements. Buffers such as the DiT's position grid do not count."""
    return sum(parameter.numel() for parameter in module.parameters())
