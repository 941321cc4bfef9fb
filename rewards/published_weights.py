"""Weights as their authors published them, in transformers' classes. Every name and shape is checked.

transformers itself only warns of weights that are missing and leaves them random, and a random judge gives scores too.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from deepgen.errors import UserError


def read_checkpoint(file: Path, *, key: str) -> dict[str, Any]:
    """The dictionary that `torch.save` wrote; only tensors and plain values are read, so no code in it can run.

    key: setting that error messages name. Raises UserError for anything else, and for a file that is damaged.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{key}: {str(file)!r} is no file of weights: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{key}: {str(file)!r} holds a {type(content).__name__}; wanted a dictionary of weights")
    return content


def tensors_in(content: object, file: Path, *, key: str) -> dict[str, Tensor]:
    """`content` as weights by name, in float32. Raises UserError if it is anything else."""
    if not isinstance(content, dict) or not content:
        raise UserError(f"{key}: {str(file)!r} holds no weights by name")
    strange = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if strange:
        raise UserError(f"{key}: in {str(file)!r} {strange[0]!r} is no tensor")
    return {str(name): value.float() if value.is_floating_point() else value for name, value in content.items()}


def model_config(folder: Path, kind: str, *, key: str) -> Any:
    """The transformers config in a folder. Raises UserError if it is of another kind of model than `kind`."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, OSError) as error:
        raise UserError(f"{key}: {str(folder / 'config.json')!r} is no model's config: {_one_line(error)}") from error
    if config.model_type != kind:
        raise UserError(f"{key}: {str(folder)!r} holds a {config.model_type!r} model; wanted a {kind!r}")
    return config


def load_model(
    kind: Any,
    config: Any,
    source: Path,
    *,
    key: str,
    state: dict[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    **arguments: Any,
) -> Any:
    """A transformers model, frozen and in evaluation mode.

    Args:
        kind: its class, such as CLIPModel.
        config: its config.
        source: folder with its weights, or the file from which `state` was read.
        key: setting that error messages name.
        state: weights by transformers' names; by default those in the folder.
        dtype: of the weights, whatever they were stored in.
        arguments: of the class, besides its config.

    Raises:
        UserError: there are no weights, one is missing, one has another shape than the config says, or `state` has
            one that the model does not have.
    """
    try:
        model, report = kind.from_pretrained(
            source if state is None else None,
            config=config,
            state_dict=state,
            dtype=dtype,
            ignore_mismatched_sizes=True,  # the report has them
            output_loading_info=True,
            **arguments,
        )
    except (OSError, SafetensorError) as error:
        raise UserError(f"{key}: {str(source)!r} holds no weights of a {kind.__name__}: {_one_line(error)}") from error
    if wrong := sorted(str(name) for name, *_ in report["mismatched_keys"]):
        raise UserError(f"{key}: in {str(source)!r} {wrong[0]} has another shape than config.json says{_more(wrong)}")
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{key}: {str(source)!r} has no {missing[0]}{_more(missing)}")
    if state is not None and (strange := sorted(report["unexpected_keys"])):
        raise UserError(f"{key}: {str(source)!r} has {strange[0]}{_more(strange)}, for which its model has no place")
    return model.eval().requires_grad_(False)


def load_linear(weights: Mapping[str, Tensor], name: str, inside: int, out: int, file: Path, *, key: str) -> nn.Linear:
    """A frozen linear layer of given widths, in float32. Raises UserError if `weights` has none called `name`."""
    layer = nn.Linear(inside, out)
    for kind, parameter in layer.named_parameters():
        value = weights.get(f"{name}.{kind}")
        if value is None or value.shape != parameter.shape:
            found = "none" if value is None else list(value.shape)
            raise UserError(f"{key}: in {str(file)!r} {name}.{kind} must be {list(parameter.shape)}, is {found}")
        parameter.data = value.float()
    return layer.requires_grad_(False)


def _more(names: list[str]) -> str:
    return f", nor {len(names) - 1:,} others" if len(names) > 1 else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
