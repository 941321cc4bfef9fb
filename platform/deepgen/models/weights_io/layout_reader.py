"""Reads published checkpoints: every layout of M6 becomes the same sets of tensors, read only when used.

| layout      | what it is                                                            |
|-------------|-----------------------------------------------------------------------|
| components  | our folder (`weights_io.folder`)                                      |
| diffusers   | transformer/ vae/ vlm/ connector/ scheduler/ tokenizer/, LoRA merged  |
| native      | one .pt, .pth or .safetensors file, with or without `state_dict`      |
| deepspeed   | a DeepSpeed checkpoint folder, ZeRO 0-3, also one named *.pth          |
| safetensors | a folder of native keys in one or several .safetensors files          |
| adapter     | a LoRA of the DiT or of the VLM, in the folder that peft writes        |

Tensors get the names they have in `UnifiedModel`. For the VLM these are the names of transformers >= 4.52, whatever
version wrote the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from deepgen.errors import UserError
from deepgen.models.bridge import BRIDGE_PREFIXES
from deepgen.models.weights_io.tensor_files import (
    LazyTensor,
    State,
    read_deepspeed,
    read_files,
    read_json,
    read_metadata,
    read_safetensors,
    read_torch,
    safetensors_files,
    stem_and_variant,
)

_OUTER = re.compile(r"^(?:(?:module|model)\.)+")  # prefixes that wrappers of the whole model add to names
# Options of peft that change the formula of M1.10, or add tensors to it.
_OTHER_MATHS = (
    *("use_rslora", "use_dora", "use_qalora", "use_bdlora", "alpha_pattern", "rank_pattern", "fan_in_fan_out"),
    *("modules_to_save", "lora_bias", "target_parameters", "trainable_token_indices", "layer_replication"),
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config"),
)
# Options of peft, and their values that do neither. Other ways to begin (PiSSA, OLoRA, ...) change the base as well.
_PLAIN_LORA: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
ADAPTER_CONFIG = "adapter_config.json"
PEFT_PREFIX = "base_model.model."  # peft's prefix for the names of a wrapped model
_DIT_MODULES = ("transformer_blocks", "context_embedder", "norm_out", "pos_embed", "proj_out", "time_text_embed")
_VLM_MODULES = ("model", "visual", "lm_head")
# Metadata keys of native .safetensors files: the tensors tell neither alpha nor whether the LoRA is merged already.
ALPHA_KEY, MERGED_KEY = "lora_alpha", "vlm_merged"

Name = TypeVar("Name")


@dataclass
class Weights:
    """The content of a checkpoint. A part that the checkpoint lacks is empty.

    lora: adapter parameters by their names in the VLM. lora_alpha: None if the layout does not contain it (M1.10: then
    2 x rank).
    dit_lora: adapter parameters by their names in the transformer, with their alpha. They are merged when written.
    merged: the VLM is there, and its LoRA, if it ever had one, is already in its weights.
    variant: which files to take where a folder has several that hold the same tensors; "" for those without variant.
    padding: how the model was trained to read prompts (model.padding), where that is known.
    """

    where: Path
    layout: str
    variant: str = ""
    variant_found: bool = False
    bridge: State = field(default_factory=dict)
    transformer: State = field(default_factory=dict)
    vae: State = field(default_factory=dict)
    vlm: State = field(default_factory=dict)
    lora: State = field(default_factory=dict)
    lora_alpha: float | None = None
    dit_lora: State = field(default_factory=dict)
    dit_alpha: float = 0.0
    merged: bool = False
    padding: str = "masked"

    def take(self, path: Path) -> State:
        """Tensors of one .safetensors file, or of a folder of them in the wanted variant."""
        files = safetensors_files(path, self.variant)
        self.variant_found |= any(stem_and_variant(file.name, self.variant)[1] == self.variant for file in files)
        return read_files(files)

    @property
    def lora_rank(self) -> int:
        return _rank(self.lora, self.where)

    @property
    def dit_rank(self) -> int:
        return _rank(self.dit_lora, self.where)


def _rank(lora: State, where: Path) -> int:
    ranks = (t.shape[0] for name, t in lora.items() if ("lora_A" in name or "embedding_A" in name) and t.shape)
    rank = next(ranks, 0)
    if not rank:
        raise UserError(f"{where}: {next(iter(lora))} has no lora_A beside it that tells the LoRA's rank")
    return rank


def detect_layout(path: Path) -> str:
    """Name of the layout of a checkpoint (see the module). Raises UserError if `path` has none of them."""
    if path.is_file():
        if path.suffix in (".pt", ".pth", ".bin", ".safetensors"):
            return "native"
        raise UserError(f"{path}: a weights file ends in .pt, .pth, .bin or .safetensors")
    if not path.is_dir():
        raise UserError(f"{path} does not exist")
    if layout := _folder_layout(path):
        return layout
    inside = sorted(f.name for f in path.iterdir() if f.is_dir() and _folder_layout(f) not in ("", "safetensors"))
    raise UserError(
        f"{path}: not a checkpoint{f', but {inside[0]}/ in it is one' if inside else ''}; known: a component folder "
        f"(bridge/), a diffusers folder (connector/), a LoRA ({ADAPTER_CONFIG}), a DeepSpeed folder (latest or "
        "*_optim_states.pt), a folder of .safetensors, or one weights file"
    )


def _folder_layout(path: Path) -> str:
    if (path / "bridge").is_dir():
        return "components"
    if (path / "connector").is_dir() or (path / "model_index.json").exists():
        return "diffusers"
    if (path / ADAPTER_CONFIG).exists():
        return "adapter"
    if (path / "latest").exists() or any(path.glob("*_optim_states.pt")) or any(path.glob("*_model_states.pt")):
        return "deepspeed"
    return "safetensors" if any(path.glob("*.safetensors")) else ""


def read_weights(path: Path, variant: str = "") -> Weights:
    """Names, shapes and dtypes of a checkpoint in any layout. Values are read on demand.

    variant: fp16 for x.fp16.safetensors; "" for x.safetensors.
    Raises UserError naming the file that is missing or damaged, or the tensors that belong to no part.
    """
    layout = detect_layout(path)
    weights = Weights(path, layout, variant)
    if layout in ("components", "diffusers"):
        _read_folder(weights)
    elif layout == "adapter":
        _read_lora(weights)
    elif layout == "deepspeed":
        _sort(weights, read_deepspeed(path))
    elif path.is_dir() or path.suffix == ".safetensors":
        _sort(weights, weights.take(path))
        _read_metadata(weights)
    else:
        _sort(weights, read_torch(path))
    return weights


def _read_folder(weights: Weights) -> None:
    """Read every part that has a folder. The other parts come from the bases."""
    folder = weights.where

    def part(name: str) -> State:
        return weights.take(folder / name) if (folder / name).is_dir() else {}

    weights.transformer, weights.vae = part("transformer"), part("vae")
    weights.vlm = renamed(folder / "vlm", part("vlm"), vlm_name)
    weights.bridge = part("connector" if weights.layout == "diffusers" else "bridge")
    if weights.layout == "components" and (folder / "vlm_lora").is_dir():
        weights.lora, weights.lora_alpha = read_adapter(folder / "vlm_lora")
    weights.merged = bool(weights.vlm) and not weights.lora


def _read_lora(weights: Weights) -> None:
    """Read a peft folder that is a checkpoint by itself. The names of its tensors tell what it adapts."""
    folder = weights.where
    state, alpha = _adapter(folder)
    parts = {name: _adapted(name) for name in state}
    if strange := sorted(name for name, (part, _) in parts.items() if not part):
        raise UserError(
            f"{folder}: {len(strange)} tensors adapt no part of the model: {', '.join(strange[:3])}; known: a LoRA of "
            f"the DiT ({', '.join(_DIT_MODULES)}) or of the VLM ({', '.join(_VLM_MODULES)})"
        )
    for (part, name), tensor in renamed(folder, state, _adapted).items():
        getattr(weights, part)[name] = tensor
    weights.lora_alpha, weights.dit_alpha = alpha if weights.lora else None, alpha


def _adapted(name: str) -> tuple[str, str]:
    """The adapter that a tensor of a peft folder belongs to ("" if unknown), and the tensor's name in it."""
    inner = re.sub(r"^(?:transformer|lmm|vlm)\.", "", name.removeprefix(PEFT_PREFIX))
    module = inner.partition(".")[0]
    if module in _DIT_MODULES:
        return "dit_lora", _with_adapter_name(inner)
    return ("lora", lora_name(inner)) if module in _VLM_MODULES else ("", name)


