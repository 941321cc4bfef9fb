"""Reading published checkpoints: every layout of M6 as the same five sets of tensors, none read before it is used.

| layout      | what it is                                                            |
|-------------|-----------------------------------------------------------------------|
| components  | our folder (`models.checkpoint`)                                      |
| diffusers   | transformer/ vae/ vlm/ connector/ scheduler/ tokenizer/, LoRA merged  |
| native      | one .pt, .pth or .safetensors file, with or without `state_dict`      |
| deepspeed   | a DeepSpeed checkpoint folder, ZeRO 1-3, also one named *.pth          |
| safetensors | a folder of native keys in one or several .safetensors files          |

Names become those of `UnifiedModel`: the bridge's and the DiT's own, and for the VLM those of transformers >= 4.52,
whatever wrote it. Nothing is unpickled but tensors and plain containers.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deepgen.config.errors import UserError
from deepgen.models.bridge import BRIDGE_PREFIXES

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_WRAPPERS = ("state_dict", "module", "model")  # keys under which a file may hold the tensors


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file: shape and dtype are known, `read` fetches the values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


State = dict[str, LazyTensor]


@dataclass
class Weights:
    """What a checkpoint holds; a part it does not hold is empty.

    lora: adapter parameters by their names in the VLM; `lora_alpha` where the layout says it (M1.10: else 2 x rank).
    merged: the VLM is there and its LoRA, if it ever had one, is already in its weights.
    """

    where: Path
    layout: str
    bridge: State = field(default_factory=dict)
    transformer: State = field(default_factory=dict)
    vae: State = field(default_factory=dict)
    vlm: State = field(default_factory=dict)
    lora: State = field(default_factory=dict)
    lora_alpha: float | None = None
    merged: bool = False

    @property
    def lora_rank(self) -> int:
        return next(tensor.shape[0] for name, tensor in self.lora.items() if "lora_A" in name or "embedding_A" in name)


def detect_layout(path: Path) -> str:
    """Name of its layout (see the module). Raises UserError when `path` is none of them."""
    if path.is_file():
        if path.suffix in (".pt", ".pth", ".bin", ".safetensors"):
            return "native"
        raise UserError(f"{path}: a weights file ends in .pt, .pth, .bin or .safetensors")
    if not path.is_dir():
        raise UserError(f"{path} does not exist")
    if (path / "bridge").is_dir():
        return "components"
    if (path / "connector").is_dir() or (path / "model_index.json").exists():
        return "diffusers"
    if (path / "latest").exists() or any(path.glob("*_optim_states.pt")) or any(path.glob("*_model_states.pt")):
        return "deepspeed"
    if any(path.glob("*.safetensors")):
        return "safetensors"
    raise UserError(
        f"{path}: not a checkpoint; known: a component folder (bridge/), a diffusers folder (connector/), a DeepSpeed "
        "folder (latest or *_optim_states.pt), a folder of .safetensors, or one weights file"
    )


def read_weights(path: Path) -> Weights:
    """Names, shapes and dtypes of a checkpoint of any layout; values are read when they are asked for.

    Raises UserError naming the file that is absent or damaged, or the tensors that belong to no part.
    """
    layout = detect_layout(path)
    weights = Weights(path, layout)
    if layout in ("components", "diffusers"):
        _read_folder(weights)
    elif layout == "deepspeed":
        _sort(weights, read_deepspeed(path))
    else:
        _sort(weights, read_safetensors(path) if path.is_dir() or path.suffix == ".safetensors" else read_torch(path))
    return weights


def _read_folder(weights: Weights) -> None:
    folder = weights.where
    weights.transformer = read_safetensors(folder / "transformer")
    weights.vae = read_safetensors(folder / "vae")
    vlm = {vlm_name(name): tensor for name, tensor in read_safetensors(folder / "vlm").items()}
    weights.vlm = vlm
    if weights.layout == "diffusers":
        weights.bridge, weights.merged = read_safetensors(folder / "connector"), True
        return
    weights.bridge = read_safetensors(folder / "bridge")
    adapter = folder / "vlm_lora"
    if adapter.is_dir():
        weights.lora = {lora_name(name): tensor for name, tensor in read_safetensors(adapter).items()}
        weights.lora_alpha = float(read_json(adapter / "adapter_config.json")["lora_alpha"])
    weights.merged = not weights.lora


def _sort(weights: Weights, state: State) -> None:
    """Give the tensors of a native state dict to the parts they belong to (M6.2)."""
    strange = []
    for name, tensor in state.items():
        key = name.removeprefix("module.")
        if key.startswith(BRIDGE_PREFIXES):
            weights.bridge[key] = tensor
        elif key.startswith("transformer."):
            weights.transformer[key.removeprefix("transformer.")] = tensor
        elif key.startswith("vae."):
            weights.vae[key.removeprefix("vae.")] = tensor
        elif key.startswith(("lmm.", "vlm.")):
            inner = key.partition(".")[2]
            if ".lora_" in inner:
                weights.lora[lora_name(inner)] = tensor
            else:
                weights.vlm[vlm_name(inner)] = tensor
        else:
            strange.append(name)
    if strange:
        raise UserError(
            f"{weights.where}: {len(strange)} tensors belong to no part of the model: "
            f"{', '.join(sorted(strange)[:3])}; "
            "known: meta_queries, projector_*, connector.*, transformer.*, vae.*, lmm.*"
        )
    if not state:
        raise UserError(f"{weights.where}: no tensors in it")


# ---------------------------------------------------------------- names


def vlm_name(name: str) -> str:
    """A base weight's name in transformers >= 4.52, without LoRA's `base_layer`; older layouts are renamed."""
    name = name.replace(".base_layer.", ".")
    if name.startswith("visual."):
        return "model." + name
    return re.sub(r"^model\.(layers|embed_tokens|norm)\.", r"model.language_model.\1.", name)


def lora_name(name: str) -> str:
    """An adapter parameter's name in the VLM: new layout, adapter "default"; peft's files leave the adapter out."""
    name = vlm_name(name.removeprefix("base_model.model."))
    if ".default" in name:
        return name
    if name.endswith((".lora_embedding_A", ".lora_embedding_B")):
        return name + ".default"
    return name.removesuffix(".weight") + ".default.weight"


# ---------------------------------------------------------------- files


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None


def read_safetensors(path: Path) -> State:
    """Tensors of one .safetensors file, or of all in a folder; with an index, of exactly the files it names."""
    if path.is_file():
        return open_safetensors(path)
    indices = sorted(path.glob("*.safetensors.index.json"))
    if indices:
        files = sorted({path / name for index in indices for name in read_json(index)["weight_map"].values()})
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(f"{path}: no .safetensors file in it")
    state: State = {}
    for file in files:
        tensors = open_safetensors(file)
        if twice := state.keys() & tensors.keys():
            raise UserError(f"{file}: {sorted(twice)[0]} stands in another file of the folder too")
        state |= tensors
    return state


def open_safetensors(path: Path) -> State:
    """Tensors of one file, none read yet. Raises UserError when it is absent or damaged."""
    try:
        handle = safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except SafetensorError as error:
        raise UserError(f"{path}: damaged weights file ({error})") from None
    state = {}
    for name in handle.keys():  # noqa: SIM118  not a dict
        piece = handle.get_slice(name)
        dtype = _DTYPES.get(piece.get_dtype())
        if dtype is None:
            raise UserError(f"{path}: {name} is {piece.get_dtype()}; known: {', '.join(_DTYPES)}")
        state[name] = LazyTensor(tuple(piece.get_shape()), dtype, partial(handle.get_tensor, name))
    return state


def read_torch(path: Path) -> State:
    """Tensors of a torch file, mapped and not loaded (but of torch before 1.6). Only they are unpickled, never code."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except (RuntimeError, UnpicklingError, EOFError, ValueError) as error:
        raise UserError(f"{path}: not a file of weights ({_reason(error)})") from None
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected tensors by name")
    wrong = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if wrong:
        raise UserError(f"{path}: {wrong[0]!r} is a {type(content[wrong[0]]).__name__}, expected tensors by name")
    return {name: _known(t) for name, t in content.items()}


