"""Train the tiny DiT from scratch: the stand-in for the public SD3.5-Kontext weights.

    python -m stages.base.train_dit

Like SD3, the DiT trains with its own text encoder, here a 2-layer transformer over the prompt's tokens. The encoder is
discarded afterwards: the bridge of `stages/pretrain.py` later learns to produce the context that the encoder gave.
Targets and references are VAE latents. A batch holds only generation or only editing, 5 to 1. The prompts are those of
the training set, with 10 % of generation prompts replaced by an empty one. The saved weights are a running average.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer

from deepgen.data.images import decode_image
from deepgen.data.records import Record
from deepgen.diffusion.schedule import rollout_sigmas
from deepgen.models.dit import DeepGenTransformer
from deepgen.models.presets import PRESETS
from stages.base.training import MODEL, load_split, to_float, training_steps, update_ema

WORDS_LEARNED = 4500  # steps; the DiT draws words correctly long before rare objects
SHIFT = 1.5  # shift of the training times towards noise; 16 x 16 latents need less than 64 x 64


class PromptEncoder(nn.Module):
    """Token embeddings, learned positions and two encoder layers; ids [B, L] -> context [B, L, D], pooled [B, D]."""

    def __init__(self, vocab: int, width: int = 192, length: int = 64):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(
            width, 3, 512, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        x = self.norm(self.layers(x, src_key_padding_mask=~mask))
        keep = mask.unsqueeze(-1)
        return x, (x * keep).sum(1) / keep.sum(1)


class Lesson:
    """Latents and token ids of the training records, drawn in batches of a single task."""

    def __init__(self, records: list[Record], vae: AutoencoderKL, tokenizer: Any, seed: int = 0):
        self.rng, self.vae = np.random.default_rng(seed), vae
        blobs = sorted({b for r in records for b in (r.image or b"", *r.references)})
        index = {b: i for i, b in enumerate(blobs)}
        self.latents = encode_all(vae, to_float(np.stack([decode_image(b) for b in blobs])))
        self.target = np.array([index[r.image or b""] for r in records])
        self.reference = np.array([index[r.references[0]] if r.references else -1 for r in records])
        self.ids = [x[:60] for x in tokenizer([r.prompt for r in records], add_special_tokens=False)["input_ids"]]
        self.pad = tokenizer.pad_token_id
        groups = {
            t: np.array([i for i, r in enumerate(records) if r.task == t]) for t in ("t2i", "reasoning", "text", "edit")
        }
        self.groups = groups

    def batch(self, edit: bool, size: int, step: int = 0) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """One batch: targets [B, 8, 16, 16], references or None, ids [B, L], mask [B, L]."""
        if edit:
            rows = self.rng.choice(self.groups["edit"], size)
        else:
            text = 0.3 if step < WORDS_LEARNED else 0.12
            tasks = self.rng.choice(["t2i", "reasoning", "text"], size, p=[0.85 * (1 - text), 0.15 * (1 - text), text])
            rows = np.array([self.rng.choice(self.groups[t]) for t in tasks])
        drop = self.rng.random(size) < (0.0 if edit else 0.1)
        ids = [[self.pad] if d else self.ids[r] for r, d in zip(rows, drop, strict=True)]
        length = max(map(len, ids))
        padded = torch.full((size, length), self.pad)
        mask = torch.zeros(size, length, dtype=torch.bool)
        for i, row in enumerate(ids):
            padded[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), True
        return self.latents[self.target[rows]], self.latents[self.reference[rows]] if edit else None, padded, mask


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Posterior modes of images [N, 3, 64, 64], shifted and scaled as in M1.7."""
    z = torch.cat([vae.encode(b).latent_dist.mode() for b in images.split(64)])
    return (z - vae.config.shift_factor) * vae.config.scaling_factor


def training_sigma(rng: np.random.Generator, size: int) -> Tensor:
    """Shifted logit-normal times (Esser et al. 2024, section 3.1), [B]."""
    u = torch.sigmoid(torch.from_numpy(rng.normal(size=size)).float())
    return SHIFT * u / (1 + (SHIFT - 1) * u)


