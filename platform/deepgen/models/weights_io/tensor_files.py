"""Files of tensors: their names, shapes and types, and the values when they are read.

.safetensors with their variants and shards, torch files, and DeepSpeed's folders. Only tensors and plain containers are
unpickled.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deepgen.errors import UserError

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
# Words that libraries put into file names, as in x.fp16.safetensors beside x.safetensors.
_VARIANTS = r"(?:fp|bf|int)\d+\w*|(?:non_)?ema\w*"


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file. Shape and dtype are known; `read` loads the values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


State = dict[str, LazyTensor]


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
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
    return read_files(safetensors_files(path))


def read_files(files: list[Path]) -> State:
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


def safetensors_files(path: Path, variant: str = "") -> list[Path]:
    """The files to read of a folder: those without variant, or the wanted ones where there are any.

    Raises UserError if there is no such file, or if several variants are there and none is wanted or without one.
    """
    if path.is_file():
        return [path]
    found: dict[str, dict[str, list[Path]]] = {}
    for file in sorted(path.glob("*.safetensors*")):
        stem, word = stem_and_variant(file.name, variant)
        if stem:
            found.setdefault(stem, {}).setdefault(word, []).append(file)
    chosen = [file for stem in found for file in _chosen(path / f"{stem}.safetensors", found[stem], variant)]
    if indices := [file for file in chosen if file.suffix == ".json"]:
        chosen = sorted({path / name for index in indices for name in _indexed(index)})
    if not chosen:
        raise UserError(f"{path}: no .safetensors file in it")
    return chosen


def stem_and_variant(name: str, variant: str) -> tuple[str, str]:
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
    if strange := sorted(name for name in files.values() if name in ("", "..") or Path(name).name != name):
        raise UserError(f"{index}: weight_map names the file {strange[0]!r:.60}; allowed: files beside it")
    return set(files.values())


def read_metadata(files: list[Path]) -> dict[str, str]:
    """What .safetensors files say beside their tensors."""
    metadata: dict[str, str] = {}
    for file in files:
        metadata |= _open(file).metadata() or {}
    return metadata


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
    return {name: _known(path, name, t) for name, t in content.items()}


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
            module, partitioned = _module(folder / (tag or (folder / "latest").read_text(encoding="utf-8").strip()))
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
    return {name: _known(path, name, t) for name, t in content["module"].items()}, partitioned


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


def _known(path: Path, name: str, tensor: Tensor) -> LazyTensor:
    """A tensor of a torch file. UserError for one that is not dense, or of a type whose numbers need a scale (fp8)."""
    if tensor.is_floating_point() and tensor.dtype not in _DTYPES.values():
        raise UserError(f"{path}: {name} is {tensor.dtype}; known: {', '.join(map(str, _DTYPES.values()))}")
    if tensor.layout is not torch.strided or tensor.is_meta:
        what = "a meta tensor, which has no values" if tensor.is_meta else f"a tensor of layout {tensor.layout}"
        raise UserError(f"{path}: {name} is {what}; allowed: dense tensors")
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