def read_adapter(folder: Path) -> tuple[State, float]:
    """The parameters in a peft folder, by their names in the VLM, and its alpha.

    Raises UserError for options under which a module's delta is not alpha / rank · B·A.
    """
    state, alpha = _adapter(folder)
    return renamed(folder, state, lora_name), alpha


def _adapter(folder: Path) -> tuple[State, float]:
    """The parameters in a peft folder, by the names in its file, and its alpha."""
    path = folder / ADAPTER_CONFIG
    config = read_json(path)
    for key in _OTHER_MATHS:
        if config.get(key):
            raise UserError(f"{path}: {key} is {config[key]!r}; only plain LoRA can be read, where it is not set")
    for key, plain in _PLAIN_LORA.items():
        if config.get(key, plain[0]) not in plain:
            allowed = ", ".join(map(repr, plain))
            raise UserError(f"{path}: {key} is {config[key]!r}; only plain LoRA can be read, where it is {allowed}")
    state, alpha = read_safetensors(folder), _alpha_of(config.get("lora_alpha"), path)
    if state and config.get("r") != (rank := _rank(state, folder)):
        raise UserError(f"{path}: r is {config.get('r')!r}, but the tensors have rank {rank}")
    return state, alpha


def _alpha_of(given: object, where: Path) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given):
        raise UserError(f"{where}: lora_alpha is {given!r}, expected a number")
    return float(given)


