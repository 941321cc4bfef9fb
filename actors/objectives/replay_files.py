"""Steps of experience on disk, to train from them alone: what a learner gets of a step, and nothing else.

    <folder>/step-000003.safetensors    arrays of its groups: trajectory, conditioning, scores, weights, advantages
    <folder>/step-000003.json           everything else: versions, prompts, metrics, checksum, the settings that matter
    <folder>/recipe.yaml                all settings of the run, for the command that trains from these files
    <folder>/state/                     of a step that failed: weights and moments it began with (`checkpoint_shards`)

Each learner rank writes its own groups of a step that failed, as `step-000007-part-1-of-4`. Left out: images, which the
learner never sees, and the records of the auxiliary loss, which follow from seed and step. Arrays and JSON only: a file
from somewhere else can mislead, but not run code.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from actors.learner.checkpoints.checkpoint_store import STATE
from actors.learner.protocols import Replayed
from actors.messages import Arrays, Group
from deepgen.config import Settings, UserError, shown_settings, stage_command
from deepgen.config.schema.sections import MAX_NAME
from deepgen.data.records import Record
from deepgen.fingerprint import file_checksum, fingerprint

FORMAT = 1
RECIPE = "recipe.yaml"
_REPLAY = "-replay"  # ends the name of a run on the steps
_ARRAYS = ("reward_weights", "scores", "advantages")
_TEXTS = ("id", "task", "prompt", "answer", "source")
_KEYS = {"format", "step", "part", "parts", "settings", "groups", "metrics", "arrays"}
# What the arrays of a step depend on, apart from the weights.
_SETTINGS = {
    "run": ("seed",),
    "model": ("preset", "padding"),
    "data": ("image_size",),
    "rollout": (
        "group_size", "prompts_per_step", "sampler", "eta", "num_steps", "shift", "guidance_scale", "sde_steps",
        "sde_window",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class StoredGroup:
    """A group of a step, with the arrays of its trajectory. `own`: advantages it had when it came alone, if it did."""

    position: int  # in the step, from 0
    group: Group
    own: np.ndarray | None = None


# -- writing ---------------------------------------------------------------------------------------------------------


def write_step(
    folder: Path,
    settings: Settings,
    step: int,
    groups: Sequence[StoredGroup],
    metrics: Mapping[str, float],
    part: tuple[int, int] = (0, 1),
) -> None:
    """Write a step, or one rank's (rank, ranks) part of it. The JSON comes last: without it a step is not there.

    Raises OSError or SafetensorError if a file cannot be written.
    """
    from safetensors.numpy import save_file

    number, parts = part
    stem = f"step-{step:06d}" + (f"-part-{number}-of-{parts}" if parts > 1 else "")
    arrays = {f"{g.position}/{name}": np.asarray(a, order="C") for g in groups for name, a in _arrays(g).items()}
    file, unfinished = folder / f"{stem}.safetensors", folder / f".{stem}.writing"
    save_file(arrays, unfinished)
    content: dict[str, Any] = {
        "format": FORMAT,
        "step": step,
        "part": number,
        "parts": parts,
        "settings": _that_matter(settings),
        "groups": [_describe(stored) for stored in groups],
        "metrics": {name: value for name, value in metrics.items() if math.isfinite(value)},
        "arrays": file_checksum(unfinished),
    }
    unfinished.rename(file)
    unfinished.write_text(json.dumps(content | {"checksum": _checksum_of(content)}, indent=1), encoding="utf-8")
    unfinished.rename(file.with_suffix(".json"))


def write_recipe(folder: Path, settings: Settings) -> str:
    """Write the run's settings beside its steps, without secrets, and return the command that trains from these."""
    content = shown_settings(settings)
    content["run"] |= {"name": f"{settings.run.name[: MAX_NAME - len(_REPLAY)]}{_REPLAY}", "resume": False}
    (folder / RECIPE).write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return stage_command("rl", "--recipe", folder / RECIPE, "--train-only", folder)


def not_finite(groups: Sequence[Group], rewards: Sequence[str]) -> str:
    """What in these groups, with the arrays of their trajectories, is not finite; "" if all is. NaN scores are missing.

    rewards: names of the K rewards.
    """
    for group in groups:
        for k, name in enumerate(rewards):
            if np.isinf(group.scores[:, k]).any():
                return f"the reward {name} of {group}"
    for group in groups:
        arrays = {"advantages": group.advantages} | group.trajectory
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                return f"the {name} of {group}"
    return ""


def _arrays(stored: StoredGroup) -> Arrays:
    group, own = stored.group, {} if stored.own is None else {"own": stored.own}
    named = {name: getattr(group, name) for name in _ARRAYS} | own
    return named | {f"samples/{name}": array for name, array in group.trajectory.items()}


def _describe(stored: StoredGroup) -> dict[str, Any]:
    group = stored.group
    texts = {name: getattr(group.record, name) for name in _TEXTS}
    named = {"number": group.number, "epoch": group.epoch, "version": group.version, "diversity": group.diversity}
    return {"position": stored.position, **named, "record": texts}


