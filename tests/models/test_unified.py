"""The whole model: conditioning, latents, velocity, and which parts train in which stage."""

import pytest
import torch
from transformers import Qwen2VLImageProcessor

from deepgen.errors import UserError
from deepgen.models.chat_template import tokenize
from deepgen.models.unified import Conditioning, UnifiedModel
from deepgen.models.vlm import (
    LoraSettings,
    add_lora,
    conditioning_states,
    image_token_count,
    lora_parameters,
    position_ids,
    vision_inputs,
)
from tests.helpers.factories import make_tiny_model, make_tokenizer

PROMPTS = ["a cat", "the animal that barks, seen from far away", "mirror it"]


@pytest.fixture(scope="module")
def model() -> UnifiedModel:
    return make_tiny_model()


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


# ---------------------------------------------------------------- VLM pass


def test_vision_inputs_equal_hugging_face(image):
    """For an image that already has 28/32 of its size, patches equal those of the HF processor."""
    processor = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=1 << 20, do_resize=False, do_rescale=False)
    wide = torch.cat([image, image.flip(-1)], dim=-1)  # 64 x 128
    small = [
        torch.nn.functional.interpolate(x[None], size=size, mode="bilinear")[0]
        for x, size in ((image, (56, 56)), (wide, (56, 112)))
    ]
    wanted = processor([(x + 1) / 2 for x in small], return_tensors="pt", input_data_format="channels_first")
    patches, grids = vision_inputs([image, wide])
    assert grids.tolist() == wanted["image_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 8]]
    torch.testing.assert_close(patches, wanted["pixel_values"], rtol=1e-5, atol=1e-5)
    assert [image_token_count(x) for x in (image, wide)] == [4, 8]


@torch.no_grad()
def test_states_equal_hugging_face(model, image):
    """The truncated, batched pass gives the hidden states of Qwen2.5-VL's own forward."""
    tokens = tokenize(model.tokenizer, ["mirror it", "a cat"], [[4], []])
    layers = model.architecture.fusion_layers
    states, mask = conditioning_states(model.vlm, tokens, [image], model.meta_queries, layers, 10_000)

    captured: dict[int, torch.Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _m, _a, out, index=index: captured.update({index: out}))
        for index, layer in enumerate(model.vlm.model.language_model.layers, start=1)
    ]
    patches, grids = vision_inputs([image])
    embeds = model.vlm.get_input_embeddings()(tokens.ids)
    features = torch.cat(model.vlm.model.get_image_features(patches, grids).pooler_output)
    embeds[tokens.ids == model.vlm.config.image_token_id] = features
    embeds = torch.cat([embeds, model.meta_queries.expand(2, -1, -1)], dim=1)
    positions = position_ids(model.vlm, tokens.ids, tokens.mask, grids, len(model.meta_queries))
    model.vlm.model(inputs_embeds=embeds, attention_mask=mask.long(), position_ids=positions, use_cache=False)
    for hook in hooks:
        hook.remove()
    assert layers == (3, 1)
    for index, state in zip(layers, states, strict=True):
        torch.testing.assert_close(state[mask], captured[index][mask])


def test_think_token_positions(model):
    """Think tokens continue as text after the prompt; an image advances positions by its longer side; pads get 1."""
    tokens = tokenize(model.tokenizer, ["x", "a cat"], [[4], []])
    grids = torch.tensor([[1, 4, 4]])
    positions = position_ids(model.vlm, tokens.ids, tokens.mask, grids, 4)
    text_only = positions[:, 1]
    assert torch.equal(text_only[0], text_only[1])
    assert text_only[0, -5:].diff().tolist() == [1, 1, 1, 1]
    assert text_only[0, -1] == tokens.mask[1].sum() + 4 - 1
    with_image = positions[:, 0]
    assert with_image[:, -1].tolist() == [int(tokens.mask[0].sum()) - 4 + 2 + 4 - 1] * 3
    pads = ~tokens.mask[0]
    assert (positions[:, 0, : pads.shape[0]][:, pads] == 1).all()


def test_text_positions_agree_with_the_models_own_index(model):
    tokens = tokenize(model.tokenizer, PROMPTS[:2], [[], []])
    ours = position_ids(model.vlm, tokens.ids, tokens.mask, None, 3)
    ids = torch.cat([tokens.ids, torch.zeros(2, 3, dtype=torch.long)], dim=1)
    mask = torch.cat([tokens.mask, torch.ones(2, 3, dtype=torch.bool)], dim=1)
    theirs, _ = model.vlm.model.get_rope_index(ids, mm_token_type_ids=torch.zeros_like(ids), attention_mask=mask)
    assert torch.equal(ours[:, mask], theirs[:, mask])