@torch.no_grad()
def draw(
    dit: DeepGenTransformer,
    encoder: PromptEncoder,
    vae: AutoencoderKL,
    ids: Tensor,
    mask: Tensor,
    reference: Tensor | None,
    steps: int = 20,
) -> Tensor:
    """Images [B, 3, 64, 64], sampled by the Euler ODE from seeded noise."""
    x = torch.randn(len(ids), 8, 16, 16, generator=torch.Generator().manual_seed(5))
    sigmas = rollout_sigmas(steps)
    with torch.autocast("cpu", torch.bfloat16):
        context, pooled = encoder(ids, mask)
        for s, s_next in itertools.pairwise(sigmas):
            v = velocity(dit, x, s.expand(len(ids)), context, pooled, mask, reference)
            x = x + (s_next - s) * v.float()
    return vae.decode(x / vae.config.scaling_factor + vae.config.shift_factor).sample.clamp(-1, 1)


def velocity(
    dit: DeepGenTransformer,
    x: Tensor,
    sigma: Tensor,
    context: Tensor,
    pooled: Tensor,
    mask: Tensor,
    reference: Tensor | None,
) -> Tensor:
    refs = None if reference is None else [[r] for r in reference]
    return dit(x, sigma * 1000, context, pooled, cond_hidden_states=refs, encoder_attention_mask=mask)


def save_sheet(path: Path, images: Tensor, columns: int = 16) -> None:
    """Save a plain sheet of samples, to look at during training."""
    pixels = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    sheet = Image.new("RGB", (columns * 66, (len(pixels) + columns - 1) // columns * 66), "gray")
    for i, p in enumerate(pixels):
        sheet.paste(Image.fromarray(p), (i % columns * 66, i // columns * 66))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=11500)
    parser.add_argument("--start", type=int, default=0, help="continue from the weights saved at this step (every 500)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1.2e-3)
    parser.add_argument("--out", type=Path, default=MODEL)
    parser.add_argument("--sheets", type=Path, default=Path("runs/base"))
    args = parser.parse_args()
    torch.manual_seed(args.start)
    rng = np.random.default_rng(1 + args.start)
    tokenizer = AutoTokenizer.from_pretrained(MODEL / "tokenizer")
    vae = AutoencoderKL.from_pretrained(MODEL / "vae").eval()
    lesson = Lesson(load_split("train"), vae, tokenizer, args.start)
    dit, encoder = DeepGenTransformer(**PRESETS["tiny"].transformer), PromptEncoder(len(tokenizer))
    if args.start:
        dit = DeepGenTransformer.from_pretrained(args.out / "transformer")
        encoder.load_state_dict(torch.load(args.sheets / "prompt_encoder.pt", weights_only=True))
    both = nn.ModuleDict({"dit": dit, "encoder": encoder}).train()
    optimizer = torch.optim.AdamW(both.parameters(), lr=args.rate, betas=(0.9, 0.95), weight_decay=0.01)
    ema = {n: p.detach().clone() for n, p in both.named_parameters()}
    mean = {False: 1.0, True: 1.0}
    for step, bar in training_steps(args.steps, "dit", optimizer, args.rate, args.start):
        edit = step % 6 == 5
        target, reference, ids, mask = lesson.batch(edit, args.batch, step)
        noise, sigma = torch.randn_like(target), training_sigma(rng, len(target))
        x = torch.lerp(target, noise, sigma.view(-1, 1, 1, 1))
        with torch.autocast("cpu", torch.bfloat16):
            context, pooled = encoder(ids, mask)
            v = velocity(dit, x, sigma, context, pooled, mask, reference)
        loss = F.mse_loss(v.float(), noise - target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        update_ema(ema, both, 0.999, step - args.start)
        mean[edit] += 0.02 * (loss.item() - mean[edit])
        if step % 50 == 49:
            bar.set_postfix(t2i=f"{mean[False]:.4f}", edit=f"{mean[True]:.4f}")
        if step % 500 == 499 or step + 1 == args.steps:
            keep = {n: p.detach().clone() for n, p in both.named_parameters()}
            both.load_state_dict(ema, strict=False)
            for name, is_edit in (("t2i", False), ("edit", True)):
                look = lesson.batch(is_edit, 32, step)
                images = draw(dit, encoder, vae, look[2], look[3], look[1])
                before = decode(vae, look[0] if look[1] is None else look[1])
                save_sheet(args.sheets / f"dit_{name}_{step + 1}.png", torch.cat([before, images]))
            dit.save_pretrained(args.out / "transformer")
            torch.save(encoder.state_dict(), args.sheets / "prompt_encoder.pt")
            both.load_state_dict(keep, strict=False)  # not strict: `keep` lacks buffers such as positions
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(args.out / "scheduler")


@torch.no_grad()
def decode(vae: AutoencoderKL, z: Tensor) -> Tensor:
    return vae.decode(z / vae.config.scaling_factor + vae.config.shift_factor).sample.clamp(-1, 1)


if __name__ == "__main__":
    main()
