"""Weights damaged on their way from the learner to a rollout actor, which must be refused before a sample is drawn.

The actor is a real `LoadedPolicy` in this process, the weights come out of Ray's object store. Version 2 differs from
version 1 by one optimizer step (`STEP`) in every element. Each trial loads version 1 undamaged, does its damage, and
asks for version 2.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from actors.experience.policy import policy_version
from actors.experience.policy.canary import take_canary
from actors.experience.policy.policy_version import LoadedPolicy
from actors.experience.policy.weight_sync import WeightsMismatchError, load_weights, publish_weights
from actors.messages import Arrays, PolicyWeights
from deepgen.config import Settings
from deepgen.models.unified import UnifiedModel

STEP = 4e-5  # the learning rate of tiny-rl
DEFECT_HEADER = "| defect | injected | by checksum | by canary | loaded again | missed |\n" + "|---" * 6 + "|"
# Parameters without effect: the last block drops what its context asks for (`context_pre_only`).
UNUSED = ("add_q_proj", "norm_added_q")


class LoadStopped(Exception):
    """Stands for whatever ends a load in the middle."""


class Trials:
    """An actor's policy, two published versions, and the values that each of them must have after a load."""

    def __init__(self, settings: Settings) -> None:
        self.policy = LoadedPolicy(settings)
        self.values: dict[int, dict[str, Tensor]] = {}
        learner, generator = UnifiedModel.from_folder(settings.model.weights), torch.Generator().manual_seed(0)
        weights = {name: parameter.detach() for name, parameter in learner.trainable_parameters("rl")}
        published = []
        for version in range(3):
            for tensor in weights.values() if version else ():
                tensor.add_(STEP * torch.randn(tensor.shape, generator=generator).sign())
            self.values[version] = {name: tensor.clone() for name, tensor in weights.items()}
            published.append(publish_weights(version, weights, take_canary(learner, settings.rollout)))
        self.start, self.old, self.new = published

    def run(self, kind: str, seed: int) -> str:
        """Inject one defect. Returns what became of it, one of "checksum", "canary", "again", "missed"."""
        self.policy.use(self.old)
        if not self.holds(1):
            raise AssertionError(f"before {kind}, {seed}: an undamaged load gave other weights")
        return DEFECTS[kind](self, random.Random(f"{kind}/{seed}"))

    def outcome(self, wanted: PolicyWeights) -> str:
        """What the actor says to these weights."""
        try:
            self.policy.use(wanted)
        except WeightsMismatchError as error:
            return "canary" if "canary" in str(error) else "checksum"
        return "missed"

    def holds(self, version: int) -> bool:
        """Whether all trained parameters have exactly this version's values."""
        found = self.policy.sampler.trained_parameters()
        return found.keys() == self.values[version].keys() and all(
            torch.equal(found[name], value) for name, value in self.values[version].items()
        )

    def name(self, rng: random.Random, fits: Callable[[Tensor], bool] = lambda tensor: True) -> str:
        """A random trained tensor that fits."""
        return rng.choice([name for name, tensor in self.values[2].items() if fits(tensor)])

    def in_flight(self, damage: Callable[[Arrays], object]) -> str:
        """Damage the fetched arrays (a dict of read-only views, which may be replaced)."""

        def fetch(published: PolicyWeights, deadline_s: float) -> Arrays:
            arrays = fetch_weights(published, deadline_s)
            damage(arrays)
            return arrays

        fetch_weights = policy_version.fetch_weights
        with mock.patch.object(policy_version, "fetch_weights", fetch):
            return self.outcome(self.new)

    def after_load(self, damage: Callable[[dict[str, Tensor]], None]) -> str:
        """Damage the loaded parameters before they are checked."""

        def load(parameters: Any, arrays: Arrays, published: PolicyWeights) -> None:
            load_weights(parameters, arrays, published)
            damage(parameters)

        with mock.patch.object(policy_version, "load_weights", load):
            return self.outcome(self.new)


# -- damage to values ------------------------------------------------------------------------------------------------


def flip_in_flight(trials: Trials, rng: random.Random) -> str:
    name = trials.name(rng)

    def damage(arrays: Arrays) -> None:
        arrays[name] = arrays[name].copy()
        _flip(arrays[name], rng)

    return trials.in_flight(damage)


def flip_in_parameter(trials: Trials, rng: random.Random) -> str:
    name = trials.name(rng)
    return trials.after_load(lambda parameters: _flip(parameters[name].data.numpy(), rng))


def flip_in_start_weights(trials: Trials, rng: random.Random) -> str:
    """The weights folder that an actor has read itself. They are compared when the learner publishes version 0."""
    trials.policy.use(None)
    _flip(trials.policy.sampler.trained_parameters()[trials.name(rng)].data.numpy(), rng)
    if rng.random() < 0.5:
        return trials.outcome(trials.start)
    try:
        trials.policy.prefetch(trials.start)
    except WeightsMismatchError:
        return "checksum"
    return "missed"


def swap(trials: Trials, rng: random.Random) -> str:
    one = trials.name(rng, lambda tensor: sum(t.shape == tensor.shape for t in trials.values[2].values()) > 1)
    other = trials.name(rng, lambda t: t.shape == trials.values[2][one].shape and t is not trials.values[2][one])
    return trials.in_flight(lambda arrays: arrays.update({one: arrays[other], other: arrays[one]}))


