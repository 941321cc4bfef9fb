"""Builds the cache of VAE latents and visual features, and the fingerprint that invalidates it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from deepgen.data.cache.disk_store import DiskStore
from deepgen.data.cache.encoded import EncodingCache, MemoryStore
from deepgen.data.loading.dataset import FEATURES, LATENT, PREPARATION
from deepgen.models.weights_io.folder import weights_checksum

if TYPE_CHECKING:
    from actors.learner.protocols import WorkerContext

_PACKAGES = ("torch", "diffusers", "transformers", "pillow")  # other versions may round or resize differently


def make_cache(context: WorkerContext) -> EncodingCache:
    """Make the cache of VAE latents and visual features, in data.cache_dir if set, otherwise in memory.

    Call it before ZeRO-3 splits the weights. In two cases visual features are not cached, and the VLM gets the pixels
    of a whole micro-batch instead:

    - under ZeRO-3, which hangs unless all ranks call the tower equally often;
    - if the visual tower has a LoRA. Ours never touches the tower (`deepgen.models.vlm.is_live`), but an imported LoRA
      may: it has dropout in sft, and a scale that is not part of its weights.

    Raises UserError if data.cache_dir cannot be written.
    """
    model, settings = context.model, context.settings
    visual = model.vlm.model.visual

    def encode(image: Tensor) -> Tensor:
        (latent,) = model.encode_images([image.to(context.device)], None)
        return latent.float().cpu()

    def see(image: Tensor) -> Tensor:
        return model.see_image(image.to(context.device)).features.cpu()

    parts: dict[str, Callable[[Tensor], Tensor]] = {LATENT: encode}
    if settings.train.zero_stage < 3 and _fixed(visual):
        parts[FEATURES] = see
    if not settings.data.cache_dir:
        return EncodingCache(parts, MemoryStore())
    origin = {LATENT: (model.vae, dict(model.vae.config)), FEATURES: (visual, visual.config.to_dict())}
    about = {part: _describe(context, *origin[part]) for part in parts}
    return EncodingCache(parts, DiskStore(Path(settings.data.cache_dir), about))


def _fixed(visual: nn.Module) -> bool:
    """Whether the tower gives the same features for an image throughout the run."""
    return not any(".lora_" in name or parameter.requires_grad for name, parameter in visual.named_parameters())


def _describe(context: WorkerContext, part: nn.Module, config: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides an encoder's result for an image file, to the bit on one kind of processor."""
    settings = context.settings
    return {
        "weights": weights_checksum(part.state_dict().items()),
        "config": {key: value for key, value in config.items() if not key.startswith("_")},
        "attention": getattr(part.config, "_attn_implementation", ""),
        "preparation": PREPARATION,
        "image_size": settings.data.image_size,
        "precision": settings.model.precision,
        "device": context.device.type,
        "versions": {package: version(package) for package in _PACKAGES},
    }