def read_deepspeed(path: Path) -> State:
    """fp32 tensors of a DeepSpeed checkpoint, put together by DeepSpeed's own tool, one when it is asked for.

    `path` is the folder with `latest`, or the step's folder with the *_states.pt files. Frozen parameters are there
    only if the run saved them (M6.3).
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder, tag = (path, None) if (path / "latest").exists() else (path.parent, path.name)
    try:
        with _only_tensors():
            gathered = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=tag, lazy_mode=True)
    except (ValueError, FileNotFoundError, RuntimeError, UnpicklingError, KeyError) as error:
        raise UserError(f"{path}: DeepSpeed cannot put this checkpoint together ({_reason(error)})") from None
    state = {name: LazyTensor(tuple(t.shape), t.dtype, t.contiguous) for name, t in gathered.items()}
    return _frozen_of_stage_1(folder / (tag or (folder / "latest").read_text().strip())) | state


def _frozen_of_stage_1(folder: Path) -> State:
    """Parameters that ZeRO 1 saved with the module only, which DeepSpeed's tool passes over: the frozen ones."""
    path = folder / "mp_rank_00_model_states.pt"
    if not path.exists():  # ZeRO 3
        return {}
    with _only_tensors():
        module = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["module"]
    return {name: _known(t) for name, t in module.items()}


def _zero_stage(enum: Any, name: str) -> Any:
    """Stands in for `getattr` in DeepSpeed's files."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    if enum is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
        raise UnpicklingError(f"getattr of {name!r} is not allowed")
    return ZeroStageEnum[name]


def _reason(error: Exception) -> str:
    """The line of an error that says what was wrong; torch puts advice before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if "WeightsUnpickler error" in line), lines[0])[:200]


def _known(tensor: Tensor) -> LazyTensor:
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


@contextmanager
def _only_tensors() -> Iterator[None]:
    """Make DeepSpeed's `torch.load` calls refuse to run code, whatever they ask for."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    name, before = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ[name] = "1"
    try:
        known = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
        # Python 3.11.0 to 3.11.3 pickle a member of an enum as getattr(enum, name); nothing else may be looked up so.
        with torch.serialization.safe_globals([*known, (_zero_stage, "builtins.getattr")]):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
