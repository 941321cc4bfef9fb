"""What `stages/export.py` reads of a run: its result, or a checkpoint, which holds only what the run has trained.

The rest comes from the component folder that the run started from. The checkpoint's manifest names it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from actors.learner.checkpoints.checkpoint_store import (
    AVERAGED,
    MANIFEST,
    RESULT,
    Manifest,
    check_shards,
    complete_checkpoint,
    newest_checkpoint,
)
from deepgen.config import UserError
from deepgen.config.schema.paths import resolve_path
from deepgen.fingerprint import fingerprint
from deepgen.models.presets import PADDINGS
from deepgen.models.stage_parts import TRAINED_PARTS

if TYPE_CHECKING:
    from torch import Tensor

    from deepgen.models.weights_io.layout_reader import Weights
    from deepgen.models.weights_io.tensor_files import State


def find_source(given: Path, *, averages: bool) -> Path:
    """The folder that is meant: of a run its result, or its newest checkpoint until it has finished; others as given.

    Raises UserError if the run has nothing complete yet, or if averages are wanted of something else than a run.
    """
    result = given / (AVERAGED if averages else RESULT)
    newest = newest_checkpoint(given / "checkpoints")
    if newest and (not result.is_dir() or newest[1].step < newest[1].settings["train"]["steps"]):
        return newest[0]  # the result, if any, is of the run before it went on with more steps
    if (result / "bridge").is_dir():
        return result
    if (given / "checkpoints").is_dir():
        raise UserError(f"{given}: the run has no complete checkpoint yet")
    if averages and not is_checkpoint(given):
        raise UserError(f"--ema: got {given}; allowed: a run with train.ema_decay, or one of its checkpoints")
    return given


def padding_of(given: Path) -> str:
    """`model.padding` of a run, its result, one of its checkpoints, or a diffusers folder; else the default."""
    from deepgen.models.weights_io.tensor_files import read_json

    run = given.absolute().parent if given.name in (RESULT, AVERAGED) else given
    newest = newest_checkpoint(run / "checkpoints")
    if newest or is_checkpoint(given):
        manifest = newest[1] if newest else complete_checkpoint(given)
        return str(manifest.settings["model"]["padding"])
    index = given / "model_index.json"
    found = str(read_json(index).get("padding", PADDINGS[0])) if index.is_file() else PADDINGS[0]
    if found not in PADDINGS:
        raise UserError(f"{index}: padding {found!r}; allowed: {', '.join(PADDINGS)}")
    return found


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of a run, complete or not."""
    return (folder / MANIFEST).is_file() or any(folder.glob("engine-*.safetensors"))


@dataclass(frozen=True)
class RunWeights:
    """The trained weights in a checkpoint, the folder that has the others, and the preset of both."""

    trained: Weights
    base: Path
    preset: str


def read_checkpoint(folder: Path, moved: Path | None, *, averages: bool) -> RunWeights:
    """Read a checkpoint of a run. moved: where its model.weights lie now; None if they have not moved.

    Raises UserError if the checkpoint is not complete or has changed, or if model.weights are not those that it was
    trained from.
    """
    from deepgen.models.bridge import BRIDGE_PREFIXES
    from deepgen.models.weights_io.folder import LORA_FOLDER
    from deepgen.models.weights_io.layout_reader import Weights, read_adapter
    from deepgen.models.weights_io.tensor_files import read_safetensors

    manifest = complete_checkpoint(folder)
    if averages and not manifest.ema:
        raise UserError(f"--ema: got {folder}, which has no averages; allowed: a run with train.ema_decay")
    check_shards(folder, 0, 1)
    base = _base(folder, manifest, moved)
    weights = Weights(folder, f"checkpoint of step {manifest.step} ({manifest.stage})")
    if (base / LORA_FOLDER).is_dir():
        weights.lora, weights.lora_alpha = read_adapter(base / LORA_FOLDER)
    if "transformer" in TRAINED_PARTS[manifest.stage]:
        weights.transformer = read_safetensors(base / "transformer")  # for the buffers, which are not trained
    for name, tensor in _trained(folder, manifest, base, weights, averages=averages).items():
        part, _, inner = ("bridge", "", name) if name.startswith(BRIDGE_PREFIXES) else name.partition(".")
        getattr(weights, "lora" if part == "vlm" else part)[inner] = tensor
    if weights.lora and weights.lora_alpha is None:
        weights.lora_alpha = float(manifest.settings["model"]["lora_alpha"])
    weights.merged = not weights.lora  # the run's VLM has none, so there is nothing to add
    return RunWeights(weights, base, manifest.preset)


def _base(folder: Path, manifest: Manifest, moved: Path | None) -> Path:
    then = Path(manifest.settings["model"]["weights"])
    base = moved or resolve_path(then, current_folder_first=False)
    if not base.is_dir():
        raise UserError(
            f"{folder}: its frozen weights lie in model.weights, {then}, which is not there; give --base FOLDER"
        )
    if fingerprint(base) != manifest.weights:
        raise UserError(
            f"{'--base' if moved else 'model.weights'}: {base} is not what the checkpoint {folder} was trained from "
            f"({then}, or the folder has changed)"
        )
    return base


def _trained(folder: Path, manifest: Manifest, base: Path, weights: Weights, *, averages: bool) -> State:
    """The parameters that the stage trains, by their names in the model. None is read yet."""
    import torch

    from actors.learner.checkpoints.checkpoint_shards import AVERAGES, ENGINE, ShardReader
    from actors.learner.checkpoints.zero_layout import WEIGHT
    from deepgen.models.weights_io.tensor_files import LazyTensor

    reader = ShardReader(folder, AVERAGES if averages else ENGINE, 0)

    def read(key: str, shape: tuple[int, ...]) -> Tensor:
        return reader.read(key, 0, math.prod(shape)).view(shape)

    return {
        name: LazyTensor(shape, torch.float32, partial(read, name if averages else f"{WEIGHT}:{name}", shape))
        for name, shape in _shapes(manifest, base, weights).items()
    }


def _shapes(manifest: Manifest, base: Path, weights: Weights) -> dict[str, tuple[int, ...]]:
    """Name and shape of each parameter that the stage trains, from a model as the learner makes it."""
    from deepgen.models.unified import UnifiedModel
    from deepgen.models.vlm import LoraSettings, add_lora
    from deepgen.models.weights_io.folder import read_architecture

    architecture = read_architecture(base, manifest.preset)
    model = UnifiedModel.from_architecture(architecture, "meta")
    rank = weights.lora_rank if weights.lora else manifest.settings["model"]["lora_rank"]
    if manifest.stage == "sft" and rank:
        add_lora(model.vlm, LoraSettings(rank), architecture.fusion_layers[0])
    return {name: tuple(parameter.shape) for name, parameter in model.trainable_parameters(manifest.stage)}
