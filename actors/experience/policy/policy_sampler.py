"""The policy as rollout actors hold it: the model they draw with, and a group packed for its way to the learner.

A packed group includes the conditioning it was sampled with. The learner therefore encodes no prompt a second time, and
scores the transitions with exactly the numbers they were drawn with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.messages import Arrays, Group
from deepgen.config import Settings
from deepgen.diffusion.trajectory import Trajectory, choose_sde_steps, step_seed
from deepgen.drawing.painter import Painter, Samples
from deepgen.drawing.request import DrawRequest
from deepgen.models.unified import Conditioning, UnifiedModel


class PolicySampler:
    """Samples with the policy on this process's device, without gradients."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings.rollout.threads)
        self._settings = settings
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.load(settings.model.weights)

    def load(self, folder: Path) -> None:
        """Read the model from a component folder."""
        model = UnifiedModel.from_folder(folder, padding=self._settings.model.padding)
        self._trained = [name for name, _ in model.trainable_parameters("rl")]
        self.model = model.to(self._device).eval().requires_grad_(False)
        self._painter = Painter(self.model, bf16=self._settings.model.precision == "bf16")

    def trained_parameters(self) -> dict[str, Tensor]:
        """The parameters that rl trains, by name, as far as the model has them now."""
        found = dict(self.model.named_parameters())
        return {name: found[name] for name in self._trained if name in found}

    def sample_group(self, group: Group) -> tuple[np.ndarray, Arrays]:
        """Sample one group. Returns images uint8 [G, H, W, 3] and the packed group (see `unpack_samples`)."""
        images, samples = self._painter.draw_group(group_request(self._settings, group))
        return images, pack_samples(samples)

    def draw(self, request: DrawRequest) -> list[np.ndarray]:
        """The pictures of each prompt, in order: uint8 [samples, H, W, 3] per prompt."""
        return self._painter.draw(request)


def group_request(settings: Settings, group: Group) -> DrawRequest:
    """What is drawn for a group, as the section rollout says."""
    rollout = settings.rollout
    return DrawRequest(
        records=(group.record,),
        samples=tuple(range(rollout.group_size)),
        seed=settings.run.seed,
        epoch=group.epoch,
        image_size=settings.data.image_size,
        num_steps=rollout.num_steps,
        shift=rollout.shift,
        sampler=rollout.sampler,
        eta=rollout.eta,
        guidance_scale=rollout.guidance_scale,
        same_noise=rollout.same_noise,
        sde_window=rollout.sde_window,
        kept_steps=tuple(trained_steps(settings, group.step)) if rollout.sampler != "ode" else (),
    )


def trained_steps(settings: Settings, step: int) -> list[int]:
    """Indices of the sampler steps that training step `step` keeps and trains. All its groups share them (M3.4)."""
    rollout = settings.rollout
    return choose_sde_steps(
        rollout.num_steps, rollout.sde_steps, rollout.sde_window, step_seed(settings.run.seed, step)
    )


def pack_samples(samples: Samples) -> Arrays:
    """Pack a group into named arrays, which pass through the object store without copies."""
    tensors = {f"trajectory/{name}": tensor for name, tensor in vars(samples.trajectory).items()}
    for branch in ("conditioning", "unconditional"):
        conditioning = getattr(samples, branch)
        if conditioning is not None:
            named = {field.name: getattr(conditioning, field.name) for field in fields(conditioning)}
            tensors |= {f"{branch}/{name}": tensor for name, tensor in named.items() if tensor is not None}
    tensors |= {f"reference/{i}": latent for i, latent in enumerate(samples.references)}
    return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}


def unpack_samples(arrays: Mapping[str, np.ndarray], device: torch.device) -> Samples:
    """The group that `pack_samples` packed, copied to `device`."""

    def part(prefix: str) -> dict[str, Any]:
        names = [name for name in arrays if name.startswith(f"{prefix}/")]
        return {name.partition("/")[2]: torch.tensor(arrays[name], device=device) for name in names}

    def conditioning(prefix: str) -> Conditioning:
        return Conditioning(**{"mask": None, **part(prefix)})

    return Samples(
        trajectory=Trajectory(**part("trajectory")),
        conditioning=conditioning("conditioning"),
        unconditional=conditioning("unconditional") if part("unconditional") else None,
        references=list(part("reference").values()),
    )
