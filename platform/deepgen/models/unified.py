"""The unified model: VLM, think tokens, bridge, DiT and VAE as one module (M1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from deepgen.errors import UserError
from deepgen.models.bridge import BRIDGE_PREFIXES, Bridge
from deepgen.models.chat_template import check_tokenizer, count_long, tokenize
from deepgen.models.dit import DeepGenTransformer
from deepgen.models.presets import PADDINGS, Architecture, check_preset
from deepgen.models.stage_parts import TRAINED_PARTS
from deepgen.models.vlm import (
    LoraSettings,
    SeenImage,
    add_lora,
    conditioning_states,
    image_token_count,
    is_live,
    lora_parameters,
    see,
)
from deepgen.models.weights_io import folder as weights_folder

References = Sequence[Sequence[Tensor | SeenImage]]


@dataclass
class Conditioning:
    """Conditioning of the DiT for a batch of B samples."""

    context: Tensor  # [B, L, joint_attention_dim]
    pooled: Tensor  # [B, pooled_projection_dim]
    mask: Tensor | None  # bool [B, L], True = valid; None with padding="reference"

    def __len__(self) -> int:
        return self.context.shape[0]

    def expand(self, batch: int) -> Conditioning:
        """Repeat one sample's conditioning for `batch` samples, as views. A batch of that size stays as it is."""
        mask = None if self.mask is None else self.mask.expand(batch, -1)
        return Conditioning(self.context.expand(batch, -1, -1), self.pooled.expand(batch, -1), mask)

    def to(self, *args: Any, **kwargs: Any) -> Conditioning:
        """`Tensor.to` for context and pooled. The mask is moved to the device; its dtype stays."""
        context = self.context.to(*args, **kwargs)
        mask = None if self.mask is None else self.mask.to(context.device)
        return Conditioning(context, self.pooled.to(*args, **kwargs), mask)

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Join several batches into one, padded on the left to the longest. The padding is masked."""
        longest = max(part.context.shape[1] for part in parts)
        pooled = torch.cat([part.pooled for part in parts])
        if all(part.mask is None and part.context.shape[1] == longest for part in parts):
            return Conditioning(torch.cat([part.context for part in parts]), pooled, None)
        contexts, masks = [], []
        for part in parts:
            added = longest - part.context.shape[1]
            mask = part.context.new_ones(part.context.shape[:2], dtype=torch.bool) if part.mask is None else part.mask
            contexts.append(nn.functional.pad(part.context, (0, 0, added, 0)))
            masks.append(nn.functional.pad(mask, (added, 0), value=False))
        return Conditioning(torch.cat(contexts), pooled, torch.cat(masks))


class UnifiedModel(Bridge):
    """The bridge with the backbones at both ends.

    It subclasses `Bridge`, so that think tokens, projectors and connector keep the top-level names of the published
    checkpoints (M6.2). Callers decide about autocast and `no_grad`. The visual tower and the VAE never get a gradient.
    """

    def __init__(
        self,
        architecture: Architecture,
        vlm: Qwen2_5_VLForConditionalGeneration,
        transformer: DeepGenTransformer,
        vae: AutoencoderKL,
        tokenizer: Any = None,
        padding: str = "masked",
    ) -> None:
        if padding not in PADDINGS:
            raise UserError(f"model.padding: {padding!r} given; allowed: {', '.join(PADDINGS)}")
        if transformer.config.in_channels != vae.config.latent_channels:
            raise UserError(
                f"model.weights: the transformer takes {transformer.config.in_channels} latent channels, "
                f"the VAE makes {vae.config.latent_channels}"
            )
        super().__init__(architecture)
        self.architecture = architecture
        self.vlm = vlm
        self.transformer = transformer
        self.vae = vae
        self.tokenizer = tokenizer
        self.padding = padding
        self.vae.requires_grad_(False)
        self.eval()

    # ------------------------------------------------------------ building

    @classmethod
    def from_architecture(
        cls, architecture: Architecture, device: str | torch.device = "cpu", *, tokenizer: Any = None
    ) -> UnifiedModel:
        """Make a model with random weights; on "meta" with shapes only."""
        with torch.device(device):
            return cls(
                architecture,
                Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**architecture.vlm)),
                DeepGenTransformer(**architecture.transformer),
                AutoencoderKL(**architecture.vae),
                tokenizer,
            )

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        *,
        padding: str = "masked",
        lora: LoraSettings | None = None,
        dtype: torch.dtype = torch.float32,
        preset: str | None = None,
        fresh_bridge: bool = False,
    ) -> UnifiedModel:
        """Load a component folder.

        Args:
            lora: attach a new adapter with these settings if the folder has none; an adapter in the folder must have
                the same rank and alpha.
            preset: raise unless the folder holds a model of this preset.
            fresh_bridge: make new think tokens and a new bridge; the folder then needs none.

        Raises:
            UserError: something is missing, damaged, or does not fit; the message names it.
        """
        folder = Path(path)
        architecture = weights_folder.read_architecture(folder, preset if fresh_bridge else None)
        if preset is not None:
            check_preset(preset, architecture, folder)
        tokenizer = weights_folder.load_tokenizer(folder / "tokenizer")
        vlm_config = architecture.vlm
        check_tokenizer(tokenizer, vlm_config["image_token_id"], vlm_config["text_config"]["vocab_size"])
        model = cls(
            architecture,
            weights_folder.load_vlm(folder / "vlm", dtype),
            weights_folder.load_transformer(folder / "transformer", dtype),
            weights_folder.load_vae(folder / "vae", dtype),
            tokenizer,
            padding,
        )
        if not fresh_bridge:
            weights_folder.load_bridge(model, folder / "bridge")
        for name, parameter in model.named_parameters():
            if name.startswith(BRIDGE_PREFIXES):
                parameter.data = parameter.data.to(dtype)
        if (folder / weights_folder.LORA_FOLDER).is_dir():
            weights_folder.load_lora(model.vlm, folder / weights_folder.LORA_FOLDER, lora)
        elif lora is not None:
            add_lora(model.vlm, lora, architecture.fusion_layers[0])
        return model.eval()

    def save_folder(self, path: str | Path) -> None:
        """Write every component. The caller makes the write atomic (write beside, then rename)."""
        folder = Path(path)
        weights_folder.save_vlm(self.vlm, folder / "vlm")
        if lora_parameters(self.vlm):
            weights_folder.save_lora(self.vlm, folder / weights_folder.LORA_FOLDER)
        weights_folder.save_transformer(self.transformer, folder / "transformer")
        self.vae.save_pretrained(folder / "vae")
        weights_folder.save_bridge(self, self.architecture, folder / "bridge")
        weights_folder.save_scheduler(folder / "scheduler")
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder / "tokenizer")
            self.tokenizer.save_pretrained(folder / "vlm")

    # ------------------------------------------------------------ conditioning

    def encode_prompts(self, prompts: Sequence[str], references: References | None = None) -> Conditioning:
        """Encode text and reference images into conditioning (M1.2-1.5).

        Args:
            prompts: captions or instructions; "" is the unconditional prompt of its task.
            references: the images of each prompt, [3, H, W] in [-1, 1], sides multiples of 32, or the results of
                `see_image`; [] means text-to-image.
        """
        states, mask = self.prompt_states(prompts, references)
        visible = mask if self.padding == "masked" else None
        context, pooled = self.fuse(states, visible)
        return Conditioning(context, pooled, visible)

    def encode_guided(
        self, prompt: str, negative: str, images: Sequence[Tensor | SeenImage] = ()
    ) -> tuple[Conditioning, Conditioning]:
        """Conditioning of a prompt, and of what guidance steers away from: batch size 1 each (M1.8).

        With padding "reference" one call encodes both, because there the shorter text is padded to the longer one and
        its pads are read (M1.5). Masked pads would change nothing, so otherwise each is encoded alone.

        Args:
            negative: "", or a negative prompt.
            images: reference images, as in `encode_prompts`; both branches see them.
        """
        if self.padding == "masked":
            return self.encode_prompts([prompt], [images]), self.encode_prompts([negative], [images])
        both = self.encode_prompts([prompt, negative], [images, images])
        wanted, unwanted = zip(both.context.split(1), both.pooled.split(1), strict=True)
        return Conditioning(*wanted, None), Conditioning(*unwanted, None)

    def prompt_states(
        self, prompts: Sequence[str], references: References | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """What the bridge reads: hidden states, [B, L, vlm_hidden] each, and their validity, bool [B, L]."""
        references = [()] * len(prompts) if references is None else references
        if len(references) != len(prompts):
            raise ValueError(f"{len(references)} lists of references for {len(prompts)} prompts")
        image_tokens = [[image_token_count(image) for image in images] for images in references]
        tokens = tokenize(self.tokenizer, prompts, image_tokens)
        flat = [image for images in references for image in images]
        most_images = max(len(counts) for counts in image_tokens)
        largest = max((count for counts in image_tokens for count in counts), default=0)
        budget = self.architecture.max_prompt_tokens + most_images * largest + self.architecture.num_queries
        layers = self.architecture.fusion_layers
        return conditioning_states(self.vlm, tokens, flat, self.meta_queries, layers, budget)

    def cut_prompts(self, prompts: Sequence[str]) -> int:
        """How many of these prompts are so long that they lose their beginning."""
        return count_long(self.tokenizer, prompts, self.architecture.max_prompt_tokens)

    def see_image(self, image: Tensor) -> SeenImage:
        """Features of one reference image [3, H, W] in [-1, 1], as `encode_prompts` takes them; without a gradient.

        Batched with other images, the result may differ in its last bits.
        """
        return see(self.vlm, image)

    # ------------------------------------------------------------ latents

    @torch.no_grad()
    def encode_images(self, images: Sequence[Tensor], generator: torch.Generator | None = None) -> list[Tensor]:
        """Encode images [3, H, W] in [-1, 1] into latents [c, h, w], shifted and scaled (M1.7).

        With a generator, the posterior is sampled, image by image in order; without one, its mode is used.
        """
        weight = next(self.vae.parameters())
        moments: list[Tensor] = [images[0]] * len(images) if images else []
        for indices in _by_shape(images):
            batch = torch.stack([images[i] for i in indices]).to(weight.device, weight.dtype)
            posterior = self.vae.encode(batch).latent_dist
            for row, i in enumerate(indices):
                moments[i] = torch.stack([posterior.mean[row], posterior.std[row]])
        latents = []
        for mean, std in moments:
            if generator is not None:
                noise = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean)
                mean = mean + std * noise
            latents.append((mean.float() - self._latent_shift) * self.vae.config.scaling_factor)
        return latents

    @torch.no_grad()
    def decode_latents(self, latents: Sequence[Tensor] | Tensor) -> list[Tensor]:
        """Decode latents [c, h, w] into images, float32 [3, H, W], not clamped (M1.7)."""
        weight = next(self.vae.parameters())
        images: list[Tensor] = list(latents)
        for indices in _by_shape(latents):
            batch = torch.stack([latents[i] for i in indices]).to(weight.device, torch.float32)
            batch = batch / self.vae.config.scaling_factor + self._latent_shift
            decoded = self.vae.decode(batch.to(weight.dtype)).sample.float()
            for image, i in zip(decoded.unbind(0), indices, strict=True):
                images[i] = image
        return images

    @property
    def _latent_shift(self) -> float:
        return float(self.vae.config.shift_factor or 0.0)

    # ------------------------------------------------------------ velocity

    def velocity(
        self,
        latents: Tensor | Sequence[Tensor],
        timesteps: Tensor,
        cond: Conditioning,
        references: Sequence[Sequence[Tensor]] | None = None,
    ) -> Tensor | list[Tensor]:
        """The DiT's velocity for noisy latents ([B, c, h, w] or B tensors), timesteps [B] in 0..1000 (M1.6).

        references: clean reference latents of each sample. The result has the form and dtype of `latents`.
        """
        return self.transformer(latents, timesteps, cond.context, cond.pooled, references, cond.mask)

    def forward(
        self,
        prompts: Sequence[str],
        latents: Tensor | Sequence[Tensor],
        timesteps: Tensor,
        references: Sequence[Sequence[Tensor]] | None = None,
        reference_latents: Sequence[Sequence[Tensor]] | None = None,
    ) -> Tensor | list[Tensor]:
        """Conditioning and velocity in one call, for engines that gather parameters around `forward`."""
        cond = self.encode_prompts(prompts, references)
        return self.velocity(latents, timesteps, cond, reference_latents)

    # ------------------------------------------------------------ training

    def trainable_parameters(self, stage: str) -> list[tuple[str, nn.Parameter]]:
        """Set `requires_grad` for a stage and list the parameters that it trains, `TRAINED_PARTS[stage]` (M1.11).

        Adapters that can never receive a gradient stay frozen.
        """
        if stage not in TRAINED_PARTS:
            raise ValueError(f"stage {stage!r}; one of {', '.join(TRAINED_PARTS)}")
        parts = TRAINED_PARTS[stage]
        deepest = self.architecture.fusion_layers[0]
        chosen = []
        for name, parameter in self.named_parameters():
            if name.startswith(BRIDGE_PREFIXES):
                trained = "bridge" in parts
            elif name.startswith("transformer."):
                trained = "transformer" in parts
            else:
                trained = "vlm_lora" in parts and ".lora_" in name and is_live(name.removeprefix("vlm."), deepest)
            parameter.requires_grad_(trained)
            if trained:
                chosen.append((name, parameter))
        return chosen

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the activations of DiT blocks and decoder layers in the backward pass."""
        self.transformer.enable_gradient_checkpointing()
        self.vlm.gradient_checkpointing_enable({"use_reentrant": False})

    def train(self, mode: bool = True) -> UnifiedModel:
        """Set training mode, except for what is frozen: the VAE, and the VLM unless its LoRA (dropout) is trained."""
        super().train(mode)
        self.vae.eval()
        self.vlm.train(mode and any(p.requires_grad for p in lora_parameters(self.vlm).values()))
        for layer in self.vlm.model.language_model.layers:
            # A layer's own flag, not its children's, decides whether the layer is checkpointed. It is on even if
            # nothing in the decoder is trained, because the gradient of the think tokens passes through the decoder.
            layer.training = mode
        return self


def _by_shape(tensors: Sequence[Tensor] | Tensor) -> list[list[int]]:
    """Indices of tensors grouped by shape."""
    groups: dict[torch.Size, list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault(tensor.shape, []).append(index)
    return list(groups.values())
