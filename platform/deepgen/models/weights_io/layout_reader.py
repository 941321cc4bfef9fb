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
version wrote the file. Only tensors and plain containers are unpickled.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deepgen.errors import UserError
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
# Words that libraries put into file names, as in x.fp16.safetensors beside x.safetensors.
_VARIANTS = r"(?:fp|bf|int)\d+\w*|(?:non_)?ema\w*"
# Metadata keys of native .safetensors files: the tensors tell neither alpha nor whether the LoRA is merged already.
ALPHA_KEY, MERGED_KEY = "lora_alpha", "vlm_merged"


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file. Shape and dtype are known; `read` loads the values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


State = dict[str, LazyTensor]
Name = TypeVar("Name")


@dataclass
class Weights:
    """The content of a checkpoint. A part that the checkpoint lacks is empty.

    lora: adapter parameters by their names in the VLM. lora_alpha: None if the layout does not contain it (M1.10: then
    2 x rank).
    dit_lora: adapter parameters by their names in the transformer, with their alpha. They are merged when written.
    merged: the VLM is there, and its LoRA, if it ever had one, is already in its weights.
    variant: which files to take where a folder has several that hold the same tensors; "" for those without variant.
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

    def take(self, path: Path) -> State:
        """Tensors of one .safetensors file, or of a folder of them in the wanted variant."""
        files = _safetensors_files(path, self.variant)
        self.variant_found |= any(_stem_and_variant(file.name, self.variant)[1] == self.variant for file in files)
        return _read_all(files)

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


# ---------------------------------------------------------------- files


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected an object {{...}}")
    return content


def read_safetensors(path: Path) -> State:
    """Tensors of one .safetensors file, or of all in a folder; with an index, of exactly the files it lists."""
    return _read_all(_safetensors_files(path))


def _read_all(files: list[Path]) -> State:
    state: State = {}
    for file in files:
        tensors = open_safetensors(file)
        if twice := state.keys() & tensors.keys():
            raise UserError(
                f"{file}: {sorted(twice)[0]} stands in another file of the folder too; leave one of them out, or give "
                "--variant WORD if the names are x.safetensors and x.WORD.safetensors"
            )
        state |= tensors
    return state


def _safetensors_files(path: Path, variant: str = "") -> list[Path]:
    """The files to read of a folder: those without variant, or the wanted ones where there are any.

    Raises UserError if there is no such file, or if several variants are there and none is wanted or without one.
    """
    if path.is_file():
        return [path]
    found: dict[str, dict[str, list[Path]]] = {}
    for file in sorted(path.glob("*.safetensors*")):
        stem, word = _stem_and_variant(file.name, variant)
        if stem:
            found.setdefault(stem, {}).setdefault(word, []).append(file)
    chosen = [file for stem in found for file in _chosen(path / f"{stem}.safetensors", found[stem], variant)]
    if indices := [file for file in chosen if file.suffix == ".json"]:
        chosen = sorted({path / name for index in indices for name in _indexed(index)})
    if not chosen:
        raise UserError(f"{path}: no .safetensors file in it")
    return chosen


def _stem_and_variant(name: str, variant: str) -> tuple[str, str]:
    """("x", "fp16") for x.fp16.safetensors, its shards and its index, in all spellings; ("", "") for other files.

    variant: a word that is a variant too, beside the usual ones.
    """
    word = rf"(?:\.({_VARIANTS}{'|' + re.escape(variant) if variant else ''}))?"
    pattern = rf"(.+?){word}(?:-\d+-of-\d+)?{word}\.safetensors(?:\.index{word}\.json)?"
    match = re.fullmatch(pattern, name)
    return (match[1], match[2] or match[3] or match[4] or "") if match else ("", "")


def _chosen(file: Path, variants: Mapping[str, list[Path]], wanted: str) -> list[Path]:
    """The files of the wanted variant. file: the name without variant."""
    if wanted in variants:
        return variants[wanted]
    if len(variants) == 1 and not (wanted and "" not in variants):
        return next(iter(variants.values()))
    allowed = ", ".join(word or "to leave it out" for word in sorted(variants, reverse=True))
    raise UserError(f"--variant: got {wanted or 'nothing'} for {file}; allowed: {allowed}")


def _indexed(index: Path) -> set[str]:
    """Names of the files that a shard index lists."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise UserError(f"{index}: weight_map is {files!r:.40}, expected an object of tensor: file")
    return set(files.values())


def _read_metadata(weights: Weights) -> None:
    """Set alpha and `merged` from the files' metadata, if it is there: only files that this program wrote have it."""
    metadata: dict[str, str] = {}
    for file in _safetensors_files(weights.where, weights.variant):
        metadata |= _open(file).metadata() or {}
    weights.merged = bool(weights.vlm) and not weights.lora and metadata.get(MERGED_KEY) == "true"
    if weights.lora and (given := metadata.get(ALPHA_KEY)) is not None:
        try:
            weights.lora_alpha = _alpha_of(float(given), weights.where)
        except ValueError:
            raise UserError(f"{weights.where}: {ALPHA_KEY} in its metadata is {given!r}, expected a number") from None


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except SafetensorError as error:
        raise UserError(f"{path}: damaged weights file ({error})") from None