def transpose(trials: Trials, rng: random.Random) -> str:
    square = rng.random() < 0.5
    name = trials.name(rng, lambda t: t.dim() == 2 and (t.shape[0] == t.shape[1]) == square)
    return trials.in_flight(lambda arrays: arrays.update({name: arrays[name].T.copy()}))


def stale(trials: Trials, rng: random.Random) -> str:
    name = trials.name(rng)
    return trials.in_flight(lambda arrays: arrays.update({name: trials.values[1][name].numpy()}))


def other_dtype(trials: Trials, rng: random.Random) -> str:
    name, dtype = trials.name(rng), rng.choice([np.float16, np.float64])
    return trials.in_flight(lambda arrays: arrays.update({name: arrays[name].astype(dtype)}))


def rounded(trials: Trials, rng: random.Random) -> str:
    name = trials.name(rng)
    value = trials.values[2][name].bfloat16().float().numpy()
    return trials.in_flight(lambda arrays: arrays.update({name: value}))


# -- damage to names -------------------------------------------------------------------------------------------------


def missing(trials: Trials, rng: random.Random) -> str:
    name = trials.name(rng)
    if rng.random() < 0.5:  # the learner never sent it
        names = tuple(other for other in trials.new.names if other != name)
        return trials.outcome(replace(trials.new, names=names))
    return trials.in_flight(lambda arrays: arrays.pop(name))


def renamed(trials: Trials, rng: random.Random) -> str:
    name = trials.name(rng)
    return trials.in_flight(lambda arrays: arrays.update({f"{name}_": arrays.pop(name)}))


def other_version(trials: Trials, rng: random.Random) -> str:
    return trials.outcome(replace(trials.new, version=rng.choice([0, 1, 3, 40])))


# -- damage to what the forward uses ---------------------------------------------------------------------------------


def bound_to_nothing(trials: Trials, rng: random.Random) -> str:
    """A module (a layer, a block, the whole DiT) computes with a copy of its old weights; the new ones are loaded."""
    transformer = trials.policy.sampler.model.transformer
    last = f"transformer_blocks.{transformer.config.num_layers - 1}.attn."
    modules = [
        module
        for name, module in transformer.named_modules()
        if any(True for _ in module.parameters())
        and not isinstance(module, nn.ModuleList)
        and not (name.startswith(last) and name.rpartition(".")[2] in UNUSED)
    ]
    with _computing_with_a_copy(rng.choice(modules)):
        return trials.outcome(trials.new)


def other_weights_in_use(trials: Trials, rng: random.Random) -> str:
    """The learner computes with other weights than it sends."""
    return trials.outcome(replace(trials.new, canary=rng.choice([trials.start, trials.old]).canary))


def half_a_load(trials: Trials, rng: random.Random) -> str:
    """A load that stops somewhere, then a call with the same, the former or the start weights."""
    count = rng.randrange(1, len(trials.values[2]))

    def load(parameters: dict[str, Tensor], arrays: Arrays, published: PolicyWeights) -> None:
        for name in list(arrays)[:count]:
            parameters[name].data.copy_(torch.tensor(arrays[name]))
        raise LoadStopped

    with mock.patch.object(policy_version, "load_weights", load):
        try:
            trials.policy.use(trials.new)
        except LoadStopped:
            wanted = rng.choice([None, trials.old, trials.new])
    try:
        version = trials.policy.use(wanted)
    except WeightsMismatchError:
        return "checksum"
    return "again" if trials.holds(version) else "missed"


@contextmanager
def _computing_with_a_copy(module: nn.Module) -> Iterator[None]:
    module.forward = copy.deepcopy(module).forward
    try:
        yield
    finally:
        del module.forward


def _flip(values: np.ndarray, rng: random.Random) -> None:
    """Flip one bit of fp32 values in place."""
    bits = values.reshape(-1).view(np.uint32)
    bits[rng.randrange(bits.size)] ^= np.uint32(1 << rng.randrange(32))


DEFECTS: dict[str, Callable[[Trials, random.Random], str]] = {
    "bit flipped in flight": flip_in_flight,
    "bit flipped in the loaded parameter": flip_in_parameter,
    "bit flipped in the actor's start weights": flip_in_start_weights,
    "tensor missing": missing,
    "tensor renamed": renamed,
    "two tensors swapped": swap,
    "tensor transposed": transpose,
    "tensor of the version before": stale,
    "tensor in float16 or float64": other_dtype,
    "tensor rounded to bf16": rounded,
    "right weights under a wrong version": other_version,
    "adapter bound to nothing": bound_to_nothing,
    "learner uses other weights than it sends": other_weights_in_use,
    "half a load": half_a_load,
}


def run_defects(settings: Settings, count: int) -> dict[str, Counter[str]]:
    """Outcomes of `count` defects by kind; the kinds take turns. Ray must be connected."""
    trials, kinds = Trials(settings), list(DEFECTS)
    outcomes: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    for number in range(count):
        kind = kinds[number % len(kinds)]
        outcomes[kind][trials.run(kind, number)] += 1
    return outcomes


def defect_rows(outcomes: dict[str, Counter[str]]) -> Iterator[str]:
    """Lines of the table under `DEFECT_HEADER`, the last one with the sums."""
    for kind, counts in [*outcomes.items(), ("all", sum(outcomes.values(), Counter[str]()))]:
        cells = [kind, counts.total(), *(counts[what] for what in ("checksum", "canary", "again", "missed"))]
        yield "| " + " | ".join(map(str, cells)) + " |"
