"""The DiT: parity with the reference implementation, and independence of samples in a batch."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel

from deepgen.models.dit import DeepGenTransformer

GOLDEN = Path(__file__).parents[1] / "golden" / "dit.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN, allow_pickle=False) as arrays:
        return {
            name.removeprefix("dit/"): torch.from_numpy(arrays[name])
            for name in arrays.files
            if name.startswith("dit/") and name != "dit/config"
        } | {"config": json.loads(str(arrays["dit/config"]))}


@pytest.fixture(scope="module")
def dit(golden):
    model = DeepGenTransformer(**golden["config"])
    model.load_state_dict({k.removeprefix("sd/"): v for k, v in golden.items() if k.startswith("sd/")}, strict=True)
    return model.eval()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "x": randn(3, 4, 8, 8),
        "t": torch.tensor([50.0, 500.0, 950.0]),
        "context": randn(3, 7, 48),
        "pooled": randn(3, 40),
        "refs": [[randn(4, 8, 8)] for _ in range(3)],
    }


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


@torch.no_grad()
def test_parity_with_references_and_different_sizes(dit, golden):
    references = [[golden["ref0_0"]], [golden["ref1_0"], golden["ref1_1"]]]
    targets = [golden["latent0"], golden["latent1"]]
    out = dit(targets, golden["t"], golden["ctx"], golden["pooled"], references)
    assert isinstance(out, list)
    assert close(out[0], golden["out0"])
    assert close(out[1], golden["out1"])


@torch.no_grad()
def test_parity_text_to_image(dit, golden):
    x = torch.stack([golden["latent0"], 0.5 * golden["latent0"]])
    out = dit(x, golden["t"], golden["ctx"], golden["pooled"])
    assert isinstance(out, torch.Tensor)
    assert close(out, golden["out_t2i"])


@torch.no_grad()
def test_equals_diffusers_without_references(golden, dit, batch):
    plain = SD3Transformer2DModel(**golden["config"])
    plain.load_state_dict(dit.state_dict())
    wanted = plain(batch["x"], batch["context"], batch["pooled"], batch["t"]).sample
    assert close(dit(batch["x"], batch["t"], batch["context"], batch["pooled"]), wanted)


def test_diffusers_folder_round_trip(dit, batch, tmp_path):
    dit.save_pretrained(tmp_path)
    again = DeepGenTransformer.from_pretrained(tmp_path)
    assert dict(again.config)["num_layers"] == 3
    with torch.no_grad():
        arguments = (batch["x"], batch["t"], batch["context"], batch["pooled"])
        assert torch.equal(again(*arguments), dit(*arguments))


@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch(dit, batch):
    """Samples with targets, references and context of different lengths give the same result in a batch as alone."""
    targets = [batch["x"][0], torch.cat([batch["x"][1]] * 2, dim=-1), batch["x"][2][:, :4]]
    references = [batch["refs"][0], [], [batch["refs"][2][0][:, :6], batch["refs"][1][0]]]
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[0, :3] = mask[1, :1] = False
    together = dit(targets, batch["t"], batch["context"], batch["pooled"], references, mask)
    for i in range(3):
        context = batch["context"][i : i + 1, mask[i]]
        alone = dit([targets[i]], batch["t"][i : i + 1], context, batch["pooled"][i : i + 1], [references[i]])
        assert close(together[i], alone[0])


@torch.no_grad()
def test_list_of_equal_sizes_equals_tensor(dit, batch):
    arguments = (batch["t"], batch["context"], batch["pooled"], batch["refs"])
    as_list = dit(list(batch["x"]), *arguments)
    assert torch.equal(torch.stack(as_list), dit(batch["x"], *arguments))


@torch.no_grad()
def test_no_mask_is_built_when_nothing_is_padded(dit, batch, monkeypatch):
    masks = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None):
        masks.append(attn_mask)
        return original(query, key, value, attn_mask)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    everything = torch.ones(3, 7, dtype=torch.bool)
    dit(batch["x"], batch["t"], batch["context"], batch["pooled"], batch["refs"], everything)
    assert masks
    assert all(mask is None for mask in masks)
    masks.clear()
    everything[0, 0] = False
    dit(batch["x"], batch["t"], batch["context"], batch["pooled"], batch["refs"], everything)
    assert all(mask is not None for mask in masks)


def test_references_matter_and_receive_gradients(dit, batch):
    reference = batch["refs"][0][0].clone().requires_grad_()
    out = dit(batch["x"][:1], batch["t"][:1], batch["context"][:1], batch["pooled"][:1], [[reference]])
    out.square().mean().backward()
    assert reference.grad is not None
    assert reference.grad.abs().sum() > 0


def test_gradient_checkpointing_changes_nothing(golden, dit, batch):
    gradients = []
    for checkpointing in (False, True):
        model = DeepGenTransformer(**golden["config"])
        model.load_state_dict(dit.state_dict())
        if checkpointing:
            model.enable_gradient_checkpointing()
        mask = torch.ones(3, 7, dtype=torch.bool)
        mask[0, :2] = False
        out = model(batch["x"], batch["t"], batch["context"], batch["pooled"], batch["refs"], mask)
        out.square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(g is not None for g in gradients[0])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_bf16_autocast_stays_close_and_returns_the_targets_dtype(dit, batch):
    arguments = (batch["x"], batch["t"], batch["context"], batch["pooled"], batch["refs"])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rounded = dit(*arguments)
    with torch.no_grad():
        exact = dit(*arguments)
    assert rounded.dtype == torch.float32
    assert close(rounded, exact, 0.05)


def test_wrong_number_of_references(dit, batch):
    with pytest.raises(ValueError, match="2 lists of references for 3 targets"):
        dit(batch["x"], batch["t"], batch["context"], batch["pooled"], batch["refs"][:2])