def _that_matter(settings: Settings) -> dict[str, Any]:
    found = {f"{s}.{key}": getattr(getattr(settings, s), key) for s, keys in _SETTINGS.items() for key in keys}
    return found | {"model.weights": fingerprint(Path(settings.model.weights))}


# -- reading ---------------------------------------------------------------------------------------------------------


def find_steps(folder: Path) -> Replayed:
    """The steps in a folder, which must follow one another. Raises UserError if there are none, or some are missing."""
    numbers = sorted({int(content["step"]) for _, content in _contents(folder)})
    steps = range(numbers[0], numbers[-1] + 1)
    if len(steps) != len(numbers):
        raise UserError(f"{folder}: it has the steps {numbers}; allowed: steps that follow one another")
    return Replayed(steps, folder / STATE if (folder / STATE).is_dir() else None)


def check_steps(folder: Path, settings: Settings) -> Replayed:
    """As `find_steps`, after reading every file. Raises UserError if one is damaged or does not fit the settings."""
    recorded = find_steps(folder)
    now, count = _that_matter(settings), settings.rollout.prompts_per_step
    for file, content in _contents(folder):
        for key, then in content["settings"].items():
            if now.get(key) != then:
                given = settings.model.weights if key == "model.weights" else now.get(key)
                then = "the weights folder" if key == "model.weights" else then
                raise UserError(f"{key}: got {given}; allowed: {then}, with which {file} was written")
        arrays = file.with_suffix(".safetensors")
        if not arrays.is_file() or file_checksum(arrays) != content["arrays"]:
            raise UserError(f"{arrays}: is missing or has changed since it was written; allowed: the files as written")
    for step in recorded.steps:
        positions = sorted(group["position"] for _, content in _contents(folder, step) for group in content["groups"])
        if positions != list(range(count)):
            raise UserError(f"{folder}: step {step} has the groups {positions}; allowed: all {count}")
    if recorded.steps.stop > settings.train.steps:
        raise UserError(
            f"train.steps: got {settings.train.steps}; allowed: {recorded.steps.stop} or more, as {folder} has the "
            f"steps {recorded.steps.start} to {recorded.steps.stop - 1} (they count from 0)"
        )
    return recorded


def read_groups(folder: Path, step: int, positions: Sequence[int]) -> list[StoredGroup]:
    """These groups of a step, in order."""
    found = {stored.position: stored for stored in _read(folder, step, positions)}
    return [found[position] for position in positions]


def read_metrics(folder: Path, step: int) -> dict[str, float]:
    """The metrics that the step was handed out with."""
    content = next(content for _, content in _contents(folder, step))
    return dict(content["metrics"])


def _read(folder: Path, step: int, positions: Sequence[int]) -> Iterator[StoredGroup]:
    from safetensors import safe_open

    for file, content in _contents(folder, step):
        with safe_open(file.with_suffix(".safetensors"), framework="numpy") as opened:
            names = list(opened.keys())
            for described in content["groups"]:
                if described["position"] in positions:
                    prefix = f"{described['position']}/"
                    own = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
                    yield _group(step, described, {key: opened.get_tensor(name) for key, name in own.items()})


def _group(step: int, described: Mapping[str, Any], arrays: Arrays) -> StoredGroup:
    record = Record(**described["record"], image=None, references=())
    group = Group(described["number"], step, described["epoch"], record, described["version"])
    samples = {name.removeprefix("samples/"): a for name, a in arrays.items() if name.startswith("samples/")}
    named: dict[str, Any] = {name: arrays[name] for name in _ARRAYS}
    filled = replace(group, trajectory=samples, diversity=described["diversity"], **named)
    return StoredGroup(described["position"], filled, arrays.get("own"))


def _contents(folder: Path, step: int | None = None) -> list[tuple[Path, dict[str, Any]]]:
    """File and content of every JSON in a folder, or of those of one step, checked. UserError if there is none."""
    pattern = "step-*.json" if step is None else f"step-{step:06d}*.json"
    files = sorted(folder.glob(pattern)) if folder.is_dir() else []
    if not files:
        raise UserError(
            f"{folder}: there is no {pattern}; allowed: a folder of steps, as --rollout-only or a failed step writes it"
        )
    found = [(file, _content(file)) for file in files]
    return [(file, content) for file, content in found if step in (None, content["step"])]


def _content(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{file}: cannot be read; allowed: the file as --rollout-only or a failed step wrote it")
    if content.get("format") != FORMAT:
        raise UserError(f"{file}: format {content.get('format')}; allowed: {FORMAT}")
    checksum = content.pop("checksum", None)
    if content.keys() != _KEYS or checksum != _checksum_of(content):
        raise UserError(f"{file}: has changed since it was written; allowed: the file as it was written")
    return content


def _checksum_of(content: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode()).hexdigest()
