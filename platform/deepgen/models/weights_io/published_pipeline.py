"""DeepGen as a pipeline of diffusers: text-to-image, and edits of one or several sources.

    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    fox = pipe("a red fox", generator=torch.Generator().manual_seed(0)).images[0]
    pipe("let it snow", image=[fox]).images[0].save("snow.png")

`stages/export.py --layout diffusers` of the DeepGen platform copies this file into the folder that it writes. There it
needs nothing else of the platform. Numbers like M1.4 are sections of the platform's docs/method.md.
"""

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageCms, ImageOps
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

SIDE_MULTIPLE = 32  # pixels; sides of sources are multiples of it, and the VLM sees 28 pixels for every 32 (M1.4)
USUAL_SIZE = 512
NEARLY_SRGB = 2  # levels of 255
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PADDINGS = ("masked", "reference")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")

Conditioning = tuple[Tensor, Tensor]  # context [1, L, joint_attention_dim], pooled [1, pooled_projection_dim]


class DeepGenPipeline(DiffusionPipeline):
    """Draws with the components of the folder.

    padding: "masked" encodes every prompt alone. "reference" pads the prompt and the negative prompt to one length and
    reads the pads, as the published code does (M1.5).
    """

    model_cpu_offload_seq = "vlm->connector->transformer->vae"

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        vae: AutoencoderKL,
        vlm: Qwen2_5_VLForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        scheduler: FlowMatchEulerDiscreteScheduler,
        connector: PreTrainedModel,
        padding: str = "masked",
    ) -> None:
        super().__init__()
        if padding not in PADDINGS:
            raise ValueError(f"padding: {padding!r} given; allowed: {', '.join(PADDINGS)}")
        self.register_modules(
            transformer=transformer, vae=vae, vlm=vlm, tokenizer=tokenizer, scheduler=scheduler, connector=connector
        )
        self.register_to_config(padding=padding)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        image: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 4.0,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        image_size: int | None = None,
    ) -> Any:
        """Draw pictures.

        Args:
            prompt: what to draw, or how to change the sources; a list draws for each of its prompts.
            image: sources: a PIL image or a list of them; for several prompts, a list of such for each prompt.
            height, width: of the picture in pixels; without both, those of the first source as it is scaled, or a
                square of `image_size`.
            guidance_scale: 1 is without guidance.
            negative_prompt: what guidance steers away from.
            generator: one, or one for each picture.
            latents: start noise [pictures, c, height / 8, width / 8], in place of a generator's.
            output_type: "pil", "np", "pt" or "latent". All but "pil" give one array, or a list with one for each prompt
                if sizes differ.
            image_size: sources are scaled to about image_size^2 pixels; 512, or less for a small DiT.

        Raises ValueError for arguments that do not fit.
        """
        prompts = _texts(prompt)
        negatives = _texts(negative_prompt or "")
        negatives *= 1 if isinstance(negative_prompt, list | tuple) else len(prompts)
        sources = _by_prompt(image, len(prompts))
        count = len(prompts) * num_images_per_prompt
        if not math.isfinite(guidance_scale) or output_type not in OUTPUT_TYPES:
            raise ValueError(
                f"guidance_scale and output_type: {guidance_scale} and {output_type!r} given; allowed: a number, and "
                f"one of {', '.join(OUTPUT_TYPES)}"
            )
        self._check(prompts, negatives, num_inference_steps, count, generator=generator, latents=latents)
        if (height is None) != (width is None):
            raise ValueError(f"height and width: {height} and {width} given; allowed: both or none")
        image_size = image_size or min(USUAL_SIZE, self.transformer.config.sample_size * self.vae_scale_factor)
        drawn = []
        for i, (text, negative) in enumerate(zip(prompts, negatives, strict=True)):
            own = slice(i * num_images_per_prompt, (i + 1) * num_images_per_prompt)
            scaled = [scale(source, image_size).to(self._execution_device) for source in sources[i]]
            own_size = scaled[0].shape[1:] if scaled else (image_size, image_size)
            noise = self._noise(
                own_size if height is None or width is None else (height, width),
                num_images_per_prompt,
                list(generator[own]) if isinstance(generator, list | tuple) else generator,
                None if latents is None else latents[own],
            )
            conditionings = self._encode_guided(text, negative, scaled, guidance_scale)
            with self._reading(self._latents_of(scaled)):
                final = self._denoise(noise, conditionings, num_inference_steps, guidance_scale)
            drawn.append(final if output_type == "latent" else self._decode(final, output_type))
        self.maybe_free_model_hooks()
        if output_type == "pil":
            images: Any = [picture for pictures in drawn for picture in pictures]
        elif len({part.shape[1:] for part in drawn}) > 1:
            images = drawn
        else:
            images = np.concatenate(drawn) if output_type == "np" else torch.cat(drawn)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check(self, prompts: list[str], negatives: list[str], steps: int, pictures: int, **each: Any) -> None:
        """Raise ValueError for arguments that do not fit. each: lists of what every picture has for itself."""
        if len(negatives) != len(prompts):
            raise ValueError(f"negative_prompt: {len(negatives)} given for {len(prompts)} prompts")
        for text in (*prompts, *negatives):
            if not isinstance(text, str):
                raise ValueError(f"prompt: {type(text).__name__} given; allowed: texts")
            if found := [token for token in self.tokenizer.all_special_tokens if token in text]:
                raise ValueError(f"prompt {text[:60]!r}: contains the reserved token {found[0]}; remove it")
        if steps < 1 or pictures < 1:
            raise ValueError(f"{pictures} pictures in {steps} steps; allowed: 1 or more of both")
        for name, given in each.items():
            if isinstance(given, list | tuple | Tensor) and len(given) != pictures:
                raise ValueError(f"{name}: {len(given)} given for {pictures} pictures")

    # -- prompts ----------------------------------------------------------------------------------------------------

    def _encode_guided(self, text: str, negative: str, images: list[Tensor], scale: float) -> list[Conditioning]:
        """Conditioning of the prompt, and of the negative prompt if there is guidance."""
        if scale == 1:
            return self._encode([text], images)
        if self.config.padding == "masked":
            return [*self._encode([text], images), *self._encode([negative], images)]
        return self._encode([text, negative], images)

    def _encode(self, texts: list[str], images: list[Tensor]) -> list[Conditioning]:
        """Conditioning of texts that all have the same sources [3, H, W] in [-1, 1] (M1.2-1.5)."""
        device, config = self._execution_device, self.connector.config
        tokens = [image.shape[1] * image.shape[2] // SIDE_MULTIPLE**2 for image in images]
        given = self.tokenizer(
            [render(text, tokens) for text in texts], padding=True, padding_side="left", return_tensors="pt"
        )
        embed = self.vlm.get_input_embeddings()
        thoughts = self.connector.meta_queries.to(embed.weight).expand(len(texts), -1, -1)
        embeds = torch.cat([embed(given["input_ids"].to(embed.weight.device)), thoughts], dim=1)
        ids = F.pad(given["input_ids"], (0, config.num_queries))  # think tokens count as text
        mask = F.pad(given["attention_mask"], (0, config.num_queries), value=1)
        pixels, grids = vision_inputs(images, self.vlm.config.vision_config) if images else (None, None)
        grids = None if grids is None else grids.repeat(len(texts), 1)
        positions, _ = self.vlm.model.get_rope_index(
            ids, (ids == self.vlm.config.image_token_id).int(), image_grid_thw=grids, attention_mask=mask
        )
        positions = positions.masked_fill(mask == 0, 1)
        limit = config.max_prompt_tokens + len(tokens) * max(tokens, default=0) + config.num_queries
        mask[:, :-limit] = 0  # longer texts lose their beginning
        states = self.vlm(
            input_ids=ids.to(device),
            inputs_embeds=embeds.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            pixel_values=None if pixels is None else pixels.repeat(len(texts), 1).to(device),
            image_grid_thw=None if grids is None else grids.to(device),
            output_hidden_states=True,
            use_cache=False,
            logits_to_keep=1,
        ).hidden_states
        context, pooled = self.connector([states[layer][:, -limit:] for layer in config.fusion_layers])
        return list(zip(context.split(1), pooled.split(1), strict=True))

    # -- latents ----------------------------------------------------------------------------------------------------

    def _noise(self, size: Sequence[int], count: int, generator: Any, latents: Tensor | None) -> Tensor:
        """Start noise, fp32 [count, c, h, w], of pictures of `size` pixels (height, width)."""
        cell = self.vae_scale_factor * self.transformer.config.patch_size
        if any(side < 1 or side % cell for side in size):
            raise ValueError(f"height and width: {size[0]} and {size[1]} given; allowed: multiples of {cell}")
        sides = [side // self.vae_scale_factor for side in size]
        shape = (count, self.transformer.config.in_channels, *sides)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        if latents.shape != shape:
            raise ValueError(f"latents: {list(latents.shape)} given for pictures that need {list(shape)}")
        return latents.to(self._execution_device, torch.float32)

    def _latents_of(self, images: list[Tensor]) -> list[Tensor]:
        """Latents [1, c, h, w] of the sources: the mode of the VAE's posterior, shifted and scaled (M1.7)."""
        config = self.vae.config
        modes = [self.vae.encode(image[None].to(self.vae.dtype)).latent_dist.mode().float() for image in images]
        return [(mode - (config.shift_factor or 0)) * config.scaling_factor for mode in modes]

    @contextmanager
    def _reading(self, references: list[Tensor]) -> Iterator[None]:
        """Let the DiT read reference latents (M1.6): their tokens follow the target's and end before the output."""
        target = 0

        def append(embed: Any, _: Any, tokens: Tensor) -> Tensor:
            nonlocal target
            target = tokens.shape[1]
            others = [embed.forward(latents.to(tokens.dtype)) for latents in references]
            return torch.cat([tokens, *(other.expand(len(tokens), -1, -1) for other in others)], dim=1)

        def drop(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return inputs[0][:, :target], *inputs[1:]

        hooks = [
            self.transformer.pos_embed.register_forward_hook(append),
            self.transformer.norm_out.register_forward_pre_hook(drop),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _denoise(self, latents: Tensor, conditionings: list[Conditioning], steps: int, scale: float) -> Tensor:
        """Follow the ODE from noise to latents, fp32 [B, c, h, w]. The second conditioning, if any, is the negative."""
        dtype = self.transformer.dtype
        self.scheduler.set_timesteps(steps, device=latents.device)
        for t in self.progress_bar(self.scheduler.timesteps):
            velocities = [
                self.transformer(
                    hidden_states=latents.to(dtype),
                    timestep=t.expand(len(latents)),
                    encoder_hidden_states=context.to(dtype).expand(len(latents), -1, -1),
                    pooled_projections=pooled.to(dtype).expand(len(latents), -1),
                    return_dict=False,
                )[0].float()
                for context, pooled in conditionings
            ]
            wanted, unwanted = velocities[0], velocities[-1]  # the same without guidance
            guided = wanted if scale == 1 else unwanted + scale * (wanted - unwanted)
            latents = self.scheduler.step(guided, t, latents, return_dict=False)[0]
        return latents

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        config = self.vae.config
        latents = latents / config.scaling_factor + (config.shift_factor or 0)
        decoded = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return self.image_processor.postprocess(decoded.float(), output_type=output_type)


def render(text: str, image_tokens: Sequence[int]) -> str:
    """The text that the VLM reads: a user turn and an open assistant turn (M1.2)."""
    images = "".join("<|vision_start|>" + "<|image_pad|>" * count + "<|vision_end|>" for count in image_tokens)
    content = f"{images}\n{text}" if images else f"Generate an image: {text}"
    return f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


def _texts(given: Any) -> list[str]:
    return list(given) if isinstance(given, list | tuple) else [given]


def _by_prompt(image: Any, prompts: int) -> list[list[Image.Image]]:
    """The sources of each prompt."""
    if image is None:
        return [[]] * prompts
    given = [image] if isinstance(image, Image.Image) else list(image)
    if prompts == 1 and not any(isinstance(one, list | tuple) for one in given):
        given = [given]
    sources = [list(one) if isinstance(one, list | tuple) else [one] for one in given]
    if len(sources) != prompts:
        raise ValueError(f"image: sources of {len(sources)} prompts given for {prompts}")
    if strange := [type(one).__name__ for own in sources for one in own if not isinstance(one, Image.Image)]:
        raise ValueError(f"image: {strange[0]} given; allowed: PIL images")
    return sources


def scale(image: Image.Image, image_size: int) -> Tensor:
    """A source as float32 [3, h, w] in [-1, 1] of about image_size^2 pixels, its sides multiples of 32 (M1.9)."""
    if image.mode.startswith(("F", "I")):
        raise ValueError(f"image: greys of mode {image.mode} given, of which white is not known; allowed: 8 bits")
    image = ImageOps.exif_transpose(image)
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    image = to_srgb(image)
    if alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    ratio = image_size / math.sqrt(image.height * image.width)
    width, height = (math.ceil(side * ratio / SIDE_MULTIPLE) * SIDE_MULTIPLE for side in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def to_srgb(image: Image.Image) -> Image.Image:
    """Convert to mode RGB, by the colour profile if there is one that fits; one that is nearly sRGB changes nothing."""
    plain, profile = image.convert("RGB"), image.info.get("icc_profile")
    if not profile:
        return plain
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}[opened.profile.xcolor_space]
        others = ("1", "LA") if mode == "L" else ("1", "L", "LA", "P", "RGBA")  # that can be converted first
        if image.mode != mode and (mode == "CMYK" or image.mode not in others):
            return plain
        conversion = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")
        found = conversion.apply(image.convert(mode))
    except (ImageCms.PyCMSError, LookupError, OSError, TypeError, ValueError):  # a damaged profile
        return plain
    changes = np.abs(np.asarray(found).astype(int) - np.asarray(plain)).max() > NEARLY_SRGB
    return found if changes or mode != "RGB" else plain


def vision_inputs(images: Sequence[Tensor], config: Any) -> tuple[Tensor, Tensor]:
    """Patches of the sources in the order of Qwen2-VL's processor, without its rescaling; grid_thw [N, 3] (M1.4)."""
    patch, merge, frames = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
    patches, grids = [], []
    for image in images:
        rows, columns = (side * 28 // SIDE_MULTIPLE // patch for side in image.shape[1:])
        small = F.interpolate(image[None], size=(rows * patch, columns * patch), mode="bilinear")[0]
        mean, std = (small.new_tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        small = ((small + 1) / 2 - mean) / std
        cells = small.view(3, rows // merge, merge, patch, columns // merge, merge, patch)
        cells = cells.permute(1, 4, 2, 5, 0, 3, 6).flatten(0, 3)  # [rows * columns, 3, patch, patch]
        patches.append(cells[:, :, None].expand(-1, -1, frames, -1, -1).flatten(1))
        grids.append([1, rows, columns])
    return torch.cat(patches), torch.tensor(grids)