def open_safetensors(path: Path) -> State:
    """Tensors of one file, none read yet. Raises UserError if the file is missing or damaged."""
    handle = _open(path)
    state = {}
    for name in handle.keys():  # noqa: SIM118  not a dict
        piece = handle.get_slice(name)
        dtype = _DTYPES.get(piece.get_dtype())
        if dtype is None:
            raise UserError(f"{path}: {name} is {piece.get_dtype()}; known: {', '.join(_DTYPES)}")
        state[name] = LazyTensor(tuple(piece.get_shape()), dtype, partial(handle.get_tensor, name))
    return state


def read_torch(path: Path) -> State:
    """Tensors of a torch file, memory-mapped (files of torch before 1.6 are loaded). Never unpickles code."""
    try:
        with torch.serialization.safe_globals(_stand_ins()):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except Exception as error:  # text read as a pickle can raise anything
        raise UserError(f"{path}: not a file of weights ({_reason(error)})") from error
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected tensors by name")
    for name, value in content.items():
        if not isinstance(name, str):
            raise UserError(f"{path}: {name!r} is the name of a {type(value).__name__}, expected tensors by name")
        if not isinstance(value, Tensor):
            raise UserError(f"{path}: {name!r} is a {type(value).__name__}, expected tensors by name")
    return {name: _known(t) for name, t in content.items()}


def read_deepspeed(path: Path) -> State:
    """fp32 tensors of a DeepSpeed checkpoint. DeepSpeed's own tool assembles each one when it is read.

    `path` is the folder with `latest`, or the step's folder with the *_states.pt files. Frozen parameters are present
    only if the run saved them (M6.3). ZeRO 0 has no partitions, and its tensors have the type of the model: the masters
    of a bf16 model have no names.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    real = path.resolve()  # "." has neither a parent nor a name
    folder, tag = (real, None) if (real / "latest").exists() else (real.parent, real.name)
    try:
        with _only_tensors():
            module, partitioned = _module(folder / (tag or (folder / "latest").read_text().strip()))
            gathered: Mapping[str, Any] = {}
            if partitioned:
                gathered = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=tag, lazy_mode=True)
    except Exception as error:  # the tool checks little; a damaged file can raise anything
        raise UserError(f"{path}: DeepSpeed cannot put this checkpoint together ({_reason(error)})") from error
    return module | {name: LazyTensor(tuple(t.shape), t.dtype, t.contiguous) for name, t in gathered.items()}


def _module(folder: Path) -> tuple[State, bool]:
    """Tensors that are saved with the module, and whether others lie in partitions, where DeepSpeed's tool looks.

    ZeRO 0 saves everything with the module; ZeRO 1 and 2 all of it in the model's type, of which the frozen
    parameters are nowhere else. Call this inside `_only_tensors`.
    """
    path = folder / "mp_rank_00_model_states.pt"
    if not path.exists():  # ZeRO 3 has no such file
        return {}, True
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    partitioned = content.get("param_shapes") is not None or any(folder.glob("*_optim_states.pt"))
    if not partitioned and len(files := sorted(folder.glob("*_model_states.pt"))) > 1:
        raise ValueError(f"its model is split over {len(files)} files, as {files[1].name}")
    return {name: _known(t) for name, t in content["module"].items()}, partitioned


def _zero_stage(enum: Any, name: str) -> Any:
    """Replaces `getattr` while DeepSpeed's files are unpickled: it only finds members of ZeroStageEnum."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    if enum is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
        raise UnpicklingError(f"getattr of {name!r} is not allowed")
    return ZeroStageEnum[name]


def _reason(error: Exception) -> str:
    """The line of an error message that says what was wrong; torch puts advice before it."""
    text = repr(error) if isinstance(error, KeyError) else str(error)  # str of a KeyError is the bare key
    text = text.rpartition("WeightsUnpickler error:")[2]
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)[:200]


def _known(tensor: Tensor) -> LazyTensor:
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


class _NotATensor:
    """Replaces what training code saves beside the tensors (logs, NumPy values). Accepts anything, does nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def _stand_ins() -> list[Any]:
    """Entries for `safe_globals`: mmengine writes a `message_hub` of logs and NumPy scalars into every checkpoint."""
    array = [f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")]
    names = ("mmengine.logging.history_buffer.HistoryBuffer", "numpy.ndarray", "numpy.dtype", *array)
    return [(_NotATensor, name) for name in names]


@contextmanager
def _only_tensors() -> Iterator[None]:
    """Make DeepSpeed's `torch.load` calls refuse to run code, whatever arguments they pass."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    name, before = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ[name] = "1"
    try:
        known = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
        # Python 3.11.0 to 3.11.3 pickle an enum member as getattr(enum, name). `_zero_stage` allows this lookup only.
        with torch.serialization.safe_globals([*known, (_zero_stage, "builtins.getattr"), *_stand_ins()]):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
