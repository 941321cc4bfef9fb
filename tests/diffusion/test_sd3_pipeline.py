"""Our drawing path against diffusers' own StableDiffusion3Pipeline, on the same noise and embeddings."""

from __future__ import annotations

from dataclasses import replace

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from deepgen.data.records import Record
from deepgen.diffusion.trajectory import start_group
from deepgen.drawing.painter import Painter
from deepgen.drawing.request import DrawRequest
from deepgen.models.weights_io.folder import SHIFT
from tests.helpers.factories import make_tiny_model

STEPS, GUIDANCE = 7, 4.0


def test_guided_ode_agrees() -> None:
    model = make_tiny_model()
    model.padding = "reference"  # both branches have one length, as that pipeline wants them
    fox = Record("fox", "t2i", "A red fox at dawn", "", None, (), "")
    request = DrawRequest((fox,), (0, 1), 3, 64, STEPS, SHIFT, guidance_scale=GUIDANCE, negative_prompt="grey")
    _, samples = Painter(model, bf16=False).draw_group(request)
    assert samples.unconditional is not None
    wanted, unwanted = samples.conditioning.expand(2), samples.unconditional.expand(2)
    _, plain = Painter(model, bf16=False).draw_group(replace(request, guidance_scale=1.0))
    assert (samples.trajectory.final - plain.trajectory.final).abs().max() > 1e-3  # so that guidance shows

    transformer = SD3Transformer2DModel(**model.architecture.transformer)
    transformer.load_state_dict(model.transformer.state_dict())
    texts = dict.fromkeys(f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    pipe = StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, vae=model.vae, **texts)
    pipe.set_progress_bar_config(disable=True)
    found = pipe(
        prompt_embeds=wanted.context,
        pooled_prompt_embeds=wanted.pooled,
        negative_prompt_embeds=unwanted.context,
        negative_pooled_prompt_embeds=unwanted.pooled,
        latents=start_group((8, 16, 16), run_seed=3, prompt_id="fox", epoch=0, indices=[0, 1])[0],
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        height=64,
        width=64,
        output_type="latent",
    ).images
    torch.testing.assert_close(found, samples.trajectory.final, atol=1e-5, rtol=0)
