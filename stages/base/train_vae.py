"""Train the tiny VAE: 64 px RGB to 8 x 16 x 16 latents (diffusers' AutoencoderKL).

    python -m stages.base.train_vae                  # encoder and decoder
    python -m stages.base.train_vae --decoder        # only improve the decoder; latents do not change

Left out on purpose: an adversarial and a perceptual loss. L1 on pixels and on their gradients is enough to make flat
icons sharp, and the VAE stays small enough that decoding never dominates a rollout.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from deepgen.models.presets import PRESETS
from stages.base.training import MODEL, load_split, to_float, training_steps, unique_pictures, update_ema


def loss_fn(vae: AutoencoderKL, x: torch.Tensor, kl_weight: float) -> torch.Tensor:
    """L1 on pixels and on pixel differences, plus a small KL term; x [B, 3, H, W] in [-1, 1]."""
    with torch.set_grad_enabled(next(vae.encoder.parameters()).requires_grad):
        posterior = vae.encode(x).latent_dist
    y = vae.decode(posterior.sample()).sample.float()
    edges = F.l1_loss(y.diff(dim=-1), x.diff(dim=-1)) + F.l1_loss(y.diff(dim=-2), x.diff(dim=-2))
    return F.l1_loss(y, x) + 0.5 * F.mse_loss(y, x) + 0.5 * edges + kl_weight * posterior.kl().mean() / x[0].numel()


def augment(x: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Shift, mirror and tint pictures, so that the VAE also handles pictures that are slightly off."""
    if rng.random() < 0.5:
        x = x.flip(-1)
    shift = rng.integers(-6, 7, size=2).tolist()
    x = torch.roll(x, shift, dims=(-2, -1))
    gain = torch.from_numpy(rng.uniform(0.75, 1.0, size=(x.shape[0], 3, 1, 1))).float()
    keep = torch.from_numpy(rng.random((x.shape[0], 1, 1, 1)) < 0.6)
    return torch.where(keep, x, (x + 1) * gain - 1)


@torch.no_grad()
def psnr(vae: AutoencoderKL, x: torch.Tensor) -> float:
    """Mean PSNR in dB of reconstructions from the posterior mode; images [N, 3, H, W] in [-1, 1]."""
    y = torch.cat([vae.decode(vae.encode(b).latent_dist.mode()).sample.clamp(-1, 1) for b in x.split(32)])
    mse = ((x - y) / 2).pow(2).mean(dim=(1, 2, 3))
    return float((-10 * mse.clamp_min(1e-8).log10()).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoder", action="store_true", help="train only the decoder of the trained VAE")
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--out", type=Path, default=MODEL / "vae")
    args = parser.parse_args()
    torch.manual_seed(int(args.decoder))
    rng = np.random.default_rng(int(args.decoder))
    pictures = unique_pictures(load_split("train"))
    images, p = to_float(pictures.images), pictures.weights(0.25)
    held = to_float(unique_pictures(load_split("heldout")).images)
    vae = AutoencoderKL.from_pretrained(args.out) if args.decoder else AutoencoderKL(**PRESETS["tiny"].vae)
    vae.encoder.requires_grad_(not args.decoder)
    trained = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    ema = {n: q.detach().clone() for n, q in vae.named_parameters()}
    for step, bar in training_steps(args.steps, "vae", optimizer, 2e-3):
        x = augment(images[rng.choice(len(images), 16, p=p)], rng)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_fn(vae, x, kl_weight=2e-4)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        update_ema(ema, vae, 0.995, step)
        if step % 100 == 99:
            bar.set_postfix(loss=f"{loss.item():.4f}", psnr=f"{psnr(vae, held[:64]):.1f}")
    vae.load_state_dict(ema, strict=False)
    if not args.decoder:
        with torch.no_grad():
            z = torch.cat([vae.encode(b).latent_dist.mode() for b in images.split(64)])
        vae.register_to_config(scaling_factor=float(1 / z.std()), shift_factor=float(z.mean()))
    vae.save_pretrained(args.out)
    print(f"held-out PSNR {psnr(vae, held):.2f} dB")


if __name__ == "__main__":
    main()