def _sort(weights: Weights, state: State) -> None:
    """Distribute the tensors of a native state dict over the parts they belong to (M6.2)."""
    if not state:
        raise UserError(f"{weights.where}: no tensors in it")
    if strange := sorted(name for name in state if not _place(name)[0]):
        raise UserError(
            f"{weights.where}: {len(strange)} tensors belong to no part of the model: {', '.join(strange[:3])}; "
            f"known: meta_queries, projector_*, connector.*, transformer.*, vae.*, lmm.*; a LoRA is read with its "
            f"{ADAPTER_CONFIG}, from the folder that peft writes"
        )
    if lora := sorted(name for name in state if _place(name)[0] == "transformer" and ".lora_" in name):
        raise UserError(
            f"{weights.where}: {len(lora)} tensors are a LoRA of the DiT ({lora[0]}, …), and its alpha is not there; "
            f"give the folder that peft writes, with {ADAPTER_CONFIG}"
        )
    for (part, name), tensor in renamed(weights.where, state, _place).items():
        getattr(weights, part)[name] = tensor


def _place(name: str) -> tuple[str, str]:
    """The part that a native tensor belongs to ("" if unknown), and the tensor's name in that part."""
    name = _OUTER.sub("", name)
    head, _, inner = name.partition(".")
    if name.startswith(BRIDGE_PREFIXES):
        return "bridge", name
    if head in ("transformer", "vae"):
        return head, inner
    if head in ("lmm", "vlm"):
        return ("lora", lora_name(inner)) if ".lora_" in inner else ("vlm", vlm_name(inner))
    return "", name


def _read_metadata(weights: Weights) -> None:
    """Set alpha and `merged` from the files' metadata, if it is there: only files that this program wrote have it."""
    metadata = read_metadata(safetensors_files(weights.where, weights.variant))
    weights.merged = bool(weights.vlm) and not weights.lora and metadata.get(MERGED_KEY) == "true"
    if weights.lora and (given := metadata.get(ALPHA_KEY)) is not None:
        try:
            weights.lora_alpha = _alpha_of(float(given), weights.where)
        except ValueError:
            raise UserError(f"{weights.where}: {ALPHA_KEY} in its metadata is {given!r}, expected a number") from None


# ---------------------------------------------------------------- names


def vlm_name(name: str) -> str:
    """Name of a base weight in transformers >= 4.52: without LoRA's `base_layer`, and older layouts renamed."""
    name = name.replace(".base_layer.", ".")
    if name.startswith("visual."):
        return "model." + name
    return re.sub(r"^model\.(layers|embed_tokens|norm)\.", r"model.language_model.\1.", name)


def lora_name(name: str) -> str:
    """Name of an adapter parameter in the VLM, whatever prefix and version its file has."""
    return _with_adapter_name(vlm_name(name.removeprefix(PEFT_PREFIX)))


def _with_adapter_name(name: str) -> str:
    """The name with the adapter name "default", which peft's files leave out."""
    if ".default" in name:
        return name
    if name.endswith((".lora_embedding_A", ".lora_embedding_B")):
        return name + ".default"
    return name.removesuffix(".weight") + ".default.weight"


def renamed(where: Path, state: State, rename: Callable[[str], Name]) -> dict[Name, LazyTensor]:
    """The tensors under their new names. Raises UserError if two of them get the same name."""
    result: dict[Name, LazyTensor] = {}
    before: dict[Name, str] = {}
    for name, tensor in state.items():
        key = rename(name)
        if key in result:
            raise UserError(f"{where}: {before[key]} and {name} are two names of one tensor; leave one of them out")
        result[key], before[key] = tensor, name
    return result