@torch.no_grad()
def test_long_prompts_lose_their_beginning(model):
    budget = model.architecture.max_prompt_tokens + model.architecture.num_queries
    cond = model.encode_prompts(["x" * 3000])
    assert cond.context.shape[1] == budget
    assert model.cut_prompts(["x" * 3000, "x", "", "x" * 1024, "x" * 900]) == 2


# ---------------------------------------------------------------- conditioning


@torch.no_grad()
def test_conditioning_does_not_depend_on_other_prompts(model, image):
    references = [[], [], [image]]
    together = model.encode_prompts(PROMPTS, references)
    assert together.mask is not None
    for i in range(3):
        alone = model.encode_prompts([PROMPTS[i]], [references[i]])
        torch.testing.assert_close(together.context[i, together.mask[i]], alone.context[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.pooled[i], alone.pooled[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_reference_padding_leaks_as_published(image):
    model = make_tiny_model()
    model.padding = "reference"
    together, alone = model.encode_prompts(PROMPTS[:2]), model.encode_prompts(PROMPTS[:1])
    assert together.mask is None
    length = alone.context.shape[1]
    assert torch.isfinite(together.context).all()
    assert not torch.allclose(together.context[0, -length:], alone.context[0], rtol=1e-3)
    longest = model.encode_prompts(PROMPTS[1:2])  # the longest prompt is never padded
    torch.testing.assert_close(together.context[1], longest.context[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_guidance_pads_both_prompts_together_where_pads_are_read(image):
    for padding in ("masked", "reference"):
        model = make_tiny_model()
        model.padding = padding
        found = model.encode_guided("mirror it", "blurry, cut off", [image])
        together = model.encode_prompts(["mirror it", "blurry, cut off"], [[image], [image]])
        alone = [model.encode_prompts([prompt], [[image]]) for prompt in ("mirror it", "blurry, cut off")]
        for i, one in enumerate(found):
            wanted = alone[i].context if padding == "masked" else together.context[i : i + 1]
            assert len(one) == 1 and torch.equal(one.context, wanted)
        assert (found[0].mask is None) == (padding == "reference")
        assert (found[0].context.shape == found[1].context.shape) == (padding == "reference")


@torch.no_grad()
def test_velocity_does_not_depend_on_other_prompts(model, image):
    references = [[], [], [image]]
    latent_references = [[], [], model.encode_images([image])]
    x, t = torch.randn(3, 8, 16, 16), torch.tensor([10.0, 400.0, 900.0])
    together = model.velocity(x, t, model.encode_prompts(PROMPTS, references), latent_references)
    for i in range(3):
        cond = model.encode_prompts([PROMPTS[i]], [references[i]])
        alone = model.velocity(x[i : i + 1], t[i : i + 1], cond, [latent_references[i]])
        torch.testing.assert_close(together[i], alone[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_prompt_and_the_image_matter(model, image):
    cond = model.encode_prompts(["a cat", "a dog", "mirror it", "mirror it"], [[], [], [image], [-image]])
    assert not torch.allclose(cond.pooled[0], cond.pooled[1])
    assert not torch.allclose(cond.pooled[2], cond.pooled[3])


@torch.no_grad()
@pytest.mark.parametrize("padding", ["masked", "reference"])
def test_bf16_autocast_stays_close_with_padding(image, padding):
    model = make_tiny_model()
    model.padding = padding
    references: list[list[torch.Tensor]] = [[], [], [image]]
    exact = model.encode_prompts(PROMPTS, references)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.encode_prompts(PROMPTS, references)
    assert torch.isfinite(rounded.context).all()
    assert (rounded.pooled.float() - exact.pooled).abs().max() < 0.05 * exact.pooled.abs().max()


@torch.no_grad()
def test_conditioning_expand_and_cat(model):
    cond = model.encode_prompts(PROMPTS)
    parts = [model.encode_prompts([prompt]) for prompt in PROMPTS]
    joined = Conditioning.cat(parts)
    assert joined.mask is not None
    assert torch.equal(joined.mask, cond.mask)
    x, t = torch.randn(3, 8, 16, 16), torch.full((3,), 500.0)
    torch.testing.assert_close(model.velocity(x, t, joined), model.velocity(x, t, cond), rtol=1e-4, atol=1e-4)
    thrice = parts[0].expand(3)
    assert len(thrice) == 3
    assert all(torch.equal(thrice.context[i], parts[0].context[0]) for i in range(3))
    assert thrice.context.data_ptr() == parts[0].context.data_ptr() and thrice.context.stride(0) == 0
    assert thrice.mask is not None and thrice.mask.shape == (3, parts[0].context.shape[1])
    same = cond.expand(3)  # a full batch does not change
    assert torch.equal(same.context, cond.context) and torch.equal(same.pooled, cond.pooled)
    half = cond.to(torch.bfloat16)
    assert half.context.dtype == half.pooled.dtype == torch.bfloat16
    assert half.mask is not None
    assert half.mask.dtype == torch.bool


def test_bad_reference_sizes_are_named(model):
    with pytest.raises(UserError, match="60 x 64 pixels; both sides must be multiples of 32"):
        model.encode_prompts(["x"], [[torch.zeros(3, 60, 64)]])


# ---------------------------------------------------------------- latents


def test_latents_round_trip_scale_and_shift(model, image):
    tall = torch.cat([image, image], dim=1)
    modes = model.encode_images([image, tall, image])
    assert [tuple(z.shape) for z in modes] == [(8, 16, 16), (8, 32, 16), (8, 16, 16)]
    torch.testing.assert_close(modes[0], modes[2])
    plain = model.vae.encode(image[None]).latent_dist.mode()[0]
    vae = model.vae
    vae.register_to_config(scaling_factor=2.0, shift_factor=0.5)
    torch.testing.assert_close(model.encode_images([image])[0], (plain - 0.5) * 2)
    torch.testing.assert_close(model.decode_latents([(plain - 0.5) * 2])[0], vae.decode(plain[None]).sample[0])
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)


def test_posterior_is_sampled_only_with_a_generator(model, image):
    first = model.encode_images([image, image], torch.Generator().manual_seed(0))
    again = model.encode_images([image, image], torch.Generator().manual_seed(0))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], first[1])
    assert torch.equal(model.encode_images([image])[0], model.encode_images([image])[0])
    assert model.encode_images([]) == []


# ---------------------------------------------------------------- training


def loss_of(model: UnifiedModel, image: torch.Tensor) -> torch.Tensor:
    velocity = model(
        ["a cat", "mirror it"],
        torch.ones(2, 8, 16, 16),
        torch.tensor([300.0, 700.0]),
        [[], [image]],
        [[], model.encode_images([image])],
    )
    return sum(v.square().mean() for v in velocity)


@pytest.mark.parametrize("stage", ["pretrain", "sft", "rl"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_trainable_parameter_gets_a_gradient_and_no_other(stage, checkpointing, image):
    model = make_tiny_model()
    add_lora(model.vlm, LoraSettings(rank=4, alpha=8, modules="all"), model.architecture.fusion_layers[0])
    chosen = dict(model.trainable_parameters(stage))
    if checkpointing:
        model.enable_gradient_checkpointing()
    model.train()
    loss_of(model, image).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == set(chosen)
    has_lora = any(".lora_" in name for name in chosen)
    assert has_lora == (stage == "sft")
    assert any(name.startswith("transformer.") for name in chosen) == (stage != "pretrain")
    assert ("meta_queries" in chosen) == (stage != "rl")
    assert model.vlm.training == (stage == "sft")
    assert not model.vae.training


def test_gradient_checkpointing_gives_the_same_gradients(image):
    results = []
    for checkpointing in (False, True):
        model = make_tiny_model()
        add_lora(model.vlm, LoraSettings(rank=4, dropout=0.0), model.architecture.fusion_layers[0])
        for name, p in lora_parameters(model.vlm).items():
            torch.manual_seed(len(name))
            torch.nn.init.normal_(p, std=0.1)
        chosen = model.trainable_parameters("sft")
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.train()
        loss_of(model, image).backward()
        results.append({name: p.grad for name, p in chosen})
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name])


@torch.no_grad()
def test_fresh_lora_changes_nothing_until_trained():
    model = make_tiny_model()
    before = model.encode_prompts(PROMPTS).context
    add_lora(model.vlm, LoraSettings(rank=4), model.architecture.fusion_layers[0])
    assert len({n.split(".lora_")[0] for n in lora_parameters(model.vlm)}) == 3 * 7 + 1
    torch.testing.assert_close(model.encode_prompts(PROMPTS).context, before)
    for p in lora_parameters(model.vlm).values():
        torch.nn.init.normal_(p)
    assert not torch.allclose(model.encode_prompts(PROMPTS).context, before)


def test_unknown_stage_and_padding():
    model = make_tiny_model()
    with pytest.raises(ValueError, match="one of pretrain, sft, rl"):
        model.trainable_parameters("warmup")
    with pytest.raises(UserError, match="allowed: masked, reference"):
        UnifiedModel(model.architecture, model.vlm, model.transformer, model.vae, make_tokenizer(), "left")
