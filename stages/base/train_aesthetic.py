"""Train the aesthetic head: a small MLP over CLIP features, trained on clean and degraded pictures.

    python -m stages.base.train_aesthetic

This world has no human ratings, so the scale is artificial: a clean picture scores 8, and a fault lowers the score in
proportion to its strength, down to 2. The faults are typical of diffusion models: grain, blur, washed-out contrast,
noise in the latents, and two pictures blended into one.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from rewards.aesthetic_head import AestheticHead
from rewards.clip_encoder import ClipEncoder
from stages.base.train_clip import normalise
from stages.base.training import MODEL, REWARDS, load_split, to_float, training_steps, unique_pictures

BEST, WORST = 8.0, 2.0


@torch.no_grad()
def fault(x: torch.Tensor, strength: torch.Tensor, kind: int, vae: AutoencoderKL) -> torch.Tensor:
    """Apply one kind of fault with strength [B] in 0..1 to images [B, 3, H, W] in [-1, 1]."""
    s = strength.view(-1, 1, 1, 1)
    if kind == 0:
        return (x + 0.5 * s * torch.randn_like(x)).clamp(-1, 1)
    if kind == 1:
        small = F.interpolate(F.avg_pool2d(x, 5, 1, 2, count_include_pad=False), size=16, mode="bilinear")
        return torch.lerp(x, F.interpolate(small, size=x.shape[-1], mode="bilinear"), s)
    if kind == 2:
        return torch.lerp(x, x.mean(dim=(1, 2, 3), keepdim=True), 0.85 * s)
    if kind == 3:
        z = vae.encode(x).latent_dist.mode()
        return vae.decode(z + 1.2 * s * z.std() * torch.randn_like(z)).sample.clamp(-1, 1)
    return torch.lerp(x, x.roll(1, 0), 0.5 * s)


@torch.no_grad()
def features(encoder: ClipEncoder, x: torch.Tensor) -> torch.Tensor:
    return F.normalize(encoder.model.get_image_features(pixel_values=normalise(x)).pooler_output.float(), dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, default=REWARDS / "aesthetic")
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    encoder = ClipEncoder(REWARDS / "clip")
    vae = AutoencoderKL.from_pretrained(MODEL / "vae").eval()
    train, held = (to_float(unique_pictures(load_split(s)).images) for s in ("train", "heldout"))
    head = AestheticHead(128, (64,), "gelu")
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for step, bar in training_steps(args.steps, "aesthetic", optimizer, 3e-3):
        x = train[rng.choice(len(train), 64)]
        strength = torch.from_numpy(rng.random(64) * (rng.random(64) < 0.75)).float()
        f = features(encoder, fault(x, strength, step % 5, vae))
        loss = F.mse_loss(head(f), BEST - (BEST - WORST) * strength)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    wins = []
    for kind in range(5):
        weak, strong = (
            head(features(encoder, fault(held, torch.full((len(held),), s), kind, vae))) for s in (0.1, 0.6)
        )
        wins.append((weak > strong).float().mean().item())
    print("held-out: weaker fault scored higher, by kind:", [round(w, 3) for w in wins])
    head.save(args.out, clip="../clip")


if __name__ == "__main__":
    main()
